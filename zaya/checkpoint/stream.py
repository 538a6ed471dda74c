"""Stored boxes of a checkpoint to their places in another file: read once, a chunk at a time, hashed and converted on the way.

For tools that write whole tensors in another format (tools.export_hf): whatever layout cut the tensors, no box is held in memory and none
is read twice. A box's hash is known only after its last byte was written, so the caller lets the new file appear when all copies are
done. Knows no model and no format but ours: the target is a file in which elements lie in row-major order from some byte on.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zaya.checkpoint.boxes import Box
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.hashing import CHUNK_BYTES, new_hash
from zaya.checkpoint.read import Checkpoint
from zaya.dtypes import BITS, STORED_DTYPES

UNIT_BYTES = 64 << 20  # what a thread is given at a time, unless one box is larger
WORKERS = min(len(os.sched_getaffinity(0)), 32)
"""Threads for a conversion, where nobody says: one per core. Two per core took a tenth more CPU time, no less time (2 cores, tmpfs)."""


class Target:
    """A file that threads fill. One writes at a time: the kernel's own lock would have the others spin, a quarter of their time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = threading.Lock()

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        with self._writing:
            while data:
                count = os.pwrite(fd, data, offset)
                data, offset = data[count:], offset + count


@dataclass(frozen=True)
class Copy:
    """Boxes [first, stop) of tensor `name`, to be converted to `dtype`. The tensor's first element has byte `begin` of `target`, which is
    as long as it will be."""

    name: str
    first: int
    stop: int
    target: Target
    begin: int
    dtype: torch.dtype


def cut(checkpoint: Checkpoint, name: str, target: Target, begin: int, dtype: torch.dtype) -> Iterator[Copy]:
    """A tensor in copies of about UNIT_BYTES, or of one box where boxes are larger: a run's ranks may have cut it into many thousands."""
    boxes = len(checkpoint.manifest.tensors[name].boxes)
    volume = math.prod(checkpoint.manifest.tensors[name].shape) * dtype.itemsize
    step = max(boxes * UNIT_BYTES // max(volume, 1), 1)
    for first in range(0, boxes, step):
        yield Copy(name, first, min(first + step, boxes), target, begin, dtype)


def runs(box: Box, shape: Sequence[int]) -> tuple[int, np.ndarray]:
    """(length, starts): the elements of a box are runs of so many neighbours of the tensor, from these elements of it on, in order."""
    dims = len(shape)
    while dims and box.sizes[dims - 1] == shape[dims - 1]:
        dims -= 1
    # Dims from `dims` on are whole; the one before is cut, and its elements are neighbours still.
    outer = max(dims - 1, 0)
    length = math.prod(box.sizes[outer:])
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = np.array([sum(o * s for o, s in zip(box.offsets, strides, strict=True))], dtype=np.int64)
    for dim in range(outer):
        starts = (starts[:, None] + np.arange(box.sizes[dim], dtype=np.int64) * strides[dim]).reshape(-1)
    return length, starts


def copy_boxes(checkpoint: Checkpoint, copy: Copy) -> int:
    """How many bytes were written. CheckpointError: a stored box is damaged, and then the target is not good for anything. OSError: the
    target cannot be written."""
    written = 0
    with open(copy.target.path, "r+b", buffering=0) as file:
        for box in checkpoint.manifest.tensors[copy.name].boxes[copy.first : copy.stop]:
            written += _copy_box(checkpoint, copy, box, file.fileno())
    return written


def _copy_box(checkpoint: Checkpoint, copy: Copy, box: Box, fd: int) -> int:
    entry, digest, width = checkpoint.manifest.tensors[copy.name], new_hash(), copy.dtype.itemsize
    length, starts = runs(box, entry.shape)
    done = 0
    for chunk in _chunks(checkpoint, box):
        digest.update(chunk)
        data = _converted(chunk, STORED_DTYPES[entry.dtype], copy.dtype)
        while data:
            run, inside = divmod(done, length)
            count = min((length - inside) * width, len(data))
            copy.target.write(fd, data[:count], copy.begin + (int(starts[run]) + inside) * width)
            data = data[count:]
            done += count // width
    checkpoint._check(copy.name, box, digest.hexdigest())
    return done * width


def _chunks(checkpoint: Checkpoint, box: Box) -> Iterator[memoryview]:
    """The stored bytes of a box, each chunk valid until the next."""
    begin, end = checkpoint._range(box)
    path = checkpoint._file(box.file)
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    with disk_errors("read", path):
        file = open(path, "rb", buffering=0)
    with file:
        while begin < end:
            chunk, filled = buffer[: end - begin], 0
            while filled < len(chunk):
                with disk_errors("read", path):
                    count = os.preadv(file.fileno(), [chunk[filled:]], begin + filled)
                if not count:
                    raise CheckpointError(f"cannot read {path}: it ended early")
                filled += count
            yield chunk
            begin += filled


def _converted(chunk: memoryview, stored: torch.dtype, dtype: torch.dtype) -> memoryview:
    if stored == dtype:
        return chunk
    bits: memoryview = torch.frombuffer(chunk, dtype=stored).to(dtype).view(BITS[dtype.itemsize]).numpy().view(np.uint8).data
    return bits
