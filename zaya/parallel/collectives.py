"""Collectives over an explicit group; every one is the identity on a group of one, so no caller asks for sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Some ranks that work together: torch's handle (None for a group of one), this process' place in it, and how many."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int


def all_reduce_sum(tensor: Tensor, group: Group) -> None:
    """Sum over the group's ranks, in place on every one of them."""
    if group.handle is not None:
        dist.all_reduce(tensor, group=group.handle)


def gather_objects(value: object, group: Group) -> list[object]:
    """Every rank's picklable value, in rank order, on every rank. Small things only."""
    if group.handle is None:
        return [value]
    values: list[object] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def barrier(group: Group) -> None:
    """Nobody leaves before everybody came."""
    if group.handle is not None:
        dist.barrier(group=group.handle)
