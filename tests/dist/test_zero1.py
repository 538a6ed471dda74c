"""ZeRO-1 and the distributed Muon: what is sent, when it is waited for, and that any cut of the buckets updates alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.pool import Pools
from zaya.parallel.account import zero1_traffic
from zaya.parallel.partition import make_buckets, muon_rounds
from zaya.plan import AdamW, Fill, Muon, ParameterPlan
from zaya.shard import Layout, Replicate, Shard

ROWS = [
    ParameterPlan("embedding", (16, 6), Shard(0, "tp", 16), AdamW(), True, Fill(0.0)),
    ParameterPlan("first.norm", (6,), Replicate(), AdamW(), False, Fill(0.0)),
    ParameterPlan("first.q", (16, 6), Shard(0, "tp", 8), Muon(), True, Fill(0.0)),
    ParameterPlan("first.k", (4, 6), Shard(0, "tp", 2), Muon(), True, Fill(0.0)),
    ParameterPlan("first.v", (4, 6), Shard(0, "tp", 2), Muon(2), True, Fill(0.0)),
    ParameterPlan("first.o", (6, 16), Shard(1, "tp", 8), Muon(), True, Fill(0.0)),
    ParameterPlan("first.router", (5, 6), Replicate(), Muon(), True, Fill(0.0)),
    ParameterPlan("first.gate_up", (4, 10, 6), Shard(0, "ep", 4), Muon(2), True, Fill(0.0)),
    ParameterPlan("last.down", (4, 6, 5), Shard(0, "ep", 4), Muon(), True, Fill(0.0)),
    ParameterPlan("last.norm", (7,), Replicate(), AdamW(), False, Fill(0.0)),
]
TABLE = {row.name: row for row in ROWS}
BUCKET, ROUND = 90, 40  # elements: several buckets and rounds of each kind


def steps(rank: int, world_size: int, axes: dict[str, int], dtype_name: str, num_steps: int, reduce_bf16: bool) -> dict[str, Any]:
    """A few updates from gradients that every rank draws from its own number; the state, what was sent, and the order of events."""
    import torch
    from torch import nn

    from zaya.config import OptimConfig
    from zaya.parallel.collectives import all_reduce, gather_objects
    from zaya.parallel.mesh import make_mesh
    from zaya.parallel.zero1 import Zero1

    layout = Layout(world_size, **axes)
    mesh = make_mesh(layout, torch.device("cpu"))
    dtype = getattr(torch, dtype_name)
    boxes = {row.name: layout.piece(row.placement, row.shape, rank) for row in ROWS}

    def piece(name: str, whole: Any) -> Any:
        offsets, sizes = boxes[name]
        return whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].to(dtype)

    draw = torch.Generator().manual_seed(0)
    start = {row.name: torch.randn(row.shape, generator=draw, dtype=torch.float64) for row in ROWS}
    parameters = {name: nn.Parameter(piece(name, whole).clone()) for name, whole in start.items()}
    config = OptimConfig(name="muon", lr=0.05, min_lr=0.01, warmup_steps=0)
    optimizer = Zero1(parameters, TABLE, config, mesh, bucket_elements=BUCKET, round_elements=ROUND,
                      reduce_dtype=torch.bfloat16 if reduce_bf16 else None)
    norms = []
    for step in range(num_steps):
        if step == num_steps - 1:
            mesh.ledger.sent.clear()
            mesh.ledger.events = []
        optimizer.start_step(micro_batches=2)
        # The global gradient is one draw per parameter; each holder has an equal share of it, in two micro-batches.
        draw = torch.Generator().manual_seed(100 + step)
        grads = {row.name: torch.randn(row.shape, generator=draw, dtype=torch.float64) for row in ROWS}
        for weight in (0.25, 0.75):
            loss = sum((parameters[row.name] * (piece(row.name, grads[row.name]) * weight / len(layout.holders(row.placement, rank)))).sum()
                       for row in ROWS)
            optimizer.backward(loss)
            mesh.ledger.note("note", "backward", str(weight))
        optimizer.finish_gradients()
        square = optimizer.squared_norm()
        norms.append(all_reduce(square, mesh.world).wait().sqrt().item())
        optimizer.update(lr=0.05, grad_scale=torch.tensor(0.5, dtype=dtype), commit=torch.tensor(step != 1))
        mesh.ledger.note("note", "update", "done")
        optimizer.wait()
    mesh.ledger.sent.pop(("all_reduce", "world"), None)  # of the norm
    shards = {f"{kind}.{name}": [(box, tensor.double().numpy().copy()) for box, tensor in optimizer.own_parts(name, kind)]
              for name in TABLE for kind in optimizer.kinds(name)}
    copies: Any = gather_objects({name: parameter.detach().double().numpy().copy() for name, parameter in parameters.items()}, mesh.world)
    for other, theirs in enumerate(copies):
        for row in ROWS:
            if other in layout.holders(row.placement, rank):
                assert (theirs[row.name] == copies[rank][row.name]).all(), f"{row.name}: holders {rank} and {other} differ"
    return dict(norms=norms, shards=shards, sent=dict(mesh.ledger.sent), events=mesh.ledger.events)


def assemble(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    whole: dict[str, Any] = {}
    for result in by_rank:
        for key, parts in result["shards"].items():
            target = whole.setdefault(key, np.full(TABLE[key.partition(".")[2]].shape, np.nan))
            for (offsets, sizes), values in parts:
                window = target[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
                assert np.isnan(window).all(), f"{key}: an element has two owners"
                window[...] = values
    for key, values in whole.items():
        assert not np.isnan(values).any(), f"{key}: an element has no owner"
    return whole


CASES = [(2, {}), (2, dict(tp=2)), (4, dict(tp=4)), (4, dict(ep=4)), (4, dict(tp=2, ep=2)), (4, dict(zero_size=2)), (4, dict(zero_size=1)),
         (8, dict(tp=8, ep=4)), (8, dict(tp=2, cp=2, ep=4)), (8, dict(tp=4, ep=2, zero_size=2))]


@pytest.mark.parametrize(("world_size", "axes"), CASES, ids=[f"{w}-{a}" for w, a in CASES])
def test_any_cut_updates_alike_and_sends_what_the_formula_says(pools: Pools, world_size: int, axes: dict[str, int]) -> None:
    import numpy as np

    single = pools[1].run(steps, {}, "float64", 4, False)
    expected = assemble(single)
    by_rank = pools[world_size].run(steps, axes, "float64", 4, False)
    for key, values in assemble(by_rank).items():
        assert np.abs(values - expected[key]).max() < 1e-12, key
    layout = Layout(world_size, **axes)
    buckets = make_buckets(ROWS, layout, muon=True, bucket_elements=BUCKET)
    for rank, result in enumerate(by_rank):
        assert result["norms"] == pytest.approx(single[0]["norms"], rel=1e-12)
        rounds = muon_rounds(buckets, layout, rank, ROUND)
        formula = zero1_traffic(buckets, rounds, layout, rank, 8, 8)
        assert {key: n for key, n in result["sent"].items() if n} == {key: n for key, n in formula.items() if n}


def test_reduction_in_bf16_halves_the_traffic_and_stays_near(pools: Pools) -> None:
    import numpy as np

    wide, narrow = (pools[4].run(steps, {}, "float32", 1, bf16) for bf16 in (False, True))
    for result, other in zip(wide, narrow):
        key = ("reduce_scatter", "all holders")
        assert other["sent"][key] * 2 == result["sent"][key]
        assert other["norms"][0] != result["norms"][0] and other["norms"][0] == pytest.approx(result["norms"][0], rel=1e-2)
    momentum_wide, momentum_narrow = (assemble(results)["momentum.first.q"] for results in (wide, narrow))
    assert np.abs(momentum_wide - momentum_narrow).max() < 0.02 * np.abs(momentum_wide).max()


def test_what_overlaps(pools: Pools) -> None:
    """Reductions are launched inside backward and waited for after it; parameters are gathered in the background; Muon's exchanges all
    start before the first is orthogonalised."""
    for result in pools[4].run(steps, dict(tp=2), "float64", 2, False):
        events = result["events"]
        last_backward = events.index(("note", "backward", "0.75"))
        launches = [i for i, (what, op, _) in enumerate(events) if (what, op) == ("launch", "reduce_scatter")]
        waits = [i for i, (what, op, _) in enumerate(events) if (what, op) == ("wait", "reduce_scatter")]
        assert max(launches) < last_backward < min(waits), "every bucket left during the last micro-batch's backward"
        assert min(launches) > events.index(("note", "backward", "0.25")), "accumulation costs no traffic"
        directions = [i for i, event in enumerate(events) if event == ("launch", "all_to_all", "directions")]
        arrived = [i for i, event in enumerate(events) if event == ("wait", "all_to_all", "directions")]
        returned = [i for i, event in enumerate(events) if event == ("wait", "all_to_all", "updates")]
        left = [i for i, event in enumerate(events) if event == ("launch", "all_to_all", "updates")]
        assert len(directions) > 1 and max(directions) < min(arrived) and max(left) < min(returned)
        assert all(a < b for a, b in zip(left[:-1], arrived[1:])), "an update leaves before the next round is waited for"
        updated = events.index(("note", "update", "done"))
        gathers = [i for i, (what, op, _) in enumerate(events) if (what, op) == ("launch", "all_gather")]
        gathered = [i for i, (what, op, _) in enumerate(events) if (what, op) == ("wait", "all_gather")]
        assert max(gathers) < updated < min(gathered), "parameters are waited for when the next forward needs them"
