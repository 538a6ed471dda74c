"""Checkpoints between layouts: saved under one, gone on with under another, as if nothing had happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.dist.pool import Pools
from zaya.config import Recipe

SAVED_AT, STEPS = 4, 8
State = dict[str, np.ndarray]


def train(rank: int, world_size: int, tables: dict[str, Any], source: str, steps: int, root: str) -> tuple[list[float], str]:
    """Losses of `steps` steps from a checkpoint ("": from the start), and the checkpoint written after them."""
    trainer = tiny.trainer(tables, world_size)
    if source:
        trainer.load(Path(source))
    losses = [trainer.train_step().loss.item() for _ in range(steps)]
    return losses, str(trainer.save(Path(root)))


def contents(path: str) -> State:
    from zaya.checkpoint.read import Checkpoint

    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return {name: checkpoint.read(name).float().numpy() for name in checkpoint.names()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny.recipe(tmp_path_factory.mktemp("reshape"), train__steps=STEPS, train__seq_len=48, train__micro_batch_size=8,
                       model__num_heads=8, model__num_experts=8)


Place = tuple[int, dict[str, int]]
PAIRS: list[tuple[Place, Place]] = [
    ((1, {}), (4, dict(tp=2, ep=4))),
    ((4, dict(tp=4)), (2, dict(cp=2))),
    ((4, dict(tp=2, cp=2, ep=4)), (4, dict(zero_size=2))),
    ((4, dict(ep=4)), (1, {})),
    # The slow half. There are 2 KV heads: tp = 4 and 8 hold copies of them.
    ((4, {}), (2, dict(tp=2))),
    ((2, dict(ep=2)), (4, dict(ep=4))),
    ((4, dict(cp=4)), (4, dict(tp=2, ep=4))),
    ((4, dict(ep=2, zero_size=1)), (4, dict(tp=4))),
    ((2, dict(tp=2)), (8, dict(tp=4, cp=2, ep=2))),
    ((4, dict(zero_size=2)), (8, dict(ep=8))),
    ((1, {}), (8, dict(tp=8))),
    ((8, {}), (4, dict(tp=4))),
    ((8, dict(cp=4, ep=8)), (1, {})),
    ((8, dict(tp=2, cp=2, ep=4, zero_size=2)), (2, {})),
    ((8, dict(tp=8)), (8, dict(cp=8))),
    ((8, dict(tp=2, cp=2, ep=8)), (8, dict(tp=4, ep=4, zero_size=2))),
]
ROWS = [pytest.param(source, target, optimizer, dtype, id=f"{source}->{target}-{optimizer}-{dtype}",
                     marks=[] if i < 4 and optimizer == "muon" else pytest.mark.slow)
        for i, (source, target) in enumerate(PAIRS)
        for optimizer, dtype in (("muon", "fp32"), ("adamw", "fp32"), ("muon", "bf16"))[: 3 if i < 4 else 2]]
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
"""Of the losses against a single process' that never stopped: the law of the layouts, tests/dist/test_layouts.py."""


class Runs:
    """Losses and checkpoints of runs from the start; each is run once, as many rows of the table compare with it."""

    def __init__(self, pools: Pools, base: Recipe, folder: Path) -> None:
        self.pools, self.base, self.folder = pools, base, folder
        self._known: dict[str, tuple[list[float], str]] = {}

    def go(self, place: Place, optimizer: str, dtype: str, start: str, steps: int) -> tuple[list[float], str]:
        key = f"{place}-{optimizer}-{dtype}-{steps}"
        if not start and key in self._known:
            return self._known[key]
        # Muon's rate would be a wild one for AdamW, which then amplifies rounding.
        rates = {} if optimizer == "muon" else {"optim__lr": 5e-3, "optim__min_lr": 5e-4}
        recipe = tiny.variant(self.base, train__dtype=dtype, optim__name=optimizer, **rates,
                              **{f"parallel__{key}": value for key, value in place[1].items()})
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        found: tuple[list[float], str] = self.pools[place[0]].run(train, dataclasses.asdict(recipe), start, steps, str(folder),
                                                                 timeout_s=280)[0]
        if not start:
            self._known[key] = found
        return found


@pytest.fixture(scope="module")
def runs(pools: Pools, base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pools, base, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("source", "target", "optimizer", "dtype"), ROWS)
def test_a_run_goes_on_under_another_layout(runs: Runs, source: Place, target: Place, optimizer: str, dtype: str) -> None:
    before, saved = runs.go(source, optimizer, dtype, "", SAVED_AT)
    # Loaded and saved again without a step: every element is where it was, bit for bit.
    _, again = runs.go(target, optimizer, dtype, saved, 0)
    state, copy = contents(saved), contents(again)
    assert state.keys() == copy.keys() and all(np.array_equal(state[name], copy[name]) for name in state)
    after, _ = runs.go(target, optimizer, dtype, saved, STEPS - SAVED_AT)
    whole, _ = runs.go((1, {}), optimizer, dtype, "", STEPS)
    assert np.abs(np.array(before + after) - np.array(whole)).max() < BOUNDS[dtype]
    # The same layout goes on bitwise.
    uninterrupted, _ = runs.go(source, optimizer, dtype, "", STEPS)
    resumed, _ = runs.go(source, optimizer, dtype, saved, STEPS - SAVED_AT)
    assert before + resumed == uninterrupted
