"""Random weights that are the same in any layout, so that losses of layouts can be compared.

Every tensor is drawn whole, by a generator seeded by its name and layer, where the model is; a rank keeps its part of it. That
is a GiB for a moment and no transfers, and a GPU draws 8 B values in less time than it takes to build the model.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from minitron_megatron.checkpoints.random_model import STANDARD_DEVIATION
from minitron_megatron.distill.routed import TeacherWeights
from minitron_megatron.models.axes import Slot, axis_table, output_slot, tensor_parallel_keep
from minitron_megatron.models.shape import ModelShape


def drawn_teacher(shape: ModelShape, seed: int) -> TeacherWeights:
    """A teacher with random weights, for any layout."""

    def rows(first: int, last: int) -> torch.Tensor:
        return _whole(output_slot(shape), shape, seed)[first:last]

    return TeacherWeights(shape, partial(draw_weights, shape, seed), rows)


@torch.no_grad()
def draw_weights(shape: ModelShape, seed: int, chunks: Sequence[torch.nn.Module], groups: Any = None) -> None:
    """Fill this rank's chunks: normal values with σ = 0.02 around 1 (gains) or 0.

    `groups` are those that the model was built with, if they are not Megatron's own.
    """
    from megatron.core import parallel_state as ps

    tensor = groups.tp if groups else ps.get_tensor_model_parallel_group()
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for row in axis_table(shape):
            for i, layer in enumerate(layers if row.stacked else [None]):
                parameter = row.parameter(parameters, i)
                if parameter is not None:
                    # Weights that are kept in FP8 are rounded when they are copied to.
                    parameter.copy_(_part(Slot(row, layer), shape, seed, tensor.rank(), tensor.size()))


def _whole(slot: Slot, shape: ModelShape, seed: int) -> torch.Tensor:
    """All of a tensor, of one layer, in bfloat16 like the models that are measured."""
    here = torch.device(torch.cuda.current_device())
    name = f"{seed}:{slot.row.name}:{slot.layer}"
    generator = torch.Generator(device=here)
    generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    drawn = torch.randn(slot.shape(shape), dtype=torch.bfloat16, device=here, generator=generator)
    return drawn.mul_(STANDARD_DEVIATION).add_(slot.row.mean)


def _part(slot: Slot, shape: ModelShape, seed: int, rank: int, size: int) -> torch.Tensor:
    """What a tensor-parallel rank of so many holds of it."""
    drawn, axis = _whole(slot, shape, seed), slot.row.tensor_parallel_axis
    if axis is None or size == 1:
        return drawn
    mine = tensor_parallel_keep(shape, rank, size, slot.layer)[axis]
    for dim, held in enumerate(slot.row.indices(shape, {axis: mine}, slot.layer)):
        if held is not None:
            drawn = drawn.index_select(dim, torch.as_tensor(held, device=drawn.device))
    return drawn
