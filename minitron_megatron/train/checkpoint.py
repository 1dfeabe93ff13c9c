"""Training checkpoints in a run folder: model, optimizer, guard, objective and step, by Megatron's distributed checkpointing.

    output/checkpoints/step_00000100/     whole, or not there: written as .step_00000100.….partial and renamed

Each says its step's validation loss; the one of the lowest is not dropped (trainer.keep_best).
Each file is digested by the process that has written it, and every byte is compared before a run goes on, a share by each rank.
Rank 0 decides which checkpoint is taken: the newest whole one.

Of two formats of the optimizer's state (`trainer.checkpoint_format`), `fully_reshardable` can be read in any layout, and gathers
a TP × PP shard's float32 state on one rank's CPU to write it; `dp_reshardable` copies nothing, for frequent saves, and can be
read in another number of data-parallel ranks only, as can the scales of `trainer.fp8=delayed`. No random state is kept: nothing
draws in a step (no dropout), and the data order follows from the seed and the step.
"""

import json
import logging
import math
import queue
import re
import secrets
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial as bound
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.copies import check_copies, share_of_node
from minitron_megatron.checkpoints.damage import cause_of, is_damage
from minitron_megatron.checkpoints.digests import FileDigest, digest_files, other_segments, segments_of
from minitron_megatron.checkpoints.reading import safe_reading
from minitron_megatron.checkpoints.weights import sharded_weights, without_crc32
from minitron_megatron.claims import number_of
from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.first_moments import STATUS_OF_SIGNAL
from minitron_megatron.machine import usable_cores
from minitron_megatron.models.fp8 import delayed_scales, set_delayed_scales
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero, from_rank_zero, wait_until_seen
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.plain_files import read_json
from minitron_megatron.train import saved
from minitron_megatron.train.saved import FORMAT, Checkpoint, Damaged, OfRun, Written, described, find_best, places

log = logging.getLogger(__name__)
# In a checkpoint that is being written: digests of what a rank has written.
_OF_RANK = ".digests_{}.json"
_OF_RANK_NAME = re.compile(r"\.digests_\d+\.json")


def _metadata(sharding: str) -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    return {
        "distrib_optim_sharding_type": sharding,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


def _state(
    chunks: Sequence[Any], optimizer: Any, sharding: str, plain: dict[str, Any], *, loading: bool, scales: bool
) -> dict[str, Any]:
    """What a checkpoint holds, as sharded tensors; the model's keys are those of a model folder."""
    metadata = _metadata(sharding)
    models = [sharded_weights(chunk.module, metadata) for chunk in chunks]
    state = {"model" if len(models) == 1 else f"model{i}": model for i, model in enumerate(models)}
    found = {**state, "optimizer": optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata), **plain}
    if scales:
        found["fp8_scales"] = _of_this_place([delayed_scales(chunk.module) for chunk in chunks])
    return found


