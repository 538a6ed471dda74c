"""Learning rate as a pure function of the step, batch size of the rows consumed. Standard library only."""

from __future__ import annotations

import math

from zaya.config import OptimConfig, TrainConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step` (counted from 1) of `steps`: linear warm-up to lr, then cosine or wsd down to min_lr at the last."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    left = max(steps - step, 0)
    return optim.min_lr + (optim.lr - optim.min_lr) * min(left / optim.decay_steps, 1.0)


def batch_size(position: int, train: TrainConfig) -> int:
    """Rows of the optimizer step that begins when `position` rows of the run are consumed: train.batch_ramp's, which grows in steps of
    equal numbers of rows, then the full batch. Whatever the batches before were, so that a resumed run may change it."""
    sizes = train.batch_sizes()
    if len(sizes) == 1:
        return train.global_batch_size
    return sizes[min(position * (len(sizes) - 1) // train.batch_ramp[2], len(sizes) - 1)]


def position_of(step: int, train: TrainConfig) -> int:
    """Rows consumed before optimizer step `step` (counted from 1) of a run that had this recipe from its start."""
    sizes, position, left = train.batch_sizes(), 0, step - 1
    for index, size in enumerate(sizes[:-1], start=1):
        if not left:
            break
        grows_at = -(-index * train.batch_ramp[2] // (len(sizes) - 1))  # the first position with a larger batch
        steps = min(left, max(-(-(grows_at - position) // size), 0))
        position, left = position + steps * size, left - steps
    return position + left * train.global_batch_size
