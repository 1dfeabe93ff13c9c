"""What `launch/compress.py` chooses where it is given a budget or a target and no rounds: options by stage, and why, to be shown.

    sizes of model and student, tokens of the text, the machine  ──▶  length, samples, layout, batch, steps, learning rate

Everything here is arithmetic over sizes, but for a quarter of a second in which a CPU's products are timed. Options that were
given stay as they are, and the others follow from them.
"""

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from minitron_megatron.chosen import Choices, Pair, Text
from minitron_megatron.config import CompressConfig, DistillConfig, ParallelConfig, TrainerConfig, TrainingDataConfig
from minitron_megatron.errors import UserError
from minitron_megatron.machine import usable_cores
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.build import model_dtype
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import asks_machine, of_this_machine
from minitron_megatron.train.distill_checks import check_pair
from minitron_megatron.train.foresee import TENSOR_SIZES, Forecast, Models, forecast

# Tokens of a sample at the most, calibration samples, windows of an evaluation.
_LENGTH = {"cuda": 4096, "cpu": 512}
_SAMPLES = {"cuda": 1024, "cpu": 128}
_WINDOWS = {"cuda": 1024, "cpu": 64}
# Shorter samples are taken until calibration and an epoch have so many of them.
_FEWEST_SAMPLES, _SHORTEST = 64, 32
# The published runs took 94 to 100 billion tokens (arXiv 2407.14679, 2408.11796).
MOST_TOKENS = 100e9
# A corpus that is read up to four times is worth nearly as much as four times the text (arXiv 2305.16264).
_EPOCHS = 4
# Optimizer steps that a run has at least where the text is long enough, and samples of one at most: the published batch.
_STEPS, _LARGEST_BATCH, _SMALLEST_BATCH = 400, 1152, 8
# Peak learning rates by the parameters of the student: the published one from 2 B on, higher ones for small models.
_RATES = ((100e6, 1e-3), (500e6, 5e-4), (2e9, 2e-4), (float("inf"), 1e-4))
_MICRO_BATCHES = (8, 4, 2, 1)
# What a training step makes of the speed of one large product on a CPU.
_CPU_EFFICIENCY = 0.5
# Products are timed for so long.
_SECONDS = 0.25


def choose_length(cfg: CompressConfig, shape: ModelShape, text: Text | None, device: str) -> tuple[int, str]:
    """Tokens of a sample, and why so many."""
    if cfg.data.sequence_length is not None:
        return cfg.data.sequence_length, "as given"
    most, positions = _LENGTH[device], shape.max_position_embeddings
    machine = "GPUs" if device == "cuda" else "CPUs"
    length, why = (positions, "as many as the model takes") if positions <= most else (most, f"at most, on {machine}")
    while text and length > _SHORTEST and (text.train < _FEWEST_SAMPLES * length or text.validation <= length):
        length, why = length // 2, f"so that the text has {_FEWEST_SAMPLES} samples"
    return max(1, length - length % 16 if length > 16 else length), why