def _of_this_place(data: Any) -> Any:
    """What the ranks of a tensor- and pipeline-parallel place have, and those of others have not, for Megatron's checkpoints."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    tensor, pipeline = ps.get_tensor_model_parallel_group(), ps.get_pipeline_model_parallel_group()
    return ShardedObject(
        "fp8_scales",
        data,
        (tensor.size(), pipeline.size()),
        (tensor.rank(), pipeline.rank()),
        replica_id=ps.get_data_parallel_rank(with_context_parallel=True),
    )


def has_scales(options: TrainerConfig) -> bool:
    """Whether a run's FP8 scales come from past steps, so that it needs them to go on as if it had not stopped."""
    return options.fp8 == "delayed"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that a save starts never get the signals that ask for a stop: they inherit that these are blocked.

    Slurm sends a signal to every process of a job, as a terminal does at Ctrl-C. Writers beside later steps have a helper that
    the first save starts and all later ones need; without this it dies of the very signal that asks for a save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS_OF_SIGNAL)
    try:
        # Python's own helper lets SIGTERM in again when it starts: have it started.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STATUS_OF_SIGNAL)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _own_queue() -> Iterator[None]:
    """Have Megatron's writers, which are threads of this process, tell it here what they have written.

    Megatron's queue is in a process that imports torch before it takes the first result: 4 s of a run's first save.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


class Saver:
    """Writes a run's checkpoints, one at a time: at once, or beside the steps that follow (trainer.async_save).

        step ─▶ save: state copied to the CPU, ─▶ next steps ─▶ finish: all ranks have written? then the index, a rename
                a child process writes files                          and old ones are dropped; until then it is not there

    A child has this process's memory as it was when it started, so that on CPUs too no later step shows in what it writes.
    """

    def __init__(self, folder: Path, layout: Layout, options: TrainerConfig, of_run: OfRun) -> None:
        """Checkpoints of a run go into `folder`; `options` say how many stay, in which format, and how they are written.

        `of_run` is what each says of the run.
        """
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.folder, self.layout, self.options, self.of_run = folder, layout, options, of_run
        self.calls = AsyncCallsQueue()

    def save(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        step: int,
        *,
        guard: dict[str, Any],
        objective: dict[str, Any],
        figures: Mapping[str, float],
    ) -> None:
        """Write a checkpoint, then drop all but the newest ones and the best. Every rank calls it.

        Args:
            chunks, optimizer: this rank's part.
            step: optimizer steps done.
            guard, objective: their states, plain values.
            figures: of the step, by name: the loss, and the validation loss where it was validated.

        Raises:
            UserError: it, or the one before it, could not be written. Those that were whole still are.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        name = f"step_{step:08d}"
        partial = self._begin(name)
        plain = {"step": step, "guard": guard, "objective": objective}
        with _undisturbed(), _telling(self.folder), nullcontext() if self.options.async_save else _own_queue():
            state = _state(
                chunks, optimizer, self.options.checkpoint_format, plain, loading=False, scales=has_scales(self.options)
            )
            request = dist_checkpointing.save(
                state,
                str(partial),
                _strategy("save", self.options.parallel_save),
                async_sharded_save=True,
                async_strategy="mcore",
            )
            writes = request.async_fn is not None
            if writes:
                threads = 1 if self.options.async_save else _threads()
                request = request._replace(async_fn=bound(_write_and_digest, request.async_fn, threads))
            request.add_finalize_fn(lambda: self._complete(partial, name, step, figures, writes))
            if self.options.async_save:
                self.calls.schedule_async_request(request)
                log.info("step %d: saving %s meanwhile", step, self.folder / name)
            else:
                request.execute_sync()

    def finish(self, *, wait: bool = True) -> None:
        """Complete the checkpoint that is being written, once all ranks are done with it: now, or if they are, without a wait.

        Every rank calls it, after each step without a wait. Raises UserError as `save`.
        """
        if self.calls.get_num_unfinalized_calls():
            with _telling(self.folder):
                self.calls.maybe_finalize_async_calls(blocking=wait)

    def _begin(self, name: str) -> Path:
        """A folder to write to, of a name of its own: a killed run may have left a process that still writes to the last one."""

        def make() -> Path:
            for left in self.folder.glob(".step_*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            partial = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
            partial.mkdir(parents=True)
            return partial

        partial = ask_rank_zero(make)
        wait_until_seen(partial)
        return partial

    def _complete(self, partial: Path, name: str, step: int, figures: Mapping[str, float], writes: bool) -> None:
        """All ranks have written: the folder gets its name. Every rank calls it; `writes` says whether this one wrote files."""
        mine, own = {}, partial / _OF_RANK.format(collectives.rank())
        if writes:
            mine = read_json(own) if own.is_file() else None
            own.unlink(missing_ok=True)
        parts = collectives.gather_objects(mine)

        def give_name() -> None:
            if None in parts:
                raise UserError(
                    f"{self.folder / name} could not be written: rank {parts.index(None)}'s writer ended before its files were "
                    "digested; run the same command again, which continues from the last whole one"
                )
            self._describe(partial, step, {file: digest for part in parts for file, digest in part.items()}, figures)
            if (self.folder / name).is_dir():
                _remove(self.folder / name)
            partial.rename(self.folder / name)
            _drop_old(self.folder, self.options)

        from_rank_zero(give_name)
        wait_until_seen(self.folder / name)
        log.info("step %d: saved %s", step, self.folder / name)

    def _describe(self, partial: Path, step: int, digests: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Write format.json: what is in the checkpoint, with the digests of the ranks and of what rank 0 wrote beside them."""
        files = {name: FileDigest.from_json(one) for name, one in digests.items()}
        there = [path.name for path in partial.iterdir() if not _OF_RANK_NAME.fullmatch(path.name)]
        files |= digest_files(partial, set(there) - set(files) - {FORMAT})
        written = Written(
            self.options.checkpoint_format,
            has_scales(self.options),
            places(self.layout),
            step,
            files=dict(sorted(files.items())),
            figures={name: value for name, value in figures.items() if math.isfinite(value)},
            keep_best=self.options.keep_best,
            **vars(self.of_run),
        )
        written.write(partial)


def _write_and_digest(
    write: Callable[..., None], threads: int, rank: int, buckets: Sequence[Any], results: Any
) -> None:
    """Have Megatron's writer write a rank's files, and digest them: in this process, or in the one that was forked for it.

    Args:
        write: the writer; it puts what went wrong into `results`.
        threads: that digest.
        rank: whose files they are.
        buckets: (path, name, what is in it) of every file.
        results: for the writer.
    """
    with without_crc32():
        write(rank, buckets, results)
    files = [Path(path) for path, *_ in buckets]
    if not all(file.is_file() for file in files):
        return  # the writer has said why
    folder = files[0].parent
    found = digest_files(folder, [file.name for file in files], threads)
    text = json.dumps({name: digest.to_json() for name, digest in found.items()})
    (folder / _OF_RANK.format(rank)).write_text(text, encoding="utf-8")


def _threads() -> int:
    """That digest files in this process: its share of the machine's cores."""
    return max(1, usable_cores() // max(1, number_of("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """One line for what goes wrong in a writer, on any rank. Megatron's writers log the reason, and pass on that there is one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"{folder}: a checkpoint could not be written (its writer's error is above; {free:.2f} GB are free there): "
            "mend it and run the same command again, which continues from the last whole one"
        ) from error


def _strategy(kind: str, shared: bool) -> Any:
    """How Megatron saves or loads ("save", "load"): what all data-parallel ranks have is shared out over them, or it is not."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.strategies import fully_parallel, torch

    plain, wrapper = {
        "save": (torch.TorchDistSaveShardedStrategy, fully_parallel.FullyParallelSaveStrategyWrapper),
        "load": (torch.TorchDistLoadShardedStrategy, fully_parallel.FullyParallelLoadStrategyWrapper),
    }[kind]
    return wrapper(plain(), ps.get_data_parallel_group(with_context_parallel=True)) if shared else plain()


def _drop_old(folder: Path, options: TrainerConfig) -> None:
    """Remove all checkpoints but the newest and the best, and where the best is kept those that nobody knows not to be it."""
    best = find_best(folder, kept=not options.keep_best)
    for old, written in list(described(folder))[: -options.keep_last]:
        unknown = options.keep_best and isinstance(written, Damaged)
        if not unknown and (best is None or old != best[0]):
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """A checkpoint loses its name first: what a kill leaves of it counts as none, and is swept by the next save."""
    gone = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def newest(folder: Path, *, verify: bool = False) -> Checkpoint | None:
    """The newest checkpoint of a run whose bytes are those that were written; the same on every rank, all of which call it.

    Newer ones that are damaged are set aside, which rank 0 says in a line each. With `verify` every node reads every byte.

    Raises:
        UserError: there are checkpoints, and none is whole; or a rank reads other bytes than rank 0, or cannot read them.
    """
    damaged: dict[str, str] = {}
    while True:
        found, damaged = ask_rank_zero(bound(saved.newest_whole, folder, damaged))
        reason = None if found is None else other_bytes(found, verify=verify)
        if reason is None:
            break
        damaged[found.path.name] = reason

    def put_aside() -> None:
        for name, reason in damaged.items():
            aside = saved.set_aside(folder / name)
            log.warning(
                "%s is damaged (%s): going on from step %d; it is now %s, and can be removed",
                folder / name,
                reason,
                found.step,
                aside.name,
            )

    from_rank_zero(put_aside)
    return found


def check_whole(path: Path, *, verify: bool = False) -> None:
    """Raise UserError where a checkpoint of another run, which this one begins with, is damaged. Every rank calls it."""
    reason = other_bytes(ask_rank_zero(bound(saved.whole, path)), verify=verify)
    if reason is not None:
        raise saved.is_damaged(path, reason)


def other_bytes(found: Checkpoint, *, verify: bool = False) -> str | None:
    """What is not as it was written of a checkpoint; None where all is. Every rank calls it, and reads its share.

    The share is one of the job's bytes, or with `verify` of its node's. Nodes may have copies on disks of their own: every rank
    looks at a little of every file, too (copies.py).

    Raises:
        UserError: a rank reads other bytes than rank 0 does, or cannot read them.
    """
    files, path = found.written.files, found.path
    if files is None:
        if collectives.is_rank_zero():
            log.warning("%s was written by an earlier version, without digests: its bytes are not compared", path)
        check_copies(files=ask_rank_zero(lambda: [str(file) for file in path.iterdir() if file.is_file()]))
        return None
    ours = segments_of(files)
    share = share_of_node(ours) if verify else ours[collectives.rank() :: collectives.world_size()]
    wait_until_seen(path, *sorted(path / name for name in files))
    everything = collectives.all_gather_objects((socket.gethostname(), *_others(path, files, share)))
    for rank, (host, _, problem) in enumerate(everything):
        if problem is not None:
            raise UserError(
                f"{path} cannot be read by rank {rank} on {host} ({problem}): nothing says that it is damaged"
            )
    suspects = [(place, rank, host) for rank, (host, others, _) in enumerate(everything) for place in others]
    if not suspects:
        check_copies(files=[path / name for name in (FORMAT, *files)])
        return None
    # A node that has another folder there, or an old view of it, does not make a checkpoint a damaged one.
    own = ask_rank_zero(lambda: _others(path, files, [place for place, *_ in suspects])[0])
    for (name, number), rank, host in suspects:
        if (name, number) not in own:
            raise UserError(
                f"{path}: rank {rank} on {host} reads other bytes of {name} than rank 0 does: have one folder for all nodes"
            )
    return f"{own[0][0]} has other bytes than were written"


def _others(
    path: Path, files: Mapping[str, FileDigest], places: Sequence[tuple[str, int]]
) -> tuple[list[tuple[str, int]], str | None]:
    """Segments that are others now, all of them where a file is gone; and what kept this rank from reading them."""
    try:
        return other_segments(path, files, places, _threads()), None
    except FileNotFoundError:
        return list(places), None
    except OSError as error:
        return [], in_one_line(error, 160)


def load(
    path: Path, chunks: Sequence[Any], optimizer: Any, options: TrainerConfig
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Fill model and optimizer from a checkpoint; gives its step and the states of guard and objective.

    Its bytes were compared: what goes wrong is no damage, and is raised as it is. Raises UserError where a checkpoint of an
    earlier version, which has no digests, cannot be read.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    wait_until_seen(path)
    written = ask_rank_zero(lambda: saved.whole(path)).written
    try:
        with safe_reading():
            # A run in other arithmetic may have begun with this: its scales begin anew.
            scales = has_scales(options) and written.scales
            wanted = _state(chunks, optimizer, written.optimizer, {}, loading=True, scales=scales)
            state = dist_checkpointing.load(wanted, str(path), _strategy("load", options.parallel_load))
    except (CheckpointException, Exception) as error:
        cause = cause_of(error) if isinstance(error, CheckpointException) else error
        if written.files is None and is_damage(cause) and not isinstance(cause, UserError):
            raise UserError(
                f"{path} is damaged ({in_one_line(cause, 200)}): remove it, the run continues from the one before"
            ) from error
        if cause is error:
            raise
        raise cause from error
    # Megatron finds a parameter group by its rates, too, which are others where a run begins with another one's checkpoint.
    rates = {name: value for name, value in optimizer.param_groups[0].items() if name in ("max_lr", "min_lr")}
    for group in state["optimizer"]["optimizer"]["param_groups"]:
        group.update(rates)
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"], strict=False)
        if scales:
            set_delayed_scales(chunk.module, state["fp8_scales"][i])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), state["guard"], state["objective"]
