"""What a training step sums over all ranks, and how the host learns of it without waiting for the update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """What all ranks together found in a step: parts of one small fp64 tensor, in which integers up to 2^53 are exact."""

    loss: Tensor
    labelled: Tensor
    """Tokens that count in the loss; 1 where none does."""
    squared_norm: Tensor
    """Of the summed loss' gradient."""
    votes: Tensor
    """(2,): how many ranks want to stop, and how many to save again."""
    counts_LC: Tensor

    @staticmethod
    def flat(loss: Tensor, labelled: Tensor, squared_norm: Tensor, votes: Tensor, counts_LC: Tensor) -> Tensor:
        """What `of` takes apart, once it is summed."""
        return torch.cat([torch.stack([loss, labelled, squared_norm]), votes, counts_LC.double().flatten()])

    @staticmethod
    def of(flat: Tensor, num_layers: int) -> Sums:
        return Sums(flat[0], flat[1].clamp_min(1), flat[2], flat[3:5], flat[5:].view(num_layers, -1))

    def grad_norm(self, dtype: torch.dtype) -> Tensor:
        """Of the mean loss."""
        return (self.squared_norm.sqrt() / self.labelled).to(dtype)

    def is_sound(self, dtype: torch.dtype) -> Tensor:
        return self.grad_norm(dtype).isfinite() & self.loss.isfinite()


class StepResult:
    """One optimizer step over the global batch, as the host sees it: its numbers are there before the update, and the first to read one
    waits for them alone. All tensors are on the CPU."""

    def __init__(self, flat: Tensor, num_layers: int, dtype: torch.dtype, shares: Callable[[Tensor], Tensor]) -> None:
        self._num_layers, self._dtype, self._shares = num_layers, dtype, shares
        self._flat, self._arrived = flat, None
        if flat.is_cuda:
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @functools.cached_property
    def _sums(self) -> Sums:
        if self._arrived is not None:
            self._arrived.synchronize()
        return Sums.of(self._flat, self._num_layers)

    @property
    def loss(self) -> Tensor:
        """Mean nats per labelled token, before the update."""
        return self._sums.loss / self._sums.labelled

    @property
    def grad_norm(self) -> Tensor:
        """Of the mean loss, before clipping."""
        return self._sums.grad_norm(self._dtype)

    @property
    def committed(self) -> Tensor:
        """False where loss or gradient was not finite and nothing was updated."""
        return self._sums.is_sound(self._dtype)

    @property
    def shares_LE(self) -> Tensor:
        """p_e per block, over the real experts."""
        return self._shares(self._sums.counts_LC)

    @property
    def votes(self) -> Tensor:
        """What the ranks passed to the step as votes, summed."""
        return self._sums.votes
