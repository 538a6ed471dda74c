"""The law: one recipe under any layout computes what a single process computes, to rounding.

Each row of the table trains 20 steps on 1, 2, 4 or 8 gloo processes and is compared with the single process: losses, gradient norms,
routing and every final parameter. fp32: losses within 1e-5, RMS(theta - theta') / RMS(theta_end - theta_0) <= 1e-3; fp64: 1e-10, and the
routing is the same to the token.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.dist.pool import Pools
from tests.needs import needs_compiler
from zaya.config import Recipe, recipe_from_tables

STEPS = 20
Run = tuple[list[tuple[float, float, list[list[float]]]], dict[str, np.ndarray], dict[str, np.ndarray]]


def train(rank: int, world_size: int, tables: dict[str, Any], steps: int, small_buckets: bool) -> Run | None:
    """Steps of a recipe; rank 0 returns (loss, grad norm, expert shares) of each, the first and the final parameters."""
    import torch

    from zaya.kernels import backend
    from zaya.parallel import partition
    from zaya.parallel.collectives import gather_objects

    if small_buckets:
        partition.BUCKET_ELEMENTS, partition.ROUND_ELEMENTS = 5000, 1500
    try:
        trainer = tiny.trainer(tables, world_size)
        first = _parameters(gather_objects(_owned(trainer), trainer.mesh.world))
        results = [trainer.train_step() for _ in range(steps)]
        trainer.optimizer.wait()
        final = _parameters(gather_objects(_owned(trainer), trainer.mesh.world))
    finally:
        partition.BUCKET_ELEMENTS, partition.ROUND_ELEMENTS = 40_000_000, 1 << 22
        backend.choose("reference", torch.device("cpu"), torch.float64, 32)  # the next test's in this process
    numbers = [(r.loss.item(), r.grad_norm.item(), r.shares_LE.tolist()) for r in results]
    return (numbers, first, final) if rank == 0 else None


def _owned(trainer: Any) -> dict[str, Any]:
    """This rank's boxes of every model tensor."""
    return {name: (share.shape, [(box, tensor.numpy().copy()) for box, tensor in share.parts])
            for name, share in trainer.state.owned().items() if name.startswith("model.")}


def _parameters(by_rank: list[Any]) -> dict[str, np.ndarray]:
    """Logical tensors from the boxes of all ranks; an element that nobody or two ranks own shows as NaN or is counted twice."""
    whole: dict[str, np.ndarray] = {}
    for name, (shape, _) in by_rank[0].items():
        whole[name] = np.full(shape, np.nan)
        for shares in by_rank:
            for (offsets, sizes), values in shares[name][1]:
                window = whole[name][tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
                assert np.isnan(window).all(), f"{name}: an element has two owners"
                window[...] = values.reshape(sizes)
        assert not np.isnan(whole[name]).any(), f"{name}: an element has no owner"
    return whole


@functools.cache
def corpora(folder: Path) -> Recipe:
    return tiny.recipe(folder, train__steps=STEPS, train__seq_len=48, train__micro_batch_size=8, model__num_heads=8, model__num_experts=8,
                       optim__lr=5e-3)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return corpora(tmp_path_factory.mktemp("layouts"))


_single: dict[str, Run] = {}


def run(pools: Pools, world_size: int, recipe: Recipe, *, small_buckets: bool = False) -> Run:
    by_rank = pools[world_size].run(train, dataclasses.asdict(recipe), STEPS, small_buckets, timeout_s=280)
    return by_rank[0]


def single(pools: Pools, recipe: Recipe) -> Run:
    """The single process' run of a recipe, whatever its layout; kept, because many layouts compare with it."""
    recipe = tiny.variant(recipe, parallel__tp=1, parallel__cp=1, parallel__ep=1, parallel__zero_size=0)
    key = repr(recipe)
    if key not in _single:
        _single[key] = run(pools, 1, recipe)
    return _single[key]


# world size, layout and what else differs from the base recipe
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, dict(tp=2)),
    (2, dict(cp=2)),
    (2, dict(ep=2)),
    (4, {}),
    (4, dict(tp=2)),
    (4, dict(tp=4)),
    (4, dict(cp=4)),
    (4, dict(ep=4)),
    (4, dict(tp=2, ep=4)),
    (4, dict(cp=2, ep=2)),
    (4, dict(tp=2, cp=2, ep=4)),
    (4, dict(zero_size=2)),
    (4, dict(ep=2, zero_size=1)),
    (8, {}),
    (8, dict(tp=8)),
    (8, dict(tp=2, cp=2)),
    (8, dict(tp=2, cp=2, ep=8)),
    (8, dict(tp=4, cp=2, ep=2)),
    (8, dict(cp=8)),
    (8, dict(cp=4, ep=8)),
    (8, dict(ep=8)),
    (8, dict(tp=4, ep=4, zero_size=2)),
    (8, dict(tp=2, cp=2, ep=4, zero_size=2)),
]
# What also must not change the result: accumulation, recomputation, micro-batches, and more ranks than any one axis.
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (2, dict(parallel__tp=2, train__recompute="full")),
    (4, dict(parallel__cp=2, parallel__ep=4, train__recompute="full")),
    (4, dict(parallel__tp=2, parallel__ep=2, train__recompute="selective")),
    (4, dict(parallel__cp=4, train__recompute="selective", train__micro_batch_size=1)),
    (2, dict(train__batch_ramp=(2, 2, 30), train__micro_batch_size=1)),
    (8, dict(parallel__tp=2, parallel__cp=2, parallel__ep=4, parallel__zero_size=1, train__recompute="full", train__micro_batch_size=4)),
]
NAMES = ["-".join([f"{world}ranks", *(f"{k}{v}" for k, v in layout.items())]) for world, layout in LAYOUTS]


