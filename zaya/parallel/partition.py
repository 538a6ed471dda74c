"""Who owns what, in numbers: flat buckets, their shards, and the one owner of every Muon matrix. No tensor, no process group.

ZeRO-1 (zaya/parallel/zero1.py) makes tensors and collectives of it, the planner prints it for 1,024 ranks. Everything follows from the
plan and the layout alone, so every rank computes the same.

Parameters of one rule whose pieces have the same holders lie one after another in buckets, each at a multiple of ALIGNMENT_ELEMENTS, in the
order of the forward pass. A bucket is cut into equal shards, one per holder (of a zero_size block): shard s owns the state of elements
[s, s + 1) * shard_length; what lies between parameters is zero and stays so. Muon needs whole matrices: the shards' flat pieces of a matrix
go to its owner and the update's pieces come back the same way.

A matrix is `height` rows of a parameter seen as (rows, columns) = (numel / last dim, last dim); a rank's piece of it is a range of rows or,
for a parameter cut along its last dim, a range of columns. Within the piece a shard's part is one flat interval.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zaya.plan import Muon, ParameterPlan
from zaya.shard import Box, Layout, Replicate, Shard, flat_boxes, shifted

BUCKET_ELEMENTS = 40_000_000  # as Megatron-core's default: long enough for the links, short enough to start early
ALIGNMENT_ELEMENTS = 64  # a cache line of 128 bytes in bf16; Triton loads 16 bytes at once only where a tensor starts at a multiple of 16
ROUND_ELEMENTS = 1 << 22  # of a shard, exchanged for Muon at a time: 8 MiB in bf16; an estimate, not measured
LEVEL = 1.05  # a holder may own a matrix until its load is this many times the mean


@dataclass(frozen=True)
class BucketPlan:
    """Parameters whose gradients and state are cut together."""

    rows: tuple[ParameterPlan, ...]
    muon: bool
    spans: dict[str, tuple[int, int]]
    """[start, stop) of each parameter's piece in the bucket; starts are multiples of ALIGNMENT_ELEMENTS."""
    length: int
    """Elements with padding: a multiple of num_shards * ALIGNMENT_ELEMENTS."""
    num_shards: int

    @property
    def shard_length(self) -> int:
        return self.length // self.num_shards

    @property
    def decay(self) -> bool:
        return self.rows[0].decay

    def overlap(self, name: str, shard: int) -> tuple[int, int]:
        """[start, stop) of the parameter's piece (flat, from its own start) that a shard owns; empty where start >= stop."""
        start, stop = self.spans[name]
        first = shard * self.shard_length
        return max(start, first) - start, min(stop, first + self.shard_length) - start

    def boxes(self, row: ParameterPlan, layout: Layout, rank: int) -> list[Box]:
        """The boxes of a parameter's logical tensor whose state `rank` holds, in the order of its shard; none where it holds nothing."""
        return self._boxes(row, layout, rank, *self.overlap(row.name, layout.shard(row.placement, rank)))

    def saved(self, row: ParameterPlan, layout: Layout, rank: int) -> tuple[int, list[Box]]:
        """What `rank` writes of them: all, or where blocks of zero_size hold the same, each block an equal part; and how many elements of
        its own lie before that."""
        start, stop = self.overlap(row.name, layout.shard(row.placement, rank))
        length, block, blocks = max(stop - start, 0), layout.block(row.placement, rank), layout.num_blocks(row.placement)
        before, end = length * block // blocks, length * (block + 1) // blocks
        return before, self._boxes(row, layout, rank, start + before, start + end)

    def _boxes(self, row: ParameterPlan, layout: Layout, rank: int, start: int, stop: int) -> list[Box]:
        offsets, sizes = layout.piece(row.placement, row.shape, rank)
        return [shifted(box, offsets) for box in flat_boxes(start, stop, sizes)]


def make_buckets(rows: Iterable[ParameterPlan], layout: Layout, *, muon: bool, bucket_elements: int = BUCKET_ELEMENTS) -> list[BucketPlan]:
    """All buckets, in the order of their last parameter's place in the forward pass. muon: False puts everything under AdamW."""
    rows = list(rows)
    place = {row.name: index for index, row in enumerate(rows)}
    open_rows: dict[tuple[object, ...], list[ParameterPlan]] = {}
    closed: list[list[ParameterPlan]] = []
    sizes: dict[tuple[object, ...], int] = {}
    for row in rows:
        key = (layout.kind(row.placement), muon and isinstance(row.optimizer, Muon), row.decay)
        numel = math.prod(layout.piece(row.placement, row.shape, 0)[1])
        if key in open_rows and sizes[key] + numel > bucket_elements:
            closed.append(open_rows.pop(key))
        open_rows.setdefault(key, []).append(row)
        sizes[key] = numel if len(open_rows[key]) == 1 else sizes[key] + numel
    closed = sorted([*closed, *open_rows.values()], key=lambda bucket: place[bucket[-1].name])
    return [_bucket(bucket, layout, muon) for bucket in closed]


