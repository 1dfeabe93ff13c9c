"""A distillation step between random models: time, memory and what the dry run says of both; beside it one with ModelOpt's loss.

Everything is what `launch/distill.py` runs (Megatron's schedule, data parallelism and optimizer, the loss), on random tokens.
"""

import statistics
import time
from typing import Any

import torch

from minitron_megatron.benchmark.common import source_and_target
from minitron_megatron.benchmark.peers import can_run, modelopt_loss
from minitron_megatron.checkpoints.random_model import STANDARD_DEVIATION
from minitron_megatron.config import (
    BenchmarkConfig,
    DistillConfig,
    DistillOptions,
    LoggerConfig,
    OptimConfig,
    TrainerConfig,
    TrainingDataConfig,
)
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.axes import flops_per_token
from minitron_megatron.models.build import build_model_chunks, model_dtype, pick_engine
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.fp8 import check_fp8_device, fp8_fields
from minitron_megatron.models.head import Summed
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.hardware import gpu_of, hardware, peak_flops
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.distill import check_pair
from minitron_megatron.train.foresee import Models, forecast
from minitron_megatron.train.loop import Trainer
from minitron_megatron.train.optimizer import check_state_precision, training_fields, wrap_and_optimize
from minitron_megatron.train.schedule import Schedule


