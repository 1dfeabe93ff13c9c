"""The dry run of a training job: what each rank would hold, how long it would take, and which layouts there are instead.

It runs anywhere, for any number of GPUs: models are built for real, on the meta device (census.py), and the rest is
arithmetic (memory.py, speed.py) whose assumptions are printed beside the figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from minitron_megatron.automatic import (
    GRAPHS,
    WHY,
    Built,
    Choice,
    Obstacle,
    began_without,
    choose,
    graph_obstacles,
    graph_obstacles_of_machine,
    memory_obstacle,
)
from minitron_megatron.config import AUTO, DistillConfig, HardwareConfig, TrainerConfig, TrainingConfig
from minitron_megatron.console import print_table
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.build import attention_in_fixed_order, model_dtype
from minitron_megatron.parallel.hardware import hardware, peak_flops, say_assumed
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import Stage, take_census
from minitron_megatron.train.checks import Check, Models, layouts_that_run, without_idle_options
from minitron_megatron.train.memory import (
    CHECKPOINT_BYTES,
    RECOMPUTE,
    Arithmetic,
    MicroBatch,
    Plan,
    layers_in_cpu_memory,
    memory_of_stage,
)
from minitron_megatron.train.speed import FP8_GAIN, LINK_EFFICIENCY, Step, time_of_step

# CUDA's context, NCCL's buffers, workspaces of cuBLAS and what the allocator cannot use.
RESERVED_GIB = 6
# Layouts that are shown, the fastest that fit first.
SHOWN = 12


@dataclass(frozen=True)
class Forecast:
    """A layout with what it would take."""

    plan: Plan
    stages: list[Stage]
    step: Step
    gpu: HardwareConfig
    graphs: Choice

    @property
    def memory(self) -> list[dict[str, int]]:
        """Bytes by kind on a rank of each distinct stage."""
        return [memory_of_stage(stage, self.plan) for stage in self.stages]

    @property
    def gib(self) -> float:
        """GiB of the fullest rank."""
        return gib_of_fullest(self.stages, self.plan)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits on its GPU."""
        return self.gib + RESERVED_GIB <= self.gpu.memory_gib

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.step.tokens / self.step.total


def gib_of_fullest(stages: list[Stage], plan: Plan) -> float:
    """GiB of the fullest rank."""
    return max(sum(memory_of_stage(stage, plan).values()) for stage in stages) / 2**30


def forecast(
    cfg: TrainingConfig, layout: Layout, models: Models, before: Mapping[str, Any] = MappingProxyType({})
) -> Forecast:
    """Build a rank of each stage of a layout and work out what it takes.

    `before` are the options of the run that is to be continued, by their dotted names. trainer.cuda_graphs=auto becomes what it
    would become on these GPUs, their memory considered (`Forecast.graphs`).
    """
    plan = _plan_of(cfg, layout, models)
    dtype, theirs = plan.how.dtype, plan.teacher_how.dtype
    stages = take_census(models.student, models.teacher, layout, dtype, theirs, plan.teacher_layout)
    gpu = hardware(cfg.cluster)
    built = [Built("student" if models.teacher else "model", plan.how.engine, dtype is torch.bfloat16)]
    built += [Built("teacher", plan.teacher_how.engine, theirs is torch.bfloat16)] if models.teacher else []
    graphs = _graphs_of(cfg, layout, built, before, gib_of_fullest(stages, plan), gpu)
    plan = replace(plan, cuda_graphs=graphs.value)
    return Forecast(plan, stages, time_of_step(stages, plan, gpu), gpu, graphs)


