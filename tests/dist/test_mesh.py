"""The mesh: Megatron-core's order, groups that work, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.pool import Pools
from zaya.parallel.mesh import TIMEOUT_S, open_mesh
from zaya.shard import Layout, Replicate, Shard


def groups(rank: int, world_size: int, axes: dict[str, int]) -> dict[str, Any]:
    """Every group's ranks, and the sum of the ranks' numbers over it: that the group really is these ranks."""
    import os

    import torch

    from zaya.parallel.collectives import all_reduce
    from zaya.parallel.mesh import make_mesh

    mesh = make_mesh(Layout(world_size, **axes), torch.device("cpu"))  # checks itself against Megatron-core's rank generator
    found = {name: getattr(mesh, name) for name in ("world", "tp", "cp", "dp", "ep", "edp", "token")}
    for name, placement in (("all", Replicate()), ("heads", Shard(0, "tp", 8)), ("kv", Shard(0, "tp", 2)), ("experts", Shard(0, "ep", 8))):
        holding = mesh.holding(placement)
        found |= {f"{name} shard": holding.shard, f"{name} replicas": holding.replicas, f"{name} exchange": holding.exchange}
    found["kv replicas"] = mesh.kv_replicas(2)
    sums = {name: all_reduce(torch.tensor([2**rank]), group).wait().item() for name, group in found.items()}
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        table = mesh.table()
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    waits = {name: group.handle._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in found.items()
             if 1 < group.size < world_size}  # the whole world's is the pool's
    return {"ranks": {name: group.ranks for name, group in found.items()}, "sums": sums, "table": table, "waits": waits}


@pytest.mark.parametrize(("world_size", "axes"), [
    (1, {}), (4, dict(tp=2, ep=4)), (8, dict(tp=2, cp=2, ep=4)), (8, dict(tp=4, ep=2, zero_size=2)), (8, dict(cp=4, ep=8, zero_size=4)),
], ids=str)
def test_groups_are_the_ranks_they_say(pools: Pools, world_size: int, axes: dict[str, int]) -> None:
    layout = Layout(world_size, **axes)
    for rank, found in enumerate(pools[world_size].run(groups, axes)):
        for name, ranks in found["ranks"].items():
            assert rank in ranks and found["sums"][name] == sum(2**other for other in ranks), name
        for axis in ("tp", "cp", "dp", "ep", "edp", "token"):
            assert list(found["ranks"][axis]) == layout.group(axis, rank)
        assert set(found["waits"].values()) <= {TIMEOUT_S}
        shard = found["ranks"]["experts shard"]
        assert list(shard) == layout.shard_ranks(Shard(0, "ep", 8), rank) and all(other % layout.ep == rank % layout.ep for other in shard)


def test_the_table_names_groups_that_leave_their_node(pools: Pools) -> None:
    table = pools[8].run(groups, dict(tp=2, cp=2, ep=4))[0]["table"]
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
