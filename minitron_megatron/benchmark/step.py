"""A distillation step between random models: time, memory and what the dry run says of both; beside it ModelOpt's.

Everything is what `launch/distill.py` runs (Megatron's schedule, data parallelism and optimizer, the loss), on random tokens.
ModelOpt's is its loss of whole logits in bf16, in Megatron's own step: its division of gradients, its clipping, its settings of
rotary embeddings; layers, schedule and AdamW are ours.
"""

import gc
import itertools
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from minitron_megatron.automatic import Built, is_on
from minitron_megatron.benchmark.checks import source_and_target
from minitron_megatron.benchmark.peers import can_run, modelopt_loss
from minitron_megatron.benchmark.weights import draw_weights, drawn_teacher
from minitron_megatron.config import (
    BenchmarkConfig,
    DdpConfig,
    DistillConfig,
    DistillOptions,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    TeacherParallelConfig,
    TrainerConfig,
    TrainingDataConfig,
)
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.axes import flops_per_token
from minitron_megatron.models.build import build_model_chunks, model_dtype, pick_engine
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.fp8 import check_fp8_device
from minitron_megatron.models.graphs import peak_memory
from minitron_megatron.models.head import Summed
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.hardware import gpu_of, hardware, peak_flops
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import Models
from minitron_megatron.train.distill import build_teacher
from minitron_megatron.train.distill_checks import check_pair, teacher_layout
from minitron_megatron.train.foresee import forecast
from minitron_megatron.train.loop import StepResult, Trainer
from minitron_megatron.train.optimizer import (
    check_state_precision,
    set_learning_rate,
    training_fields,
    wrap_and_optimize,
)
from minitron_megatron.train.overlap import check_overlap_device, user_buffers
from minitron_megatron.train.run import decide
from minitron_megatron.train.schedule import Schedule


@dataclass(frozen=True)
class Case:
    """A step that can be foreseen and measured: `model=` teaches its `target=` in a layout.

    `micro_batches` counts those of a data-parallel rank; the teacher is in the student's layout but for `teacher_parallel`;
    `overlap` has data-parallel transfers, and those of sequence parallelism, run beside arithmetic.
    """

    cfg: BenchmarkConfig
    layout: Layout
    micro_batches: int
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    overlap: bool = False

    @classmethod
    def of(cls, cfg: BenchmarkConfig, layout: Layout) -> "Case":
        """As the options say it."""
        return cls(cfg, layout, cfg.step.micro_batches, overlap=cfg.step.overlap)

    @property
    def shapes(self) -> tuple[ModelShape, ModelShape]:
        """Teacher and student."""
        return source_and_target(self.cfg)

    @property
    def run(self) -> DistillConfig:
        """The distillation that it is a step of."""
        return _run_config(self)

    def check(self) -> None:
        """Raise UserError when models, batch and layout do not go together."""
        check_pair(*self.shapes, self.run, self.layout)

    def check_device(self, device: torch.device) -> None:
        """Raise UserError for what this device cannot do."""
        run, dtype = self.run, model_dtype(self.shapes[1], self.cfg.precision)
        engine = pick_engine(self.cfg.model.engine, self.layout, dtype, device)
        for option, scaling in (("step.fp8", run.trainer.fp8), ("step.teacher_fp8", run.distill.teacher_fp8)):
            check_fp8_device(option, scaling, engine, dtype, device)
        check_overlap_device(run.trainer.tp_comm_overlap, engine, dtype)
        check_state_precision(run.optim, dtype, device)

    def foreseen(self) -> dict[str, float]:
        """What a dry run says of it; see `foreseen_step`."""
        self.check()
        planned = forecast(self.run, self.layout, self._models)
        return {"foreseen_gib": planned.gib, "foreseen_seconds": planned.step.total}

    def settled(self, device: torch.device) -> "Case":
        """The same with step.cuda_graphs as auto becomes on this device. Before the job is there. Raises UserError."""
        dtype = model_dtype(self.shapes[1], self.cfg.precision)
        built = [
            Built("model", pick_engine(self.cfg.model.engine, self.layout, dtype, device), dtype is torch.bfloat16)
        ]
        graphs, *_ = decide(self.run, self.layout, self._models, built, device, {})
        return replace(self, cfg=replace(self.cfg, step=replace(self.cfg.step, cuda_graphs=graphs.value)))

    @property
    def _models(self) -> Models:
        (teacher, student), engine = self.shapes, self.cfg.model.engine
        return Models(student, engine, teacher, engine, partial(teacher_layout, self.run))

    def buffers(self) -> AbstractContextManager[None]:
        """What overlapped transfers need, around the trainer."""
        return user_buffers(self.run.trainer, self.shapes[1], self.layout, self.cfg.sequence_length)

    def trainer(self) -> Trainer:
        """Random models in this layout, set up as a run would set them up. In a job of the layout."""
        self.check()
        self.check_device(torch.device(torch.cuda.current_device()))
        return _trainer(self)


