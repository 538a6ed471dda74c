"""Inputs of residual_norm and rms_norm: odd widths and row counts, and the rows of the 8B and 74B models as one GPU sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case, normal
from zaya.kernels.residual_norm import residual_norm, rms_norm

EPS = 1e-5
JOIN_GRADIENTS = ("stream", "branch", "scales.0", "scales.1", "scales.2", "scales.3", "norm_weight")


def join(*shape: int, channel_scale: float = 1.0) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """residual_norm on a stream of `shape`; channel_scale: what the scales are near, 0 for channels that were switched off."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        random = _random(device, 31)
        D = shape[-1]
        branch_scale, stream_scale = (channel_scale + 0.2 * random(D) for _ in range(2))
        branch_bias, stream_bias, norm_weight = 0.3 * random(D), 0.3 * random(D), 1 + 0.2 * random(D)
        if channel_scale == 0:
            branch_scale, stream_scale = torch.zeros_like(branch_scale), torch.zeros_like(stream_scale)
        scales = tuple(vector.to(dtype) for vector in (branch_scale, branch_bias, stream_scale, stream_bias))
        return {"stream": 3 * random(*shape), "branch": random(*shape).to(dtype), "scales": scales, "norm_weight": norm_weight.to(dtype),
                "eps": EPS}

    return make


def norm(*shape: int, of_stream: bool = False) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """rms_norm in the compute dtype, or of the stream, which is fp32."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        random = _random(device, 37)
        return {"x": (3 * random(*shape)).to(torch.float32 if of_stream else dtype), "weight": (1 + 0.2 * random(shape[-1])).to(dtype),
                "eps": EPS}

    return make


def _random(device: torch.device, seed: int) -> Callable[..., Tensor]:
    return functools.partial(normal, torch.Generator().manual_seed(seed), device)


def _joins(name: str, size: str, *shape: int, channel_scale: float = 1.0) -> Case:
    elements = torch.Size(shape).numel()
    # In bf16, forward: stream and new stream 4 bytes each, branch and x 2 each; backward: their gradients, stream and branch once more.
    return Case(f"residual_norm {name}", size, residual_norm, reference.residual_norm, join(*shape, channel_scale=channel_scale),
                JOIN_GRADIENTS, num_bytes=12 * elements, backward_bytes=18 * elements)


def _norms(name: str, size: str, *shape: int, of_stream: bool = False) -> Case:
    elements, x_bytes = torch.Size(shape).numel(), 4 if of_stream else 2
    return Case(f"rms_norm {name}", size, rms_norm, reference.rms_norm, norm(*shape, of_stream=of_stream), ("x", "weight"),
                num_bytes=(x_bytes + 2) * elements, backward_bytes=(2 * x_bytes + 2) * elements)


CASES = [
    _joins("small odd width", SMALL, 2, 7, 201),
    _joins("small rows of one program", SMALL, 1, 3, 64),
    _joins("small many tiles", SMALL, 3, 71, 256),
    _joins("small one token", SMALL, 1, 1, 2048),
    _joins("small 4096", SMALL, 6, 4096),
    _joins("small wider than 4096", SMALL, 2, 4200),
    _joins("small width one", SMALL, 5, 1),
    _joins("small channels off", SMALL, 4, 96, channel_scale=0.0),
    _norms("small router", SMALL, 3, 91, 256),
    _norms("small odd width", SMALL, 9, 201),
    _norms("small stream", SMALL, 7, 201, of_stream=True),
    _norms("small 4096", SMALL, 3, 4096),
    _norms("small wider than 4096", SMALL, 2, 4200),
    _joins("8b", CHIP, 4, 4096, 2048),
    _joins("74b", CHIP, 2, 4096, 4096),
    _norms("8b router", CHIP, 4, 4096, 256),
    _norms("8b first norm", CHIP, 4, 4096, 2048, of_stream=True),
    _norms("74b first norm", CHIP, 2, 4096, 4096, of_stream=True),
]
