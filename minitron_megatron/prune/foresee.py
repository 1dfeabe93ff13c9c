"""What a pruned model would be, by counting alone: sizes, work, bytes a rank, and which layouts its sizes allow."""

import math

from minitron_megatron.config import PruneConfig
from minitron_megatron.console import print_table
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, flops_per_token, slots
from minitron_megatron.models.build import DTYPES
from minitron_megatron.models.limits import check_layout, tensor_sizes
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.live import Side
from minitron_megatron.prune.select import TARGETS

# Tensor cores work on tiles: sizes that are no multiple of this leave part of them idle.
TILE = 64


def bytes_of_ranks(shape: ModelShape, layout: Layout) -> list[int]:
    """Bytes of weights on each pipeline rank's tensor-parallel ranks (all hold the same), in the dtype on disk."""
    side = Side(shape, layout)
    itemsize = DTYPES[shape.dtype].itemsize
    held = [0] * layout.pipeline
    for slot in slots(shape):
        share = layout.tensor if slot.row.tensor_parallel_axis else 1
        for stage in side.stages(slot):
            held[stage] += math.prod(slot.shape(shape)) * itemsize // share
    return held


def layout_problems(shape: ModelShape) -> list[str]:
    """Tensor-parallel sizes up to 8 that do not fit, and sizes that tensor cores do not like; one line each."""
    problems = []
    for tensor in (2, 4, 8):
        try:
            check_layout(shape, Layout(tensor=tensor, world_size=tensor), "the target")
        except UserError as error:
            problems.append(str(error))
    sizes = {"hidden_size": {shape.hidden_size}, "ffn_hidden_size": set(shape.ffn_of_layers)}
    for name, values in sizes.items():
        problems += [
            f"{name}={size} is no multiple of {TILE}: tensor cores work on tiles of it"
            for size in sorted(values)
            if size % TILE
        ]
    return problems


def foresee(source: ModelShape, target: ModelShape, layout: Layout, cfg: PruneConfig) -> None:
    """Print source and target side by side, and the problems of the target's sizes."""
    length = cfg.data.sequence_length
    rows = [[name, getattr(source, name), getattr(target, name)] for name in TARGETS]
    before, after = count_parameters(source), count_parameters(target)
    rows += [
        ["parameters", before, after],
        ["share of the source", "", f"{after / before:.1%}"],
        ["without embeddings", *(count_parameters(shape, embedding=False) for shape in (source, target))],
        [f"GFLOP a token, forward, at {length} tokens", *(flops_per_token(s, length) / 1e9 for s in (source, target))],
        ["weights, GiB", *(_gib(sum(bytes_of_ranks(shape, Layout()))) for shape in (source, target))],
        [f"weights of a rank, GiB ({layout})", *(_most(shape, layout) for shape in (source, target))],
        ["parallel.tensor can be", *(", ".join(map(str, tensor_sizes(shape))) for shape in (source, target))],
    ]
    print_table("would be pruned", ["", "source", "target"], rows)
    problems = layout_problems(target)
    if problems:
        print_table("what the target's sizes do not divide by", ["problem"], [[p] for p in problems])


def _gib(size: int) -> float:
    return round(size / 2**30, 3)


def _most(shape: ModelShape, layout: Layout) -> object:
    try:
        check_layout(shape, layout)
    except UserError:
        return "does not fit"
    return _gib(max(bytes_of_ranks(shape, layout)))
