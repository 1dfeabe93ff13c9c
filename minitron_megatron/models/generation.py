"""Text from a live model: tokens that follow prompts, with a key-value cache, the same ones in any layout.

    prompts sorted by length, in batches ─▶ data-parallel ranks take batches in turn ─▶ every answer on every rank

    row 0   p p p p p p · ·       the shortest prompt's length runs at once and fills the cache (Megatron's static inference
    row 1   p p p p · · · ·       context); then one token a step for all rows: a row whose prompt goes on has its own next
            └ at once ┘ → → →     token, the others the one that was picked. No row is padded, so nothing has to be masked.

A step passes hidden states from stage to stage; the last one picks the tokens and tells the others. Sequence parallelism is
off meanwhile: there is one token to split.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.models.head import Head
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.models.vocab_parallel import reduce_over, valid_columns, vocab_parallel_argmax
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

# Attributes of Megatron's and Transformer Engine's modules and configs: what splits the sequence, and what rotates queries, keys
# and values at once, before keys could be put beside those of the cache.
_NOT_WITH_A_CACHE = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
    "fused_single_qkv_rope",
)
# In a token's place, as the last of an answer: logits of which none is the highest.
NOT_FINITE = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked, and when a prompt has its answer.

    `stop_tokens` end an answer and belong to it; `finished`, asked after each token with all of the answer, does the same
    (`stop_strings`). `temperature` 0 takes the most probable token; above, tokens are drawn: of the `top_k` most probable ones
    (0: all), of these the fewest whose mass is `top_p`. What is drawn depends on the seed, the prompt's number and the token's.
    """

    max_new_tokens: int
    stop_tokens: Sequence[int] = ()
    finished: Callable[[Sequence[int]], bool] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234


