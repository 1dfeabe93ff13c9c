"""What `launch/compress.py` chooses where it is given a budget or a target and no rounds: options by stage, and why, to be shown.

    sizes of model and student, tokens of the text, the machine  ──▶  length, samples, layout, batch, steps, learning rate

Everything here is arithmetic over sizes, but for half a second in which a CPU's work is timed (pace.py). Options that were given
stay as they are, and the others follow from them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minitron_megatron.chosen import Choices, Pair, Text
from minitron_megatron.cli.spelling import script
from minitron_megatron.compress_given import given_limits
from minitron_megatron.config import CompressConfig, DistillConfig, ParallelConfig, TrainerConfig, TrainingDataConfig
from minitron_megatron.console import format_gib
from minitron_megatron.errors import UserError
from minitron_megatron.machine import GIB_OF_PROGRAM, free_gib, seconds_to_import_torch
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.build import model_dtype
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.pace import Work, measure, seconds_of_stages, seconds_to_start
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import asks_machine, of_this_machine
from minitron_megatron.stages import START, START_OF_LIGHT
from minitron_megatron.train.checks import TENSOR_SIZES, Models
from minitron_megatron.train.distill_checks import check_pair
from minitron_megatron.train.foresee import Forecast, forecast, gib_on_cpus

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
        found.lines.append(_line_of_memory(cfg, pair, layout, length, batch, micro))
    validations = -(-steps // every)
    windows = min(_WINDOWS[device], text.validation // length) if text else _WINDOWS[device]
    validated = validations * min(own.get("trainer.validation_samples", TrainerConfig.validation_samples), windows)
    work = Work(length, samples, windows, steps, batch, micro, data, validated)
    found.seconds, line = _line_of_time(cfg, pair, work, device, foreseen)
    found.lines.append(line)
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

    Raises UserError where nothing fits, or nothing divides the batch that was given.
    """
    processes = cfg.processes
    if device == "cpu" or cfg.parallel != ParallelConfig():
        layouts = [Layout.from_config(cfg.parallel, processes)]
    else:
        layouts = [
            Layout(tensor=n, sequence=n > 1 and length % n == 0, world_size=processes)
            for n in TENSOR_SIZES
            if processes % n == 0
        ]
    possible = [(layout, micro) for layout in layouts for micro in _micro_batches(own, batch, layout.data, device)]
    if not possible:
        micro = own.get("trainer.micro_batch_size", 1)
        step = min(layout.data for layout in layouts) * micro
        raise UserError(
            f"distill.trainer.global_batch_size={batch} does not divide over the data-parallel ranks of processes={processes} in "
            f"micro-batches of {micro}: give a multiple of {step}, such as {math.ceil(batch / step) * step}"
        )
    if device == "cpu":
        return layouts[0], _that_fits(cfg, pair, layouts[0], length, batch, [micro for _, micro in possible]), None
    found: list[Forecast] = []
    for recompute in ("none", "full"):
        for layout, micro in possible:
            if foreseen := _foreseen(cfg, pair, layout, length, batch, micro, recompute):
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
        f"teacher and student do not fit on processes={processes} of {least.gpu.gpu}: {format_gib(least.gib)} a GPU in the best "
        f"layout, of {least.gpu.memory_gib:g}: use more processes, on more nodes by {script('compress.sh')}"
    )


def _micro_batches(own: Mapping[str, Any], batch: int, data: int, device: str) -> list[int]:
    """Samples that may run at once on each of so many data-parallel ranks, the most first: a given batch is not changed."""
    given = own.get("trainer.micro_batch_size")
    sizes = [given] if given else _MICRO_BATCHES[device == "cpu" :]
    if "trainer.global_batch_size" in own:
        return [n for n in sizes if batch % (n * data) == 0]
    return [n for n in sizes if n * data <= batch] or sizes[-1:]


def _that_fits(
    cfg: CompressConfig, pair: Pair, layout: Layout, length: int, batch: int, micro_batches: Sequence[int]
) -> int:
    """The first of the micro-batches with which the distillation fits into what is free of this machine's memory."""
    need = dict(zip(micro_batches, _gib_on_cpus(cfg, pair, layout, length, batch, micro_batches), strict=True))
    free = free_gib()
    if fitting := [micro for micro, gib in need.items() if gib <= free]:
        return fitting[0]
    micro, gib = min(need.items(), key=lambda one: one[1])
    raise UserError(
        f"teacher and student take {format_gib(gib)} on CPUs in micro-batches of {micro} (weights, gradients, optimizer, "
        f"activations), and {format_gib(free)} are free here: use a larger machine or one with GPUs, fewer processes=, or a "
        "shorter data.sequence_length="
    )


