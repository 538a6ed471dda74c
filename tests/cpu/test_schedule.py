"""How large the batch of a step is: every row once, in any chain of steps; and the closed form is the chain."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.cpu.test_trainer import equal, run, trainer
from tools import dump_batch
from zaya.config import TrainConfig, load_recipe
from zaya.metrics import read_rows
from zaya.schedule import batch_size, position_of

TRAIN = TrainConfig(steps=100, global_batch_size=64, micro_batch_size=2, seq_len=48, seed=0)


def ramped(*ramp: int) -> TrainConfig:
    return dataclasses.replace(TRAIN, batch_ramp=ramp)


def test_a_ramp_grows_in_equal_parts_of_its_rows() -> None:
    """As Megatron's RampupBatchsizeNumMicroBatchesCalculator: 16, 32, 48 over 300 rows are 100 rows each."""
    train = ramped(16, 16, 300)
    assert [batch_size(position, train) for position in (0, 99, 100, 199, 200, 299, 300, 10**12)] == [16, 16, 32, 32, 48, 48, 64, 64]
    assert list(train.batch_sizes()) == [16, 32, 48, 64] and list(TRAIN.batch_sizes()) == [64]
    assert batch_size(0, TRAIN) == batch_size(0, ramped(64, 5, 1000)) == 64


@settings(max_examples=200)
@given(st.integers(1, 64).flatmap(lambda start: st.tuples(
    st.just(start), st.sampled_from([n for n in range(1, 65) if (64 - start) % n == 0]), st.integers(1, 5000))))
def test_the_position_of_a_step_is_that_of_the_chain(ramp: tuple[int, int, int]) -> None:
    train, position, largest = ramped(*ramp), 0, 0
    for step in range(1, 400):
        assert position_of(step, train) == position
        rows = batch_size(position, train)
        assert rows in train.batch_sizes() and rows >= largest
        position, largest = position + rows, rows
    assert position_of(10**9, train) - position_of(10**9 - 1, train) == 64


@pytest.mark.parametrize(("ramp", "message"), [
    ([8], "must be [start, increment, rows], three numbers of at least 1"),
    ([8, 0, 5], "must be [start, increment, rows]"),
    ([8, 5, 100], "8 rows and a number of increments of 5 do not make train.global_batch_size = 64"),
    ([1, 1, 100], "makes 64 sizes of batches; use a larger increment, for at most 20"),
    ([128, 64, 100], "do not make train.global_batch_size = 64"),
])
def test_a_ramp_that_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, ramp: list[int], message: str) -> None:
    monkeypatch.setattr("zaya.config.MOST_BATCH_SIZES", 20)
    with pytest.raises(ValueError) as caught:
        ramped(*ramp).validate()
    assert str(caught.value).startswith(f"train.batch_ramp = {ramp}") and message in str(caught.value)


def test_every_batch_of_a_ramp_must_suit_the_ranks(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__global_batch_size=8, train__batch_ramp=[2, 2, 10], train__micro_batch_size=2)
    recipe.validate(1)
    with pytest.raises(ValueError, match=r"train\.batch_ramp = \[2, 2, 10\]: its batches must be multiples of the 4 data-parallel ranks"):
        recipe.validate(4)
    wide = tiny.variant(recipe, train__micro_batch_size=4)
    wide.validate(2)
    assert [wide.micro_batch_rows(1, rows) for rows in wide.train.batch_sizes()] == [2, 4, 3, 4], "6 rows are two passes of 3"
    with pytest.raises(ValueError, match="takes the same number of micro-batches in every step"):
        tiny.variant(recipe, parallel__engine="deepspeed", optim__name="adamw").validate(1)


def test_a_ramped_run_trains_on_the_same_rows_and_resumes_bitwise(tmp_path: Path) -> None:
    ramp = {"train__batch_ramp": [2, 2, 12], "train__steps": 7, "checkpoint__interval": 2, "train__eval_interval": 0}
    recipes = [tiny.recipe(tmp_path, **ramp, run__dir=str(tmp_path / f"run{i}")) for i in (0, 1)]
    rows, state = run(recipes[0])
    sizes = [2, 2, 4, 6, 8, 8, 8]  # from 4 rows on 4, from 8 on 6, from 12 on 8
    assert [row["tokens"] for row in rows] == [sum(sizes[:step]) * tiny.SEQ_LEN for step in range(1, 8)]
    timed, _ = read_rows(tmp_path / "run0/metrics.jsonl")
    assert [round(row["tokens_per_second"] * row["step_time_s"]) for row in timed] == [rows * tiny.SEQ_LEN for rows in sizes]
    run(recipes[1])
    for step in (6, 7):
        (tmp_path / f"run1/checkpoints/step-{step:08d}/manifest.json").unlink()
    rows_resumed, state_resumed = run(recipes[1])
    assert rows_resumed == rows and equal(state_resumed, state)


def test_a_run_that_goes_on_with_another_ramp_says_so(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__batch_ramp=[2, 2, 12], train__steps=2, checkpoint__interval=1)
    run(recipe)
    other = trainer(tiny.variant(recipe, train__batch_ramp=[4, 4, 20], train__steps=4))
    other.restore()
    assert "train.batch_ramp was [2, 2, 12], is [4, 4, 20]" in other.origin
    same = trainer(recipe)
    same.restore()
    assert "ramp" not in same.origin


def test_the_rows_of_a_ramped_step_can_be_dumped(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__batch_ramp=[2, 2, 12])
    path, out = tmp_path / "ramp.toml", tmp_path / "batch.npz"
    path.write_text(recipe.to_toml())
    built = trainer(load_recipe(path, []))
    for step, first in ((1, 0), (3, 4), (4, 8), (6, 22)):
        assert dump_batch.main([str(path), "--step", str(step), "--out", str(out)]) == 0
        expected = built.loader.batch(first, batch_size(first, recipe.train)).tokens_BT
        assert torch.equal(torch.from_numpy(np.load(out)["tokens"]), expected)
