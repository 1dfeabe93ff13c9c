"""Hooks that read activations where the axis table's probes say, on each rank's own shard and own tokens.

Each activation is read once, where it is made; everything else waits for the end of the chunk's micro-batch and is done
for all its layers and probes together:

    layer 0: ffn, heads, hidden, cosine ─┐
    layer 1: …                          ─┼─▶ one row of sums [b, channels of all layers] ─▶ + ranks that share the sequence
    layer n: …                          ─┘                                      ─▶ x of each sample ─▶ Σx, Σx² over samples

Hidden channels and layers are seen by each tensor-parallel rank for its own tokens only when sequence parallelism is on,
and everything by each context-parallel rank for its own. Transformer Engine fuses norms into the linear after them, which
gives the normalised input beside its own output while a recorder watches it:

    local:  norm ─▶ hook ─▶ linear          te:  (norm, linear) ─▶ (output, normalised) ─▶ hook ─▶ output

On a GPU the sums run on a stream of their own, beside the matrix products that follow: they are bound by memory, those by
arithmetic.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from minitron_megatron.errors import UserError
from minitron_megatron.importance.statistics import (
    BatchStatistic,
    cosine_sums,
    finish_sequence,
    partial_head_sums,
    partial_sums,
)
from minitron_megatron.models.axes import PROBES, Probe
from minitron_megatron.parallel.cpu import import_megatron, without_adapter

ps = import_megatron("parallel_state")
TransformerLayer = import_megatron("transformer.transformer_layer").TransformerLayer
# The order of scores in a chunk's row: what sequence parallelism splits comes last, Block Influence at the very end.
_ORDER = sorted(PROBES, key=lambda probe: probe.sequence_sharded)
LAYERS = "layers"


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream that sums run on, one for all recorders of a process.

    Memory is kept by stream: the first micro-batch on another one asks the driver for all of it anew.
    """
    return torch.cuda.Stream(device)


