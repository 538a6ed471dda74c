"""Write a checkpoint: every rank its boxes, the manifest last.

End of a step that saves: the saver hands each rank's boxes of logical tensors and the run's counters to `save`; tools that make
checkpoints out of other formats stream through `CheckpointWriter`. Knows no model, no layout (a box is a box, whatever cut it) and no
process group (the caller passes a gather).

A directory without a manifest does not exist, so nothing written before the manifest's rename can be taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash

from zaya import shard
from zaya.checkpoint.boxes import Box
from zaya.checkpoint.directory import step_path, sync_directory
from zaya.checkpoint.manifest import (
    BITS,
    DTYPES,
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    check_name,
    disk_errors,
    hash_bytes,
    hash_range,
    load,
    num_bytes,
    raise_on_all,
)
from zaya.checkpoint.planning import SavePlan, Table, pack

MAX_FILE_BYTES = 4 << 30
"""A file that holds more than one box is no longer than this."""
HEADER_ROOM = 1 << 16  # kept free for the header of a streamed file, about 400 tensors; then a new file begins
CHUNK_BYTES = 1 << 20  # hashed and written while it is in the cache of a core
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Share:
    """A logical tensor, and the boxes of it that this rank writes: each with a tensor (or view) of its elements in row-major order, of
    any shape, on any device. Boxes are stored as they are given; those without elements are skipped."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Sequence[tuple[shard.Box, torch.Tensor]] = ()


@dataclass(frozen=True)
class _Piece:
    """A box before it is written."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: bool

    @functools.cached_property
    def key(self) -> str:
        if self.whole:
            return self.name
        return f"{self.name}[{','.join(f'{o}:{o + s}' for o, s in zip(self.offsets, self.sizes, strict=True))}]"

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.sizes)

    @property
    def header_bytes(self) -> int:
        """Room for its line in a file's header, whatever its place in the file."""
        return len(json.dumps({self.key: {"dtype": self.dtype, "shape": self.sizes, "data_offsets": [2**63, 2**63]}})) + 2


class _File:
    """One safetensors file: boxes have their places in the order they come, are filled in any order, by several threads if need be, and
    hashed as they are written; the header is filled in at the end.

    The library wants boxes without holes between them and each at a multiple of its element's size; the caller sees to the latter.
    """

    def __init__(self, path: Path, header_room: int) -> None:
        self.path = path
        self.room = -(-header_room // 8) * 8  # boxes begin at a multiple of 8, as in files of the library
        self.header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.length = 0
        self._file = open(path, "xb", buffering=0)  # x: never over an existing file
        self._writing = threading.Lock()  # one thread at a time: the kernel's own lock would have the others spin

    def add(self, piece: _Piece, tensor: torch.Tensor) -> Box:
        """`tensor` holds the piece's elements, on any device."""
        return self._fill(piece, self.reserve(piece), [tensor], self._file)

    def reserve(self, piece: _Piece) -> int:
        """The place of the piece's bytes."""
        assert self.length % DTYPES[piece.dtype].itemsize == 0 and piece.key not in self.header, piece
        begin, end = self.length, self.length + piece.num_bytes
        self.header[piece.key] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [begin, end]}
        self.length = end
        return begin

    def fill(self, piece: _Piece, begin: int, tensors: Iterable[torch.Tensor]) -> Box:
        """Write the piece's elements, which the tensors hold one after the other, to its place; others may fill theirs meanwhile."""
        with open(self.path, "r+b", buffering=0) as file:  # a position of its own
            return self._fill(piece, begin, tensors, file)

    def _fill(self, piece: _Piece, begin: int, tensors: Iterable[torch.Tensor], file: io.FileIO) -> Box:
        digest, length = xxhash.xxh3_128(), 0
        file.seek(8 + self.room + begin)
        for tensor in tensors:
            flat = tensor.detach().to("cpu").contiguous()
            data = flat.view(BITS[flat.element_size()]).numpy().reshape(-1).view(np.uint8).data
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start:start + CHUNK_BYTES]
                digest.update(chunk)
                with self._writing:
                    _write_all(file.fileno(), chunk)
            length += len(data)
        assert length == piece.num_bytes, "the tensors are not the piece"
        return Box(self.path.name, piece.key, piece.offsets, piece.sizes, digest.hexdigest())

    def extend(self) -> None:
        """To the length that it will have: writes that each move the end cost a tenth more."""
        self._file.truncate(8 + self.room + self.length)

    def finish(self) -> FileEntry:
        """Header, fsync, close."""
        header = json.dumps(self.header).encode("ascii").ljust(self.room)
        assert len(header) == self.room, "the room for the header was too small"
        header = self.room.to_bytes(8, "little") + header
        self._file.seek(0)
        _write_all(self._file.fileno(), memoryview(header))
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(len(header) + self.length, hash_bytes(header))

    def close(self) -> None:
        self._file.close()


