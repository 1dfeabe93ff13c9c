"""What the demo does on this machine so that it ends in time: measured speeds to a plan, by arithmetic.

    demo_speed.py, one beside another ──▶ Machine ──▶ seconds of each stage, by level ──▶ Plan: the level, and as many steps
                                                                                          as fit, between its least and most

A slower machine gets fewer tokens, or as many; in LEAN it also measures on fewer samples and cuts to a shape that learns at less
cost. A plan never takes longer than asked. Constants are CPU seconds of two kinds of processor (docs/benchmarks.md).
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minitron_megatron.cli.spelling import called
from minitron_megatron.demo_speed import WORDS, Speed
from minitron_megatron.errors import UserError
from minitron_megatron.first_moments import STATUS_OF_SIGNAL
from minitron_megatron.machine import free_gib, usable_cores
from minitron_megatron.plain_files import parse_json
from minitron_megatron.stages import START, START_OF_LIGHT, START_OF_SEVERAL

# Of the minutes that are asked for, what is planned: the rest is for what the estimate does not see, and for making .venv.
SHARE = 0.8
# What a plan may still become once stages were slower than it said: less is cut only for what is later than that.
SHARE_WHEN_LATE = 0.9
# Parameters that take part in a token's products: of the teacher, and of the students, which are within 2 % of one another.
TEACHER, STUDENT = 134.5e6, 79.2e6
# A distillation validates on one in so many of the samples that an evaluation has.
VALIDATED_SHARE = 4
# Resident at the peak of a distillation by one process in float32: 3.5 GiB; of two, each has half of the optimizer.
GIB_OF_A_PROCESS = 3.7

# Share of the measured rate that whole passes reach: smaller products, norms and attention are between the large ones.
REACHED = {"float32": 0.6, "bfloat16": 0.5}
# What the logits of a token cost in training, with metrics, and in an evaluation, in times of demo_speed's loss over them.
LOSSES_OF_A_STEP, LOSSES_OF_AN_EVALUATION = 4.0, 2.2
# The sums over a token's activations in an importance run, likewise.
LOSSES_OF_IMPORTANCE = 1.0
# What a step does to each parameter once: gradients are zeroed, summed over processes, and taken; in elements of that loss.
ELEMENTS_OF_A_PARAMETER = 3.0
# Unpacking the model, completions by transformers, and what a fresh environment compiles once, likewise.
UNPACKING, COMPLETIONS, FIRST_START = 5.0, 5.0, 6.0


@dataclass(frozen=True)
class Level:
    """How much the demo does beside its steps, and how many of those.

    Attributes:
        name: for people.
        least, most: steps; fewer show too little, more lower the perplexity too little for their time.
        calibration_samples: of the importance.
        validation_samples: of an evaluation.
        search: options of the search: which shapes.
        sequence_length: tokens of every sample.
        batch: samples of a step.
    """

    name: str
    least: int
    most: int
    calibration_samples: int
    validation_samples: int
    search: tuple[str, ...]
    sequence_length: int = 256
    batch: int = 4

    @property
    def tokens_of_a_step(self) -> int:
        """Tokens."""
        return self.batch * self.sequence_length


# At least 40 % of the parameters of SmolLM2-135M go; sizes that its 9 heads of 64 channels, in 3 groups, go with. A short
# distillation learns best with the residual stream whole (docs/benchmarks.md). Of those shapes, 23 layers end at the lowest
# perplexity; 20 take less time and lose more by the cut, so a few steps show more.
_SPACE = ("budget.parameters=80.7e6", "space.multiple=48", "space.tensor=3", "space.hidden_size=[576]")
FULL = Level("whole", 24, 60, 64, 64, (*_SPACE, "space.num_layers=[20,23,26,30]"), batch=8)
LEAN = Level("lean", 8, 48, 16, 16, (*_SPACE, "space.num_layers=[20]"))
SHORT = Level("short", 6, 6, 8, 8, (*_SPACE, "space.num_layers=[20,23]"), sequence_length=128)
LEVELS = {level.name: level for level in (FULL, LEAN, SHORT)}


@dataclass(frozen=True)
class Machine:
    """What the demo runs on: usable cores, free memory, and what each of its processes reaches beside the others."""

    cores: int
    memory_gib: float
    processes: int
    speed: Speed

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' * (self.cores > 1)}"
        of = f"{self.speed.gflops:,.0f} GFLOP/s a process in {self.speed.dtype}"
        return f"{self.speed.processor}, {cores}, {self.memory_gib:.0f} GiB free, {of}"


@dataclass(frozen=True)
class Plan:
    """What the demo is going to do, and how long that takes.

    Attributes:
        level: name of its Level.
        steps: of the distillation.
        processes: of the stages that have several.
        seconds: estimate of each stage, by its name.
        machine: what it was made for, in words.
    """

    level: str
    steps: int
    processes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    machine: str = ""

    @property
    def of(self) -> Level:
        """The level."""
        return LEVELS[self.level]

    @property
    def tokens(self) -> int:
        """Tokens of the distillation."""
        return self.steps * self.of.tokens_of_a_step

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @classmethod
    def from_json(cls, values: Any) -> "Plan":
        """The plan that `asdict` made. Raises ValueError when it is none."""
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names or values["level"] not in LEVELS:
            raise ValueError("no plan")
        return cls(**values)

    def fewer(self, slower: float, spent: float, minutes: float) -> "Plan":
        """The plan once stages have taken `slower` times their estimate: with fewer steps where it would take too long.

        Args:
            slower: as long as estimated is 1; a quicker machine than estimated gets no more steps.
            spent: seconds so far.
            minutes: of the whole demo.
        """
        if slower <= 1:
            return self
        later = [
            n for n in self.seconds if n == "distill" or n.startswith(("evaluate", "export", "completions", "report"))
        ]
        seconds = {n: s * (slower if n in later else 1.0) for n, s in self.seconds.items()}
        of_others = spent + sum(seconds[n] for n in later if n != "distill")
        of_a_step = seconds["distill"] / (self.steps + _STEPS_OF_START)
        fit = math.floor((60 * minutes * SHARE_WHEN_LATE - of_others) / of_a_step - _STEPS_OF_START)
        steps = max(min(self.of.least, self.steps), min(self.steps, fit))
        seconds["distill"] = of_a_step * (steps + _STEPS_OF_START)
        return Plan(self.level, steps, self.processes, seconds, self.machine)


# Starting, saving and the last validation of a distillation are worth about so many of its steps; for `fewer` alone.
_STEPS_OF_START = 4


def make_plan(machine: Machine, minutes: float, *, short: bool = False) -> Plan:
    """The most that fits into `minutes`. Raises UserError where nothing does, saying what would."""
    if short:
        return _plan(machine, SHORT, SHORT.least)
    for level in (FULL, LEAN):
        least, most = (_plan(machine, level, steps) for steps in (level.least, level.most))
        left = 60 * minutes * SHARE - least.total
        if left >= 0:
            of_a_step = (most.total - least.total) / (level.most - level.least)
            steps = min(level.most, level.least + math.floor(left / of_a_step))
            return _plan(machine, level, steps)
    needed = math.ceil(least.total / SHARE / 60)
    name = called("demo")
    # The Makefile is beside launch/.
    how = (
        f"make demo MINUTES={needed} ({name} minutes={needed})" if name.endswith(".py") else f"{name} minutes={needed}"
    )
    raise UserError(
        f"the demo would take about {needed} minutes on this machine as it is now ({machine}), doing the least that shows "
        f"something: end what else runs here, or allow them with {how}"
    )


def _plan(machine: Machine, level: Level, steps: int) -> Plan:
    return Plan(level.name, steps, machine.processes, estimate(machine, level, steps), str(machine))


def estimate(machine: Machine, level: Level, steps: int) -> dict[str, float]:
    """Seconds of each stage."""
    speed, processes = machine.speed, machine.processes
    start = speed.start * START
    started = speed.start * (START_OF_SEVERAL if processes > 1 else START)
    calibrated, judged = (n * level.sequence_length for n in (level.calibration_samples, level.validation_samples))

    def products(tokens: float, parameters: float) -> float:
        """Forward passes."""
        return 2 * parameters * tokens / (speed.gflops * 1e9 * processes * REACHED[speed.dtype])

    def losses(tokens: float) -> float:
        return tokens * WORDS / (speed.elements * 1e6 * processes)

    tokens = steps * level.tokens_of_a_step
    optimizer = steps * STUDENT * ELEMENTS_OF_A_PARAMETER / (speed.elements * 1e6 * processes)
    distill = products(tokens, TEACHER + 3 * STUDENT) + losses(tokens * LOSSES_OF_A_STEP) + optimizer
    of_validation = judged / VALIDATED_SHARE
    validated = products(of_validation, TEACHER + STUDENT) + losses(of_validation * LOSSES_OF_A_STEP)
    of_evaluation = losses(judged * LOSSES_OF_AN_EVALUATION)
    seconds = {
        "source": start + (UNPACKING + FIRST_START) * speed.start,
        "import": start,
        "data": start,
        "importance": started + products(calibrated, TEACHER) + losses(calibrated * LOSSES_OF_IMPORTANCE),
        "search": START_OF_LIGHT * speed.start,
        "prune": started,
        "distill": started + distill + validated + start,
        "evaluate pruned": started + products(judged, STUDENT) + of_evaluation,
        "evaluate distilled": started + products(judged, TEACHER + STUDENT) + 3 * of_evaluation,
        "export pruned": start,
        "export distilled": start,
        "completions": COMPLETIONS * speed.start,
        "report": start,
    }
    return {name: round(value, 1) for name, value in seconds.items()}


def measure_machine() -> Machine:
    """Measure as many processes at once as the demo has: two, or one on one core or in little memory; the slowest counts.

    Raises UserError where there is too little memory for one.
    """
    cores, memory = usable_cores(), free_gib()
    if memory < GIB_OF_A_PROCESS:
        raise UserError(
            f"the demo needs {GIB_OF_A_PROCESS} GiB of free memory, and {memory:.1f} GiB are free here: end what else runs, or "
            "raise the limit of this container or job"
        )
    processes = 2 if cores > 1 and memory >= 2 * GIB_OF_A_PROCESS else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))}
    command = [sys.executable, "-m", "minitron_megatron.demo_speed"]
    started: list[subprocess.Popen] = []
    try:
        for _ in range(processes):
            # Ctrl-C is for this process, which ends them: all that it has started, whenever it comes.
            signal.pthread_sigmask(signal.SIG_BLOCK, STATUS_OF_SIGNAL)
            try:
                started.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
                    )
                )
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS_OF_SIGNAL)
        printed = [child.communicate()[0] for child in started]
    finally:
        for child in started:
            child.kill()  # nothing, once it has ended
            child.wait()
    if any(child.returncode for child in started):
        raise UserError(
            "this machine's speed could not be measured (python -m minitron_megatron.demo_speed): see above"
        )
    found = [Speed(**parse_json(lines.splitlines()[-1])) for lines in printed]
    slowest = Speed(
        found[0].processor,
        found[0].dtype,
        min(speed.gflops for speed in found),
        min(speed.elements for speed in found),
        max(speed.start for speed in found),
    )
    return Machine(cores, memory, processes, slowest)
