"""The DeepSpeed engine computes what Zero1 computes: same losses, norms, routing and parameters, and each reads the other's checkpoints.

On two gloo ranks, in processes of their own: DeepSpeed leaves globals behind. Skipped where deepspeed cannot be imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.dist.pool import WorkerError, WorkerPool
from tests.dist.test_layouts import Run, train
from zaya.config import Recipe, recipe_from_tables

STEPS = 20
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None,
                                     reason="deepspeed cannot be imported; docs/deepspeed.md says how to install it")


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, timeout_s=280)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two micro-batches of two rows per rank and step."""
    return tiny.recipe(tmp_path_factory.mktemp("deepspeed"), train__steps=STEPS, optim__name="adamw", optim__lr=5e-3)


@pytest.fixture(scope="module")
def ours(pool: WorkerPool, base: Recipe) -> Run:
    return run(pool, base)


def call(pool: WorkerPool, function: Callable[..., Any], *args: Any) -> list[Any]:
    """pool.run; after a failure the next call has new processes, because DeepSpeed does not outlive its process group."""
    try:
        return pool.run(function, *args)
    except WorkerError:
        pool.close()
        raise


def run(pool: WorkerPool, recipe: Recipe) -> Run:
    return call(pool, train, dataclasses.asdict(recipe), STEPS, True)[0]


def zero(recipe: Recipe, stage: int, **overrides: Any) -> Recipe:
    return tiny.variant(recipe, parallel__engine="deepspeed", parallel__zero_stage=stage, **overrides)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@needs_deepspeed
@pytest.mark.parametrize(("stage", "overrides"), [
    (1, {}), (2, {}), (3, {}), (1, dict(parallel__offload=True)), (2, dict(parallel__offload=True)), (3, dict(parallel__offload=True)),
    (2, dict(train__micro_batch_size=4)), (3, dict(train__recompute="full")), (3, dict(train__recompute="selective")),
])
def test_trains_as_zero1_does(pool: WorkerPool, base: Recipe, ours: Run, stage: int, overrides: dict[str, Any]) -> None:
    numbers, first, final = run(pool, zero(base, stage, **overrides))
    numbers_1, first_1, final_1 = ours
    for (loss, norm, shares), (loss_1, norm_1, shares_1) in zip(numbers, numbers_1, strict=True):
        assert abs(loss - loss_1) < 1e-5 and abs(norm - norm_1) < 1e-4 * norm_1
        assert np.abs(np.subtract(shares, shares_1)).max() < 1e-6, "the router's balance is the trainer's, whatever the engine"
    assert final.keys() == final_1.keys()
    for name, values in final.items():
        assert (first[name] == first_1[name]).all()
        assert rms(values - final_1[name]) <= 1e-3 * rms(final_1[name] - first_1[name]), name


def steps_and_checkpoint(rank: int, world_size: int, tables: dict[str, Any], start: str, steps: int, root: str) -> tuple[str, list[float]]:
    """Train from a checkpoint ("": from new weights) and save: where, and the losses; an evaluation after each step changes nothing."""

    trainer = tiny.trainer(tables, world_size)
    if start:
        trainer.load(Path(start))
    losses = []
    for _ in range(steps):
        losses += [trainer.train_step().loss.item(), trainer.evaluate()]
    return str(trainer.save(Path(root))), losses


@needs_deepspeed
@pytest.mark.parametrize(("stage", "dtype", "overrides"), [
    (1, "fp32", {}), (2, "fp32", dict(parallel__offload=True)), (3, "fp32", {}),
    (1, "bf16", {}), (2, "bf16", {}), (3, "bf16", dict(parallel__grad_dtype="bf16")), (3, "bf16", dict(parallel__offload=True)),
])
def test_checkpoints_pass_between_the_engines(pool: WorkerPool, base: Recipe, tmp_path: Path, stage: int, dtype: str,
                                              overrides: dict[str, Any]) -> None:
    """Three steps with the one, three with the other: as six with Zero1 (bf16: until its routing flips). The second engine starts from
    the first one's bits."""
    from zaya.checkpoint.read import Checkpoint

    recipe = tiny.variant(base, train__dtype=dtype)
    tables = {"zaya": dataclasses.asdict(recipe), "deepspeed": dataclasses.asdict(zero(recipe, stage, **overrides))}

    def go(engine: str, start: str, steps: int, name: str) -> tuple[str, list[float]]:
        return call(pool, steps_and_checkpoint, tables[engine], start, steps, str(tmp_path / name))[0]

    tolerance = 1e-5 if dtype == "fp32" else 3e-2
    whole = go("zaya", "", 6, "whole")[1]
    for one, other in (("zaya", "deepspeed"), ("deepspeed", "zaya")):
        start, losses = go(one, "", 3, one)
        copy, _ = go(other, start, 0, f"{other} copies")
        ours, theirs = Checkpoint.open(Path(start)), Checkpoint.open(Path(copy))
        assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
        for name in ours.manifest.tensors:
            assert torch.equal(ours.read(name), theirs.read(name)), name
        losses += go(other, start, 3, other)[1]
        assert np.abs(np.subtract(losses, whole)).max() < tolerance