class CheckpointWriter:
    """Stream tensors into a new checkpoint, one process, one tensor in memory at a time.

        with CheckpointWriter(directory, recipe=recipe, hf_config=config) as writer:
            writer.add("model.embedding.weight", tensor)

    `stream` plans a tensor that comes in pieces; `close` has `workers` threads read, hash and write what was planned. One thread writes a
    file at a time, so they work on as many files; the bytes of the checkpoint are the same whatever their number. Everything goes to a
    hidden sibling of `directory`, which `close` renames; an exception inside the `with` removes it. `directory` must not exist, or be
    empty. CheckpointError if it cannot be written.
    """

    def __init__(self, directory: str | Path, *, recipe: dict[str, Any], step: int = 0, tokens: int = 0,
                 tokens_by_corpus: dict[str, int] | None = None, position: int = 0, layout: dict[str, int] | None = None,
                 hf_config: dict[str, Any] | None = None, max_file_bytes: int = MAX_FILE_BYTES, workers: int = 1) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.max_file_bytes = max_file_bytes
        self._manifest = _checked(Manifest(step, tokens, tokens_by_corpus or {}, position, recipe, layout or {"world_size": 1},
                                           hf_config=hf_config or {}))
        self._hidden = self.directory.with_name(f".{self.directory.name}.tmp")
        self._tensors: dict[str, TensorEntry] = {}
        self._files: list[FileEntry | None] = []
        self._file: _File | None = None
        self._room_left = 0
        self._workers = workers
        self._planned: dict[int, tuple[_File, dict[str, Callable[[], Box]]]] = {}
        """By place in `_files`, which has None there: the file, and what fills its streamed tensors."""
        self._stopped, self._telling = False, threading.Lock()
        with disk_errors("write checkpoint", self.directory):
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                raise CheckpointError(f"{self.directory} exists and is not empty; remove it or choose another name")
            shutil.rmtree(self._hidden, ignore_errors=True)  # of a killed process
            self._hidden.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        piece = _whole(name, tensor.dtype, tuple(tensor.shape))
        with disk_errors("write checkpoint", self.directory):
            box = self._file_for(piece).add(piece, tensor)
        self._tensors[name] = TensorEntry(piece.dtype, piece.sizes, (box,))

    def stream(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Callable[[], Iterator[torch.Tensor]],
               written: Callable[[int], object] = lambda count: None) -> None:
        """A tensor whose elements `pieces()` yields in order, in tensors of `dtype`, on a thread of `close`. Each is written before the
        next is asked for, and `written` told of its bytes, one at a time. What either of them raises, `close` raises."""
        def until_stopped() -> Iterator[torch.Tensor]:
            for tensor in pieces():
                if self._stopped:
                    raise CancelledError
                yield tensor
                with self._telling:
                    written(tensor.nbytes)

        piece = _whole(name, dtype, shape)
        with disk_errors("write checkpoint", self.directory):
            file = self._file_for(piece)
            begin = file.reserve(piece)
        self._planned.setdefault(len(self._files), (file, {}))[1][name] = lambda: file.fill(piece, begin, until_stopped())
        self._tensors[name] = TensorEntry(piece.dtype, piece.sizes, ())

    def close(self) -> None:
        """Give files their final names, write the manifest, rename the directory into place."""
        with disk_errors("write checkpoint", self.directory):
            self._finish_file()
            self._fill_planned()
            names = {_streamed_name(i): _file_name(i, len(self._files)) for i in range(len(self._files))}
            for streamed, final in names.items():
                os.replace(self._hidden / streamed, self._hidden / final)
            tensors = {name: replace(entry, boxes=tuple(replace(box, file=names[box.file]) for box in entry.boxes))
                       for name, entry in self._tensors.items()}
            files = {name: entry for name, entry in zip(names.values(), self._files, strict=True) if entry is not None}
            write_manifest(self._hidden, _manifest_text(replace(self._manifest, tensors=tensors, files=files)))
            os.replace(self._hidden, self.directory)
            sync_directory(self.directory.parent)

    def abort(self) -> None:
        """Remove what was written."""
        for file in (self._file, *(file for file, _ in self._planned.values())):
            if file is not None:
                file.close()
        shutil.rmtree(self._hidden, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()  # nothing is left to remove after a close that came through

    def _file_for(self, piece: _Piece) -> _File:
        """The file that the piece comes next in."""
        if piece.name in self._tensors:
            raise CheckpointError(f"tensor {piece.name!r} is added twice")
        if self._file is not None:
            misaligned = self._file.length % DTYPES[piece.dtype].itemsize
            if misaligned or self._file.length + piece.num_bytes > self.max_file_bytes or piece.header_bytes > self._room_left:
                self._finish_file()
        if self._file is None:
            self._file = _File(self._hidden / _streamed_name(len(self._files)), HEADER_ROOM)
            self._room_left = HEADER_ROOM - len(json.dumps(self._file.header))
        self._room_left -= piece.header_bytes
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._files.append(None if len(self._files) in self._planned else self._file.finish())
            self._file = None

    def _fill_planned(self) -> None:
        """As many files at a time as there are threads, a tensor of each in turn."""
        planned = list(self._planned.values())
        for file, _ in planned:
            file.extend()
        pool = ThreadPoolExecutor(min(self._workers, len(planned) + 1))  # one of a file reads while another writes; more would only wait
        try:
            boxes: dict[str, Future[Box]] = {}
            for first in range(0, len(planned), self._workers):
                for row in itertools.zip_longest(*(fills.items() for _, fills in planned[first : first + self._workers])):
                    boxes |= {name: pool.submit(fill) for name, fill in filter(None, row)}
            for index, (file, fills) in self._planned.items():
                for name in fills:
                    self._tensors[name] = replace(self._tensors[name], boxes=(boxes[name].result(),))
                self._files[index] = file.finish()
        finally:
            self._stopped = True  # threads that still write, after one of them failed
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others after each phase of a save."""

    error: str = ""
    leads: bool = False
    taken: frozenset[str] = frozenset()  # names that a leader's directory has already
    table: str = ""  # hash of names, dtypes and shapes
    plan: bytes = b""  # see planning.pack
    num_files: int = 0
    suffix: str = ""
    hashes: bytes = b""  # 16 for each box of the plan
    files: dict[str, FileEntry] = field(default_factory=dict)
    manifest: str = ""


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

    1. All ranks: plan files; leaders clear the remains of a killed save, but leave a complete checkpoint of this step in place. Gather.
    2. Rank 0 checks that the boxes cover the tensors and chooses file names that no directory has. Gather.
    3. All ranks write, fsync and read back their files. Gather of hashes.
    4. Rank 0 makes the manifest; where there are more leaders, they get it by a gather.
    5. Leaders fsync the directory, write the manifest under a temporary name, fsync it, rename it (this instant makes the checkpoint,
       or replaces the older one) and remove the files of the older one. Gather: now the checkpoint exists for every rank.

    An OSError or a wrong share on any rank becomes one CheckpointError on every rank at the next gather, without further collectives;
    the leaders have then removed what was written, and an older checkpoint of the same step is untouched. (If the disk fails after the
    rename, the new one stays: it is sound, and only said to have failed.) Anything else raises on its rank alone.
    """
    leads = rank == 0 if leads is None else leads
    blank = _checked(Manifest(step, tokens, tokens_by_corpus, position, recipe, {**layout, "world_size": world_size},
                              hf_config=hf_config or {}))
    directory = step_path(root, step)
    table = {name: (_dtype_name(name, share.dtype), tuple(map(int, share.shape))) for name, share in shares.items()}
    my_files: list[list[tuple[_Piece, torch.Tensor]]] = []

    def phase(action: Callable[[], _Report]) -> list[_Report]:
        try:
            with disk_errors("write checkpoint", directory):
                report = action()
        except CheckpointError as error:
            report = _Report(error=str(error))
        gathered = gather(report)
        assert gathered is not None and len(gathered) == world_size, "gather must return every rank's object on every rank"
        reports = [report for report in gathered if isinstance(report, _Report)]
        if leads and any(report.error for report in reports):
            with contextlib.suppress(OSError):  # what is left has no manifest, or lies beside the older one's files
                _sweep(directory)
        raise_on_all([report.error for report in reports])
        return reports

    def announce() -> _Report:
        first()
        my_files.extend(_plan_files(shares, rank, max_file_bytes))
        taken = _clear(directory) if leads else frozenset()
        packed = pack(table, (((piece.name, (piece.offsets, piece.sizes)) for piece, _ in file) for file in my_files))
        return _Report(leads=leads, taken=taken, table=_table(table), plan=packed, num_files=len(my_files))

    @functools.cache
    def plan() -> SavePlan:
        return SavePlan(table, [report.plan for report in plans])

    def prepare() -> _Report:
        for other, report in enumerate(plans):
            if report.table != plans[0].table:
                raise CheckpointError(f"rank {other} has tensors of other names, dtypes or shapes than rank 0")
        plan().check()
        taken = frozenset().union(*(report.taken for report in plans))
        suffixes = itertools.chain([""], (f".{i}" for i in itertools.count(1)))
        return _Report(suffix=next(s for s in suffixes if taken.isdisjoint(_file_name(i, num_files, s) for i in range(num_files))))

    def write() -> _Report:
        first = sum(report.num_files for report in plans[:rank])
        directory.mkdir(parents=True, exist_ok=True)
        return _write_files({directory / _file_name(first + i, num_files, suffix): file for i, file in enumerate(my_files)},
                            read_back, written)

    def describe() -> _Report:
        files = {file: entry for report in wrote for file, entry in report.files.items()}
        tensors = plan().tensors([report.hashes for report in wrote], list(files))
        return _Report(manifest=_manifest_text(replace(blank, tensors=tensors, files=files)))

    def finish(manifest: str) -> _Report:
        write_manifest(directory, manifest)
        sync_directory(directory.parent)
        _sweep(directory)
        return _Report()

    plans = phase(announce)
    num_files = sum(report.num_files for report in plans)
    suffix = phase(prepare if rank == 0 else _Report)[0].suffix
    wrote = phase(write)
    if sum(report.leads for report in plans) > 1:
        text = phase(describe if rank == 0 else _Report)[0].manifest
        phase((lambda: finish(text)) if leads else _Report)
    else:
        phase((lambda: finish(describe().manifest)) if leads else _Report)
    return directory


def in_file_order(shares: Mapping[str, Share]) -> list[torch.Tensor]:
    """The tensors of a rank's parts in the order in which `save` writes them."""
    return [tensor for _, share in _wide_first(shares) for _, tensor in share.parts]


def _wide_first(shares: Mapping[str, Share]) -> list[tuple[str, Share]]:
    """Wide elements first: every box then begins at a multiple of its element's size."""
    return sorted(shares.items(), key=lambda item: -item[1].dtype.itemsize)


def _plan_files(shares: Mapping[str, Share], rank: int, max_file_bytes: int) -> list[list[tuple[_Piece, torch.Tensor]]]:
    """This rank's parts by file; no file is empty."""
    parts = [part for name, share in _wide_first(shares) for part in _parts(name, share, rank)]
    files: list[list[tuple[_Piece, torch.Tensor]]] = []
    room = 0
    for piece, tensor in parts:
        if not files or piece.num_bytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append((piece, tensor))
        room -= piece.num_bytes
    return files


def _parts(name: str, share: Share, rank: int) -> Iterator[tuple[_Piece, torch.Tensor]]:
    """What this rank writes of a tensor. One that is empty has no boxes to give out: rank 0 writes it."""
    dtype, shape = _dtype_name(check_name(name), share.dtype), tuple(map(int, share.shape))
    if rank == 0 and 0 in shape:
        yield _Piece(name, dtype, (0,) * len(shape), shape, whole=True), torch.empty(shape, dtype=share.dtype)
    for box, tensor in share.parts:
        offsets, sizes = tuple(map(int, box[0])), tuple(map(int, box[1]))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True))
        if not inside or tensor.dtype != share.dtype or tensor.numel() != math.prod(sizes):
            raise CheckpointError(f"tensor {name!r}: {tensor.dtype} of shape {tuple(tensor.shape)} is not the box at {offsets} of {sizes} "
                                  f"of a tensor of {share.dtype} and shape {shape}")
        if 0 not in sizes:
            yield _Piece(name, dtype, offsets, sizes, whole=sizes == shape), tensor


