"""How fast this machine is at what the demo does, as one of its processes sees it: `python -m minitron_megatron.demo_speed`.

As many of these run at once as the demo has processes, so that each sees what the others leave it. It prints one line of JSON,
the fields of `Speed`.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

# Tokens, inputs and outputs of a linear layer of the demo, and words of its vocabulary in a block of the loss (models/head.py).
TOKENS, INPUTS, OUTPUTS, WORDS, ROWS = 512, 576, 1536, 49152, 8
# Each kind of work is repeated for so long, and once at least.
SECONDS = 0.6


@dataclass(frozen=True)
class Speed:
    """What one process reaches.

    Attributes:
        processor: its name, and what the environment changes about it.
        dtype: what models are computed in (parallel/precision.py).
        gflops: forward and backward products of a linear layer, GFLOP/s.
        elements: elements of the vocabulary that a loss does a second, in millions.
        start: seconds of CPU time until torch is imported. (A disk that is read for the first time would count for all stages.)
    """

    processor: str
    dtype: str
    gflops: float
    elements: float
    start: float


def measure() -> Speed:
    """Measure this process's speed, just after its start."""
    import torch

    from minitron_megatron.claims import number_of
    from minitron_megatron.parallel.precision import of_this_machine, processor

    start = time.process_time()
    torch.set_num_threads(max(1, number_of("OMP_NUM_THREADS", 1)))
    dtype = of_this_machine().value
    draw = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(generator=draw).to(getattr(torch, dtype))

    x, w, g = drawn(TOKENS, INPUTS), drawn(OUTPUTS, INPUTS), drawn(TOKENS, OUTPUTS)
    student, teacher = drawn(ROWS, WORDS), drawn(ROWS, WORDS)

    def layer() -> None:
        x @ w.t(), g @ w, g.t() @ x

    def loss() -> None:
        log_q, log_p = (torch.log_softmax(logits.float(), -1) for logits in (student, teacher))
        p = log_p.exp()
        log_p.sub_(log_q).mul_(p).sum(-1)
        student.copy_(log_q.exp_().sub_(p))

    return Speed(
        processor()[0],
        dtype,
        gflops=3 * 2 * TOKENS * INPUTS * OUTPUTS * _times_a_second(layer) / 1e9,
        elements=ROWS * WORDS * _times_a_second(loss) / 1e6,
        start=start,
    )


def _times_a_second(work: Callable[[], None]) -> float:
    """By the median time of one: what comes between for a moment, such as the other processes' start, does not count."""
    work()
    took: list[float] = []
    while not took or sum(took) < SECONDS:
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return 1 / statistics.median(took)


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))
