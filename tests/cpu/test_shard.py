"""Geometry of layouts: flat ranges as boxes, and that the pieces and their owners cover every element exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya.shard import Box, Layout, Replicate, Shard, flat_boxes, intersect, shifted

AXES = ("tp", "cp", "dp", "ep", "edp")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    world_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    tp = draw(st.sampled_from(divisors(world_size)))
    cp = draw(st.sampled_from(divisors(world_size // tp)))
    return Layout(world_size, tp, cp, draw(st.sampled_from(divisors(world_size))), draw(st.sampled_from([0, *divisors(world_size)])))


@st.composite
def placements(draw: st.DrawFn, *cutters: Layout) -> tuple[Shard | Replicate, tuple[int, ...]]:
    """A placement that all the layouts can cut, with fewer units than ranks (replicas) or more, and a shape for it."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    axis = draw(st.sampled_from(["", "tp", "ep"]))
    if not axis or not shape:
        return Replicate(), tuple(shape)
    sizes = [layout.size(axis) for layout in cutters]
    fitting = [n for n in range(1, 49) if all(n % size == 0 or size % n == 0 for size in sizes)]
    units, dim = draw(st.sampled_from(fitting[:6])), draw(st.integers(0, len(shape) - 1))
    shape[dim] = units * draw(st.integers(1, 3))
    return Shard(dim, axis, units), tuple(shape)


def owned(layout: Layout, placement: Shard | Replicate, shape: Sequence[int], rank: int) -> Iterator[Box]:
    """The boxes whose state `rank` owns if ZeRO cuts every piece in equal flat ranges, and writes; the first of equal blocks does."""
    owners = layout.shard_ranks(placement, rank)
    if owners[0] != layout.holders(placement, rank)[0]:
        return
    offsets, sizes = layout.piece(placement, shape, rank)
    numel, place = math.prod(sizes), owners.index(rank)
    for box in flat_boxes(numel * place // len(owners), numel * (place + 1) // len(owners), sizes):
        yield shifted(box, offsets)


def window(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(*box, strict=True))


shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)


@settings(max_examples=400)
@given(st.data(), shapes)
def test_flat_boxes_cover_a_range_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = list(flat_boxes(start, stop, shape))
    elements = np.arange(numel).reshape(shape)
    found = [element for box in boxes for element in elements[window(box)].ravel()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1) and all(math.prod(sizes) > 0 for _, sizes in boxes)
    assert all(o >= 0 and o + s <= n for box in boxes for o, s, n in zip(*box, shape, strict=True))  # slices would hide it


def test_flat_boxes_of_a_matrix() -> None:
    assert list(flat_boxes(3, 22, (5, 5))) == [((0, 3), (1, 2)), ((1, 0), (3, 5)), ((4, 0), (1, 2))]
    assert list(flat_boxes(6, 9, (5, 5))) == [((1, 1), (1, 3))] and list(flat_boxes(5, 10, (5, 5))) == [((1, 0), (1, 5))]
    assert list(flat_boxes(0, 25, (5, 5))) == [((0, 0), (5, 5))] and list(flat_boxes(7, 7, (5, 5))) == []
    assert list(flat_boxes(0, 1, ())) == [((), ())] and len(list(flat_boxes(1, 23, (2, 3, 4)))) == 4
    assert len(list(flat_boxes(1, 35, (3, 3, 4)))) == 5  # 2n - 1 is reached


@settings(max_examples=200)
@given(st.data(), layouts())
def test_every_element_has_one_owner(data: st.DataObject, layout: Layout) -> None:
    placement, shape = data.draw(placements(layout))
    owners, blocks = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)
    for rank in range(layout.world_size):
        for box in owned(layout, placement, shape, rank):
            owners[window(box)] += 1
        # As models hold them: each element is on as many ranks as its piece has holders.
        piece, holders, sharers = layout.piece(placement, shape, rank), layout.holders(placement, rank), layout.shard_ranks(placement, rank)
        blocks[window(piece)] += 1
        assert rank in sharers and set(sharers) <= set(holders) and holders == sorted(holders)
        assert all(layout.piece(placement, shape, other) == piece and layout.holders(placement, other) == holders for other in holders)
        assert all(layout.shard_ranks(placement, other) == sharers for other in sharers)
        assert len(sharers) <= (layout.zero_size or layout.world_size)
    assert (owners == 1).all()
    assert (blocks == len(layout.holders(placement, 0))).all()


@given(layouts())
def test_groups_partition_the_ranks(layout: Layout) -> None:
    ranks = range(layout.world_size)
    assert len({tuple(layout.index(axis, rank) for axis in ("tp", "cp", "dp")) for rank in ranks}) == layout.world_size
    assert len({tuple(layout.index(axis, rank) for axis in ("ep", "edp")) for rank in ranks}) == layout.world_size
    for axis in (*AXES, "token"):
        for rank in ranks:
            group = layout.group(axis, rank)
            assert all(layout.group(axis, other) == group for other in group) and group == sorted(group) and rank in group
            if axis != "token":
                assert [layout.index(axis, other) for other in group] == list(range(layout.size(axis)))
            else:
                assert len(group) == layout.cp * layout.dp and len({layout.index("tp", other) for other in group}) == 1


@given(st.data(), shapes)
def test_intersect_is_what_both_hold(data: st.DataObject, shape: tuple[int, ...]) -> None:
    def box() -> Box:
        offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
        return offsets, tuple(data.draw(st.integers(0, n - o)) for o, n in zip(offsets, shape, strict=True))

    a, b = box(), box()
    holders, shared = np.zeros(shape, dtype=int), intersect(a, b)
    for each in (a, b):
        holders[window(each)] += 1
    assert shared == intersect(b, a) and (shared is not None) == bool((holders == 2).any())
    if shared is not None:
        assert (holders[window(shared)] == 2).all() and (holders == 2).sum() == math.prod(shared[1])


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="tp = 4 neither divides 6 units"):
        Layout(4, tp=4).piece(Shard(0, "tp", 6), (12,), 0)
