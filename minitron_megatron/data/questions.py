"""Multiple-choice questions as sequences to score: each choice after its context, judged by its log-probability.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}          a JSON line
    {"context": ["He thanked Ann because Ann", "He thanked Ann because he"],                       partial scoring: a context
     "choices": [" had helped.", " had helped."], "answer": 0}                                     for each choice

    tokens   c c c c x x · ·      one request a choice: context, choice, padding on the right (causal: it changes nothing)
    scored           x x          Σ log p of these tokens given all before them

Text becomes tokens as in lm-evaluation-harness: spaces at a context's end go to the choice, both are encoded together, and the
choice's tokens are what follows as many tokens as the context has alone. The tokenizer adds the special tokens that it adds
by itself (Llama's a BOS, SmolLM2's none; none where the text begins with the BOS already); an empty context becomes the BOS, or
the end-of-sequence token where there is none.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minitron_megatron.data.coverage import Coverage
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import parse_json

log = logging.getLogger(__name__)

# Requests are padded to multiples of this many tokens; those of one padded length run together.
LENGTH_MULTIPLE = 32


@dataclass(frozen=True)
class Question:
    """A context for each choice, the choices, and which is right."""

    contexts: Sequence[str]
    choices: Sequence[str]
    answer: int


@dataclass(frozen=True)
class Request:
    """Context and continuation, of which the last `scored` tokens count."""

    tokens: Sequence[int]
    scored: int


class QuestionSource(Protocol):
    """Questions that become requests, and log-likelihoods of these that become figures."""

    name: str

    def texts(self) -> list[tuple[str, str, str]]:
        """Context, continuation, and where it comes from (for errors), of every request."""
        ...

    def figures(self, log_likelihoods: np.ndarray, normalization: str) -> dict[str, float]:
        """`questions`, `accuracy`, and `margin` where it is known, from a log-likelihood [requests] float64 of each."""
        ...


class QuestionFile:
    """Questions of a JSONL file. Raises UserError naming file and line."""

    def __init__(self, path: str, limit: int | None) -> None:
        self.path, self.name = Path(path), Path(path).stem
        self.questions = _read(self.path, limit)
        self.digest = "sha256:" + hashlib.sha256(self.path.read_bytes()).hexdigest()

    def texts(self) -> list[tuple[str, str, str]]:
        """See QuestionSource."""
        return [
            (context, choice, f"{self.path}:{line}")
            for line, question in self.questions.items()
            for context, choice in zip(question.contexts, question.choices, strict=True)
        ]

    def figures(self, log_likelihoods: np.ndarray, normalization: str) -> dict[str, float]:
        """See QuestionSource."""
        right, margins, first = 0, 0.0, 0
        for question in self.questions.values():
            scores = log_likelihoods[first : first + len(question.choices)] / lengths(question.choices, normalization)
            right += int(np.argmax(scores)) == question.answer
            margins += margin(scores, question.answer)
            first += len(question.choices)
        count = len(self.questions)
        return {"questions": count, "accuracy": right / count, "margin": margins / count}


def lengths(choices: Sequence[str], normalization: str) -> np.ndarray:
    """What log-likelihoods are divided by: 1, or each choice's characters (lm-eval's acc_norm) or bytes (acc_bytes)."""
    if normalization == "none":
        return np.ones(len(choices))
    return np.array([len(c if normalization == "characters" else c.encode()) for c in choices], np.float64)


def margin(scores: np.ndarray, answer: int) -> float:
    """How far the right choice's score is above the best of the others: where accuracies are equal it still tells."""
    return float(scores[answer] - np.delete(scores, answer).max())


def _read(path: Path, limit: int | None) -> dict[int, Question]:
    """Questions by their line numbers."""
    found: dict[int, Question] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions={path} cannot be read ({error}): give a JSONL file in UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found[number] = _question(line, f"{path}:{number}")
    if not found:
        raise UserError(f"questions={path} has no question: one JSON object with context, choices and answer a line")
    if limit is not None and limit > len(found):
        log.info("limit=%d, and questions=%s has %d questions: all of them are taken", limit, path, len(found))
    return dict(list(found.items())[:limit])


def _question(line: str, where: str) -> Question:
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({str(error)[:80]})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object with context, choices and answer")
    context, choices, answer = (record.get(key) for key in ("context", "choices", "answer"))
    if not _texts(choices) or len(choices) < 2 or not all(choices):
        raise UserError(f"{where}: choices must be a list of two texts or more, none of them empty")
    contexts = [context] * len(choices) if isinstance(context, str) else context
    if not _texts(contexts) or len(contexts) != len(choices):
        raise UserError(f"{where}: context must be a text, or a list of as many texts as there are choices")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: answer={answer!r} must be the number of a choice, 0 to {len(choices) - 1}")
    return Question(contexts, choices, answer)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def encode(tokenizer: Any, context: str, continuation: str) -> Request:
    """Tokens of a pair as lm-evaluation-harness makes them; see the module's text."""
    if not context:
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        whole = tokens if tokens[:1] == [prefix] else [prefix, *tokens]
        return Request(whole, len(whole) - 1)
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped

    def tokens_of(text: str) -> list[int]:
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer.encode(text, add_special_tokens=False) if begun else tokenizer.encode(text)

    whole = tokens_of(context + continuation)
    return Request(whole, len(whole) - len(tokens_of(context)))


def encode_all(tokenizer: Any, source: QuestionSource, max_positions: int) -> list[Request]:
    """Requests of a source's texts; says what the tokenizer cannot write of them.

    Raises UserError where one is too long for the model or has nothing to score, and where most of the text is lost.
    """
    requests, texts = [], source.texts()
    Coverage(tokenizer).of_texts((context + choice, where) for context, choice, where in texts).say()
    for context, continuation, where in texts:
        request = encode(tokenizer, context, continuation)
        if len(request.tokens) - 1 > max_positions:
            raise UserError(
                f"{where}: context and choice are {len(request.tokens)} tokens, more than the model's {max_positions} "
                "positions: shorten the context (or take fewer few-shot examples)"
            )
        if not 0 < request.scored < len(request.tokens):
            raise UserError(f"{where}: the choice {continuation[:40]!r} adds no tokens to its context")
        requests.append(request)
    return requests


def buckets(requests: Sequence[Request], multiple: int) -> Mapping[int, list[int]]:
    """Numbers of the requests of each padded length, a multiple of LENGTH_MULTIPLE and of `multiple`."""
    step = math.lcm(LENGTH_MULTIPLE, multiple)
    found: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        found.setdefault(math.ceil((len(request.tokens) - 1) / step) * step, []).append(number)
    return dict(sorted(found.items()))
