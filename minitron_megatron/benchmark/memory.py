"""What backward keeps of a micro-batch on this device, against what a dry run says (train/memory.py)."""

from typing import Any

import torch

from minitron_megatron.benchmark.importance import live_model, random_batch
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.models.forward import Batch, on_device
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import count_chunk
from minitron_megatron.train.memory import Arithmetic, MicroBatch, chunk_activations


def planned_over_kept(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """GiB of distinct storages that a forward pass saves for backward, and as a dry run counts them.

    On a GPU also by how much its allocated memory grows, logits left out. There is no pipeline (checks.py): a rank's whole
    model is measured.
    """
    shape, (model,) = live_model(cfg, layout)
    batch = on_device(random_batch(cfg, shape, layout, torch.Generator().manual_seed(cfg.seed)))
    kept_bytes(model, batch)  # what is made once, such as workspaces, is there afterwards
    kept, grown = kept_bytes(model, batch)
    engine = "te" if model.config.transformer_impl == "transformer_engine" else "local"
    how = Arithmetic(model.config.params_dtype, engine, fused_norms=torch.cuda.is_available())
    size = MicroBatch.of(cfg.micro_batch_size, cfg.sequence_length, layout)
    planned = chunk_activations(shape, count_chunk(model), layout, size, how)
    return {
        "tokens": cfg.micro_batch_size * cfg.sequence_length,
        "kept_gib": kept / 2**30,
        "planned_gib": planned / 2**30,
        "planned_over_kept": planned / kept,
        **({"allocated_gib": grown / 2**30} if torch.cuda.is_available() else {}),
    }


def kept_bytes(model: torch.nn.Module, batch: Batch) -> tuple[int, int]:
    """(bytes of the distinct storages, parameters' aside, that a forward pass saves; growth of the GPU's allocated memory)."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: list[torch.Tensor] = []
    size_of_logits = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def head(*, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, **_: Any) -> torch.Tensor:
        nonlocal size_of_logits
        logits, _ = output_layer(hidden_states, weight=output_weight)
        size_of_logits = logits.numel() * logits.itemsize
        return logits

    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch["tokens"], batch["position_ids"], None, output_processor=head)
    grown = torch.cuda.memory_allocated() - before - size_of_logits
    del out
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return sum(size for key, size in storages.items() if key not in parameters), grown