def choose(
    cfg: CompressConfig, pair: Pair, text: Text | None, device: str, given: Mapping[str, Mapping[str, Any]]
) -> Choices:
    """Every option that was not given. Raises UserError where no layout of the processes holds both models.

    Args:
        cfg: the command, its processes and data.sequence_length settled.
        pair: the models of the distillation.
        text: what there is to read; None in a rehearsal without any.
        device: "cuda" or "cpu", that the stages run on.
        given: options of each stage that were given.
    """
    length, found = cfg.data.sequence_length, Choices()
    there = text.train if text else int(MOST_TOKENS)
    samples = max(1, min(_SAMPLES[device], there // length))
    found.lines.append(("calibration", f"{samples:,} samples", f"of {length:,} tokens, for the importance scores"))
    own = given["distill"]
    steps, batch, of_distill = _steps(cfg, own, length, there)
    layout, micro, foreseen = choose_layout(cfg, pair, length, batch, device, own)
    data = layout.data
    if "trainer.global_batch_size" not in own:
        batch = max(1, round(batch / (micro * data))) * micro * data
        steps = _steps_of(own, of_distill, batch * length)
    if text:
        read, most = steps * batch * length / max(1, there), _most_epochs(cfg)
        found.lines.append(
            ("epochs", f"{read:.2g}", f"times that the text is read to train on, of {most:g} (data.max_epochs=)")
        )
    found.lines.append(("distillation", f"{steps:,} steps", f"of {batch:,} samples, {steps * batch * length:,} tokens"))
    found.lines.append(("precision", *precision_of(cfg, pair.student, device)))
    found.lines.append(_line_of_layout(cfg, layout, micro, foreseen))
    rate = _rate(pair.student)
    warmup = max(1, min(40, steps // 20))
    found.lines.append(
        ("learning rate", f"{own.get('optim.lr', rate):g}", f"to a tenth of it, after {warmup} steps of warm-up")
    )
    every = max(1, min(100, steps // 5))
    parallel = {f"parallel.{name}": getattr(layout, name) for name in ("tensor", "sequence") if layout.tensor > 1}
    at_once = {**parallel, "trainer.micro_batch_size": micro}
    found.options = {
        "importance": {**at_once, "samples": samples},
        "prune": {},
        "distill": {
            **at_once,
            "trainer.steps": steps,
            "trainer.global_batch_size": batch,
            "trainer.save_interval": every,
            "trainer.validation_interval": every,
            "data.max_epochs": _most_epochs(cfg),
            "optim.lr": rate,
            "optim.min_lr": own.get("optim.lr", rate) / 10,
            "optim.warmup_steps": warmup,
            **({"trainer.recompute": "full"} if foreseen and foreseen.plan.how.recompute == "full" else {}),
        },
        "evaluate": {**at_once, "samples": _WINDOWS[device]},
    }
    if device == "cpu":
        found.lines.append(_line_of_memory(cfg, pair, layout))
    found.lines.append(_seconds(cfg, pair, length, samples, steps * batch * length, device, foreseen))
    return found


def _steps(cfg: CompressConfig, own: Mapping[str, Any], length: int, there: int) -> tuple[int, int, int]:
    """Steps, samples of one, and tokens of the run: as given, or by the size of the text."""
    tokens = int(min(MOST_TOKENS, there * _most_epochs(cfg)))
    batch = own.get("trainer.global_batch_size")
    if own.get("trainer.steps") is not None:
        steps = own["trainer.steps"]
        batch = batch or max(1, min(_LARGEST_BATCH, max(_SMALLEST_BATCH, tokens // max(1, _STEPS * length))))
        return steps, batch, steps * batch * length
    if own.get("trainer.tokens") is not None:
        tokens = int(float(own["trainer.tokens"]))
    batch = batch or min(_LARGEST_BATCH, max(_SMALLEST_BATCH, tokens // (_STEPS * length)))
    return _steps_of(own, tokens, batch * length), batch, tokens


def _steps_of(own: Mapping[str, Any], tokens: int, of_a_step: int) -> int:
    """Steps of so many tokens: as given; as the run counts given tokens; or so that no more are read than there are."""
    if own.get("trainer.steps") is not None:
        return own["trainer.steps"]
    return math.ceil(tokens / of_a_step) if own.get("trainer.tokens") is not None else max(1, tokens // of_a_step)


def _most_epochs(cfg: CompressConfig) -> float:
    return _EPOCHS if cfg.data.max_epochs is None else cfg.data.max_epochs


def _rate(student: ModelShape) -> float:
    parameters = count_parameters(student)
    return next(rate for most, rate in _RATES if parameters <= most)


def choose_layout(
    cfg: CompressConfig, pair: Pair, length: int, batch: int, device: str, own: Mapping[str, Any]
) -> tuple[Layout, int, Forecast | None]:
    """Layout, micro-batch and, on GPUs, what they take: the fastest that fits by the arithmetic of a dry run.

    Raises UserError where nothing fits.
    """
    processes, micro = cfg.processes, own.get("trainer.micro_batch_size")
    given = ParallelConfig()
    asked = cfg.parallel != given
    if device == "cpu":
        layout = Layout.from_config(cfg.parallel, processes)
        exact = "trainer.global_batch_size" in own
        fits = next(
            (n for n in _MICRO_BATCHES[1:] if batch >= n * layout.data and not (exact and batch % (n * layout.data))), 1
        )
        return layout, micro or fits, None
    layouts = (
        [Layout.from_config(cfg.parallel, processes)]
        if asked
        else [
            Layout(tensor=n, sequence=n > 1 and length % n == 0, world_size=processes)
            for n in TENSOR_SIZES
            if processes % n == 0
        ]
    )
    found: list[Forecast] = []
    for recompute in ("none", "full"):
        for layout in layouts:
            for one in [micro] if micro else _MICRO_BATCHES:
                if foreseen := _foreseen(cfg, pair, layout, length, batch, one, recompute):
                    found.append(foreseen)
        if fitting := [one for one in found if one.fits]:
            best = max(fitting, key=lambda one: one.tokens_per_second)
            return best.plan.layout, best.plan.batch.samples, best
    if not found:
        Layout.from_config(cfg.parallel, processes)
        raise UserError(
            f"no layout of processes={processes} divides teacher and student: give parallel.tensor= and its like"
        )
    least = min(found, key=lambda one: one.gib)
    raise UserError(
        f"teacher and student do not fit on processes={processes} of {least.gpu.gpu}: {least.gib:.0f} GiB a GPU in the best "
        f"layout, of {least.gpu.memory_gib:g}: use more processes, on more nodes by slurm/compress.sh"
    )


def _foreseen(
    cfg: CompressConfig, pair: Pair, layout: Layout, length: int, batch: int, micro: int, recompute: str
) -> Forecast | None:
    """What a layout takes; None where it cannot run the job."""
    at_once = micro * layout.data
    job = DistillConfig(
        output="",
        precision=cfg.precision,
        data=TrainingDataConfig(path="", sequence_length=length),
        trainer=TrainerConfig(
            steps=1,
            global_batch_size=max(1, round(batch / at_once)) * at_once,
            micro_batch_size=micro,
            recompute=recompute,
        ),
        cluster=cfg.cluster,
    )
    try:
        check_pair(pair.teacher, pair.student, job, layout)
    except UserError:
        return None
    return forecast(job, layout, Models(pair.student, "auto", pair.teacher, "auto", lambda of_student: of_student))


def _line_of_layout(cfg: CompressConfig, layout: Layout, micro: int, foreseen: Forecast | None) -> tuple[str, str, str]:
    memory = f", {foreseen.gib:.0f} of {foreseen.gpu.memory_gib:g} GiB of a {foreseen.gpu.gpu}" if foreseen else ""
    processes = f"{layout.world_size} processes" if layout.world_size > 1 else "one process"
    return "layout", str(layout), f"{processes}, micro-batches of {micro}{memory}"


def _line_of_memory(cfg: CompressConfig, pair: Pair, layout: Layout) -> tuple[str, str, str]:
    """What the distillation keeps in a machine's memory, on CPUs. Raises UserError where there is not as much."""
    item = getattr(torch, precision_of(cfg, pair.student, "cpu")[0]).itemsize
    teacher, student = count_parameters(pair.teacher), count_parameters(pair.student)
    # Data-parallel ranks have all weights and float32 gradients each, and share out master weights and both moments.
    need = layout.data * (item * teacher + (item + 4) * student) + 12 * student
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"{need / 2**30:,.1f} GiB"
    if need > there:
        raise UserError(
            f"teacher and student take {what} on CPUs (weights, gradients, optimizer), this machine has "
            f"{there / 2**30:,.0f} GiB: use a larger machine or one with GPUs, or fewer processes="
        )
    return "memory", what, f"of weights, gradients and optimizer, of {there / 2**30:,.0f} GiB here"


def _seconds(
    cfg: CompressConfig,
    pair: Pair,
    length: int,
    samples: int,
    tokens: int,
    device: str,
    foreseen: Forecast | None,
) -> tuple[str, str, str]:
    """How long importance and distillation take, and what that is worked out from."""
    forward = flops_per_token(pair.teacher, length)
    step = 3 * flops_per_token(pair.student, length) + forward
    if foreseen:
        rate, how = (
            foreseen.tokens_per_second * step,
            f"{foreseen.tokens_per_second:,.0f} tokens/s, by arithmetic (docs/cluster.md)",
        )
    else:
        rate = _CPU_EFFICIENCY * cpu_flops(pair.student, precision_of(cfg, pair.student, device)[0], cfg.processes)
        how = f"{rate / step:,.0f} tokens/s, from products measured here"
    return "time", words_of(samples * length * forward / rate + tokens * step / rate), f"of arithmetic: {how}"


def words_of(seconds: float) -> str:
    """A time that is only roughly known."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(1, seconds):.0f} s"


def precision_of(cfg: CompressConfig, shape: ModelShape, device: str) -> tuple[str, str]:
    """What models compute in, and why."""
    if cfg.precision != "auto":
        return str(model_dtype(shape, cfg.precision)).removeprefix("torch."), "as given"
    if device == "cpu" and asks_machine(cfg.precision, shape.dtype):
        choice = of_this_machine()
        return choice.dtype, choice.why
    return shape.dtype, "as the model is stored"


def cpu_flops(shape: ModelShape, precision: str, processes: int) -> float:
    """Operations a second of the stages in products of a model's sizes, as a training step has them: x·wᵀ, x·w and xᵀ·x.

    One thread is timed, by its least times: what else runs here only lengthens some. The cores that the stages have multiply it.
    """
    dtype, cores = getattr(torch, precision), usable_cores()
    ffn = max(shape.ffn_of_layers)
    x, y = torch.ones(512, shape.hidden_size, dtype=dtype), torch.ones(512, ffn, dtype=dtype)
    w = torch.ones(ffn, shape.hidden_size, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        least, began, times = float("inf"), time.monotonic(), 0
        # The first makes what the others use again.
        while times < 3 or time.monotonic() - began < _SECONDS:
            start = time.perf_counter()
            _ = x @ w.T, y @ w, y.T @ x
            least, times = min(least, time.perf_counter() - start), times + 1
    finally:
        torch.set_num_threads(threads)
    given = os.environ.get("OMP_NUM_THREADS", "")
    of_a_process = int(given) if given.isdigit() and int(given) else max(1, cores // processes)
    return 3 * 2 * 512 * shape.hidden_size * ffn / least * min(cores, processes * of_a_process)
