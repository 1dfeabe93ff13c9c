"""What the tests run inside gloo workers: each function is one rank's part and returns plain tensors or numbers."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps

from minitron_megatron.checkpoints.folder import WEIGHTS, open_model_folder
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import (
    BatchConfig,
    DistillConfig,
    ExportHfConfig,
    ImportanceConfig,
    ImportanceOptions,
    ImportHfConfig,
    LayersConfig,
    OptimConfig,
    TrainerConfig,
)
from minitron_megatron.data.datasets import open_data
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.importance.layers import LayerMeasurement
from minitron_megatron.importance.measure import aggregation, measure_statistics
from minitron_megatron.importance.scores import finish_scores
from minitron_megatron.importance.variants import contiguous_blocks
from minitron_megatron.models.axes import Place, axis_table, tensor_parallel_keep
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.forward import forward_only
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.loop import Distiller
from minitron_megatron.train.run import publish
from tests.tiny import data_option, model_option


def full_layout(layout: dict) -> Layout:
    return Layout(**layout, world_size=dist.get_world_size())


def build(path: str, layout: dict):
    """(folder, this rank's loaded chunks)."""
    folder = open_model_folder(path)
    chunks = build_model_chunks(folder.shape, full_layout(layout), torch.float32)
    load_model(chunks, folder)
    return folder, chunks


def batch_of(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """A micro-batch of given tokens [b, s + 1]."""
    b, s = tokens[:, :-1].shape
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(b, s),
        "position_ids": torch.arange(s).expand(b, s).contiguous(),
        "valid": torch.ones(b),
    }


def logits(path: str, tokens: torch.Tensor, layout: dict) -> torch.Tensor | None:
    """Logits [b, s, vocab] without padding, on the last stage."""
    folder, chunks = build(path, layout)

    def collect(batch, *, hidden_states, output_layer, output_weight):
        local, _ = output_layer(hidden_states, weight=output_weight)
        parts = [torch.empty_like(local) for _ in range(ps.get_tensor_model_parallel_world_size())]
        dist.all_gather(parts, local.contiguous(), group=ps.get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1)

    batch = batch_of(torch.cat((tokens, tokens[:, :1]), dim=1))
    repeats = layout.get("pipeline", 1) if layout.get("virtual_pipeline") else 1
    out = forward_only(
        chunks,
        [batch] * repeats,
        num_micro_batches=repeats,
        micro_batch_size=len(tokens),
        sequence_length=tokens.shape[1],
        collect=collect,
    )
    return out[0].transpose(0, 1)[..., : folder.shape.vocab_size].clone() if out else None


def global_parameters(path: str, layout: dict) -> dict[str, list[tuple[list, torch.Tensor]]]:
    """Every parameter of this rank with its global indices by the axis table: {name: [(indices, values)]}."""
    folder, chunks = build(path, layout)
    return _placed(folder.shape, chunks, lambda parameter: parameter.detach())


def _placed(shape, chunks, values):
    keep = tensor_parallel_keep(shape, ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size())
    found = {}
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for row in axis_table(shape):
            own = {axis: kept for axis, kept in keep.items() if axis == row.tensor_parallel_axis}
            indices = row.indices(shape, own)
            if row.place is Place.LAYER:
                for i, layer in enumerate(chunk.decoder.layers):
                    name = f"{row.name}.{layer.layer_number - 1}"
                    found[name] = (indices, values(parameters[row.path.format(layer=i)]).clone())
            elif row.path in parameters:
                found[row.name] = (indices, values(parameters[row.path]).clone())
    return found


def distiller(teacher: str, student: str, layout: dict, micro_batch_size: int, optimizer: bool = False):
    """A Distiller with gradients reduced over all data-parallel ranks in full."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from minitron_megatron.train.optimizer import wrap_and_optimize

    _, frozen = build(teacher, layout)
    folder, chunks = build(student, layout)
    cfg = DistillConfig(
        output="",
        data=data_option(Path(), 32),
        trainer=TrainerConfig(steps=4, global_batch_size=8, micro_batch_size=micro_batch_size),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
    )
    if optimizer:
        wrapped, made = wrap_and_optimize(chunks, cfg.optim)
    else:
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped, made = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks], None
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
    full = full_layout(layout)
    return folder, Distiller(
        wrapped, made, Teacher(frozen, pipelined=full.pipeline > 1), full, cfg, folder.shape.vocab_size
    )


class Tokens:
    """Samples out of a tensor [n, s + 1]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in batch_of(self.tokens[index][None]).items()}


