"""Inputs of the experts: ragged, empty and single groups, skipped tokens, rows already sorted; the 8B's and 74B's, uniform and skewed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case, normal
from zaya.kernels.gradient_sum import ExpertSums, GradientSum
from zaya.kernels.moe import experts, rows_times_weights

GRADIENTS = ("x_TD", "gate_up_EFD", "down_EDF")


def routed(tokens: int, width: int, ffn: int, sizes: tuple[int, ...], *, slots: int = 1,
           is_sorted: bool = False) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """sizes: assignments of each expert; what remains of tokens * slots belongs to no expert."""
    E, R = len(sizes), tokens * slots
    assert sum(sizes) <= R

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        random = functools.partial(normal, torch.Generator().manual_seed(R + width), device)
        arguments = {"x_TD": random(R if is_sorted else tokens, width).to(dtype), "sizes_E": torch.tensor(sizes, device=device),
                     "gate_up_EFD": (random(E, 2 * ffn, width) * width**-0.5).to(dtype),
                     "down_EDF": (random(E, width, ffn) * ffn**-0.5).to(dtype)}
        if is_sorted:
            return arguments
        # The places of sorted random numbers: any permutation, as sort_by_expert's are.
        return {**arguments, "order_R": random(R).argsort().int(), "gate_Tk": 0.5 + 0.2 * random(tokens, slots)}

    return make


class _IntoSums(torch.autograd.Function):
    """Two backward passes: of the sums the first replaces what is there, the second adds to it."""

    @staticmethod
    def forward(ctx, x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk):
        with torch.enable_grad():
            x_TD, gate_Tk = (tensor.detach().requires_grad_() for tensor in (x_TD, gate_Tk))
            ctx.sums = ExpertSums(*(GradientSum(torch.empty_like(w, dtype=torch.float32)) for w in (gate_up_EFD, down_EDF)))
            ctx.inputs, ctx.dtype = (x_TD, gate_Tk), x_TD.dtype
            ctx.out = experts(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, ctx.sums)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, dout_TD):
        for _ in range(2):
            dx_TD, dgate_Tk = torch.autograd.grad(ctx.out, ctx.inputs, dout_TD, retain_graph=True)
        dgate_up_EFD, ddown_EDF = ((gradient_sum.total / 2).to(ctx.dtype) for gradient_sum in ctx.sums)
        return dx_TD, None, dgate_up_EFD, ddown_EDF, None, dgate_Tk


def experts_into_sums(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor, gate_Tk: Tensor) -> Tensor:
    """experts with sums, over two equal micro-batches. Their mean is the weights' gradient, so that it compares with the reference's."""
    return _IntoSums.apply(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk)


def _into_sums(case: Case) -> Case:
    return replace(case, name=case.name.replace("experts", "experts_into_sums"), op=experts_into_sums, backward_flops=4 * case.flops)


def _case(name: str, size: str, tokens: int, width: int, ffn: int, sizes: tuple[int, ...], *, slots: int = 1,
          is_sorted: bool = False) -> Case:
    gradients = GRADIENTS if is_sorted else (*GRADIENTS, "gate_Tk")
    return Case(f"experts {name}", size, experts, reference.experts, routed(tokens, width, ffn, sizes, slots=slots, is_sorted=is_sorted),
                gradients, flops=2 * sum(sizes) * 3 * width * ffn)


def _product(name: str, size: str, tokens: int, width: int, sizes: tuple[int, ...]) -> Case:
    """The grouped product alone, on rows that are sorted already."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        arguments = routed(tokens, width, width, sizes, is_sorted=True)(device, dtype)
        return {"rows_RK": arguments["x_TD"], "sizes_E": arguments["sizes_E"], "weights_ENK": arguments["down_EDF"]}

    return Case(f"grouped_gemm {name}", size, rows_times_weights, expected_product, make, flops=2 * sum(sizes) * width * width)


def expected_product(rows_RK: Tensor, sizes_E: Tensor, weights_ENK: Tensor) -> Tensor:
    groups = rows_RK.split(sizes_E.tolist())
    return torch.cat([rows @ weights.T for rows, weights in zip(groups, weights_ENK, strict=True)])


def _uniform(rows: int, experts: int) -> tuple[int, ...]:
    """All rows have an expert; the first few one row more, where they do not divide evenly."""
    return tuple(rows // experts + (expert < rows % experts) for expert in range(experts))


def _skewed(rows: int, experts: int) -> tuple[int, ...]:
    """One expert has half of the rows, the others share the rest."""
    return (rows // 2, *_uniform(rows - rows // 2, experts - 1))


CASES: list[Case] = [
    _case("small ragged", SMALL, 110, 72, 40, (50, 0, 33, 1)),
    _case("small all on one", SMALL, 60, 64, 48, (0, 60, 0)),
    _case("small none routed", SMALL, 20, 64, 32, (0, 0)),
    _case("small two slots", SMALL, 50, 64, 32, (60, 0, 21), slots=2),
    _case("small sorted rows", SMALL, 90, 64, 32, (40, 0, 43), is_sorted=True),
    # Widths of whole tiles, as the models have: no column is read twice, no inner loop has a mask.
    _case("small whole tiles", SMALL, 270, 512, 256, (258, 0, 5)),
    _into_sums(_case("small whole tiles", SMALL, 270, 512, 256, (258, 0, 5))),
    _into_sums(_case("small ragged", SMALL, 110, 72, 40, (50, 0, 33, 1))),
    # Widths that neither tiles nor 16-byte loads divide; above, eights divide them.
    _case("small odd widths", SMALL, 60, 70, 37, (30, 0, 25)),
    # On a chip of eight compute units two rounds of wide tiles, three of narrow ones (`moe._Tiles.of_product`).
    _case("small narrow tiles", SMALL, 60, 512, 256, (20, 0, 0, 35, 0, 0, 0, 0)),
    # Of the last tiles one is as high as TAIL_M, one a row higher, one lower.
    _case("small ends of groups", SMALL, 150, 64, 32, (64, 65, 17)),
    _case("small many experts", SMALL, 100, 64, 32, (0, 3, 1) * 22),
    # 4 rows of 4,096 tokens
    _case("8b uniform", CHIP, 16384, 2048, 2048, _uniform(16384, 16)),
    _case("8b skewed", CHIP, 16384, 2048, 2048, _skewed(16384, 16)),
    _case("8b two slots", CHIP, 8192, 2048, 2048, _uniform(16384, 16), slots=2),
    _case("8b sorted rows", CHIP, 16384, 2048, 2048, _uniform(16384, 16), is_sorted=True),
    _into_sums(_case("8b uniform", CHIP, 16384, 2048, 2048, _uniform(16384, 16))),
    _case("74b uniform", CHIP, 16384, 4096, 4096, _uniform(16384, 24)),
    _case("74b skewed", CHIP, 16384, 4096, 4096, _skewed(16384, 24)),
    # Widths that no tile divides, but 8 does.
    _case("2880 wide uniform", CHIP, 16384, 2880, 1440, _uniform(16384, 16)),
    _product("small", SMALL, 60, 64, (0, 50, 10)),
    _product("8b uniform", CHIP, 16384, 2048, _uniform(16384, 16)),
    _product("8b skewed", CHIP, 16384, 2048, _skewed(16384, 16)),
    _product("74b uniform", CHIP, 16384, 4096, _uniform(16384, 24)),
    _product("74b skewed", CHIP, 16384, 4096, _skewed(16384, 24)),
]