def _table(table: Table) -> str:
    return hash_bytes(json.dumps(sorted(table.items())).encode())


def _clear(directory: Path) -> frozenset[str]:
    """Remove what a killed save has left; the names that stay."""
    if not directory.exists():
        return frozenset()
    _sweep(directory)
    return frozenset(os.listdir(directory) if directory.exists() else ())


def _write_files(contents: Mapping[Path, Sequence[tuple[_Piece, torch.Tensor]]], read_back: bool,
                 written: Callable[[int], None]) -> _Report:
    hashes: list[str] = []
    files: dict[str, FileEntry] = {}
    for path, parts in contents.items():
        mine: list[Box] = []
        with contextlib.closing(_File(path, 64 + sum(piece.header_bytes for piece, _ in parts))) as file:
            for piece, tensor in parts:
                mine.append(file.add(piece, tensor))
                hashes.append(mine[-1].xxh3)
                written(piece.num_bytes)
            files[path.name] = file.finish()
        if read_back:
            _read_back(path, files[path.name], [(box, piece.num_bytes) for box, (piece, _) in zip(mine, parts, strict=True)])
    return _Report(hashes=bytes.fromhex("".join(hashes)), files=files)


def _read_back(path: Path, entry: FileEntry, boxes: Sequence[tuple[Box, int]]) -> None:
    """CheckpointError unless the file holds what was written to it: header and boxes (each with its bytes), in order."""
    begin = 0
    header = entry.size - sum(count for _, count in boxes)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk shall answer, not the page cache
        for what, expected, count in [("header", entry.xxh3_header, header), *((box.key, box.xxh3, count) for box, count in boxes)]:
            if hash_range(file.fileno(), begin, begin + count) != expected:
                raise CheckpointError(f"{path}: {what} reads back otherwise than it was written; the disk or its driver is faulty")
            begin += count


