"""The mesh: which ranks exist, which axis each lies on, and the device of this one.

First thing a process makes, and the only place that reads torchrun's environment. Today one axis, dp: every rank holds the whole model.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zaya.parallel.collectives import Group


@dataclass(frozen=True)
class Mesh:
    """This process' place. `dp`: the ranks that share each step's rows."""

    dp: Group
    device: torch.device

    @property
    def rank(self) -> int:
        return self.dp.rank

    @property
    def world_size(self) -> int:
        return self.dp.size

    def __str__(self) -> str:
        backend = dist.get_backend(self.dp.handle) if self.dp.handle is not None else "no process group"
        return f"mesh: {self.world_size} ranks = dp {self.dp.size} | {self.device.type}, {backend}"


def world_size_from_environment() -> int:
    """Number of processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process' rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def open_mesh(device: str, timeout_s: float = 600.0) -> Mesh:
    """Join the other processes of this job (collective call 1 of every rank). device: auto | cuda | cpu (ROCm is "cuda").

    One process needs no process group: it runs the same lines, on groups of size 1. ValueError: cuda asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('train.device = "cuda" but torch sees no GPU; use train.device = "cpu" or "auto"')
    local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), world_size_from_environment()
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    here = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if size == 1:
        return Mesh(Group(None, 0, 1), here)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return Mesh(Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size()), here)


def close_mesh(mesh: Mesh) -> None:
    """Leave in order (last collective call of every rank)."""
    if mesh.dp.handle is not None:
        dist.destroy_process_group()
