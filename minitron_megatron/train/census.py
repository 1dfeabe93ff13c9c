"""What each rank of a planned job holds, counted from the real models built for it on the meta device.

layout ─▶ stage 0, 1, P-1 (ranks of a stage are alike; stages between hold no more than stage 1)
             └─▶ fake process group ─▶ GPTModel chunks of student, or teacher ─▶ Chunk counts
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from minitron_megatron.checkpoints.weights import sharded_weights
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.fake import fake_job
from minitron_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Chunk:
    """One model chunk of a rank: what it has, and how many numbers that are."""

    layers: tuple[int, ...]  # layer numbers from 0
    parameters: int
    layer_matrices: int  # of them in the layers' matrices
    largest: int  # the largest parameter
    embedding: bool
    head: bool
    stored: dict[str, int]  # key in a checkpoint: bytes of the whole tensor, all ranks' shards together


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage, and of one of the teacher's, which may be laid out otherwise."""

    number: int
    student: tuple[Chunk, ...]
    teacher: tuple[Chunk, ...]  # empty without a teacher
    teacher_number: int | None = None  # where the teacher has a layout of its own


def distinct_stages(pipeline: int, *, uniform: bool) -> list[int]:
    """The first, second and last stage: the others are as the second, or have a layer less. All where any differ."""
    return sorted({0, min(1, pipeline - 1), pipeline - 1}) if uniform else list(range(pipeline))


def take_census(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    teacher_layout: Layout | None = None,
) -> list[Stage]:
    """Build and count a rank of every distinct stage. Engines do not matter: their parameters are the same.

    With a layout of the teacher's own, a rank of every pair of the student's and the teacher's stages that meet on one.
    """
    uniform = student.uniform and (teacher is None or teacher.uniform) and layout.pipeline_layout is None
    numbers = distinct_stages(layout.pipeline, uniform=uniform)
    mine = {number: _chunks(student, layout, number, dtype) for number in numbers}
    if teacher is None:
        return [Stage(number, mine[number], ()) for number in numbers]
    own = teacher_layout or layout
    theirs = {
        number: _chunks(teacher, own, number, teacher_dtype)
        for number in distinct_stages(own.pipeline, uniform=uniform)
    }
    if teacher_layout is None:
        return [Stage(number, mine[number], theirs[number]) for number in numbers]
    pairs = {
        (_like(layout.place(rank)[1], mine, layout), _like(own.place(rank)[1], theirs, own))
        for rank in range(layout.world_size)
    }
    return [Stage(number, mine[number], theirs[other], other) for number, other in sorted(pairs)]


def _like(number: int, counted: Collection[int], layout: Layout) -> int:
    """The stage that was counted for a stage."""
    return number if number in counted else min(1, layout.pipeline - 1)


# A plan asks for the same rank with every micro-batch and way of recomputing.
@lru_cache(maxsize=64)
def _chunks(shape: ModelShape, layout: Layout, stage: int, dtype: torch.dtype) -> tuple[Chunk, ...]:
    """What a rank of a stage has."""
    # Context-parallel ranks hold the same weights, and the local layers that can be built anywhere know none of them.
    alike = replace(layout, context=1, world_size=layout.world_size // layout.context)
    with fake_job(alike, alike.rank(tensor=0, pipeline=stage, data=0)):
        return tuple(count_chunk(chunk) for chunk in build_model_chunks(shape, alike, dtype, "local"))


def count_chunk(chunk: Any) -> Chunk:
    """What a built GPTModel chunk of this rank has."""
    layers = chunk.decoder.layers
    parameters = [p.numel() for p in chunk.parameters()]
    return Chunk(
        layers=tuple(layer.layer_number - 1 for layer in layers),
        parameters=sum(parameters),
        layer_matrices=sum(p.numel() for p in layers.parameters() if p.ndim == 2),
        largest=max(parameters),
        embedding=chunk.pre_process,
        head=chunk.post_process,
        stored=_stored(chunk),
    )


def _stored(chunk: Any) -> dict[str, int]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    weights = sharded_weights(chunk)
    apply_factories(weights)
    return {t.key: math.prod(t.global_shape) * t.dtype.itemsize for t in nested_values(weights)}
