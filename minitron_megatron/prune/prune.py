"""`launch/prune.py`: scores and a target, or a plan, into a smaller model folder.

    (no scores: measure them)  ──▶  plan: what stays of every axis  ──▶  loss right after the cut  ──▶  cut, chunk by chunk

The cut is shared out over the ranks, none of which holds more than a chunk and its source (prune/cut.py). A weights folder
stands for every layout (checkpoints/weights.py), so the result is the same bits for any number of ranks.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    read_manifest,
)
from minitron_megatron.checkpoints.hf_folder import HF_FILES, copy_companions, write_shape
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import verify_digest, write_weights
from minitron_megatron.config import PruneConfig
from minitron_megatron.console import print_table
from minitron_megatron.data.vocabulary import KEPT_FILE, choose_tokens, cut_configs, numbered, write_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import Scores, check_scores, load_scores
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.build import foretell_dtype
from minitron_megatron.models.limits import tensor_sizes
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero
from minitron_megatron.parallel.job import pick_device, process_group
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.parallel.precision import record
from minitron_megatron.parallel.tools import tool_job
from minitron_megatron.prune.checks import Goal, check_prune, importance_command
from minitron_megatron.prune.compare import cut_variants, losses_around_the_cut
from minitron_megatron.prune.cut import cut_chunk
from minitron_megatron.prune.foresee import foresee
from minitron_megatron.prune.plan import FILE, kept_digest, write_plan
from minitron_megatron.prune.select import TARGETS, Kept, choose, target_shape

log = logging.getLogger(__name__)


def prune_model(cfg: PruneConfig, goal: Goal | None = None) -> None:
    """`launch/prune.py`: measure if need be, decide what stays, cut."""
    goal = goal or check_prune(cfg)
    if goal is None:
        source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
        target = target_shape(source, vars(cfg.target), list(cfg.drop_layers), cfg.prune)
        foresee(source, target, Layout.from_config(cfg.parallel), cfg)
        return
    if goal.runs_models or cfg.loss_samples:
        pick_device(cfg.device)
    if cfg.dry_run:
        _dry_run(cfg, goal)
        return
    layout = Layout.from_config(cfg.parallel)
    with _one_group(cfg, goal):
        check_copies(goal.folder.path)
        if cfg.verify:
            verify_digest(goal.folder)
        kept, merged = decide(cfg, goal)
        losses = {}
        if cfg.loss_samples:
            variants = cut_variants(kept, merged)
            losses = losses_around_the_cut(cfg, layout, goal.folder, goal.data, goal.target, variants)
            print_table("loss right after the cut", ["", "nats a token"], list(losses.items()))
        _write(cfg, goal, kept, losses)


@contextlib.contextmanager
def _one_group(cfg: PruneConfig, goal: Goal) -> Iterator[None]:
    """One process group for all that follows: a file tool's, or where models run that of their device."""
    if not (cfg.loss_samples or goal.runs_models) or world_size_from_env() == 1:
        with tool_job():
            yield
        return
    device = pick_device(cfg.device)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    with process_group(device):
        yield


def decide(cfg: PruneConfig, goal: Goal) -> tuple[Kept, Kept | None]:
    """What stays, measuring scores where none are given; and the same with merged heads, where heads could be merged.

    One rank reads scores and tokenizer, and decides. Every rank must call it.
    """
    if goal.kept is not None:
        return goal.kept, goal.kept
    where = cfg.scores
    if goal.scored and where is None:
        # It brings Megatron, of which a cut by scores that are there has no need.
        from minitron_megatron.importance.measure import measure_importance

        measure_importance(importance_command(cfg))
        where = importance_command(cfg).output
    return ask_rank_zero(lambda: _by_scores(cfg, goal, where))


def _by_scores(cfg: PruneConfig, goal: Goal, where: str | None) -> tuple[Kept, Kept | None]:
    """The same by the scores of a folder, if any are needed."""
    scores = None
    if goal.scored:
        scores = load_scores(where)
        check_scores(scores, goal.folder.shape, goal.folder.digest, where)
    return _chosen(cfg, goal, scores), _merged(cfg, goal, scores) if cfg.loss_samples else None


def _chosen(cfg: PruneConfig, goal: Goal, scores: Scores | None) -> Kept:
    vocab = None
    if goal.target.vocab_size < goal.folder.shape.vocab_size:
        vocab = choose_tokens(goal.folder.tokenizer_path, scores.tensors["vocab"], goal.target.vocab_size)
    return choose(goal.folder.shape, goal.target, scores, goal.drop_layers, cfg.prune, vocab)