class Recorder:
    """Collects the statistics of every probe of every local layer while micro-batches run through the model."""

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        *,
        head_dim: int,
        sequence: str,
        heads: str,
        sequence_parallel: bool,
    ) -> None:
        self.head_dim, self.how, self.sequence_parallel = head_dim, sequence, sequence_parallel
        self.heads_per_token = heads == "per_token"
        self.context_size = ps.get_context_parallel_world_size()
        self.valid = torch.ones(1)
        self.tokens = 1
        self.micro_batches = 0
        self.side = _side_stream(torch.cuda.current_device()) if torch.cuda.is_available() else None
        self.chunks = [_Chunk(self, chunk) for chunk in chunks]

    def begin(self, batch: dict[str, torch.Tensor]) -> None:
        """Before each micro-batch: which of its samples count, and how long a sequence is."""
        if self.micro_batches == 1:
            # Broken weights show at once. Asking after every micro-batch would make a GPU wait for the question.
            self.check_finite()
        self.micro_batches += 1
        self.tokens = batch["tokens"].shape[1] * self.context_size
        self.valid = batch["valid"]

    @contextlib.contextmanager
    def aside(self, *read: torch.Tensor) -> Iterator[None]:
        """What is launched within runs beside the stream that has just made the tensors `read`, and keeps them until then.

        Memory that the side stream gives back is not touched before the next time, which waits for the main stream.
        """
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield
        for tensor in read:
            tensor.record_stream(self.side)

    def join(self) -> None:
        """What comes next sees what ran aside."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    @property
    def statistics(self) -> dict[tuple[str, int], BatchStatistic]:
        """What has been seen of each score in each local layer."""
        return {key: statistic for chunk in self.chunks for key, statistic in chunk.statistics()}

    def check_finite(self) -> None:
        """Raise UserError that names the first local layer with a non-finite activation so far: sums keep them."""
        if all(c.statistic is None or torch.isfinite(c.statistic.squares).all() for c in self.chunks):
            return
        for (score, layer), statistic in sorted(self.statistics.items(), key=lambda item: item[0][1]):
            if not torch.isfinite(statistic.squares).all():
                raise UserError(f"layer {layer}: non-finite activations at {score}; check the model and precision=")

    def close(self) -> None:
        """Take the hooks off."""
        for chunk in self.chunks:
            chunk.close()


class _Chunk:
    """The layers of one model chunk."""

    def __init__(self, recorder: Recorder, chunk: torch.nn.Module) -> None:
        self.recorder = recorder
        self.statistic: BatchStatistic | None = None
        self.widths: list[int] = []
        self.pending: dict[tuple[str, int], torch.Tensor] = {}
        self.handles: list[Any] = []
        self.fused: list[torch.nn.Module] = []
        layers = [module for module in chunk.modules() if isinstance(module, TransformerLayer)]
        self.numbers = [layer.layer_number - 1 for layer in layers]
        for layer in layers:
            self._watch(layer, last=layer is layers[-1])

    def _watch(self, layer: torch.nn.Module, *, last: bool) -> None:
        number = layer.layer_number - 1
        te = layer.config.transformer_impl == "transformer_engine"
        for probe in PROBES:
            if te and probe.fused_into:
                self._watch_fused(layer.get_submodule(probe.fused_into), probe, number)
                continue
            module = layer.get_submodule(probe.module)
            if probe.side == "input":
                hook = module.register_forward_pre_hook(lambda m, args, p=probe: self._see(p, number, args[0]))
            else:
                hook = module.register_forward_hook(lambda m, args, out, p=probe: self._see(p, number, out))
            self.handles.append(hook)

        def done(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._layer(number, before, out[0] if isinstance(out, tuple) else out)
            if last:
                self._finish_samples()

        self.handles.append(layer.register_forward_hook(done, with_kwargs=True))

    def _watch_fused(self, linear: torch.nn.Module, probe: Probe, layer: int) -> None:
        """Have Transformer Engine's linear give its normalised input too, and take it off again before anyone else sees it."""

        def hook(_: torch.nn.Module, __: tuple[Any, ...], out: tuple[Any, Any]) -> tuple[torch.Tensor, Any]:
            # Megatron's wrapper passes on what Transformer Engine gave, as the first of a pair with a bias.
            (output, normalised), bias = out
            self._see(probe, layer, normalised)
            return output, bias

        linear.return_layernorm_output = True
        self.fused.append(linear)
        self.handles.append(linear.register_forward_hook(hook))

    @without_adapter
    def _see(self, probe: Probe, layer: int, activations: torch.Tensor) -> None:
        a = activations[0] if isinstance(activations, tuple) else activations
        with self.recorder.aside(a):
            if probe.heads and self.recorder.heads_per_token:
                sums = partial_head_sums(a, self.recorder.head_dim, self.recorder.how)
            else:
                sums = partial_sums(a, self.recorder.how)
        self.pending[(probe.score, layer)] = sums

    @without_adapter
    def _layer(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        with self.recorder.aside(before, after):
            self.pending[(LAYERS, layer)] = cosine_sums(before, after)

    def _keys(self) -> Iterator[tuple[str, int]]:
        """Every score of every layer, in the order of the row."""
        return itertools.product([*(probe.score for probe in _ORDER), LAYERS], self.numbers)

    @without_adapter
    def _finish_samples(self) -> None:
        """The chunk is done: its sums become x of each sample, and those join the statistics."""
        self.recorder.join()
        sums = [self.pending[key] for key in self._keys() if key[0] != LAYERS]
        cosines = torch.stack([self.pending[LAYERS, number] for number in self.numbers], dim=-1)
        self.pending.clear()
        widths = [part.shape[-1] for part in sums]
        row = torch.cat(sums, dim=-1).sum(1)  # [k, b, channels of all layers]
        if self.recorder.sequence_parallel:
            split = len(self.numbers) * sum(probe.sequence_sharded for probe in PROBES)
            shared = row[..., sum(widths[: len(widths) - split]) :]
            _add_over([shared, cosines], ps.get_tensor_model_parallel_group())
        if self.recorder.context_size > 1:
            _add_over([row, cosines], ps.get_context_parallel_group())
        x = finish_sequence(row, self.recorder.tokens, self.recorder.how)
        x = torch.cat((x, 1 - cosines.double() / self.recorder.tokens), dim=-1)
        if self.statistic is None:
            self.widths = [*widths, *(1 for _ in self.numbers)]
            self.statistic = BatchStatistic.zeros(x[0])
        self.statistic.add(x, self.recorder.valid)

    def statistics(self) -> Iterator[tuple[tuple[str, int], BatchStatistic]]:
        """Each score of each layer, cut out of the row."""
        if self.statistic is not None:
            totals, squares = (t.split(self.widths) for t in (self.statistic.total, self.statistic.squares))
            for key, total, square in zip(self._keys(), totals, squares, strict=True):
                yield key, BatchStatistic(total, square, self.statistic.count)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        for linear in self.fused:
            linear.return_layernorm_output = False


def _add_over(tensors: list[torch.Tensor], group: Any) -> None:
    """Sums over the ranks that share a sequence, in place: one all-reduce for all."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    torch.distributed.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
