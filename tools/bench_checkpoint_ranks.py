"""The ranks of tools.bench_checkpoint: the state that is saved, and what every process does with it, in step with the others.

Started by tools.bench_checkpoint, which says what is measured and against what. Rank 0 leaves the times in a file; a rank that reads
something else than was written leaves a word of it and ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor import empty as empty_dtensor
from tqdm import tqdm

from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share, save
from zaya.checkpoint.saver import Saver
from zaya.config import ModelConfig
from zaya.dtypes import BITS
from zaya.parallel.partition import make_buckets
from zaya.plan import Muon, ParameterPlan, plan
from zaya.preemption import end_with_parent
from zaya.shard import Box, Layout, Shard

CHUNK_BYTES = 8 << 20  # of a raw write, as `dd bs=8M`
STEP: dict[str, Any] = {"step": 1, "tokens": 0, "tokens_by_corpus": {}, "position": 0}
KINDS = {True: ("master", "momentum"), False: ("master", "exp_avg", "exp_avg_sq")}
"""fp32 state of a parameter under Muon and under AdamW, beside its bf16 weights."""


class WrongBytesError(Exception):
    """What was read is not what was written."""


# ------------------------------------------------------------------------------------------------------------------ the state


def zaya_of(num_bytes: float) -> ModelConfig:
    """A ZAYA1 of at least so many bytes of state: as wide as leaves it 4 blocks, in the proportions of the 8B (16 experts of width D)."""
    for width in (2048, 1024, 512, 256, 128, 64, 32):
        head = max(width // 16, 8)
        model = ModelConfig(vocab_size=16 * width, hidden_size=width, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=head,
                            num_experts=16, moe_intermediate_size=width, router_hidden_size=max(width // 8, 8))
        one = state_bytes(plan(model))
        block = state_bytes(plan(dataclasses.replace(model, num_layers=2))) - one
        layers = max(1, 1 + math.ceil((num_bytes - one) / block))
        if layers >= 4:
            break
    return dataclasses.replace(model, num_layers=layers)


def state_bytes(table: Mapping[str, ParameterPlan]) -> int:
    return sum(row.numel * (2 + 4 * len(KINDS[isinstance(row.optimizer, Muon)])) for row in table.values())


def tensors_of(row: ParameterPlan) -> Iterator[tuple[str, torch.dtype]]:
    """The checkpoint's tensors of a parameter."""
    yield f"model.{row.name}", torch.bfloat16
    for kind in KINDS[isinstance(row.optimizer, Muon)]:
        yield f"optim.{kind}.{row.name}", torch.float32


def fill(name: str, shape: Sequence[int], box: Box, target: Tensor) -> None:
    """Bits that follow from the tensor's name and the element's place in it, whoever holds it: an element out of place is a wrong one."""
    offsets, sizes = box
    index = torch.full((1,) * len(shape), zlib.crc32(name.encode()), dtype=torch.int64)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        stride = math.prod(shape[dim + 1 :])
        line = torch.arange(offset, offset + size, dtype=torch.int64) * stride
        index = index + line.view(-1, *(1 for _ in shape[dim + 1 :]))
    mixed = index.mul_(0x1E3779B97F4A7C15).bitwise_right_shift_(24)
    target.view(BITS[target.element_size()]).copy_(mixed.view(target.shape))


@dataclass(frozen=True)
class State:
    """One contender's memory of a rank's part: what holds it, and the hash of what each of it must be."""

    flats: list[Tensor]
    expected: list[str] = field(default_factory=list)

    def remember(self) -> None:
        self.expected[:] = map(_digest, self.flats)

    def poison(self) -> None:
        for flat in self.flats:
            flat.view(torch.uint8).fill_(0xA5)

    def check(self, what: str) -> None:
        wrong = sum(_digest(flat) != expected for flat, expected in zip(self.flats, self.expected, strict=True))
        if wrong:
            raise WrongBytesError(f"{what}: {wrong} of {len(self.flats)} pieces of memory are not what was written")

    @property
    def num_bytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)


def _digest(flat: Tensor) -> str:
    return hash_bytes(flat.view(torch.uint8).numpy().data)


def zero1_state(model: ModelConfig, layout: Layout, rank: int) -> tuple[State, dict[str, Share]]:
    """What ZeRO-1 keeps on a rank: flat shards of buckets, and the shares of a save, which are views of them."""
    table = plan(model)
    flats: list[Tensor] = []
    parts: dict[str, list[tuple[Box, Tensor]]] = {name: [] for row in table.values() for name, _ in tensors_of(row)}
    for bucket in make_buckets(table.values(), layout, muon=True):
        shard = layout.shard(bucket.rows[0].placement, rank)
        held = sum(max(0, stop - start) for start, stop in (bucket.overlap(row.name, shard) for row in bucket.rows))  # without padding
        memory: list[Tensor] = [torch.empty(held, dtype=dtype) for _, dtype in tensors_of(bucket.rows[0])]
        flats += memory
        start = 0
        for row in bucket.rows:
            for box in bucket.boxes(row, layout, rank):
                stop = start + math.prod(box[1])
                for flat, (name, _) in zip(memory, tensors_of(row), strict=True):
                    fill(name, row.shape, box, flat[start:stop])
                    parts[name].append((box, flat[start:stop].view(box[1])))
                start = stop
    state = State(flats)
    state.remember()
    return state, {name: Share(dtype, row.shape, parts[name]) for row in table.values() for name, dtype in tensors_of(row)}


