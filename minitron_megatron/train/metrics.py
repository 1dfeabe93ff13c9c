"""Metrics of a run: metrics.jsonl in the run folder, wandb, and a progress bar; all from rank 0.

A resumed run cuts metrics.jsonl back to the step it restored and continues wandb's run.
"""

import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, TextColumn

from minitron_megatron.checkpoints.folder import METRICS
from minitron_megatron.config import HardwareConfig, LoggerConfig
from minitron_megatron.console import SECONDS_BETWEEN_LINES, bars_with, console, speaks
from minitron_megatron.models.graphs import peak_memory
from minitron_megatron.parallel.hardware import gpu_of, hardware, peak_flops
from minitron_megatron.plain_files import parse_json, write_whole
from minitron_megatron.plain_text import one_line
from minitron_megatron.starts import seconds_left
from minitron_megatron.train.loop import StepResult

log = logging.getLogger(__name__)
# What the clock and the machine say of a step: two runs with the same losses differ in these.
OF_THE_MACHINE = frozenset(
    """tokens_per_second tokens_per_second_per_gpu tflops_per_gpu mfu step_seconds data_seconds memory_gib memory_peak_gib
    resident_gib run_seconds""".split()
)


class StepMetrics:
    """What is kept of each step, out of its result and of what this machine can do.

    Work is that of the models, without what is computed again: 2 operations a weight and token forward, twice that backward.
    """

    def __init__(
        self,
        flops_per_token: float,
        processes: int,
        dtype: torch.dtype,
        device: torch.device,
        given: HardwareConfig,
        *,
        graphs: bool = False,
    ) -> None:
        """Metrics of a run.

        Args:
            flops_per_token: operations that a token takes in a step, of all models.
            processes: of the job, one a GPU.
            dtype: that models compute in.
            device: of this rank.
            given: hardware= of the config; MFU is left out for GPUs that neither it nor conf/cluster knows, and on CPUs.
            graphs: layers run as CUDA graphs.
        """
        self.graphs = graphs
        self.flops_per_token, self.processes, self.on_gpu = flops_per_token, processes, device.type == "cuda"
        known = self.on_gpu and (given.gpu or given.bf16_tflops or gpu_of(torch.cuda.get_device_name()))
        self.peak = peak_flops(hardware(given), dtype) if known else None

    def values(self, step: int, result: StepResult, skipped: int) -> dict[str, Any]:
        """By name, of step `step` from 1; `skipped` counts the steps of the run that were not taken."""
        rate = result.tokens / result.seconds
        flops = rate * self.flops_per_token / self.processes
        return {
            "step": step,
            **result.terms,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "skipped": skipped,
            "tokens": result.tokens,
            "tokens_per_second": rate,
            "tokens_per_second_per_gpu": rate / self.processes,
            "tflops_per_gpu": flops / 1e12,
            **({"mfu": flops / self.peak} if self.peak else {}),
            "step_seconds": result.seconds,
            "data_seconds": result.data_seconds,
            **self._memory(),
        }

    def _memory(self) -> dict[str, float]:
        """GiB of rank 0: on its GPU now and at the most, or resident on a CPU."""
        if self.on_gpu:
            now, most = torch.cuda.memory_allocated(), peak_memory(self.graphs)
            return {"memory_gib": now / 2**30, "memory_peak_gib": most / 2**30}
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return {"resident_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}


class Metrics:
    """Takes one dictionary a step, with the key `step`, and shows and keeps it."""

    def __init__(
        self, folder: Path, options: LoggerConfig, config: dict[str, Any], steps: int, start: int, title: str
    ) -> None:
        self.active = speaks()
        self.interval, self.steps = options.interval, steps
        if not self.active:
            return
        self.file = folder / METRICS
        _cut_back(self.file, start)
        self.out = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run, closed by close())
        self.wandb = _start_wandb(folder, options, config)
        screen = console()
        shown = TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s", markup=False)
        self.bar = bars_with(screen, MofNCompleteColumn(), shown, disable=not screen.is_terminal)
        self.task = self.bar.add_task(one_line(title), total=steps, completed=start, loss="…", rate="…")
        self.bar.start()
        self.terminal, self.last_line = screen.is_terminal, 0.0
        self.began, self.first = time.monotonic(), start

    def add(self, values: dict[str, Any]) -> None:
        """Keep the values of a step; `tokens_per_second` and `loss` are shown."""
        if not self.active:
            return
        step, now = values["step"], time.monotonic()
        if "loss" in values:
            # Since this start of the run began its steps: what is saved and validated between them counts.
            values = {**values, "run_seconds": now - self.began}
        if step % self.interval == 0 or step == self.steps or "validation_loss" in values:
            self.out.write(json.dumps(values) + "\n")
            self.out.flush()
            if self.wandb is not None:
                self.wandb.log({k: v for k, v in values.items() if k != "step"}, step=step)
        if "loss" not in values:
            return
        loss, rate = f"{values['loss']:.4f}", f"{values['tokens_per_second']:,.0f}"
        self.bar.update(self.task, completed=step, loss=loss, rate=rate)
        if not self.terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or step == self.steps):
            self.last_line = now
            left = seconds_left(step, self.steps, self.first, now - self.began)
            log.info("step %d of %d: loss %s, %s tokens/s, %.0f s left", step, self.steps, loss, rate, left)

    def close(self) -> None:
        """End the bar, the file and wandb's run."""
        if not self.active:
            return
        self.bar.stop()
        self.out.close()
        if self.wandb is not None:
            self.wandb.finish()


def _cut_back(file: Path, step: int) -> None:
    """Drop lines after `step`, and a line that a killed run left unfinished."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    write_whole(file, "".join(line + "\n" for line in kept))


def _start_wandb(folder: Path, options: LoggerConfig, config: dict[str, Any]) -> Any:
    """wandb's run of this folder: its id is kept there, so that a restarted job continues it."""
    if options.wandb == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode = options.wandb
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    id_file = folder / "wandb_id.txt"
    if not id_file.is_file():
        write_whole(id_file, secrets.token_hex(4) + "\n")
    return wandb.init(
        project=options.project,
        name=options.name or folder.name,
        id=id_file.read_text().strip(),
        resume="allow",
        mode=mode,
        dir=str(folder),
        config=config,
    )