def _merged(cfg: PruneConfig, goal: Goal, scores: Scores | None) -> Kept | None:
    merging = replace(cfg, prune=replace(cfg.prune, heads="merge"))
    try:
        target_shape(goal.folder.shape, vars(cfg.target), goal.drop_layers, merging.prune)
    except UserError:
        return None
    return _chosen(merging, goal, scores)


def _write(cfg: PruneConfig, goal: Goal, kept: Kept, losses: dict[str, float]) -> None:
    folder, target = goal.folder, goal.target
    with command_output(cfg, _inputs(cfg, goal, kept)) as out:
        if out.done:
            return
        began = time.monotonic()
        if losses:
            out.precision = record()
        out.digest = write_model(out.path / WEIGHTS, folder, target, kept)
        if collectives.is_rank_zero():
            write_shape(out.path, target)
            write_plan(out.path / FILE, folder.digest, target, kept)
            _write_companions(folder, out.path, kept)
        out.results = {
            "parameters": count_parameters(target),
            "parameters_source": count_parameters(folder.shape),
            "kept_digest": kept_digest(kept),
            **({"target": asdict(goal.named)} if goal.named else {}),
            "seconds": round(time.monotonic() - began, 2),
            **({"loss_around_the_cut": losses} if losses else {}),
        }
    _print(f"{folder.path} pruned into {cfg.output}", folder.shape, target, {"seconds": out.results["seconds"]})


def _inputs(cfg: PruneConfig, goal: Goal, kept: Kept) -> dict[str, str]:
    """Digests of all that was read, for the manifest: what was decided by it, too."""
    scores = {}
    if goal.scored:
        scores["scores"] = read_manifest(cfg.scores or importance_command(cfg).output)["digest"]
    return {**goal.inputs, **scores, "plan": kept_digest(kept)}


def write_model(weights: Path, folder: ModelFolder, target: ModelShape, kept: Kept) -> str:
    """Write the pruned weights, every rank its share of the chunks; gives their digest."""
    reader = WeightReader(folder.weights)
    return write_weights(weights, target, partial(cut_chunk, reader, folder.shape, kept), "prune")


def _write_companions(folder: ModelFolder, target: Path, kept: Kept) -> None:
    """Tokenizer and Hugging Face files; with a smaller vocabulary the tokenizer is cut too, and its ids are written out."""
    if kept.vocab is None:
        copy_companions(folder, target)
        return
    write_tokenizer(folder.tokenizer_path, target / TOKENIZER, kept.vocab, folder.shape.vocab_size)
    (target / KEPT_FILE).write_text(json.dumps(kept.vocab.tolist()) + "\n", encoding="utf-8")
    if (folder.path / HF_FILES).is_dir():
        (target / HF_FILES).mkdir()
        for name, values in cut_configs(folder, numbered(kept.vocab)).items():
            (target / HF_FILES / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _dry_run(cfg: PruneConfig, goal: Goal) -> None:
    """What would be made, by counting; of a folder that is there already, whether it is this one."""
    measures = goal.runs_models
    if not measures:
        kept, _ = decide(cfg, goal)
        check_command_output(cfg, _inputs(cfg, goal, kept))
    foresee(goal.folder.shape, goal.target, Layout.from_config(cfg.parallel), cfg)
    if measures or cfg.loss_samples:
        foretell_dtype(cfg.precision, pick_device(cfg.device), goal.folder.shape)
    if measures and cfg.data.path:
        log.info("importance would be measured first, on %d samples of %s", cfg.samples, cfg.data.path)
    elif measures:
        log.info("the run itself needs scores=, or data.path= to measure them")


def _print(title: str, source: ModelShape, target: ModelShape, extra: dict[str, Any]) -> None:
    rows = [[name, getattr(source, name), getattr(target, name)] for name in TARGETS]
    before, after = count_parameters(source), count_parameters(target)
    rows += [["parameters", before, after], ["share of the source", "", f"{after / before:.1%}"]]
    rows.append(["parallel.tensor can be", *(", ".join(map(str, tensor_sizes(shape))) for shape in (source, target))])
    rows += [[name, "", value] for name, value in extra.items()]
    print_table(title, ["", "source", "target"], rows)
