"""`launch/benchmark.py`: one measurement in this layout, as a table and a results.json."""

import json
from collections.abc import Callable
from functools import partial

import torch

from minitron_megatron.benchmark import mistakes
from minitron_megatron.benchmark.ceilings import ceilings
from minitron_megatron.benchmark.checks import check_benchmark
from minitron_megatron.benchmark.cut import cutting_in_memory
from minitron_megatron.benchmark.importance import hooks_over_forward
from minitron_megatron.benchmark.layers import blocks_over_passes
from minitron_megatron.benchmark.loss import loss_with_heads
from minitron_megatron.benchmark.memory import planned_over_kept
from minitron_megatron.benchmark.prune import pruning_over_copying
from minitron_megatron.benchmark.scaling import Scaling, show
from minitron_megatron.benchmark.step import distillation_step, foreseen_step, settled_step
from minitron_megatron.benchmark.throughput import forward_throughput
from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.hardware import hardware, say_assumed
from minitron_megatron.parallel.job import parallel_job, pick_device
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import processor, record

# In a job of one layout; scaling has jobs of its own (scaling.py).
MEASURES: dict[str, Callable[[BenchmarkConfig, Layout], dict[str, float]]] = {
    "importance": hooks_over_forward,
    "prune": pruning_over_copying,
    "layers": blocks_over_passes,
    "cut": cutting_in_memory,
    "memory": planned_over_kept,
    "loss": loss_with_heads,
    "step": distillation_step,
    "ceilings": ceilings,
    "throughput": forward_throughput,
}
# What a dry run says of the same.
FORESEEN: dict[str, Callable[[BenchmarkConfig, Layout], dict[str, float]]] = {"step": foreseen_step}


def benchmark(cfg: BenchmarkConfig, layout: Layout | None = None) -> None:
    """Measure `measure=` on this machine, rank 0 writing what it found."""
    layout = layout or check_benchmark(cfg)
    if cfg.measure == "mistakes" and not cfg.dry_run:
        _of_processes(cfg)
        return
    device = pick_device(cfg.device)
    if cfg.dry_run:
        _foresee(cfg, layout, device)
        return
    asked, cfg = cfg, settled_step(cfg, layout, device) if cfg.measure == "step" else cfg
    scaling = Scaling(cfg, layout.world_size, device) if cfg.measure == "scaling" else None
    if scaling:
        job, measure = scaling.job(), scaling.measure
    else:
        job = parallel_job(layout, seed=cfg.seed, device=cfg.device)
        measure = partial(MEASURES[cfg.measure], cfg, layout)
    # A dry run's figures are for GPUs.
    foreseen = FORESEEN.get(cfg.measure) if device.type == "cuda" else None
    planned = foreseen(cfg, layout) if foreseen else {}
    with (
        job,
        command_output(asked, {}) as out,
    ):
        if out.done:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()[0]
        out.results = {**measure(), **planned, "device": name, "processes": layout.world_size}
        out.precision = record()
        if collectives.is_rank_zero():
            (out.path / RESULTS).write_text(json.dumps(out.results, indent=2) + "\n", encoding="utf-8")
    if scaling:
        show(out.results)
    else:
        print_table(f"{cfg.measure}, {layout}", ["", "value"], list(out.results.items()))


def _of_processes(cfg: BenchmarkConfig) -> None:
    """Measure processes that are started one after another; this one has nothing to do meanwhile."""
    with command_output(cfg, {}) as out:
        if out.done:
            return
        out.results = {**mistakes.first_mistakes_and_starts(cfg), "device": processor()[0]}
        (out.path / RESULTS).write_text(json.dumps(out.results, indent=2) + "\n", encoding="utf-8")
    mistakes.show(out.results)


def _foresee(cfg: BenchmarkConfig, layout: Layout, device: torch.device) -> None:
    """What would be measured; a step in several layouts with what is said of each on the GPUs of `cluster=`."""
    # It plans a job for GPUs wherever it runs, unless a CPU is asked for.
    there = device if cfg.device == "cpu" else torch.device("cuda")
    if there.type == "cuda" and cfg.measure in (*FORESEEN, "scaling"):
        say_assumed(cfg.cluster)
    if cfg.measure != "scaling":
        rows = [["measure", cfg.measure], ["layout", str(layout)]]
        if cfg.measure in FORESEEN and there.type == "cuda":
            rows += [["GPU", hardware(cfg.cluster).gpu], *FORESEEN[cfg.measure](cfg, layout).items()]
        print_table("would be measured", ["", "value"], rows)
        return
    scaling = Scaling(cfg, layout.world_size, there, check_device=device.type == there.type)
    with progress("foresee", len(scaling.all_cases), unit="layouts") as advance:
        rows = []
        for name, case in scaling.all_cases.items():
            said = case.foreseen() if there.type == "cuda" else {}
            rows.append([name, *(f"{value:.4g}" for value in said.values())])
            advance(1)
    columns = ["layout", "GiB", f"seconds on {hardware(cfg.cluster).gpu}"] if there.type == "cuda" else ["layout"]
    print_table(f"would be measured: scaling, {layout.world_size} processes", columns, rows)
