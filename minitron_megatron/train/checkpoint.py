"""Training checkpoints in a run folder: model, optimizer and step through Megatron's distributed checkpointing.

    output/checkpoints/step_00000100/     whole, or not there: written as .step_00000100.partial and renamed

Readable in any layout. No random state is kept: nothing draws in a step (no dropout), and the data order follows from the
seed and the step.
"""

import logging
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.reading import safe_reading
from minitron_megatron.checkpoints.weights import sharded_weights
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives

log = logging.getLogger(__name__)
KEEP = 2
_NAME = re.compile(r"step_(\d{8})")


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


def _state(chunks: Sequence[Any], optimizer: Any, step: int, *, loading: bool) -> dict[str, Any]:
    """What a checkpoint holds, as sharded tensors; the model's keys are those of a model folder."""
    metadata = _metadata()
    models = [sharded_weights(chunk.module, metadata) for chunk in chunks]
    state = {"model" if len(models) == 1 else f"model{i}": model for i, model in enumerate(models)}
    optimizer_state = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return {**state, "optimizer": optimizer_state, "step": step}


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that a save starts never get the signals that ask for a stop: they inherit that these are blocked.

    Slurm sends a signal to every process of a job. Megatron's writers start a helper in the first save that all later ones
    need; without this it dies of the very signal that asks for a save.
    """
    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        # Python's own helper lets SIGTERM in again when it starts: have it started.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def save(folder: Path, chunks: Sequence[Any], optimizer: Any, step: int) -> None:
    """Write a checkpoint, then drop all but the newest ones. Every rank calls it."""
    from megatron.core import dist_checkpointing

    name = f"step_{step:08d}"
    partial = folder / f".{name}.partial"
    if collectives.is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    collectives.barrier()
    with _undisturbed():
        dist_checkpointing.save(_state(chunks, optimizer, step, loading=False), str(partial), content_metadata=None)
    collectives.barrier()
    if collectives.is_rank_zero():
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        for _, old in find_checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
    collectives.barrier()
    log.info("step %d: saved %s", step, folder / name)


def load(path: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Fill model and optimizer from a checkpoint written in any layout; gives its step. Raises UserError."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        with safe_reading():
            state = dist_checkpointing.load(_state(chunks, optimizer, 0, loading=True), str(path))
    except (CheckpointingException, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): remove it, the run continues from the one before") from error
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
