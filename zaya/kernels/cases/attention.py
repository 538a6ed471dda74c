"""Inputs of attention: packed documents, windows, chunks of a longer sequence, and the attention layers of the 8B and 74B models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.attention import attention
from zaya.kernels.cases import CHIP, SMALL, Case


def first_keys(starts_BS: Tensor, window: int | None) -> Tensor:
    """Of every token, the later of its document's start and its window's edge."""
    if window is None:
        return starts_BS
    return torch.maximum(starts_BS, torch.arange(starts_BS.shape[1], device=starts_BS.device) - window + 1)


def document_starts(rows: tuple[tuple[int, ...], ...], S: int, device: torch.device) -> Tensor:
    """(B, S): each row's documents have these lengths, the last one going on to the row's end."""
    starts_BS = torch.zeros(len(rows), S, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            start += length
            starts_BS[row, start:] = start
    return starts_BS.to(device)


def sequence(S: int, N: int, G: int, H: int, *, rows: tuple[tuple[int, ...], ...] = ((),), window: int | None = None,
             chunk: int | None = None, offsets: tuple[int, ...] = (0,), views: bool = False, index_dtype: torch.dtype = torch.int64,
             ) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """Rows of S tokens, of which the chunks of `chunk` tokens at `offsets` ask; views: q, k and v are parts of one tensor, heads outside
    tokens for v."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        B, T = len(rows), (chunk or S) * len(offsets)
        generator = torch.Generator().manual_seed(43)

        def random(*shape: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        if views:
            fused = random(B, S, N + G, H)
            q, k, v = fused[:, :, :N], fused[:, :, N:], random(B, G, S, H).transpose(1, 2)
        else:
            q, k, v = random(B, T, N, H), random(B, S, G, H), random(B, S, G, H)
        first_BS = first_keys(document_starts(rows, S, device), window).to(index_dtype)
        first_BT = torch.cat([first_BS[:, offset : offset + (chunk or S)] for offset in offsets], 1)
        return {"q_BTNH": q, "k_BSGH": k, "v_BSGH": v, "first_key_BT": first_BT, "offsets": offsets}

    return make


def pairs(S: int, window: int | None, chunk: int, offsets: tuple[int, ...]) -> int:
    """How many keys all queries of a row see, without documents."""
    return sum(min(index + 1, window or S) for offset in offsets for index in range(offset, offset + chunk))


def small(name: str, S: int, N: int, G: int, H: int, gradients: tuple[str, ...] = ("q_BTNH", "k_BSGH", "v_BSGH"), **options: Any) -> Case:
    return Case(f"attention small {name}", SMALL, attention, reference.attention, sequence(S, N, G, H, **options), gradients)


def chip(name: str, B: int, S: int, N: int, G: int, *, window: int | None = None, chunk: int | None = None,
         offsets: tuple[int, ...] = (0,)) -> Case:
    H = 128
    flops = 4 * B * N * H * pairs(S, window, chunk or S, offsets)  # two products, forward
    moved = 2 * B * H * (2 * (chunk or S) * len(offsets) * N + 2 * S * G)  # q, out, k, v
    make = sequence(S, N, G, H, rows=((),) * B, window=window, chunk=chunk, offsets=offsets)
    return Case(f"attention {name}", CHIP, attention, reference.attention, make, ("q_BTNH", "k_BSGH", "v_BSGH"), flops=flops,
                backward_flops=flops * 5 // 2, num_bytes=moved)


CASES = [
    # Sizes go past one block of queries (128) and of keys (64) and end inside one.
    small("one row, four heads a group", 140, 4, 1, 32),
    small("documents differ by row", 135, 1, 1, 32, rows=((40, 64, 7), (), (128,)), index_dtype=torch.int32),
    small("documents of one token", 70, 2, 1, 32, rows=((1,) * 69, (3, 1, 1, 60))),
    small("window within a block", 200, 1, 1, 32, rows=((100,),), window=5),
    small("window over blocks", 300, 1, 1, 64, rows=((90,),), window=150),
    small("two chunks, zig-zag", 4 * 75, 2, 1, 64, rows=((110, 100),), chunk=75, offsets=(75, 150)),
    small("first and last chunk", 4 * 70, 1, 1, 32, rows=((250,), (60,)), window=100, chunk=70, offsets=(0, 210)),
    small("one late chunk", 300, 1, 1, 128, rows=((33,),), chunk=90, offsets=(190,)),
    small("one token", 1, 4, 2, 32, gradients=("v_BSGH",)),  # its probability is 1 whatever q and k are
    small("views", 140, 2, 1, 64, rows=((50,), (131,)), views=True),
    chip("8b 4k", 4, 4096, 8, 2),
    chip("8b 32k, rank 0 of 2", 1, 32768, 8, 2, chunk=8192, offsets=(0, 24576)),
    chip("8b 128k, rank 0 of 8", 1, 131072, 8, 2, chunk=8192, offsets=(0, 122880)),
    chip("74b 4k full", 1, 4096, 16, 2),
    chip("74b 32k window", 1, 32768, 16, 2, window=4096),
]
