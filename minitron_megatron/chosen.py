"""What launch/compress.py chooses by, and what it has chosen, as plain data (choosing.py chooses)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.models.shape import ModelShape


@dataclass(frozen=True)
class Text:
    """Tokens that there are to train and to validate on; counted, or estimated from the size of the text."""

    train: int
    validation: int
    exact: bool


@dataclass
class Choices:
    """Options by stage, the lines of the plan (what, its value, why), and how long stages are to take, in seconds."""

    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's options: what was given goes over what was chosen."""
        chosen = dict(self.options.get(stage, {}))
        for one, other in (("trainer.steps", "trainer.tokens"), ("optim.warmup_steps", "optim.warmup_tokens")):
            if other in given:
                chosen.pop(one, None)
        return {**chosen, **given}


@dataclass(frozen=True)
class Pair:
    """Who teaches whom."""

    teacher: ModelShape
    student: ModelShape
