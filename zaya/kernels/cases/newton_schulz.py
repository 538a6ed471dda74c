"""Inputs of newton_schulz: odd, flat, tall and strided matrices, and the batches of equal shapes that Muon has in the 8B and 74B models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case, normal
from zaya.kernels.newton_schulz import newton_schulz

# Fifteen products, each rounded, while a small singular value grows 3.4 times a step, with its error.
LIMIT = 3e-2


def drawn(*shape: int, steps: int = 5, transposed: bool = False, zero: bool = False) -> Callable[..., dict[str, Any]]:
    """Normal numbers; transposed: a view of a contiguous (..., cols, rows); zero: the first matrix is all zeros."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        values = normal(torch.Generator().manual_seed(43), device, *stored).to(dtype)
        if zero:
            values[0] = 0
        return {"matrices": values.mT if transposed else values, "steps": steps}

    return make


def flops(*shape: int, steps: int = 5) -> int:
    """That the op does, half of the symmetric products saved: n^2 m + n^3 + 2 n^2 m a step."""
    n, m = sorted(shape[-2:])
    return steps * torch.Size(shape[:-2]).numel() * (3 * n * n * m + n**3)


def _case(name: str, size: str, *shape: int, **options: Any) -> Case:
    return Case(f"newton_schulz {name}", size, newton_schulz, reference.newton_schulz, drawn(*shape, **options),
                flops=flops(*shape, steps=options.get("steps", 5)), limit=LIMIT)


CASES = [
    _case("small odd wide", SMALL, 3, 17, 33),
    _case("small tall", SMALL, 2, 70, 40),
    _case("small two batch dims", SMALL, 2, 2, 20, 20, steps=2),
    _case("small one matrix over a tile", SMALL, 130, 150, steps=2),
    _case("small tall over a tile", SMALL, 1, 260, 40, steps=2),
    _case("small transposed view", SMALL, 2, 24, 72, transposed=True),
    _case("small one element", SMALL, 1, 1),
    _case("small one row", SMALL, 1, 65),
    _case("small a zero matrix", SMALL, 2, 20, 24, zero=True),
    _case("small one step", SMALL, 2, 12, 40, steps=1),
    # On a chip of eight compute units one medium or large tile for each (`newton_schulz._size`):
    _case("small medium tiles", SMALL, 8, 120, 128, steps=2),
    _case("small large tiles", SMALL, 8, 250, 256, steps=2),
    _case("8b queries", CHIP, 40, 1024, 2048),
    _case("8b keys", CHIP, 40, 256, 2048),
    _case("8b value blocks", CHIP, 80, 128, 2048),
    _case("8b attention output", CHIP, 40, 2048, 1024),
    _case("8b experts of one block", CHIP, 48, 2048, 2048),
    _case("8b one expert", CHIP, 2048, 2048),
    _case("8b router", CHIP, 80, 256, 256),
    _case("8b router classes", CHIP, 40, 17, 256),
    _case("74b experts of one block", CHIP, 24, 4096, 4096),
    _case("74b queries", CHIP, 15, 2048, 4096),
]
