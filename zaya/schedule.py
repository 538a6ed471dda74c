"""Learning rate as a pure function of the step. Standard library only; the trainer calls it once per step."""

from __future__ import annotations

import math

from zaya.config import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step` (counted from 1) of `steps`: linear warm-up to lr, then cosine or wsd down to min_lr at the last."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    left = max(steps - step, 0)
    return optim.min_lr + (optim.lr - optim.min_lr) * min(left / optim.decay_steps, 1.0)
