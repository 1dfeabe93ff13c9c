"""The life of a run folder, whatever is trained: from the first check to the published model.

    check everything ──▶ train, or continue, ──▶ publish
                         saving as it goes

output/config.yaml, metrics.jsonl, checkpoints/, wandb/     while it trains; the same command continues it
output/run.json                                             which run it is, as its checkpoints say too (identity.py)
output/precision.json                                       what precision=auto was when it began (parallel/precision.py), until
                                                            there is a checkpoint, which says so itself
output/model/                                               what was trained as a model folder, when it is done

The commands (train/distill.py, train/correct_teacher.py) say in a `Recipe` which models there are and what is minimised;
checks.py has all that is checked before torch is there.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from minitron_megatron.asked import STARTED_IN
from minitron_megatron.automatic import (
    Built,
    Choice,
    agreed,
    choose_graphs,
    choose_overlaps,
    decided,
    is_on,
    reasons_of,
    said,
)
from minitron_megatron.changing import free_options
from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.folder import (
    DIVERGED,
    WEIGHTS,
    ModelFolder,
    output_folder,
)
from minitron_megatron.checkpoints.hf_folder import copy_companions, write_shape
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import Chunk, load_weights, verify_digest, write_weights
from minitron_megatron.cli.spelling import command_line
from minitron_megatron.config import (
    TrainingConfig,
    tokens_of_run,
)
from minitron_megatron.console import print_table
from minitron_megatron.data.datasets import Windows, training_samples
from minitron_megatron.data.folder import Data, verify_data
from minitron_megatron.data.windows import VALIDATED, taken
from minitron_megatron.ending import (
    STATUS_OF_SIGNAL,
    finish_whatever_comes,
    keeping,
    stop_together,
)
from minitron_megatron.errors import Diverged
from minitron_megatron.first_moments import REQUEUE
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.build import (
    build_model_chunks,
    check_document_masks,
    foretell_dtype,
    model_dtype,
    pick_engine,
)
from minitron_megatron.models.fp8 import check_fp8_device
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero, wait_until_seen
from minitron_megatron.parallel.job import Job, parallel_job, pick_device
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import FILE as COMPUTED_IN
from minitron_megatron.parallel.precision import asks_machine, keep, of_bfloat16, recalled, record
from minitron_megatron.plain_files import write_whole
from minitron_megatron.starts import record_start
from minitron_megatron.train import checkpoint, saved
from minitron_megatron.train.begin import EVERYTHING, advice_after_divergence, write_beginning
from minitron_megatron.train.begin import WEIGHTS as WEIGHTS_ALONE
from minitron_megatron.train.checks import (
    Checked,
    Models,
    Recipe,
    Shapes,
    schedule_of,
    what_is_trained,
)
from minitron_megatron.train.foresee import forecast, foresee
from minitron_megatron.train.loop import Trainer, stop_on_signal
from minitron_megatron.train.metrics import Metrics, StepMetrics
from minitron_megatron.train.optimizer import (
    check_optimizer,
    check_state_precision,
    gather_weights,
    set_adam,
    training_fields,
    wrap_and_optimize,
)
from minitron_megatron.train.overlap import check_overlap_device, user_buffers

log = logging.getLogger(__name__)


def run_training(cfg: TrainingConfig, checked: Checked) -> None:
    """Train what has been checked, or continue, and publish.

    Ends with exit status 75 when it was stopped before the last step, by a signal or its time limit: saved, and to be continued.
    With trainer.stop_after it ends there with status 0, saved and not published.
    """
    began = time.monotonic()
    recipe, layout, shapes, run = checked.recipe, checked.layout, checked.shapes, Path(cfg.output)
    folders, data, before = checked.folders, checked.data, checked.before
    device = pick_device(cfg.device)
    if cfg.dry_run:
        foresee(cfg, layout, checked.steps, checked.models, checked.check, before)
        foretell_dtype(cfg.precision, device, *shapes.values())
        return
    if cfg.precision == "auto" and device.type == "cpu":
        # What CPUs compute in is settled later; float32 takes more than the folder's own dtype, which was checked for.
        saved.check_room(run / "checkpoints", count_parameters(shapes[recipe.trained]), 4, cfg.trainer)
    with recalled(run / COMPUTED_IN, saved.computed_in(run / "checkpoints")):
        built = _check_device(cfg, recipe, shapes, layout, device)
        choices = decide(cfg, layout, checked.models, built, device, before)
    buffers = user_buffers(cfg.trainer, shapes[recipe.trained], layout, cfg.data.sequence_length)
    with parallel_job(layout, seed=cfg.seed, device=cfg.device) as job, buffers:
        check_optimizer(job.device)
        choices = agreed(collectives.all_gather_objects(choices))
        # Of a run that still trains ranks might have seen different checkpoints.
        beginning, inputs = ask_rank_zero(lambda: (checked.beginning, checked.inputs))
        checked = replace(checked, beginning=beginning, inputs=inputs)
        asked, lines, reasons = cfg, said(cfg, choices), reasons_of(cfg, choices)
        cfg = decided(cfg, choices)
        for line in lines:
            log.info("%s", line)
        check_copies(*(one.path for one in (*folders.values(), *data.folders)))
        if cfg.verify:
            for folder in folders.values():
                verify_digest(folder)
            verify_data(data)
        with (
            output_folder(
                run / "model",
                command=command_line(),
                config=resolved_config(cfg),
                inputs=checked.inputs,
                resume=cfg.resume,
                free=free_options(type(cfg)),
                reasons=reasons,
            ) as out,
            keeping(lambda: _what_is_saved(run / "checkpoints")),
        ):
            if out.done:
                return
            training = _Run(cfg, checked, job, began, _begin(cfg, checked, run))
            if collectives.is_rank_zero():
                record_start(run, training.start)
            try:
                done = training.train(data)
            except Diverged as error:
                in_bf16 = model_dtype(shapes[recipe.trained], cfg.precision) is torch.bfloat16
                advice = advice_after_divergence(asked, in_bf16=in_bf16)
                if collectives.is_rank_zero():
                    write_whole(run / DIVERGED, f"{error}\n{advice}\n")
                raise Diverged(f"{error}: {advice}") from None
            if not done:
                training.leave()
            finish_whatever_comes()
            published = training.to_publish()
            out.results, out.precision = training.results(published), record()
            out.started_from = asdict(checked.beginning) if checked.beginning else {}
            source = folders[recipe.trained]
            out.digest = publish(out.path / WEIGHTS, source.shape, published.path)
            if collectives.is_rank_zero():
                write_shape(out.path, source.shape)
                copy_companions(source, out.path, data.folders[0].path)
        print_table(f"{run / 'model'}: {recipe.verb}ed", ["", "value"], list(out.results.items()))


def _check_device(
    cfg: TrainingConfig, recipe: Recipe, shapes: Shapes, layout: Layout, device: torch.device
) -> list[Built]:
    """How each model is built on this device. Raises UserError where it cannot run as asked."""
    built = []
    for name, model in recipe.models.items():
        own, dtype = recipe.layout_of(name, layout), model_dtype(shapes[name], cfg.precision)
        engine = pick_engine(model.engine, own, dtype, device, name)
        check_document_masks(cfg.data.reset_attention_mask, engine, name)
        option, scaling = recipe.fp8_of(name)
        check_fp8_device(option, scaling, engine, dtype, device)
        built.append(Built(name, engine, dtype is torch.bfloat16))
        if name == recipe.trained:
            check_overlap_device(cfg.trainer.tp_comm_overlap, engine, dtype)
    check_state_precision(cfg.optim, model_dtype(shapes[recipe.trained], cfg.precision), device)
    return built


def decide(
    cfg: TrainingConfig,
    layout: Layout,
    models: Models,
    built: Sequence[Built],
    device: torch.device,
    before: Mapping[str, Any],
) -> list[Choice]:
    """What every option that is auto becomes on this rank; before its job is there, since memory is foreseen in a fake one.

    `built` says how each model is built here, `before` are the options of the run that is continued. Raises UserError for what
    was asked for and cannot be had.
    """

    def foreseen() -> Choice:
        has = torch.cuda.get_device_properties(device).total_memory / 2**30
        cluster = replace(cfg.cluster, memory_gib=min(has, cfg.cluster.memory_gib or has))
        return forecast(replace(cfg, cluster=cluster), layout, models, before).graphs

    graphs = choose_graphs(cfg, layout, built, before, foreseen)
    return [graphs, *choose_overlaps(cfg, layout, device.type, before)]


def _begin(cfg: TrainingConfig, checked: Checked, run: Path) -> saved.OfRun:
    """Have in the run folder what the run is; gives what its checkpoints say of it. Every rank calls it."""
    own = ask_rank_zero(lambda: write_beginning(cfg, run, checked.beginning))
    wait_until_seen(run / "checkpoints")
    dtype = None
    if asks_machine(cfg.precision, *(shape.dtype for shape in checked.shapes.values())):
        there = run / "checkpoints"
        keep(
            run / COMPUTED_IN,
            begun=lambda: bool(saved.find_checkpoints(there)),
            told=lambda: saved.computed_in(there),
        )
        dtype = of_bfloat16()
    return saved.OfRun(own, {STARTED_IN: os.getcwd(), **what_is_trained(cfg)}, checked.inputs, dtype)


def _what_is_saved(checkpoints: Path) -> str:
    """What a run that is ended at once has, and how it goes on."""
    there = saved.find_checkpoints(checkpoints)
    if not there:
        return "no step is saved yet; the same command starts the run again"
    return f"step {there[-1][0]} is the last that is saved; the same command continues from there"


class _Run:
    """A run between its checks and its end: the loop, its metrics and its checkpoints."""

    def __init__(self, cfg: TrainingConfig, checked: Checked, job: Job, began: float, of_run: saved.OfRun) -> None:
        recipe, folders = checked.recipe, checked.folders
        self.cfg, self.recipe, self.layout, self.began = cfg, recipe, job.layout, began
        self.beginning = checked.beginning
        self.schedule = schedule_of(cfg)
        # Where this start of the run ends, and whether it was asked to end before.
        self.end, self.asked_to_stop = min(self.schedule.steps, cfg.trainer.stop_after or self.schedule.steps), False
        self.folder = Path(cfg.output) / "checkpoints"
        self.shapes = {name: folder.shape for name, folder in folders.items()}
        self.saver = checkpoint.Saver(self.folder, job.layout, cfg.trainer, of_run)
        # What the step at `end` is found to be, by name.
        self.measured: dict[str, float] = {}
        self.loop, self.start = self._prepare(folders)
        # Windows of a validation: known once there are data.
        self.validated = 0
        dtype = model_dtype(self.shapes[recipe.trained], cfg.precision)
        length = cfg.data.sequence_length
        # Forward and twice that backward for the model that is trained, forward alone for the others.
        flops = sum((3 if n == recipe.trained else 1) * flops_per_token(s, length) for n, s in self.shapes.items())
        of_job = flops, job.layout.world_size, dtype, job.device, cfg.cluster
        self.of_step = StepMetrics(*of_job, graphs=is_on(cfg.trainer.cuda_graphs))

    def _prepare(self, folders: Mapping[str, ModelFolder]) -> tuple[Trainer, int]:
        """Objective, model and optimizer on this rank, and the step to begin with."""
        cfg, recipe, layout = self.cfg, self.recipe, self.layout
        there, first = checkpoint.newest(self.folder, verify=cfg.verify), self.beginning
        if there is not None:
            saved.check_readable(there, layout)
        elif first is not None:
            checkpoint.check_whole(Path(first.checkpoint), verify=cfg.verify)
        objective = recipe.objective(cfg, folders, layout)
        source = folders[recipe.trained]
        dtype = model_dtype(source.shape, cfg.precision)
        engine = recipe.models[recipe.trained].engine
        warm = first is not None and there is None and first.takes == WEIGHTS_ALONE
        chunks = build_model_chunks(source.shape, layout, dtype, engine, training_fields(cfg.trainer))
        load_weights(chunks, Path(first.checkpoint) if warm else source.weights)
        objective.attach(chunks)
        wrapped, optimizer = wrap_and_optimize(chunks, cfg.optim, cfg.ddp)
        loop, start = Trainer(wrapped, optimizer, objective, layout, cfg), 0
        if there is not None:
            start, guard, of_objective = checkpoint.load(there.path, wrapped, optimizer, cfg.trainer)
            loop.guard.load_state_dict(guard)
            objective.load_state_dict(of_objective)
            log.info("continuing from step %d (%s)", start, there.path)
        elif first and first.takes == EVERYTHING:
            start, guard, of_objective = checkpoint.load(Path(first.checkpoint), wrapped, optimizer, cfg.trainer)
            set_adam(optimizer, cfg.optim)
            if first.keeps_judging:
                loop.guard.load_state_dict({**guard, "in_a_row": 0})
                objective.load_state_dict(of_objective)
        if first and there is None:
            log.info("beginning with %s of %s, at step %d", first.takes, first.checkpoint, start)
        return loop, start

    def train(self, data: Data) -> bool:
        """Train to the end of this start and save; false when there are steps left."""
        cfg, steps, length = self.cfg, self.schedule.steps, self.cfg.data.sequence_length
        count = steps * cfg.trainer.global_batch_size
        samples = training_samples(data, "train", sequence_length=length, seed=cfg.seed, count=count)
        windows = Windows(data, "validation", length) if cfg.trainer.validation_samples else None
        if windows is not None:
            self.validated = taken(VALIDATED, cfg.trainer.validation_samples, len(windows), "validation")
        step = self.start - 1
        metrics = Metrics(Path(cfg.output), cfg.logger, resolved_config(cfg), steps, self.start, self.recipe.verb)
        try:
            with stop_on_signal(self.loop):
                for step in range(self.start, self.end):
                    self._look_at_the_clock()
                    last = self.loop.train_step(step, self.schedule, samples)
                    metrics.add(self.of_step.values(step + 1, last, self.loop.guard.skipped))
                    measured = self._validate_if_due(windows, step + 1)
                    if measured:
                        metrics.add({"step": step + 1, **measured})
                    self.measured = {"loss": last.loss, **measured}
                    self.saver.finish(wait=False)
                    self._save_if_due(step + 1, last.stop, self.measured)
                    if last.stop and step + 1 < self.end:
                        self.asked_to_stop = True
                        break
            if windows is not None and self.start == self.end:
                # Continued from where it was to end: what it ended with is measured again.
                self.measured = self._validate(windows)
                metrics.add({"step": self.end, **self.measured})
        finally:
            metrics.close()
        # The first process of a node that ends takes the others with it: rank 0 has its files written by now.
        collectives.barrier()
        self.reached = step + 1
        return not self.asked_to_stop and self.end == steps

    def leave(self) -> NoReturn:
        """End the process with steps left: they are for the same command, later."""
        steps = self.schedule.steps
        if self.asked_to_stop:
            status = STATUS_OF_SIGNAL[signal.SIGINT] if self.loop.any_interrupted else REQUEUE
            stop_together(f"at step {self.reached} of {steps}, which is saved: the same command continues it", status)
        log.info(
            "step %d of %d: as far as trainer.stop_after=%d goes", self.reached, steps, self.cfg.trainer.stop_after
        )
        raise SystemExit(0)

    def _look_at_the_clock(self) -> None:
        """Rank 0's alone: a stop that it asks for is told to all in the step (train/loop.py)."""
        limit = self.cfg.trainer.time_limit_minutes
        if collectives.is_rank_zero() and limit is not None:
            self.loop.stop_asked |= time.monotonic() - self.began > 60 * limit

    def _validate_if_due(self, windows: Windows | None, done: int) -> dict[str, float]:
        interval = self.cfg.trainer.validation_interval
        due = windows is not None and (done == self.end or (interval and done % interval == 0))
        return self._validate(windows) if due else {}

    def _validate(self, windows: Windows) -> dict[str, float]:
        found = self.loop.validate(windows, self.validated)
        if not math.isfinite(found["validation_loss"]):
            log.warning("the validation loss is %s: this is no model to go on with", found["validation_loss"])
        return found

    def _save_if_due(self, done: int, stop: bool, figures: Mapping[str, float]) -> None:
        """Save on the interval, at the end, before a stop, and at the lowest validation loss where that is kept."""
        trainer, best = self.cfg.trainer, False
        if trainer.keep_best and "validation_loss" in figures:
            self.saver.finish()  # it may be the best one so far
            before = ask_rank_zero(lambda: saved.find_best(self.folder))
            loss = figures["validation_loss"]
            best = math.isfinite(loss) and (before is None or loss < before[1])
        if not best and not stop and done % trainer.save_interval and done < self.end:
            return
        gather_weights(self.loop.chunks)
        self.saver.save(
            self.loop.chunks,
            self.loop.optimizer,
            done,
            guard=self.loop.guard.state_dict(),
            objective=self.loop.objective.state_dict(),
            figures=figures,
        )
        if stop or done == self.end:
            self.saver.finish()

    def results(self, published: saved.Checkpoint) -> dict[str, Any]:
        """The manifest's: figures of the step that is published, and what the run took."""
        return {
            **saved.figures_of(published.path, published.written),
            **(self.measured if published.step == self.end else {}),
            "published_step": published.step,
            **self.loop.objective.results(),
            "steps": self.schedule.steps,
            "skipped": self.loop.guard.skipped,
            "tokens": tokens_of_run(self.cfg),
            "seconds_since_start": round(time.monotonic() - self.began, 1),
            "parameters": count_parameters(self.shapes[self.recipe.trained]),
        }

    def to_publish(self) -> saved.Checkpoint:
        """The checkpoint that becomes the model. Raises UserError where the best one has been damaged since."""
        if self.cfg.trainer.publish == "best":
            best, loss = ask_rank_zero(lambda: saved.best_whole(self.folder))
            if (reason := checkpoint.other_bytes(best)) is not None:
                raise saved.best_is_damaged(best.path, reason)
            log.info("publishing %s, whose validation loss is %.4f", best.path.name, loss)
            return best
        return ask_rank_zero(lambda: saved.whole(saved.find_checkpoints(self.folder)[-1][1]))


def publish(weights: Path, shape: ModelShape, saved: Path) -> str:
    """Stream the model's weights out of a training checkpoint into a model folder's; gives their digest."""
    reader = WeightReader(saved)

    def fill(chunk: Chunk, out: torch.Tensor) -> None:
        out.copy_(reader.read_slot(chunk.slot, shape, chunk.start, chunk.stop))

    return write_weights(weights, shape, fill, "publish")