def dtensor_state(model: ModelConfig, mesh: DeviceMesh) -> tuple[State, dict[str, DTensor]]:
    """The same tensors as DTensors: dim 0 over the first axis of the mesh; over the second, where there is one, as the plan cuts them."""
    tensors: dict[str, DTensor] = {}
    for row in plan(model).values():
        placements: list[Placement] = [TorchShard(0)]
        if mesh.ndim == 2:
            placements.append(TorchShard(row.placement.dim) if isinstance(row.placement, Shard) else TorchReplicate())
        for name, dtype in tensors_of(row):
            tensors[name] = empty_dtensor(*row.shape, dtype=dtype, device_mesh=mesh, placements=placements)
            local = tensors[name].to_local()
            if local.numel():
                (chunk,) = tensors[name].__create_chunk_list__()  # DCP's own protocol
                fill(name, row.shape, (tuple(chunk.offsets), tuple(chunk.sizes)), local)
    state = State([tensor.to_local().flatten() for tensor in tensors.values()])
    state.remember()
    return state, tensors


# ------------------------------------------------------------------------------------------------------------------ on every rank


def take_turns(section: str, calls: Mapping[str, Callable[[], object]], pairs: int, before: Callable[[str], None],
               after: Callable[[str], None], barrier: Callable[[], object] = lambda: None, silent: bool = False) -> dict[str, list[float]]:
    """Seconds of each call in every counted round. `before` and `after` are not timed; a call ends when it has ended on all ranks."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in tqdm(range(pairs + 1), desc=section, unit="round", disable=silent or None):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before(name)
            barrier()
            started = time.perf_counter()
            calls[name]()
            barrier()
            elapsed = time.perf_counter() - started
            after(name)
            if number:  # the first round is warm-up
                times[name].append(elapsed)
    return times


@dataclass
class Bench:
    """One rank's side of the measurements; all ranks make the same calls."""

    model: ModelConfig
    folder: Path
    rank: int
    world_size: int
    pairs: int

    def __post_init__(self) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.layout = Layout(self.world_size)
        self.state, self.shares = zero1_state(self.model, self.layout, self.rank)
        self.mesh = init_device_mesh("cpu", (self.world_size,))

    def rounds(self, section: str, calls: Mapping[str, Callable[[], object]], before: Callable[[str], None] = lambda name: None,
               after: Callable[[str], None] = lambda name: None) -> None:
        self.seconds[section] = take_turns(section, calls, self.pairs, before, after, dist.barrier, silent=self.rank > 0)

    def on_rank_0(self, action: Callable[[Path], None], *names: str) -> None:
        """With the folders of these names, while the other ranks wait."""
        if self.rank == 0:
            for name in names:
                action(self.folder / name)
        dist.barrier()

    # -------------------------------------------------------------------------------------------------------- contenders

    def gather(self, value: object) -> list[object]:
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def zaya_save(self, layout: Layout, shares: Mapping[str, Share], name: str = "zaya") -> None:
        save(self.folder / name, shares, **STEP, recipe={"model": dataclasses.asdict(self.model)}, layout=layout.as_dict(),
             gather=self.gather, rank=self.rank, world_size=self.world_size)

    def zaya_load(self, name: str = "zaya") -> None:
        try:
            checkpoint = Checkpoint.open(self.folder / name / "step-00000001")
            for tensor, share in self.shares.items():
                for box, target in share.parts:
                    checkpoint.read_into(tensor, box, target)
        except CheckpointError as error:
            raise WrongBytesError(str(error)) from None

    def dcp_save(self, tensors: Mapping[str, DTensor], name: str = "dcp") -> None:
        dcp.save(dict(tensors), storage_writer=FileSystemWriter(self.folder / name, sync_files=True),
                 planner=DefaultSavePlanner(enable_plan_caching=True))

    def dcp_load(self, tensors: Mapping[str, DTensor], name: str = "dcp") -> None:
        dcp.load(dict(tensors), storage_reader=FileSystemReader(self.folder / name))

    def raw_path(self) -> Path:
        return self.folder / "raw" / f"rank-{self.rank}"

    def raw_write(self) -> None:
        with open(self.raw_path(), "wb", buffering=0) as file:
            for flat in self.state.flats:
                data = flat.view(torch.uint8).numpy().data
                for start in range(0, len(data), CHUNK_BYTES):
                    file.write(data[start : start + CHUNK_BYTES])
            os.fsync(file.fileno())

    def raw_read(self) -> None:
        with open(self.raw_path(), "rb", buffering=0) as file:
            for flat in self.state.flats:
                data = flat.view(torch.uint8).numpy().data
                while data:
                    data = data[file.readinto(data) :]

    # -------------------------------------------------------------------------------------------------------- sections

    def save_and_load(self, sections: Sequence[str]) -> None:
        """Every contender's last save stays for its loads."""
        theirs, tensors = dtensor_state(self.model, self.mesh)
        states = {"zaya": self.state, "dcp": theirs, "raw": self.state}
        saves = {"zaya": lambda: self.zaya_save(self.layout, self.shares), "dcp": lambda: self.dcp_save(tensors), "raw": self.raw_write}
        loads = {"zaya": self.zaya_load, "dcp": lambda: self.dcp_load(tensors), "raw": self.raw_read}

        def before_load(name: str) -> None:
            states[name].poison()
            self.on_rank_0(drop_page_cache, name)

        def after_load(name: str) -> None:
            states[name].check(f"load of {name}")

        if "save" in sections:
            self.rounds("save", saves, before=lambda name: self.on_rank_0(make_empty, name))
        else:
            for name, call in saves.items():
                self.on_rank_0(make_empty, name)
                call()
                dist.barrier()
        if "load" in sections:
            self.rounds("load", loads, before_load, after_load)
        else:  # what the saves left is checked in any case
            for name, call in loads.items():
                before_load(name)
                call()
                after_load(name)
        self.on_rank_0(shutil.rmtree, "dcp", "raw")

    def reshard(self) -> None:
        """Saved by tp 2, ep 2; loaded as plain data parallelism."""
        layout = Layout(self.world_size, tp=2, ep=2)
        _, shares = zero1_state(self.model, layout, self.rank)
        self.on_rank_0(make_empty, "zaya-tp2", "dcp-tp2")
        self.zaya_save(layout, shares, "zaya-tp2")
        del shares
        _, tensors = dtensor_state(self.model, init_device_mesh("cpu", (self.world_size // 2, 2)))
        self.dcp_save(tensors, "dcp-tp2")
        del tensors
        theirs, tensors = dtensor_state(self.model, self.mesh)
        states = {"zaya": self.state, "dcp": theirs}

        def before(name: str) -> None:
            states[name].poison()
            self.on_rank_0(drop_page_cache, f"{name}-tp2")

        self.rounds("reshard", {"zaya": lambda: self.zaya_load("zaya-tp2"), "dcp": lambda: self.dcp_load(tensors, "dcp-tp2")}, before,
                    lambda name: states[name].check(f"resharded load of {name}"))
        self.on_rank_0(shutil.rmtree, "zaya-tp2", "dcp-tp2")

    def stall(self) -> None:
        """The step goes on when `start` returns; the save ends, and is read back, outside of what is timed."""
        sources = [tensor for share in self.shares.values() for _, tensor in share.parts]
        copies = [tensor.clone() for tensor in sources]
        group = dist.new_group(backend="gloo")

        def gather(value: object) -> list[object]:
            values: list[object] = [None] * self.world_size
            dist.all_gather_object(values, value, group=group)
            return values

        saver = Saver(self.folder / "stall", gather=gather, rank=self.rank, world_size=self.world_size, keep=1)
        saver.prepare(self.shares)
        steps = iter(range(1, 10**6))

        def start() -> None:
            saver.start(self.shares, **(STEP | {"step": next(steps)}), recipe={}, layout=self.layout.as_dict())

        def copy() -> None:
            for target, source in zip(copies, sources, strict=True):
                target.copy_(source)

        def wait(name: str) -> None:
            saver.wait()
            if saver.failed:
                raise WrongBytesError("an asynchronous save failed")

        self.rounds("stall", {"zaya": start, "copy": copy}, lambda name: self.on_rank_0(make_empty, "stall"), wait)
        self.on_rank_0(shutil.rmtree, "stall")


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def drop_page_cache(folder: Path) -> None:
    """Clean pages of the folder's files go; a tmpfs, which has no other place for them, keeps them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_rank(rank: int, world_size: int, model: ModelConfig, folder: Path, pairs: int, sections: Sequence[str]) -> None:
    """One process. Rank 0 leaves the times in FOLDER/seconds.json."""
    end_with_parent()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own has a semaphore, which would stay where this process is killed
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        bench = Bench(model, folder, rank, world_size, pairs)
        bench.save_and_load(sections)
        if "reshard" in sections:
            bench.reshard()
        if "stall" in sections:
            bench.stall()
        if rank == 0:
            held = {"bytes": sum(share.dtype.itemsize * math.prod(share.shape) for share in bench.shares.values()),
                    "tensors": len(bench.shares), "model": dataclasses.asdict(model)}
            (folder / "seconds.json").write_text(json.dumps({"seconds": bench.seconds, "state": held}), encoding="ascii")
    except WrongBytesError as error:
        (folder / "wrong").write_text(f"rank {rank}: {error}", encoding="ascii")
        os._exit(1)  # the others wait in a collective that this rank will not join; the parent ends them
    dist.destroy_process_group()


if __name__ == "__main__":
    print("bench_checkpoint_ranks is a part of tools.bench_checkpoint: run that", file=sys.stderr)
    sys.exit(2)
