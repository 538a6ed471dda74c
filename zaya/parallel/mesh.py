"""The mesh: which ranks exist, which axis each lies on, which of them work together, and the device of this one.

Where a run learns its rank and the number of ranks from torchrun's environment. Dense parameters live on tp x (cp x dp), experts on
ep x edp, folded over the same ranks in Megatron-core's order (its rank generator enumerates them). Groups are made in one order on every
rank. Those of the same ranks share one communicator. Over RCCL they have two, one per `Purpose`: a communicator has one stream, in which an
all-to-all that a block's forward waits for would queue behind the optimizer's reduce-scatters.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist

from zaya.parallel.collectives import Group, Ledger, barrier
from zaya.shard import Layout, Replicate, Shard

BACKGROUND_TIMEOUT_S = 7200.0  # a rank may wait for another's disk, not for its GPU
TIMEOUT_S = 600.0  # of a collective that a rank never joins; torch's own default for RCCL
Purpose = Literal["model", "state"]
"""Who waits for a group's collectives: forward and backward of a block (tp, cp, ep, KV replicas), or the optimizer and the loop."""


@dataclass(frozen=True)
class Holding:
    """Who shares the optimizer state of parameters that are placed alike."""

    shard: Group
    """Holders of this rank's piece among which its state is cut: each element has one owner here."""
    replicas: Group
    """Owners of the same elements in other blocks of parallel.zero_size holders; alone by default."""
    exchange: Group
    """Ranks whose state together makes whole matrices: `shard`, and where a matrix is cut over tp the others' `shard` too."""


