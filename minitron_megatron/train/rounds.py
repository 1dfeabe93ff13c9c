"""A step in several calls of Megatron's schedule, with the gradients of one: they add up, and are reduced at the end.

    round 1, 2, …:   forward and backward, gradients stay on the rank
    last round:      forward and backward, then Megatron's finalize_model_grads over the gradients of all

A schedule takes its call for the whole step: it starts to reduce gradients in its last micro-batch and ends by reducing the rest
and dividing them by the tokens it has seen. Here only the last round's call may reduce, and none divides: that takes no pass of
its own where they are clipped (train/optimizer.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

# What a schedule reads of the (first) chunk's config to synchronise gradients and parameters.
_SYNCHRONISE = ("no_sync_func", "grad_sync_func", "param_sync_func", "finalize_model_grads_func")


class Rounds:
    """The rounds of one step; `chunks` are this rank's data-parallel wrappers."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks, self.config = chunks, chunks[0].config
        self.finalize = self.config.finalize_model_grads_func
        self.begun = False

    @contextmanager
    def running(self, *, last: bool) -> Iterator[None]:
        """Call the schedule once within."""
        config = self.config
        before = {name: getattr(config, name) for name in _SYNCHRONISE}
        with ExitStack() as stack:
            if self.begun:
                # Parameters have been gathered for the first round.
                config.param_sync_func = None
            self.begun = True
            if last:
                config.finalize_model_grads_func = self._finalize
            else:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
                config.no_sync_func, config.grad_sync_func = nullcontext, None
                config.finalize_model_grads_func = _nothing
            try:
                yield
            finally:
                for name, value in before.items():
                    setattr(config, name, value)

    def _finalize(self, model: list[Any], _: Any, **groups: Any) -> None:
        self.finalize(model, None, **groups)


def _nothing(*_: Any, **__: Any) -> None:
    return None
