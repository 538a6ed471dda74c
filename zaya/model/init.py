"""Initial weights: each tensor is drawn from (seed, its name) alone, so every layout starts from the same model.

The rule per parameter is the plan's. Draws happen on the CPU in fp32, so that every device and dtype starts alike; an expert's weights
have their own stream, so that a device holding some experts can draw only those.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from zaya.config import ModelConfig
from zaya.model.moe import SKIP_BIAS
from zaya.model.transformer import Zaya
from zaya.plan import Fill, ParameterPlan, Shard, plan


@torch.no_grad()
def init_weights(model: Zaya, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and router bias in place."""
    for name, row in plan(config).items():
        model.get_parameter(name).copy_(initial_value(row, seed))
    for block in model.blocks:
        bias = block.moe.router.balance_bias
        bias.zero_()
        if config.skip_expert:
            bias[-1] = SKIP_BIAS


def initial_value(row: ParameterPlan, seed: int) -> Tensor:
    """The whole (unsharded) tensor of one row, fp32, on the CPU."""
    if isinstance(row.init, Fill):
        return torch.full(row.shape, row.init.value)
    if isinstance(row.placement, Shard) and row.placement.axis == "ep":
        return torch.stack([_normal(row.shape[1:], row.init.std, f"{seed}/{row.name}/{expert}") for expert in range(row.shape[0])])
    return _normal(row.shape, row.init.std, f"{seed}/{row.name}")


def _normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
