"""Update rules on plain tensors: Muon for matrices, and the AdamW that balances the router. (AdamW itself is an op, zaya/kernels.)

After backward on a batch's path. Which parameter gets which rule is the plan's business; who holds which part of it zaya/parallel's, which
calls these. Updates are two-phase: the trainer computes a verdict, and where `commit` is false nothing changes.

Muon (Jordan et al. 2024): Nesterov momentum as a moving average, Newton-Schulz in train dtype, update times 0.2 sqrt(max(rows, cols)),
decoupled decay. Momentum and decay are element-wise, so they work on any part of a matrix; orthogonalisation needs it whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zaya.kernels.backend import ops

MUON_SCALE = 0.2  # update RMS of AdamW (Liu et al. 2025, "Muon is scalable"): one learning rate serves both rules
MUON_BATCH = 1 << 27  # elements orthogonalised at once: 256 MiB in bf16, 32 matrices of 2048 x 2048 in one launch


def muon_direction(grad: Tensor, buffer: Tensor, *, momentum: float, commit: Tensor) -> Tensor:
    """What is to be orthogonalised, element by element; `buffer` takes the new moving average."""
    average = torch.lerp(buffer, grad, 1 - momentum)
    buffer.copy_(torch.where(commit, average, buffer))
    return torch.lerp(grad, average, momentum)


def muon_step(lr: float, matrix: tuple[int, int]) -> float:
    """Factor of the orthogonalised matrix in the update."""
    return -lr * MUON_SCALE * math.sqrt(max(matrix))


def orthogonalise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Newton-Schulz of every matrix, equal shapes in one batch of at most MUON_BATCH elements, but at least a matrix."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    updates = list(matrices)
    for shape, alike in by_shape.items():
        at_once = max(MUON_BATCH // shape.numel(), 1)
        for first in range(0, len(alike), at_once):
            batch = alike[first : first + at_once]
            for index, update in zip(batch, ops().newton_schulz(torch.stack([matrices[i] for i in batch]))):
                updates[index] = update
    return updates


class RouterBalance:
    """Moves the router's balance biases so that experts get equal shares: AdamW on the gradient p_e - 1/E of each block.

    p_e is expert e's share of the global batch among the real experts; the skip class is no expert and its bias stays. After each step
    a block's mean bias is taken off, so that the biases cannot drift against the skip class.
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # unpublished; starting values

    def __init__(self, biases: Sequence[Tensor], num_experts: int, lr: float) -> None:
        self.biases, self.num_experts, self.lr = list(biases), num_experts, lr
        self.exp_avg = torch.zeros(len(biases), num_experts, dtype=biases[0].dtype, device=biases[0].device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step = torch.zeros((), dtype=torch.float32, device=self.exp_avg.device)

    @torch.no_grad()
    def update(self, counts_LC: Tensor, commit: Tensor) -> None:
        """counts (L, C) int64: tokens of the global batch per block and router class."""
        bias_LE = torch.stack([bias[: self.num_experts] for bias in self.biases])
        excess_LE = self.shares(counts_LC) - 1 / self.num_experts
        ops().adamw_(bias_LE, excess_LE, self.exp_avg, self.exp_avg_sq, lr=self.lr, beta1=self.BETA1, beta2=self.BETA2, eps=self.EPS,
                     weight_decay=0.0, grad_scale=torch.ones_like(self.step), step=self.step, commit=commit)
        self.step += commit
        for bias, new in zip(self.biases, torch.where(commit, bias_LE - bias_LE.mean(-1, keepdim=True), bias_LE)):
            bias[: self.num_experts] = new

    def shares(self, counts_LC: Tensor) -> Tensor:
        """p_e (L, E), summing to 1 per block (to 0 where every token skipped)."""
        counts_LE = counts_LC[:, : self.num_experts].to(self.exp_avg.dtype)
        return counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)

    def tensors(self) -> dict[str, Tensor]:
        return {"optim.balance.exp_avg": self.exp_avg, "optim.balance.exp_avg_sq": self.exp_avg_sq, "optim.balance.step": self.step}
