"""`launch/distill.py`: a run folder from first check to the published student.

output/config.yaml, metrics.jsonl, checkpoints/, wandb/     while it trains; the same command continues it
output/model/                                               the student as a model folder, when it is done
"""

import contextlib
import logging
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from minitron_megatron.checkpoints.folder import WEIGHTS, ModelFolder, load_yaml, open_model_folder, output_folder
from minitron_megatron.checkpoints.hf import copy_companions, write_shape
from minitron_megatron.checkpoints.weights import WeightReader, check_weights, load_model, verify_digest, write_weights
from minitron_megatron.config import DistillConfig, flat
from minitron_megatron.console import print_table
from minitron_megatron.data.datasets import Data, DocumentMasks, Windows, open_data, training_samples, verify_data
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import command_line, resolved_config
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.build import build_model_chunks, check_layout, check_sequence, model_dtype, pick_engine
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout, parallel_job, pick_device
from minitron_megatron.train import checkpoint
from minitron_megatron.train.foresee import TENSOR_SIZES, foresee, listing_layouts
from minitron_megatron.train.loop import Distiller, StepResult, stop_on_signal
from minitron_megatron.train.metrics import Metrics
from minitron_megatron.train.optimizer import check_optimizer, wrap_and_optimize

log = logging.getLogger(__name__)
# What may differ between the command that began a run and the one that continues it.
_MAY_CHANGE = frozenset({"parallel", "device", "resume", "verify", "dry_run", "output", "logger", "cluster"})
_MAY_GROW = frozenset({"trainer.steps", "trainer.tokens"})


def distill(cfg: DistillConfig) -> None:
    """Check everything, train or continue, publish."""
    layout = Layout.from_config(cfg.parallel)
    steps = number_of_steps(cfg)
    teacher_shape, student_shape = (
        _shape(cfg.teacher, "teacher", cfg.dry_run),
        _shape(cfg.student, "student", cfg.dry_run),
    )
    check = partial(check_pair, teacher_shape, student_shape, cfg)
    with listing_layouts(cfg, layout, teacher_shape, student_shape, check):
        check(layout)
    run = Path(cfg.output)
    # A rehearsal of presets has no folders to look into.
    if not (cfg.dry_run and None in (cfg.teacher.path, cfg.student.path)):
        teacher, student, data = _inputs(cfg)
        check_run_folder(run, cfg)
    device = pick_device(cfg.device)
    if cfg.dry_run:
        foresee(cfg, layout, steps, teacher_shape, student_shape, check)
        return
    for name, model, shape in (("teacher", cfg.teacher, teacher_shape), ("student", cfg.student, student_shape)):
        engine = pick_engine(model.engine, layout, model_dtype(shape, cfg.precision), device, name)
        if engine == "te" and cfg.data.reset_attention_mask:
            raise UserError(f"data.reset_attention_mask needs Megatron's local layers: use {name}.engine=local")
    with parallel_job(layout, seed=cfg.seed, device=cfg.device) as job:
        check_optimizer(job.device)
        if cfg.verify:
            verify_digest(teacher)
            verify_digest(student)
            verify_data(data)
        inputs = {"teacher": teacher.digest, "student": student.digest, "data": data.digest}
        with output_folder(
            run / "model", command=command_line(), config=resolved_config(cfg), inputs=inputs, resume=cfg.resume
        ) as out:
            if out.done:
                return
            if collectives.is_rank_zero():
                (run / "checkpoints").mkdir(exist_ok=True)
                (run / "config.yaml").write_text(
                    yaml.safe_dump(resolved_config(cfg), sort_keys=False), encoding="utf-8"
                )
            collectives.barrier()
            results = _train(cfg, layout, steps, teacher, student, data)
            if results is None:
                raise SystemExit(0)
            out.results = results
            latest = checkpoint.find_checkpoints(run / "checkpoints")[-1][1]
            out.digest = publish(out.path / WEIGHTS, student_shape, latest)
            if collectives.is_rank_zero():
                write_shape(out.path, student_shape)
                copy_companions(student, out.path)
        print_table(f"{run / 'model'}: distilled", ["", "value"], list(results.items()))


