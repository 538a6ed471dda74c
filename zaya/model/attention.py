"""Compressed convolutional grouped-query attention (CCGQA, arXiv 2510.04476): project, convolve, norm, rotate, attend, project back.

On a batch's path: x from the block's norm -> q~, k~, v (narrow) -> the op cca -> `context.attend` -> the branch added to the stream.
Head counts come from weight shapes and `delayed_rows`, so a module holding a part of the heads runs the same lines. Seams that can be
replaced from outside: `project` and the map of `o`, `context` (where the rest of the sequence is), `group_mean` (where the rest of a
group is).

Letters: B batch, T tokens on this device, S tokens of the sequence, D hidden, C channels, H head dim, N query heads, G KV heads, K chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zaya.config import ModelConfig
from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.model.layers import Linear, parameter, recomputed


@dataclass(frozen=True)
class Packing:
    """What attention must know of the rows on this device: made once per forward pass, shared by all blocks."""

    positions_BT: Tensor
    """Index of each token inside its document."""
    offsets: tuple[int, ...]
    """Index in the row at which each chunk starts."""
    rope: dict[str, tuple[Tensor, Tensor]]
    """cos and sin per kind of attention."""
    first_key_BT: dict[str, Tensor]
    """Index in the row of the first key each query sees, per kind of attention."""

    @staticmethod
    def of(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype, offsets: tuple[int, ...]) -> Packing:
        chunk = positions_BT.shape[1] // len(offsets)
        index_T = torch.cat([torch.arange(offset, offset + chunk, device=positions_BT.device) for offset in offsets])
        start_BT = index_T - positions_BT
        bases = {"full": config.rope_theta, "sliding": config.rope_theta_sliding}
        kinds = sorted({config.attention_kind(block) for block in range(config.num_layers)})
        # A window of W tokens counts the token itself: keys j with i - W < j <= i.
        first = {"full": start_BT, "sliding": torch.maximum(start_BT, index_T - config.sliding_window + 1)}
        rope = {kind: reference.rope_table(positions_BT, config.head_dim, bases[kind], dtype) for kind in kinds}
        return Packing(positions_BT, offsets, rope, {kind: first[kind] for kind in kinds})


class Context(Protocol):
    """Where the rest of the sequence is."""

    @property
    def begin(self) -> Callable[[Tensor, Tensor], None] | None:
        """Called with k and v as soon as they exist, before the query heads are computed."""

    def offsets(self, num_tokens: int) -> tuple[int, ...]:
        """Index in the row at which each chunk of the `num_tokens` on this device starts."""
        ...

    def halos(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """For each (x (B, T, C), n) the n tokens before each chunk (B, K, n, C): zeros before the row."""
        ...

    def attend(self, q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """Attention of the queries here over the whole row (B, T, N, H)."""
        ...


class LocalContext:
    """The whole sequence is here: nothing precedes a row, keys and values are already complete."""

    begin: Callable[[Tensor, Tensor], None] | None = None
    """Called inside the op cca with k and v, before q is computed, where they have a way to go; None: the op need not part the two."""

    def offsets(self, num_tokens: int) -> tuple[int, ...]:
        """Index in the row at which each chunk of the `num_tokens` on this device starts."""
        return (0,)

    def halos(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """For each (x (B, T, C), n) the n tokens before each chunk (B, K, n, C): zeros, as before any document."""
        return reference.no_halos(parts)

    def attend(self, q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
        return ops().attention(q_BTNH, k_BTGH, v_BTGH, first_key_BT, offsets)


def project(x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """x @ W.T for each W (channels, D)."""
    return [F.linear(x_BTD, weight) for weight in weights]


def local_group_mean(q_BTNH: Tensor, num_groups: int) -> Tensor | None:
    """Mean of the query heads of each KV group (B, T, G, H); None says that every group is whole here, and leaves it to the op."""
    return None


class Convolution(nn.Module):
    """Weight and bias of one causal convolution; `reference.fold_convolutions` makes one of two of them."""

    def __init__(self, channels: int, *trailing: int) -> None:
        super().__init__()
        self.weight = parameter(channels, *trailing)
        self.bias = parameter(channels)


class Attention(nn.Module):
    """x (B, T, D) -> branch (B, T, D)."""

    def __init__(self, config: ModelConfig, kind: str, *, recompute: bool = False) -> None:
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        q_channels, kv_channels = config.num_heads * H, config.num_kv_heads * H
        self.kind, self.head_dim, self.recompute = kind, H, recompute
        self.q, self.k, self.v = Linear(D, q_channels), Linear(D, kv_channels), Linear(D, kv_channels)
        self.q_depthwise, self.q_grouped = Convolution(q_channels, 2), Convolution(q_channels, H, 2)
        self.k_depthwise, self.k_grouped = Convolution(kv_channels, 2), Convolution(kv_channels, H, 2)
        self.temperature = parameter(config.num_kv_heads)
        self.o = Linear(q_channels, D)
        self.delayed_rows = (kv_channels // 2, kv_channels)
        self.project: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]] = project
        self.context: Context = LocalContext()
        self.group_mean: Callable[[Tensor, int], Tensor | None] = local_group_mean

    def forward(self, x_BTD: Tensor, packing: Packing) -> Tensor:
        q_BTC, k_BTC, v_BTC = self.project(x_BTD, (self.q.weight, self.k.weight, self.v.weight))
        mix = recomputed(self.mix) if self.recompute else self.mix
        out_BTNH = mix(q_BTC, k_BTC, v_BTC, packing)
        return self.o(out_BTNH.flatten(-2))

    def mix(self, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, packing: Packing) -> Tensor:
        """From projections to the heads' outputs (B, T, N, H): everything that mixes tokens."""
        start, end = self.delayed_rows
        halos = self.context.halos(((q_BTC, 2), (k_BTC, 2), (v_BTC[..., start:end], 1)))
        q_mean_BTGH = self.group_mean(q_BTC.unflatten(-1, (-1, self.head_dim)), k_BTC.shape[-1] // self.head_dim)
        q, k, v = ops().cca(
            q_BTC, k_BTC, v_BTC, q_mean_BTGH,
            (self.q_depthwise.weight, self.q_depthwise.bias, self.q_grouped.weight, self.q_grouped.bias),
            (self.k_depthwise.weight, self.k_depthwise.bias, self.k_grouped.weight, self.k_grouped.bias),
            self.temperature, packing.positions_BT, packing.rope[self.kind], halos, self.delayed_rows, self.context.begin)
        return self.context.attend(q, k, v, packing.first_key_BT[self.kind], packing.offsets)
