"""CUDA graphs: many small launches as one, where a GPU would wait for them (FP8, short micro-batches).

    trained    each layer, forward and backward, by Megatron's helper and Transformer Engine; with a pipeline one of each for
               every micro-batch of a schedule's call, in its order
    frozen     all layers of a stage at once, forward alone

Graphs replay the kernels that were captured, with the tensors that they had then: inputs are copied there, weights and
gradients stay where they are. Embedding, head, loss and optimizer are launched as ever. They go before the process groups do:
NCCL waits for ever to end a communicator that a graph has captured transfers of. Where they can be is in automatic.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from minitron_megatron.parallel.job import before_groups_end
from minitron_megatron.parallel.layout import Layout


def graph_fields(wanted: bool) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a model that is trained with graphs of its layers; none without."""
    return {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": []} if wanted else {}


# Bytes at the most until the layers were captured, when what they work in counts as taken.
_UNTIL_CAPTURED = [0]


def peak_memory(wanted: bool) -> int:
    """Bytes of this GPU that tensors took at the most, and where there are graphs what these work in.

    That counts as free when they have been captured, though nothing else can have it.
    """
    most = torch.cuda.max_memory_allocated()
    if not wanted:
        return most
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return max(_UNTIL_CAPTURED[0], most + sum(segment["total_size"] - segment["allocated_size"] for segment in pools))


@contextmanager
def graph_safe_wrapping(config: Any) -> Iterator[None]:
    """Wrap a model for data parallelism within, where graphs are to be made of its layers.

    The wrapper keeps autograd's nodes that gradients end in; those of the default stream could not be captured.
    """
    if config.cuda_graph_impl == "none":
        yield
        return
    # The nodes' stream is another than that of the passes on purpose.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def capture_layers(
    chunks: Sequence[Any],
    optimizer: Any,
    layout: Layout,
    *,
    micro_batches: int,
    micro_batch_size: int,
    sequence_length: int,
) -> None:
    """Have the layers of a wrapped model run as graphs from now on, where they are in training mode. Gradients are dropped.

    Args:
        chunks: this rank's data-parallel wrappers, built with `graph_fields`.
        optimizer: theirs.
        layout: theirs.
        micro_batches: of a rank in a call of the schedule.
        micro_batch_size: samples in each.
        sequence_length: tokens in each sample, over all ranks that share it.
    """
    from megatron.core import num_microbatches_calculator as calculator

    gathering = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in chunks:
        chunk.train()
    # Weights would be gathered within a graph.
    for chunk in gathering:
        chunk.disable_forward_pre_hook(param_sync=False)
    batch = micro_batches * micro_batch_size * layout.data
    calculator.init_num_microbatches_calculator(0, None, batch, micro_batch_size, layout.data)
    try:
        helper = _helper()(list(chunks), chunks[0].config, sequence_length, micro_batch_size, [optimizer])
        helper.create_cudagraphs()
        # From here on it counts as free: it would be in the peak twice.
        _UNTIL_CAPTURED[0] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        before_groups_end(helper.delete_cuda_graphs)
    finally:
        calculator.destroy_num_microbatches_calculator()
    for chunk in gathering:
        chunk.enable_forward_pre_hook()
    if gathering:
        helper.cuda_graph_set_manual_hooks()


def _helper() -> type:
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    class Helper(TECudaGraphHelper):
        """Megatron's, less what it copies for nothing.

        Gradients that are placeholders (matrices' are added up within the products), and for every layer a mask [s, s] that a
        causal kernel does not look at.
        """

        def _get_cuda_graph_input_data(self) -> tuple[Any, dict[str, Any]]:
            arguments, options = super()._get_cuda_graph_input_data()
            for given in options["sample_kwargs"]:
                given.pop("attention_mask", None)
            return arguments, {**options, "clone_param_grads_on_return": False}

    return Helper


class FrozenStage:
    """The layers of a frozen chunk as one graph, captured when they first run and used for inputs of that shape."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self.block, self.forward = chunk.decoder, chunk.decoder.forward
        self.graph: Any = None
        self.shape: torch.Size | None = None
        chunk.decoder.forward = self

    def __call__(self, hidden_states: torch.Tensor | None, attention_mask: Any, **given: Any) -> torch.Tensor:
        """What the block's own forward gives, [s / its shares, b, hidden]."""
        states = hidden_states if self.block.pre_process else self.block.input_tensor
        rotary = given["rotary_pos_emb"]
        if attention_mask is not None:
            return self.forward(hidden_states, attention_mask, **given)
        if self.graph is None:
            self._capture(states, rotary)
        if states.shape != self.shape:
            return self.forward(hidden_states, attention_mask, **given)
        # The graph's own would be overwritten by the next micro-batch.
        return self.graph(states.detach(), rotary_pos_emb=rotary).clone()

    def _capture(self, states: torch.Tensor, rotary: torch.Tensor) -> None:
        from transformer_engine.pytorch import make_graphed_callables

        self.shape = states.shape
        layers = _Layers(self.block, self.forward).eval()
        sample = {"sample_kwargs": {"rotary_pos_emb": rotary.clone()}}
        self.graph = make_graphed_callables(layers, (states.detach().clone(),), **sample)
        before_groups_end(self.graph.reset)


class _Layers(torch.nn.Module):
    """A block as a function of tensors alone: of its input, wherever that comes from."""

    def __init__(self, block: torch.nn.Module, forward: Any) -> None:
        super().__init__()
        self.block, self.run = block, forward

    def forward(self, states: torch.Tensor, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        """[s, b, hidden] to the same."""
        if not self.block.pre_process:
            self.block.set_input_tensor(states)
        return self.run(states, None, rotary_pos_emb=rotary_pos_emb)
