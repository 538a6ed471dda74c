"""Write a checkpoint: every rank its share, the manifest last.

End of a step that saves: the trainer hands logical tensors and the run's counters to `save`; tools that make checkpoints out of other
formats stream through `CheckpointWriter`. Knows no model and no process group (the caller passes a gather).

A directory without a manifest does not exist, so nothing written before the manifest's rename can be taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash

from zaya.checkpoint.manifest import (
    BITS,
    DTYPES,
    MANIFEST,
    Box,
    CheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    check_name,
    disk_errors,
    hash_bytes,
    load,
    num_bytes,
)

MAX_FILE_BYTES = 4 << 30
"""A file that holds more than one box is no longer than this."""
CUT_BYTES = 1 << 20
"""Tensors below it are written by one rank, whole: a cut would cost a box (200 bytes of manifest) and balance nothing."""
HEADER_ROOM = 1 << 16  # kept free for the header of a streamed file, about 400 tensors; then a new file begins
CHUNK_BYTES = 8 << 20  # hashed and written while it is in the cache
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Piece:
    """A box before it is written."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: bool

    @property
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
    """One safetensors file, filled front to back in one pass: boxes are hashed as they are written, the header is filled in at the end.

    The library wants boxes without holes between them and each at a multiple of its element's size; the caller sees to the latter.
    """

    def __init__(self, path: Path, header_room: int) -> None:
        self.path = path
        self.room = -(-header_room // 8) * 8  # boxes begin at a multiple of 8, as in files of the library
        self.header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.length = 0
        self._file = open(path, "xb", buffering=0)  # x: never over an existing file
        self._file.seek(8 + self.room)

    def add(self, piece: _Piece, tensor: torch.Tensor) -> Box:
        """`tensor` holds the piece's elements, on any device."""
        assert self.length % DTYPES[piece.dtype].itemsize == 0 and piece.key not in self.header, piece
        flat = tensor.detach().to("cpu").contiguous()
        data = flat.view(BITS[flat.element_size()]).numpy().reshape(-1).view(np.uint8).data
        digest = xxhash.xxh3_128()
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start:start + CHUNK_BYTES]
            digest.update(chunk)
            _write_all(self._file.fileno(), chunk)
        self.header[piece.key] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [self.length, self.length + len(data)]}
        self.length += len(data)
        return Box(self.path.name, piece.key, piece.offsets, piece.sizes, digest.hexdigest())

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

    Everything goes to a hidden sibling of `directory`, which `close` renames; an exception inside the `with` removes it.
    `directory` must not exist, or be empty. CheckpointError if it cannot be written.
    """

    def __init__(self, directory: str | Path, *, recipe: dict[str, Any], step: int = 0, tokens: int = 0,
                 tokens_by_corpus: dict[str, int] | None = None, position: int = 0, layout: dict[str, int] | None = None,
                 hf_config: dict[str, Any] | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.max_file_bytes = max_file_bytes
        self._manifest = _checked(Manifest(step, tokens, tokens_by_corpus or {}, position, recipe, layout or {"world_size": 1},
                                           hf_config=hf_config or {}))
        self._hidden = self.directory.with_name(f".{self.directory.name}.tmp")
        self._tensors: dict[str, TensorEntry] = {}
        self._files: list[FileEntry] = []
        self._file: _File | None = None
        self._room_left = 0
        with disk_errors("write checkpoint", self.directory):
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                raise CheckpointError(f"{self.directory} exists and is not empty; remove it or choose another name")
            shutil.rmtree(self._hidden, ignore_errors=True)  # of a killed process
            self._hidden.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._tensors:
            raise CheckpointError(f"tensor {name!r} is added twice")
        piece = _whole(name, tensor)
        with disk_errors("write checkpoint", self.directory):
            box = self._file_for(piece).add(piece, tensor)
        self._room_left -= piece.header_bytes
        self._tensors[name] = TensorEntry(piece.dtype, piece.sizes, (box,))

    def close(self) -> None:
        """Give files their final names, write the manifest, rename the directory into place."""
        with disk_errors("write checkpoint", self.directory):
            self._finish_file()
            names = {_streamed_name(i): _file_name(i, len(self._files)) for i in range(len(self._files))}
            for streamed, final in names.items():
                os.replace(self._hidden / streamed, self._hidden / final)
            tensors = {name: replace(entry, boxes=tuple(replace(box, file=names[box.file]) for box in entry.boxes))
                       for name, entry in self._tensors.items()}
            files = dict(zip(names.values(), self._files, strict=True))
            _write_manifest(self._hidden, replace(self._manifest, tensors=tensors, files=files))
            os.replace(self._hidden, self.directory)
            _fsync_directory(self.directory.parent)

    def abort(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.close()
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
        if self._file is not None:
            misaligned = self._file.length % DTYPES[piece.dtype].itemsize
            if misaligned or self._file.length + piece.num_bytes > self.max_file_bytes or piece.header_bytes > self._room_left:
                self._finish_file()
        if self._file is None:
            self._file = _File(self._hidden / _streamed_name(len(self._files)), HEADER_ROOM)
            self._room_left = HEADER_ROOM - len(json.dumps(self._file.header))
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._files.append(self._file.finish())
            self._file = None


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others after each phase of a save."""

    error: str = ""
    suffix: str = ""
    boxes: tuple[tuple[str, Box], ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)


