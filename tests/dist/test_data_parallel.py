"""Plain data parallelism: 1, 2 and 4 processes compute the same training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests import tiny
from tests.dist.pool import Pools
from zaya.config import Recipe, recipe_from_tables

STEPS = 20


def losses(rank: int, world_size: int, tables: dict) -> list[tuple[float, float, list]]:
    """Loss, gradient norm and expert shares of every step on this rank."""
    import torch.distributed as dist

    from zaya.parallel.collectives import Group
    from zaya.parallel.mesh import Mesh, open_mesh
    from zaya.trainer import Trainer, open_data

    recipe = recipe_from_tables(tables)
    recipe.validate(world_size)
    import torch

    mesh = open_mesh("cpu") if world_size == 1 else Mesh(Group(dist.group.WORLD, rank, world_size), torch.device("cpu"))
    trainer = Trainer(recipe, mesh, open_data(recipe, mesh))
    results = [trainer.train_step() for _ in range(STEPS)]
    return [(r.loss.item(), r.grad_norm.item(), r.shares_LE.tolist()) for r in results]


def train(pools: Pools, world_size: int, recipe: Recipe) -> list[tuple[float, float, list]]:
    by_rank = pools[world_size].run(losses, dataclasses.asdict(recipe), timeout_s=240)
    assert all(other == by_rank[0] for other in by_rank), "every rank sees the same global numbers"
    return by_rank[0]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_two_and_four_processes_train_alike(pools: Pools, tmp_path: Path, optimizer: str) -> None:
    recipe = tiny.recipe(tmp_path, optim__name=optimizer, optim__lr=5e-3, train__steps=STEPS)
    single = train(pools, 1, recipe)
    for world_size in (2, 4):
        for (loss, norm, shares), (loss_1, norm_1, shares_1) in zip(train(pools, world_size, recipe), single):
            assert abs(loss - loss_1) < 1e-5 and abs(norm - norm_1) < 1e-4 * norm_1 and shares == shares_1
