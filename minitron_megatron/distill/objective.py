"""Distillation as an objective: the student's logits against what the teacher says, micro-batch by micro-batch.

The teacher runs beside the student (distill/teacher.py) and gives logits, or has run before (distill/cache.py) and gives the
top K of them; `divergence` takes either.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minitron_megatron.config import DistillOptions
from minitron_megatron.distill.cache import CachedTeacher
from minitron_megatron.distill.losses import Divergence, TopK, cross_entropy, divergence
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.objective import Terms
from minitron_megatron.models.vocab_parallel import vocab_parallel_argmax, vocab_parallel_entropy, vocab_parallel_nll


class Distillation:
    """The distance from the student to its teacher, with the labels' cross entropy mixed in where it has a weight.

    models/objective.py says what an objective is.
    """

    def __init__(self, teacher: Teacher | CachedTeacher, options: DistillOptions, vocab_size: int) -> None:
        self.teacher, self.options, self.vocab_size = teacher, options, vocab_size
        self.how = Divergence.from_options(options, vocab_size)
        # Runs with different losses are compared by forward KL; a cache can only say what it holds.
        self.validated = self.how if isinstance(teacher, CachedTeacher) else Divergence()

    def names(self, measure: bool) -> tuple[str, ...]:
        """The loss, and its terms where it has several; measured, also how sure the teacher is, and how often both agree."""
        parts = ("divergence", "cross_entropy") if self.options.cross_entropy else ()
        # A cache has the most probable tokens, not the entropy of all.
        entropy = () if isinstance(self.teacher, CachedTeacher) else ("teacher_entropy",)
        return ("loss", *parts, *((*entropy, "agreement") if measure else ()))

    def prepare(self, batches: Sequence[Batch]) -> None:
        """With a pipeline, the teacher runs these micro-batches first."""
        self.teacher.run_ahead(batches)

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Terms:
        """The divergence that the options ask for, and `cross_entropy` times that of the labels."""
        targets = self.teacher.targets(batch, "train")
        student, _ = output_layer(hidden_states, weight=output_weight)
        terms = {"loss": self._divergence(student, targets, self.how)}
        if self.options.cross_entropy:
            of_labels = cross_entropy(student, _labels(batch), vocab_size=self.vocab_size, group=_tensor_group())
            terms["divergence"], terms["cross_entropy"] = terms["loss"].detach(), of_labels.detach()
            terms["loss"] = terms["loss"] + self.options.cross_entropy * of_labels
        return {**terms, **self._measured(student, targets)} if measure else terms

    def _measured(self, student: torch.Tensor, targets: torch.Tensor | TopK) -> Terms:
        """The teacher's entropy in nats, and whether both would say the same token; of the distributions at temperature 1."""
        over = {"vocab_size": self.vocab_size, "group": _tensor_group()}
        said = vocab_parallel_argmax(student, **over)
        if isinstance(targets, TopK):
            return {"agreement": (targets.ids[..., 0] == said).float()}
        return {
            "teacher_entropy": vocab_parallel_entropy(targets, **over),
            "agreement": (vocab_parallel_argmax(targets, **over) == said).float(),
        }

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """Forward KL at temperature 1, whatever is trained with; of a cache its own loss. And the labels' NLL."""
        student, _ = output_layer(hidden_states, weight=output_weight)
        loss = self._divergence(student, self.teacher.targets(batch, "validation"), self.validated)
        nll = vocab_parallel_nll(student, _labels(batch), vocab_size=self.vocab_size, group=_tensor_group())
        return {"loss": loss, "nll": nll}

    def _divergence(self, student: torch.Tensor, targets: Any, how: Divergence) -> torch.Tensor:
        return divergence(student, targets, how, vocab_size=self.vocab_size, group=_tensor_group())


def _labels(batch: Batch) -> torch.Tensor:
    """Of the micro-batch, [s, b]."""
    return batch["labels"].t().contiguous()


def _tensor_group() -> Any:
    from megatron.core import parallel_state as ps

    return ps.get_tensor_model_parallel_group()
