"""lm-evaluation-harness's own view of a Hugging Face folder, with what holds of every answer (answers.py)."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from minitron_megatron.config import EvaluateConfig
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.evaluate.answers import Rule, check_written, finite, not_finite
from minitron_megatron.evaluate.hf import cannot_be_loaded, load_model
from minitron_megatron.parallel.job import pick_device


class TransformersLM(HFLM):
    """A folder as transformers computes it: its `model` is the one that hf.py loads. Raises UserError where it cannot be."""

    def __init__(self, folder: Path, cfg: EvaluateConfig) -> None:
        self._folder, self._cfg = folder, cfg
        tokenizer = load_tokenizer(folder)
        self._rule = Rule(folder, tokenizer.eos_token_id)
        try:
            super().__init__(
                pretrained=str(folder),
                tokenizer=tokenizer,
                backend="causal",
                batch_size=cfg.trainer.micro_batch_size,
                device=pick_device(cfg.device).type,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise cannot_be_loaded(folder, error) from None

    def _create_model(self, *_: Any, **__: Any) -> None:
        """The harness's own way invents weights that a folder lacks."""
        from transformers import GenerationConfig

        self._model = load_model(self._folder, self._cfg)
        # top_k of its own is 50 where a task says nothing.
        self._model.generation_config = GenerationConfig(eos_token_id=self._rule.stops, top_k=0)

    def loglikelihood(self, requests: list[Any], **how: Any) -> list[tuple[float, bool]]:
        """See HFLM. Raises UserError where one is not finite."""
        check_written(self.tokenizer, requests)
        return finite(requests, super().loglikelihood(requests, **how))

    def loglikelihood_rolling(self, requests: list[Any], **how: Any) -> list[float]:
        """See HFLM. Raises UserError where one is not finite."""
        check_written(self.tokenizer, requests)
        return finite(requests, super().loglikelihood_rolling(requests, **how))

    def generate_until(self, requests: list[Any], **how: Any) -> list[str]:
        """See HFLM. Raises UserError where logits are not finite."""
        check_written(self.tokenizer, requests)
        self._rule.say()
        try:
            return super().generate_until(requests, **how)
        except FloatingPointError:
            raise not_finite(requests) from None

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
        from transformers import LogitsProcessorList

        checked = LogitsProcessorList([_check_logits])
        return super()._model_generate(context, max_length, stop, logits_processor=checked, **how)


def _check_logits(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A LogitsProcessor. Some logits may be −∞, not all of a row."""
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError
    return logits
