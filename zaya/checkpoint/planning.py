"""Who writes which boxes in a save: what every rank tells, what all make of it.

save gathers `pack` from all ranks, each checks the whole (`SavePlan`) before a byte is written, and a leader joins it afterwards with the
hashes into the manifest's tensors. By column, because the 8B on 1,024 ranks is 641,444 boxes: as objects a gather of 39 MB that every rank
takes seconds to unpickle, packed 2 MB. Knows no layout, no files but their numbers, and no process group.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from zaya import shard
from zaya.checkpoint.boxes import Boxes, Cut
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.manifest import TensorEntry, check_cover

Table = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of every tensor by name, in an order that may differ from rank to rank."""


def pack(table: Table, files: Iterable[Iterable[tuple[str, shard.Box]]]) -> bytes:
    """The boxes that a rank will write, file by file, in order."""
    place = {name: number for number, name in enumerate(sorted(table))}
    dims, dtype = _row(table)
    pad = (0,) * dims
    rows = [(place[name], number, *(*offsets, *pad)[:dims], *(*sizes, *pad)[:dims])
            for number, file in enumerate(files) for name, (offsets, sizes) in file]
    return zlib.compress(np.array(rows, dtype=dtype).reshape(len(rows), 2 + 2 * dims).tobytes("F"), level=1)


def _row(table: Table) -> tuple[int, type[np.signedinteger]]:
    """How a box is written: the most dims of a tensor, and integers that hold every coordinate and number."""
    largest = max([len(table), *itertools.chain.from_iterable(shape for _, shape in table.values())])
    return max((len(shape) for _, shape in table.values()), default=0), np.int32 if largest < 2**31 else np.int64


class SavePlan:
    """All ranks' boxes. `packed`: by rank."""

    def __init__(self, table: Table, packed: Sequence[bytes]) -> None:
        dims, dtype = _row(table)
        tables = []
        self.num_files: list[int] = []
        """By rank."""
        for data in packed:
            rows = np.frombuffer(zlib.decompress(data), dtype=dtype).reshape(2 + 2 * dims, -1).T
            self.num_files.append(int(rows[:, 1].max()) + 1 if len(rows) else 0)
            tables.append(rows)
        firsts = np.cumsum([0, *self.num_files])
        files = np.concatenate([rows[:, 1] + first for rows, first in zip(tables, firsts)]).astype(np.int32)
        rows = np.concatenate(tables)
        del tables
        self._order = np.argsort(rows[:, 0], kind="stable")  # by tensor; of one tensor, by rank
        self._borders = np.searchsorted(rows[self._order, 0], np.arange(len(table) + 1))
        self._table = table
        self._cuts: dict[str, Cut] = {}
        known: dict[object, Cut] = {}  # weights, masters and moments of a parameter are cut alike
        for number, name in enumerate(sorted(table)):
            mine = self._order[self._borders[number] : self._borders[number + 1]]
            shape = table[name][1]
            bounds = rows[mine, 2:].reshape(len(mine), 2, dims)[:, :, : len(shape)]
            key = (shape, hash_bytes(files[mine].tobytes()), hash_bytes(bounds.tobytes()))
            if key not in known:
                known[key] = Cut(shape, files[mine], bounds.astype(np.int64))
            self._cuts[name] = known[key]

    def check(self) -> None:
        """CheckpointError unless the boxes, which lie inside their tensors, cover each exactly once."""
        checked: set[int] = set()
        no_hashes = np.empty((0, 16), dtype=np.uint8)
        for name, (dtype, shape) in sorted(self._table.items()):  # so that all ranks find the same fault first
            cut = self._cuts[name]
            if id(cut) not in checked:
                check_cover(f"tensor {name!r} on all ranks", TensorEntry(dtype, shape, Boxes(name, (), cut, no_hashes)))
                checked.add(id(cut))

    def tensors(self, hashes: Sequence[bytes], names: Sequence[str]) -> dict[str, TensorEntry]:
        """The manifest's, sorted by name, so that every leader writes the same one. `hashes`: by rank, 16 bytes for each of its boxes in
        order. `names` of all files, rank after rank."""
        ordered = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 16)[self._order]
        return {name: TensorEntry(dtype, shape, Boxes(name, names, self._cuts[name], ordered[start:stop]))
                for (name, (dtype, shape)), start, stop in zip(sorted(self._table.items()), self._borders, self._borders[1:])}
