"""Distillation as an objective: the student's logits against the teacher's, micro-batch by micro-batch."""

from collections.abc import Sequence
from typing import Any

import torch

from minitron_megatron.config import DistillOptions
from minitron_megatron.distill.losses import vocab_parallel_kl
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.objective import Terms
from minitron_megatron.models.vocab_parallel import vocab_parallel_argmax, vocab_parallel_entropy, vocab_parallel_nll


class Distillation:
    """Forward KL divergence from the student to its teacher (models/objective.py says what an objective is)."""

    def __init__(self, teacher: Teacher, options: DistillOptions, vocab_size: int) -> None:
        self.teacher, self.options, self.vocab_size = teacher, options, vocab_size

    def names(self, measure: bool) -> tuple[str, ...]:
        """The divergence; measured, the teacher's entropy in nats and whether both would say the same token, too."""
        return ("loss", "teacher_entropy", "agreement") if measure else ("loss",)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """With a pipeline, the teacher runs these micro-batches first."""
        self.teacher.run_ahead(batches)

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Terms:
        """The divergence at the options' temperature; the rest is of the distributions themselves."""
        teacher = self.teacher.logits(batch)
        student, _ = output_layer(hidden_states, weight=output_weight)
        terms = {"loss": self._divergence(student, teacher, self.options.temperature)}
        if measure:
            over = {"vocab_size": self.vocab_size, "group": _tensor_group()}
            terms["teacher_entropy"] = vocab_parallel_entropy(teacher, **over)
            terms["agreement"] = (
                vocab_parallel_argmax(teacher, **over) == vocab_parallel_argmax(student, **over)
            ).float()
        return terms

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """The divergence at temperature 1, whatever is trained with, and the labels' negative log likelihood."""
        student, _ = output_layer(hidden_states, weight=output_weight)
        loss = self._divergence(student, self.teacher.logits(batch), 1.0)
        labels = batch["labels"].t().contiguous()
        nll = vocab_parallel_nll(student, labels, vocab_size=self.vocab_size, group=_tensor_group())
        return {"loss": loss, "nll": nll}

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return vocab_parallel_kl(
            student, teacher, vocab_size=self.vocab_size, temperature=temperature, group=_tensor_group()
        )


def _tensor_group() -> Any:
    from megatron.core import parallel_state as ps

    return ps.get_tensor_model_parallel_group()
