"""Loss and perplexity on a split, and the distance to a teacher there: every token once, the same numbers in any layout."""

import itertools
import math
from collections.abc import Sequence

import torch

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.console import progress
from minitron_megatron.data.datasets import MicroBatches, Windows
from minitron_megatron.data.folder import Data
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.losses import DistillationLoss
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.errors import UserError
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.forward import labels_of
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.models.head import LossOfRows, Terms
from minitron_megatron.models.loss import summed_loss, summed_terms
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.models.vocab_parallel import vocab_parallel_nll
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

# Micro-batches a stage whose final states of the teacher are kept at once, where there is a pipeline.
_AHEAD = 4


def perplexity(
    chunks: Sequence[torch.nn.Module],
    shape: ModelShape,
    teacher: ModelFolder | None,
    data: Data,
    layout: Layout,
    cfg: EvaluateConfig,
    count: int,
) -> dict[str, float]:
    """Mean negative log likelihood (nats a token), perplexity and tokens over the first `count` windows, on every rank.

    With a teacher also `kl`, the mean of KL(teacher ‖ model) in nats a token over the whole vocabulary, `agreement`, the share of
    tokens whose most probable successor is the same, and of the teacher itself `teacher_loss` and `teacher_perplexity` on the
    same windows. Raises UserError where a loss is not finite.
    """
    windows = Windows(data, cfg.split, cfg.data.sequence_length)
    batches = MicroBatches.of_this_rank(windows, range(count), cfg.trainer.micro_batch_size, layout)
    size = {"micro_batch_size": cfg.trainer.micro_batch_size, "sequence_length": cfg.data.sequence_length}
    with progress("perplexity", len(batches) * len(chunks), unit="micro-batches") as advance:
        size["before"] = lambda batch: advance(1)
        if teacher is None:
            nll, tokens = summed_loss(chunks, batches, vocab_size=shape.vocab_size, **size)
            compared = {}
        else:
            beside = _teacher(teacher, layout, cfg)
            nll, kl, agreed, of_teacher, tokens = _with_teacher(chunks, beside, batches, shape.vocab_size, layout, size)
            compared = {"kl": kl / tokens, "agreement": agreed / tokens}
            compared |= loss_figures(of_teacher, tokens, f"teacher={cfg.teacher.path}", "teacher_")
            warn_of_guessing(f"teacher={cfg.teacher.path}", compared["teacher_loss"], shape.vocab_size)
    return {**loss_figures(nll, tokens, f"model={cfg.model.path}"), "tokens": int(tokens), **compared}


def loss_figures(nll: float, tokens: float, model: str, prefix: str = "") -> dict[str, float]:
    """`loss` (nats a token) and `perplexity` of a model out of its sum over tokens. Raises UserError where it is not finite."""
    if not math.isfinite(nll):
        raise UserError(f"{model}: the loss is {nll}; the weights or precision= are at fault")
    loss = nll / tokens
    return {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700))}


def _teacher(folder: ModelFolder, layout: Layout, cfg: EvaluateConfig) -> Teacher:
    """The teacher with its weights, in the model's layout."""
    frozen = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.teacher.engine)
    load_model(frozen, folder)
    return Teacher(frozen, pipelined=layout.pipeline > 1)


def _with_teacher(
    chunks: Sequence[torch.nn.Module],
    teacher: Teacher,
    batches: MicroBatches,
    vocab_size: int,
    layout: Layout,
    size: dict,
) -> list[float]:
    """Sums of the negative log likelihood, divergence, agreement and the teacher's own likelihood over all tokens; their number.

    With a pipeline the teacher runs some micro-batches, then the model the same ones.
    """
    over = {"vocab_size": vocab_size, "group": collectives.tensor_parallel_group()}

    def loss(batch: dict[str, torch.Tensor]) -> LossOfRows:
        targets, labels = teacher.targets(batch, "evaluate"), labels_of(batch)
        of_student = DistillationLoss(targets, Divergence(), labels=labels, measure=True, **over)

        def terms(logits: torch.Tensor, rows: slice, weight: torch.Tensor | None) -> Terms:
            own = vocab_parallel_nll(targets.logits(rows), labels.reshape(-1)[rows], **over)
            return {**of_student(logits, rows, weight), "of_teacher": own}

        return terms

    names, sums = ("cross_entropy", "divergence", "agreement", "of_teacher"), [0.0] * 5
    remaining = iter(batches)
    while some := list(itertools.islice(remaining, _AHEAD * layout.pipeline)):
        here = [{name: tensor.to(torch.cuda.current_device()) for name, tensor in batch.items()} for batch in some]
        teacher.run_ahead(here)
        sums = [a + b for a, b in zip(sums, summed_terms(chunks, here, names, loss, **size), strict=True)]
    return sums
