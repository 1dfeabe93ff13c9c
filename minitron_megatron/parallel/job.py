"""Starting and ending the process groups of a job.

`parallel_job` is for commands that run a model (tools.py has what others need). A second model may be laid out otherwise in the
same processes, with groups of its own (`process_groups`).
"""

import contextlib
import datetime
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.claims import number_of
from minitron_megatron.ending import ending_with_others, said_at_once
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.cpu import adapter
from minitron_megatron.parallel.deciding import check_same
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import settled

# A rank may wait this long for another, which may be reading a large folder.
TIMEOUT = datetime.timedelta(minutes=30)


_RELEASES: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Job:
    """A running job."""

    layout: Layout
    device: torch.device
    rank: int


def pick_device(device: str) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is some. Raises UserError."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device=cuda, but torch finds no CUDA device here: use device=cpu or auto")
    if device == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", number_of("LOCAL_RANK", 0))


@contextlib.contextmanager
def parallel_job(
    layout: Layout, *, seed: int, device: str = "auto", timeout: datetime.timedelta = TIMEOUT
) -> Iterator[Job]:
    """Process group, Megatron's groups and seeds, and the CPU adapter where needed; all ended on the way out.

    Within it `precision=auto` means the same on every rank (parallel/precision.py).

    `timeout` is how long a rank waits in a collective. Raises UserError for what this device cannot do.
    """
    where = pick_device(device)
    if layout.context > 1 and where.type == "cpu":
        raise UserError(
            f"parallel.context={layout.context} needs Transformer Engine's attention, which does not run on CPUs: "
            "use parallel.tensor with parallel.sequence=true for long sequences"
        )
    with contextlib.ExitStack() as stack:
        if where.type == "cpu":
            stack.enter_context(adapter())
        else:
            torch.cuda.set_device(where)
        stack.enter_context(process_group(where, timeout))
        check_same(_software(), "software")
        stack.enter_context(model_parallel(layout, seed, timeout))
        stack.enter_context(settled(where.type))
        yield Job(layout, where, dist.get_rank())


@contextlib.contextmanager
def process_group(
    device: torch.device, timeout: datetime.timedelta = TIMEOUT, *, alone: bool = False
) -> Iterator[None]:
    """torch.distributed over torchrun's processes, or over this one alone without any port: NCCL on GPUs, gloo on CPUs.

    Where there is a process group already it is used and left as it is. `alone` has this process work by itself, whatever
    torchrun started: the group of all can follow.
    """
    if dist.is_initialized():
        if alone and dist.get_world_size() > 1:
            raise ValueError(f"a process of a group of {dist.get_world_size()} is not alone")
        yield
        return
    # Without `device_id` a group's communicator is made when it is first used: Megatron makes two dozen groups, most jobs use
    # a few, and ending all of them took 10 s. Barriers then use the current device, which is set before, and say so.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    own = {"backend": "nccl" if device.type == "cuda" else "gloo"}
    with contextlib.ExitStack() as stack:
        if not alone and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            stack.enter_context(ending_with_others(timeout.total_seconds()))
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = _of_this_start(store)
            check_device_type(store, rank, device.type, timeout)
            dist.init_process_group(**own, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(**own, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(said_at_once())
        yield


def check_device_type(store: dist.Store, rank: int, device_type: str, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Raise UserError where a rank would take another kind of device than rank 0: they would wait for each other in vain.

    Before there is a group; `store` is where its ranks meet.
    """
    if rank == 0:
        store.set("device type", device_type)
        return
    # In short waits: a signal is heard between two of them.
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(["device type"]):
        if time.monotonic() > deadline:
            return  # the group that is made next says that nobody came
        time.sleep(0.02)
    of_rank_zero = store.get("device type").decode()
    if of_rank_zero != device_type:
        raise UserError(
            f"rank {rank} ({socket.gethostname()}) would run on {device_type}, rank 0 on {of_rank_zero}: mend its node, or say "
            "device=cpu"
        )


def _software() -> dict[str, str | None]:
    """What a rank computes with, by name: layers and kernels are chosen by it, which must not differ within a job."""

    def release(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "megatron-core", "transformer-engine", "triton", "minitron-megatron")
    return {name: release(name) for name in packages}


def _of_this_start(store: dist.Store) -> dist.Store:
    """The store without what an earlier start of the same job left in it: addresses of processes that are gone.

    torchrun's agents keep one store over restarts. Agents of several nodes may count restarts differently: there
    parallel/torchrun.py has each start make a store of its own.
    """
    if number_of("GROUP_WORLD_SIZE", 1) != 1:
        return store
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def model_parallel(
    layout: Layout, seed: int, timeout: datetime.timedelta = TIMEOUT, *, gloo_groups: bool = True
) -> Iterator[None]:
    """Megatron's groups and seeds for a layout, on a process group that is there already.

    `gloo_groups` makes one for the CPU beside each data-parallel group, which checkpoints use.
    Layouts can follow one another in a process: the groups made here are ended, not only forgotten as Megatron does, when
    everything that was left to `before_groups_end` has been given up.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if layout.world_size != dist.get_world_size():
        raise ValueError(f"{layout} on {dist.get_world_size()} processes")
    before = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=gloo_groups,
        distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),
    )
    try:
        torch.manual_seed(seed)
        # Transformer Engine's generators, where it is installed, can be taken into CUDA graphs.
        generators = {"te_rng_tracker": dist.get_backend() == "nccl", "force_reset_rng": True}
        model_parallel_cuda_manual_seed(seed, **generators)
        with said_at_once():
            yield
    finally:
        while _RELEASES:
            _RELEASES.pop()()
        parallel_state.destroy_model_parallel()
        # A gloo group of four ranks holds two threads and several open files: dozens of them a layout.
        for group in reversed(list(dist.distributed_c10d._world.pg_map)):
            if group not in before:
                dist.destroy_process_group(group)


def before_groups_end(release: Callable[[], None]) -> None:
    """Have something called before the groups of `model_parallel` are ended: what holds on to their communicators."""
    _RELEASES.append(release)


def process_groups(layout: Layout, timeout: datetime.timedelta = TIMEOUT) -> Any:
    """Groups of a layout beside those of `model_parallel`, as Megatron's ProcessGroupCollection; every rank must call this.

    `model_parallel` ends them with its own. Those for experts, and the embedding's, which only gradients need, are not there.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    axes = ("pipeline", "data", "context", "tensor")
    ranks = np.arange(layout.world_size).reshape([getattr(layout, axis) for axis in axes])

    def along(*names: str) -> Any:
        """This rank's group over some axes."""
        last = range(-len(names), 0)
        groups = np.moveaxis(ranks, [axes.index(name) for name in names], last)
        size = math.prod(getattr(layout, name) for name in names)
        return dist.new_subgroups_by_enumeration(groups.reshape(-1, size).tolist(), timeout=timeout)[0]

    return ProcessGroupCollection(
        tp=along("tensor"),
        cp=along("context"),
        pp=along("pipeline"),
        dp=along("data"),
        dp_cp=along("data", "context"),
        tp_cp=along("context", "tensor"),
        tp_dp_cp=along("data", "context", "tensor"),
        mp=along("pipeline", "tensor"),
    )
