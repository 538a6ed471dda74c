"""Inputs of adamw_: lengths that end inside a block, first and later steps, steps that must not count, and the 8B model's shards.

The cases' op is adamw_ on copies, because the tests share a case's tensors; a benchmark times adamw_ itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zaya.kernels.adamw import adamw_
from zaya.kernels.cases import CHIP, SMALL, Case, normal

IN_PLACE = ("param", "exp_avg", "exp_avg_sq", "out")
BYTES_PER_ELEMENT = 30  # four fp32 read, three fp32 and one bf16 written


def updating(**arguments: Any) -> tuple[Tensor, ...]:
    """adamw_: the weights, both moments, and the rounded weights where asked for, which are the arguments themselves."""
    adamw_(**arguments)
    return tuple(arguments[name] for name in IN_PLACE if arguments[name] is not None)


def updated(**arguments: Any) -> tuple[Tensor, ...]:
    """The same on copies."""
    return updating(**{**arguments, **{name: arguments[name].clone() for name in IN_PLACE if arguments[name] is not None}})


def expected(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
             weight_decay: float, grad_scale: Tensor, step: Tensor, commit: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
    """The specification, in fp64: torch.optim.AdamW's arithmetic behind a gate."""
    old = [tensor.double() for tensor in (param, exp_avg, exp_avg_sq)]
    gradient, t = grad.double() * grad_scale, step.double() + 1
    first = torch.lerp(old[1], gradient, 1 - beta1)
    second = beta2 * old[2] + (1 - beta2) * gradient.square()
    size, root = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
    new = old[0] * (1 - lr * weight_decay) - size * first / (second.sqrt() / root + eps)
    results = [torch.where(commit, after, before).float() for after, before in zip((new, first, second), old)]
    return tuple(results) if out is None else (*results, results[0].to(out.dtype))


def shard(length: int, *, step: int = 7, commit: bool = True, poisoned: bool = False, rounded: bool = True,
          betas: tuple[float, float] = (0.9, 0.95)) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """A shard whose gradients have the compute dtype, and weights rounded to it (bf16 for fp32); poisoned: gradients with NaN and Inf."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(41)
        rounded_dtype = torch.bfloat16 if dtype == torch.float32 else dtype

        def random() -> Tensor:
            return normal(generator, device, length)

        grad, second = random(), random().square()
        if poisoned:
            grad[::3], grad[1::7] = torch.nan, torch.inf
        # At step 0 the moments are zero, as the optimizer starts.
        moments = (0.1 * random(), 0.01 * second) if step else (torch.zeros_like(grad), torch.zeros_like(grad))
        return {"param": random(), "grad": grad.to(dtype), "exp_avg": moments[0], "exp_avg_sq": moments[1], "lr": 1e-2, "beta1": betas[0],
                "beta2": betas[1], "eps": 1e-8, "weight_decay": 0.1, "grad_scale": torch.tensor(0.37, device=device),
                "step": torch.tensor(float(step), device=device), "commit": torch.tensor(commit, device=device),
                "out": torch.empty(length, dtype=rounded_dtype, device=device) if rounded else None}

    return make


def _case(name: str, size: str, length: int, **changes: Any) -> Case:
    return Case(f"adamw {name}", size, updated, expected, shard(length, **changes), num_bytes=BYTES_PER_ELEMENT * length,
                timed=updating)


CASES = [
    _case("small ragged", SMALL, 2 * 1024 + 301),
    _case("small whole blocks", SMALL, 2 * 1024),
    _case("small one element", SMALL, 1),
    _case("small first step", SMALL, 1500, step=0, betas=(0.9, 0.999)),
    _case("small late step", SMALL, 1500, step=100_000, betas=(0.9, 0.999)),
    _case("small rejected", SMALL, 2500, commit=False),
    _case("small rejected nan", SMALL, 2500, commit=False, poisoned=True),
    _case("small nothing rounded", SMALL, 1100, rounded=False),
    # The embedding of the 8B, 262,272 * 2048 = 537,133,056 elements, over the 8 GPUs of a node.
    _case("8b embedding shard", CHIP, 262_272 * 2048 // 8),
    _case("8b embedding shard ragged", CHIP, 262_272 * 2048 // 8 + 13),
]