def _sweep(directory: Path) -> None:
    """Remove what the directory's manifest does not name; without a valid manifest, the directory."""
    try:
        files = load(directory).files
    except CheckpointError:
        shutil.rmtree(directory)
    else:
        _keep_only(directory, files)


def _keep_only(directory: Path, files: Container[str]) -> None:
    for entry in sorted(directory.iterdir()):
        if entry.name != MANIFEST and entry.name not in files:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                os.unlink(entry)


def _manifest_text(manifest: Manifest) -> str:
    text = manifest.to_json()
    Manifest.from_json(text)  # as a reader will see it: we write nothing that we would refuse to read
    return text


def write_manifest(directory: Path, text: str) -> None:
    sync_directory(directory)  # the files' names are on disk before a manifest that names them
    temporary, data = directory / f"{MANIFEST}.tmp", text.encode("ascii")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with open(temporary, "rb", buffering=0) as file:  # it is what tells a reader that the rest is sound
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hash_range(file.fileno(), 0, len(data)) != hash_bytes(data):
            raise CheckpointError(f"{temporary} reads back otherwise than it was written; the disk or its driver is faulty")
    os.replace(temporary, directory / MANIFEST)
    sync_directory(directory)


def _checked(manifest: Manifest) -> Manifest:
    """As a reader will see it; CheckpointError, before anything is written, where it would be refused."""
    return Manifest.from_json(manifest.to_json())


def _whole(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> _Piece:
    return _Piece(check_name(name), _dtype_name(name, dtype), (0,) * len(shape), shape, whole=True)


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} is {dtype}; a checkpoint holds {', '.join(DTYPES)}")
    return _DTYPE_NAMES[dtype]


def _file_name(index: int, count: int, suffix: str = "") -> str:
    return f"shard-{index:05d}-of-{count:05d}{suffix}.safetensors"


def _streamed_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"  # until their number is known


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data):]