def saved_by_rank(table: Mapping[str, ParameterPlan], layout: Layout, muon: bool) -> list[dict[str, list[Box]]]:
    """By rank: the boxes of each parameter that it writes, as Zero1.own_parts gives them to a save."""
    by_rank: list[dict[str, list[Box]]] = [{} for _ in range(layout.world_size)]
    for bucket in make_buckets(table.values(), layout, muon=muon):
        placement = bucket.rows[0].placement
        stops = [bucket.spans[row.name][1] for row in bucket.rows]
        for rank in range(layout.world_size):
            shard = layout.shard(placement, rank)
            for row in bucket.rows[bisect.bisect_right(stops, shard * bucket.shard_length) :]:
                if bucket.spans[row.name][0] >= (shard + 1) * bucket.shard_length:
                    break
                _, boxes = bucket.saved(row, layout, rank)
                if boxes:
                    by_rank[rank][row.name] = boxes
    return by_rank


def _bucket(rows: Sequence[ParameterPlan], layout: Layout, muon: bool) -> BucketPlan:
    spans, end = {}, 0
    for row in rows:
        numel = math.prod(layout.piece(row.placement, row.shape, 0)[1])
        start = _round_up(end, ALIGNMENT_ELEMENTS)
        end = start + numel
        spans[row.name] = (start, end)
    num_shards = layout.shard_size(rows[0].placement)
    length = _round_up(end, num_shards * ALIGNMENT_ELEMENTS)
    return BucketPlan(tuple(rows), muon and isinstance(rows[0].optimizer, Muon), spans, length, num_shards)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# -------------------------------------------------------------------------------------------------------------------- Muon


@dataclass(frozen=True)
class Part:
    """What one shard holds of one matrix: [start, stop) of the shard, which is [offset, ...) of the piece of the matrix there."""

    bucket: int
    start: int
    stop: int
    offset: int
    rows: tuple[int, int]
    """Rows of the matrix that the piece covers."""
    columns: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Matrix:
    """One matrix to orthogonalise, its owner (a place in the exchange group) and who holds what of it."""

    name: str
    index: int
    shape: tuple[int, int]
    owner: int
    parts: tuple[tuple[int, Part], ...]
    """(place in the exchange group, part) in the order of places and, within a piece, of elements."""

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def newton_schulz_work(shape: tuple[int, int]) -> int:
    """Multiplications of an iteration, up to a factor: X X^T (half of it), A A (half), and the update, with A the smaller Gram matrix."""
    small, large = sorted(shape)
    return small * small * (3 * large + small)


def muon_rounds(buckets: Sequence[BucketPlan], layout: Layout, rank: int,
                round_elements: int = ROUND_ELEMENTS) -> list[tuple[list[int], list[Matrix]]]:
    """The exchanges that `rank` takes part in: (indices of buckets, their matrices). A round's buckets have the same exchange group."""
    rounds: list[tuple[list[int], list[Matrix]]] = []
    by_kind: dict[tuple[str, int], list[int]] = {}
    for index, bucket in enumerate(buckets):
        if bucket.muon:
            by_kind.setdefault(layout.kind(bucket.rows[0].placement), []).append(index)
    for indices in by_kind.values():
        placement = buckets[indices[0]].rows[0].placement
        ranks = layout.exchange_ranks(placement, rank)
        pieces = _pieces(placement, layout, ranks)
        matrices = _owned([m for index in indices for m in _matrices(index, buckets[index], layout, ranks, pieces)], len(ranks))
        batch: list[int] = []
        for index in indices:
            if batch and sum(buckets[i].shard_length for i in (*batch, index)) > round_elements:
                rounds.append((batch, [m for m in matrices if m.parts[0][1].bucket in batch]))
                batch = []
            batch.append(index)
        rounds.append((batch, [m for m in matrices if m.parts[0][1].bucket in batch]))
    return rounds


