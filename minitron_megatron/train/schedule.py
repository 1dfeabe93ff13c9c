"""The learning rate as a function of the step alone, so that a resumed run has it right by construction.

   cosine, linear                 wsd (warm-up, stable, decay)

    lr ┤  ╱‾‾╲                     lr ┤  ╱‾‾‾‾‾‾‾‾‾‾╲
       │ ╱    ‾╲                      │ ╱            ╲        w: steps of warm-up
min_lr ┤╱       ‾‾             min_lr ┤╱              ╲       d: steps of the last decay
       └──┴───────┴                   └──┴─────────┴───┴
       0  w    steps                  0  w   steps−d  steps
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minitron_megatron.config import OptimConfig, warmup_of
from minitron_megatron.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Learning rates of the optimizer steps of a run.

    Attributes:
        optim: peak, minimum and kinds of decay.
        steps: of the run.
        warmup: steps of linear warm-up, from lr / warmup to lr.
        decay: steps of the last decay, for wsd.
    """

    optim: OptimConfig
    steps: int
    warmup: int
    decay: int

    @classmethod
    def of_run(cls, optim: OptimConfig, steps: int, tokens_per_step: int) -> "Schedule":
        """The schedule of a run of so many steps; options in tokens become whole steps, rounded up. Raises UserError."""
        if optim.min_lr > optim.lr:
            raise UserError(f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}")
        if optim.decay_steps is not None and optim.decay_tokens is not None:
            raise UserError("optim.decay_steps= and optim.decay_tokens= are both given: give one of them")
        warmup, decay = warmup_of(optim, steps), optim.decay_steps
        if optim.warmup_tokens is not None:
            warmup = math.ceil(optim.warmup_tokens / tokens_per_step)
        if optim.decay_tokens is not None:
            decay = math.ceil(optim.decay_tokens / tokens_per_step)
        if decay is None:
            decay = math.ceil(optim.decay_share * steps)
        if optim.schedule == "wsd" and warmup + decay > steps:
            raise UserError(
                f"warm-up of {warmup} and decay of {decay} steps are more than the run's {steps}: lower optim.warmup_steps= "
                "or optim.decay_steps="
            )
        return cls(optim, steps, warmup, decay)

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, from 0; the minimum is reached at the last one."""
        if step < self.warmup:
            return self.optim.lr * (step + 1) / self.warmup
        return self.optim.min_lr + (self.optim.lr - self.optim.min_lr) * self._share(step)

    def _share(self, step: int) -> float:
        """What is left of the way from the minimum to the peak, once warmed up.

        wsd: Hu et al., arXiv 2404.06395, section 4. Its decay as 1 − sqrt of time: Hägele et al., arXiv 2405.18392, section 3.
        """
        kind = self.optim.schedule
        if kind == "constant":
            return 1.0
        if kind == "wsd":
            done = max(0, step + 1 - (self.steps - self.decay)) / max(1, self.decay)
            return 1 - (math.sqrt(done) if self.optim.decay_shape == "1-sqrt" else done)
        done = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
        return (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done


def reached(options: Mapping[str, Any], steps: int, tokens_per_step: int) -> dict[str, float]:
    """What a run of so many steps reaches of its rates, by option: peak and last rate, steps of warm-up.

    `options` are those of a manifest, by their dotted names; of one with other options than today's nothing is known.
    """
    given = {
        name: options[f"optim.{name}"] for name in (f.name for f in fields(OptimConfig)) if f"optim.{name}" in options
    }
    if steps < 1 or not {"lr", "min_lr", "schedule"} <= set(given):
        return {}
    try:
        schedule = Schedule.of_run(OptimConfig(**given), steps, tokens_per_step)
    except UserError:
        return {}
    warmed = min(schedule.warmup, steps)
    rates = [schedule.learning_rate(step) for step in {max(0, warmed - 1), min(warmed, steps - 1), steps - 1}]
    last = schedule.learning_rate(steps - 1)
    return {"optim.lr": max(rates), "optim.min_lr": last, "optim.warmup_steps": warmed}
