"""A model without each of its blocks of layers, all in one forward pass: the variants are extra samples of the batch.

    rows of the residual stream [s, b·(V+1), h], here 4 layers and blocks of 1 (each line: b rows)

                 layer 0   layer 1   layer 2   layer 3      head
    whole model    run       run       run       run         ✓
    without 0    frozen      run       run       run         ✓      frozen: what entered the block waits for its end
    without 1       .      frozen      run       run         ✓      .     : still the whole model's, so not kept up
    without 2       .         .      frozen      run         ✓
    without 3       .         .         .      frozen        ✓

A variant takes the whole model's state where its block begins, and runs from the block's end on: a block costs the layers
after it, not a pass of its own. When its end is reached its rows still hold what entered the block while the whole model's
hold what left it: Block Influence is read there. Slots are ordered by their blocks' ends, so what runs is always the
leading part. Embedding, layers, head and pipeline schedule are Megatron's own and see nothing but a larger batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from minitron_megatron.importance.blocks import Block
from minitron_megatron.importance.statistics import cosine_sums
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.vocab_parallel import vocab_parallel_nll
from minitron_megatron.parallel.cpu import import_megatron, without_adapter

ps = import_megatron("parallel_state")
gather_from_sequence_parallel_region = import_megatron("tensor_parallel").gather_from_sequence_parallel_region
TransformerLayer = import_megatron("transformer.transformer_layer").TransformerLayer
# Positions that go through the head at once: logits [positions, vocabulary / tp] are the largest tensor of a pass.
HEAD_POSITIONS = 2048


class Variants:
    """Runs a model's chunks with blocks removed, and sums what Block Influence needs. `with variants.installed(): …`.

    Args:
        chunks: this rank's model chunks.
        blocks: what to remove, one variant each, in the order of their ends.
        tokens: samples of at most so many tokens together (one sample at least) run through a layer at once.
        vocab_size: real ids.
        sequence_parallel: whether ranks of a tensor-parallel group hold parts of the sequence.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        blocks: Sequence[Block],
        *,
        tokens: int,
        vocab_size: int,
        sequence_parallel: bool,
    ) -> None:
        self.chunks, self.blocks, self.tokens = chunks, blocks, tokens
        self.vocab_size, self.sequence_parallel = vocab_size, sequence_parallel
        self.influence = True
        # Σ cos(entered, left) over this rank's samples and tokens, of blocks that end on this rank; float64.
        self.cosines = torch.zeros(len(blocks), dtype=torch.float64, device=torch.cuda.current_device())
        self.layer_rows = 0
        self._batch: Batch = {}

    @property
    def slots(self) -> int:
        """Rows of the residual stream for each sample."""
        return len(self.blocks) + 1

    def begin(self, batch: Batch) -> None:
        """Before each micro-batch of each chunk: which of its samples count, and how long they are."""
        self._batch = batch

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within, embeddings make room for the variants and layers run those whose block is behind them."""
        changed: list[torch.nn.Module] = []
        try:
            for chunk in self.chunks:
                for module in chunk.modules():
                    if isinstance(module, TransformerLayer):
                        module.forward = self._layer(module.layer_number - 1, module.forward)
                        changed.append(module)
                if chunk.pre_process:
                    chunk.embedding.forward = self._embedding(chunk.embedding.forward)
                    changed.append(chunk.embedding)
            yield
        finally:
            for module in changed:
                del module.forward

    def _embedding(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            whole = forward(*args, **kwargs)
            length, samples, hidden = whole.shape
            stream = whole.new_zeros(length, samples * self.slots, hidden)
            stream[:, :samples] = whole
            return stream

        return run

    def _layer(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            # [s (/ tp), b·(V+1), h]; changed in place: nobody else holds it.
            stream, context = hidden_states, kwargs.get("context")
            samples = stream.shape[1] // self.slots
            whole = stream[:, :samples]
            for rows in self._rows(samples, lambda block: block.start == number):
                stream[:, rows] = whole
            running = samples * (1 + sum(block.end <= number for block in self.blocks))
            at_once = max(1, self.tokens // self._batch["tokens"].shape[1])
            for first in range(0, running, at_once):
                rows = slice(first, min(first + at_once, running))
                stream[:, rows], context = forward(stream[:, rows].contiguous(), *args, **kwargs)
            self.layer_rows += running
            if self.influence:
                self._add_influence(stream, samples, number + 1)
            return stream, context

        return run

    def _rows(self, samples: int, wanted: Callable[[Block], bool]) -> Iterator[slice]:
        """The rows of the variants whose blocks are wanted."""
        for slot, block in enumerate(self.blocks, 1):
            if wanted(block):
                yield slice(slot * samples, (slot + 1) * samples)

    @without_adapter
    def _add_influence(self, stream: torch.Tensor, samples: int, end: int) -> None:
        left = stream[:, :samples]
        for i, block in enumerate(self.blocks):
            if block.end == end:
                entered = stream[:, (i + 1) * samples : (i + 2) * samples]
                self.cosines[i] += cosine_sums(entered, left).double() @ self._batch["valid"].double()

    def negative_log_likelihoods(
        self, batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any
    ) -> torch.Tensor:
        """Each variant's Σ over a sample's unmasked positions of −log p(label): float64 [V + 1, b], the whole model first.

        Only these positions of one variant at a time go through the head. For `forward_only(collect=…)`.
        """
        group, size = ps.get_tensor_model_parallel_group(), ps.get_tensor_model_parallel_world_size()
        labels, samples = batch["labels"].t().reshape(-1), len(batch["labels"])
        positions = batch["loss_mask"].t().reshape(-1).nonzero()[:, 0]  # in [s, b] order
        sums = torch.zeros(self.slots, samples, dtype=torch.float64, device=hidden_states.device)
        for slot in range(self.slots):
            if not len(positions):  # a micro-batch of nothing but fillers
                break
            states = hidden_states[:, slot * samples : (slot + 1) * samples].contiguous()
            if self.sequence_parallel:
                states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False, group=group)
            states = states.flatten(0, 1)  # [s·b, h]
            for part in positions.split(HEAD_POSITIONS):
                picked = states[self._share(part, size)] if self.sequence_parallel else states[part]
                logits, _ = output_layer(picked[:, None], weight=output_weight)  # [positions, 1, V / tp]
                nll = vocab_parallel_nll(
                    logits[: len(part)], labels[part][:, None], vocab_size=self.vocab_size, group=group
                )
                sums[slot].index_add_(0, part % samples, nll[:, 0].double())
        return sums

    @staticmethod
    def _share(positions: torch.Tensor, size: int) -> torch.Tensor:
        """A rank's equal share of positions, filled up with the last: a sequence-parallel head joins the shares again."""
        filled = torch.cat((positions, positions[-1:].expand(-len(positions) % size)))
        return filled.chunk(size)[ps.get_tensor_model_parallel_rank()]
