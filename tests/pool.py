"""One pool of worker processes for a whole pytest run: torch and Megatron are imported once, layouts follow one another.

    test ──(function, args)──▶ worker 0 … n-1, joined by a fresh gloo process group ──▶ [result of each rank]

Functions and results travel as bytes, so functions are top-level ones of an importable module and nothing is shared. A
worker that fails ends its group, which fails the ranks that wait for it; one that still hangs is killed and replaced.
"""

import atexit
import contextlib
import datetime
import faulthandler
import gc
import io
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_megatron.parallel.layout import Layout

WORKERS = 4
# Workers are forks of one process that has imported what takes long, and started no thread.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megatron.core.optimizer", "tests.jobs"])
# What other ranks need to notice that one of them failed.
GRACE = 10.0


class _Gloo(dist.ProcessGroupGloo):
    """Gloo with one device for all groups of a process: each of its own would be a loop that takes 10 ms to end."""

    device: Any = None

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        type(self).device = self.device or dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        options._devices, options._timeout, options._threads = [self.device], timeout, 2
        super().__init__(store, rank, size, options)


class WorkerError(Exception):
    """A rank raised or hung: the message has its traceback."""


class Pool:
    """Up to four workers, started when first needed; call it like a function."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        self._workers: dict[int, tuple[Any, Connection]] = {}
        # Files as a store are looked at every 10 ms, and a layout has dozens of groups.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._calls = 0
        # pytest may die without ending its fixtures; multiprocessing would then wait for the workers forever.
        atexit.register(self.close)

    def __call__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        layout: Layout | dict[str, Any] | None = None,
        seed: int = 1234,
        timeout: float = 120.0,
    ) -> list[Any]:
        """Run `function(*args)` on ranks 0 … world_size-1 and give their results by rank.

        With a layout (its world_size is filled in; a dict has only the fields that matter) Megatron's groups are set up
        around the call, with seeds from `seed`. Without one there is a process group only, and the function may start
        a `parallel_job` itself, as commands do.

        Raises:
            WorkerError: a rank raised, or did not answer within `timeout` seconds.
        """
        if isinstance(layout, dict):
            layout = Layout(**layout, world_size=world_size)
        elif layout is not None:
            layout = replace(layout, world_size=world_size)
        self._calls += 1
        store = self._store.port, f"call {self._calls}"
        task = _pack((function, args, layout, seed, world_size, store, timeout))
        self._start(world_size)
        for rank in range(world_size):
            self._workers[rank][1].send_bytes(task)
        answers = self._collect(world_size, timeout)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed:
            # The first to fail is the cause; later ones mostly report a lost connection.
            rank = next(iter(failed))
            also = f"\n(then ranks {sorted(set(failed) - {rank})} failed too)" if len(failed) > 1 else ""
            raise WorkerError(f"rank {rank} of {world_size}:\n{failed[rank]}{also}")
        return [answers[rank][1] for rank in range(world_size)]

    def _start(self, world_size: int) -> None:
        """Have so many live workers."""
        if not 1 <= world_size <= WORKERS:
            raise ValueError(f"world_size={world_size}: the pool has {WORKERS} workers")
        self._end([rank for rank, (process, _) in self._workers.items() if not process.is_alive()])
        missing = [rank for rank in range(world_size) if rank not in self._workers]
        for rank in missing:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_work, args=(rank, theirs, self._stack_file(rank)))
            process.start()
            theirs.close()
            self._workers[rank] = process, ours
        for rank in missing:
            # Importing Megatron is not the test's time.
            if not self._workers[rank][1].poll(300):
                raise WorkerError(f"worker {rank} did not start")
            self._workers[rank][1].recv_bytes()

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Each rank's (succeeded, result or traceback), in the order they came."""
        ranks = {pipe: rank for rank, (_, pipe) in self._workers.items() if rank < world_size}
        answers: dict[int, tuple[bool, Any]] = {}
        limit, deadline = f"within {timeout:g} s", time.monotonic() + timeout
        while len(answers) < world_size:
            waiting = [pipe for pipe, rank in ranks.items() if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                hung = [ranks[pipe] for pipe in waiting]
                answers.update({rank: (False, f"no answer {limit}; it was in\n{self._stack(rank)}") for rank in hung})
                self._end(hung)
                break
            for pipe in ready:
                try:
                    answers[ranks[pipe]] = _unpack(pipe.recv_bytes())
                except EOFError:
                    answers[ranks[pipe]] = (False, "the process died")
                    self._end([ranks[pipe]])
                if not answers[ranks[pipe]][0] and time.monotonic() + GRACE < deadline:
                    limit, deadline = f"{GRACE:g} s after another rank failed", time.monotonic() + GRACE
        return answers

    def _stack_file(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stack-{rank}")

    def _stack(self, rank: int) -> str:
        """Where a worker is now, from faulthandler."""
        os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return Path(self._stack_file(rank)).read_text()

    def _end(self, ranks: list[int], patience: float = 0.0) -> None:
        """End workers with their children (Megatron's checkpoint writers); an idle one goes by itself, given time."""
        gone = [self._workers.pop(rank) for rank in ranks]
        for _, pipe in gone:
            pipe.close()
        for process, _ in gone:
            process.join(patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def close(self) -> None:
        """End the workers."""
        self._end(list(self._workers), patience=10)
        self._folder.cleanup()
        atexit.unregister(self.close)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _work(rank: int, pipe: Connection, stack_file: str) -> None:
    """A worker's life: take a task, answer it, until the other end closes."""
    # A group of its own: its children can be ended with it, and Ctrl-C is left to pytest.
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(stack_file, "w") as stacks:
        import megatron.core.optimizer  # noqa: F401

        from minitron_megatron.parallel.cpu import adapter
        from tests import bars, computing

        computing.watch()
        bars.watch()
        dist.distributed_c10d.ProcessGroupGloo = _Gloo
        with adapter():
            # What is imported stays: collecting garbage after every layout need not look at it.
            gc.freeze()
            pipe.send_bytes(b"ready")
            while True:
                try:
                    task = pipe.recv_bytes()
                except EOFError:
                    return
                # Anew for each: commands that train take the signal for themselves, and put back what Python knows of.
                faulthandler.unregister(signal.SIGUSR1)
                faulthandler.register(signal.SIGUSR1, file=stacks)
                pipe.send_bytes(_answer(rank, task))


def _answer(rank: int, task: bytes) -> bytes:
    try:
        return _pack((True, _run(rank, *_unpack(task))))
    except BaseException:
        return _pack((False, traceback.format_exc()))


def _run(
    rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    layout: Layout | None,
    seed: int,
    world_size: int,
    store: tuple[int, str],
    timeout: float,
) -> Any:
    from minitron_megatron.parallel.job import model_parallel

    # Longer than the caller waits: who waits for a rank that hangs is still there when it is asked where it is.
    limit = datetime.timedelta(seconds=timeout + GRACE)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    port, call = store
    own = dist.PrefixStore(call, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit))
    dist.init_process_group("gloo", store=own, rank=rank, world_size=world_size, timeout=limit)
    try:
        if layout is None:
            return function(*args)
        with model_parallel(layout, seed, limit):
            return function(*args)
    finally:
        dist.destroy_process_group()
        _let_go()


def _let_go() -> None:
    """End what still holds groups of the layout that is over: each has a loop that wakes a hundred times a second.

    Megatron keeps the rotary embeddings that it was last asked for; and its optimizer's shards are views of the parameters, by
    whose nodes of autograd, and the hooks on these, it is a cycle that Python cannot collect.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.optimizer import DistributedOptimizer

    RotaryEmbedding.forward.cache_clear()
    for held in gc.get_objects():
        if type(held) is DistributedOptimizer:
            vars(held).clear()
    gc.collect()
