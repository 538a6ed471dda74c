"""Pure geometry: where a rank stands in a layout, which box of a tensor it holds, and which boxes a flat range of it covers.

The plan (zaya/plan.py) says along which axis a parameter is cut; this file turns that into numbers for any rank of any layout, without a
process group: the mesh, ZeRO-1, Muon's exchange, checkpoints and the planner all ask it. Standard library only.

A box is (offsets, sizes) of a row-major tensor. A parameter's *piece* is the box a rank's model holds; its *holders* are the ranks that
hold the same piece, and they share the optimizer state of it: every element of the state has one owner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zaya.config import ParallelConfig

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Shard:
    """Cut along `dim` over mesh axis `axis`, never inside one of `units` equal units (heads, experts, vocabulary rows).

    With more ranks than units, size / units neighbouring ranks hold the same unit: `replicas`. They are holders like others: their
    gradients are summed, and the state is cut among them too.
    """

    dim: int
    axis: str
    units: int

    def replicas(self, size: int) -> int:
        """Ranks of an axis of `size` that hold the same piece. ValueError where `size` fits neither way."""
        if self.units % size == 0:
            return 1
        if size % self.units == 0:
            return size // self.units
        raise ValueError(f"{self.axis} = {size} neither divides {self.units} units nor is a multiple of them")

    def piece(self, rank: int, size: int, length: int) -> tuple[int, int]:
        """[start, stop) along `dim` (of `length` elements) that `rank` of `size` holds."""
        pieces = size // self.replicas(size)
        step = length // pieces
        index = rank // self.replicas(size)
        return index * step, (index + 1) * step


@dataclass(frozen=True)
class Replicate:
    """Whole on every rank. Every rank sees other tokens with it (under sequence parallelism those of a tp group too), so gradients are
    summed over all ranks."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes. Ranks count tp first, then cp, then dp; over the same ranks experts count ep first, then edp, as
    Megatron-core folds them: tp, then ep, stay inside a node."""

    world_size: int
    tp: int = 1
    cp: int = 1
    ep: int = 1
    zero_size: int = 0
    """Holders that share one set of optimizer shards; 0 = all of them."""

    @staticmethod
    def of(config: ParallelConfig, world_size: int) -> Layout:
        """The layout of a recipe on so many ranks (validated: `Recipe.validate`)."""
        return Layout(world_size, tp=config.tp, cp=config.cp, ep=config.ep, zero_size=config.zero_size)

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp)

    @property
    def edp(self) -> int:
        return self.world_size // self.ep

    def index(self, axis: str, rank: int) -> int:
        """Coordinate of `rank` on axis tp, cp, dp, ep or edp."""
        below, size = {"tp": (1, self.tp), "cp": (self.tp, self.cp), "dp": (self.tp * self.cp, self.dp), "ep": (1, self.ep),
                       "edp": (self.ep, self.edp)}[axis]
        return rank // below % size

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def group(self, axis: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` on `axis` alone, in order; "token": those that share a sequence or a batch (cp and dp)."""
        return next(ranks for ranks in self.groups(axis) if rank in ranks)

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of an axis, in order."""
        axes = {"ep": ("edp",), "edp": ("ep",), "tp": ("cp", "dp"), "cp": ("tp", "dp"), "dp": ("tp", "cp"), "token": ("tp",)}[axis]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            found.setdefault(tuple(self.index(other, rank) for other in axes), []).append(rank)
        return list(found.values())

    def kind(self, placement: Shard | Replicate) -> tuple[str, int]:
        """What decides who holds a piece: ("all", 1) where everybody does, else the axis and its replicas."""
        if isinstance(placement, Replicate):
            return "all", 1
        size = self.size(placement.axis)
        replicas = placement.replicas(size)
        return ("all", 1) if replicas == size else (placement.axis, replicas)

    def holders(self, placement: Shard | Replicate, rank: int) -> list[int]:
        """The ranks whose piece of a parameter is `rank`'s, in order."""
        axis, replicas = self.kind(placement)
        if axis == "all":
            return list(range(self.world_size))
        return _by_piece(self, axis, replicas)[self.index(axis, rank) // replicas]

    def shard_ranks(self, placement: Shard | Replicate, rank: int) -> list[int]:
        """The holders among which the state of `rank`'s piece is cut: all, or its block of zero_size neighbours."""
        holders, block = self.holders(placement, rank), self.block(placement, rank)
        size = self.shard_size(placement)
        return holders[block * size : (block + 1) * size]

    def shard_size(self, placement: Shard | Replicate) -> int:
        """Into how many shards the state of a piece is cut."""
        axis, replicas = self.kind(placement)
        holders = self.world_size if axis == "all" else self.world_size // (self.size(axis) // replicas)
        return min(self.zero_size or holders, holders)

    def num_blocks(self, placement: Shard | Replicate) -> int:
        """How many ranks hold the same shard."""
        return len(self.holders(placement, 0)) // self.shard_size(placement)

    def block(self, placement: Shard | Replicate, rank: int) -> int:
        """Which block of zero_size holders `rank` is in: 0 unless zero_size cuts them."""
        return _places(self, *self.kind(placement))[rank] // self.shard_size(placement)

    def shard(self, placement: Shard | Replicate, rank: int) -> int:
        """Which shard of its piece's state `rank` owns."""
        return _places(self, *self.kind(placement))[rank] % self.shard_size(placement)

    def exchange_ranks(self, placement: Shard | Replicate, rank: int) -> list[int]:
        """The ranks whose shards together make whole matrices: `shard_ranks`, and those of the other tp pieces. (An expert is whole.)"""
        if isinstance(placement, Replicate) or self.kind(placement)[0] != "tp":
            return self.shard_ranks(placement, rank)
        return _by_block(self, placement)[self.block(placement, rank)]

    def piece(self, placement: Shard | Replicate, shape: Sequence[int], rank: int) -> Box:
        """The box of a parameter of logical `shape` that `rank`'s model holds."""
        offsets, sizes = [0] * len(shape), list(shape)
        if isinstance(placement, Shard):
            dim, size = placement.dim, self.size(placement.axis)
            start, stop = placement.piece(self.index(placement.axis, rank), size, shape[dim])
            offsets[dim], sizes[dim] = start, stop - start
        return tuple(offsets), tuple(sizes)

    def as_dict(self) -> dict[str, int]:
        """Axes by name, as a checkpoint's manifest keeps them."""
        return {"tp": self.tp, "cp": self.cp, "ep": self.ep, "dp": self.dp} | ({"zero_size": self.zero_size} if self.zero_size else {})


@functools.lru_cache(maxsize=64)
def _by_piece(layout: Layout, axis: str, replicas: int) -> dict[int, list[int]]:
    """Ranks by the piece they hold."""
    pieces: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        pieces.setdefault(layout.index(axis, rank) // replicas, []).append(rank)
    return pieces


@functools.lru_cache(maxsize=64)
def _places(layout: Layout, axis: str, replicas: int) -> list[int]:
    """Each rank's place among the holders of its piece."""
    if axis == "all":
        return list(range(layout.world_size))
    places = [0] * layout.world_size
    for ranks in _by_piece(layout, axis, replicas).values():
        for place, rank in enumerate(ranks):
            places[rank] = place
    return places


@functools.lru_cache(maxsize=64)
def _by_block(layout: Layout, placement: Shard) -> dict[int, list[int]]:
    """Ranks by their block of zero_size holders, whatever their piece."""
    blocks: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        blocks.setdefault(layout.block(placement, rank), []).append(rank)
    return blocks


def flat_boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Elements [start, stop) of a row-major tensor as boxes, in order: at most 2 n - 1 for n dims.

    A partial first row, whole rows, a partial last row, and the partial ones cut again by the same rule.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = start // row, (stop - 1) // row
    if first == last and (start % row or stop % row or not inner):
        if inner:
            for offsets, sizes in flat_boxes(start - first * row, stop - first * row, inner):
                yield (first, *offsets), (1, *sizes)
        else:
            yield (start,), (stop - start,)
        return
    if start % row:
        yield from flat_boxes(start, (first + 1) * row, shape)
        start = (first + 1) * row
    whole_stop = stop // row * row
    if start < whole_stop:
        yield (start // row, *(0 for _ in inner)), ((whole_stop - start) // row, *inner)
    if whole_stop < stop and start <= whole_stop:
        yield from flat_boxes(whole_stop, stop, shape)


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share, or None."""
    low = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    high = tuple(min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True))
    if any(x >= y for x, y in zip(low, high)):
        return None
    return low, tuple(y - x for x, y in zip(low, high))


def shifted(box: Box, by: Sequence[int]) -> Box:
    """The box moved by `by` (a piece's offsets: from the piece's coordinates to the logical tensor's)."""
    return tuple(o + d for o, d in zip(box[0], by, strict=True)), box[1]