def gib_on_cpus(cfg: TrainingConfig, layout: Layout, models: Models, micro_batches: Sequence[int]) -> list[float]:
    """GiB of the fullest process of a job on CPUs, for each size of a micro-batch; the program itself is not in it."""
    plan = _plan_of(cfg, layout, models)
    on_cpus = {"engine": "local", "fused_norms": False}
    plan = replace(
        plan, how=replace(plan.how, **on_cpus), teacher_how=replace(plan.teacher_how, **on_cpus), cuda_graphs=False
    )
    stages = take_census(
        models.student, models.teacher, layout, plan.how.dtype, plan.teacher_how.dtype, plan.teacher_layout
    )
    found = []
    for samples in micro_batches:
        count = max(1, cfg.trainer.global_batch_size // (samples * layout.data))
        batch = MicroBatch.of(samples, cfg.data.sequence_length, layout)
        found.append(gib_of_fullest(stages, replace(plan, batch=batch, micro_batches=count)))
    return found


def _plan_of(cfg: TrainingConfig, layout: Layout, models: Models) -> Plan:
    """What is trained and how, on GPUs that have what they need; with CUDA graphs, which are decided by what this plan takes."""
    trainer, (student, teacher) = cfg.trainer, (models.student, models.teacher)
    dtype = model_dtype(student, cfg.precision)
    theirs = model_dtype(teacher, cfg.precision) if teacher else dtype
    own = models.teacher_layout(layout) if teacher else layout
    return Plan(
        student=student,
        teacher=teacher,
        layout=layout,
        batch=MicroBatch.of(trainer.micro_batch_size, cfg.data.sequence_length, layout),
        micro_batches=trainer.global_batch_size // (trainer.micro_batch_size * layout.data),
        how=Arithmetic(
            dtype,
            _engine(models.student_engine, dtype),
            _recomputed(trainer),
            fp8=trainer.fp8 != "none",
            fixed_order=attention_in_fixed_order(),
        ),
        teacher_how=_of_teacher(cfg, theirs, _engine(models.teacher_engine, theirs)),
        state_precision=cfg.optim.state_precision if dtype is torch.bfloat16 else "fp32",
        **({"logits_bytes": cfg.distill.logits_mib * 2**20} if isinstance(cfg, DistillConfig) else {}),
        cuda_graphs=True,
        tp_comm_overlap=trainer.tp_comm_overlap,
        teacher_layout=None if own == layout else own,
        ahead=cfg.distill.teacher_ahead if isinstance(cfg, DistillConfig) else None,
    )


def _graphs_of(
    cfg: TrainingConfig,
    layout: Layout,
    built: list[Built],
    before: Mapping[str, Any],
    gib: float,
    gpu: HardwareConfig,
) -> Choice:
    """Whether there would be graphs; `gib` of the fullest rank with them. What was asked for is not refused here."""
    given, against = cfg.trainer.cuda_graphs, list[Obstacle]()
    if given == AUTO:
        # The environment is that of the job, not of who plans it.
        against += [*graph_obstacles_of_machine(built, {}), *graph_obstacles(cfg, layout)]
        against += [*began_without(GRAPHS, before), *memory_obstacle(gib + RESERVED_GIB, gpu.memory_gib)]
    return choose(GRAPHS, given, against, WHY[GRAPHS])


def _of_teacher(cfg: TrainingConfig, dtype: torch.dtype, engine: str) -> Arithmetic:
    if not isinstance(cfg, DistillConfig):
        return Arithmetic(dtype, engine)
    options = cfg.distill
    fp8 = {"fp8": options.teacher_fp8 != "none", "fp8_head": options.teacher_head_fp8}
    return Arithmetic(dtype, engine, **fp8, offloaded=options.teacher_offload)


def _recomputed(trainer: TrainerConfig) -> str:
    """What is counted as recomputed: an MLP that is, is not, and full recomputation is one of every layer."""
    if trainer.recompute == "selective" and "core_attn" not in trainer.recompute_modules:
        return "none"
    return trainer.recompute


def _engine(asked: str, dtype: torch.dtype) -> str:
    """The engine that a GPU job would take (models/build.py, pick_engine), whatever this machine has."""
    return asked if asked != "auto" else "te" if dtype is torch.bfloat16 else "local"


def foresee(
    cfg: TrainingConfig,
    layout: Layout,
    steps: int,
    models: Models,
    check: Check,
    before: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print what the job would be; nothing is written. `before` as of `forecast`."""
    layout = without_idle_options(layout)
    say_assumed(cfg.cluster)
    found = forecast(cfg, layout, models, before)
    _show_job(found, steps, cfg)
    _show_memory(found)
    _show_time(found, steps)
    _show_assumptions(found)
    show_layouts(cfg, layout, models, check)


def show_layouts(cfg: TrainingConfig, layout: Layout, models: Models, check: Check) -> None:
    """Print the layouts of as many processes that can run the job, the fastest of those that fit first."""
    found = [forecast(cfg, one, models) for one in layouts_that_run(layout, cfg.data.sequence_length, check)]
    found.sort(key=lambda one: (one.fits, one.tokens_per_second), reverse=True)
    if not found:
        return
    columns = ["layout", "data", "micro-batches", "bubble", "GiB", "fits", "tokens/s"]
    rows = [
        [
            f"{one.plan.layout}{'  ◀ this one' if one.plan.layout == layout else ''}",
            one.plan.layout.data,
            one.plan.micro_batches,
            f"{one.step.bubble:.1%}",
            round(one.gib, 1),
            "yes" if one.fits else "no",
            round(one.tokens_per_second),
        ]
        for one in found[:SHOWN]
    ]
    print_table(f"layouts of {layout.world_size} processes that divide", columns, rows)


def _show_job(found: Forecast, steps: int, cfg: TrainingConfig) -> None:
    plan, layout = found.plan, found.plan.layout
    stored = {key: size for stage in found.stages for chunk in stage.student for key, size in chunk.stored.items()}
    weights = sum(stored.values())
    states = weights // plan.how.dtype.itemsize * CHECKPOINT_BYTES
    rows = [
        ["layout", f"{layout}: {layout.world_size} processes, {layout.data} data-parallel ranks"],
        *([["teacher's layout", plan.teacher_layout]] if plan.teacher_layout else []),
        *([["teacher parameters", count_parameters(plan.teacher)]] if plan.teacher else []),
        ["student parameters", count_parameters(plan.student)],
        ["steps", steps],
        ["tokens", steps * found.step.tokens],
        ["micro-batches of a rank and step", plan.micro_batches],
        ["idle in the pipeline (bubble)", f"{found.step.bubble:.1%}"],
        ["weights on disk, GiB", _gib(weights)],
        ["checkpoint of the run, GiB", _gib(weights + states)],
    ]
    print_table("would be distilled" if plan.teacher else "would be trained", ["", "value"], rows)


def _show_memory(found: Forecast) -> None:
    """A column a stage, a row a kind of bytes; the sum also as it would be with other recomputation."""
    gpu, plan = found.gpu, found.plan
    names = [_name_of(stage) for stage in found.stages] if len(found.stages) > 1 else ["every rank"]
    memory = found.memory
    rows = [[kind, *(_gib(kinds[kind]) for kinds in memory)] for kind in memory[0]]
    rows.append(["all", *(_gib(sum(kinds.values())) for kinds in memory)])
    for recompute in (kind for kind in RECOMPUTE if kind != plan.how.recompute):
        other = replace(plan, how=replace(plan.how, recompute=recompute))
        totals = [_gib(sum(memory_of_stage(stage, other).values())) for stage in found.stages]
        kind = "without" if recompute == "none" else f"with {recompute}"
        rows.append([f"all, {kind} recomputation", *totals])
    if plan.teacher_how.offloaded:
        in_cpu_memory = [_gib(sum(layers_in_cpu_memory(stage, plan))) for stage in found.stages]
        rows.append(["teacher weights in CPU memory", *in_cpu_memory])
    left = gpu.memory_gib - RESERVED_GIB - found.gib
    verdict = f"{left:.1f} GiB left" if found.fits else f"does NOT fit: {-left:.1f} GiB too much"
    print_table(f"GiB of a rank on {gpu.gpu} ({verdict})", ["", *names], rows)


def _show_time(found: Forecast, steps: int) -> None:
    step, plan, gpu = found.step, found.plan, found.gpu
    gpus, length = plan.layout.world_size, plan.batch.sequence_length
    flops = {"student, forward and backward": 3 * flops_per_token(plan.student, length)}
    if plan.teacher:
        flops["teacher, forward"] = flops_per_token(plan.teacher, length)
    rows = [
        [kind, f"{seconds:.3f}", f"{seconds / step.total:.1%}", _or_nothing(step.sent.get(kind, 0) / 1e9)]
        for kind, seconds in step.seconds.items()
        if seconds
    ]
    rows.append(["step", f"{step.total:.3f}", "100.0%", ""])
    print_table("a step", ["", "seconds", "share", "GB a rank sends"], rows)
    rate, hours = found.tokens_per_second, steps * step.total / 3600
    utilisation = sum(flops.values()) * rate / (gpus * peak_flops(gpu, plan.how.dtype))
    summary = [
        *([f"GFLOP a token: {name}", value / 1e9] for name, value in flops.items()),
        ["tokens/s", round(rate)],
        ["tokens/s of a GPU", round(rate / gpus)],
        ["share of the peak (MFU)", f"{utilisation:.1%}"],
        [f"hours to {steps * step.tokens:.3g} tokens", round(hours, 1)],
        ["GPU hours", round(hours * gpus)],
    ]
    print_table("the run", ["", "value"], summary)


def _show_assumptions(found: Forecast) -> None:
    gpu, plan = found.gpu, found.plan
    used = any((plan.how.fp8, plan.teacher_how.fp8, plan.teacher_how.fp8_head))
    gain = f"its products count {FP8_GAIN:g} times as fast as bfloat16's" if used else "not used"
    fp8 = f"; FP8 {gpu.fp8_tflops:,.0f}, {gain}" if gpu.fp8_tflops else ""
    engines = {"te": "Transformer Engine's, with fused attention", "local": "Megatron's local ones, attention unfused"}
    again = {
        "none": "none",
        "selective": "inside of attention; of an MLP is not counted",
        "full": "every layer from its input, whatever trainer.recompute_num_layers",
    }
    nodes = f" in nodes of {gpu.gpus_per_node}" if gpu.gpus_per_node else ""
    beside = "copies of the teacher's layers with its arithmetic; " if plan.teacher_how.offloaded else "none: "
    rows = [
        ["GPU", f"{gpu.gpu}{nodes}: {gpu.memory_gib:g} GiB at {gpu.memory_gb_s:,.0f} GB/s"],
        ["peak, TFLOP/s", f"{peak_flops(gpu, plan.how.dtype) / 1e12:,.0f} in {_name(plan.how.dtype)}{fp8}"],
        ["of it, on one GPU", f"{gpu.efficiency:.0%} (cluster.efficiency; measured: docs/cluster.md)"],
        [
            "links",
            f"NVLink {gpu.nvlink_gb_s:g} GB/s among {gpu.nvlink_gpus} GPUs, network {gpu.network_gb_s:g} GB/s a GPU, "
            f"CPU memory {gpu.host_gb_s:g} GB/s; "
            f"{LINK_EFFICIENCY:.0%} of it is reached",
        ],
        ["overlap", f"{beside}communication and optimizer come after arithmetic"],
        [
            "launches",
            "CUDA graphs"
            if plan.cuda_graphs
            else f"{gpu.launch_ms:g} ms for a layer's forward pass (cluster.launch_ms)",
        ],
        [
            GRAPHS,
            f"{'on' if plan.cuda_graphs else 'off'}: {found.graphs.reason}",
        ],
        ["recomputation", again[plan.how.recompute]],
        ["layers", engines[plan.how.engine]],
        ["reserved", f"{RESERVED_GIB} GiB a GPU for CUDA, NCCL and fragmentation"],
        [
            "not counted",
            "validation, checkpoints, reading data, exchange between context-parallel ranks, intermediate losses"
            + (", graphs of every micro-batch" if plan.cuda_graphs and plan.layout.pipeline > 1 else ""),
        ],
    ]
    print_table("assumptions", ["", "value"], rows)


def _name_of(stage: Stage) -> str:
    theirs = "" if stage.teacher_number is None else f", teacher's {stage.teacher_number}"
    return f"stage {stage.number}{theirs}"


def _gib(size: float) -> float:
    return round(size / 2**30, 2)


def _or_nothing(value: float) -> str:
    return f"{value:.2f}" if value else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
