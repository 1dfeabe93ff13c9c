"""What holds of every answer to a task, by a model folder (adapter.py) as by a Hugging Face one (hf_tasks.py).

written       characters that the tokenizer has no token for are said, as of any text (data/coverage.py)
finite        a log-likelihood or logit that is not finite ends the evaluation: of NaNs the first choice would be the highest
generated     greedily, or as the task says, up to any end of text that the model's own configs name; nothing else of them counts
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import load_json
from minitron_megatron.checkpoints.hf_folder import CONFIG_FILES, GENERATION
from minitron_megatron.data.coverage import Coverage
from minitron_megatron.errors import UserError

# Of generation_config.json, what says neither how tokens are picked nor how long an answer is.
_NOT_SAID = ("transformers_version", "use_cache")
log = logging.getLogger(__name__)


def check_written(tokenizer: Any, requests: Sequence[Any]) -> None:
    """Say what a tokenizer cannot write of the texts of requests. Raises UserError where it is most of them."""
    texts = (
        (part, f"tasks=[{request.task_name}], document {request.doc_id}")
        for request in requests
        for part in request.args
        if isinstance(part, str)
    )
    Coverage(tokenizer).of_texts(texts).say()


def finite[T](requests: Sequence[Any], values: list[T]) -> list[T]:
    """The values of requests: log-likelihoods, alone or first in a tuple. Raises UserError that names one that is not finite."""
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value[0] if isinstance(value, tuple) else value):
            raise not_finite([request])
    return values


def not_finite(requests: Sequence[Any]) -> UserError:
    """What is said of requests of the harness to which a model has no answer."""
    names = sorted({str(request.task_name) for request in requests})
    which = f", document {requests[0].doc_id}" if len(requests) == 1 else ""
    return UserError(
        f"tasks=[{', '.join(names)}]{which}: the model's logits are not finite: its weights or precision= are at fault"
    )


class Rule:
    """How text is generated: `stops` are the tokens that end an answer; `say` tells once what of the configs is left out."""

    def __init__(self, configs: Path, eos_token_id: int) -> None:
        """By the folder that has config.json and generation_config.json, if any, and the tokenizer's end. Raises UserError."""
        found = [load_json(configs / name) if (configs / name).is_file() else {} for name in reversed(CONFIG_FILES)]
        ends = next((values["eos_token_id"] for values in found if values.get("eos_token_id") is not None), [])
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int for end in ends):
            raise UserError(f"{configs}: eos_token_id={ends} of {GENERATION} or config.json must be token ids: mend it")
        self.stops = sorted({*ends, eos_token_id})
        left_out = {k: v for k, v in found[0].items() if not k.endswith("_token_id") and k not in _NOT_SAID}
        self._left_out = [f"{k}={v}" for k, v in left_out.items() if v is not None and not k.startswith("_")]
        self._file = configs / GENERATION

    def say(self) -> None:
        """Say, the first time, what of the folder's own way to generate is left out."""
        if self._left_out:
            log.info("%s: %s left out: text is generated greedily, or as a task says", self._file, self._said())
            self._left_out = []

    def _said(self) -> str:
        return f"{', '.join(self._left_out)} {'is' if len(self._left_out) == 1 else 'are'}"