def loss_and_gradients(teacher: str, student: str, tokens: torch.Tensor, layout: dict, micro_batch_size: int):
    """(mean loss, {name: (global indices, gradient of the mean loss)})."""
    from minitron_megatron.parallel import collectives

    folder, trained = distiller(teacher, student, layout, micro_batch_size)
    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    batches = list(trained.micro_batches(Tokens(tokens), range(len(tokens))))
    loss, count = collectives.sum_from_last_stage(trained.forward_backward(batches))
    modules = [chunk.module for chunk in trained.chunks]
    return loss / count, _placed(folder.shape, modules, lambda parameter: parameter.main_grad.float())


def training_losses(teacher: str, student: str, tokens: torch.Tensor, layout: dict, micro_batch_size: int, steps: int):
    """(loss, gradient norm) of each of some optimizer steps of 8 samples."""
    _, trained = distiller(teacher, student, layout, micro_batch_size, optimizer=True)
    results = [trained.train_step(step, steps, Tokens(tokens)) for step in range(steps)]
    return [(r.loss, r.grad_norm) for r in results]


def scores(
    model: str,
    data: str,
    layout: dict,
    samples: int,
    micro_batch_size: int,
    how: tuple[str, ...],
    first_sample: int = 0,
):
    """Importance scores as tensors, on rank 0."""
    cfg = ImportanceConfig(
        output="",
        model=model_option(Path(model)),
        data=data_option(Path(data), 32),
        samples=samples,
        first_sample=first_sample,
        trainer=BatchConfig(micro_batch_size=micro_batch_size),
        importance=ImportanceOptions(*how),
    )
    folder = open_model_folder(model)
    data_folder = open_data(data, "train", folder.shape, 32)
    statistics = measure_statistics(folder, data_folder, full_layout(layout), cfg)
    if statistics is None:
        return None
    found = finish_scores(statistics, aggregation(cfg, folder.shape.head_dim))
    return {name: torch.from_numpy(score) for name, score in found.items()}


def layers_without(model: str, data: str, layout: dict, lengths: list[int], requests: list, samples: int, **options):
    """(what a layer analysis measures, rows × layers that this rank's feed-forward blocks saw)."""
    micro_batch_size = options.pop("micro_batch_size", 2)
    cfg = LayersConfig(
        output="",
        model=model_option(Path(model)),
        data=data_option(Path(data), 32),
        samples=samples,
        trainer=BatchConfig(micro_batch_size=micro_batch_size),
        **options,
    )
    folder = open_model_folder(model)
    blocks = contiguous_blocks(folder.shape.num_layers, lengths)
    measurement = LayerMeasurement(folder, full_layout(layout), cfg, blocks)
    seen = []
    for layer in (layer for chunk in measurement.chunks for layer in chunk.decoder.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    measured = measurement.measure(open_data(data, "validation", folder.shape, 32), samples, requests)
    return measured, seen


def import_and_export(hf: str, model: str, back: str, max_shard_gb: float) -> None:
    """`hf` into a model folder and that into a Hugging Face folder again, by this many ranks."""
    import_hf(ImportHfConfig(hf=hf, output=model))
    export_hf(ExportHfConfig(model=model_option(Path(model)), output=back, max_shard_gb=max_shard_gb))


def save_in_layout(model: str, checkpoint: str, weights: str, layout: dict) -> str:
    """Load a model in a layout, save it with Megatron's own writer, publish that; gives the digest."""
    from megatron.core import dist_checkpointing

    folder, chunks = build(model, layout)
    if dist.get_rank() == 0:
        Path(checkpoint).mkdir()
    dist.barrier()
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, checkpoint)
    dist.barrier()
    return publish(Path(weights) / WEIGHTS, folder.shape, Path(checkpoint))
