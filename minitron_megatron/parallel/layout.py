"""Parallel layouts, and starting and ending the process groups of a job.

    world = data × pipeline × context × tensor          ranks of one tensor-parallel group are neighbours:
    8 ranks, tensor 2, pipeline 2:   stage 0: [0 1] [2 3]     stage 1: [4 5] [6 7]      ([..] is a tensor group)

`parallel_job` is for commands that run a model; `tool_job` for those that only share out work on files. A second model may be
laid out otherwise in the same processes, with groups of its own (`process_groups`).
"""

import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.errors import UserError
from minitron_megatron.parallel.cpu import adapter

# A rank may wait this long for another, which may be reading a large folder.
TIMEOUT = datetime.timedelta(minutes=30)
_RELEASES: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Layout:
    """How a model is spread over `world_size` processes; Megatron's names without "model_parallel_size".

    `option` is what users set it with: the beginning of names in messages.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    sequence: bool = False
    context: int = 1
    world_size: int = 1
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None
    option: str = field(default="parallel", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out. Raises UserError."""
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{self.option}.{name}={getattr(self, name)} must be at least 1")
        part = self.tensor * self.pipeline * self.context
        if self.world_size % part:
            raise UserError(
                f"{self.option}.tensor × pipeline × context = {self.tensor} × {self.pipeline} × {self.context} = {part} does "
                f"not divide the number of processes, {self.world_size}: start a multiple of {part} "
                f"(torchrun --nproc-per-node; parallel.world_size= in a dry run), or use {' or '.join(self._neighbours())}"
            )
        if self.virtual_pipeline is not None and (self.pipeline < 2 or self.virtual_pipeline < 2):
            raise UserError(
                f"{self.option}.virtual_pipeline={self.virtual_pipeline} must be at least 2 and needs "
                f"{self.option}.pipeline of at least 2"
            )

    def _neighbours(self) -> list[str]:
        """The three nearest tensor × pipeline × context that divide the processes."""
        sizes = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
        wanted = (self.tensor, self.pipeline, self.context)
        fits = [
            (sum(abs(math.log2(size / want)) for size, want in zip(found, wanted, strict=True)), found)
            for tensor in sizes
            for pipeline in sizes
            for context in (sizes if self.context > 1 else [1])
            if self.world_size % math.prod(found := (tensor, pipeline, context)) == 0
        ]
        return [" × ".join(map(str, found)) for _, found in sorted(fits)[:3]]

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def rank(self, *, tensor: int, pipeline: int, data: int, context: int = 0) -> int:
        """The rank at a place of the layout, in Megatron's order."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def place(self, rank: int) -> tuple[int, int]:
        """(tensor, pipeline) place of a rank."""
        tensor, _, _, pipeline = self.coordinates(rank)
        return tensor, pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tensor, context, data, pipeline) place of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return tensor, context, data, pipeline

    def __str__(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        chunks = f" in {self.virtual_pipeline} chunks" if self.virtual_pipeline else ""
        return (" × ".join(named) or "one process") + chunks + (", sequence parallel" if self.sequence else "")

    @property
    def stages(self) -> int:
        """Model chunks that follow one another in the data flow: pipeline stages, times the chunks of each."""
        return self.pipeline * (self.virtual_pipeline or 1)

    @classmethod
    def from_config(cls, config: Any, world_size: int | None = None) -> "Layout":
        """From the `parallel` part of a config; `world_size` defaults to the config's, and that to torchrun's."""
        return cls(
            tensor=config.tensor,
            pipeline=config.pipeline,
            virtual_pipeline=config.virtual_pipeline,
            sequence=config.sequence,
            context=config.context,
            account_for_embedding=config.account_for_embedding,
            account_for_loss=config.account_for_loss,
            pipeline_layout=config.pipeline_layout,
            world_size=world_size or config.world_size or world_size_from_env(),
        )


@dataclass(frozen=True)
class Job:
    """A running job."""

    layout: Layout
    device: torch.device
    rank: int


def world_size_from_env() -> int:
    """Processes that torchrun (or srun with its variables) started; 1 for plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(device: str) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is some. Raises UserError."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device=cuda, but torch finds no CUDA device here: use device=cpu or auto")
    if device == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def parallel_job(
    layout: Layout, *, seed: int, device: str = "auto", timeout: datetime.timedelta = TIMEOUT
) -> Iterator[Job]:
    """Process group, Megatron's groups and seeds, and the CPU adapter where needed; all ended on the way out.

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
        stack.enter_context(model_parallel(layout, seed, timeout))
        yield Job(layout, where, dist.get_rank())


@contextlib.contextmanager
def tool_job() -> Iterator[None]:
    """A gloo group over all processes for commands that only share out work on files, whatever the layout."""
    # A dry run may be told of processes that are not there: nothing says where they would meet.
    if world_size_from_env() == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    with process_group(torch.device("cpu")):
        yield


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
    if not alone and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(**own, timeout=timeout)
    else:
        dist.init_process_group(**own, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


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
