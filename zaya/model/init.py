"""Initial weights: each tensor is drawn from (seed, its name) alone, so every layout starts from the same model.

The rule per parameter is the plan's. Draws happen on the CPU in fp32, so that every device and dtype starts alike; an expert's weights
have their own stream, so that a device holding some experts draws only those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zaya.config import ModelConfig
from zaya.model.moe import SKIP_BIAS
from zaya.model.transformer import Zaya
from zaya.plan import Fill, ParameterPlan, plan
from zaya.shard import Box, Shard


@torch.no_grad()
def init_weights(model: Zaya, config: ModelConfig, seed: int, pieces: Mapping[str, Box] | None = None, *, draw: bool = True) -> None:
    """Fill every parameter and router bias in place. pieces: the box of each parameter that the model holds, all of it by default.

    draw = False: what would be drawn is NaN, for a checkpoint to replace; drawing takes a core 5 s for each 1e9 numbers.
    """
    for name, row in plan(config).items():
        box = pieces[name] if pieces else ((0,) * len(row.shape), row.shape)
        parameter = model.get_parameter(name)
        if draw or isinstance(row.init, Fill):
            parameter.copy_(initial_value(row, seed, box))
        else:
            parameter.fill_(math.nan)
    for block in model.blocks:
        bias = block.moe.router.balance_bias
        bias.zero_()
        if config.skip_expert:
            bias[-1] = SKIP_BIAS


def initial_value(row: ParameterPlan, seed: int, box: Box) -> Tensor:
    """A box of one row's tensor, fp32, on the CPU."""
    offsets, sizes = box
    if isinstance(row.init, Fill):
        return torch.full(sizes, row.init.value)
    window = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))
    if isinstance(row.placement, Shard) and row.placement.axis == "ep":
        experts = range(offsets[0], offsets[0] + sizes[0])
        return torch.stack([_normal(row.shape[1:], row.init.std, f"{seed}/{row.name}/{expert}")[window[1:]] for expert in experts])
    return _normal(row.shape, row.init.std, f"{seed}/{row.name}")[window]


def _normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
