"""Write a checkpoint from one process, tensor by tensor: how tools make checkpoints out of other formats.

Off the batch's path. Everything goes to a hidden directory, which appears under its name when it is whole. Knows no model and no layout.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zaya.checkpoint.boxes import Box
from zaya.checkpoint.directory import NewDirectory
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.files import MAX_FILE_BYTES, File, Piece, checked, file_name, manifest_text, whole, write_manifest
from zaya.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from zaya.dtypes import STORED_DTYPES

HEADER_ROOM = 1 << 16  # kept free for the header of a file, about 400 tensors; then a new one begins


class CheckpointWriter(NewDirectory):
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
        self.max_file_bytes = max_file_bytes
        self._manifest = checked(Manifest(step, tokens, tokens_by_corpus or {}, position, recipe, layout or {"world_size": 1},
                                           hf_config=hf_config or {}))
        self._tensors: dict[str, TensorEntry] = {}
        self._files: list[FileEntry | None] = []
        self._file: File | None = None
        self._room_left = 0
        self._workers = workers
        self._planned: dict[int, tuple[File, dict[str, Callable[[], Box]]]] = {}
        """By place in `_files`, which has None there: the file, and what fills its streamed tensors."""
        self._stopped, self._telling = False, threading.Lock()
        super().__init__(directory)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        piece = whole(name, tensor.dtype, tuple(tensor.shape))
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

        piece = whole(name, dtype, shape)
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
            names = {_streamed_name(i): file_name(i, len(self._files)) for i in range(len(self._files))}
            for streamed, final in names.items():
                os.replace(self.hidden / streamed, self.hidden / final)
            tensors = {name: replace(entry, boxes=tuple(replace(box, file=names[box.file]) for box in entry.boxes))
                       for name, entry in self._tensors.items()}
            files = {name: entry for name, entry in zip(names.values(), self._files, strict=True) if entry is not None}
            write_manifest(self.hidden, manifest_text(replace(self._manifest, tensors=tensors, files=files)))
        super().close()

    def abort(self) -> None:
        """Remove what was written."""
        for file in (self._file, *(file for file, _ in self._planned.values())):
            if file is not None:
                file.close()
        super().abort()

    def _file_for(self, piece: Piece) -> File:
        """The file that the piece comes next in."""
        if piece.name in self._tensors:
            raise CheckpointError(f"tensor {piece.name!r} is added twice")
        if self._file is not None:
            misaligned = self._file.length % STORED_DTYPES[piece.dtype].itemsize
            if misaligned or self._file.length + piece.num_bytes > self.max_file_bytes or piece.header_bytes > self._room_left:
                self._finish_file()
        if self._file is None:
            self._file = File(self.hidden / _streamed_name(len(self._files)), HEADER_ROOM)
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


def _streamed_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"  # until their number is known
