"""What training minimises: an objective turns a micro-batch's final hidden states into a loss, and named terms a token.

    step:  prepare(micro-batches, at most `at_once`) ─▶ each of them: model ─▶ hidden states ─▶ objective ─▶ Σ loss,
                                                                                                {"loss": [s, b], …}

The loop (train/loop.py) knows no objective: it takes the gradient of the total, sums every term over the tokens that count, and
reports the mean of each. Next-token prediction is here; distillation is in distill/objective.py.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from minitron_megatron.models.forward import Batch, labels_of
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.models.head import Head, Summed, Terms, fused_loss, in_blocks, terms_of
from minitron_megatron.models.vocab_parallel import have_kernels, label_loss, label_nll, valid_columns
from minitron_megatron.parallel import collectives

# What every objective gives in a validation: its loss, and the negative log likelihood of the labels.
VALIDATION_TERMS = ("loss", "nll")


class Objective(Protocol):
    """What a training loop asks of its objective; terms are [s, b], of s sequence positions and b samples."""

    def names(self, measure: bool) -> tuple[str, ...]:
        """Names of the terms of a step, `loss` first: every pipeline stage knows them, the last one alone has values."""
        ...

    @property
    def at_once(self) -> int | None:
        """Most micro-batches that are prepared at once: a step is run in rounds of so many. None for all of a step."""
        ...

    def prepare(self, batches: Sequence[Batch], *, training: bool = True) -> None:
        """Called on every stage before these micro-batches run through the model, in this order, in a step or a validation."""
        ...

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Summed:
        """The loss of a micro-batch, on the last stage, with its terms by name.

        Args:
            hidden_states: [s / tp if sequence parallel, b, hidden], of the model's last layer.
            output_layer, output_weight: what makes logits [s, b, V / tp] of them.
            batch: the micro-batch.
            measure: also give the terms that only inform.

        Returns:
            The sum of `loss` over the tokens that count, which carries the gradient, and all terms without one.
        """
        ...

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """The terms of VALIDATION_TERMS, without gradients."""
        ...

    # What follows is for objectives that have a part on every stage; the others inherit that there is none.

    def attach(self, chunks: Sequence[Any]) -> None:
        """Called once with this rank's loaded chunks, before they are wrapped for training: to add parameters to them."""

    def begin(self, batch: Batch) -> None:
        """Called on every stage and chunk before a micro-batch of a step runs through it."""

    @property
    def needs_first_pass(self) -> bool:
        """Whether the step's samples have to run once, for `finish` alone, before the pass whose gradients count."""
        return False

    def sums_of_stages(self) -> list[float]:
        """Sums over tokens of terms that are made on any stage; over all ranks of the job each token counts once."""
        return []

    def finish(self, means: dict[str, float], of_stages: Sequence[float]) -> dict[str, float]:
        """Called on every stage when a step's gradients are reduced, with the means of all terms; gives what is reported."""
        return means

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def results(self) -> dict[str, Any]:
        """What the manifest is to say of the run, beside its losses."""
        return {}


class NextToken(Objective):
    """Cross entropy of the next token: ordinary training, which teacher correction is (arXiv 2408.11796, section 3)."""

    at_once: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.judged = False

    def names(self, measure: bool) -> tuple[str, ...]:
        """The loss alone."""
        return ("loss",)

    def prepare(self, batches: Sequence[Batch], *, training: bool = True) -> None:
        """Nothing runs ahead."""

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Summed:
        """Cross entropy in nats."""
        head = Head.of(hidden_states, output_layer, output_weight, collectives.tensor_parallel_group())
        return fused_loss(head, self._loss(batch), batch["loss_mask"].t())

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """The loss is the negative log likelihood."""
        head = Head.of(hidden_states, output_layer, output_weight, collectives.tensor_parallel_group())
        nll = terms_of(head, self._loss(batch))["loss"]
        return {"loss": nll, "nll": nll}

    def finish(self, means: dict[str, float], of_stages: Sequence[float]) -> dict[str, float]:
        """In the first step of a start, a model that does no better than a guess is named."""
        if not self.judged:
            self.judged = True
            warn_of_guessing("the model", means["loss"], self.vocab_size)
        return means

    def _loss(self, batch: Batch) -> "CrossEntropy":
        return CrossEntropy(labels_of(batch), vocab_size=self.vocab_size, group=collectives.tensor_parallel_group())


class CrossEntropy:
    """−log softmax(logits)[label] per token, of some rows of tokens at a time (`LossOfRows` of models/head.py).

    Args:
        labels: int64 [s, b], ids below vocab_size.
        vocab_size: real ids; columns of ids from there on are padding: no probability, no gradient.
        group: the tensor-parallel process group.
    """

    def __init__(self, labels: torch.Tensor, *, vocab_size: int, group: Any) -> None:
        self.labels, self.vocab_size, self.group = labels.reshape(-1), vocab_size, group

    def __call__(self, logits: torch.Tensor, rows: slice, weight: torch.Tensor | None) -> Terms:
        """Float32 (float64) [n], on every rank of the group."""
        if have_kernels(logits):
            return {"loss": self._by_kernels(logits, self.labels[rows], weight)}
        return in_blocks(self._by_torch, logits, rows, weight)

    def _by_torch(self, logits: torch.Tensor, rows: slice, weight: torch.Tensor | None) -> Terms:
        columns = valid_columns(logits, self.vocab_size, self.group)
        loss, gradient = label_loss(logits, self.labels[rows], columns, self.group)
        if weight is not None:
            logits[:, :columns] = gradient.mul_(weight[:, None])
            logits[:, columns:] = 0
        return {"loss": loss}

    def _by_kernels(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        from minitron_megatron.models import kernels

        columns = valid_columns(logits, self.vocab_size, self.group)
        loss, mine, log2_z = label_nll(logits, labels, columns, self.group)
        if weight is not None:
            kernels.cross_entropy_(logits, log2_z, mine, weight, columns)
        return loss
