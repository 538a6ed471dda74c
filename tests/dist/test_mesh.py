"""The mesh: Megatron-core's order, groups that work, and what it prints."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import tiny
from tests.dist.pool import Pools
from zaya.parallel.collectives import Group
from zaya.parallel.mesh import TIMEOUT_S, Mesh, open_mesh
from zaya.shard import Layout, Replicate, Shard


def every_group(mesh: Mesh) -> dict[str, Group]:
    found = {name: getattr(mesh, name) for name in ("world", "tp", "cp", "dp", "ep", "edp", "token")}
    for name, placement in (("all", Replicate()), ("heads", Shard(0, "tp", 8)), ("kv", Shard(0, "tp", 2)), ("experts", Shard(0, "ep", 8))):
        holding = mesh.holding(placement)
        found |= {f"{name} shard": holding.shard, f"{name} replicas": holding.replicas, f"{name} exchange": holding.exchange}
    return found | {"kv replicas": mesh.kv_replicas(2)}


def groups(rank: int, world_size: int, axes: dict[str, int], apart: bool) -> dict[str, Any]:
    """Every group's ranks, and the sum of the ranks' numbers over it: that the group really is these ranks."""
    import os

    import torch

    from zaya.parallel.collectives import all_reduce
    from zaya.parallel.mesh import make_mesh

    mesh = make_mesh(Layout(world_size, **axes), torch.device("cpu"), apart)  # checks itself against Megatron-core's rank generator
    found = every_group(mesh)
    sums = {name: all_reduce(torch.tensor([2**rank]), group).wait().item() for name, group in found.items()}
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        table = mesh.table()
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    waits = {name: group.handle._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in found.items()
             if group.handle not in (None, torch.distributed.group.WORLD)}  # the whole world's is the pool's
    return {"ranks": {name: group.ranks for name, group in found.items()}, "sums": sums, "table": table, "waits": waits}


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
@pytest.mark.parametrize(("world_size", "axes"), [
    (1, {}), (4, dict(tp=2, ep=4)), (8, dict(tp=2, cp=2, ep=4)), (8, dict(tp=4, ep=2, zero_size=2)), (8, dict(cp=4, ep=8, zero_size=4)),
], ids=str)
def test_groups_are_the_ranks_they_say(pools: Pools, world_size: int, axes: dict[str, int], apart: bool) -> None:
    layout = Layout(world_size, **axes)
    for rank, found in enumerate(pools[world_size].run(groups, axes, apart)):
        for name, ranks in found["ranks"].items():
            assert rank in ranks and found["sums"][name] == sum(2**other for other in ranks), name
        for axis in ("tp", "cp", "dp", "ep", "edp", "token"):
            assert list(found["ranks"][axis]) == layout.group(axis, rank)
        assert set(found["waits"].values()) <= {TIMEOUT_S}
        shard = found["ranks"]["experts shard"]
        assert list(shard) == layout.shard_ranks(Shard(0, "ep", 8), rank) and all(other % layout.ep == rank % layout.ep for other in shard)


def communicators(rank: int, world_size: int, axes: dict[str, int], backend: str) -> tuple[dict[str, set[str]], str, list[Any]]:
    """Over gloo, but as where the backend is this one: which groups use each communicator ("0": the whole world's), the control group, and
    the (ranks, backend) of all that this rank made, in order."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from zaya.parallel.mesh import make_mesh

    new_group, made = dist.new_group, list[Any]()

    def noted(ranks: Any = None, **options: Any) -> Any:
        made.append((ranks, options["backend"]))
        return new_group(ranks, **options)

    with (mock.patch.object(dist, "new_group", noted), mock.patch.object(distributed_c10d, "new_group", noted),
          mock.patch.object(dist, "get_backend", lambda: backend)):
        mesh = make_mesh(Layout(world_size, **axes), torch.device("cpu"))
        found = every_group(mesh)
    by_name: dict[str, set[str]] = {}
    for name, group in found.items():
        if group.handle is not None:
            by_name.setdefault(group.handle.group_name, set()).add(name)
    return by_name, mesh.world.control.group_name if mesh.world.control is not None else "", made


MODEL = {"tp", "cp", "ep", "kv replicas"}


@pytest.mark.parametrize(("world_size", "axes", "of_model"), [
    (4, dict(), []),
    (4, dict(tp=2, cp=2), [["tp"], ["cp"]]),
    (8, dict(ep=8), [["ep"]]),
    (8, dict(tp=8, ep=8), [["ep", "tp"], ["kv replicas"]]),
    (8, dict(cp=4, ep=8, zero_size=4), [["cp"], ["ep"]]),
    (8, dict(tp=4, ep=2, zero_size=2), [["tp"], ["ep", "kv replicas"]]),
], ids=str)
def test_over_rccl_a_block_never_waits_in_the_optimizers_communicator(pools: Pools, world_size: int, axes: dict[str, int],
                                                                    of_model: list[list[str]]) -> None:
    shared, apart = (pools[world_size].run(communicators, axes, backend) for backend in ("gloo", "nccl"))
    for runs in (shared, apart):
        assert all(made == runs[0][2] for _, _, made in runs), "the ranks make other groups, or in another order"
    for (together, none, _), (split, control, made) in zip(shared, apart):
        assert [sorted(names) for names in split.values() if names & MODEL] == of_model and not split.get("0", set()) & MODEL
        state = [names - MODEL for names in together.values()]
        assert sorted(map(sorted, filter(None, state))) == sorted(sorted(names) for names in split.values() if not names & MODEL)
        assert not none and control and control not in split and [ranks for ranks, backend in made if backend == "gloo"] == [None]


def talk(rank: int, world_size: int, apart: bool, leaves: bool) -> list[Any]:
    """What becomes of objects of the world, and of the mesh's end; with `leaves` rank 1 goes away before."""
    import torch
    import torch.distributed as dist

    from zaya.parallel.collectives import gather_objects
    from zaya.parallel.mesh import close_mesh, make_mesh
    from zaya.tiers import objects

    mesh = make_mesh(Layout(world_size), torch.device("cpu"), apart)
    events: list[Any] = []
    if leaves:
        try:
            if rank != 1:
                objects(rank, mesh)
        except RuntimeError:
            events.append("raises")
        dist.destroy_process_group()
        return events

    def noted(operation: Any) -> Any:
        def call(*args: Any, group: Any) -> None:
            events.append((operation.__name__, group is not mesh.world.handle))
            operation(*args, group=group)
        return call

    with (mock.patch.object(dist, "all_gather_object", noted(dist.all_gather_object)),
          mock.patch.object(dist, "barrier", noted(dist.barrier)),
          mock.patch.object(torch.cuda, "synchronize", lambda device: events.append("synchronize"))):
        events += [objects(rank, mesh), gather_objects(rank, mesh.world)]
        close_mesh(dataclasses.replace(mesh, device=torch.device("cuda", 0)))
    return [*events, dist.is_initialized()]


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_objects_and_barriers_of_the_world_need_no_gpu(pools: Pools, apart: bool) -> None:
    for events in pools[2].run(talk, apart, False):
        assert events == [("all_gather_object", apart), ("all_gather_object", apart), [0, 1], [0, 1], "synchronize", ("barrier", apart),
                          False]


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_a_rank_that_is_gone_ends_the_others_wait_for_its_object(pools: Pools, apart: bool) -> None:
    assert pools[2].run(talk, apart, True, timeout_s=TIMEOUT_S / 10) == [["raises"], []]


def train(rank: int, world_size: int, tables: dict[str, Any], apart: bool) -> tuple[bool, Any]:
    """Whether ep has a communicator that the optimizer does not use; what three steps computed, bit by bit."""
    from zaya.parallel import mesh

    with mock.patch.object(mesh, "make_mesh", functools.partial(mesh.make_mesh, apart=apart)):
        trainer = tiny.trainer(tables, world_size)
    losses = [trainer.train_step().loss.item() for _ in range(3)]
    state = {name: [tensor.numpy().tobytes() for _, tensor in share.parts] for name, share in trainer.state.owned().items()}
    return trainer.mesh.ep.handle is not trainer.mesh.world.handle, (losses, state, trainer.mesh.ledger.sent)


@pytest.mark.parametrize("axes", [dict(ep=4), dict(tp=2, cp=2, ep=4)], ids=str)
def test_communicators_of_their_own_change_no_result(pools: Pools, tmp_path: Path, axes: dict[str, int]) -> None:
    recipe = tiny.recipe(tmp_path, train__seq_len=48, train__micro_batch_size=4, model__num_heads=8, model__num_experts=8,
                         **{f"parallel__{key}": value for key, value in axes.items()})
    shared, apart = (pools[4].run(train, dataclasses.asdict(recipe), apart) for apart in (False, True))
    assert [own for own, _ in shared] == [False] * 4 and [own for own, _ in apart] == [True] * 4
    assert [result for _, result in shared] == [result for _, result in apart]


def test_the_table_names_groups_that_leave_their_node(pools: Pools) -> None:
    table = pools[8].run(groups, dict(tp=2, cp=2, ep=4), False)[0]["table"]
    assert table.splitlines()[0].startswith("mesh: 8 ranks = tp 2 x cp 2 x dp 2, experts ep 4 x edp 2 | cpu, gloo")
    assert "   tp: [0 1]  [2 3]  [4 5]  [6 7]" in table.splitlines()
    assert "   ep: [0 1 2 3]  [4 5 6 7]  (leaves its node of 2 ranks: slow)" in table.splitlines()


@pytest.mark.parametrize("local_rank", ["0", "4"])  # all of them find it: those that wait would be told nothing
def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch, local_rank: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="this node has 4 GPUs for 8 processes"):
        open_mesh("auto", Layout(8))


def test_megatron_does_not_say_what_is_not_installed(tmp_path: Path) -> None:
    """And nothing else is silenced: a warning of another package that it imports is seen."""
    (tmp_path / "einops.py").write_text("import warnings\nwarnings.warn('something else')")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", "from zaya.parallel import mesh; mesh._axes(mesh.Layout(2))"], capture_output=True,
                          text=True, cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"}, timeout=200)
    assert done.returncode == 0 and "something else" in done.stderr and done.stderr.count("Warning") == 1, done.stderr
