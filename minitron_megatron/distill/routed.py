"""A teacher in a layout of its own, in the student's processes: each model is spread as suits it.

    student's micro-batches ──route tokens──▶ teacher's ranks ──teacher forward──▶ final hidden states on its last stage
                                                                                                │
    student's loss ◀─a block of logits── teacher's output matrix, sharded as the student's ◀──route hidden states──┘

It runs ahead of the student, whatever the pipelines: all ranks run the teacher together, then the student. What crosses from
one layout to the other are token ids and final hidden states (distill/routing.py); logits are made where the loss is, from the
teacher's output matrix, of which the student's last stage holds its shard of the vocabulary beside the student's own.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.distill.offload import offload_layers
from minitron_megatron.distill.routing import Side, route
from minitron_megatron.models.axes import output_slot
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.graphs import FrozenStage
from minitron_megatron.models.head import Head
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.job import process_groups
from minitron_megatron.parallel.layout import Layout

# What a teacher is told of a micro-batch, [b, s] integers each; the last only where samples hold several documents.
_OF_TOKENS = ("tokens", "position_ids", "documents")


@dataclass(frozen=True)
class TeacherWeights:
    """A teacher's sizes, and where its weights come from.

    `fill(chunks, groups)` gives this rank's pipeline chunks their values, in the layout of these groups (None: of Megatron's
    own); `rows(first, last)` is that part of the output matrix, [last - first, hidden], of the padded vocabulary.
    """

    shape: ModelShape
    fill: Callable[[Sequence[torch.nn.Module], Any], None]
    rows: Callable[[int, int], torch.Tensor]

    @classmethod
    def of_folder(cls, folder: ModelFolder) -> "TeacherWeights":
        """Those of a model folder."""
        shape = folder.shape

        def fill(chunks: Sequence[torch.nn.Module], groups: Any) -> None:
            load_model(chunks, folder, groups)

        def rows(first: int, last: int) -> torch.Tensor:
            return WeightReader(folder.weights).read_slot(output_slot(shape), shape, first, last)

        return cls(shape, fill, rows)


class RoutedTeacher:
    """A frozen model in a layout of its own that answers with logits in the student's, in the order of the micro-batches.

    Args:
        weights: the teacher; every rank fills its own part here.
        own, student: both layouts, over the same processes; Megatron's own state is set up for the student's.
        dtype, engine: what it computes in (models/build.py).
        fp8: fields of Megatron's TransformerConfig for layers in FP8 (models/fp8.py).
        head_fp8: the output matrix is in FP8.
        offload: its layers are in CPU memory (distill/offload.py).
        graphs: its layers run as a CUDA graph (models/graphs.py).
        ahead: how many micro-batches of the student's rank it runs before the student's pass over them; None for any number.
    """

    def __init__(
        self,
        weights: TeacherWeights,
        own: Layout,
        student: Layout,
        dtype: torch.dtype,
        engine: str,
        ahead: int | None,
        *,
        fp8: Mapping[str, Any] | None = None,
        head_fp8: bool = False,
        offload: bool = False,
        graphs: bool = False,
    ) -> None:
        self.own, self.student, self.ahead = own, student, ahead
        self.hidden_size, self.dtype = weights.shape.hidden_size, dtype
        self.groups = process_groups(own)
        with torch.no_grad():
            self.chunks = build_model_chunks(weights.shape, own, dtype, engine, fp8, groups=self.groups)
            if offload:
                offload_layers(self.chunks)
            weights.fill(self.chunks, self.groups)
        if graphs:
            FrozenStage(self.chunks[-1])
        self.chunks[-1].requires_grad_(False)
        if self.chunks[-1].post_process:
            # Logits are made in the student's layout: the matrix would stand here unused.
            self.chunks[-1].output_layer.weight = None
        self.head = RoutedHead(weights, student, dtype, head_fp8) if collectives.on_last_stage() else None
        self.states: deque[torch.Tensor] = deque()

    def run_ahead(self, batches: Sequence[Batch]) -> None:
        """Run these micro-batches, of all data-parallel ranks, and keep final hidden states where the student's loss is."""
        samples, share = batches[0]["tokens"].shape
        length, count = share * self.student.context, len(batches) * self.student.data
        mine = self._tokens(batches, count, length)
        here = torch.cuda.current_device()
        like = torch.empty((0, samples, self.hidden_size), dtype=self.dtype, device=here)
        source, target = Side.of_final_states(self.own), Side.of_final_states(self.student)
        states = self._forward(mine, count, samples, length)
        self.states = deque(route(states, source, target, count=count, length=length, like=like))

    def _tokens(self, batches: Sequence[Batch], count: int, length: int) -> list[Batch]:
        """The micro-batches of this rank in the teacher's layout."""
        names = [name for name in _OF_TOKENS if name in batches[0]]
        given = [torch.stack([batch[name] for name in names], dim=-1).transpose(0, 1) for batch in batches]
        source, target = Side.of_tokens(self.student), Side.of_tokens(self.own)
        routed = route(given, source, target, count=count, length=length, like=given[0])
        return [dict(zip(names, part.transpose(0, 1).contiguous().unbind(-1), strict=True)) for part in routed]

    def _forward(self, mine: list[Batch], count: int, samples: int, length: int) -> list[torch.Tensor]:
        """Final hidden states of the teacher's micro-batches on its last stage, [s / its shares, b, hidden] each."""
        # Every data-parallel rank runs as many, since a pipeline's ranks have to agree: where they do not come out even,
        # the last ranks run something whose result nobody takes.
        rounds = -(-count // self.own.data)
        share = length // self.own.context
        idle = torch.zeros((samples, share), dtype=torch.int64, device=torch.cuda.current_device())
        filler = mine[-1] if mine else dict.fromkeys(_OF_TOKENS[:2], idle)

        def keep(batch: Batch, *, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states

        states = forward_only(
            self.chunks,
            [*mine, *[filler] * (rounds - len(mine))],
            num_micro_batches=rounds,
            micro_batch_size=samples,
            sequence_length=length,
            collect=keep,
            groups=self.groups,
        )
        return states[: len(mine)]

    def targets(self, batch: Batch, split: str) -> Head:
        """What makes logits of the next micro-batch in order; `batch` is that micro-batch, whatever `split` it is of."""
        return self.head(self.states.popleft())


class RoutedHead:
    """The teacher's output matrix [V / tp, hidden], sharded over the student's tensor-parallel ranks on its last stage."""

    def __init__(self, weights: TeacherWeights, layout: Layout, dtype: torch.dtype, fp8: bool) -> None:
        from megatron.core import parallel_state as ps

        rows = weights.shape.padded_vocab_size // layout.tensor
        first = ps.get_tensor_model_parallel_rank() * rows
        weight = weights.rows(first, first + rows).to(device=torch.cuda.current_device(), dtype=dtype)
        self.weight = Fp8Matrix.of(weight) if fp8 else weight
        self.split, self.group = Side.of_final_states(layout).split, ps.get_tensor_model_parallel_group()

    @torch.no_grad()
    def __call__(self, hidden_states: torch.Tensor) -> Head:
        """With the states of a micro-batch, [s / tp if sequence parallel, b, hidden]."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        whole = gather_from_sequence_parallel_region(hidden_states, group=self.group) if self.split else hidden_states
        return Head(whole, self.weight)
