"""What the tests run inside gloo workers: each function is one rank's part and returns plain tensors or numbers."""

import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_megatron.benchmark.step import MegatronsTrainer
from minitron_megatron.checkpoints.folder import WEIGHTS, open_model_folder
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import (
    BatchConfig,
    DdpConfig,
    DistillConfig,
    DistillOptions,
    ExportHfConfig,
    ImportanceConfig,
    ImportanceOptions,
    ImportHfConfig,
    LayersConfig,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
)
from minitron_megatron.data.datasets import Windows
from minitron_megatron.data.folder import open_data
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.importance.blocks import contiguous_blocks
from minitron_megatron.importance.checks import aggregation
from minitron_megatron.importance.layer_passes import LayerMeasurement
from minitron_megatron.importance.measure import measure_statistics
from minitron_megatron.importance.sums import finish_scores
from minitron_megatron.models.axes import Place, axis_table, slots, tensor_parallel_keep
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.forward import forward_only, on_device
from minitron_megatron.models.generation import generate
from minitron_megatron.models.objective import NextToken
from minitron_megatron.parallel.job import model_parallel
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.live import Side, cut_live, local_tensors
from minitron_megatron.prune.plan import read_plan
from minitron_megatron.throughput.engines import megatron
from minitron_megatron.throughput.work import Work
from minitron_megatron.train.distill import intermediate_loss, load_teacher
from minitron_megatron.train.loop import Trainer
from minitron_megatron.train.run import publish
from minitron_megatron.train.schedule import Schedule
from tests.tiny import data_option, model_option


def full_layout(layout: dict) -> Layout:
    return Layout(**layout, world_size=dist.get_world_size())


def build(path: str, layout: dict, engine: str = "auto", dtype: torch.dtype = torch.float32):
    """(folder, this rank's loaded chunks)."""
    folder = open_model_folder(path)
    chunks = build_model_chunks(folder.shape, full_layout(layout), dtype, engine)
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


def logits(path: str, tokens: torch.Tensor, layout: dict, *how, documents=None) -> torch.Tensor | None:
    """Logits [b, s, vocab] without padding, on the last stage; `how` is engine and dtype, documents [b, s] keep apart."""
    folder, chunks = build(path, layout, *how)

    def collect(batch, *, hidden_states, output_layer, output_weight):
        local, _ = output_layer(hidden_states, weight=output_weight)
        parts = [torch.empty_like(local) for _ in range(ps.get_tensor_model_parallel_world_size())]
        dist.all_gather(parts, local.contiguous(), group=ps.get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1)

    batch = batch_of(torch.cat((tokens, tokens[:, :1]), dim=1))
    if documents is not None:
        batch["documents"] = documents
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
                    found[name] = (indices, values(row.parameter(parameters, i)).clone())
            elif row.path in parameters:
                found[row.name] = (indices, values(parameters[row.path]).clone())
    return found


def trainer(
    teacher: str | None,
    student: str,
    layout: dict,
    micro_batch_size: int,
    engine: str = "auto",
    optimizer: bool = False,
    **how,
):
    """A Trainer that distills, or predicts the next token where there is no teacher; without an optimizer gradients are whole.

    `how` has options of the trainer, and those of `ddp`, `optim` and `distill`.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from minitron_megatron.train.checks import recomputation
    from minitron_megatron.train.optimizer import wrap_and_optimize

    ddp, of_distill = DdpConfig(**how.pop("ddp", {})), DistillOptions(**how.pop("distill", {}))
    optim = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, **how.pop("optim", {})}
    cfg = DistillConfig(
        output="",
        precision="fp32",
        data=data_option(Path(), 32),
        trainer=TrainerConfig(steps=4, global_batch_size=8, micro_batch_size=micro_batch_size, **how),
        optim=OptimConfig(**optim),
        ddp=ddp,
        distill=of_distill,
    )
    folder, full = open_model_folder(student), full_layout(layout)
    chunks = build_model_chunks(folder.shape, full, torch.float32, engine, recomputation(cfg.trainer))
    load_model(chunks, folder)
    vocabulary, objective = folder.shape.vocab_size, NextToken(folder.shape.vocab_size)
    if teacher is not None:
        cfg.teacher.engine = engine
        theirs = open_model_folder(teacher)
        beside = load_teacher(cfg, theirs, full)
        objective = Distillation(
            beside, cfg.distill, vocabulary, intermediate_loss(cfg, theirs.shape, folder.shape, beside)
        )
    objective.attach(chunks)
    if optimizer:
        wrapped, made = wrap_and_optimize(chunks, cfg.optim, cfg.ddp)
    else:
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped, made = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks], None
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
    return folder, Trainer(wrapped, made, objective, full, cfg)


def logits_of_documents(path: str, tokens: torch.Tensor, documents: torch.Tensor, layout: dict) -> torch.Tensor | None:
    """The same of documents that share samples and do not see each other."""
    return logits(path, tokens, layout, documents=documents)


def generated(path: str, prompts: list[list[int]], samplings: list, layout: dict) -> list[list[list[int]]]:
    """Answers to prompts by each way of sampling, two prompts at a time; sequence parallelism is as it was afterwards."""
    folder, chunks = build(path, layout)
    before = [getattr(m, "sequence_parallel", None) for chunk in chunks for m in chunk.modules()]
    answers = [generate(chunks, full_layout(layout), folder.shape, prompts, how, batch_size=2) for how in samplings]
    assert [getattr(m, "sequence_parallel", None) for chunk in chunks for m in chunk.modules()] == before
    return answers


class Tokens:
    """Samples out of a tensor [n, s + 1]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in batch_of(self.tokens[index][None]).items()}


