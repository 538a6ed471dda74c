"""Save a checkpoint, all ranks together: every rank its boxes, the manifest last.

End of a step that saves: the saver's thread hands each rank's boxes of logical tensors and the run's counters to `save`. Knows no model, no
layout (a box is a box, whatever cut it) and no process group (the caller passes a gather).

A directory without a manifest does not exist, so nothing written before the manifest's rename can be taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from zaya import shard
from zaya.checkpoint.boxes import Box
from zaya.checkpoint.directory import MANIFEST, step_path, sync_directory
from zaya.checkpoint.errors import CheckpointError, ForeignError, RefusedError, disk_errors, raise_on_all
from zaya.checkpoint.files import MAX_FILE_BYTES, File, Piece, checked, dtype_name, file_name, manifest_text, read_back, write_manifest
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.manifest import FileEntry, Manifest, check_name, load_replaceable
from zaya.checkpoint.planning import SavePlan, Table, pack


@dataclass(frozen=True)
class Share:
    """A logical tensor, and the boxes of it that this rank writes: each with a tensor (or view) of its elements in row-major order, of
    any shape, on any device. Boxes are stored as they are given; those without elements are skipped."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Sequence[tuple[shard.Box, torch.Tensor]] = ()


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others after each phase of a save."""

    error: CheckpointError | None = None
    taken: frozenset[str] = frozenset()  # names that a leader's directory has already
    table: str = ""  # hash of names, dtypes and shapes
    plan: bytes = b""  # see planning.pack
    num_files: int = 0
    blank: Manifest | None = None  # without tensors: rank 0's is everybody's
    hashes: bytes = b""  # 16 for each box of the plan
    files: dict[str, FileEntry] = field(default_factory=dict)


def save(root: str | Path, shares: Mapping[str, Share], *, step: int, tokens: int, tokens_by_corpus: dict[str, int],
         position: int, recipe: dict[str, Any], layout: dict[str, int], gather: Callable[[object], list[object] | None],
         rank: int = 0, world_size: int = 1, leads: bool | None = None, hf_config: dict[str, Any] | None = None,
         max_file_bytes: int = MAX_FILE_BYTES, read_back: bool = False, first: Callable[[], None] = lambda: None,
         written: Callable[[int], None] = lambda count: None) -> Path:
    """Write `root`/step-XXXXXXXX and return it.

    Every rank calls it with the same arguments but for the parts in its shares: it names every tensor, with dtype and shape, and writes
    its own parts, in files of its own. Together the parts must cover each tensor exactly once. A rank moves one box at a time to the
    CPU. The manifest's layout is `layout` (axis -> ranks) and world_size. `gather` is an all-gather of objects, such as
    torch.distributed.all_gather_object: it returns what every rank passed, in rank order, on every rank, and not before every rank
    has called it. Where `root` names a directory of its own on every node, one rank of each node `leads`: it clears the node's directory
    and writes a manifest there; by default all ranks see one directory, and rank 0 leads. `read_back`: what was written is read
    again and compared before the checkpoint exists. `first` is called before anything is written, and fails the save by an OSError: for
    what must be on the disk before the checkpoint. `written` is told the bytes of boxes that this rank has written, box by box.

    1. All ranks: plan files; leaders clear the remains of a killed save, but leave a complete checkpoint of this step in place, and refuse
       to replace another program's (ForeignError). Gather.
       Every rank now checks that the boxes cover the tensors, and chooses file names that no directory has: all come to the same.
    2. All ranks write, fsync and read back their files. Gather of hashes.
    3. Leaders make the manifest (what all ranks have reported leads each to the same), fsync the directory, write the manifest under a
       temporary name, fsync it, rename it (this instant makes the checkpoint, or replaces the older one) and remove the files of the
       older one. Gather: now the checkpoint exists for every rank.

    An OSError becomes, on any rank, one CheckpointError on every rank at the next gather, without further collectives; a wrong share or a
    checkpoint that must not be replaced, a RefusedError. The leaders have then removed what this save wrote, and an older checkpoint of
    the same step in their directory is untouched. (If the disk fails after the rename, the new one stays: it is sound, and only said to
    have failed. Of several leaders' directories some may then have the new one, others the older.) Anything else raises on its rank alone.
    """
    blank = checked(Manifest(step, tokens, tokens_by_corpus, position, recipe, {**layout, "world_size": world_size},
                             hf_config=hf_config or {}))
    job = _Save(step_path(root, step), shares, blank, gather, rank, world_size, rank == 0 if leads is None else leads, max_file_bytes,
                read_back, first, written)
    job.run()
    return job.directory


@dataclass
class _Save:
    """One save, as one rank does it; its methods are what happens between two gathers."""

    directory: Path
    shares: Mapping[str, Share]
    blank: Manifest
    gather: Callable[[object], list[object] | None]
    rank: int
    world_size: int
    leads: bool
    max_file_bytes: int
    read_back: bool
    first: Callable[[], None]
    written: Callable[[int], None]

    def run(self) -> None:
        self.plans = self.phase(self.announce)
        self.blank = self.plans[0].blank or self.blank
        self.check_plans()
        suffix = self.free_suffix()
        reports = self.phase(lambda: self.write(suffix))
        self.phase(lambda: self.finish(reports) if self.leads else _Report())

    def phase(self, action: Callable[[], _Report]) -> list[_Report]:
        """Every rank's report; on every rank the CheckpointError of the first rank that had one."""
        try:
            with disk_errors("write checkpoint", self.directory):
                report = action()
        except CheckpointError as error:
            report = _Report(error=error)
        reports = cast(list[_Report], self.gather(report))
        assert len(reports) == self.world_size, "gather must return every rank's object on every rank"
        if self.leads and any(report.error for report in reports):
            # OSError: what is left has no manifest, or lies beside the older one's files. ForeignError: nothing was written there.
            with contextlib.suppress(OSError, ForeignError):
                _sweep(self.directory)
        raise_on_all([report.error for report in reports])
        return reports

    def announce(self) -> _Report:
        self.first()
        self.table = {name: (dtype_name(name, share.dtype), tuple(map(int, share.shape))) for name, share in self.shares.items()}
        self.files = _plan_files(self.shares, self.rank, self.max_file_bytes)
        taken = _clear(self.directory) if self.leads else frozenset()
        packed = pack(self.table, (((piece.name, (piece.offsets, piece.sizes)) for piece, _ in file) for file in self.files))
        blank = self.blank if self.rank == 0 else None
        return _Report(taken=taken, table=_table(self.table), plan=packed, num_files=len(self.files), blank=blank)

    def check_plans(self) -> None:
        """RefusedError, on all ranks alike: what they announced is not one state, each element once."""
        others = [f"rank {rank}" for rank, report in enumerate(self.plans) if report.table != self.plans[0].table]
        raise_on_all([RefusedError(f"{others[0]} has tensors of other names, dtypes or shapes than rank 0") if others else None])
        try:
            self.plan.check()
        except CheckpointError as error:
            raise_on_all([RefusedError(str(error))])

    def free_suffix(self) -> str:
        """Of file names that no leader's directory has; the same on all ranks."""
        taken = frozenset().union(*(report.taken for report in self.plans))
        suffixes = itertools.chain([""], (f".{i}" for i in itertools.count(1)))
        return next(suffix for suffix in suffixes if taken.isdisjoint(self.names(suffix)))

    @functools.cached_property
    def plan(self) -> SavePlan:
        return SavePlan(self.table, [report.plan for report in self.plans])

    def names(self, suffix: str) -> list[str]:
        """Of all files, in the order of ranks."""
        count = sum(report.num_files for report in self.plans)
        return [file_name(index, count, suffix) for index in range(count)]

    def write(self, suffix: str) -> _Report:
        begin = sum(report.num_files for report in self.plans[: self.rank])
        self.directory.mkdir(parents=True, exist_ok=True)
        report = _Report()
        for name, parts in zip(self.names(suffix)[begin:], self.files, strict=False):
            path, boxes = self.directory / name, list[tuple[Box, int]]()
            with contextlib.closing(File(path, 64 + sum(piece.header_bytes for piece, _ in parts))) as file:
                for piece, tensor in parts:
                    boxes.append((file.add(piece, tensor), piece.num_bytes))
                    self.written(piece.num_bytes)
                report.files[name] = file.finish()
            if self.read_back:
                read_back(path, report.files[name], boxes)
            report = replace(report, hashes=report.hashes + bytes.fromhex("".join(box.xxh3 for box, _ in boxes)))
        return report

    def finish(self, reports: Sequence[_Report]) -> _Report:
        files = {name: entry for report in reports for name, entry in report.files.items()}
        tensors = self.plan.tensors([report.hashes for report in reports], list(files))
        write_manifest(self.directory, manifest_text(replace(self.blank, tensors=tensors, files=files)))
        sync_directory(self.directory.parent)
        _keep_only(self.directory, files)
        return _Report()


def in_file_order(shares: Mapping[str, Share]) -> list[torch.Tensor]:
    """The tensors of a rank's parts in the order in which `save` writes them."""
    return [tensor for _, share in _wide_first(shares) for _, tensor in share.parts]


def with_tensors(shares: Mapping[str, Share], tensors: Sequence[torch.Tensor]) -> dict[str, Share]:
    """The same boxes with other tensors, which stand in the order of `in_file_order`."""
    others = iter(tensors)
    parts = {name: [(box, next(others)) for box, _ in share.parts] for name, share in _wide_first(shares) if share.parts}
    return {name: Share(share.dtype, share.shape, parts.get(name, ())) for name, share in shares.items()}


def _wide_first(shares: Mapping[str, Share]) -> list[tuple[str, Share]]:
    """Wide elements first: every box then begins at a multiple of its element's size."""
    return sorted(shares.items(), key=lambda item: -item[1].dtype.itemsize)


def _plan_files(shares: Mapping[str, Share], rank: int, max_file_bytes: int) -> list[list[tuple[Piece, torch.Tensor]]]:
    """This rank's parts by file; no file is empty."""
    parts = [part for name, share in _wide_first(shares) for part in _parts(name, share, rank)]
    files: list[list[tuple[Piece, torch.Tensor]]] = []
    room = 0
    for piece, tensor in parts:
        if not files or piece.num_bytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append((piece, tensor))
        room -= piece.num_bytes
    return files


def _parts(name: str, share: Share, rank: int) -> Iterator[tuple[Piece, torch.Tensor]]:
    """What this rank writes of a tensor. One that is empty has no boxes to give out: rank 0 writes it."""
    dtype, shape = dtype_name(check_name(name), share.dtype), tuple(map(int, share.shape))
    if rank == 0 and 0 in shape:
        yield Piece(name, dtype, (0,) * len(shape), shape, whole=True), torch.empty(shape, dtype=share.dtype)
    for box, tensor in share.parts:
        offsets, sizes = tuple(map(int, box[0])), tuple(map(int, box[1]))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True))
        if not inside or tensor.dtype != share.dtype or tensor.numel() != math.prod(sizes):
            raise RefusedError(f"tensor {name!r}: {tensor.dtype} of shape {tuple(tensor.shape)} is not the box at {offsets} of {sizes} "
                               f"of a tensor of {share.dtype} and shape {shape}")
        if 0 not in sizes:
            yield Piece(name, dtype, offsets, sizes, whole=sizes == shape), tensor


def _table(table: Table) -> str:
    return hash_bytes(json.dumps(sorted(table.items())).encode())


def _clear(directory: Path) -> frozenset[str]:
    """Remove what a killed save has left; the names that stay. ForeignError: as `_sweep`."""
    if not directory.exists():
        return frozenset()
    _sweep(directory)
    return frozenset(os.listdir(directory) if directory.exists() else ())


def _sweep(directory: Path) -> None:
    """Remove what the directory's manifest does not name; without a valid manifest, the directory. ForeignError: it is another
    program's checkpoint, and stays as it is."""
    manifest = load_replaceable(directory)
    if manifest is not None:
        _keep_only(directory, manifest.files)
    elif directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def _keep_only(directory: Path, files: Container[str]) -> None:
    for entry in sorted(directory.iterdir()):
        if entry.name != MANIFEST and entry.name not in files:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                os.unlink(entry)
