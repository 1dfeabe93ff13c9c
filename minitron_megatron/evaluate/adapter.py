"""lm-evaluation-harness's view of a live Megatron model in any layout: log-likelihoods, rolling ones, and generated text.

    rank 0      the harness ─▶ MegatronLM (text to tokens as its own transformers backend does it) ─▶ Ranks.run("score", …) ─┐
    the others  Ranks.serve() waits ─────────────────────────────────────────────────────────────────▶ the same call ◀───────┘

Tasks, their metrics, and code that a task runs are thus on one rank; the model's work is on all of them.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron_megatron.console import progress
from minitron_megatron.data.questions import Request
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.answers import Rule, check_written, finite, not_finite
from minitron_megatron.evaluate.scoring import score
from minitron_megatron.models.generation import NOT_FINITE, Sampling, generate, stop_strings
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

# What a task may say of how it generates; the rest of transformers' options has no meaning here.
_KNOWN = frozenset(("do_sample", "temperature", "top_k", "top_p"))


class Ranks:
    """The model on all ranks: rank 0 says what to run, the others run it with it."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layout: Layout,
        shape: ModelShape,
        tokenizer: Any,
        *,
        tokens_at_once: int,
        prompts_at_once: int,
        seed: int,
    ) -> None:
        self.chunks, self.layout, self.shape, self.tokenizer = chunks, layout, shape, tokenizer
        self.tokens_at_once, self.prompts_at_once, self.seed = tokens_at_once, prompts_at_once, seed

    def run(self, name: str, *arguments: Any) -> Any:
        """Call a method of this class on every rank; for rank 0."""
        collectives.broadcast_object((name, arguments))
        return getattr(self, name)(*arguments)

    def on_rank_zero[T](self, work: Callable[[], T]) -> T | None:
        """`work` on rank 0, which may `run` methods; the others take part in these until it ends. None there.

        Raises UserError on every rank where `work` fails.
        """
        if not collectives.is_rank_zero():
            self._serve()
            return None
        problem: str | None = "the first rank failed"
        try:
            done = work()
            problem = None
            return done
        except UserError as error:
            problem = str(error)
            raise
        finally:
            collectives.broadcast_object(("", problem))

    def _serve(self) -> None:
        while True:
            name, arguments = collectives.broadcast_object(None)
            if name:
                getattr(self, name)(*arguments)
            elif arguments is not None:
                raise UserError(arguments)
            else:
                return

    def score(self, tokens: np.ndarray, lengths: Sequence[int], scored: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See evaluate/scoring.py; requests come as one array of all their tokens."""
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        requests = [Request(part.tolist(), count) for part, count in zip(parts, scored, strict=True)]
        vocabulary = self.shape.vocab_size
        return score(self.chunks, self.layout, vocabulary, requests, tokens_at_once=self.tokens_at_once)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        stops: Sequence[str],
        max_new_tokens: int,
        how: dict[str, Any],
    ) -> list[list[int]]:
        """See models/generation.py; `stops` end an answer, and so does each of the tokens `ends`."""
        sampling = Sampling(
            max_new_tokens,
            stop_tokens=ends,
            finished=stop_strings(self.tokenizer.decode, stops),
            seed=self.seed,
            **how,
        )
        with progress("answers", len(prompts), unit="prompts") as advance:
            return generate(
                self.chunks,
                self.layout,
                self.shape,
                prompts,
                sampling,
                batch_size=self.prompts_at_once,
                advance=lambda answers: advance(answers * self.layout.data),
            )


class MegatronLM(TemplateLM):
    """A language model for the harness; lives on rank 0."""

    def __init__(self, ranks: Ranks, rule: Rule) -> None:
        super().__init__()
        self.ranks, self.tokenizer, self.rule = ranks, ranks.tokenizer, rule

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.ranks.shape.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task does not say: the harness's number."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with what the tokenizer adds by itself unless the text begins with it."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (context, continuation). Raises UserError where one is not finite."""
        check_written(self.tokenizer, requests)
        return finite(requests, super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """What is too long loses its beginning, as in the harness's transformers backend."""
        if not requests:
            return []
        found = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"tasks=: {str(texts)[-80:]!r} is {len(continuation)} tokens after its context, of 1 to "
                    f"{self.max_length} that the model has positions for: leave the task out"
                )
            found.append(([*context, *continuation][-(self.max_length + 1) :], len(continuation)))
        tokens = np.concatenate([np.asarray(tokens, np.int32) for tokens, _ in found])
        values, greedy = self.ranks.run("score", tokens, [len(t) for t, _ in found], [count for _, count in found])
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, each in windows of the model's positions. Raises UserError where one is not finite."""
        check_written(self.tokenizer, requests)
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [value for value, _ in self._loglikelihood_tokens(windows)])
        return finite(requests, sums.tolist())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model goes on with after each context, up to a stop string. Raises UserError where logits are not finite."""
        check_written(self.tokenizer, requests)
        self.rule.say()
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            texts = self._answers([requests[n] for n in numbers], requests[numbers[0]].args[1])
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _answers(self, requests: Sequence[Any], options: dict[str, Any]) -> list[str]:
        """Answers to requests whose contexts are asked in the same way."""
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        stops = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        most = options.pop("max_gen_toks")
        unknown = sorted(set(options) - _KNOWN)
        if unknown or not 0 < most < self.max_length:
            what = f"generation_kwargs.{unknown[0]}" if unknown else f"generation_kwargs.max_gen_toks={most}"
            raise UserError(
                f"tasks=: {what} of a task is not for this model of {self.max_length} positions: leave the task out, or "
                "change its file"
            )
        how = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name) is not None}
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        prompts = [context[-(self.max_length - most) :] or [self.prefix_token_id] for context in contexts]
        how = how if options["do_sample"] else {}
        answers = self.ranks.run("generate", prompts, self.rule.stops, stops, most, how)
        for request, answer in zip(requests, answers, strict=True):
            if answer[-1] == NOT_FINITE:
                raise not_finite([request])
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return [postprocess_generated_text(text, stops, None) for text in texts]