def stop_strings(decode: Callable[[Sequence[int]], str], strings: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """A `finished` that is true once one of some texts was just written. Only the end of the answer is decoded."""
    # A token is a byte at least.
    longest = max((len(text.encode()) for text in strings), default=0) + 1

    def finished(tokens: Sequence[int]) -> bool:
        text = decode(tokens[-longest:])
        return any(stop in text for stop in strings)

    return finished


def generate(
    chunks: Sequence[torch.nn.Module],
    layout: Layout,
    shape: ModelShape,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without it, on every rank; NOT_FINITE is the last where logits were not finite.

    Args:
        chunks: this rank's chunks of the built and loaded model; they are left in the mode they were in.
        layout: the one that Megatron's groups are set up for; without context parallelism.
        shape: the model's.
        prompts: token ids, at least one each; the same on every rank.
        sampling: how tokens are picked; the same on every rank.
        batch_size: prompts that run at once on a data-parallel rank, which the size of the cache is proportional to.
        advance: called with the number of prompts that this rank has just answered.

    Raises:
        ValueError: a prompt is empty, or does not fit the model's positions with its answer, or context parallelism is on.
    """
    from megatron.core import parallel_state as ps

    if layout.context > 1:
        raise ValueError("generation with context parallelism: lay the model out with context=1")
    longest = max(map(len, prompts), default=1) + sampling.max_new_tokens - 1
    if not all(prompts) or longest > shape.max_position_embeddings:
        raise ValueError(f"{longest} positions of {shape.max_position_embeddings}, or an empty prompt")
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    size = max(1, min(batch_size, math.ceil(len(prompts) / layout.data)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    model = _Model(chunks, layout, shape)
    mine: dict[int, list[int]] = {}
    # Not inference mode: Megatron keeps rotary embeddings, and those made in it could not be trained with.
    with torch.no_grad(), _evaluating(chunks), _with_a_cache(chunks):
        for numbers in batches[ps.get_data_parallel_rank() :: layout.data]:
            answers = _answer(model, numbers, [prompts[number] for number in numbers], sampling)
            mine |= dict(zip(numbers, answers, strict=True))
            advance(len(numbers))
    found = {number: answer for part in collectives.gather_over_data_parallel(mine) for number, answer in part.items()}
    return [found[number] for number in range(len(prompts))]


def _answer(
    model: "_Model", numbers: Sequence[int], prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Answers to a batch of prompts, on every rank of the model."""
    from megatron.core.inference.contexts import StaticInferenceContext

    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths) + sampling.max_new_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    cache = StaticInferenceContext(*tokens.shape)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows, end = set(range(len(prompts))), min(lengths)
    while open_rows:
        start = cache.sequence_len_offset
        keys = [(sampling.seed, number, len(answer)) for number, answer in zip(numbers, answers, strict=True)]
        picked = model.next_tokens(tokens[:, start:end], cache, sampling, keys)
        cache.increment_sequence_len_offset(end - start)
        for row in sorted(open_rows):
            if end < lengths[row]:
                continue
            token, answer = picked[row], answers[row]
            tokens[row, end] = max(token, 0)
            answer.append(token)
            stopped = token in (*sampling.stop_tokens, NOT_FINITE) or (
                sampling.finished is not None and sampling.finished(answer)
            )
            if stopped or len(answer) == sampling.max_new_tokens:
                open_rows.discard(row)
        end += 1
    return answers


class _Model:
    """A model's chunks on this rank, run over a few tokens of every row."""

    def __init__(self, chunks: Sequence[torch.nn.Module], layout: Layout, shape: ModelShape) -> None:
        from megatron.core.utils import get_model_config

        self.chunks, self.layout, self.shape = chunks, layout, shape
        self.dtype = get_model_config(chunks[0]).pipeline_dtype

    def next_tokens(
        self, tokens: torch.Tensor, cache: Any, sampling: Sampling, keys: Sequence[tuple[int, int, int]]
    ) -> list[int]:
        """What follows tokens [b, s] and what is cached before them, one token a row, on every rank of the model."""
        from megatron.core import parallel_state as ps
        from megatron.core.utils import get_attr_wrapped_model

        here = torch.cuda.current_device()
        start, (b, s) = cache.sequence_len_offset, tokens.shape
        tokens = tokens.to(here)
        positions = torch.arange(start, start + s, device=here).expand(b, s)
        found = torch.zeros(b, dtype=torch.int64, device=here)

        def pick(*, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, **_: Any) -> torch.Tensor:
            group = collectives.tensor_parallel_group()
            head = Head.of(hidden_states[-1:], output_layer, output_weight, group)
            return _pick(head.logits(), self.shape.vocab_size, sampling, keys, group)

        stages, rank = self.layout.pipeline, ps.get_pipeline_model_parallel_rank()
        states = None
        for stage in range(self.layout.stages):
            if stage:
                states = (
                    collectives.move_between_stages(
                        states,
                        (s, b, self.shape.hidden_size),
                        self.dtype,
                        source=(stage - 1) % stages,
                        target=stage % stages,
                    )
                    if stages > 1
                    else states
                )
            if stage % stages == rank:
                chunk = self.chunks[stage // stages]
                get_attr_wrapped_model(chunk, "set_input_tensor")(states)
                states = chunk(tokens, positions, None, inference_context=cache, output_processor=pick)
                if stage == self.layout.stages - 1:
                    found = states
        return collectives.broadcast_from_last_stage(found).tolist()


def _pick(
    logits: torch.Tensor, vocab_size: int, sampling: Sampling, keys: Sequence[tuple[int, int, int]], group: Any
) -> torch.Tensor:
    """A token id of each row of logits [b, V / tp], int64 [b], the same on every rank of the group; NOT_FINITE where none is."""
    fine = _finite(logits, vocab_size, group)
    if not sampling.temperature:
        return torch.where(fine, vocab_parallel_argmax(logits, vocab_size=vocab_size, group=group), NOT_FINITE)
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    # Drawn apart for each prompt and token: the same whatever runs beside it, and wherever.
    chances = torch.tensor([np.random.default_rng(key).random() for key in keys], dtype=torch.float64)
    whole = torch.cat(parts, -1)[:, :vocab_size].masked_fill(~fine[:, None], 0)
    return torch.where(fine, draw(whole, chances.to(logits.device), sampling), NOT_FINITE)


def _finite(logits: torch.Tensor, vocab_size: int, group: Any) -> torch.Tensor:
    """Whether no logit of a row [V / tp] is NaN or +∞ on any rank, and some is above −∞: bool [b]."""
    columns = valid_columns(logits, vocab_size, group)
    highest = logits[:, :columns].float().amax(-1) if columns else logits.new_full(logits.shape[:1], -torch.inf).float()
    # Of NaN a maximum over ranks may be anything.
    highest = highest.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return reduce_over(highest, dist.ReduceOp.MAX, group).isfinite()


def draw(logits: torch.Tensor, chances: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Token ids [b] of logits [b, vocab] by a number of [0, 1) each, float64 [b]: where the sum of probabilities passes it."""
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter_(-1, ids, ordered.masked_fill(before >= sampling.top_p, 0))
    sums = p.cumsum(-1)
    found = torch.searchsorted(sums, (chances * sums[:, -1])[:, None], right=True)[:, 0]
    last = (p > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(found, last)


@contextlib.contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """In evaluation mode: in training Megatron masks the past of a cache."""
    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, before, strict=True):
            chunk.train(training)


@contextlib.contextmanager
def _with_a_cache(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without what a cache does not go with: sequence parallelism and one rotation of queries, keys and values.

    Megatron's own switch of sequence parallelism remembers modules by the address of a model that may be gone.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = [module.config for module in modules if hasattr(module, "config")]
    on = [(it, name) for it in modules + configs for name in _NOT_WITH_A_CACHE if getattr(it, name, False) is True]
    for it, name in on:
        setattr(it, name, False)
    try:
        yield
    finally:
        for it, name in on:
            setattr(it, name, True)
