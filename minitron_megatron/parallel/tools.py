"""Processes that only share out work on files: without torch where there is one, in a gloo group where there are more."""

import contextlib
import os
from collections.abc import Iterator

from minitron_megatron.parallel.layout import world_size_from_env


@contextlib.contextmanager
def tool_job() -> Iterator[None]:
    """A gloo group over all processes for commands that only share out work on files, whatever the layout."""
    # A dry run may be told of processes that are not there: nothing says where they would meet.
    if world_size_from_env() == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    import torch

    from minitron_megatron.parallel.job import process_group

    with process_group(torch.device("cpu")):
        yield


def check_device(device: str) -> None:
    """Raise UserError for a device that is not here, for commands whose stages use it; only device=cuda can be missing."""
    if device == "cuda":
        from minitron_megatron.parallel.job import pick_device

        pick_device(device)
