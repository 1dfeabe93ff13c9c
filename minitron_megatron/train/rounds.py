"""A step in several calls of Megatron's schedule, with the gradients of one: they add up, and are reduced at the end.

    round 1, 2, …:   forward and backward, gradients stay on the rank, tokens are counted
    last round:      forward and backward, then Megatron's finalize_model_grads over the gradients and tokens of all

A schedule takes its call for the whole step: it starts to reduce gradients in its last micro-batch and ends by reducing the rest
and dividing by the tokens it has seen. Here only the last round's call may; the others find those functions turned off.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

# What a schedule reads of the (first) chunk's config to synchronise gradients and parameters.
_SYNCHRONISE = ("no_sync_func", "grad_sync_func", "param_sync_func", "finalize_model_grads_func")


class Rounds:
    """The rounds of one step; `chunks` are this rank's data-parallel wrappers."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks, self.config = chunks, chunks[0].config
        self.finalize = self.config.finalize_model_grads_func
        self.tokens: list[torch.Tensor] = []

    @contextmanager
    def running(self, *, last: bool) -> Iterator[None]:
        """Call the schedule once within."""
        config = self.config
        before = {name: getattr(config, name) for name in _SYNCHRONISE}
        with ExitStack() as stack:
            if self.tokens:
                # Parameters have been gathered for the first round.
                config.param_sync_func = None
            if last:
                config.finalize_model_grads_func = self._finalize
            else:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
                config.no_sync_func, config.grad_sync_func = nullcontext, None
                config.finalize_model_grads_func = self._count
            try:
                yield
            finally:
                for name, value in before.items():
                    setattr(config, name, value)

    def _count(self, _: list[Any], num_tokens: torch.Tensor, **__: Any) -> None:
        self.tokens.append(num_tokens)

    def _finalize(self, model: list[Any], num_tokens: torch.Tensor, **groups: Any) -> None:
        self.finalize(model, num_tokens + sum(self.tokens), **groups)
