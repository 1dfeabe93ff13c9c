"""One training step after another, through Megatron's schedules: any pipeline, any split of the batch, one result.

    step:  micro-batches ─▶ teacher (ahead, or beside) ─▶ student forward and backward ─▶ sum over ranks ─▶ AdamW

Every loss is a sum over tokens, divided once by the step's global token count, so it does not depend on how the batch was
split over ranks and micro-batches.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from minitron_megatron.config import DistillConfig
from minitron_megatron.data.datasets import MicroBatches, Samples
from minitron_megatron.distill.losses import vocab_parallel_kl
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.forward import Batch, attention_mask, forward_only
from minitron_megatron.models.vocab_parallel import vocab_parallel_nll
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.optimizer import set_learning_rate
from minitron_megatron.train.schedule import learning_rate

# Micro-batches of a validation that run through the pipeline together, at least.
VALIDATION_ROUND = 8


@dataclass
class StepResult:
    """What a step did."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    stop: bool


class Distiller:
    """Student, teacher and optimizer of this rank."""

    def __init__(
        self, chunks: list[Any], optimizer: Any, teacher: Teacher, layout: Layout, cfg: DistillConfig, vocab_size: int
    ) -> None:
        self.chunks, self.optimizer, self.teacher = chunks, optimizer, teacher
        self.layout, self.cfg, self.vocab_size = layout, cfg, vocab_size
        self.stop_asked = False

    def micro_batches(self, samples: Samples, numbers: range) -> MicroBatches:
        """This rank's share of some samples."""
        return MicroBatches.of_this_rank(samples, numbers, self.cfg.trainer.micro_batch_size, self.layout)

    def train_step(self, step: int, steps: int, samples: Samples) -> StepResult:
        """Optimizer step `step` (from 0) of `steps`."""
        began = time.monotonic()
        size = self.cfg.trainer.global_batch_size
        batches = [_on_device(b) for b in self.micro_batches(samples, range(step * size, (step + 1) * size))]
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.forward_backward(batches)
        lr = learning_rate(step, steps, self.cfg.optim)
        set_learning_rate(self.optimizer, lr, self.cfg.optim.weight_decay)
        _, grad_norm, _ = self.optimizer.step()
        total, tokens, stop = collectives.sum_from_last_stage(sums, [float(self.stop_asked)])
        seconds = time.monotonic() - began
        return StepResult(total / tokens, float(grad_norm or 0.0), lr, int(tokens), seconds, stop > 0)

    def forward_backward(self, batches: list[Batch]) -> tuple[float, float]:
        """Gradients of a step's micro-batches; gives the sums of loss and tokens seen on this (last) stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.teacher.run_ahead(batches)
        size, length = batches[0]["tokens"].shape
        iterators = [iter(batches) for _ in self.chunks]
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=length * self.layout.context,
            micro_batch_size=size,
            forward_only=False,
        )
        loss = sum(float(result["loss"]) for result in results)
        return loss, sum(float(result["tokens"]) for result in results)

    def _forward_step(self, data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(data)
        out = model(
            batch["tokens"],
            batch["position_ids"],
            attention_mask(batch),
            output_processor=self._kl,
            output_processor_context=batch,
        )

        def loss_func(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            mask = batch["loss_mask"].t()
            loss, tokens = (per_token * mask).sum(), mask.sum().int()
            return loss, tokens, {"loss": loss.detach(), "tokens": tokens}

        return out, loss_func

    def _kl(
        self, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, context: Batch, **_: Any
    ) -> torch.Tensor:
        """Per-token KL [s, b] of a micro-batch, on the last stage."""
        from megatron.core import parallel_state as ps

        teacher = self.teacher.logits(context)
        student, _ = output_layer(hidden_states, weight=output_weight)
        return vocab_parallel_kl(
            student,
            teacher,
            vocab_size=self.vocab_size,
            temperature=self.cfg.distill.temperature,
            group=ps.get_tensor_model_parallel_group(),
        )

    def validate(self, samples: Samples, count: int) -> dict[str, float]:
        """Mean KL to the teacher and perplexity over the first `count` samples; the same figure in any layout."""
        from megatron.core import parallel_state as ps

        group = ps.get_tensor_model_parallel_group()

        def collect(
            batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any
        ) -> torch.Tensor:
            logits, _ = output_layer(hidden_states, weight=output_weight)
            teacher, mask = self.teacher.logits(batch), batch["loss_mask"].t()
            kl = vocab_parallel_kl(logits, teacher, vocab_size=self.vocab_size, group=group)
            nll = vocab_parallel_nll(logits, batch["labels"].t().contiguous(), vocab_size=self.vocab_size, group=group)
            return torch.stack(((kl * mask).sum(), (nll * mask).sum(), mask.sum()))

        models = [chunk.module for chunk in self.chunks]
        batches = [_on_device(b) for b in self.micro_batches(samples, range(count))]
        sums = torch.zeros(3, dtype=torch.float64)
        # The interleaved schedule takes whole multiples of its stages only.
        stages = self.layout.pipeline if self.layout.virtual_pipeline else 1
        at_once = math.ceil(VALIDATION_ROUND / stages) * stages
        for start in range(0, len(batches), at_once):
            part = batches[start : start + at_once]
            self.teacher.run_ahead(part)
            collected = forward_only(
                models,
                part,
                num_micro_batches=len(part),
                micro_batch_size=self.cfg.trainer.micro_batch_size,
                sequence_length=self.cfg.data.sequence_length,
                collect=collect,
            )
            sums += sum((c.double().cpu() for c in collected), torch.zeros(3, dtype=torch.float64))
        kl, nll, tokens = collectives.sum_from_last_stage(sums.tolist())
        perplexity = float(torch.tensor(nll / tokens, dtype=torch.float64).exp())
        return {"validation_loss": kl / tokens, "validation_perplexity": perplexity}


def _on_device(batch: Batch) -> Batch:
    return {name: tensor.to(torch.cuda.current_device()) for name, tensor in batch.items()}


@contextmanager
def stop_on_signal(distiller: Distiller) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (what Slurm sends before a limit) ask for a stop after the step that is running."""

    def ask(_: int, __: Any) -> None:
        distiller.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
