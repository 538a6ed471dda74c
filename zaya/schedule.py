"""Learning rate as a pure function of the step, batch size of the rows consumed. Standard library only; the trainer asks once per step."""

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
    if not train.batch_ramp:
        return train.global_batch_size
    start, increment, rows = train.batch_ramp
    increments = (train.global_batch_size - start) // increment
    return start + increment * min(position * increments // rows, increments)


def position_of(step: int, train: TrainConfig) -> int:
    """Rows consumed before optimizer step `step` (counted from 1) of a run that had this recipe from its start."""
    position, left = 0, step - 1
    while left and (size := batch_size(position, train)) < train.global_batch_size:
        start, increment, rows = train.batch_ramp
        increments = (train.global_batch_size - start) // increment
        grows_at = -(-((size - start) // increment + 1) * rows // increments)  # the first position with a larger batch
        steps = min(left, -(-(grows_at - position) // size))
        position, left = position + steps * size, left - steps
    return position + left * train.global_batch_size