@pytest.mark.parametrize(("world_size", "changes"), [pytest.param(w, c, id=f"{w}ranks-{c}", marks=pytest.mark.slow if w == 8 else ())
                                                     for w, c in OTHERS])
def test_nothing_else_changes_the_result(pools: Pools, base: Recipe, world_size: int, changes: dict[str, Any]) -> None:
    ramp = {key: value for key, value in changes.items() if key == "train__batch_ramp"}  # another batch is another result
    check(pools, world_size, tiny.variant(base, train__dtype="fp64", **changes), alike=tiny.variant(base, train__dtype="fp64", **ramp))


def check(pools: Pools, world_size: int, recipe: Recipe, *, small_buckets: bool = False, alike: Recipe | None = None) -> None:
    """The recipe under its layout against the single process' run of it (of `alike`)."""
    numbers, first, final = run(pools, world_size, recipe, small_buckets=small_buckets)
    numbers_1, first_1, final_1 = single(pools, alike or recipe)
    exact = recipe.train.dtype == "fp64"
    for name, start in first_1.items():
        assert np.array_equal(first[name], start), f"{name} does not start alike"
    for step, ((loss, norm, shares), (loss_1, norm_1, shares_1)) in enumerate(zip(numbers, numbers_1, strict=True), start=1):
        tolerance = 1e-10 if exact else 1e-5
        assert abs(loss - loss_1) < tolerance, f"step {step}: loss {loss} against {loss_1}"
        assert abs(norm - norm_1) < (1e-10 if exact else 1e-4) * norm_1, f"step {step}: gradient norm {norm} against {norm_1}"
        assert not exact or shares == shares_1, f"step {step}: another routing"
    for name, end in final_1.items():
        moved = np.sqrt(np.mean((end - first_1[name]) ** 2))
        apart = np.sqrt(np.mean((final[name] - end) ** 2))
        assert apart <= (1e-9 if exact else 1e-3) * moved + 1e-15, f"{name} ends {apart / moved:.1e} of its way apart"


def runs() -> list[Any]:
    """Every layout with both optimizers in both dtypes; those that `make test` leaves to `make test-full` are marked slow."""
    quick = {("muon", "fp64"): {*NAMES[:14], "8ranks-tp2-cp2-ep8", "8ranks-tp4-ep4-zero_size2"},
             ("adamw", "fp32"): {"2ranks-tp2", "4ranks-cp4", "4ranks-tp2-cp2-ep4"}, ("muon", "fp32"): {"4ranks-tp2-ep4"}}
    return [pytest.param(world_size, layout, optimizer, dtype, id=f"{optimizer}-{dtype}-{name}",
                         marks=() if name in quick.get((optimizer, dtype), ()) else pytest.mark.slow)
            for optimizer in ("muon", "adamw") for dtype in ("fp64", "fp32") for name, (world_size, layout) in zip(NAMES, LAYOUTS)]


@pytest.mark.parametrize(("world_size", "layout", "optimizer", "dtype"), runs())
def test_every_layout_computes_the_same(pools: Pools, base: Recipe, world_size: int, layout: dict[str, Any], optimizer: str,
                                        dtype: str) -> None:
    parallel = {f"parallel__{key}": value for key, value in layout.items()}
    check(pools, world_size, tiny.variant(base, optim__name=optimizer, train__dtype=dtype, **parallel), small_buckets=optimizer == "muon")


@needs_compiler
@pytest.mark.parametrize(("world_size", "layout"), [(2, dict(tp=2)), (2, dict(cp=2)), (4, dict(tp=2, ep=4)), (4, dict(tp=2, cp=2, ep=2))], ids=str)
def test_layouts_compute_the_same_in_c(pools: Pools, base: Recipe, world_size: int, layout: dict[str, Any]) -> None:
    """Sizes that the ops in C take: halos and zig-zag chunks, means given, shards of the vocabulary, rows already sorted."""
    check(pools, world_size, tiny.variant(base, optim__name="adamw", model__head_dim=32, model__moe_intermediate_size=64, train__kernels="cpu",
                                          **{f"parallel__{key}": value for key, value in layout.items()}))


@needs_compiler
def test_ranks_that_would_compute_differently_are_refused(pools: Pools, base: Recipe) -> None:
    refused = pools[2].run(choose_apart, dataclasses.asdict(tiny.variant(base, model__head_dim=32, train__kernels="auto")))
    assert refused == ['kernels would be cpu on rank 0 and reference on rank 1; make their nodes alike, or set train.kernels = "reference"'] * 2


def choose_apart(rank: int, world_size: int, tables: dict[str, Any]) -> str:
    """What a rank's start ends with, where the environment of rank 1 chooses otherwise."""
    import torch

    from zaya.kernels import backend

    if rank == 1:
        os.environ[backend.ENVIRONMENT] = "reference"
    try:
        tiny.trainer(tables, world_size)
    except ValueError as error:
        return str(error) if getattr(error, "on_all_ranks", False) else "said by one"
    finally:
        os.environ.pop(backend.ENVIRONMENT, None)
        backend.choose("reference", torch.device("cpu"), torch.float64, 32)  # the next test's in this process
    return "nothing"