def foreseen_step(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """What a dry run says of it: GiB of the fullest rank and seconds. Before the job is there: models are built in a fake one."""
    teacher, student = source_and_target(cfg)
    run, engine = _run_config(cfg, layout), cfg.model.engine
    check_pair(teacher, student, run, layout)
    planned = forecast(run, layout, Models(student, engine, teacher, engine, lambda one: one))
    return {"foreseen_gib": planned.gib, "foreseen_seconds": planned.step.total}


def distillation_step(cfg: BenchmarkConfig, layout: Layout) -> dict[str, Any]:
    """Median seconds of a step of `model=` teaching its `target=`, tokens/s and MFU of a GPU, peak GiB.

    With `peers`, on one GPU, the same with ModelOpt's loss over whole logits, and how much faster ours is.
    """
    teacher, student = source_and_target(cfg)
    run = _run_config(cfg, layout)
    check_pair(teacher, student, run, layout)
    trainer = _trainer(run, teacher, student, layout, cfg.model.engine)
    samples = RandomTokens(student.vocab_size, cfg.sequence_length, cfg.seed)
    found = _figures(_timed(trainer, samples, cfg), run, teacher, student, layout)
    if cfg.peers and can_run("modelopt") and layout.world_size == 1:
        trainer.objective = _ModelOpt(trainer.objective.teacher, student.vocab_size)
        theirs = _figures(_timed(trainer, samples, cfg), run, teacher, student, layout)
        found |= {f"modelopt_{name}": value for name, value in theirs.items() if name != "tokens"}
        found["tokens_per_second_over_modelopt"] = theirs["seconds"] / found["seconds"]
        if "peak_gib" in found:
            found["peak_over_modelopt"] = found["peak_gib"] / theirs["peak_gib"]
    return found


def _run_config(cfg: BenchmarkConfig, layout: Layout) -> DistillConfig:
    """The distillation that a step is of."""
    step = cfg.step
    size = step.micro_batches * cfg.micro_batch_size * layout.data
    return DistillConfig(
        output=cfg.output,
        seed=cfg.seed,
        precision=cfg.precision,
        parallel=cfg.parallel,
        data=TrainingDataConfig(path="", sequence_length=cfg.sequence_length),
        trainer=TrainerConfig(
            steps=1000,
            global_batch_size=size,
            micro_batch_size=cfg.micro_batch_size,
            recompute=step.recompute,
            fp8=step.fp8,
            fp8_bf16_layers=step.fp8_bf16_layers,
        ),
        optim=OptimConfig(state_precision=step.state_precision),
        logger=LoggerConfig(interval=1000),
        distill=DistillOptions(
            teacher_fp8=step.teacher_fp8, teacher_head_fp8=step.teacher_head_fp8, logits_mib=step.logits_mib
        ),
    )


def _trainer(run: DistillConfig, teacher: ModelShape, student: ModelShape, layout: Layout, engine: str) -> Trainer:
    """Random models in this layout, set up as a run would set them up."""
    dtype, device = model_dtype(student, run.precision), torch.device(torch.cuda.current_device())
    for option, scaling in (("step.fp8", run.trainer.fp8), ("step.teacher_fp8", run.distill.teacher_fp8)):
        check_fp8_device(option, scaling, pick_engine(engine, layout, dtype, device), dtype, device)
    check_state_precision(run.optim, dtype, device)
    with torch.no_grad():
        frozen = build_model_chunks(teacher, layout, dtype, engine, fp8_fields(run.distill.teacher_fp8, frozen=True))
        _draw(frozen)
    chunks = build_model_chunks(student, layout, dtype, engine, training_fields(run.trainer))
    _draw(chunks)
    beside = Teacher(frozen, pipelined=layout.pipeline > 1, head_fp8=run.distill.teacher_head_fp8)
    objective = Distillation(beside, run.distill, student.vocab_size)
    wrapped, optimizer = wrap_and_optimize(chunks, run.optim, run.ddp)
    return Trainer(wrapped, optimizer, objective, layout, run)


@torch.no_grad()
def _draw(chunks: list[torch.nn.Module]) -> None:
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        drawn = torch.randn(parameter.shape, dtype=torch.bfloat16, device=torch.cuda.current_device())
        # Weights that are kept in FP8 are rounded when they are copied to.
        parameter.copy_(drawn.mul_(STANDARD_DEVIATION).add_(1.0 if parameter.dim() == 1 else 0.0))


def _timed(trainer: Trainer, samples: "RandomTokens", cfg: BenchmarkConfig) -> tuple[float, float]:
    """Median seconds of a step, and GiB at the most."""
    schedule = Schedule.of_run(trainer.cfg.optim, 1000, 1)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = []
    for step in range(cfg.repeats + 3):
        torch.cuda.synchronize()
        collectives.barrier()
        began = time.perf_counter()
        if cfg.step.optimizer:
            trainer.train_step(step, schedule, samples)
        else:
            batches = trainer.micro_batches(samples, range(trainer.cfg.trainer.global_batch_size))
            here = torch.cuda.current_device()
            trainer.forward_backward([{name: t.to(here) for name, t in batch.items()} for batch in batches])
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return statistics.median(found[3:]), peak


def _figures(
    measured: tuple[float, float], run: DistillConfig, teacher: ModelShape, student: ModelShape, layout: Layout
) -> dict[str, float]:
    seconds, peak = measured
    length = run.data.sequence_length
    tokens = run.trainer.global_batch_size * length
    rate = tokens / seconds / layout.world_size
    found = {"tokens": tokens, "seconds": seconds, "tokens_per_second_per_gpu": rate}
    if torch.cuda.is_available():
        found["peak_gib"] = peak
        if gpu_of(torch.cuda.get_device_name()):
            flops = 3 * flops_per_token(student, length) + flops_per_token(teacher, length)
            # Of bf16's peak, whatever is computed in FP8.
            found["mfu"] = rate * flops / peak_flops(hardware(run.cluster), model_dtype(student, run.precision))
    return found


class RandomTokens:
    """Samples of random tokens, by number."""

    def __init__(self, vocab_size: int, length: int, seed: int) -> None:
        self.vocab_size, self.length, self.seed = vocab_size, length, seed

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed * 2**31 + index)
        tokens = torch.randint(0, self.vocab_size, (self.length + 1,), generator=draw)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": torch.arange(self.length),
            "loss_mask": torch.ones(self.length),
        }


class _ModelOpt(Distillation):
    """ModelOpt's loss of whole logits, in the same loop with the same models."""

    def __init__(self, teacher: Teacher, vocab_size: int) -> None:
        super().__init__(teacher, DistillOptions(), vocab_size)
        self.loss = modelopt_loss()

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Summed:
        targets = self.teacher.targets(batch, "train")
        student, _ = output_layer(hidden_states, weight=output_weight)
        theirs = targets.logits().view(*student.shape[:-1], -1)
        loss = self.loss(student, theirs)[0].t()
        return Summed((loss * batch["loss_mask"].t()).sum(), {"loss": loss.detach()})
