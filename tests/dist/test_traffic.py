"""The bytes that a step sends, collective by collective, are what zaya/parallel/account.py says without running it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests import tiny
from tests.dist.pool import Pools
from zaya.config import Recipe
from zaya.parallel.account import model_traffic, zero1_traffic
from zaya.parallel.partition import make_buckets, muon_rounds
from zaya.plan import plan
from zaya.shard import Layout


def sent_by_a_step(rank: int, world_size: int, tables: dict[str, Any]) -> dict[tuple[str, str], int]:
    trainer = tiny.trainer(tables, world_size)
    trainer.mesh.ledger.sent.clear()
    trainer.train_step()
    trainer.optimizer.wait()
    return dict(trainer.mesh.ledger.sent)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny.recipe(tmp_path_factory.mktemp("traffic"), train__seq_len=48, train__micro_batch_size=4, model__num_heads=8,
                       model__num_experts=8, model__num_kv_heads=2)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("axes", [dict(), dict(tp=2), dict(tp=4), dict(cp=4), dict(tp=2, cp=2, ep=4), dict(ep=2, zero_size=2)], ids=str)
def test_a_step_sends_what_the_account_says(pools: Pools, base: Recipe, axes: dict[str, int], recompute: str) -> None:
    recipe = tiny.variant(base, train__recompute=recompute, **{f"parallel__{key}": value for key, value in axes.items()})
    layout, table = Layout(4, **axes), plan(recipe.model)
    buckets = make_buckets(table.values(), layout, muon=True)
    passes = recipe.micro_batches(layout.dp)
    for rank, sent in enumerate(pools[4].run(sent_by_a_step, dataclasses.asdict(recipe))):
        expected = zero1_traffic(buckets, muon_rounds(buckets, layout, rank), layout, rank, 4, 4)
        one = model_traffic(recipe.model, layout, rank, recipe.micro_batch_rows(layout.dp), recipe.train.seq_len, recompute, "fp32")
        expected.update({key: n * passes for key, n in one.items()})
        routed = sent.pop(("all_to_all", "ep"), 0), expected.pop(("all_to_all", "ep"), 0)  # depends on the router
        assert (routed[0] == 0) == (routed[1] == 0) and routed[0] <= 2.5 * routed[1]
        sent.pop(("all_reduce", "world"))  # of the numbers of a step
        assert {key: n for key, n in sent.items() if n} == {key: n for key, n in expected.items() if n}
