"""The ZAYA1 transformer: embed, num_layers x (attention, experts), final norm, tied head (arXiv 2511.17127, section 3).

On a batch's path: tokens and positions in, hidden states and routing counts out; `loss` turns hidden states into a sum of nats.
The residual stream is fp32 and is cast to the compute dtype only inside norms. Each residual join also computes the norm that follows it,
so a block receives its normed input and ends with the next block's. Knows one device and no other.

Letters: B batch, T tokens, D hidden, L blocks, C router classes, R router width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zaya.config import ModelConfig
from zaya.model.attention import Attention, Sequence
from zaya.model.layers import Embedding, ResidualScale, RMSNorm
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
        self.attention = Attention(config, config.attention_kind(index))
        self.attention_residual = ResidualScale(config.hidden_size)
        self.moe_norm = RMSNorm(config.hidden_size)
        self.moe = MoE(config, first=index == 0)
        self.moe_residual = ResidualScale(config.hidden_size)
        if recompute == "selective":
            self.attention.mix = _recomputed(self.attention.mix)
            self.moe.compute = _recomputed(self.moe.compute)

    def forward(self, stream_BTD: Tensor, x_BTD: Tensor, state_BTR: Tensor | None, sequence: Sequence,
                next_norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        branch_BTD = self.attention(x_BTD, sequence)
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
            self.blocks = nn.ModuleList([Block(config, index, recompute) for index in range(config.num_layers)])
            self.final_norm = RMSNorm(config.hidden_size)
        finally:
            torch.set_default_dtype(default)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Output:
        """tokens, positions (index inside the document; a document starts at every 0): (B, T) int64."""
        blocks = list(self.blocks)
        norms = [*(block.attention_norm for block in blocks), self.final_norm]
        sequence = Sequence.of(positions_BT, self.config, self.embedding.weight.dtype)
        stream_BTD = self.embedding(tokens_BT)
        x_BTD, state_BTR, counts = norms[0](stream_BTD), None, []
        for block, next_norm in zip(blocks, norms[1:]):
            run = _recomputed(block) if self.recompute == "full" else block
            stream_BTD, x_BTD, state_BTR, counts_C = run(stream_BTD, x_BTD, state_BTR, sequence, next_norm)
            counts.append(counts_C)
        return Output(x_BTD, torch.stack(counts))

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the next-token cross-entropy over labelled tokens, in nats, fp32 (fp64); labels of -100 count nothing."""
        return self.embedding.loss(hidden_BTD, labels_BT)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, V), for sampling and tests: training never holds them for a whole batch on a GPU."""
        return nn.functional.linear(hidden_BTD, self.embedding.weight)


def _recomputed(function):  # type: ignore[no-untyped-def]  # any signature in, the same out
    """`function`, whose inner activations backward computes again. There is no dropout, so no RNG state is kept."""

    def run(*args):  # type: ignore[no-untyped-def]
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run
