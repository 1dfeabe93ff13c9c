"""Hooks that read activations where the axis table's probes say, on each rank's own shard and own tokens.

Hidden channels and layers are seen by each tensor-parallel rank for its own tokens only when sequence parallelism is on,
and everything by each context-parallel rank for its own: their sums are added over the group at the end of each layer,
before a sample is finished. Transformer Engine fuses norms into the linear after them, which gives the normalised input
beside its own output while a recorder watches it:

    local:  norm ─▶ hook ─▶ linear          te:  (norm, linear) ─▶ (output, normalised) ─▶ hook ─▶ output
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_layer import TransformerLayer

from minitron_megatron.errors import UserError
from minitron_megatron.importance.statistics import BatchStatistic, cosine_sums, finish_sequence, sequence_sums
from minitron_megatron.models.axes import PROBES, Probe
from minitron_megatron.parallel.cpu import without_adapter


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
        self.statistics: dict[tuple[str, int], BatchStatistic] = {}
        self.pending: dict[tuple[str, int], torch.Tensor] = {}
        self.valid = torch.ones(1)
        self.tokens = 1
        self.micro_batches = 0
        self.handles: list[Any] = []
        self.fused: list[torch.nn.Module] = []
        for chunk in chunks:
            for layer in (module for module in chunk.modules() if isinstance(module, TransformerLayer)):
                self._watch(layer)

    def _watch(self, layer: TransformerLayer) -> None:
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
        # The layer's own hook fires last: by then its probes have been seen.
        self.handles.append(
            layer.register_forward_hook(lambda m, a, kw, o: self._layer(number, a, kw, o), with_kwargs=True)
        )

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

    def begin(self, batch: dict[str, torch.Tensor]) -> None:
        """Before each micro-batch: which of its samples count, and how long a sequence is."""
        if self.statistics and self.micro_batches == 1:
            # Broken weights show at once. Asking after every micro-batch would make a GPU wait for the question.
            self.check_finite()
        self.micro_batches += 1
        self.tokens = batch["tokens"].shape[1] * self.context_size
        self.valid = batch["valid"]

    def check_finite(self) -> None:
        """Raise UserError that names the first local layer with a non-finite activation so far: sums keep them."""
        for (score, layer), statistic in sorted(self.statistics.items(), key=lambda item: item[0][1]):
            if not torch.isfinite(statistic.squares).all():
                raise UserError(f"layer {layer}: non-finite activations at {score}; check the model and precision=")

    @without_adapter
    def _see(self, probe: Probe, layer: int, activations: torch.Tensor) -> None:
        a = activations[0] if isinstance(activations, tuple) else activations
        if probe.heads and self.heads_per_token:
            a = a.unflatten(-1, (-1, self.head_dim)).float().norm(dim=-1)
        self.pending[(probe.score, layer)] = sequence_sums(a, self.how)

    @without_adapter
    def _layer(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A layer is done: finish its samples, and take the cosine between its input and its output."""
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        after = out[0] if isinstance(out, tuple) else out
        cosine = cosine_sums(before, after)
        sums = {probe.score: self.pending.pop((probe.score, layer)) for probe in PROBES}
        if self.sequence_parallel:
            shared = [sums[probe.score] for probe in PROBES if probe.sequence_sharded]
            self._add_over_ranks([*shared, cosine], ps.get_tensor_model_parallel_group())
        if self.context_size > 1:
            self._add_over_ranks([*sums.values(), cosine], ps.get_context_parallel_group())
        for score, summed in sums.items():
            self._add(score, layer, finish_sequence(summed, self.tokens, self.how))
        self._add("layers", layer, (1 - cosine.double() / self.tokens)[:, None])

    def _add(self, score: str, layer: int, x: torch.Tensor) -> None:
        statistic = self.statistics.get((score, layer))
        if statistic is None:
            statistic = self.statistics[(score, layer)] = BatchStatistic.zeros(x[0])
        statistic.add(x, self.valid)

    @staticmethod
    def _add_over_ranks(tensors: list[torch.Tensor], group: Any) -> None:
        """Sums of a layer over the ranks that share its sequences: one all-reduce for all."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        for linear in self.fused:
            linear.return_layernorm_output = False
