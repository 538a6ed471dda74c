"""The small parts of the transformer: linear maps, norm weights, residual scales, the tied embedding.

Between them and parallelism stand seams: `Linear.apply_weight`, `Embedding.lookup` and `Embedding.cross_entropy` hold the local function
by default and can be replaced from outside, and `Embedding.gradient_sum` is filled there. Parameters are left uninitialised here; their
names and shapes are the plan's (zaya/plan.py).

Letters: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import GradientSum

RMS_NORM_EPS = 1e-5  # ZAYA1's released configuration


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter in the default dtype and on the default device."""
    return nn.Parameter(torch.empty(*shape))


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose inner activations backward computes again instead of keeping. There is no dropout, so no RNG state is kept."""

    def run(*args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


class Linear(nn.Module):
    """y = x @ weight.T + bias; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        self.apply_weight: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Norm over the last dim; forward is used where no residual precedes it, else its weight enters `ResidualScale`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops().rms_norm(x, self.weight, RMS_NORM_EPS)


class ResidualScale(nn.Module):
    """Joins a sub-layer's output with the stream, per channel scaled and shifted, and norms the sum for the next sub-layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.branch_scale, self.branch_bias = parameter(size), parameter(size)
        self.stream_scale, self.stream_bias = parameter(size), parameter(size)

    def forward(self, stream_BTD: Tensor, branch_BTD: Tensor, next_norm: RMSNorm) -> tuple[Tensor, Tensor]:
        scales = (self.branch_scale, self.branch_bias, self.stream_scale, self.stream_bias)
        return ops().residual_norm(stream_BTD, branch_BTD, scales, next_norm.weight, RMS_NORM_EPS)


def whole_vocabulary(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, gradient_sum: GradientSum | None) -> Tensor:
    return ops().cross_entropy(hidden_BTD.flatten(0, -2), weight_VD, labels_BT.flatten(), gradient_sum=gradient_sum)


class Embedding(nn.Module):
    """Token embedding, scaled per channel, tied to the output head. gradient_sum: where lookup and loss add the weight's gradient, if
    something sums it over micro-batches; None: autograd gets it."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, size)
        self.scale, self.bias = parameter(size), parameter(size)
        self.lookup: Callable[[Tensor, Tensor, GradientSum | None], Tensor] = reference.lookup
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor, GradientSum | None], Tensor] = whole_vocabulary
        self.gradient_sum: GradientSum | None = None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The first residual stream (B, T, D), in fp32 (fp64)."""
        embedded_BTD = self.lookup(tokens_BT, self.weight, self.gradient_sum)
        wide = reference.wide(embedded_BTD.dtype)
        return (embedded_BTD.to(wide) + self.bias.to(wide)) * self.scale.to(wide)

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the cross-entropy over labelled tokens, in nats."""
        return self.cross_entropy(hidden_BTD, self.weight, labels_BT, self.gradient_sum)