def _pieces(placement: Shard | Replicate, layout: Layout, ranks: Sequence[int]) -> list[list[int]]:
    """Places in the exchange group, piece by piece (replicas of a piece are one), in the order of their shards."""
    pieces: dict[int, list[int]] = {}
    for place, rank in enumerate(ranks):
        pieces.setdefault(layout.holders(placement, rank)[0], []).append(place)
    return list(pieces.values())


def _matrices(index: int, bucket: BucketPlan, layout: Layout, ranks: Sequence[int], pieces: Sequence[Sequence[int]]) -> Iterator[Matrix]:
    """Every matrix that the exchange group's pieces of a bucket hold, without an owner yet."""
    for row in bucket.rows:
        assert isinstance(row.optimizer, Muon)
        columns = row.shape[-1]
        height = row.shape[-2] // row.optimizer.blocks
        boxes = [_as_matrix(row, layout, ranks[places[0]]) for places in pieces]
        start, _ = bucket.spans[row.name]
        first_row, last_row = min(rows[0] for rows, _ in boxes), max(rows[1] for rows, _ in boxes)
        for number in range(first_row // height, last_row // height):
            parts: list[tuple[int, Part]] = []
            for (piece_rows, piece_columns), places in zip(boxes, pieces):
                top, bottom = max(number * height, piece_rows[0]), min((number + 1) * height, piece_rows[1])
                if top >= bottom:
                    continue
                width = piece_columns[1] - piece_columns[0]
                begin, end = start + (top - piece_rows[0]) * width, start + (bottom - piece_rows[0]) * width
                within = (top - number * height, bottom - number * height)
                for shard in range(begin // bucket.shard_length, (end - 1) // bucket.shard_length + 1):
                    base = shard * bucket.shard_length
                    low, high = max(begin, base), min(end, base + bucket.shard_length)
                    parts.append((places[shard], Part(index, low - base, high - base, low - begin, within, piece_columns)))
            yield Matrix(row.name, number, (height, columns), -1, tuple(parts))


def _as_matrix(row: ParameterPlan, layout: Layout, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A rank's piece of a parameter seen as (numel / last dim, last dim): its rows and its columns."""
    offsets, sizes = layout.piece(row.placement, row.shape, rank)
    if isinstance(row.placement, Shard) and row.placement.dim == len(row.shape) - 1:
        return (0, math.prod(row.shape[:-1])), (offsets[-1], offsets[-1] + sizes[-1])
    inner = math.prod(row.shape[1:-1])
    return (offsets[0] * inner, (offsets[0] + sizes[0]) * inner), (0, row.shape[-1])


def _owned(matrices: Sequence[Matrix], num_places: int) -> list[Matrix]:
    """Give each matrix an owner: largest first, to the holder of its largest part that stays level, else to whoever has least.

    Level in both what an owner computes and what it receives: a rank with little to compute would else receive all small matrices.
    """
    mean_work = sum(newton_schulz_work(m.shape) for m in matrices) / num_places
    mean_size = sum(m.numel for m in matrices) / num_places
    work, size = [0] * num_places, [0] * num_places

    def load(place: int, more: Matrix | None = None) -> float:
        extra_work, extra_size = (newton_schulz_work(more.shape), more.numel) if more else (0, 0)
        return max((work[place] + extra_work) / mean_work, (size[place] + extra_size) / mean_size)

    cap = max([LEVEL, *(max(newton_schulz_work(m.shape) / mean_work, m.numel / mean_size) for m in matrices)])
    heap = [(0.0, place) for place in range(num_places)]
    owners: dict[tuple[str, int], int] = {}
    for matrix in sorted(matrices, key=lambda m: -newton_schulz_work(m.shape)):
        held: dict[int, int] = {}
        for place, part in matrix.parts:
            held[place] = held.get(place, 0) + part.numel
        level = [place for place in held if load(place, matrix) <= cap]
        owner = max(level, key=lambda p: (held[p], -load(p), -p), default=-1)
        while owner < 0:
            known, place = heapq.heappop(heap)
            if known == load(place):
                owner = place
            else:  # it has got more since it was put there
                heapq.heappush(heap, (load(place), place))
        work[owner] += newton_schulz_work(matrix.shape)
        size[owner] += matrix.numel
        heapq.heappush(heap, (load(owner), owner))
        owners[matrix.name, matrix.index] = owner
    return [replace(m, owner=owners[m.name, m.index]) for m in matrices]
