"""Weak scaling: the distillation step of measure=step in several layouts of the processes that were started, one after another.

    each rank alone, at once ──▶ one process  ┐
    all ranks together       ──▶ {}           ├──▶ tokens/s of a GPU over those of one, memory, what the dry run said of both
                                 {tensor: 2}  │
                                 …            ┘

A GPU has as much to do in every row: the batch grows with the processes, not with data parallelism. Weights and samples do not
depend on the layout, so that rows of as many processes have the same loss in their first step.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_megatron.benchmark.step import Case, Timed, figures, let_go, timed
from minitron_megatron.config import BenchmarkConfig, ParallelConfig, TeacherParallelConfig, check
from minitron_megatron.console import format_value, print_table
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import explain
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.cpu import adapter
from minitron_megatron.parallel.job import model_parallel, process_group
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.distill_checks import teacher_layout
from minitron_megatron.train.foresee import RESERVED_GIB

log = logging.getLogger(__name__)
# Key of a row of results.json that was not measured: why.
SKIPPED = "skipped"


class Scaling:
    """The rows of a measurement, planned, then measured: `job()` around `measure()`, on every rank.

    Raises UserError for layouts that are none, or that do not go with the models or, with `check_device`, the device.
    """

    def __init__(
        self, cfg: BenchmarkConfig, world_size: int, device: torch.device, *, check_device: bool = True
    ) -> None:
        self.cfg, self.device = cfg, device
        self.alone = Case.of(cfg, Layout())
        self.cases = planned_cases(cfg, world_size, device)
        for case in self.all_cases.values():
            case.check()
            if check_device:
                case.check_device(device)
        if check_device:
            self.alone = self.alone.settled(device)
            self.cases = {name: case.settled(device) for name, case in self.cases.items()}
        self.foreseen: dict[str, dict[str, float]] = {}
        self.measured_alone: Timed | str = ""

    @property
    def all_cases(self) -> dict[str, Case]:
        """The rows by name, that of one process first."""
        return {str(self.alone.layout): self.alone, **self.cases}

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Foresee every row and measure each rank alone; within, the process group of all is up."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                # A dry run's figures are for GPUs; it builds models in fake jobs, where there is no process group yet.
                self.foreseen = {name: case.foreseen() for name, case in self.all_cases.items()}
            else:
                stack.enter_context(adapter())
            with process_group(self.device, alone=True):
                self.measured_alone = self._alone()
            stack.enter_context(process_group(self.device))
            yield

    def _alone(self) -> Timed | str:
        """This rank's step in a world of one; or why there is none, which no other rank waits for."""
        reason = too_large(self.foreseen.get(str(self.alone.layout)), self._memory_gib())
        if reason:
            return reason
        try:
            return measured(self.alone)
        except torch.OutOfMemoryError:
            # What the failed step holds goes with the frames of the error, after this block.
            pass
        gc.collect()
        torch.cuda.empty_cache()
        return "out of memory"

    def measure(self) -> dict[str, Any]:
        """{"rows": {layout: figures}, "relative_to": the layout that efficiency is relative to}, the same on every rank."""
        rows = {str(self.alone.layout): self._row(self.alone, self.measured_alone)}
        memory = min(collectives.all_gather_objects(self._memory_gib()))
        for name, case in self.cases.items():
            # An allocation that fails on one rank would leave the others waiting: decided before, by all alike.
            found = too_large(self.foreseen.get(name), memory) or measured(case)
            rows[name] = self._row(case, found)
            # What has been measured is known if a later row takes the job down.
            log.info("%s: %s", name, rows[name])
        base = with_efficiency(rows, [str(self.alone.layout), str(Layout(world_size=collectives.world_size()))])
        for name, row in rows.items():
            row |= with_errors(row, self.foreseen.get(name, {}))
        return {"rows": rows, "relative_to": base}

    def _row(self, case: Case, mine: Timed | str) -> dict[str, Any]:
        """Figures of the slowest rank, and the memory of the fullest; or why there are none."""
        everyone = collectives.all_gather_objects(mine)
        for found in everyone:
            if isinstance(found, str):
                return {SKIPPED: found}
        seconds, peak = max(one.seconds for one in everyone), max(one.peak_gib for one in everyone)
        return figures(case, replace(everyone[0], seconds=seconds, peak_gib=peak))

    def _memory_gib(self) -> float:
        """Of this rank's GPU."""
        if self.device.type != "cuda":
            return math.inf
        return torch.cuda.get_device_properties(self.device).total_memory / 2**30


def planned_cases(cfg: BenchmarkConfig, world_size: int, device: torch.device) -> dict[str, Case]:
    """The rows of more than one process, by name, without layouts that cannot be here (said in a line). Raises UserError."""
    if replace(cfg.parallel, world_size=None) != ParallelConfig():
        raise UserError("measure=scaling takes its layouts from scaling.layouts: leave out parallel.*")
    cases, left_out = {}, []
    for number, given in enumerate(cfg.scaling.layouts):
        sizes, teacher, overlap = parsed(given, f"scaling.layouts[{number}]")
        if world_size > 1 and _possible(sizes, teacher, world_size, device, overlap):
            case = _case(cfg, Layout.from_config(sizes, world_size), teacher, overlap)
            cases[_name(case)] = case
        else:
            left_out.append(_text(given))
    if left_out:
        log.info("left out with %d processes on %s: %s", world_size, device.type, ", ".join(left_out))
    return cases


