"""Inputs of the cca op: documents around the convolutions' reach, chunks with halos, the shapes of the 8B and 74B models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case
from zaya.kernels.cca import cca

HALOS = ("halos.0", "halos.1", "halos.2")
PARAMETERS = (*(f"{side}_convs.{part}" for side in "qk" for part in range(4)), "temperature_G")


def make(device: torch.device, dtype: torch.dtype, *, B: int, T: int, N: int, G: int, H: int, documents: Sequence[int] = (), first: int = 0,
         chunks: int = 1, mean: bool = False, delayed: tuple[int, int] | None = None, fused: bool = False, seed: int = 1) -> dict[str, Any]:
    """documents: lengths, repeated over the row; first: position of the row's first token. Halos are zero where the row is not cut.

    Parameters are scaled as after some training: convolutions of unit gain, temperatures around 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    qC, C = N * H, G * H
    q, k, v = random(B, T, qC + 2 * C).split((qC, C, C), -1)
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    convs = [(random(c, 2, scale=0.7), random(c, scale=0.3), random(c, H, 2, scale=(2 * H) ** -0.5), random(c, scale=0.3)) for c in (qC, C)]
    start, end = (C // 2, C) if delayed is None else delayed
    halos = (random(B, chunks, 2, qC), random(B, chunks, 2, C), random(B, chunks, 1, end - start))
    lengths = list(documents) * (T // max(sum(documents), 1) + 1) if documents else [T]
    row = torch.cat([torch.arange(length) for length in lengths])[:T] + first
    positions = torch.stack([row.roll(b) if documents else row for b in range(B)]).to(device)
    return dict(
        q_BTC=q, k_BTC=k, v_BTC=v, q_mean_BTGH=random(B, T, G, H) if mean else None, q_convs=convs[0], k_convs=convs[1],
        temperature_G=1 + random(G, scale=0.1), positions_BT=positions, rope=reference.rope_table(positions, H, 1e4, torch.float32),
        halos=halos if chunks > 1 or first else tuple(halo.zero_() for halo in halos), delayed_rows=(start, end))


def _case(name: str, size: str, *, gradients: tuple[str, ...] = (), **shape: Any) -> Case:
    B, T, N, G, H = (shape[letter] for letter in "BTNGH")
    inputs = ("q_BTC", "k_BTC", "v_BTC", *(("q_mean_BTGH",) if shape.get("mean") else ()))
    return Case(
        name=f"cca {size if size == SMALL else ''} {name}".replace("  ", " "), size=size, op=cca, reference=reference.cca,
        make=lambda device, dtype: make(device, dtype, **shape), gradients=(*inputs, *PARAMETERS, *gradients),
        # Two convolutions of two taps each, the grouped one H x H per tap and head; backward: both operands' gradients.
        flops=2 * B * T * (N + G) * (2 * H + 2 * H * H), num_bytes=2 * 2 * B * T * (N + 2 * G) * H,
        # All tensors are within 4e-3 but dtemperature: one sum per key head, of terms of either sign, by chance 6 times below their size.
        limit=2e-2)


CASES = [
    _case("documents of one and two tokens", SMALL, B=2, T=11, N=3, G=1, H=32, documents=(1, 2, 3, 1), gradients=HALOS),
    _case("one token", SMALL, B=1, T=1, N=2, G=1, H=64),
    _case("one token after others", SMALL, B=2, T=1, N=2, G=2, H=32, first=5, gradients=HALOS),
    _case("two chunks, border inside a head", SMALL, B=2, T=14, N=3, G=3, H=32, chunks=2, first=3, mean=True, delayed=(48, 96),
          gradients=HALOS),
    _case("chunks of one token", SMALL, B=1, T=2, N=1, G=1, H=64, chunks=2, first=7, gradients=HALOS),
    _case("ragged, fused projection", SMALL, B=1, T=135, N=4, G=2, H=32, documents=(40, 1, 2, 60), fused=True),
    _case("heads of 128, mean given", SMALL, B=1, T=70, N=2, G=1, H=128, documents=(33, 1, 2), mean=True),
    _case("8b", CHIP, B=4, T=4096, N=8, G=2, H=128, documents=(1000, 2000, 300)),
    _case("8b context parallel", CHIP, B=1, T=16384, N=8, G=2, H=128, chunks=2, first=16384, seed=4, gradients=HALOS),
    _case("74b", CHIP, B=2, T=4096, N=16, G=2, H=128, documents=(1000, 2000, 300)),
]
