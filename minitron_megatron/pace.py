"""How long the stages of a plan take on CPUs: what is measured in half a second, and what is counted.

    large products ─▶ operations a second     ┐
    small operations ─▶ seconds of one        ┼─▶ a step: arithmetic + small operations of its layers and of its optimizer
    import of torch ─▶ seconds of CPU         ┘   a stage: its program's start + its steps

A small model waits for Python and for torch's calls, a large one for its products: both are counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitron_megatron.chosen import Pair
from minitron_megatron.claims import number_of
from minitron_megatron.machine import usable_cores
from minitron_megatron.models.axes import flops_per_token
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.stages import START, START_OF_SEVERAL

# What whole passes make of the speed of one large product.
_EFFICIENCY = 0.5
# Each kind of work is timed for so long, and three times at least.
_SECONDS = 0.25
# What a layer's forward pass and its training cost for a micro-batch, and a step beside its micro-batches, in times of the small
# operation that is measured: fitted to the least step times of tiny models (docs/chains.md).
_LAYER, _LAYER_TRAINED, _STEP = 600, 1550, 4000


@dataclass(frozen=True)
class Pace:
    """What this machine does.

    Attributes:
        flops: operations a second of all processes together, in large products of a model's sizes.
        operation: seconds of one small operation.
        start: seconds of CPU time until torch is imported.
    """

    flops: float
    operation: float
    start: float


@dataclass(frozen=True)
class Work:
    """What the stages are to do.

    Attributes:
        length: tokens of a sample.
        calibration: samples of the importance.
        windows: of an evaluation.
        steps, batch: of the distillation, and samples of a step.
        micro, data: samples at once on each data-parallel rank, and such ranks.
        validated: samples of all validations together.
    """

    length: int
    calibration: int
    windows: int
    steps: int
    batch: int
    micro: int
    data: int
    validated: int


def measure(shape: ModelShape, dtype: str, processes: int, start: float) -> Pace:
    """This machine's pace with a model; `start` is what it took to import torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Pace(_flops(shape, dtype, processes), _operation(), start)
    finally:
        torch.set_num_threads(threads)


def _flops(shape: ModelShape, dtype: str, processes: int) -> float:
    """Operations a second of the stages in products of a model's sizes, as a training step has them: x·wᵀ, x·w and xᵀ·x.

    One thread is timed, by its least times: what else runs here only lengthens some. The cores that the stages have multiply it.
    """
    kind, ffn = getattr(torch, dtype), max(shape.ffn_of_layers)
    x, y = torch.ones(512, shape.hidden_size, dtype=kind), torch.ones(512, ffn, dtype=kind)
    w = torch.ones(ffn, shape.hidden_size, dtype=kind)

    def products() -> None:
        _ = x @ w.T, y @ w, y.T @ x

    cores = usable_cores()
    given = number_of("OMP_NUM_THREADS", 0)
    of_a_process = given if given > 0 else max(1, cores // processes)
    return 3 * 2 * 512 * shape.hidden_size * ffn / _least(products) * min(cores, processes * of_a_process)


def _operation(count: int = 64) -> float:
    """Seconds of a small operation: half of them forward, as many backward."""
    x, w = torch.ones(16, requires_grad=True), torch.ones(16)

    def chain() -> None:
        y = x
        for _ in range(count // 2):
            y = y * w
        y.sum().backward()

    return _least(chain) / count


def _least(work: Callable[[], None]) -> float:
    """The least time of some work. The first run makes what the others use again."""
    least, began, times = float("inf"), time.monotonic(), 0
    while times < 3 or time.monotonic() - began < _SECONDS:
        start = time.perf_counter()
        work()
        least, times = min(least, time.perf_counter() - start), times + 1
    return least


def seconds_to_start(start: float, processes: int) -> float:
    """Seconds until so many processes of a command compute, by those until torch is imported."""
    return start * (START_OF_SEVERAL if processes > 1 else START)


def seconds_of_stages(pair: Pair, work: Work, pace: Pace, processes: int) -> dict[str, float]:
    """Seconds of importance, distillation and evaluation, their programs' starts included.

    Args:
        pair: teacher and student.
        work: what is to be done.
        pace: of this machine.
        processes: of each stage.
    """
    teacher, student = pair.teacher, pair.student
    start = seconds_to_start(pace.start, processes)

    def passes(shape: ModelShape, samples: int, *, trained: bool = False) -> float:
        """Seconds of samples through a model."""
        flops = (3 if trained else 1) * flops_per_token(shape, work.length) * samples * work.length
        at_once, layers = (
            -(-samples // (work.micro * work.data)),
            shape.num_layers * (_LAYER_TRAINED if trained else _LAYER),
        )
        return flops / (_EFFICIENCY * pace.flops) + at_once * layers * pace.operation

    samples = work.steps * work.batch
    distill = passes(teacher, samples + work.validated) + passes(student, samples, trained=True)
    distill += passes(student, work.validated) + work.steps * _STEP * pace.operation
    return {
        "importance": start + passes(teacher, work.calibration),
        "distill": start + distill,
        "evaluate": start + passes(teacher, work.windows) + passes(student, work.windows),
    }
