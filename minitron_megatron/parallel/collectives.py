"""Collectives with names, on Megatron's groups. In a process without a process group each one is a no-op.

Tensors are reduced in place and returned. Object collectives pickle: small control data only, never weights.

Torch takes seconds to import, and commands on files have no need of it: it is not imported here, but used once it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _live() -> Any:
    """torch.distributed where this process has a process group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    """This process's rank; 0 without a process group."""
    dist = _live()
    return dist.get_rank() if dist else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    dist = _live()
    return dist.get_world_size() if dist else 1


def is_rank_zero() -> bool:
    """Whether this is the process that writes shared files."""
    return rank() == 0


def on_last_stage() -> bool:
    """Whether this rank is on the last pipeline stage, where the loss is."""
    if not _live():
        return True
    ps = _groups()
    return ps.get_pipeline_model_parallel_rank() == ps.get_pipeline_model_parallel_world_size() - 1


def tensor_parallel_group() -> Any:
    """The ranks that share each matrix, and the vocabulary."""
    return _groups().get_tensor_model_parallel_group()


def sum_over_pipeline(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over the pipeline stages."""
    _live().all_reduce(tensor, group=_groups().get_pipeline_model_parallel_group())
    return tensor


def gather_over_pipeline(value: Any) -> list[Any]:
    """Small control data of every pipeline stage, by stage, on each of them."""
    ps = _groups()
    gathered: list[Any] = [None] * ps.get_pipeline_model_parallel_world_size()
    _live().all_gather_object(gathered, value, group=ps.get_pipeline_model_parallel_group())
    return gathered


def gather_over_data_parallel(value: Any) -> list[Any]:
    """Small control data of every data-parallel rank, by rank, on each of them."""
    ps = _groups()
    gathered: list[Any] = [None] * ps.get_data_parallel_world_size()
    _live().all_gather_object(gathered, value, group=ps.get_data_parallel_group())
    return gathered


def move_between_stages(
    tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, *, source: int, target: int
) -> torch.Tensor | None:
    """A pipeline stage's tensor, on another stage and no longer on its own; None everywhere else.

    Both stages call it, in the same order where there are several; others may. `tensor` counts on the source alone.
    """
    import torch

    ps, dist = _groups(), _live()
    group, mine = ps.get_pipeline_model_parallel_group(), ps.get_pipeline_model_parallel_rank()
    if mine == source:
        dist.send(tensor.contiguous(), dist.get_global_rank(group, target), group=group)
    if mine != target:
        return None
    received = torch.empty(*shape, dtype=dtype, device=torch.cuda.current_device())
    dist.recv(received, dist.get_global_rank(group, source), group=group)
    return received


def broadcast_from_last_stage[T: (torch.Tensor, float)](value: T) -> T:
    """The last pipeline stage's value on every stage: a float, or a tensor (in place; same shape and dtype everywhere)."""
    import torch

    dist = _live()
    if not dist:
        return value
    ps = _groups()
    whole = isinstance(value, torch.Tensor)
    tensor = value if whole else torch.tensor(value, dtype=torch.float64, device=torch.cuda.current_device())
    dist.broadcast(tensor, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
    return tensor if whole else tensor.item()


def gather_objects(value: Any) -> list[Any] | None:
    """Small control data of every rank, by rank, on rank 0; None elsewhere."""
    dist = _live()
    if not dist:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_rank_zero() else None
    dist.gather_object(value, gathered)
    return gathered


def all_gather_objects(value: Any) -> list[Any]:
    """Small control data of every rank, on every rank."""
    dist = _live()
    if not dist:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's small control data on every rank; what other ranks pass is ignored."""
    dist = _live()
    if not dist:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    dist = _live()
    if dist:
        import torch

        # NCCL would guess the device by the rank's number.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def _groups() -> Any:
    """Megatron's groups; imported late, because tools without a model need only the functions above."""
    from megatron.core import parallel_state

    return parallel_state


def sum_from_last_stage(values: Sequence[float], everywhere: Sequence[float] = ()) -> list[float]:
    """Sums over the job's ranks in float64, known to every rank afterwards.

    `values` are figures of the last pipeline stage, the same on all ranks of a tensor-parallel group, of which one
    counts; other stages give zeros. `everywhere` counts on every rank.
    """
    import torch
    from megatron.core import parallel_state as ps

    counts = ps.is_pipeline_last_stage(ignore_virtual=True) and ps.get_tensor_model_parallel_rank() == 0
    mine = [v if counts else 0.0 for v in values] + list(everywhere)
    total = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device())
    _live().all_reduce(total)
    return total.tolist()


def sum_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over every rank of the job."""
    dist = _live()
    if dist:
        dist.all_reduce(tensor)
    return tensor
