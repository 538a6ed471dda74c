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


PAIRS: list[tuple[tuple[int, dict[str, int]], tuple[int, dict[str, int]]]] = [
    ((1, {}), (4, dict(tp=2, ep=4))),
    ((4, dict(tp=4)), (2, dict(cp=2))),
    ((4, dict(tp=2, cp=2, ep=4)), (4, dict(zero_size=2))),
    ((4, dict(ep=4)), (1, {})),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}->{b}" for a, b in PAIRS])
def test_a_run_goes_on_under_another_layout(pools: Pools, base: Recipe, tmp_path: Path, dtype: str, source: tuple[int, dict[str, int]],
                                            target: tuple[int, dict[str, int]]) -> None:
    def go(layout: tuple[int, dict[str, int]], start: str, steps: int, name: str) -> tuple[list[float], str]:
        recipe = tiny.variant(base, train__dtype=dtype, **{f"parallel__{key}": value for key, value in layout[1].items()})
        by_rank = pools[layout[0]].run(train, dataclasses.asdict(recipe), start, steps, str(tmp_path / name))
        return by_rank[0]

    before, saved = go(source, "", SAVED_AT, "source")
    # Loaded and saved again without a step: every element is where it was, bit for bit.
    _, again = go(target, saved, 0, "again")
    state, copy = contents(saved), contents(again)
    assert state.keys() == copy.keys() and all(np.array_equal(state[name], copy[name]) for name in state)
    after, _ = go(target, saved, STEPS - SAVED_AT, "target")
    whole, _ = go((1, {}), "", STEPS, "whole")
    assert np.abs(np.array(before + after) - np.array(whole)).max() < (1e-5 if dtype == "fp32" else 2e-2)
    # The same layout goes on bitwise.
    uninterrupted, _ = go(source, "", STEPS, "uninterrupted")
    resumed, _ = go(source, saved, STEPS - SAVED_AT, "resumed")
    assert before + resumed == uninterrupted
