"""The ZAYA1 transformer: embed, num_layers x (attention, experts), final norm, tied head (arXiv 2511.17127, section 3).

On a batch's path: tokens and positions in, hidden states and routing counts out; `loss` turns hidden states into a sum of nats.
The residual stream is fp32 and is cast to the compute dtype only inside norms. Each residual join also computes the norm that follows it,
so a block receives its normed input and ends with the next block's. Knows one device and no other.

Letters: B batch, T tokens, D hidden, L blocks, C router classes, R router width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zaya.config import ModelConfig
from zaya.model.attention import Attention, Packing
from zaya.model.layers import Embedding, ResidualScale, RMSNorm, recomputed
from zaya.model.moe import MoE


class Output(NamedTuple):
    hidden_BTD: Tensor
    """After the final norm, in compute dtype."""
    counts_LC: Tensor
    """Tokens of this batch per block and router class, int64; recomputation does not count again."""


class Block(nn.Module):
    """Attention, then experts; `recompute` says what backward computes again instead of keeping: "none", "selective" or "full"."""

    def __init__(self, config: ModelConfig, index: int, recompute: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size)
        selective = recompute == "selective"
        self.attention = Attention(config, config.attention_kind(index), recompute=selective)
        self.attention_residual = ResidualScale(config.hidden_size)
        self.moe_norm = RMSNorm(config.hidden_size)
        self.moe = MoE(config, first=index == 0, recompute=selective)
        self.moe_residual = ResidualScale(config.hidden_size)

    def forward(self, stream_BTD: Tensor, x_BTD: Tensor, state_BTR: Tensor | None, packing: Packing,
                next_norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        branch_BTD = self.attention(x_BTD, packing)
        stream_BTD, x_BTD = self.attention_residual(stream_BTD, branch_BTD, self.moe_norm)
        branch_BTD, state_BTR, counts_C = self.moe(x_BTD, state_BTR)
        stream_BTD, x_BTD = self.moe_residual(stream_BTD, branch_BTD, next_norm)
        return stream_BTD, x_BTD, state_BTR, counts_C


class Zaya(nn.Module):
    """Parameters are made in `dtype` on the default device, uninitialised: zaya/model/init.py or a checkpoint fills them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, recompute: str = "none") -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
            blocks = nn.ModuleList([Block(config, index, recompute) for index in range(config.num_layers)])
            self.blocks: Sequence[Block] = blocks  # type: ignore[assignment]  # ModuleList does not say what it holds
            self.final_norm = RMSNorm(config.hidden_size)
        finally:
            torch.set_default_dtype(default)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Output:
        """tokens, positions (index inside the document; a document starts at every 0): (B, T) int64."""
        norms = [*(block.attention_norm for block in self.blocks), self.final_norm]
        offsets = self.blocks[0].attention.context.offsets(positions_BT.shape[1])
        packing = Packing.of(positions_BT, self.config, self.final_norm.weight.dtype, offsets)
        stream_BTD = self.embedding(tokens_BT)
        x_BTD, state_BTR, counts = norms[0](stream_BTD), None, []
        for block, next_norm in zip(self.blocks, norms[1:]):
            run = recomputed(block) if self.recompute == "full" else block
            stream_BTD, x_BTD, state_BTR, counts_C = run(stream_BTD, x_BTD, state_BTR, packing, next_norm)
            counts.append(counts_C)
        return Output(x_BTD, torch.stack(counts))

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the next-token cross-entropy over labelled tokens, in nats, fp32 (fp64); labels of -100 count nothing."""
        return self.embedding.loss(hidden_BTD, labels_BT)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, V), for sampling and tests: training never holds them for a whole batch."""
        return nn.functional.linear(hidden_BTD, self.embedding.weight)
