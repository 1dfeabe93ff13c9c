"""`launch/cache_teacher.py`: the teacher runs once over the samples of a distillation, and its answers go to disk.

    chunk  0     1     2     3     4          a data-parallel replica takes every n-th chunk that is not there yet, runs its
           r0    r1    r0    r1    r0         samples through its stages, and its last stage writes the file

A killed run is continued by the same command, in any layout: whole chunks stay, after their checksums are compared.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.checkpoints.digests import joint_digest
from minitron_megatron.checkpoints.folder import ModelFolder, Output
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import CacheTeacherConfig, HardwareConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.data.datasets import MicroBatches, Samples, Windows, token_checksum, training_samples
from minitron_megatron.data.folder import Data
from minitron_megatron.distill.cache import check_chunk, write_chunk
from minitron_megatron.distill.cache_checks import Caching, check_cache_teacher
from minitron_megatron.distill.contents import Chunk, Contents
from minitron_megatron.distill.losses import TopK, nll_of_top_k, top_k
from minitron_megatron.errors import UserError
from minitron_megatron.measuring import measuring
from minitron_megatron.models.axes import flops_per_token
from minitron_megatron.models.build import (
    build_model_chunks,
    check_document_masks,
    foretell_dtype,
    model_dtype,
    pick_engine,
)
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.hardware import hardware, peak_flops
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.layout import Layout

log = logging.getLogger(__name__)


def cache_teacher(cfg: CacheTeacherConfig, checked: Caching | None = None) -> None:
    """Say how large it gets, run the teacher, write."""
    checked = checked or check_cache_teacher(cfg)
    layout, folder, data, contents = checked.layout, checked.folder, checked.data, checked.contents
    device = pick_device(cfg.device)
    if cfg.dry_run:
        _dry_run(folder, contents, layout)
        foretell_dtype(cfg.precision, device, folder.shape)
        return
    length = cfg.data.sequence_length
    windows = Windows(data, "validation", length) if cfg.trainer.validation_samples else None
    engine = pick_engine(cfg.teacher.engine, layout, model_dtype(folder.shape, cfg.precision), device, "teacher")
    check_document_masks(cfg.data.reset_attention_mask, engine, "teacher")
    with measuring(cfg, layout, folder, data, checked.inputs, continues=True) as out:
        if out.done:
            return
        began = time.monotonic()
        done = _done(out.path, contents, layout)
        written = sum(len(chunk.samples) for chunk in done) * contents.sequence_length
        written_now, teacher_loss = _write(cfg, folder, data, windows, layout, contents, out, done)
        done |= written_now
        tokens, seconds = (
            (contents.train + contents.validation) * contents.sequence_length,
            time.monotonic() - began,
        )
        out.digest = joint_digest({chunk.name: digest for chunk, digest in done.items()})
        out.results = {
            **asdict(contents),
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round((tokens - written) / seconds),
            **({} if teacher_loss is None else {"teacher_loss": teacher_loss}),
        }
    shown = ("train", "validation", "top_k", "tokens", "seconds", "tokens_per_second")
    rows = [[name, out.results[name]] for name in shown] + [["GiB", contents.total_bytes / 2**30]]
    print_table(f"{cfg.output}: a teacher's cache", ["", "value"], rows)


def _dry_run(folder: ModelFolder, contents: Contents, layout: Layout) -> None:
    """Size, and hours by the forward pass's arithmetic on the GPUs that are here, or else on the default ones."""
    tokens = (contents.train + contents.validation) * contents.sequence_length
    gpu = hardware(HardwareConfig())
    rate = gpu.efficiency * peak_flops(gpu, torch.bfloat16) * layout.world_size
    rows = [
        ["training samples", contents.train],
        ["validation samples", contents.validation],
        ["tokens", tokens],
        ["files", contents.files],
        ["bytes a token", contents.total_bytes / tokens],
        ["GiB", contents.total_bytes / 2**30],
        [
            f"hours on {layout.world_size} {gpu.gpu} (at {gpu.efficiency:.0%} of the peak in bf16)",
            flops_per_token(folder.shape, contents.sequence_length) * tokens / rate / 3600,
        ],
    ]
    print_table("would be cached", ["", "value"], rows)


def _done(path: Path, contents: Contents, layout: Layout) -> dict[Chunk, bytes]:
    """Chunks that an earlier run has left, with their SHA-256, known to every rank; each rank reads its share."""
    collectives.barrier()
    chunks = list(contents.chunks())[collectives.rank() :: layout.world_size]
    mine = {chunk: digest for chunk in chunks if (digest := check_chunk(path, contents, chunk)) is not None}
    done = {chunk: digest for part in collectives.all_gather_objects(mine) for chunk, digest in part.items()}
    if done:
        log.info("continuing after %d files of an earlier run", len(done))
    return done


