"""Boxes: the parts in which a checkpoint holds a logical tensor; many of them by column, and the check that they tile it.

The manifest is made of them. The 8B on 1,024 ranks is 641,444 boxes: as objects 360 MB and seconds to check, by column 23 MB and tenths of
a second. Knows no file format, no rank and no layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

MAX_DEPTH = 16  # levels of cuts in a tensor
MAX_TANGLED_BOXES = 2048  # boxes that no straight cut separates are compared in pairs


@dataclass(frozen=True)
class Box:
    """Elements [offsets, offsets + sizes) of a logical tensor, stored as tensor `key` of `file`. `xxh3` hashes its bytes."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    xxh3: str


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is cut: weights, masters and moments of a parameter share one."""

    shape: tuple[int, ...]
    files: np.ndarray
    """(n,) int32: where in `Boxes.names` each box's file is."""
    bounds: np.ndarray
    """(n, 2, dims) int64: offsets and sizes."""

    @property
    def volumes(self) -> np.ndarray:
        """Elements of each box."""
        return self.bounds[:, 1].prod(axis=1)

    def same(self, other: Cut) -> bool:
        return self.shape == other.shape and np.array_equal(self.files, other.files) and np.array_equal(self.bounds, other.bounds)


class Boxes(Sequence[Box]):
    """The boxes of the tensor `name`; each becomes a Box when it is asked for.

    names: of all files. hashes: (n, 16) uint8. keys: where they are not what `key_of` says.
    """

    __slots__ = ("name", "names", "cut", "hashes", "keys")

    def __init__(self, name: str, names: Sequence[str], cut: Cut, hashes: np.ndarray, keys: tuple[str, ...] | None = None) -> None:
        self.name, self.names, self.cut, self.hashes, self.keys = name, names, cut, hashes, keys

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], boxes: Sequence[Box], places: Mapping[str, int], names: Sequence[str]) -> Boxes:
        """By column; `places` are the indices of `names`. KeyError: a file that is not among them."""
        if isinstance(boxes, Boxes) and boxes.name == name and boxes.names == names:
            return boxes
        files = np.array([places[box.file] for box in boxes], dtype=np.int32)
        hashes = np.frombuffer(bytes.fromhex("".join(box.xxh3 for box in boxes)), dtype=np.uint8).reshape(len(boxes), 16)
        keys = tuple(box.key for box in boxes)
        canonical = all(box.key == key_of(name, box.offsets, box.sizes, shape) for box in boxes)
        return cls(name, names, Cut(shape, files, bounds_of(boxes, len(shape))), hashes, None if canonical else keys)

    def __len__(self) -> int:
        return len(self.cut.files)

    @overload
    def __getitem__(self, index: int) -> Box: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Box, ...]: ...
    def __getitem__(self, index: int | slice) -> Box | tuple[Box, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        offsets, sizes = (tuple(bound) for bound in self.cut.bounds[index].tolist())
        key = self.keys[index] if self.keys is not None else key_of(self.name, offsets, sizes, self.cut.shape)
        return Box(self.names[self.cut.files[index]], key, offsets, sizes, self.hashes[index].tobytes().hex())

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Boxes) and self.names == other.names and self.name == other.name and self.keys == other.keys:
            return (self.cut is other.cut or self.cut.same(other.cut)) and np.array_equal(self.hashes, other.hashes)
        return isinstance(other, Boxes | tuple) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as lists: nobody keeps them in a set

    def __repr__(self) -> str:
        return f"Boxes({list(self)!r})"

    def file_names(self) -> set[str]:
        return {self.names[i] for i in np.unique(self.cut.files).tolist()}


def key_of(name: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> str:
    """The name under which our writer stores a box: the tensor's own where it is whole."""
    if tuple(sizes) == tuple(shape):
        return name
    return f"{name}[{','.join([f'{o}:{o + s}' for o, s in zip(offsets, sizes)])}]"


def bounds_of(boxes: Sequence[Box], dims: int) -> np.ndarray:
    """(n, 2, dims): offsets and sizes."""
    if isinstance(boxes, Boxes):
        return boxes.cut.bounds
    return np.array([(box.offsets, box.sizes) for box in boxes], dtype=np.int64).reshape(len(boxes), 2, dims)


def inside(bounds: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Which boxes lie in the shape."""
    offsets, sizes, ends = bounds[:, 0], bounds[:, 1], np.array(shape, dtype=np.int64)
    return ((offsets >= 0) & (sizes >= 0) & (offsets <= ends) & (sizes <= ends - offsets)).all(axis=1)


def tile(bounds: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether boxes that lie inside a shape (of less than 2^63 elements) cover it exactly once. An empty one needs one box, itself."""
    sizes = bounds[:, 1]
    if len(sizes) == 1 or 0 in shape:  # most tensors of a few ranks; what follows costs 20 times as much
        return len(sizes) == 1 and sizes[0].tolist() == list(shape)
    volumes = sizes.prod(axis=1)
    if (sizes == 0).any() or volumes.sum() != math.prod(shape):  # a sum beyond 64 bits is of boxes that overlap, as what follows sees
        return False
    starts = _flat_starts(bounds, shape)
    if starts is None:
        return _disjoint(bounds[:, 0], bounds[:, 0] + sizes)
    order = np.argsort(starts)  # intervals of the volume in all: they tile if none begins before the last one ends
    return bool((starts[order][1:] == (starts + volumes)[order][:-1]).all())


def _flat_starts(bounds: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """The first element of each box in row-major order, if each is one flat interval, as ZeRO cuts whole rows; None: not all are."""
    offsets, sizes = bounds[:, 0], bounds[:, 1]
    strides = np.array([math.prod(shape[dim + 1 :]) for dim in range(len(shape))], dtype=np.int64)
    full = np.ones(len(sizes), dtype=bool)  # whole in all dims behind this one
    for dim in reversed(range(len(shape))):
        if not (full | (sizes[:, dim] == 1)).all():
            return None
        full &= sizes[:, dim] == shape[dim]
    return (offsets * strides).sum(axis=1)


def _disjoint(low: np.ndarray, high: np.ndarray) -> bool:
    """Cut groups apart along any dim until single boxes remain: n log n for what any layout writes, where pairs would be n^2."""
    groups = [(np.arange(len(low)), 0)]
    while groups:
        group, depth = groups.pop()
        parts = _cut_apart(group, low, high) if depth < MAX_DEPTH else [group]
        if len(parts) > 1:
            groups += [(part, depth + 1) for part in parts if len(part) > 1]
        elif len(group) > MAX_TANGLED_BOXES or _overlap(low[group], high[group]):
            return False
    return True


def _cut_apart(group: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """Groups that a plane across some dim separates; [group] where no dim has one."""
    for dim in range(low.shape[1]):
        ordered = group[np.argsort(low[group, dim], kind="stable")]
        reached = np.maximum.accumulate(high[ordered, dim])
        borders = np.flatnonzero(low[ordered[1:], dim] >= reached[:-1]) + 1
        if len(borders):
            return np.split(ordered, borders)
    return [group]


def _overlap(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether any two boxes share an element."""
    return any(bool(((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(axis=1).any()) for i in range(len(low) - 1))
