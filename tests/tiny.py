"""A recipe small enough for tests: a tiny ZAYA1 (both attention kinds, packed documents) on a corpus of random documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya.config import Recipe, recipe_from_tables

if TYPE_CHECKING:
    import torch

    from zaya.trainer import Trainer

VOCABULARY = 96
SEQ_LEN = 24


def write_corpus(prefix: Path, *, documents: int, seed: int, longest: int = 60) -> None:
    """Documents of 1 to `longest` tokens, each ending in token 0, through megatron-core's own builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        length = int(rng.integers(1, longest))
        # Steps of -2 .. 2 from one token to the next: something to learn.
        tokens = 1 + (rng.integers(0, VOCABULARY) + np.cumsum(rng.integers(-2, 3, length))) % (VOCABULARY - 1)
        tokens[-1] = 0
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")


def recipe(folder: Path, **overrides: object) -> Recipe:
    """The tiny recipe with `section__key=value` changes; its corpora are made in `folder` when first asked for."""
    for name, documents, seed in (("train", 150, 0), ("valid", 40, 1)):
        if not (folder / f"{name}.idx").exists():
            write_corpus(folder / name, documents=documents, seed=seed)
    tables: dict[str, dict[str, object]] = {
        "model": dict(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
                      moe_intermediate_size=24, router_hidden_size=16, attention_pattern=["sliding", "full"], sliding_window=6),
        "data": dict(train=[str(folder / "train")], valid=str(folder / "valid")),
        "train": dict(steps=6, global_batch_size=8, micro_batch_size=2, seq_len=SEQ_LEN, seed=3, device="cpu", eval_interval=3,
                      eval_rows=8),
        "optim": dict(name="muon", lr=2e-2, min_lr=2e-3, warmup_steps=2, balance_lr=1e-2),
        "run": dict(dir=str(folder / "run")),
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        tables.setdefault(section, {})[name] = value
    return recipe_from_tables(tables)


def variant(base: Recipe, **overrides: object) -> Recipe:
    """`base` with `section__key=value` changes."""
    tables = dataclasses.asdict(base)
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        tables[section][name] = value
    return recipe_from_tables(tables)


def trainer(tables: dict[str, Any], world_size: int) -> Trainer:
    """A rank's trainer on a worker of the pools, under the recipe's layout (collective)."""
    import torch

    from zaya.parallel.mesh import make_mesh
    from zaya.shard import Layout
    from zaya.trainer import Trainer, open_data

    recipe = recipe_from_tables(tables)
    recipe.validate(world_size)
    mesh = make_mesh(Layout.of(recipe.parallel, world_size), torch.device("cpu"))
    return Trainer(recipe, mesh, open_data(recipe, mesh))


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The state of a single process' trainer by checkpoint name; every tensor is one box, which is the memory that holds it."""
    return {name: share.parts[0][1] for name, share in trainer.state.owned().items()}
