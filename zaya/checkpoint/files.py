"""What a checkpoint consists of, on the disk: safetensors files filled box by box, and the manifest that makes them one.

Beneath both ways to write a checkpoint: all ranks together (save.py) and one process that streams (write.py). Knows nothing of ranks.
"""

from __future__ import annotations

import functools
import io
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zaya.checkpoint.boxes import Box
from zaya.checkpoint.directory import MANIFEST, sync_directory
from zaya.checkpoint.errors import CheckpointError, RefusedError
from zaya.checkpoint.hashing import CHUNK_BYTES, hash_bytes, hash_range, new_hash
from zaya.checkpoint.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, check_name, num_bytes
from zaya.dtypes import BITS, STORED_DTYPES, STORED_NAMES

MAX_FILE_BYTES = 4 << 30
"""A file that holds more than one box is no longer than this."""


@dataclass(frozen=True)
class Piece:
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


class File:
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

    def add(self, piece: Piece, tensor: torch.Tensor) -> Box:
        """`tensor` holds the piece's elements, on any device."""
        return self._fill(piece, self.reserve(piece), [tensor], self._file)

    def reserve(self, piece: Piece) -> int:
        """The place of the piece's bytes."""
        assert self.length % STORED_DTYPES[piece.dtype].itemsize == 0 and piece.key not in self.header, piece
        begin, end = self.length, self.length + piece.num_bytes
        self.header[piece.key] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [begin, end]}
        self.length = end
        return begin

    def fill(self, piece: Piece, begin: int, tensors: Iterable[torch.Tensor]) -> Box:
        """Write the piece's elements, which the tensors hold one after the other, to its place; others may fill theirs meanwhile."""
        with open(self.path, "r+b", buffering=0) as file:  # a position of its own
            return self._fill(piece, begin, tensors, file)

    def _fill(self, piece: Piece, begin: int, tensors: Iterable[torch.Tensor], file: io.FileIO) -> Box:
        digest, length = new_hash(), 0
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


def whole(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Piece:
    return Piece(check_name(name), dtype_name(name, dtype), (0,) * len(shape), shape, whole=True)


def dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in STORED_NAMES:
        raise RefusedError(f"tensor {name!r} is {dtype}; a checkpoint holds {', '.join(STORED_DTYPES)}")
    return STORED_NAMES[dtype]


def file_name(index: int, count: int, suffix: str = "") -> str:
    return f"shard-{index:05d}-of-{count:05d}{suffix}.safetensors"


def read_back(path: Path, entry: FileEntry, boxes: Sequence[tuple[Box, int]]) -> None:
    """CheckpointError unless the file holds what was written to it: header and boxes (each with its bytes), in order."""
    begin = 0
    header = entry.size - sum(count for _, count in boxes)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk shall answer, not the page cache
        for what, expected, count in [("header", entry.xxh3_header, header), *((box.key, box.xxh3, count) for box, count in boxes)]:
            if hash_range(file.fileno(), begin, begin + count) != expected:
                raise CheckpointError(f"{path}: {what} reads back otherwise than it was written; the disk or its driver is faulty")
            begin += count


def manifest_text(manifest: Manifest) -> str:
    """RefusedError where a reader would refuse it."""
    text = manifest.to_json()
    if len(text) > MAX_MANIFEST_BYTES:
        boxes = sum(len(entry.boxes) for entry in manifest.tensors.values())
        raise RefusedError(f"the manifest of {boxes} boxes would have {len(text)} bytes, and readers take {MAX_MANIFEST_BYTES}; cut the "
                           "state into fewer boxes (fewer ranks, or a smaller parallel.zero_size)")
    Manifest.from_json(text)  # as a reader will see it: we write nothing that we would refuse to read
    return text


def write_manifest(directory: Path, text: str) -> None:
    """The instant of its rename makes the directory a checkpoint. CheckpointError: it reads back otherwise; then it is not one."""
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


def checked(manifest: Manifest) -> Manifest:
    """As a reader will see it; CheckpointError, before anything is written, where it would be refused."""
    return Manifest.from_json(manifest.to_json())


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data):]

