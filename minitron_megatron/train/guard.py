"""The loss spike guard: a step whose loss or gradient norm is far off is not taken, and a run that only spikes is ended.

    step:  gradients ─▶ loss, gradient norm (the same on every rank) ─▶ guard ─▶ optimizer step, or nothing changes

A few bad steps, from broken documents or from an overflow, can undo days of training. PaLM restarted its runs before such
steps and left out their data (arXiv 2204.02311, section 5.1); here they are left out as they come.
"""

import math
import statistics
from typing import Any

from minitron_megatron.config import GuardConfig
from minitron_megatron.errors import Diverged

# A median of nearly nothing bounds nothing: a student that is its teacher has losses of rounding errors.
SMALLEST_MEDIAN = 1e-6


class SpikeGuard:
    """Judges each step by those that were taken before it. Its state is a checkpoint's: a resumed run judges alike."""

    def __init__(self, options: GuardConfig) -> None:
        self.options = options
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.skipped, self.in_a_row = 0, 0

    def takes(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether to take a step (from 0) of this mean loss and gradient norm. Raises Diverged after too many in a row."""
        options = self.options
        reason = self._spike("loss", loss, options.loss_factor, self.losses)
        reason = reason or self._spike("gradient norm", grad_norm, options.grad_norm_factor, self.grad_norms)
        if reason is None:
            self.in_a_row = 0
            self.losses = [*self.losses, loss][-options.window :]
            self.grad_norms = [*self.grad_norms, grad_norm][-options.window :]
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if not options.enabled or self.in_a_row >= options.stop_after:
            times = f", the {self.in_a_row}th step in a row that cannot be taken" if self.in_a_row > 1 else ""
            raise Diverged(f"step {step + 1}: {reason}{times}")
        return False

    def _spike(self, name: str, value: float, factor: float, before: list[float]) -> str | None:
        """Why a value is one that a step is not taken for."""
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if not self.options.enabled or not factor or len(before) < self.options.window:
            return None
        median = max(statistics.median(before), SMALLEST_MEDIAN)
        if value > factor * median:
            return f"the {name} is {value:.4g}, more than {factor:g} times its running median of {median:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        names = ("losses", "grad_norms", "skipped", "in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        vars(self).update(state)