def loss_and_gradients(
    teacher: str | None, student: str, tokens: torch.Tensor, layout: dict, micro_batch_size: int, engine: str = "auto"
):
    """(mean loss, {name: (global indices, gradient of the mean loss)})."""
    folder, trained = trainer(teacher, student, layout, micro_batch_size, engine)
    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    batches = [on_device(batch) for batch in trained.micro_batches(Tokens(tokens), range(len(tokens)))]
    terms, counted, _ = trained.forward_backward(batches)
    modules = [chunk.module for chunk in trained.chunks]
    return terms["loss"], _placed(folder.shape, modules, lambda parameter: parameter.main_grad.float() / counted)


def training_losses(
    teacher: str,
    student: str,
    tokens: torch.Tensor,
    layout: dict,
    micro_batch_size: int,
    steps: int,
    how: dict | None = None,
    as_megatron: bool = False,
):
    """(loss, gradient norm) of each of some optimizer steps of 8 samples; `how` has options of `trainer`.

    With `as_megatron` gradients are divided and clipped by Megatron itself.
    """
    _, trained = trainer(teacher, student, layout, micro_batch_size, optimizer=True, **(how or {}))
    if as_megatron:
        trained = MegatronsTrainer(trained.chunks, trained.optimizer, trained.objective, trained.layout, trained.cfg)
    schedule = Schedule.of_run(trained.cfg.optim, steps, 8 * 32)
    results = [trained.train_step(step, schedule, Tokens(tokens)) for step in range(steps)]
    return [(r.loss, r.grad_norm) for r in results]


def validation_loss(path: str, data: str, samples: int) -> float:
    """Mean loss over the first validation windows of 32 tokens, by the labels' log-probabilities out of whole logits."""
    windows = Windows(open_data(data, "validation", open_model_folder(path).shape, 32), "validation", 32)
    chosen = [windows[i] for i in range(samples)]
    found = logits(path, torch.stack([w["tokens"] for w in chosen]), {}).double().log_softmax(-1)
    labels, mask = (torch.stack([w[name] for w in chosen]) for name in ("labels", "loss_mask"))
    return float(-(found.gather(-1, labels[..., None])[..., 0] * mask).sum() / mask.sum())


def cut_between(path: str, cut: str, source: dict, target: dict) -> list[str]:
    """Cut a model live from layout `source` to layout `target` by the plan of a folder that was cut from files.

    Gives the names of this rank's tensors that differ from that folder's, loaded in the target layout.
    """
    folder, smaller = open_model_folder(path), open_model_folder(cut)
    _, kept = read_plan(Path(cut) / "plan.yaml", folder.shape, folder.digest)
    layouts = full_layout(source), full_layout(target)
    with model_parallel(layouts[0], 1):
        given = build_model_chunks(folder.shape, layouts[0], getattr(torch, folder.shape.dtype))
        load_model(given, folder)
    with model_parallel(layouts[1], 1):
        made, wanted = (
            build_model_chunks(smaller.shape, layouts[1], getattr(torch, folder.shape.dtype)) for _ in range(2)
        )
        load_model(wanted, smaller)
    sides = Side(folder.shape, layouts[0]), Side(smaller.shape, layouts[1])
    tensors = local_tensors(made, smaller.shape)
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    with LiveBytes() as counter:
        cut_live(sides[0], local_tensors(given, folder.shape), sides[1], tensors, kept)
    largest = max(
        torch.Size(slot.shape(folder.shape)).numel() * getattr(torch, folder.shape.dtype).itemsize
        for slot in slots(folder.shape)
    )
    # Pieces of one tensor: what is sent, what arrives, and its float32 sum where heads are merged.
    assert counter.peak <= 4 * largest, (counter.peak, largest)
    assert len(tensors) == sum(1 for chunk in made for _ in chunk.named_parameters())
    reference = local_tensors(wanted, smaller.shape)
    return [str(key) for key, tensor in tensors.items() if not torch.equal(tensor, reference[key])]


def parameter_bytes(path: str, layout: dict) -> int:
    """Bytes of this rank's parameters."""
    _, chunks = build(path, layout)
    return sum(p.numel() * p.itemsize for chunk in chunks for p in chunk.parameters())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at once."""

    def __enter__(self):
        self.alive, self.peak, self.seen = 0, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def scores(
    model: str,
    data: str,
    layout: dict,
    samples: int,
    micro_batch_size: int,
    how: tuple[str, ...],
    first_sample: int = 0,
    engine: str = "auto",
):
    """Importance scores as tensors, on rank 0."""
    cfg = ImportanceConfig(
        output="",
        model=ModelConfig(path=model, engine=engine),
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


def save_in_layout(model: str, checkpoint: str, weights: str, layout: dict, engine: str = "auto") -> str:
    """Load a model in a layout, save it with Megatron's own writer, publish that; gives the digest."""
    from megatron.core import dist_checkpointing

    folder, chunks = build(model, layout, engine)
    if dist.get_rank() == 0:
        Path(checkpoint).mkdir()
    dist.barrier()
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, checkpoint)
    dist.barrier()
    return publish(Path(weights) / WEIGHTS, folder.shape, Path(checkpoint))


def throughput_rows(work: dict) -> list[dict]:
    """The rows that Megatron's engine hands over on this rank."""
    rows: list[dict] = []
    megatron(Work(**work), rows.append)
    return rows
