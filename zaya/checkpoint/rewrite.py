"""Rewrite checkpoints into one of other boxes, files or dtypes, or into the mean of several: streamed, by several processes, restartable.

tools.reshape_checkpoint plans which boxes each new file holds; this carries it out. Knows no layout and no model: a box is a box.

The parent owns the directory, the workers own elements; nothing but plans and hashes passes between them. In order:
1. workers hash every stored box that will be read: a damaged source is refused before a byte is written;
2. the parent makes a hidden sibling of the target, `.NAME.reshape`, with each file at its full length, header in place; workers fill runs
   of boxes chunk by chunk and return their hashes. A file whose boxes are all there is fsynced, renamed and noted in a journal;
3. the parent writes the manifest, which refuses boxes that do not tile the tensors; workers read the new files back and compare hashes;
4. the hidden directory takes the target's name.

A killed run leaves the hidden directory. The next run of the same plan over the same sources (the journal's first line is a hash of both)
keeps the journal's files; unfinished ones are removed and have names of their own process, so that a worker that outlives its parent by a
moment never writes into a later run's file. Sources are only read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from zaya import shard
from zaya.checkpoint.directory import is_taken, sync_directory
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.files import Piece, file_name, manifest_text, write_manifest
from zaya.checkpoint.hashing import hash_bytes, hash_range, new_hash
from zaya.checkpoint.manifest import MAX_HEADER_BYTES, Box, FileEntry, Manifest, TensorEntry
from zaya.checkpoint.read import Checkpoint
from zaya.dtypes import BITS, STORED_DTYPES
from zaya.preemption import end_with_parent
from zaya.shard import flat_boxes, intersect, shifted

CHUNK_BYTES = 8 << 20  # hashed and written while it is in the cache
UNIT_BYTES = 64 << 20  # what a worker is given at a time, unless one box is larger
WORKER_BYTES = 1 << 30  # what makes another process worth its start: 4 s on 2 cores, in which one rewrites 2 GB
FORGET_BYTES = 64 << 20  # of mapped sources read before their pages are given back
LEAST_MEMORY = 64 << 10  # a worker with less would do more calls than copying
JOURNAL = "journal.jsonl"
Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """A tensor of the new checkpoint. Its elements are those of `source`, converted; the mean over all sources where there are several;
    zero in the rows (of dim 0) that the source does not have."""

    source: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What to make of what. `files` are boxes by file, in order, wide elements before narrow ones in each; none is empty."""

    sources: tuple[Checkpoint, ...]
    tensors: Mapping[str, Target]
    files: Sequence[Sequence[tuple[str, shard.Box]]]
    manifest: Manifest
    """Without tensors and files."""

    def piece(self, name: str, box: shard.Box) -> Piece:
        target = self.tensors[name]
        return Piece(name, target.dtype, *box, whole=box[1] == target.shape)

    def key(self) -> str:
        """Two jobs with one key write the same bytes."""
        tensors = {name: vars(target) for name, target in self.tensors.items()}
        text = json.dumps([[hash_bytes(source.manifest.to_json().encode()) for source in self.sources], tensors, list(self.files),
                           self.manifest.to_json()])
        return hash_bytes(text.encode())


def cut_into_files(job: Job, by_writer: Iterable[Sequence[tuple[str, shard.Box]]], max_file_bytes: int) -> Job:
    """The job with files as `save.save` cuts them: each writer its own, in order, a box that alone is larger in a file of its own."""
    files: list[list[tuple[str, shard.Box]]] = []
    for boxes in by_writer:
        room = -1
        for name, box in sorted(boxes, key=lambda item: -STORED_DTYPES[job.tensors[item[0]].dtype].itemsize):
            size = job.piece(name, box).num_bytes
            if room < size:
                files.append([])
                room = max(max_file_bytes, size)
            files[-1].append((name, box))
            room -= size
    return replace(job, files=files)


# ------------------------------------------------------------------------------------------------------------------ in a worker


@dataclass(frozen=True)
class _Stored:
    """A box to hash: bytes [begin, end) of a file."""

    name: str
    key: str
    begin: int
    end: int
    xxh3: str


@dataclass(frozen=True)
class _Check:
    path: Path
    boxes: tuple[_Stored, ...]

    @property
    def num_bytes(self) -> int:
        return sum(box.end - box.begin for box in self.boxes)


@dataclass(frozen=True)
class _Fill:
    """Neighbouring boxes of an unfinished file, from box number `first` on, which begins at byte `begin`."""

    path: Path
    file: int
    first: int
    begin: int
    boxes: tuple[tuple[Target, shard.Box], ...]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(box[1]) * STORED_DTYPES[target.dtype].itemsize for target, box in self.boxes)