def number_of_steps(cfg: DistillConfig) -> int:
    """Optimizer steps of the run. Raises UserError unless just one of steps and tokens is given."""
    trainer = cfg.trainer
    if (trainer.steps is None) == (trainer.tokens is None):
        raise UserError("give either trainer.steps= or trainer.tokens=")
    if trainer.steps is not None:
        return trainer.steps
    return math.ceil(trainer.tokens / (trainer.global_batch_size * cfg.data.sequence_length))


def _shape(model: Any, name: str, dry_run: bool) -> ModelShape:
    if model.path is None and dry_run:
        return ModelShape.from_dict(model.sizes(name), name)
    return open_model_folder(model.folder(name)).shape


def _inputs(cfg: DistillConfig) -> tuple[ModelFolder, ModelFolder, Data]:
    """Teacher, student and data, checked to be whole and to go together. Raises UserError."""
    teacher, student = (
        open_model_folder(cfg.teacher.folder("teacher")),
        open_model_folder(cfg.student.folder("student")),
    )
    check_weights(teacher)
    check_weights(student)
    masks = DocumentMasks(cfg.data.reset_attention_mask, cfg.data.eod_mask_loss)
    data = open_data(cfg.data.path, "train", student.shape, cfg.data.sequence_length, masks)
    if cfg.trainer.validation_samples:
        open_data(cfg.data.path, "validation", student.shape, cfg.data.sequence_length)
    return teacher, student, data


