"""What training minimises: an objective turns a micro-batch's final hidden states into named terms, one value a token.

    step:  prepare(micro-batches, at most `at_once`) ─▶ each of them: model ─▶ hidden states ─▶ objective ─▶ {"loss": [s, b], …}

The loop (train/loop.py) knows no objective: it sums every term over the tokens that count, takes the gradient of `loss`, and
reports the mean of each. Next-token prediction is here; distillation is in distill/objective.py.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from minitron_megatron.models.forward import Batch, labels_of
from minitron_megatron.models.vocab_parallel import valid_columns, vocab_parallel_nll
from minitron_megatron.parallel import collectives

Terms = dict[str, torch.Tensor]
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
    ) -> Terms:
        """Terms of a micro-batch, on the last stage, by name.

        Args:
            hidden_states: [s / tp if sequence parallel, b, hidden], of the model's last layer.
            output_layer, output_weight: what makes logits [s, b, V / tp] of them.
            batch: the micro-batch.
            measure: also give the terms that only inform.

        Returns:
            `loss`, which carries the gradient (itself, or the weighted sum of several terms), and terms without one.
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


class NextToken(Objective):
    """Cross entropy of the next token: ordinary training, which teacher correction is (arXiv 2408.11796, section 3)."""

    at_once: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def names(self, measure: bool) -> tuple[str, ...]:
        """The loss alone."""
        return ("loss",)

    def prepare(self, batches: Sequence[Batch], *, training: bool = True) -> None:
        """Nothing runs ahead."""

    def __call__(
        self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch, *, measure: bool
    ) -> Terms:
        """Cross entropy in nats."""
        logits, _ = output_layer(hidden_states, weight=output_weight)
        return {
            "loss": cross_entropy(
                logits, labels_of(batch), vocab_size=self.vocab_size, group=collectives.tensor_parallel_group()
            )
        }

    def validation(self, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, batch: Batch) -> Terms:
        """The loss is the negative log likelihood."""
        logits, _ = output_layer(hidden_states, weight=output_weight)
        nll = vocab_parallel_nll(
            logits, labels_of(batch), vocab_size=self.vocab_size, group=collectives.tensor_parallel_group()
        )
        return {"loss": nll, "nll": nll}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """−log softmax(logits)[label] per token, by Megatron's own kernel, which knows no padding.

    Args:
        logits: [s, b, V / tp], any floating dtype; arithmetic is float32. The kernel may overwrite them.
        labels: int64 [s, b], ids below vocab_size.
        vocab_size: real ids; columns of ids from there on are padding: no probability, no gradient.
        group: the tensor-parallel process group.

    Returns:
        [s, b] float32, on every rank of the group.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    columns = valid_columns(logits, vocab_size, group)
    if columns < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= columns
        logits = logits.masked_fill(padding, -torch.inf)
    return vocab_parallel_cross_entropy(logits, labels, tp_group=group)
