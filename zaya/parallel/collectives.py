"""Collectives over an explicit group; every one is the identity on a group of one, so callers need not ask for sizes.

Each returns a `Pending`: the call launches, `wait` makes the result usable, and what lies between overlaps. Both are written to the
group's `Ledger`, which counts the bytes a rank sends and, where a test asks for it, the order of launches and waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class Ledger:
    """What this process sent: bytes by (operation, group), as a ring (or pairwise) algorithm sends them, and the order of events."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    launched: int = 0
    """Collectives since the start."""
    latest: tuple[str, str, str] = ("", "", "")
    """(operation, group, label) of the last one."""
    events: list[tuple[str, str, str]] | None = None
    """("launch" or "wait", operation, label) in order; None: not recorded. Others may note events of their own here."""

    def launch(self, operation: str, group: str, label: str = "", num_bytes: int | None = None) -> None:
        """Said before the launch: some wait in it. num_bytes: what this rank sends; None: small, and not counted."""
        if num_bytes is not None:
            self.sent[operation, group] += num_bytes
        self.launched += 1
        self.latest = operation, group, label

    def note(self, what: str, operation: str, label: str) -> None:
        if self.events is not None:
            self.events.append((what, operation, label))


@dataclass(frozen=True)
class Group:
    """Some ranks that work together: torch's handle (None for a group of one), this process' place among them, and how many."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    name: str = "alone"
    ranks: tuple[int, ...] = ()
    """Global ranks in order."""
    ledger: Ledger = field(default_factory=Ledger, compare=False)
    control: dist.ProcessGroup | None = None
    """The same ranks over gloo, for objects and barriers, where `handle` would take them to the GPU. None: `handle` does it."""


ALONE = Group(None, 0, 1)


class Pending:
    """A collective under way. `wait` returns its result; waiting again costs nothing."""

    def __init__(self, result: Tensor, work: dist.Work | Sequence[dist.Work] | None, group: Group, operation: str, label: str) -> None:
        self._result, self._group, self._operation, self._label = result, group, operation, label
        self._works = [work] if isinstance(work, dist.Work) else list(work or ())
        group.ledger.note("launch", operation, label)
        self._waited = False

    def wait(self) -> Tensor:
        if not self._waited:
            self._group.ledger.note("wait", self._operation, self._label)
            for work in self._works:
                work.wait()
            self._waited = True
        return self._result


def all_reduce(tensor: Tensor, group: Group, label: str = "") -> Pending:
    """Sum over the group's ranks, in place on every one of them."""
    work = None
    if group.handle is not None:
        group.ledger.launch("all_reduce", group.name, label, 2 * (group.size - 1) * _bytes(tensor) // group.size)
        work = dist.all_reduce(tensor, group=group.handle, async_op=True)
    return Pending(tensor, work, group, "all_reduce", label)


def all_gather(part: Tensor, group: Group, label: str = "", out: Tensor | None = None) -> Pending:
    """(n, ...) -> (size * n, ...): every rank's equally long part, in rank order. `out` may hold `part` in its place already."""
    if group.handle is None:
        if out is not None and out.data_ptr() != part.data_ptr():
            out.copy_(part)
        return Pending(part if out is None else out, None, group, "all_gather", label)
    part = part.contiguous()
    if out is None:
        out = part.new_empty(group.size * part.shape[0], *part.shape[1:])
    group.ledger.launch("all_gather", group.name, label, (group.size - 1) * _bytes(part))
    return Pending(out, _all_gather(out, part, group=group.handle, async_op=True), group, "all_gather", label)


def reduce_scatter(whole: Tensor, group: Group, label: str = "") -> Pending:
    """(size * n, ...) -> (n, ...): the sum over ranks of this rank's part. Overwrites nothing."""
    if group.handle is None:
        return Pending(whole, None, group, "reduce_scatter", label)
    whole = whole.contiguous()
    assert whole.shape[0] % group.size == 0, (whole.shape, group.size)
    part = whole.new_empty(whole.shape[0] // group.size, *whole.shape[1:])
    group.ledger.launch("reduce_scatter", group.name, label, (group.size - 1) * _bytes(part))
    return Pending(part, _reduce_scatter(part, whole, group=group.handle, async_op=True), group, "reduce_scatter", label)


def all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, label: str = "") -> Pending:
    """Rows [sum(send[:i]), + send[i]) go to rank i; the result holds receive[i] rows of rank i, in rank order."""
    if group.handle is None:
        return Pending(rows, None, group, "all_to_all", label)
    rows = rows.contiguous()
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    row_bytes = rows[:1].numel() * rows.element_size()
    group.ledger.launch("all_to_all", group.name, label, (sum(send) - send[group.rank]) * row_bytes)
    work = dist.all_to_all_single(out, rows, list(receive), list(send), group=group.handle, async_op=True)
    return Pending(out, work, group, "all_to_all", label)


def send_receive(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group,
                 label: str = "") -> list[Pending]:
    """Point to point: each (tensor, rank of the group). Between two ranks messages arrive in order; what goes to oneself is copied.

    One Pending per receive; wait for the first one first: it waits for all messages."""
    own = [tensor for tensor, to in sends if to == group.rank]
    operations = []
    for tensor, to in sends:
        if to != group.rank:
            operations.append(dist.P2POp(dist.isend, tensor.contiguous(), group=group.handle, group_peer=to))
    for tensor, source in receives:
        if source == group.rank:
            tensor.copy_(own.pop(0))
        else:
            operations.append(dist.P2POp(dist.irecv, tensor, group=group.handle, group_peer=source))
    if group.handle is not None:
        group.ledger.launch("send", group.name, label, sum(_bytes(tensor) for tensor, to in sends if to != group.rank))
    works = dist.batch_isend_irecv(operations) if operations else []
    # The first one has all works: gloo must not wait for one twice.
    return [Pending(tensor, works if index == 0 else None, group, "send", label) for index, (tensor, _) in enumerate(receives)]


def all_reduce_sum(tensor: Tensor, group: Group) -> None:
    """`all_reduce`, waited for."""
    all_reduce(tensor, group).wait()


def gather_objects(value: T, group: Group) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank. Small things only. RuntimeError (of gloo): a rank is gone."""
    if group.handle is None:
        return [value]
    values: list[Any] = [None] * group.size
    group.ledger.launch("gather_objects", group.name)
    dist.all_gather_object(values, value, group=group.control or group.handle)
    return values


def barrier(group: Group) -> None:
    """Nobody leaves before everybody came. RuntimeError (of gloo): a rank is gone."""
    if group.handle is not None:
        group.ledger.launch("barrier", group.name)
        dist.barrier(group=group.control or group.handle)


# torch 2.13 renamed the two; older ones know only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