def check_pair(teacher: ModelShape, student: ModelShape, cfg: DistillConfig, layout: Layout) -> None:
    """Raise UserError when teacher, student, batch and layout do not go together."""
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher has a vocabulary of {teacher.vocab_size}, student of {student.vocab_size}: "
            "logits can only be compared over the same one"
        )
    check_layout(teacher, layout, "the teacher")
    check_layout(student, layout, "the student")
    check_sequence(cfg.data.sequence_length, layout)
    for name, shape in (("teacher", teacher), ("student", student)):
        if cfg.data.sequence_length > shape.max_position_embeddings:
            raise UserError(
                f"data.sequence_length={cfg.data.sequence_length} is above the {name}'s {shape.max_position_embeddings} positions"
            )
    batch, micro = cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size
    at_once = micro * layout.data * (layout.pipeline if layout.virtual_pipeline else 1)
    if batch % at_once:
        stages = " × pipeline stages" if layout.virtual_pipeline else ""
        fits = [str(n) for n in (batch // at_once * at_once, (batch // at_once + 1) * at_once) if n]
        fits += [f"parallel.tensor={n}" for n in _tensor_sizes_that_divide(teacher, student, batch // micro, layout)]
        raise UserError(
            f"trainer.global_batch_size={batch} is not a multiple of {at_once} (trainer.micro_batch_size={micro} × "
            f"{layout.data} data-parallel ranks{stages}): use {' or '.join(fits)}"
        )
    if cfg.optim.min_lr > cfg.optim.lr:
        raise UserError(f"optim.min_lr={cfg.optim.min_lr} is above optim.lr={cfg.optim.lr}")


def _tensor_sizes_that_divide(teacher: ModelShape, student: ModelShape, samples: int, layout: Layout) -> list[int]:
    """Other tensor-parallel sizes, up to 8, with which so many micro-batches divide over the data-parallel ranks."""
    found = []
    for tensor in TENSOR_SIZES:
        with contextlib.suppress(UserError):
            other = replace(layout, tensor=tensor)
            check_layout(teacher, other)
            check_layout(student, other)
            if samples % (other.data * (other.pipeline if other.virtual_pipeline else 1)) == 0:
                found.append(tensor)
    return found


def check_run_folder(run: Path, cfg: DistillConfig) -> None:
    """Raise UserError when the output folder holds another run, or something else."""
    # A run killed in its first moments leaves this alone.
    if not run.exists() or {path.name for path in run.iterdir()} <= {".model.partial"}:
        return
    if not (run / "config.yaml").is_file():
        raise UserError(f"output={run} exists and is not a run folder: choose another output=")
    if not cfg.resume:
        raise UserError(f"output={run} has a run in it and resume=false: remove it or choose another output=")
    before, now = flat(load_yaml(run / "config.yaml")), flat(resolved_config(cfg))
    differ = [k for k in now if k.split(".")[0] not in _MAY_CHANGE and before.get(k, now[k]) != now[k]]
    longer = [k for k in differ if k in _MAY_GROW and None not in (before[k], now[k]) and now[k] > before[k]]
    differ = [k for k in differ if k not in longer]
    if differ:
        first, *others = differ
        also = f" ({', '.join(others[:3])} too)" if others else ""
        raise UserError(
            f"output={run} holds a run with {first}={before[first]}, not {now[first]}{also}: "
            "give the same, or another output="
        )
    for key in longer:
        log.info(
            "%s grows from %s to %s: from here on the learning rate is that of the longer run",
            key,
            before[key],
            now[key],
        )


def _train(
    cfg: DistillConfig, layout: Layout, steps: int, teacher: ModelFolder, student: ModelFolder, data: Data
) -> dict[str, Any] | None:
    """Train to the last step and save; None when a signal stopped the run before (saved all the same)."""
    distiller, start = _prepare(cfg, layout, teacher, student)
    folder, trainer = Path(cfg.output) / "checkpoints", cfg.trainer
    length = cfg.data.sequence_length
    samples = training_samples(
        data, "train", sequence_length=length, seed=cfg.seed, count=steps * trainer.global_batch_size
    )
    windows = Windows(data, "validation", length) if trainer.validation_samples else None
    count = min(len(windows), trainer.validation_samples) if windows is not None else 0
    metrics = Metrics(Path(cfg.output), cfg.logger, resolved_config(cfg), steps, start)
    began, last, validation = time.monotonic(), None, {}
    try:
        with stop_on_signal(distiller):
            for step in range(start, steps):
                last = distiller.train_step(step, steps, samples)
                if not math.isfinite(last.loss):
                    raise UserError(f"step {step + 1}: the loss is {last.loss}; lower optim.lr or use precision=fp32")
                metrics.add(_values(step + 1, last, length))
                if count and trainer.validation_interval and (step + 1) % trainer.validation_interval == 0:
                    validation = distiller.validate(windows, count)
                    metrics.add({"step": step + 1, **validation})
                if last.stop or (step + 1) % trainer.save_interval == 0 or step + 1 == steps:
                    checkpoint.save(folder, distiller.chunks, distiller.optimizer, step + 1)
                if last.stop and step + 1 < steps:
                    log.warning(
                        "a signal stopped the run at step %d of %d: the same command continues it", step + 1, steps
                    )
                    return None
            if count and not (trainer.validation_interval and steps % trainer.validation_interval == 0 and validation):
                validation = distiller.validate(windows, count)
                metrics.add({"step": steps, **validation})
    finally:
        metrics.close()
    done = {} if last is None else {"loss": last.loss}
    return {
        **done,
        **validation,
        "steps": steps,
        "tokens": steps * trainer.global_batch_size * length,
        "seconds_since_start": round(time.monotonic() - began, 1),
        "parameters": count_parameters(student.shape),
    }


def _prepare(cfg: DistillConfig, layout: Layout, teacher: ModelFolder, student: ModelFolder) -> tuple[Distiller, int]:
    """Both models on this rank, the optimizer, and the step to begin with."""
    frozen = build_model_chunks(teacher.shape, layout, model_dtype(teacher.shape, cfg.precision), cfg.teacher.engine)
    load_model(frozen, teacher)
    chunks = build_model_chunks(student.shape, layout, model_dtype(student.shape, cfg.precision), cfg.student.engine)
    load_model(chunks, student)
    wrapped, optimizer = wrap_and_optimize(chunks, cfg.optim)
    start = 0
    there = checkpoint.find_checkpoints(Path(cfg.output) / "checkpoints")
    if there:
        start = checkpoint.load(there[-1][1], wrapped, optimizer)
        log.info("continuing from step %d (%s)", start, there[-1][1])
    pair = Teacher(frozen, pipelined=layout.pipeline > 1)
    return Distiller(wrapped, optimizer, pair, layout, cfg, student.shape.vocab_size), start


def _values(step: int, result: StepResult, length: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / result.seconds,
        "step_seconds": result.seconds,
    }


def publish(weights: Path, shape: ModelShape, saved: Path) -> str:
    """Stream the student's weights out of a training checkpoint into a model folder's; gives their digest."""
    reader = WeightReader(saved)

    def produce(chunk: Any) -> torch.Tensor:
        return reader.read_slot(chunk.slot, shape, chunk.start, chunk.stop)

    return write_weights(weights, shape, produce, "publish")
