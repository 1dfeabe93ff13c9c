"""One training step after another, through Megatron's schedules: any pipeline, any split of the batch, one result.

    step:  micro-batches ─▶ objective prepares ─▶ forward and backward ─▶ sums over ranks ─▶ spike guard ─▶ division, AdamW
                            (a teacher ahead)     (objective: terms)

Where an objective prepares only so many micro-batches at once, forward and backward go in rounds of them (rounds.py).
What is minimised is an objective's affair (models/objective.py). Every term is a sum over tokens, divided once by the step's
global token count, so it does not depend on how the batch was split over ranks and micro-batches.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from minitron_megatron.automatic import is_on
from minitron_megatron.claims import say_from_rank_zero
from minitron_megatron.config import TrainingConfig
from minitron_megatron.data.datasets import MicroBatches, Samples
from minitron_megatron.first_moments import STATUS_OF_SIGNAL
from minitron_megatron.models.forward import Batch, attention_mask, forward_only, on_device
from minitron_megatron.models.fp8 import ScalesBefore
from minitron_megatron.models.graphs import capture_layers
from minitron_megatron.models.head import Summed
from minitron_megatron.models.objective import VALIDATION_TERMS, Objective
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.readers import leave_lost_readers
from minitron_megatron.train.guard import SpikeGuard
from minitron_megatron.train.optimizer import apply_gradients, gather_weights, gradient_norm, set_learning_rate
from minitron_megatron.train.rounds import Rounds
from minitron_megatron.train.schedule import Schedule

# Micro-batches of a validation that run through the pipeline together, at least.
VALIDATION_ROUND = 8


@dataclass
class StepResult:
    """What a step did: the mean of every term over its tokens, by name, and the rest.

    `taken` is false where the spike guard left parameters and optimizer as they were; `stop` says that a rank was asked to stop.
    """

    terms: dict[str, float]
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    data_seconds: float
    taken: bool
    stop: bool

    @property
    def loss(self) -> float:
        """The term that carried the gradient."""
        return self.terms["loss"]


class Trainer:
    """Model, optimizer and objective of this rank."""

    def __init__(
        self, chunks: list[Any], optimizer: Any, objective: Objective, layout: Layout, cfg: TrainingConfig
    ) -> None:
        self.chunks, self.optimizer, self.objective = chunks, optimizer, objective
        self.layout, self.cfg = layout, cfg
        self.guard = SpikeGuard(cfg.guard)
        self.scales = ScalesBefore(chunks) if cfg.trainer.fp8 == "delayed" else None
        # What this rank was asked for; of Ctrl-C also what any rank was, as of the last step.
        self.stop_asked, self.interrupted, self.any_interrupted = False, False, False
        self.to_capture = is_on(cfg.trainer.cuda_graphs)

    def micro_batches(self, samples: Samples, numbers: range) -> MicroBatches:
        """This rank's share of some samples."""
        return MicroBatches.of_this_rank(samples, numbers, self.cfg.trainer.micro_batch_size, self.layout)

    def batches_of_step(self, step: int, samples: Samples) -> list[Batch]:
        """This rank's micro-batches of a step (from 0), on its device."""
        size = self.cfg.trainer.global_batch_size
        return [on_device(b) for b in self.micro_batches(samples, range(step * size, (step + 1) * size))]

    def train_step(self, step: int, schedule: Schedule, samples: Samples) -> StepResult:
        """Optimizer step `step` (from 0) of a schedule. Raises UserError when the spike guard gives up."""
        began = time.monotonic()
        batches = self.batches_of_step(step, samples)
        data_seconds = time.monotonic() - began
        for chunk in self.chunks:
            chunk.train()
        before = self.objective.state_dict()
        if self.scales:
            self.scales.remember()
        if self.objective.needs_first_pass:
            self._drop_gradients()
            self.forward_backward(batches)
        self._drop_gradients()
        terms, tokens, stop = self.forward_backward(batches, measure=self._measures(step, schedule.steps))
        self.stop_asked = self.stop_asked or stop  # every rank knows of what one was asked
        lr, grad_norm = schedule.learning_rate(step), gradient_norm(self.optimizer, tokens)
        taken = self.guard.takes(step, terms["loss"], grad_norm)
        if taken:
            set_learning_rate(self.optimizer, lr, self.cfg.optim.weight_decay)
            apply_gradients(self.optimizer, tokens, grad_norm)
        else:
            # What was measured in it is no measure of the steps to come.
            self.objective.load_state_dict(before)
            if self.scales:
                self.scales.restore()
        return StepResult(terms, grad_norm, lr, tokens, time.monotonic() - began, data_seconds, taken, stop)

    def _capture_once(self, micro_batches: int) -> None:
        """Before the first pass, make graphs of the layers, where they are asked for."""
        if self.to_capture:
            capture_layers(
                self.chunks,
                self.optimizer,
                self.layout,
                micro_batches=micro_batches,
                micro_batch_size=self.cfg.trainer.micro_batch_size,
                sequence_length=self.cfg.data.sequence_length,
            )
            self.to_capture = False

    def _drop_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _measures(self, step: int, steps: int) -> bool:
        """Whether the step's metrics are kept: only then is what merely informs computed."""
        return (step + 1) % self.cfg.logger.interval == 0 or step + 1 == steps

    def forward_backward(self, batches: list[Batch], *, measure: bool = False) -> tuple[dict[str, float], int, bool]:
        """Gradients of a step's micro-batches: sums over the tokens of all ranks, which nothing has divided yet.

        Returns:
            The mean of every term over all ranks' tokens, the number of those, and whether some rank was asked to stop;
            the same on every rank.
        """
        names, at_once = self.objective.names(measure), self.objective.at_once or len(batches)
        self._capture_once(min(at_once, len(batches)))
        rounds, results = Rounds(self.chunks), []
        for start in range(0, len(batches), at_once):
            part = batches[start : start + at_once]
            self.objective.prepare(part)
            with rounds.running(last=start + at_once >= len(batches)):
                results += self._run_schedule(part, names, measure)
        sums = torch.stack(results).sum(0).tolist() if results else [0.0] * (len(names) + 1)
        of_stages = self.objective.sums_of_stages()
        asked = [float(self.stop_asked), float(self.interrupted)]
        totals = collectives.sum_from_last_stage(sums, [*asked, *of_stages])
        (*sums, tokens), (stop, interrupted, *of_stages) = totals[: len(sums)], totals[len(sums) :]
        self.any_interrupted = interrupted > 0
        means = {name: total / tokens for name, total in zip(names, sums, strict=True)}
        return self.objective.finish(means, [total / tokens for total in of_stages]), int(tokens), stop > 0

    def _run_schedule(self, batches: list[Batch], names: tuple[str, ...], measure: bool) -> list[torch.Tensor]:
        """Forward and backward of some micro-batches; what the last stage's terms add up to in each of them."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size, length = batches[0]["tokens"].shape
        iterators = [iter(batches) for _ in self.chunks]

        def step(data: Iterator[Batch], model: Any) -> tuple[Any, Callable[..., Any]]:
            return self._forward_step(next(data), model, names, measure)

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=length * self.layout.context,
            micro_batch_size=size,
            forward_only=False,
        )

    def _forward_step(
        self, batch: Batch, model: Any, names: tuple[str, ...], measure: bool
    ) -> tuple[Any, Callable[..., Any]]:
        """A stage's pass over a micro-batch, and what the last stage makes of its terms."""

        def processor(*, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, **_: Any) -> Summed:
            return self.objective(hidden_states, output_layer, output_weight, batch, measure=measure)

        def loss_func(found: Summed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mask = batch["loss_mask"].t()
            sums = [(found.terms[name] * mask).sum(dtype=torch.float64) for name in names]
            counted = torch.stack([*sums, mask.sum(dtype=torch.float64)])
            return found.total, mask.sum().int(), counted

        self.objective.begin(batch)
        out = model(batch["tokens"], batch["position_ids"], attention_mask(batch), output_processor=processor)
        return out, loss_func

    def validate(self, samples: Samples, count: int) -> dict[str, float]:
        """Mean loss and perplexity over the first `count` samples; the same figures in any layout."""

        def collect(batch: Batch, **last_stage: Any) -> torch.Tensor:
            terms, mask = self.objective.validation(**last_stage, batch=batch), batch["loss_mask"].t()
            return torch.stack([*((terms[name] * mask).sum() for name in VALIDATION_TERMS), mask.sum()])

        gather_weights(self.chunks)
        models = [chunk.module for chunk in self.chunks]
        batches = [on_device(b) for b in self.micro_batches(samples, range(count))]
        sums = torch.zeros(len(VALIDATION_TERMS) + 1, dtype=torch.float64)
        # The interleaved schedule takes whole multiples of its stages only.
        stages = self.layout.pipeline if self.layout.virtual_pipeline else 1
        at_once = min(math.ceil(VALIDATION_ROUND / stages) * stages, self.objective.at_once or len(batches))
        for start in range(0, len(batches), at_once):
            part = batches[start : start + at_once]
            self.objective.prepare(part, training=False)
            collected = forward_only(
                models,
                part,
                num_micro_batches=len(part),
                micro_batch_size=self.cfg.trainer.micro_batch_size,
                sequence_length=self.cfg.data.sequence_length,
                collect=collect,
            )
            sums += sum((c.double().cpu() for c in collected), torch.zeros_like(sums))
        loss, nll, tokens = collectives.sum_from_last_stage(sums.tolist())
        perplexity = float(torch.tensor(nll / tokens, dtype=torch.float64).exp())
        return {"validation_loss": loss / tokens, "validation_perplexity": perplexity}


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """SIGTERM, SIGUSR1 (what Slurm sends before a limit), SIGHUP and Ctrl-C ask for a stop after the step that is running.

    A second Ctrl-C ends at once.
    """
    signals = [number for number in STATUS_OF_SIGNAL if signal.getsignal(number) is not signal.SIG_IGN]

    def ask(number: int, frame: FrameType | None) -> None:
        leave_lost_readers()
        if number == signal.SIGINT and trainer.interrupted:
            before[signal.SIGINT](number, frame)
        trainer.stop_asked = True
        if number == signal.SIGINT:
            trainer.interrupted = True
            say_from_rank_zero("Ctrl-C: this step is finished and saved first; a second Ctrl-C ends at once")

    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield
    finally:
        # A process that was asked is on its way out; asking again changes nothing.
        if not trainer.stop_asked:
            for number, handler in before.items():
                signal.signal(number, handler)
