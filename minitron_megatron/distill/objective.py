"""Distillation as an objective: what the student says against what the teacher says, micro-batch by micro-batch.

The teacher runs beside the student, in its layout (distill/teacher.py) or another (distill/routed.py), and gives its final
states, or has run before (distill/cache.py) and gives its top K; the loss (distill/losses.py) takes either. Losses on
intermediate states (distill/intermediate.py) come to it on every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minitron_megatron.config import DistillOptions
from minitron_megatron.distill.cache import CachedTeacher
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.intermediate import IntermediateLoss
from minitron_megatron.distill.losses import DistillationLoss, TopK, nll_of_top_k
from minitron_megatron.distill.routed import RoutedTeacher
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.forward import Batch, labels_of
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.models.head import Head, Summed, Terms, fused_loss, terms_of
from minitron_megatron.models.objective import CrossEntropy, Objective
from minitron_megatron.parallel import collectives


class Distillation(Objective):
    """The distance from the student to its teacher, with the labels' cross entropy mixed in where it has a weight.

    models/objective.py says what an objective is. `intermediate` is the loss on states of a teacher beside the student, if any.
    """

    def __init__(
        self,
        teacher: Teacher | RoutedTeacher | CachedTeacher,
        options: DistillOptions,
        vocab_size: int,
        intermediate: IntermediateLoss | None = None,
    ) -> None:
        self.teacher, self.options, self.vocab_size = teacher, options, vocab_size
        self.intermediate = intermediate
        # Mean loss of the labels by the teacher, in the first step of the run.
        self.teacher_loss: float | None = None
        # Of the student's; those of a teacher beside it are as large.
        self.logits_bytes = options.logits_mib * 2**20 // (1 if isinstance(teacher, CachedTeacher) else 2)
        self.how = Divergence.from_options(options, vocab_size)
        # Runs with different losses are compared by forward KL; a cache can only say what it holds.
        self.validated = self.how if isinstance(teacher, CachedTeacher) else Divergence()

    def names(self, measure: bool) -> tuple[str, ...]:
        """The loss, and its terms where it has several; measured, also how sure the teacher is, and how often both agree."""
        parts = ("divergence",) if self.options.cross_entropy or self.intermediate else ()
        parts += ("cross_entropy",) if self.options.cross_entropy else ()
        parts += ("teacher_loss",) if self.teacher_loss is None else ()
        # A cache has the most probable tokens, not the entropy of all.
        entropy = () if isinstance(self.teacher, CachedTeacher) else ("teacher_entropy",)
        return ("loss", *parts, *((*entropy, "agreement") if measure else ()))

    @property
    def at_once(self) -> int | None:
        """How far the teacher may run ahead."""
        return self.teacher.ahead

    def attach(self, chunks: Sequence[Any]) -> None:
        """Intermediate states are taken by hooks, and mapped by a parameter of the student's chunks."""
        if self.intermediate:
            self.intermediate.attach(chunks)

    def prepare(self, batches: Sequence[Batch], *, training: bool = True) -> None:
        """With a pipeline, or in a layout of its own, the teacher runs these micro-batches first."""
        if self.intermediate:
            self.intermediate.watching = training
        self.teacher.run_ahead(batches)
        if self.intermediate and training and self.teacher.pipelined:
            self.intermediate.deliver(batches)

    def begin(self, batch: Batch) -> None:
        """Without a pipeline the teacher runs a micro-batch now if states of it are to be there when the student's are."""
        if self.intermediate and not self.teacher.pipelined:
            self.teacher.run(batch)
            self.intermediate.deliver([batch])

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Summed:
        """The divergence that the options ask for, and `cross_entropy` times that of the labels."""
        targets, group = self.teacher.targets(batch, "train"), collectives.tensor_parallel_group()
        loss = DistillationLoss(
            targets,
            self.how,
            vocab_size=self.vocab_size,
            group=group,
            labels=labels_of(batch) if self.options.cross_entropy else None,
            cross_entropy=self.options.cross_entropy,
            measure=measure,
        )
        own = {"teacher_loss": self._loss_of(targets, batch)} if self.teacher_loss is None else {}
        head = Head.of(hidden_states, output_layer, output_weight, group)
        total, terms = fused_loss(head, loss, batch["loss_mask"].t(), logits_bytes=self.logits_bytes)
        return Summed(total, {**terms, **own})

    def _loss_of(self, targets: Head | TopK, batch: Batch) -> torch.Tensor:
        """−log p of the labels by the teacher, [s, b]."""
        labels, vocabulary = labels_of(batch), self.vocab_size
        if isinstance(targets, TopK):
            return nll_of_top_k(targets, labels, vocab_size=vocabulary, temperature=self.options.temperature)
        own = CrossEntropy(labels, vocab_size=vocabulary, group=collectives.tensor_parallel_group())
        return terms_of(targets, own, logits_bytes=self.logits_bytes)["loss"]

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """Forward KL at temperature 1, whatever is trained with; of a cache its own loss. And the labels' NLL."""
        targets, group = self.teacher.targets(batch, "validation"), collectives.tensor_parallel_group()
        loss = DistillationLoss(
            targets, self.validated, vocab_size=self.vocab_size, group=group, labels=labels_of(batch)
        )
        head = Head.of(hidden_states, output_layer, output_weight, group)
        terms = terms_of(head, loss, logits_bytes=self.logits_bytes)
        return {"loss": terms["divergence"], "nll": terms["cross_entropy"]}

    @property
    def needs_first_pass(self) -> bool:
        """In the first step of a run, for α."""
        return self.intermediate is not None and self.intermediate.alpha is None

    def sums_of_stages(self) -> list[float]:
        """That of the intermediate states' distances."""
        return [self.intermediate.take_sum()] if self.intermediate else []

    def finish(self, means: dict[str, float], of_stages: Sequence[float]) -> dict[str, float]:
        """The whole loss, and beside it `intermediate` with the `alpha` that it had.

        In a run's first step a teacher that does no better than a guess is named.
        """
        if self.teacher_loss is None:
            self.teacher_loss = means.pop("teacher_loss")
            name = "the cached teacher" if isinstance(self.teacher, CachedTeacher) else "the teacher"
            warn_of_guessing(name, self.teacher_loss, self.vocab_size)
        if self.intermediate is None:
            return means
        self.intermediate.add_gradients_of_copies()
        (mean,) = of_stages
        alpha = self.intermediate.next_alpha(means["divergence"], mean)
        loss = means["loss"] + self.intermediate.weight * alpha * mean
        return {**means, "loss": loss, "intermediate": mean, "alpha": alpha}

    def state_dict(self) -> dict[str, Any]:
        """The next step's α, and what was found of the teacher."""
        found = {} if self.teacher_loss is None else {"teacher_loss": self.teacher_loss}
        return {**found, "alpha": self.intermediate.alpha} if self.intermediate else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that."""
        self.teacher_loss = state.get("teacher_loss")
        if self.intermediate:
            self.intermediate.alpha = state["alpha"]

    def results(self) -> dict[str, Any]:
        """The teacher's loss of the labels in the first step."""
        return {} if self.teacher_loss is None else {"teacher_loss": self.teacher_loss}
