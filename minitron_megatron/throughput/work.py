"""One model in one engine, in a process of its own: `python -m minitron_megatron.throughput.work REQUEST.json`.

    REQUEST.json ─▶ model loaded once ─▶ each batch size: warm-up, repeats ─▶ a JSON line on standard output, everything else on
                                                                              standard error

So a model's memory is given back before the next is measured, and what an engine brings (CUDA contexts, servers, exit handlers)
ends with it. Nothing is imported here but the standard library: vLLM may live in an environment without the rest.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        engine: megatron, transformers or vllm.
        folder: the model, in the form that the engine reads.
        vocab_size: prompts are drawn from so many tokens.
        batches: prompts at once, each size measured on its own.
        input_length, output_length: tokens of a prompt, and tokens that follow it: just so many, whatever they are.
        repeats, warmup: passes that are timed, and passes before them.
        dtype: what it computes in, as torch names it.
        device: cuda or cpu.
        parallel: the layout, as the options of `parallel.`
    """

    engine: str
    folder: str
    vocab_size: int
    batches: list[int]
    input_length: int
    output_length: int
    repeats: int
    warmup: int
    seed: int
    dtype: str
    device: str
    parallel: dict[str, Any] = field(default_factory=dict)

    def prompts(self, batch: int) -> list[list[int]]:
        """Random token ids [batch, input_length], the same ones for every engine."""
        draw = random.Random(self.seed)
        return [[draw.randrange(self.vocab_size) for _ in range(self.input_length)] for _ in range(batch)]


@dataclass(frozen=True)
class Engine:
    """A loaded model.

    Attributes:
        generate: answers prompts with `output_length` tokens each; gives how many tokens it made.
        memory_gib: most memory so far, and from here on where that can be counted anew; None where it would say nothing.
        wait: returns when the device has done its work.
        alone: whether no other process would wait for this one if it stopped.
    """

    generate: Callable[[list[list[int]]], int]
    memory_gib: Callable[[], float | None]
    wait: Callable[[], None] = lambda: None
    alone: bool = True


def measure(work: Work, engine: Engine, emit: Callable[[dict[str, Any]], None]) -> None:
    """Time every batch size and hand over a row for each; one that runs out of memory is a row that says so."""
    for batch in work.batches:
        try:
            seconds = _seconds(work, engine, batch)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError" or not engine.alone:
                raise
            emit({"batch": batch, "tokens_per_second": None, "error": "out of memory"})
            continue
        median = statistics.median(seconds)
        emit(
            {
                "batch": batch,
                "tokens_per_second": batch * work.output_length / median,
                "seconds": median,
                "seconds_of_repeats": seconds,
                "memory_gib": engine.memory_gib(),
            }
        )


def _seconds(work: Work, engine: Engine, batch: int) -> list[float]:
    prompts, found = work.prompts(batch), []
    for _ in range(work.warmup + work.repeats):
        engine.wait()
        began = time.perf_counter()
        made = engine.generate(prompts)
        engine.wait()
        found.append(time.perf_counter() - began)
        if made != batch * work.output_length:
            raise RuntimeError(f"{made} tokens were made of {batch} × {work.output_length}")
    return found[work.warmup :]


def main() -> None:
    """Measure what a request says."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    # Rows alone leave on standard output; engines print, too.
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    speaks = os.environ.get("RANK", "0") == "0"

    def emit(row: dict[str, Any]) -> None:
        if speaks:
            print(json.dumps(row), file=rows, flush=True)

    from minitron_megatron.throughput.engines import ENGINES

    ENGINES[work.engine](work, emit)


if __name__ == "__main__":
    main()
