"""Which implementation computes the ops: Triton kernels, or the reference in plain torch. Chosen once, before the first step.

Everybody above calls `ops().cca(...)` and so on; both implementations take and return the same tensors. Triton is imported only where it is
chosen, so a machine without it trains by the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zaya.kernels import reference

HEAD_DIMS = (32, 64, 128)  # what attention and cca are built for
MAX_WIDTH = 8192  # of the stream: a row lies in the registers of one program
MAX_CLASSES = 256  # of the router: a block's one-hot table of this width still fits the registers
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


REFERENCE = Ops(reference.rms_norm, reference.residual_norm, reference.cca, reference.attention, reference.route, reference.sort_by_expert,
                reference.experts, reference.cross_entropy, reference.newton_schulz, reference.adamw_)
_chosen = REFERENCE


def ops() -> Ops:
    """The chosen implementation."""
    return _chosen


def choose(kernels: str, device: torch.device, dtype: torch.dtype, head_dim: int, width: int = 1, num_classes: int = 1) -> str:
    """Settle which ops compute from here on, for tensors of `dtype` on `device`; returns "triton" or "reference".

    auto: Triton on a GPU (ROCm or CUDA) unless no kernel takes the dtype or one of the sizes; else the reference. ValueError: Triton asked
    for where it cannot run.
    """
    global _chosen
    if kernels == "auto":
        kernels = os.environ.get(ENVIRONMENT, "auto")
    obstacle = _obstacle(device, dtype, head_dim, width, num_classes)
    if kernels == "auto":
        kernels = "triton" if device.type == "cuda" and not obstacle else "reference"
    if kernels not in ("triton", "reference"):
        raise ValueError(f"{ENVIRONMENT} = {kernels!r} is none of auto, triton, reference")
    if kernels == "triton" and obstacle:
        raise ValueError(f'train.kernels = "triton" {obstacle}; use "reference"')
    _chosen = _triton() if kernels == "triton" else REFERENCE
    return kernels


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, width: int, num_classes: int) -> str:
    """Why Triton cannot compute this, or nothing."""
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
