"""A rank of a job of any size in one process: nothing is sent, tensors have shapes but no memory.

Megatron's groups, and the models built for them, are those of the real job: what a rank would hold can be counted.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from minitron_megatron.parallel.cpu import adapter
from minitron_megatron.parallel.job import model_parallel
from minitron_megatron.parallel.layout import Layout


@contextlib.contextmanager
def fake_job(layout: Layout, rank: int) -> Iterator[None]:
    """Be `rank` of a layout: within, modules are built on the meta device and collectives return at once.

    Only for building and counting, in a process without a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with adapter():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            with model_parallel(layout, seed=0, gloo_groups=False), torch.device("meta"):
                yield
        finally:
            dist.destroy_process_group()
