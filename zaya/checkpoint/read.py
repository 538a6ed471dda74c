"""Read a checkpoint: any box of any tensor, from the stored boxes that it meets and no others, whatever layout wrote it.

Start of a run that resumes, and every tool that looks into a checkpoint. Knows no model, no rank, no layout. Whatever a manifest or a
file says is checked before it is used; damage is a CheckpointError that names the file and the tensor.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from zaya import shard
from zaya.checkpoint.boxes import Box, Boxes, bounds_of
from zaya.checkpoint.directory import MANIFEST, locate
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.hashing import CHUNK_BYTES, hash_bytes, hash_range
from zaya.checkpoint.manifest import Manifest, TensorEntry, load, num_bytes, parse_json
from zaya.dtypes import BITS, STORED_DTYPES

RUN_BYTES = 64 << 20  # small boxes that one thread checks in a row
OPEN_FILES = 64  # mapped at a time; each costs a file descriptor
_RAW = {width: torch.empty(0, dtype=dtype).numpy().dtype for width, dtype in BITS.items()}
_Run = tuple[str, list[tuple[str, Box, int, int]]]
"""A file and some of its boxes: tensor, box, first byte, end."""


class _Index:
    """The boxes of a tensor by their first dim: a range of it names the few that can meet a box; those are compared all at once."""

    def __init__(self, entry: TensorEntry) -> None:
        bounds = bounds_of(entry.boxes, len(entry.shape))
        # By the first dim, then the next; a scalar has none, and one box.
        self.order = np.lexsort(bounds[:, 0].T[::-1]) if entry.shape else np.zeros(1, dtype=np.int64)
        self.boxes, bounds = entry.boxes, bounds[self.order]
        self.low, self.high = bounds[:, 0], bounds[:, 0] + bounds[:, 1]
        if entry.shape:
            self.first = np.ascontiguousarray(self.low[:, 0])
            self.reached = np.maximum.accumulate(self.high[:, 0])  # by this box or an earlier one: ascending, as bisection needs

    def meeting(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Box]:
        low, high = np.array(offsets, dtype=np.int64), np.array(offsets, dtype=np.int64) + np.array(sizes, dtype=np.int64)
        begin, end = 0, len(self.order)
        if sizes:
            begin = int(np.searchsorted(self.reached, low[0], side="right"))
            end = int(np.searchsorted(self.first, high[0], side="left"))
        met = ((self.low[begin:end] < high) & (self.high[begin:end] > low)).all(axis=1)
        return (self.boxes[int(i)] for i in self.order[begin:end][met])


class Checkpoint:
    """An open checkpoint. `manifest` is valid, its files exist and have their sizes; their contents are checked as they are read."""

    def __init__(self, path: Path, manifest: Manifest, check_boxes: bool = True, elsewhere: Sequence[Path] = ()) -> None:
        self.path = path
        self._places = [path, *elsewhere]
        self.manifest = manifest
        self._names = list(manifest.tensors)
        self._check_boxes = check_boxes
        self._checked: set[tuple[str, str]] = set()  # file and key of boxes that matched their hash
        self._index = functools.cache(lambda name: _Index(manifest.tensors[name]))
        self._ranges: dict[str, dict[str, tuple[int, int]]] = {}
        self._map = functools.lru_cache(OPEN_FILES)(self._map_file)

    @classmethod
    def find(cls, path: str | Path) -> Checkpoint:
        """A checkpoint, or the newest one of a run."""
        found = locate(path)
        if found is None:
            raise CheckpointError(f"{path} is neither a checkpoint (no {MANIFEST}) nor a run that has one "
                                  f"(no checkpoints/step-*/{MANIFEST})")
        return cls.open(found)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, partial: bool = False, elsewhere: Sequence[Path] = ()) -> Checkpoint:
        """CheckpointError unless `path` holds a valid manifest and every file it names, of the right size.

        `verify`: a box is hashed, whole, before the first read of any part of it. Without, reads touch their own bytes alone.
        `partial`: files may be missing until they are read, as on a node that holds its own ranks' files only. `elsewhere`:
        directories where a file is looked for that `path` lacks.
        """
        path = Path(path)
        with disk_errors("read", path / MANIFEST):
            manifest = load(path)
        checkpoint = cls(path, manifest, verify, elsewhere)
        for damage in () if partial else checkpoint.missized():
            raise damage
        return checkpoint

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    @functools.cached_property
    def _by_file(self) -> dict[str, np.ndarray]:
        """Of each file the boxes it holds: (n, 2), the number of their tensor and their own. A rank reads a few files of a thousand."""
        files, numbers = [np.empty(0, dtype=np.int32)], [np.empty((0, 2), dtype=np.int32)]
        for number, entry in enumerate(self.manifest.tensors.values()):
            assert isinstance(entry.boxes, Boxes)
            count = len(entry.boxes)
            files.append(entry.boxes.cut.files)
            numbers.append(np.stack([np.full(count, number, dtype=np.int32), np.arange(count, dtype=np.int32)], axis=1))
        joined = np.concatenate(files)
        order = np.argsort(joined, kind="stable")
        borders = np.searchsorted(joined[order], np.arange(1, len(self.manifest.files)))
        return dict(zip(self.manifest.files, np.split(np.concatenate(numbers)[order], borders), strict=True))

    def _held(self, file: str) -> list[tuple[str, Box]]:
        """A file's boxes, each with its tensor."""
        names, tensors = self._names, self.manifest.tensors
        return [(names[tensor], tensors[names[tensor]].boxes[box]) for tensor, box in self._by_file[file].tolist()]

    def weight(self, name: str, dtype: torch.dtype) -> str:
        """The stored tensor that is parameter `name` in `dtype`: a narrow run keeps wide masters beside its weights, and they are what a
        wider copy means."""
        model, master = f"model.{name}", f"optim.master.{name}"
        tensors = self.manifest.tensors
        return master if master in tensors and dtype.itemsize > STORED_DTYPES[tensors[model].dtype].itemsize else model

    def check_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless the tensors model.* are exactly these, by name without "model."."""
        stored = {name.removeprefix("model."): entry.shape for name, entry in self.manifest.tensors.items() if name.startswith("model.")}
        for name, shape in shapes.items():
            if name not in stored:
                raise ValueError(f"{self.path} has no tensor model.{name}, which its recipe asks for")
            if stored[name] != shape:
                raise ValueError(f"{self.path}: model.{name} has shape {list(stored[name])}, its recipe asks for {list(shape)}")
        if unexpected := stored.keys() - shapes.keys():
            raise ValueError(f"{self.path} has the unexpected tensor model.{min(unexpected)}; its recipe does not ask for it")

    def visible(self) -> list[str]:
        """The files that are here or in one of the other places, sorted: all of them unless it was opened as partial."""
        with disk_errors("read", self.path):
            return [name for name in sorted(self.manifest.files) if self._file(name).exists()]

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Elements [offsets, offsets + sizes) of a tensor, on the CPU; all of it by default."""
        entry = self._entry(name)
        start = tuple(offsets) if offsets is not None else (0,) * len(entry.shape)
        shape = tuple(sizes) if sizes is not None else tuple(n - o for n, o in zip(entry.shape, start, strict=False))
        _check_inside(name, entry, (start, shape))
        out = torch.empty(shape, dtype=STORED_DTYPES[entry.dtype])
        self.read_into(name, (start, shape), out)
        return out

    def read_into(self, name: str, box: shard.Box, target: torch.Tensor) -> None:
        """Copy a box of a tensor into `target`: of the stored dtype, on any device, with any strides, of the box's shape (or any other
        of as many elements, where a view of it has the box's). What it needs beside the target is at most one stored box.

        CheckpointError: no such tensor, another dtype, or damage. ValueError: the box is not inside the tensor or not of the target's size.
        """
        entry = self._entry(name)
        (start, shape), dtype = box, STORED_DTYPES[entry.dtype]
        _check_inside(name, entry, box)
        if target.dtype != dtype:
            raise CheckpointError(f"{self.path}: tensor {name!r} is stored as {dtype}, not as {target.dtype}")
        if target.numel() != math.prod(shape):
            raise ValueError(f"tensor {name!r}: a box of {tuple(shape)} does not fit a target of shape {tuple(target.shape)}")
        if not target.numel():
            return
        bits = _as_shape(name, target.detach(), tuple(shape)).view(BITS[dtype.itemsize])
        for stored in self._index(name).meeting(tuple(start), tuple(shape)):
            low = [max(o, b) for o, b in zip(start, stored.offsets, strict=True)]
            high = [min(o + s, b + n) for o, s, b, n in zip(start, shape, stored.offsets, stored.sizes, strict=True)]
            part = self._stored(name, stored, dtype)[_window(low, high, stored.offsets)]
            window = bits[_window(low, high, start)]
            if window.device.type == "cpu":
                window.numpy()[...] = part
            else:
                window.copy_(torch.from_numpy(np.array(part)))

    def verify(self) -> None:
        """Read every byte and compare every hash. CheckpointError names the file, and the tensor where it is one's."""
        if Checkpoint.open(self.path).manifest != self.manifest:
            raise CheckpointError(f"{self.path / MANIFEST} has changed since it was opened")
        for damage in self.damages():
            raise damage

    def missized(self) -> Iterator[CheckpointError]:
        """Files that are missing or not of their size."""
        return (damage for damage in map(self._missized, self.manifest.files) if damage is not None)

    def damages(self, workers: int = 1, progress: Callable[[int], None] = lambda count: None,
                files: Iterable[str] | None = None) -> Iterator[CheckpointError]:
        """Read every byte of the files (or of `files` only), compare every hash, and name every damage: file, and tensor where it is one's.

        On `workers` threads, as reading and hashing release the GIL; of the memory each takes CHUNK_BYTES. `progress` is told how many
        bytes of boxes were read, by any thread, one at a time.
        """
        lock = threading.Lock()

        def told(count: int) -> None:
            with lock:
                progress(count)

        pool = ThreadPoolExecutor(workers)
        try:
            runs: list[_Run] = []
            for damages, of_file in pool.map(self._file_damages, self.manifest.files if files is None else files):
                yield from damages
                runs += of_file
            for damages in pool.map(lambda run: list(self._run_damages(run, told)), runs):
                yield from damages
        finally:
            pool.shutdown(cancel_futures=True)

    def check(self, name: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Compare the hashes of a tensor's boxes, CHUNK_BYTES at a time; later reads of it need not. CheckpointError: damage."""
        for box in self._entry(name).boxes:
            for damage in self._run_damages((box.file, [(name, box, *self._range(box))]), progress):
                raise damage
            self._checked.add((box.file, box.key))

    def unmap(self) -> None:
        """Let go of the mapped files, whose pages count as this process' memory; the next read maps them again."""
        self._map.cache_clear()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self.manifest.tensors[name]

    def _stored(self, name: str, box: Box, dtype: torch.dtype) -> np.ndarray:
        """A stored box, mapped, as integers; its hash is checked once while the checkpoint is open."""
        begin, end = self._range(box)
        mapped = self._map(box.file)
        if self._check_boxes and (box.file, box.key) not in self._checked:
            # By reads, whose errors can be caught: a page of the mapping that cannot be read would end the process.
            path = self._file(box.file)
            with disk_errors("read", path), open(path, "rb", buffering=0) as file:
                found = hash_range(file.fileno(), begin, end)
            self._check(name, box, found)
            self._checked.add((box.file, box.key))
        return np.frombuffer(mapped, _RAW[dtype.itemsize], (end - begin) // dtype.itemsize, begin).reshape(box.sizes)

    def _check(self, name: str, box: Box, found: str) -> None:
        if found != box.xxh3:
            raise CheckpointError(f"{self._file(box.file)}: tensor {name!r} (stored as {box.key!r}) does not match its hash; it is corrupt")

    def _file(self, name: str) -> Path:
        with disk_errors("read", self.path / name):
            return next((place / name for place in self._places if (place / name).exists()), self.path / name)

    def _missized(self, file: str) -> CheckpointError | None:
        expected = self.manifest.files[file].size
        try:
            path = self._file(file)
            with disk_errors("read", path):
                size = os.stat(path).st_size
        except CheckpointError as error:
            return error
        return CheckpointError(f"{path} has {size} bytes, its manifest says {expected}") if size != expected else None

    def _file_damages(self, file: str) -> tuple[list[CheckpointError], list[_Run]]:
        """What is wrong with a file's size and header, and its boxes in order, cut into runs."""
        damages = [damage] if (damage := self._missized(file)) else []
        try:
            ranges = self._file_ranges(file)
        except CheckpointError as error:  # of a file that is cut, its size has said it already
            unknown = f"; what it holds ({len(self._held(file))} boxes) cannot be checked"
            return [CheckpointError(f"{damages[0] if damages else error}{unknown}")], []
        runs: list[_Run] = []
        room = 0
        for name, box in sorted(self._held(file), key=lambda item: ranges[item[1].key]):
            begin, end = ranges[box.key]
            if not runs or end - begin > room:
                runs.append((file, []))
                room = RUN_BYTES
            runs[-1][1].append((name, box, begin, end))
            room -= end - begin
        return damages, runs

    def _run_damages(self, run: _Run, progress: Callable[[int], None]) -> Iterator[CheckpointError]:
        file, boxes = run
        try:
            path = self._file(file)
            with disk_errors("read", path), open(path, "rb", buffering=0) as stream:
                for name, box, begin, end in boxes:
                    try:
                        self._check(name, box, hash_range(stream.fileno(), begin, end, progress))
                    except CheckpointError as damage:
                        yield damage
                    except OSError as error:
                        yield CheckpointError(f"cannot read {path}: tensor {name!r} (stored as {box.key!r}): {error.strerror}")
        except CheckpointError as damage:  # of the file itself
            yield damage

    def _map_file(self, file: str) -> mmap.mmap:
        with disk_errors("read", self._file(file)), open(self._file(file), "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != self.manifest.files[file].size:
            raise CheckpointError(f"{self._file(file)} has {len(mapped)} bytes, its manifest says {self.manifest.files[file].size}")
        return mapped

    def _range(self, box: Box) -> tuple[int, int]:
        if box.file not in self._ranges:
            self._ranges[box.file] = self._file_ranges(box.file)
        return self._ranges[box.file][box.key]

    def _file_ranges(self, file: str) -> dict[str, tuple[int, int]]:
        """Where in a file each key's bytes lie: from its header, which must agree with the manifest to the byte."""
        path, tensors = self._file(file), self.manifest.tensors
        expected = {box.key: (tensors[name].dtype, list(box.sizes)) for name, box in self._held(file)}
        start = self.manifest.files[file].size - sum(num_bytes(dtype, sizes) for dtype, sizes in expected.values())
        with disk_errors("read", path):
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is not a file")  # who opens a pipe waits for its other end
            with open(path, "rb", buffering=0) as stream:
                header = b"".join(_chunks(stream.fileno(), start))
        if hash_bytes(header) != self.manifest.files[file].xxh3_header:
            raise CheckpointError(f"{path}: the header does not match its hash; it is corrupt")
        try:
            found = parse_json(header[8:].decode("latin-1"))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: the header {error}") from None
        if int.from_bytes(header[:8], "little") != start - 8 or not isinstance(found, dict):
            raise CheckpointError(f"{path}: the header is not of {start - 8} bytes")
        found.pop("__metadata__", None)
        odd = set(found) ^ set(expected)
        if odd:
            raise CheckpointError(f"{path}: tensor {min(odd)!r} is in the {'file' if min(odd) in found else 'manifest'} only")
        ranges = {}
        for key, (dtype, sizes) in expected.items():
            begin = _begin(found[key])
            end = begin + num_bytes(dtype, sizes)
            if found[key] != {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}:
                raise CheckpointError(f"{path}: tensor {key!r} is not of dtype {dtype} and shape {sizes}, as its manifest says")
            ranges[key] = (start + begin, start + end)
        reached = start
        for key, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
            if begin != reached:
                raise CheckpointError(f"{path}: tensor {key!r} begins at byte {begin}, not at {reached}")
            reached = end
        return ranges


def _begin(entry: object) -> int:
    """First byte of a header's entry; the caller compares the entry as a whole, so anything odd may become 0 here."""
    if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"][:1]:
        begin = entry["data_offsets"][0]
        return begin if type(begin) is int else 0
    return 0


def _check_inside(name: str, entry: TensorEntry, box: shard.Box) -> None:
    start, sizes = box
    if not len(start) == len(sizes) == len(entry.shape) or any(
            o < 0 or s < 0 or o + s > n for o, s, n in zip(start, sizes, entry.shape, strict=True)):
        raise ValueError(f"tensor {name!r} has shape {entry.shape}; offsets {start} and sizes {sizes} are not inside it")


def _as_shape(name: str, target: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        return target.view(shape)
    except RuntimeError:
        raise ValueError(f"tensor {name!r}: a target of shape {tuple(target.shape)} and strides {target.stride()} has no view of "
                         f"shape {shape}") from None


def _window(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _chunks(fd: int, length: int) -> Iterator[bytes]:
    while length:
        chunk = os.read(fd, min(length, CHUNK_BYTES))
        if not chunk:
            raise OSError(0, "it ended early")
        length -= len(chunk)
        yield chunk