@dataclass(frozen=True)
class Timed:
    """Median seconds of a step on this rank, its GiB at the most, and the loss of the first step, over all ranks' tokens."""

    seconds: float
    peak_gib: float
    loss: float


def settled_step(cfg: BenchmarkConfig, layout: Layout, device: torch.device) -> BenchmarkConfig:
    """The options of a step with what is auto decided; see `Case.settled`."""
    return Case.of(cfg, layout).settled(device).cfg


def foreseen_step(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """What a dry run says of it: GiB of the fullest rank and seconds. Before the job is there: models are built in a fake one."""
    return Case.of(cfg, layout).foreseen()


def distillation_step(cfg: BenchmarkConfig, layout: Layout) -> dict[str, Any]:
    """Median seconds of a step of `model=` teaching its `target=`, tokens/s and MFU of a GPU, peak GiB.

    With `peers`, on one GPU, ModelOpt's step in bf16 before it, and how much faster and smaller ours is.
    """
    case = Case.of(cfg, layout)
    beside = cfg.peers and can_run("modelopt") and layout.world_size == 1
    theirs = _modelopts_figures(case) if beside else {}
    with case.buffers():
        found = figures(case, timed(case, case.trainer()))
    if not beside:
        return found
    if not theirs:
        return {**found, "modelopt": "out of memory"}
    found |= {f"modelopt_{name}": value for name, value in theirs.items() if name != "tokens"}
    found["tokens_per_second_over_modelopt"] = theirs["seconds"] / found["seconds"]
    if "peak_gib" in found:
        found["peak_over_modelopt"] = found["peak_gib"] / theirs["peak_gib"]
    return found


def _modelopts_figures(case: Case) -> dict[str, float]:
    """Those of ModelOpt's step of the same models, in bf16 whatever ours is in; none where it does not fit."""
    step = replace(
        case.cfg.step, fp8="none", fp8_bf16_layers=0, teacher_fp8="none", teacher_head_fp8=False, cuda_graphs=False
    )
    case = replace(case, cfg=replace(case.cfg, step=step))
    # Before any model is there: ModelOpt keeps errors of its optional imports, and with them the frames that they passed.
    theirs = _modelopts_trainer(case, modelopt_loss())
    try:
        return figures(case, timed(case, theirs))
    except torch.OutOfMemoryError:
        return {}
    finally:
        let_go(theirs)


def _modelopts_trainer(case: Case, loss: Any) -> Trainer:
    """A case's models with ModelOpt's loss, in Megatron's own step."""
    ours = case.trainer()
    teacher = ours.objective.teacher
    for module in (module for chunk in (*ours.chunks, *teacher.chunks) for module in chunk.modules()):
        if hasattr(module, "config"):
            module.config.fused_single_qkv_rope = False
    objective = _ModelOpt(teacher, case.shapes[1].vocab_size, loss)
    return MegatronsTrainer(ours.chunks, ours.optimizer, objective, ours.layout, ours.cfg)


def _run_config(case: Case) -> DistillConfig:
    cfg, step = case.cfg, case.cfg.step
    size = case.micro_batches * cfg.micro_batch_size * case.layout.data
    return DistillConfig(
        output=cfg.output,
        seed=cfg.seed,
        precision=cfg.precision,
        parallel=cfg.parallel,
        cluster=cfg.cluster,
        teacher=ModelConfig(engine=cfg.model.engine),
        data=TrainingDataConfig(path="", sequence_length=cfg.sequence_length),
        trainer=TrainerConfig(
            steps=1000,
            global_batch_size=size,
            micro_batch_size=cfg.micro_batch_size,
            recompute=step.recompute,
            fp8=step.fp8,
            fp8_bf16_layers=step.fp8_bf16_layers,
            cuda_graphs=step.cuda_graphs,
            tp_comm_overlap=case.overlap and case.layout.sequence,
        ),
        ddp=DdpConfig(overlap_grad_reduce=case.overlap, overlap_param_gather=case.overlap),
        optim=OptimConfig(state_precision=step.state_precision),
        logger=LoggerConfig(interval=1000),
        distill=DistillOptions(
            teacher_fp8=step.teacher_fp8,
            teacher_head_fp8=step.teacher_head_fp8,
            logits_mib=step.logits_mib,
            teacher_parallel=case.teacher_parallel,
        ),
    )


def _trainer(case: Case) -> Trainer:
    (teacher, student), run, layout, engine = case.shapes, case.run, case.layout, case.cfg.model.engine
    beside = build_teacher(run, drawn_teacher(teacher, run.seed), layout)
    dtype = model_dtype(student, run.precision)
    chunks = build_model_chunks(student, layout, dtype, engine, training_fields(run.trainer))
    draw_weights(student, run.seed + 1, chunks)
    objective = Distillation(beside, run.distill, student.vocab_size)
    wrapped, optimizer = wrap_and_optimize(chunks, run.optim, run.ddp)
    return Trainer(wrapped, optimizer, objective, layout, run)


def timed(case: Case, trainer: Trainer) -> Timed:
    """Run the case's steps, one after another as in training, after three to warm up.

    A step lasts until the next one can begin: what the GPU still does then, the next one waits for.
    """
    cfg = case.cfg
    samples = RandomTokens(case.shapes[1].vocab_size, cfg.sequence_length, cfg.seed)
    schedule = Schedule.of_run(trainer.cfg.optim, 1000, 1)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ends, losses = [], []
    for step in range(cfg.repeats + 3):
        if cfg.step.optimizer:
            losses.append(trainer.train_step(step, schedule, samples).loss)
        else:
            terms, *_ = trainer.forward_backward(trainer.batches_of_step(0, samples))
            losses.append(terms["loss"])
        ends.append(time.perf_counter())
    torch.cuda.synchronize()
    found = [after - before for before, after in itertools.pairwise(ends)]
    peak = peak_memory(is_on(cfg.step.cuda_graphs)) / 2**30 if torch.cuda.is_available() else 0.0
    return Timed(statistics.median(found[2:]), peak, losses[0])


def let_go(trainer: Trainer) -> None:
    """Free what a trainer that is no longer used holds, the GPU's memory too.

    Megatron keeps the rotary embeddings that it was last asked for; and its optimizer's shards are views of the parameters, by
    whose nodes of autograd, and the hooks on these, it is a cycle that Python cannot collect.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for optimizer in (trainer.optimizer, *getattr(trainer.optimizer, "chained_optimizers", ())):
        vars(optimizer).clear()
    vars(trainer).clear()
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


def figures(case: Case, measured: Timed) -> dict[str, float]:
    """Seconds, tokens/s and MFU of a GPU, GiB, and the first step's loss."""
    (teacher, student), run, layout = case.shapes, case.run, case.layout
    seconds, length = measured.seconds, run.data.sequence_length
    tokens = run.trainer.global_batch_size * length
    rate = tokens / seconds / layout.world_size
    found = {"tokens": tokens, "seconds": seconds, "tokens_per_second_per_gpu": rate, "loss": measured.loss}
    found["cuda_graphs"] = is_on(case.cfg.step.cuda_graphs)
    if torch.cuda.is_available():
        found["peak_gib"] = measured.peak_gib
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


class MegatronsTrainer(Trainer):
    """A trainer whose step ends as Megatron's own loop does: gradients divided in their buffers, then the optimizer's `step`."""

    def train_step(self, step: int, schedule: Schedule, samples: Any) -> StepResult:
        """Optimizer step `step` (from 0) of a schedule."""
        began, batches = time.monotonic(), self.batches_of_step(step, samples)
        self._drop_gradients()
        terms, tokens, stop = self.forward_backward(batches)
        for chunk in self.chunks:
            chunk.scale_gradients(torch.tensor(1 / tokens, device=torch.cuda.current_device()))
        lr = schedule.learning_rate(step)
        set_learning_rate(self.optimizer, lr, self.cfg.optim.weight_decay)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(terms, float(grad_norm), lr, tokens, time.monotonic() - began, 0.0, True, stop)


class _ModelOpt(Distillation):
    """ModelOpt's loss of whole logits, in the same loop with the same models."""

    def __init__(self, teacher: Teacher, vocab_size: int, loss: Any) -> None:
        super().__init__(teacher, DistillOptions(), vocab_size)
        self.loss = loss

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Summed:
        targets = self.teacher.targets(batch, "train")
        student, _ = output_layer(hidden_states, weight=output_weight)
        theirs = targets.logits().view(*student.shape[:-1], -1)
        loss = self.loss(student, theirs)[0].t()
        return Summed((loss * batch["loss_mask"].t()).sum(), {"loss": loss.detach()})
