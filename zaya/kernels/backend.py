"""Which implementation computes the ops: Triton kernels, C on a CPU, or the reference in plain torch. Chosen once, before the first step.

Everybody above calls `ops().cca(...)` and so on; all implementations take and return the same tensors. Triton is imported only where it is
chosen, and C compiled only there, so a machine without either trains by the reference.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zaya.kernels import reference
from zaya.kernels.arguments import HEAD_DIMS

MAX_WIDTH = 8192  # of the stream: a row lies in the registers of one program
MAX_CLASSES = 256  # of the router: a table of this width and a few rows still fits a work-group's registers and shared memory
CHOICES = ("auto", "triton", "cpu", "reference")
LANGUAGES = {"triton": "Triton", "cpu": "C"}
ENVIRONMENT = "ZAYA_KERNELS"  # overrides "auto": for tests, and to tell a kernel's fault from another's


class Ops(NamedTuple):
    """The ops by name; zaya/kernels/reference.py says what each computes."""

    rms_norm: Callable[..., Any]
    residual_norm: Callable[..., Any]
    cca: Callable[..., Any]
    attention: Callable[..., Any]
    route: Callable[..., Any]
    sort_by_expert: Callable[..., Any]
    experts: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    newton_schulz: Callable[..., Any]
    adamw_: Callable[..., Any]


class Choice(NamedTuple):
    """Which ops compute, and why not faster ones."""

    name: str
    """"triton", "cpu" or "reference"."""
    obstacle: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.obstacle})" if self.obstacle else self.name


REFERENCE = Ops(reference.rms_norm, reference.residual_norm, reference.cca, reference.attention, reference.route, reference.sort_by_expert,
                reference.experts, reference.cross_entropy, reference.newton_schulz, reference.adamw_)
_chosen = REFERENCE


def ops() -> Ops:
    """The chosen implementation."""
    return _chosen


def choose(kernels: str, device: torch.device, dtype: torch.dtype, head_dim: int, width: int = 1, num_classes: int = 1) -> Choice:
    """Settle which ops compute from here on, for tensors of `dtype` on `device`.

    auto: Triton on a GPU (ROCm or CUDA), C on a CPU; the reference where they do not take the dtype or a size, or there is no compiler.
    ValueError: Triton or C asked for where it cannot run.
    """
    global _chosen
    asked_by = "train.kernels"
    if kernels == "auto":
        asked_by, kernels = ENVIRONMENT, os.environ.get(ENVIRONMENT, "auto")
    if kernels not in CHOICES:
        raise ValueError(f"{ENVIRONMENT} = {kernels!r} is none of {', '.join(CHOICES)}")
    wanted = kernels if kernels != "auto" else "triton" if device.type == "cuda" else "cpu"
    obstacle = ""
    if wanted == "triton":
        obstacle = _triton_obstacle(device, dtype, head_dim, width, num_classes)
    elif wanted == "cpu":
        obstacle = _cpu_obstacle(device, dtype, head_dim)
    if obstacle and kernels != "auto":
        raise ValueError(f'{asked_by} = "{kernels}" {obstacle}; use "reference"')
    choice = Choice("reference", f"{LANGUAGES[wanted]} {obstacle}") if obstacle else Choice(wanted)
    _chosen = {"triton": _triton, "cpu": _cpu, "reference": lambda: REFERENCE}[choice.name]()
    return choice


def _cpu_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why C cannot compute this, or nothing; compiles it."""
    if device.type != "cpu":
        return f"cannot run on {device.type}"
    if dtype == torch.float64:
        return "has no fp64"
    if head_dim not in HEAD_DIMS:
        return f"takes head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    from zaya.kernels import cpu

    try:
        cpu.library()
    except RuntimeError as error:
        return str(error)
    return ""


def _cpu() -> Ops:
    from zaya.kernels import cpu

    return REFERENCE._replace(residual_norm=cpu.residual_norm, cca=cpu.cca, attention=cpu.attention, experts=cpu.experts,
                              cross_entropy=cpu.cross_entropy)


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, width: int, num_classes: int) -> str:
    """Why Triton cannot compute this, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed"
    if dtype == torch.float64:
        return "has no fp64"
    if head_dim not in HEAD_DIMS:
        return f"takes head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if width > MAX_WIDTH:
        return f"takes a hidden size up to {MAX_WIDTH}, not {width}"
    if num_classes > MAX_CLASSES:
        return f"takes up to {MAX_CLASSES} router classes, not {num_classes}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"cannot run on {device.type} (but, very slowly, under TRITON_INTERPRET=1)"
    return ""


def _triton() -> Ops:
    from zaya.kernels.adamw import adamw_
    from zaya.kernels.attention import attention
    from zaya.kernels.cca import cca
    from zaya.kernels.cross_entropy import cross_entropy
    from zaya.kernels.moe import experts
    from zaya.kernels.newton_schulz import newton_schulz
    from zaya.kernels.residual_norm import residual_norm, rms_norm
    from zaya.kernels.routing import route, sort_by_expert

    return Ops(rms_norm, residual_norm, cca, attention, route, sort_by_expert, experts, cross_entropy, newton_schulz, adamw_)
