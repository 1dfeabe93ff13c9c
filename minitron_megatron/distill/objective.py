"""Distillation as an objective: the student's logits against what the teacher says, micro-batch by micro-batch.

The teacher runs beside the student, in its layout (distill/teacher.py) or another (distill/routed.py), and gives logits, or has
run before (distill/cache.py) and gives the top K of them; `divergence` takes either. Losses on intermediate states
(distill/intermediate.py) come to it on every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minitron_megatron.config import DistillOptions
from minitron_megatron.distill.cache import CachedTeacher
from minitron_megatron.distill.intermediate import IntermediateLoss
from minitron_megatron.distill.losses import Divergence, TopK, cross_entropy, divergence
from minitron_megatron.distill.routed import RoutedTeacher
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.forward import Batch, labels_of
from minitron_megatron.models.objective import Objective, Terms
from minitron_megatron.models.vocab_parallel import vocab_parallel_argmax, vocab_parallel_entropy, vocab_parallel_nll
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
        self.how = Divergence.from_options(options, vocab_size)
        # Runs with different losses are compared by forward KL; a cache can only say what it holds.
        self.validated = self.how if isinstance(teacher, CachedTeacher) else Divergence()

    def names(self, measure: bool) -> tuple[str, ...]:
        """The loss, and its terms where it has several; measured, also how sure the teacher is, and how often both agree."""
        parts = ("divergence",) if self.options.cross_entropy or self.intermediate else ()
        parts += ("cross_entropy",) if self.options.cross_entropy else ()
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
    ) -> Terms:
        """The divergence that the options ask for, and `cross_entropy` times that of the labels."""
        targets = self.teacher.targets(batch, "train")
        student, _ = output_layer(hidden_states, weight=output_weight)
        terms = {"loss": self._divergence(student, targets, self.how)}
        terms["divergence"] = terms["loss"].detach()
        if self.options.cross_entropy:
            of_labels = cross_entropy(
                student, labels_of(batch), vocab_size=self.vocab_size, group=collectives.tensor_parallel_group()
            )
            terms["cross_entropy"] = of_labels.detach()
            terms["loss"] = terms["loss"] + self.options.cross_entropy * of_labels
        return {**terms, **self._measured(student, targets)} if measure else terms

    def _measured(self, student: torch.Tensor, targets: torch.Tensor | TopK) -> Terms:
        """The teacher's entropy in nats, and whether both would say the same token; of the distributions at temperature 1."""
        over = {"vocab_size": self.vocab_size, "group": collectives.tensor_parallel_group()}
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
        nll = vocab_parallel_nll(
            student, labels_of(batch), vocab_size=self.vocab_size, group=collectives.tensor_parallel_group()
        )
        return {"loss": loss, "nll": nll}

    @property
    def needs_first_pass(self) -> bool:
        """In the first step of a run, for α."""
        return self.intermediate is not None and self.intermediate.alpha is None

    def sums_of_stages(self) -> list[float]:
        """That of the intermediate states' distances."""
        return [self.intermediate.take_sum()] if self.intermediate else []

    def finish(self, means: dict[str, float], of_stages: Sequence[float]) -> dict[str, float]:
        """The whole loss, and beside it `intermediate` with the `alpha` that it had."""
        if self.intermediate is None:
            return means
        self.intermediate.add_gradients_of_copies()
        (mean,) = of_stages
        alpha = self.intermediate.next_alpha(means["divergence"], mean)
        loss = means["loss"] + self.intermediate.weight * alpha * mean
        return {**means, "loss": loss, "intermediate": mean, "alpha": alpha}

    def state_dict(self) -> dict[str, Any]:
        """The next step's α."""
        return {"alpha": self.intermediate.alpha} if self.intermediate else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that α."""
        if self.intermediate:
            self.intermediate.alpha = state["alpha"]

    def _divergence(self, student: torch.Tensor, targets: Any, how: Divergence) -> torch.Tensor:
        return divergence(student, targets, how, vocab_size=self.vocab_size, group=collectives.tensor_parallel_group())