def parsed(given: Any, option: str) -> tuple[ParallelConfig, TeacherParallelConfig, bool]:
    """A layout of the options, the teacher's, in which None is the student's, and whether transfers overlap. Raises UserError."""
    own = dict(given) if isinstance(given, Mapping) else given
    teacher, overlap = (own.pop("teacher", {}), own.pop("overlap", False)) if isinstance(own, dict) else ({}, False)
    if not isinstance(overlap, bool):
        raise UserError(f"{option}.overlap={overlap} must be true or false")
    return _options(ParallelConfig, own, option), _options(TeacherParallelConfig, teacher, f"{option}.teacher"), overlap


def _options[T](kind: type[T], given: Any, option: str) -> T:
    """A mapping as a config of a kind. Raises UserError."""
    if not isinstance(given, Mapping):
        raise UserError(f"{option}={given} is not a mapping such as {{tensor: 2}}")
    # How many processes there are is the job's affair.
    known = [f.name for f in fields(kind) if f.name != "world_size"]
    wrong = [key for key in given if key not in known]
    if wrong:
        also = ", teacher, overlap" if kind is ParallelConfig else ""
        raise UserError(f"{option} has no {wrong[0]!r}: use {', '.join(known)}{also}")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        raise UserError(f"{option}: {explain(error)}") from None
    check(found, f"{option}.")
    return found


def _possible(
    sizes: ParallelConfig, teacher: TeacherParallelConfig, world_size: int, device: torch.device, overlap: bool
) -> bool:
    """Whether both layouts divide the processes, and the device has what they take."""
    if overlap and sizes.sequence and device.type == "cpu":
        return False
    names = ("tensor", "pipeline", "context")
    own = {name: getattr(teacher, name) or getattr(sizes, name) for name in names}
    for one in ({name: getattr(sizes, name) for name in names}, own):
        if world_size % math.prod(one.values()) or (one["context"] > 1 and device.type == "cpu"):
            return False
    return True


def _case(cfg: BenchmarkConfig, layout: Layout, teacher: TeacherParallelConfig, overlap: bool) -> Case:
    """As many micro-batches a process as alone, whichever of them share one."""
    return Case(cfg, layout, cfg.step.micro_batches * layout.world_size // layout.data, teacher, overlap)


def _name(case: Case) -> str:
    """The layout's name, the teacher's where it is another, and whether transfers overlap."""
    own = teacher_layout(case.run, case.layout)
    beside = "" if own == case.layout else f"; teacher {own}"
    return f"{case.layout}{beside}{'; overlapped' if case.overlap else ''}"


def _text(given: Mapping[str, Any]) -> str:
    """A layout as it is written on a command line."""
    values = (f"{key}: {_text(value) if isinstance(value, Mapping) else value}" for key, value in given.items())
    return f"{{{', '.join(values)}}}"


def too_large(foreseen: Mapping[str, float] | None, memory_gib: float) -> str:
    """Why a step does not fit on a GPU of so many GiB, by its dry run; nothing where it does, or where none was made."""
    if foreseen is None or foreseen["foreseen_gib"] + RESERVED_GIB <= memory_gib:
        return ""
    # As the dry run says it of itself: some is left for CUDA and NCCL.
    return f"does not fit: foreseen {foreseen['foreseen_gib']:.1f} + {RESERVED_GIB} of {memory_gib:.1f} GiB"


def measured(case: Case) -> Timed:
    """The case's step on this rank, in the process group that is up; everything is freed after it."""
    with model_parallel(case.layout, case.cfg.seed), case.buffers():
        trainer = case.trainer()
        try:
            return timed(case, trainer)
        finally:
            let_go(trainer)


def with_efficiency(rows: dict[str, dict[str, Any]], first: list[str]) -> str:
    """Add tokens/s of a GPU over those of the first row that was measured, `first` before the others; gives its name."""
    rate = "tokens_per_second_per_gpu"
    base = next((name for name in (*first, *rows) if rate in rows.get(name, {})), "")
    for row in rows.values():
        if rate in row:
            row["efficiency"] = row[rate] / rows[base][rate]
    return base


def with_errors(row: Mapping[str, Any], foreseen: Mapping[str, float]) -> dict[str, float]:
    """What the dry run said, and by how many % that was too much (negative: too little)."""
    found = dict(foreseen)
    for said, was in (("foreseen_gib", "peak_gib"), ("foreseen_seconds", "seconds")):
        if said in foreseen and was in row:
            found[f"{said}_error_percent"] = 100 * (foreseen[said] / row[was] - 1)
    return found


def show(results: Mapping[str, Any]) -> None:
    """One table of all rows."""
    columns = ["layout", "seconds", "tokens/s a GPU", "MFU", "efficiency", "GiB", "foreseen GiB", "foreseen seconds"]
    table = []
    for name, row in results["rows"].items():
        shown = [
            row.get(SKIPPED) or format_value(row["seconds"]),
            _shown(row, "tokens_per_second_per_gpu", ",.0f"),
            _shown(row, "mfu", ".1%"),
            _shown(row, "efficiency", ".1%"),
            _shown(row, "peak_gib", ".1f"),
            *(_shown(row, f"foreseen_{what}", ".4g") + _error(row, f"foreseen_{what}") for what in ("gib", "seconds")),
        ]
        table.append([name, *shown])
    relative = f", efficiency relative to {results['relative_to']}" if results["relative_to"] else ""
    print_table(f"scaling: {results['processes']} × {results['device']}{relative}", columns, table)


def _shown(row: Mapping[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


def _error(row: Mapping[str, Any], name: str) -> str:
    return f" ({row[f'{name}_error_percent']:+.1f} %)" if f"{name}_error_percent" in row else ""
