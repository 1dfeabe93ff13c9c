"""Cuts a model by a plan, chunk by chunk, shared out over the ranks: no rank holds more than a chunk and its source.

    source chunk  [rows, columns] ──table: which rows and columns have a kept index──▶  target chunk

The weights folder stands for every layout (checkpoints/weights.py), so the result is the same bits for any number of ranks.
"""

import logging
import time
from pathlib import Path

import torch

from minitron_megatron.checkpoints.folder import WEIGHTS, ModelFolder, check_output, open_model_folder, output_folder
from minitron_megatron.checkpoints.hf import copy_companions, write_shape
from minitron_megatron.checkpoints.weights import Chunk, WeightReader, check_weights, verify_digest, write_weights
from minitron_megatron.config import PruneConfig
from minitron_megatron.console import print_table
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import check_scores, load_scores
from minitron_megatron.launcher import command_line, resolved_config
from minitron_megatron.models.axes import Slot, count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import tool_job
from minitron_megatron.prune.plan import FILE, kept_digest, read_plan, write_plan
from minitron_megatron.prune.select import TARGETS, Kept, choose, needs_scores, target_shape

log = logging.getLogger(__name__)


def prune_chunk(reader: WeightReader, source: ModelShape, kept: Kept, chunk: Chunk) -> torch.Tensor:
    """One chunk of the pruned model, cut out of the source's tensor of the same name."""
    slot = chunk.slot
    layer = None if slot.layer is None else int(kept.layers[slot.layer])
    origin = Slot(slot.row, layer)
    rows, *columns = slot.row.indices(source, kept.of_layer(layer))
    if rows is None:
        tensor = reader.read_slot(origin, source, chunk.start, chunk.stop)
    else:
        wanted = rows[chunk.start : chunk.stop]
        first = int(wanted[0])
        tensor = reader.read_slot(origin, source, first, int(wanted[-1]) + 1)[torch.from_numpy(wanted - first)]
    for dim, chosen in enumerate(columns, start=1):
        if chosen is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(chosen))
    return tensor


def make_plan(cfg: PruneConfig, folder: ModelFolder) -> tuple[ModelShape, Kept, dict[str, str]]:
    """Target shape, kept indices and the inputs they come from, out of a plan file or of scores and a target."""
    source = folder.shape
    if cfg.plan:
        if cfg.scores:
            raise UserError("plan= and scores= exclude each other: a plan repeats a pruning without scores")
        if cfg.drop_layers or any(size is not None for size in vars(cfg.target).values()):
            raise UserError("plan= excludes target= and drop_layers=: edit the plan's own target and indices")
        target, kept = read_plan(Path(cfg.plan), source, folder.digest)
        return target, kept, {"model": folder.digest, "plan": kept_digest(kept)}
    target = target_shape(source, vars(cfg.target), list(cfg.drop_layers))
    if not needs_scores(source, target, list(cfg.drop_layers)):
        return target, choose(source, target, None, list(cfg.drop_layers)), {"model": folder.digest}
    if not cfg.scores:
        raise UserError("scores= is missing: give the output of launch/importance.py, or plan=")
    scores = load_scores(cfg.scores)
    check_scores(scores, source, folder.digest, str(cfg.scores))
    kept = choose(source, target, scores, list(cfg.drop_layers))
    return target, kept, {"model": folder.digest, "plan": kept_digest(kept)}


def prune_model(cfg: PruneConfig) -> None:
    """`launch/prune.py`: scores and a target, or a plan, into a smaller model folder."""
    with tool_job():
        folder = open_model_folder(cfg.model.folder("model"))
        check_weights(folder)
        if cfg.verify:
            verify_digest(folder)
        target, kept, inputs = make_plan(cfg, folder)
        if target.hidden_size % target.num_attention_heads:
            log.warning(
                "hidden_size=%d is not a multiple of num_attention_heads=%d: transformers 5 will refuse to load its export",
                target.hidden_size,
                target.num_attention_heads,
            )
        if cfg.dry_run:
            check_output(cfg.output, config=resolved_config(cfg), inputs=inputs, resume=cfg.resume)
            _print("would be pruned", folder, target, {})
            return
        with output_folder(
            cfg.output, command=command_line(), config=resolved_config(cfg), inputs=inputs, resume=cfg.resume
        ) as out:
            if out.done:
                return
            began = time.monotonic()
            out.digest = _write(out.path / WEIGHTS, folder, target, kept)
            if collectives.is_rank_zero():
                write_shape(out.path, target)
                write_plan(out.path / FILE, folder.digest, target, kept)
                copy_companions(folder, out.path)
            out.results = {
                "parameters": count_parameters(target),
                "parameters_source": count_parameters(folder.shape),
                "kept_digest": kept_digest(kept),
                "seconds": round(time.monotonic() - began, 2),
            }
        _print(f"pruned into {cfg.output}", folder, target, {"seconds": out.results["seconds"]})


def _write(weights: Path, folder: ModelFolder, target: ModelShape, kept: Kept) -> str:
    reader = WeightReader(folder.weights)
    return write_weights(weights, target, lambda chunk: prune_chunk(reader, folder.shape, kept, chunk), "prune")


def _print(title: str, folder: ModelFolder, target: ModelShape, extra: dict[str, float]) -> None:
    source = folder.shape
    rows = [[name, getattr(source, name), getattr(target, name)] for name in TARGETS]
    before, after = count_parameters(source), count_parameters(target)
    rows += [["parameters", before, after], ["share of the source", "", f"{after / before:.1%}"]]
    rows += [[name, "", value] for name, value in extra.items()]
    print_table(f"{folder.path} {title}", ["", "source", "target"], rows)
