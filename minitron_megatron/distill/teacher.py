"""The teacher beside the student: frozen, in the same process and layout, giving final hidden states a micro-batch.

    pipeline = 1:  student's micro-batch m asks ──▶ teacher runs m now
    pipeline > 1:  teacher runs micro-batches of the step through its stages (all, or at most `ahead`), the last stage keeps
                   their final hidden states [s, b, teacher hidden]; the student's pass takes and frees them one by one

Logits are made only when the loss asks for them, a block of tokens at a time. A teacher in a layout of its own is in
distill/routed.py.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from minitron_megatron.models.forward import Batch, attention_mask, forward_only
from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.graphs import FrozenStage
from minitron_megatron.models.head import Head
from minitron_megatron.parallel import collectives


class Teacher:
    """Frozen model chunks that answer with their head in the order of the micro-batches.

    With a pipeline `ahead` is how many micro-batches it runs before the student's pass over them; None for any number.
    `head_fp8` has its output matrix in FP8, `graphs` its layers run as a CUDA graph.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        pipelined: bool,
        ahead: int | None = None,
        head_fp8: bool = False,
        graphs: bool = False,
    ) -> None:
        self.chunks, self.pipelined = list(chunks), pipelined
        self.ahead = ahead if pipelined else None
        self.states: deque[torch.Tensor] = deque()
        self.head: tuple[Any, Any] | None = None
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
            if graphs:
                FrozenStage(chunk)
        self.matrix = self._rounded_matrix() if head_fp8 and self.chunks[-1].post_process else None

    def run_ahead(self, batches: Sequence[Batch]) -> None:
        """With a pipeline, run these micro-batches and keep their final hidden states on the last stage."""
        if not self.pipelined:
            return
        self.states.clear()
        self.states.extend(self._forward(batches))

    def run(self, batch: Batch) -> None:
        """Without a pipeline, run the micro-batch whose targets are asked for next, if they are not asked for at once."""
        self.states.extend(self._forward([batch]))

    def targets(self, batch: Batch, split: str) -> Head:
        """What makes logits of the next micro-batch in order; `batch` is that micro-batch, whatever `split` it is of."""
        if not self.states:
            self.run(batch)
        with torch.no_grad():
            head = Head.of(self.states.popleft(), *self.head, collectives.tensor_parallel_group())
        return Head(head.states, self.matrix) if self.matrix else head

    def _rounded_matrix(self) -> Fp8Matrix:
        """The output matrix in FP8, in place of the other where that is no embedding too."""
        last = self.chunks[-1]
        if last.share_embeddings_and_output_weights:
            return Fp8Matrix.of(last.shared_embedding_or_output_weight())
        rounded = Fp8Matrix.of(last.output_layer.weight)
        last.output_layer.weight = None
        return rounded

    def _forward(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        def keep(batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any) -> torch.Tensor:
            self.head = (output_layer, output_weight)
            return hidden_states

        if not self.pipelined:
            return [self._one_stage(batches[0], keep)]
        from megatron.core import parallel_state as ps

        size, share = batches[0]["tokens"].shape
        return forward_only(
            self.chunks,
            batches,
            num_micro_batches=len(batches),
            micro_batch_size=size,
            sequence_length=share * ps.get_context_parallel_world_size(),
            collect=keep,
        )

    def _one_stage(self, batch: Batch, keep: Any) -> torch.Tensor:
        """Without a pipeline the model is called directly: the schedule of the student's step is running around it."""

        def processor(**given: Any) -> torch.Tensor:
            names = ("hidden_states", "output_layer", "output_weight")
            return keep(batch, **{name: given[name] for name in names})

        (chunk,) = self.chunks
        with torch.no_grad():
            return chunk(batch["tokens"], batch["position_ids"], attention_mask(batch), output_processor=processor)