@dataclass(frozen=True)
class Mesh:
    """This process' place. `token`: ranks with different tokens (cp x dp); `dp`: those with different rows."""

    layout: Layout
    world: Group
    tp: Group
    cp: Group
    dp: Group
    ep: Group
    edp: Group
    token: Group
    device: torch.device
    ledger: Ledger
    make: Callable[[Purpose, str, Callable[[int], Sequence[int]]], Group]
    """make(purpose, name, ranks that a rank shares the group with) -> this rank's group; collective."""
    store: dist.Store | None = None
    """Where the processes of the job met (torchrun's); None: one process, or a mesh of a test's own."""
    _holdings: dict[tuple[str, int], Holding] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    def holding(self, placement: Shard | Replicate) -> Holding:
        """The groups of a placement. Every rank asks for the same placements in the same order: the first time makes the groups."""
        layout, kind = self.layout, self.layout.kind(placement)
        if kind not in self._holdings:
            def replicas(rank: int) -> list[int]:
                return layout.holders(placement, rank)[layout.shard(placement, rank) :: layout.shard_size(placement)]

            name = kind[0] if kind[1] == 1 else f"{kind[0]}/{kind[1]}"
            self._holdings[kind] = Holding(self.make("state", f"{name} holders", lambda rank: layout.shard_ranks(placement, rank)),
                                           self.make("state", f"{name} replicas", replicas),
                                           self.make("state", f"{name} exchange", lambda rank: layout.exchange_ranks(placement, rank)))
        return self._holdings[kind]

    def kv_replicas(self, num_kv_heads: int) -> Group:
        """The neighbours on tp that hold this rank's KV head (collective): alone unless tp exceeds the number of KV heads."""
        copies = Shard(0, "tp", num_kv_heads).replicas(self.layout.tp)
        return self.make("model", "kv replicas", lambda rank: range(rank // copies * copies, (rank // copies + 1) * copies))

    def __str__(self) -> str:
        layout = self.layout
        backend = dist.get_backend(self.world.handle) if self.world.handle is not None else "no process group"
        zero = f", zero_size {layout.zero_size}" if layout.zero_size else ""
        return (f"mesh: {self.world_size} ranks = tp {layout.tp} x cp {layout.cp} x dp {layout.dp}, experts ep {layout.ep} x "
                f"edp {layout.edp}{zero} | {self.device.type}, {backend}")

    def table(self) -> str:
        """Every axis with its groups of ranks, a line each; axes of size 1 are left out. Many groups are cut short.

        A tp or ep group that leaves its node is said so: xGMI wants all GPUs of one node in such a collective.
        """
        lines = [str(self)]
        per_node = ranks_per_node_from_environment()
        for axis in ("tp", "cp", "dp", "ep", "edp"):
            if self.layout.size(axis) > 1:
                groups = self.layout.groups(axis)
                shown = ["[" + " ".join(map(str, group[:16])) + (" ...]" if group[16:] else "]") for group in groups[:8]]
                leaves = axis in ("tp", "ep") and any(len({rank // per_node for rank in group}) > 1 for group in groups)
                lines.append(f"  {axis:>3}: " + "  ".join(shown) + ("  ..." if groups[8:] else "")
                             + (f"  (leaves its node of {per_node} ranks: slow)" if leaves else ""))
        return "\n".join(lines)


def world_size_from_environment() -> int:
    """Number of processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process' rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def ranks_per_node_from_environment() -> int:
    """Processes that torchrun started on this node; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size_from_environment()))


def open_mesh(device: str, layout: Layout) -> Mesh:
    """Join the other processes of this job (collective call 1 of every rank). device: auto | cuda | cpu (ROCm is "cuda").

    One process needs no process group: it runs the same lines, on groups of size 1. ValueError: cuda asked for where there is none, or
    more processes than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('train.device = "cuda" but torch sees no GPU; use train.device = "cpu" or "auto"')
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        num_gpus = torch.cuda.device_count()
        # By torchrun's count, so that every rank of the node finds it; without one by this rank's own place.
        if max(here.index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "0"))) > num_gpus:
            raise ValueError(f"this node has {num_gpus} GPU{'s' * (num_gpus != 1)} for {ranks_per_node_from_environment()} processes; "
                             "start one process per GPU (torchrun --nproc-per-node)")
        torch.cuda.set_device(here)
    if layout.world_size == 1:
        return make_mesh(layout, here)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"zaya/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # torchrun --max-restarts keeps its store
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=world_size,
                            timeout=timeout)
    return replace(make_mesh(layout, here), store=store)


def make_mesh(layout: Layout, device: torch.device, apart: bool | None = None) -> Mesh:
    """The mesh of a job whose processes have joined (collective: every rank makes all groups, in one order).

    apart: a communicator per purpose, and one over gloo for objects and barriers of the world; by default where the backend is nccl. gloo
    has no streams, its objects need no device, and its groups cost time to start.
    """
    ledger = Ledger()
    rank = dist.get_rank() if layout.world_size > 1 else 0
    if apart is None:
        apart = layout.world_size > 1 and dist.get_backend() == "nccl"
    made: dict[tuple[Purpose | None, tuple[tuple[int, ...], ...]], tuple[dist.ProcessGroup | None, tuple[int, ...]]] = {}

    def make_one(purpose: Purpose, name: str, groups: Iterable[Sequence[int]]) -> Group:
        partition = tuple(sorted(map(tuple, groups)))
        key = purpose if apart else None, partition
        if key not in made:
            mine = next(ranks for ranks in partition if rank in ranks)
            handle = None
            if len(mine) == layout.world_size > 1 and not (apart and purpose == "model"):
                handle = dist.group.WORLD
            elif max(map(len, partition)) > 1:
                handle, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition],
                                                              timeout=datetime.timedelta(seconds=TIMEOUT_S))
            made[key] = (handle if len(mine) > 1 else None, mine)
        handle, mine = made[key]
        return Group(handle, mine.index(rank), len(mine), name, mine, ledger)

    def make(purpose: Purpose, name: str, ranks_of: Callable[[int], Sequence[int]]) -> Group:
        return make_one(purpose, name, {tuple(ranks_of(r)) for r in range(layout.world_size)})

    axes = {axis: make_one("model" if axis in ("tp", "cp", "ep") else "state", axis, groups) for axis, groups in _axes(layout).items()}
    world = make_one("state", "world", [range(layout.world_size)])
    if apart and world.handle is not None:
        world = replace(world, control=_over_gloo(TIMEOUT_S))
    return Mesh(layout, world, axes["tp"], axes["cp"], axes["dp"], axes["ep"], axes["edp"], axes["token"], device, ledger, make)


def _axes(layout: Layout) -> dict[str, list[list[int]]]:
    """The groups of every axis, as Megatron-core's rank generator enumerates them; our own arithmetic must agree."""
    if layout.world_size == 1:
        return {axis: [[0]] for axis in ("tp", "cp", "dp", "ep", "edp", "token")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (is|are) not installed")  # true, and not needed here
        from megatron.core.parallel_state import RankGenerator  # 5 s to import: only where there are several ranks

    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=1, cp=layout.cp, order="tp-cp-ep-dp-pp")
    experts = RankGenerator(tp=1, ep=layout.ep, dp=layout.edp, pp=1, cp=1, order="tp-cp-ep-dp-pp")
    axes = {"tp": dense.get_ranks("tp"), "cp": dense.get_ranks("cp"), "dp": dense.get_ranks("dp"), "ep": experts.get_ranks("ep"),
            "edp": experts.get_ranks("dp"), "token": dense.get_ranks("cp-dp")}
    for axis, groups in axes.items():
        assert sorted(map(sorted, groups)) == sorted(layout.groups(axis)), axis
    return axes


def _over_gloo(timeout_s: float) -> dist.ProcessGroup:
    """A group of all ranks that needs no GPU (collective): a call on it ends as soon as one of them is gone."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def open_background(mesh: Mesh, name: str) -> Group:
    """A group of all ranks over gloo, for objects that a thread exchanges beside the training (collective). Its ledger is its own: the
    mesh's tells where the training is."""
    if mesh.world.handle is None:
        return mesh.world
    return Group(_over_gloo(BACKGROUND_TIMEOUT_S), mesh.rank, mesh.world_size, name, mesh.world.ranks)


def close_mesh(mesh: Mesh) -> None:
    """Leave in order (last collective call of every rank): nobody tears its connections down while another still uses them."""
    if mesh.world.handle is not None:
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)  # the barrier waits for processes, not for what they have launched
        barrier(mesh.world)
        dist.destroy_process_group()