def _gib_on_cpus(
    cfg: CompressConfig, pair: Pair, layout: Layout, length: int, batch: int, micro_batches: Sequence[int]
) -> list[float]:
    """GiB that all processes of the distillation take together at their peak, for each micro-batch."""
    dtype = precision_of(cfg, pair.student, "cpu")[0]
    job = replace(_job(cfg, layout, length, batch, 1, "none"), precision={"bfloat16": "bf16"}.get(dtype, "fp32"))
    check_pair(pair.teacher, pair.student, job, layout)
    found = gib_on_cpus(job, layout, _models(pair), micro_batches)
    return [layout.world_size * (GIB_OF_PROGRAM + gib) for gib in found]


def _foreseen(
    cfg: CompressConfig, pair: Pair, layout: Layout, length: int, batch: int, micro: int, recompute: str
) -> Forecast | None:
    """What a layout takes; None where it cannot run the job."""
    job = _job(cfg, layout, length, batch, micro, recompute)
    try:
        check_pair(pair.teacher, pair.student, job, layout)
    except UserError:
        return None
    return forecast(job, layout, _models(pair))


def _job(cfg: CompressConfig, layout: Layout, length: int, batch: int, micro: int, recompute: str) -> DistillConfig:
    """The distillation, as far as its memory and time depend on it."""
    at_once = micro * layout.data
    return DistillConfig(
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


def _models(pair: Pair) -> Models:
    return Models(pair.student, "auto", pair.teacher, "auto", lambda of_student: of_student)


def _line_of_layout(cfg: CompressConfig, layout: Layout, micro: int, foreseen: Forecast | None) -> tuple[str, str, str]:
    memory = ""
    if foreseen:
        memory = f", {format_gib(foreseen.gib)} of {foreseen.gpu.memory_gib:g} GiB of a {foreseen.gpu.gpu}"
    processes = f"{layout.world_size} processes" if layout.world_size > 1 else "one process"
    return "layout", str(layout), f"{processes}, micro-batches of {micro}{memory}"


def _line_of_memory(
    cfg: CompressConfig, pair: Pair, layout: Layout, length: int, batch: int, micro: int
) -> tuple[str, str, str]:
    """What the distillation takes of a machine's memory, on CPUs."""
    (gib,) = _gib_on_cpus(cfg, pair, layout, length, batch, [micro])
    why = (
        f"at the peak: programs, weights, gradients, optimizer and activations; {format_gib(free_gib())} are free here"
    )
    return "memory", format_gib(gib), why


def _line_of_time(
    cfg: CompressConfig, pair: Pair, work: Work, device: str, foreseen: Forecast | None
) -> tuple[dict[str, float], tuple[str, str, str]]:
    """Seconds of every stage, and the line of all of them: by what was measured here, or by a dry run's arithmetic."""
    start = seconds_to_import_torch()
    tokens = work.steps * work.batch * work.length
    if foreseen:
        seconds = _seconds_on_gpus(cfg, pair, work, start, foreseen)
        how = f"{foreseen.tokens_per_second:,.0f} tokens/s, by arithmetic (docs/cluster.md)"
    else:
        pace = measure(pair.student, precision_of(cfg, pair.student, device)[0], cfg.processes, start)
        seconds = seconds_of_stages(pair, work, pace, cfg.processes)
        trained = seconds["distill"] - seconds_to_start(start, cfg.processes)
        how = f"{tokens / trained:,.0f} tokens/s once it has started, from products and small operations timed here"
    one = start * START
    others = {
        "import_hf": one if cfg.hf else 0.0,
        "prepare_data": one if cfg.input else 0.0,
        "search": START_OF_LIGHT * start if given_limits(cfg.budget) else 0.0,
        "prune": one,
        "export_hf": one * cfg.export,
        "report": one * cfg.export,
    }
    seconds = {name: round(value, 1) for name, value in {**others, **seconds}.items() if value}
    if not cfg.perplexity:
        seconds.pop("evaluate")
    whole = sum(seconds.values())
    return seconds, ("time", words_of(whole), f"{words_of(seconds['distill'])} of it distillation: {how}")


def _seconds_on_gpus(cfg: CompressConfig, pair: Pair, work: Work, start: float, foreseen: Forecast) -> dict[str, float]:
    """Seconds of the stages that compute: the distillation's rate is foreseen, forward passes go at its share of the peak."""
    of_pass = {one: flops_per_token(shape, work.length) for one, shape in vars(pair).items()}
    rate = foreseen.tokens_per_second * (3 * of_pass["student"] + of_pass["teacher"])
    start = seconds_to_start(start, cfg.processes)
    judged = work.windows * work.length * (of_pass["student"] + of_pass["teacher"])
    return {
        "importance": start + work.calibration * work.length * of_pass["teacher"] / rate,
        "distill": start + work.steps * work.batch * work.length / foreseen.tokens_per_second,
        "evaluate": start + judged / rate,
    }


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
        return choice.value, choice.reason
    return shape.dtype, "as the model is stored"