def refused_steps(rank: int, world_size: int, tables: dict[str, Any]) -> list[str]:
    """Names of the state that changed in steps that were not committed; "" where the next good step changed nothing."""

    trainer = tiny.trainer(tables, world_size)
    trainer.train_step()

    def state() -> dict[str, list[torch.Tensor]]:
        return {name: [tensor.clone() for _, tensor in share.parts] for name, share in trainer.state.owned().items()}

    def changed(before: dict[str, list[torch.Tensor]]) -> list[str]:
        return [name for name, parts in state().items() if not all(map(torch.equal, parts, before[name]))]

    before, backward, update = state(), trainer.optimizer.backward, trainer.optimizer.update
    trainer.optimizer.backward = lambda loss: backward(loss * float("nan"))  # type: ignore[method-assign]
    assert not trainer.train_step().committed
    trainer.optimizer.backward = backward  # type: ignore[method-assign]
    wrong = changed(before)
    no = torch.zeros((), dtype=torch.bool)
    trainer.balance.update = lambda counts_LC, commit: None  # type: ignore[method-assign]
    trainer.optimizer.update = lambda commit, **numbers: update(commit=no, **numbers)  # type: ignore[method-assign]
    trainer.train_step()
    trainer.optimizer.update = update  # type: ignore[method-assign]
    wrong += changed(before)
    trainer.train_step()
    return wrong + ([] if changed(before) else [""])


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_a_refused_step_changes_nothing(pool: WorkerPool, base: Recipe, stage: int, offload: bool) -> None:
    """Not finite, or finite and refused by the trainer; and training goes on."""
    assert call(pool, refused_steps, dataclasses.asdict(zero(base, stage, parallel__offload=offload))) == [[], []]


def share_of_memory(rank: int, world_size: int, tables: dict[str, Any]) -> tuple[float, float]:
    """Of the parameters' elements: what this rank holds of the optimizer state, and of parameters between two steps."""
    trainer = tiny.trainer(tables, world_size)
    trainer.train_step()
    total = sum(row.numel for row in trainer.table.values())
    moments = sum(tensor.numel() for name in trainer.table for _, tensor in trainer.optimizer.parts(name, "exp_avg"))
    return moments / total, sum(p.numel() for p in trainer.model.parameters()) / total


@needs_deepspeed
def test_stage_3_holds_a_share_of_the_parameters(pool: WorkerPool, base: Recipe) -> None:
    """Half of the moments at every stage; at stage 3 only vectors are whole between steps."""
    for stage in (2, 3):
        for moments, parameters in call(pool, share_of_memory, dataclasses.asdict(zero(base, stage))):
            assert abs(moments - 0.5) < 0.01
            assert parameters < 0.1 if stage == 3 else parameters == 1


@pytest.mark.parametrize(("overrides", "world_size", "words"), [
    (dict(optim__name="muon"), 2, ['optim.name = "muon"', 'use optim.name = "adamw"']),
    (dict(train__dtype="fp64"), 2, ['train.dtype = "fp64"', 'use "fp32" or "bf16"']),
    (dict(parallel__tp=2), 2, ["parallel.tp = 2", "use tp = 1"]),
    (dict(parallel__cp=2), 2, ["parallel.cp = 2", "use cp = 1"]),
    (dict(parallel__ep=2), 2, ["parallel.ep = 2", "use ep = 1"]),
    (dict(parallel__zero_size=1), 2, ["parallel.zero_size = 1", "use zero_size = 0"]),
    (dict(parallel__zero_stage=4), 2, ["parallel.zero_stage = 4", "1, 2, 3"]),
    (dict(parallel__engine="zaya", parallel__zero_stage=3), 2, ["parallel.zero_stage = 3", 'parallel.engine = "deepspeed"']),
    (dict(parallel__engine="zaya", parallel__offload=True), 2, ["parallel.offload = true", 'parallel.engine = "deepspeed"']),
])
def test_what_it_does_not_do_is_an_error(base: Recipe, overrides: dict[str, Any], world_size: int, words: list[str]) -> None:
    zero(base, 1).validate(world_size)
    with pytest.raises(ValueError) as error:
        tiny.variant(zero(base, 1), **overrides).validate(world_size)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_without_deepspeed_one_line_says_so(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from zaya.parallel.mesh import make_mesh
    from zaya.shard import Layout
    from zaya.trainer import Trainer, open_data

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    mesh = make_mesh(Layout(1), torch.device("cpu"))
    with pytest.raises(ValueError, match=r'parallel.engine = "deepspeed" but deepspeed cannot be imported .*docs/deepspeed.md'):
        Trainer(zero(base, 1), mesh, open_data(base, mesh))