class _Source(Checkpoint):
    """A source whose mapped pages are given back as it is read: they are the page cache's, but count as this process' memory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path, manifest, check_boxes=False)  # all are checked before the first is read
        self._touched: dict[str, tuple[int, int]] = {}
        self._read_bytes = 0

    def _stored(self, name: str, box: Box, dtype: torch.dtype) -> np.ndarray:
        begin, end = self._range(box)
        low, high = self._touched.get(box.file, (begin, end))
        self._touched[box.file] = min(low, begin), max(high, end)
        return super()._stored(name, box, dtype)

    def forget(self, read_bytes: int, at: int) -> None:
        self._read_bytes += read_bytes
        if self._read_bytes >= at:
            for file, (begin, end) in self._touched.items():
                begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
                self._map(file).madvise(mmap.MADV_DONTNEED, begin, end - begin)
            self._touched, self._read_bytes = {}, 0


class _Worker:
    """What a process keeps between units. `memory`: bytes of tensors it may hold."""

    def __init__(self, sources: Sequence[tuple[Path, Manifest]], memory: int) -> None:
        self.sources = [_Source(*source) for source in sources]
        self.memory = memory

    def chunk_elements(self, target: Target) -> int:
        """How many elements are in flight at a time: as read, as summed (with torch's copy of the addend), as written."""
        read = max(STORED_DTYPES[source.manifest.tensors[target.source].dtype].itemsize for source in self.sources)
        written = STORED_DTYPES[target.dtype].itemsize
        if len(self.sources) > 1:
            each = read + 8 + 8 + written
        else:
            each = read if self.sources[0].manifest.tensors[target.source].dtype == target.dtype else read + written
        return max(1, min(CHUNK_BYTES, self.memory) // each)

    def elements(self, target: Target, box: shard.Box, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a box, row-major, as they will be written."""
        dtype = STORED_DTYPES[target.dtype]
        if len(self.sources) == 1:
            return self._read(self.sources[0], target, box, start, stop).to(dtype)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for source in self.sources:
            total += self._read(source, target, box, start, stop)
        return total.div_(len(self.sources)).to(dtype)

    def _read(self, source: _Source, target: Target, box: shard.Box, start: int, stop: int) -> torch.Tensor:
        entry = source.manifest.tensors[target.source]
        stored = (0,) * len(entry.shape), entry.shape
        out = torch.zeros(stop - start, dtype=STORED_DTYPES[entry.dtype]) if entry.shape != target.shape else torch.empty(
            stop - start, dtype=STORED_DTYPES[entry.dtype])
        filled = 0
        for part in flat_boxes(start, stop, box[1]):
            inside = intersect(shifted(part, box[0]), stored)
            if inside is not None:  # rows are missing at the end only, so what is there comes first
                source.read_into(target.source, inside, out[filled : filled + math.prod(inside[1])])
            filled += math.prod(part[1])
        source.forget(out.nbytes, min(FORGET_BYTES, self.memory))
        return out

    def fill(self, unit: _Fill) -> tuple[_Fill, list[str]]:
        """Write the unit's boxes; their hashes."""
        hashes = []
        with open(unit.path, "r+b", buffering=0) as file:
            file.seek(unit.begin)
            for target, box in unit.boxes:
                digest, numel = new_hash(), math.prod(box[1])
                step = self.chunk_elements(target)
                for start in range(0, numel, step):
                    flat = self.elements(target, box, start, min(start + step, numel))
                    data = flat.view(BITS[flat.element_size()]).numpy().view(np.uint8).data
                    digest.update(data)
                    while data:
                        data = data[file.write(data) :]
                    del flat, data  # before the next chunk is there
                hashes.append(digest.hexdigest())
        return unit, hashes

    def check(self, unit: _Check) -> _Check:
        """CheckpointError unless every box of the unit has its hash."""
        with disk_errors("read", unit.path), open(unit.path, "rb", buffering=0) as file:
            for box in unit.boxes:
                if hash_range(file.fileno(), box.begin, box.end, chunk_bytes=min(CHUNK_BYTES, self.memory)) != box.xxh3:
                    raise CheckpointError(f"{unit.path}: tensor {box.name!r} (stored as {box.key!r}) does not match its hash; it is "
                                          "corrupt")
        return unit


_worker: _Worker | None = None


def _start(sources: Sequence[tuple[Path, Manifest]], memory: int) -> None:
    global _worker
    _worker = _Worker(sources, memory)


def _start_process(sources: Sequence[tuple[Path, Manifest]], memory: int) -> None:
    """A process of its own leaves Ctrl-C to its parent."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _start(sources, memory)


def _fill(unit: _Fill) -> tuple[_Fill, list[str]]:
    assert _worker is not None
    return _worker.fill(unit)


def _check(unit: _Check) -> _Check:
    assert _worker is not None
    return _worker.check(unit)


# ------------------------------------------------------------------------------------------------------------------ in the parent


class _WorkerDiedError(CheckpointError):
    pass


class _Crew:
    """The workers; one alone is this process."""

    def __init__(self, job: Job, workers: int, max_memory: int) -> None:
        arguments = ([(source.path, source.manifest) for source in job.sources], max_memory // workers)
        self._pool = None
        if workers == 1:
            _start(*arguments)
        else:
            context = multiprocessing.get_context("spawn")  # a forked torch hangs in its threads
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=arguments)

    def map(self, work: Callable[[Argument], Result], units: Sequence[Argument]) -> Iterator[Result]:
        """Results as they come."""
        if self._pool is None:
            yield from map(work, units)
            return
        try:
            for future in as_completed([self._pool.submit(work, unit) for unit in units]):
                yield future.result()
        except BrokenProcessPool:
            raise _WorkerDiedError("a worker process died (killed, or out of memory?); run again to go on, or with fewer "
                                   "--workers") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        global _worker
        _worker = None


def rewrite(job: Job, target: Path, *, workers: int, max_memory: int) -> int:
    """Make the checkpoint `target`, which must not exist or be empty; the bytes of tensors that it holds.

    At most `max_memory` bytes of tensors are in flight over all workers (at least 64 KiB each: fewer workers start if need be). `workers`
    are at most one per GiB. CheckpointError or OSError: nothing is left but, where files were finished, the hidden
    directory that the next run goes on from.
    """
    if is_taken(target):
        raise CheckpointError(f"{target} exists and is not empty; remove it or choose another name")
    hidden = target.with_name(f".{target.name}.reshape")
    total = sum(job.piece(*item).num_bytes for file in job.files for item in file)
    workers = max(1, min(workers, -(-total // WORKER_BYTES), max_memory // LEAST_MEMORY))
    with _alone(hidden):
        crew = _Crew(job, workers, max_memory)
        try:
            _fill_directory(job, hidden, crew, total)
            os.replace(hidden, target)
        finally:
            crew.close()
            if hidden.exists():
                for part in hidden.glob("unfinished-*"):
                    part.unlink()
                if not (hidden / JOURNAL).exists():
                    shutil.rmtree(hidden)
    sync_directory(target.parent)
    return total


def _fill_directory(job: Job, hidden: Path, crew: _Crew, total: int) -> None:
    names = [file_name(index, len(job.files)) for index in range(len(job.files))]
    headers = [_header(job, file) for file in job.files]
    entries = [FileEntry(len(header) + sum(job.piece(*item).num_bytes for item in file), hash_bytes(header))
               for header, file in zip(headers, job.files, strict=True)]
    key = job.key()
    done = _resume(hidden, key, names, entries)
    missing = [index for index in range(len(names)) if index not in done]
    needed = {job.tensors[name].source for index in missing for name, _ in job.files[index]}
    checks = [unit for source in job.sources for unit in _checks(source, needed)]
    with _bar("check", sum(unit.num_bytes for unit in checks)) as bar:
        for unit in crew.map(_check, checks):
            bar.update(unit.num_bytes)

    free = shutil.disk_usage(hidden).free
    wanted = sum(entries[index].size for index in missing)
    if wanted > free:
        raise CheckpointError(f"{hidden.parent} has {free / 1e9:.2f} GB free and the new files need {wanted / 1e9:.2f} GB")
    kept = total - sum(job.piece(*item).num_bytes for index in missing for item in job.files[index])
    with _bar("write", total, kept) as bar:
        parts = {index: hidden / f"unfinished-{os.getpid()}-{index}" for index in missing}
        for index, part in parts.items():
            with open(part, "xb") as file:
                file.write(headers[index])
                file.truncate(entries[index].size)
        found: dict[int, dict[int, str]] = {index: {} for index in missing}
        fills = [unit for index in missing for unit in _fills(job, index, parts[index], len(headers[index]))]
        for filled, hashes in crew.map(_fill, fills):
            bar.update(filled.num_bytes)
            mine = found[filled.file]
            mine.update(enumerate(hashes, filled.first))
            if len(mine) == len(job.files[filled.file]):
                done[filled.file] = [mine[number] for number in range(len(mine))]
                _finish(parts[filled.file], hidden / names[filled.file])
                _note(hidden, key, {filled.file: done[filled.file]})

    write_manifest(hidden, manifest_text(_full_manifest(job, names, entries, done)))
    checks = _checks(Checkpoint.open(hidden), job.tensors.keys())
    with _bar("verify", total) as bar:
        try:
            for unit in crew.map(_check, checks):
                bar.update(unit.num_bytes)
        except _WorkerDiedError:
            raise
        except CheckpointError:
            (hidden / JOURNAL).unlink()  # the disk does not keep what it is given: nothing here is worth going on from
            raise
    (hidden / JOURNAL).unlink()


def _full_manifest(job: Job, names: Sequence[str], entries: Sequence[FileEntry], done: Mapping[int, Sequence[str]]) -> Manifest:
    boxes: dict[str, list[Box]] = {name: [] for name in job.tensors}
    for index, file in enumerate(job.files):
        for (name, box), xxh3 in zip(file, done[index], strict=True):
            boxes[name].append(Box(names[index], job.piece(name, box).key, *box, xxh3))
    tensors = {name: TensorEntry(target.dtype, target.shape, tuple(boxes[name])) for name, target in job.tensors.items()}
    return replace(job.manifest, tensors=tensors, files=dict(zip(names, entries, strict=True)))


def _header(job: Job, file: Sequence[tuple[str, shard.Box]]) -> bytes:
    """Length and JSON, as long as `save.save` would make it for these boxes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    room, end = 64, 0
    for item in file:
        piece = job.piece(*item)
        begin, end = end, end + piece.num_bytes
        header[piece.key] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [begin, end]}
        room += piece.header_bytes
    room = -(-room // 8) * 8
    if room > MAX_HEADER_BYTES:
        raise CheckpointError(f"a file would hold {len(file)} boxes, more than its header can name; lower --max-file-size")
    return room.to_bytes(8, "little") + json.dumps(header).encode("ascii").ljust(room)


def _checks(checkpoint: Checkpoint, names: Iterable[str]) -> list[_Check]:
    """All stored boxes of these tensors, in units of neighbours."""
    by_file: dict[str, list[_Stored]] = {}
    for name in names:
        for box in checkpoint.manifest.tensors[name].boxes:
            by_file.setdefault(box.file, []).append(_Stored(name, box.key, *checkpoint._range(box), box.xxh3))
    units = []
    for file, boxes in sorted(by_file.items()):
        boxes.sort(key=lambda box: box.begin)
        units += [_Check(checkpoint.path / file, tuple(boxes[start:stop])) for start, stop in _units([b.end - b.begin for b in boxes])]
    return units


def _fills(job: Job, index: int, part: Path, begin: int) -> Iterator[_Fill]:
    file = job.files[index]
    sizes = [job.piece(*item).num_bytes for item in file]
    for start, stop in _units(sizes):
        yield _Fill(part, index, start, begin, tuple((job.tensors[name], box) for name, box in file[start:stop]))
        begin += sum(sizes[start:stop])


def _units(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours of at most UNIT_BYTES, or of one that is larger."""
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if index > start and held + size > UNIT_BYTES:
            yield start, index
            start, held = index, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def _bar(what: str, total: int, initial: int = 0) -> tqdm:
    """GB/s and time left; silent where nobody watches."""
    return tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


# ------------------------------------------------------------------------------------------------------------------ the directory


@contextlib.contextmanager
def _alone(hidden: Path) -> Iterator[None]:
    """The hidden directory, and no other run in it; parents that had to be made go again if nothing came of them."""
    made = [parent for parent in hidden.parents if not parent.exists()]
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(f"another process is writing {hidden}; wait for it or choose another name") from None
            yield
        finally:
            os.close(lock)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def _resume(hidden: Path, key: str, names: Sequence[str], entries: Sequence[FileEntry]) -> dict[int, list[str]]:
    """Hashes of the files that an earlier run of the same job finished; everything else in the directory goes."""
    done: dict[int, list[str]] = {}
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, IndexError):  # a torn last line ends the list
        lines = (hidden / JOURNAL).read_text(encoding="ascii").splitlines()
        if json.loads(lines[0]) == {"job": key}:
            for line in lines[1:]:
                note = json.loads(line)
                path = hidden / names[note["file"]]
                if path.is_file() and path.stat().st_size == entries[note["file"]].size:
                    done[note["file"]] = note["xxh3"]
    keep = {names[index] for index in done}
    for path in list(hidden.iterdir()):
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if done:
        _note(hidden, key, done)
    return done


def _note(hidden: Path, key: str, done: Mapping[int, Sequence[str]]) -> None:
    """Files are finished. The journal begins with the first of them: without one there is nothing to keep."""
    with open(hidden / JOURNAL, "a", encoding="ascii") as journal:
        if not journal.tell():
            journal.write(json.dumps({"job": key}) + "\n")
        journal.writelines(json.dumps({"file": index, "xxh3": hashes}) + "\n" for index, hashes in done.items())
        journal.flush()
        os.fsync(journal.fileno())


def _finish(part: Path, final: Path) -> None:
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, final)
    sync_directory(final.parent)