def save(root: str | Path, tensors: Mapping[str, torch.Tensor], *, step: int, tokens: int, tokens_by_corpus: dict[str, int],
         position: int, recipe: dict[str, Any], layout: dict[str, int], gather: Callable[[object], list[object] | None],
         rank: int = 0, world_size: int = 1, hf_config: dict[str, Any] | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> Path:
    """Write `root`/step-XXXXXXXX and return it. Every rank calls it with the same arguments and the same tensors (shapes, values).

    Who writes what: the tensors' bytes, in a fixed order, are cut into world_size equal shares (large tensors along dim 0). A rank
    moves only its own share to the CPU, box by box. The manifest's layout is `layout` (axis -> ranks) and world_size. `gather` is an
    all-gather of objects, such as torch.distributed.all_gather_object: it returns what every rank passed, in rank order, on every
    rank, and not before every rank has called it.

    1. Rank 0 clears the remains of a killed save and makes the directory. It leaves a complete checkpoint of this step in place and
       chooses file names that do not collide with it.
    2. All ranks: first gather (of rank 0's choice).
    3. Every rank writes and fsyncs its files.
    4. All ranks: second gather (of boxes and hashes).
    5. Rank 0 fsyncs the directory, writes the manifest under a temporary name, fsyncs it, renames it (this instant makes the checkpoint,
       or replaces the older one) and removes the files of the older one.
    6. All ranks: third gather. After it the checkpoint exists for every rank.

    An OSError on any rank becomes one CheckpointError on every rank at the next gather, without further collectives; rank 0 has
    then removed what was written, and an older checkpoint of the same step is untouched. Anything else raises on its rank alone.
    """
    blank = _checked(Manifest(step, tokens, tokens_by_corpus, position, recipe, {**layout, "world_size": world_size},
                              hf_config=hf_config or {}))
    directory = Path(root) / f"step-{step:08d}"
    plan = _plan_files(tensors, world_size, max_file_bytes)

    def phase(action: Callable[[], _Report]) -> list[_Report]:
        try:
            with disk_errors("write checkpoint", directory):
                report = action()
        except CheckpointError as error:
            report = _Report(error=str(error))
        gathered = gather(report)
        assert gathered is not None and len(gathered) == world_size, "gather must return every rank's object on every rank"
        reports = [report for report in gathered if isinstance(report, _Report)]
        errors = [f"rank {r}: {report.error}" if world_size > 1 else report.error for r, report in enumerate(reports) if report.error]
        if errors:
            if rank == 0:
                with contextlib.suppress(OSError):  # what is left has no manifest, or lies beside the older one's files
                    _sweep(directory)
            raise CheckpointError(errors[0] + (f" (and {len(errors) - 1} more ranks)" if errors[1:] else ""))
        return reports

    def finish(reports: list[_Report]) -> _Report:
        boxes: dict[str, list[Box]] = {name: [] for name in tensors}
        for name, box in itertools.chain.from_iterable(report.boxes for report in reports):
            boxes[name].append(box)
        entries = {name: TensorEntry(_dtype_name(name, t), tuple(t.shape), tuple(boxes[name])) for name, t in tensors.items()}
        _write_manifest(directory, replace(blank, tensors=entries, files={f: e for report in reports for f, e in report.files.items()}))
        _fsync_directory(directory.parent)
        _sweep(directory)
        return _Report()

    suffix = phase(lambda: _prepare(directory, len(plan)) if rank == 0 else _Report())[0].suffix
    reports = phase(lambda: _write_share(directory, suffix, plan, rank, tensors))
    phase(lambda: finish(reports) if rank == 0 else _Report())
    return directory


def _plan_files(tensors: Mapping[str, torch.Tensor], world_size: int, max_file_bytes: int) -> list[tuple[int, list[_Piece]]]:
    """All files of a checkpoint as (rank, pieces), in rank order; no file is empty. The same on every rank."""
    # Wide elements first: every box then begins at a multiple of its element's size.
    pieces = sorted((_whole(name, tensor) for name, tensor in tensors.items()), key=lambda piece: -DTYPES[piece.dtype].itemsize)
    total = max(1, sum(piece.num_bytes for piece in pieces))
    shares: list[list[_Piece]] = [[] for _ in range(world_size)]
    begin = 0
    for piece in pieces:
        for rank, part in _cut(piece, begin, total, world_size):
            shares[rank].append(part)
        begin += piece.num_bytes
    files: list[tuple[int, list[_Piece]]] = []
    for rank, share in enumerate(shares):
        room = 0
        for piece in share:
            if not files or files[-1][0] != rank or piece.num_bytes > room:
                files.append((rank, []))
                room = max_file_bytes
            files[-1][1].append(piece)
            room -= piece.num_bytes
    return files


def _cut(piece: _Piece, begin: int, total: int, world_size: int) -> Iterable[tuple[int, _Piece]]:
    """The parts of a tensor whose bytes are [begin, begin + n) of `total`: rank r's share is [total * r / world_size, ...)."""
    n = piece.num_bytes
    if n < CUT_BYTES or not piece.sizes:
        yield min((2 * begin + n) * world_size // (2 * total), world_size - 1), piece
        return
    rows = piece.sizes[0]
    first, last = begin * world_size // total, (begin + n - 1) * world_size // total
    # A share's border inside a row moves to the nearer end of the row.
    borders = [((total * r // world_size - begin) * rows * 2 + n) // (2 * n) for r in range(first + 1, last + 1)]
    for rank, start, stop in zip(range(first, last + 1), [0, *borders], [*borders, rows], strict=True):
        if start < stop:
            yield rank, replace(piece, offsets=(start, *piece.offsets[1:]), sizes=(stop - start, *piece.sizes[1:]),
                                whole=stop - start == rows)


def _prepare(directory: Path, num_files: int) -> _Report:
    if directory.exists():
        _sweep(directory)
    directory.mkdir(parents=True, exist_ok=True)
    taken = set(os.listdir(directory))
    suffixes = itertools.chain([""], (f".{i}" for i in itertools.count(1)))
    return _Report(suffix=next(s for s in suffixes if taken.isdisjoint(_file_name(i, num_files, s) for i in range(num_files))))


def _write_share(directory: Path, suffix: str, plan: list[tuple[int, list[_Piece]]], rank: int,
                 tensors: Mapping[str, torch.Tensor]) -> _Report:
    boxes: list[tuple[str, Box]] = []
    files: dict[str, FileEntry] = {}
    for index, (owner, pieces) in enumerate(plan):
        if owner != rank:
            continue
        path = directory / _file_name(index, len(plan), suffix)
        with contextlib.closing(_File(path, 64 + sum(piece.header_bytes for piece in pieces))) as file:
            for piece in pieces:
                whole = tensors[piece.name]
                part = whole if piece.whole else whole[piece.offsets[0]:piece.offsets[0] + piece.sizes[0]]
                boxes.append((piece.name, file.add(piece, part)))
            files[path.name] = file.finish()
    return _Report(boxes=tuple(boxes), files=files)


def _sweep(directory: Path) -> None:
    """Remove what the directory's manifest does not name; without a valid manifest, the directory."""
    try:
        kept = {MANIFEST, *load(directory).files}
    except CheckpointError:
        shutil.rmtree(directory)
        return
    for entry in sorted(directory.iterdir()):
        if entry.name not in kept:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                os.unlink(entry)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    text = _checked(manifest).to_json()
    _fsync_directory(directory)  # the files' names are on disk before a manifest that names them
    temporary = directory / f"{MANIFEST}.tmp"
    with open(temporary, "wb") as file:
        file.write(text.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
    _fsync_directory(directory)


def _checked(manifest: Manifest) -> Manifest:
    """As a reader will see it: we write nothing that we would refuse to read."""
    return Manifest.from_json(manifest.to_json())


def _whole(name: str, tensor: torch.Tensor) -> _Piece:
    return _Piece(check_name(name), _dtype_name(name, tensor), (0,) * tensor.dim(), tuple(tensor.shape), whole=True)


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    return _DTYPE_NAMES[tensor.dtype]


def _file_name(index: int, count: int, suffix: str = "") -> str:
    return f"shard-{index:05d}-of-{count:05d}{suffix}.safetensors"


def _streamed_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"  # until their number is known


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data):]


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