def _write(
    cfg: CacheTeacherConfig,
    folder: ModelFolder,
    data: Data,
    windows: Windows | None,
    layout: Layout,
    contents: Contents,
    out: Output,
    done: Mapping[Chunk, bytes],
) -> tuple[dict[Chunk, bytes], float | None]:
    """Run the teacher over every chunk that is not there and write it; their SHA-256, on rank 0 all of them.

    Also the teacher's mean loss of the labels in each replica's first chunk, where there is one: named where it is a guess's.
    """
    from megatron.core import parallel_state as ps

    models = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.teacher.engine)
    load_model(models, folder)
    length = contents.sequence_length
    samples = training_samples(data, "train", sequence_length=length, seed=cfg.seed, count=contents.train)
    of_split = {"train": samples, "validation": windows}
    missing = [chunk for chunk in contents.chunks() if chunk not in done]
    mine = missing[ps.get_data_parallel_rank() :: layout.data]
    out.keep = True
    written: dict[Chunk, bytes] = {}
    total = sum(len(chunk.samples) for chunk in missing) * len(models)
    with progress("cache", total, unit="samples", made="tokens") as advance:

        def before(batch: Batch) -> None:
            # What this replica does, the others do meanwhile.
            advance(int(batch["valid"].sum()) * layout.data, batch["tokens"].numel() * layout.data // len(models))

        def write(chunk: Chunk) -> list[float]:
            answers = answer(models, of_split[chunk.split], chunk.samples, cfg, contents, layout, before)
            if answers is None:
                return [0.0, 0.0]
            if not all(part.isfinite().all() for part in answers):
                raise UserError(f"teacher={folder.path}: logits are not finite; the weights or precision= are at fault")
            asked = of_split[chunk.split]
            tokens = [token_checksum(asked[number]["tokens"]) for number in chunk.samples]
            written[chunk] = write_chunk(out.path, contents, chunk, answers, tokens)
            return label_sums(asked, chunk, contents, answers)

        # Every rank, a replica without a chunk too; before hours are spent on the rest.
        nll, counted = collectives.sum_from_last_stage([], write(mine[0]) if mine else [0.0, 0.0])
        loss = nll / counted if counted else None
        if loss is not None:
            warn_of_guessing(f"teacher={folder.path}", loss, contents.vocab_size)
        for chunk in mine[1:]:
            write(chunk)
    gathered = collectives.gather_objects(written) or []
    return {chunk: digest for part in gathered for chunk, digest in part.items()}, loss


def label_sums(samples: Samples, chunk: Chunk, contents: Contents, answers: TopK) -> list[float]:
    """−log p of a chunk's labels by its answers, summed over the tokens that count, and how many these are."""
    rows = [samples[number] for number in chunk.samples]
    labels, mask = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("labels", "loss_mask"))
    nll = nll_of_top_k(answers, labels, vocab_size=contents.vocab_size, temperature=contents.temperature)
    return [float((nll * mask).sum(dtype=torch.float64)), float(mask.sum())]


def answer(
    models: list[Any],
    samples: Samples,
    numbers: range,
    cfg: CacheTeacherConfig,
    contents: Contents,
    layout: Layout,
    before: Any = lambda batch: None,
) -> TopK | None:
    """The teacher's top K of some samples, [n, s, K] on the CPU, on one rank of the last stage; None on the others."""
    from megatron.core import parallel_state as ps

    group = ps.get_tensor_model_parallel_group()
    whole_rounds = layout.pipeline if layout.virtual_pipeline else 1
    batches = MicroBatches(samples, numbers, cfg.trainer.micro_batch_size, 0, 1, multiple_of=whole_rounds)

    def collect(batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any) -> list[Any]:
        logits, _ = output_layer(hidden_states, weight=output_weight)
        k, temperature = contents.top_k, contents.temperature
        found = top_k(logits, k, vocab_size=contents.vocab_size, temperature=temperature, group=group)
        return [part.transpose(0, 1)[batch["valid"] > 0].cpu() for part in found]

    collected = forward_only(
        models,
        batches,
        num_micro_batches=len(batches),
        micro_batch_size=cfg.trainer.micro_batch_size,
        sequence_length=contents.sequence_length,
        collect=collect,
        before=before,
    )
    if not collected or ps.get_tensor_model_parallel_rank() != 0:
        return None
    return TopK(*(torch.cat(parts) for parts in zip(*collected, strict=True)))
