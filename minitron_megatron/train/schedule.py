"""The learning rate as a function of the step alone, so that a resumed run has it right by construction."""

import math

from minitron_megatron.config import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up from lr / warmup_steps to lr, then cosine, linear or no decay to min_lr, reached at the last step.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps))
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * left
