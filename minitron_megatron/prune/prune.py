"""`launch/prune.py`: scores and a target, or a plan, into a smaller model folder.

    (no scores: measure them)  ──▶  plan: what stays of every axis  ──▶  loss right after the cut  ──▶  cut, chunk by chunk

The cut is shared out over the ranks, none of which holds more than a chunk and its source (prune/cut.py). A weights folder
stands for every layout (checkpoints/weights.py), so the result is the same bits for any number of ranks.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    open_model_folder,
)
from minitron_megatron.checkpoints.hf import HF_FILES, copy_companions, write_shape
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import verify_digest, write_weights
from minitron_megatron.config import DataConfig, ImportanceConfig, PruneConfig
from minitron_megatron.console import print_table
from minitron_megatron.data.folder import Data, open_data
from minitron_megatron.data.vocabulary import KEPT_FILE, choose_tokens, renumber_config, write_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import load_layer_analysis
from minitron_megatron.importance.measure import check_calibration, measure_importance
from minitron_megatron.importance.scores import Scores, check_scores, load_scores
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.build import foretell_dtype
from minitron_megatron.models.families import check_exportable
from minitron_megatron.models.limits import check_layout, check_sequence, tensor_sizes
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.job import pick_device, process_group
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.parallel.precision import record
from minitron_megatron.parallel.tools import tool_job
from minitron_megatron.prune.compare import cut_variants, losses_around_the_cut
from minitron_megatron.prune.cut import cut_chunk
from minitron_megatron.prune.foresee import foresee
from minitron_megatron.prune.plan import FILE, kept_digest, read_plan, write_plan
from minitron_megatron.prune.select import TARGETS, Kept, choose, needs_scores, target_shape

log = logging.getLogger(__name__)
_USUAL_TENSOR_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Goal:
    """What is to be pruned into what: all that can be known, and refused, before anything is read or measured."""

    folder: ModelFolder
    target: ModelShape
    drop_layers: list[int]
    data: Data | None
    kept: Kept | None
    measured: bool

    @property
    def scored(self) -> bool:
        """Whether the target leaves anything for scores to choose."""
        return self.kept is None and needs_scores(self.folder.shape, self.target, self.drop_layers)


def prune_model(cfg: PruneConfig) -> None:
    """`launch/prune.py`: measure if need be, decide what stays, cut."""
    if cfg.dry_run and cfg.model.path is None:
        source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
        layout = Layout.from_config(cfg.parallel)
        foresee(source, target_shape(source, vars(cfg.target), list(cfg.drop_layers), cfg.prune), layout, cfg)
        return
    goal = _goal(cfg)
    if cfg.dry_run:
        _dry_run(cfg, goal)
        return
    layout = Layout.from_config(cfg.parallel)
    with _one_group(cfg, goal):
        if cfg.verify:
            verify_digest(goal.folder)
        kept, merged = decide(cfg, goal)
        losses = {}
        if cfg.loss_samples:
            variants = cut_variants(kept, merged)
            losses = losses_around_the_cut(cfg, layout, goal.folder, goal.data, goal.target, variants)
            print_table("loss right after the cut", ["", "nats a token"], list(losses.items()))
        _write(cfg, goal, kept, losses)


def _goal(cfg: PruneConfig) -> Goal:
    """Check everything that can be checked before anything heavy. Raises UserError."""
    folder = open_model_folder(cfg.model.folder("model"))
    check_weights(folder)
    source, kept = folder.shape, None
    drop_layers = list(cfg.drop_layers)
    if cfg.plan:
        _check_plan_alone(cfg)
        target, kept = read_plan(Path(cfg.plan), source, folder.digest)
    else:
        drop_layers = drop_layers or _best_block(cfg, folder)
        target = target_shape(source, vars(cfg.target), drop_layers, cfg.prune)
    data = None
    if cfg.data.path and (cfg.loss_samples or not cfg.scores):
        data = open_data(cfg.data.path, "train", source, cfg.data.sequence_length)
    goal = Goal(folder, target, drop_layers, data, kept, measured=cfg.scores is None)
    # Later commands run what this one makes: what they would refuse is refused before it is cut.
    check_layout(target, Layout.from_config(cfg.parallel), "the target", resizing=None if cfg.plan else "target")
    _check_measuring(cfg, goal)
    if cfg.scores and goal.scored:
        check_scores(load_scores(cfg.scores), source, folder.digest, str(cfg.scores))
    _warn_of_idle_options(cfg, goal)
    _warn_of_exports(target)
    _warn_of_layouts(source, target)
    return goal


def _check_plan_alone(cfg: PruneConfig) -> None:
    if cfg.scores:
        raise UserError("plan= and scores= exclude each other: a plan repeats a pruning without scores")
    if cfg.drop_layers or cfg.layers or any(size is not None for size in vars(cfg.target).values()):
        raise UserError("plan= excludes target=, layers= and drop_layers=: edit the plan's own target and indices")


def _best_block(cfg: PruneConfig, folder: ModelFolder) -> list[int]:
    """Layers that a layer analysis says can go. Raises UserError."""
    if cfg.layers is None:
        return []
    count = folder.shape.num_layers - (cfg.target.num_layers or 0)
    if cfg.target.num_layers is None or count < 1:
        raise UserError(
            f"layers={cfg.layers} needs target.num_layers= below the model's {folder.shape.num_layers}: "
            "the analysis says which layers go, not how many"
        )
    analysis = load_layer_analysis(cfg.layers)
    analysis.check_model(folder.digest)
    return list(analysis.best_block(count, cfg.prune.judge, cfg.prune.keep_last_layers))


def _check_measuring(cfg: PruneConfig, goal: Goal) -> None:
    """Raise UserError where scores or losses are to be measured and cannot be."""
    measures = goal.scored and goal.measured
    if cfg.dry_run and measures and not cfg.data.path:
        return
    if measures and not cfg.data.path:
        raise UserError(
            "scores= is missing: give the output of launch/importance.py, or data.path= to measure them now"
        )
    if cfg.loss_samples:
        if not cfg.data.path:
            raise UserError("loss_samples= needs data.path=: the loss is measured on its validation split")
        if goal.target.vocab_size != goal.folder.shape.vocab_size:
            raise UserError(
                "loss_samples= and target.vocab_size= exclude each other: the data have the source's tokens"
            )
        open_data(cfg.data.path, "validation", goal.folder.shape, cfg.data.sequence_length)
    if measures or cfg.loss_samples:
        layout = Layout.from_config(cfg.parallel)
        check_sequence(cfg.data.sequence_length, layout)
        check_layout(goal.folder.shape, layout, "the source model")
        pick_device(cfg.device)
    if measures and goal.data:
        check_calibration(_importance(cfg), goal.data)


def _warn_of_idle_options(cfg: PruneConfig, goal: Goal) -> None:
    """Merging and averaging say how heads go, not that they do."""
    if goal.kept is not None:
        return
    source, target = goal.folder.shape, goal.target
    if cfg.prune.heads == "merge" and target.num_attention_heads == source.num_attention_heads:
        log.warning("prune.heads=merge does nothing: the target keeps all %d heads", source.num_attention_heads)
    if cfg.prune.groups == "mean" and target.num_query_groups == source.num_query_groups:
        log.warning("prune.groups=mean does nothing: the target keeps all %d groups", source.num_query_groups)


def _warn_of_exports(target: ModelShape) -> None:
    if target.hidden_size % target.num_attention_heads:
        log.warning(
            "hidden_size=%d is not a multiple of num_attention_heads=%d: transformers 5 will refuse to load its export",
            target.hidden_size,
            target.num_attention_heads,
        )
    try:
        check_exportable(target, "the target")
    except UserError as error:
        log.warning("%s", error)


def _warn_of_layouts(source: ModelShape, target: ModelShape) -> None:
    """A cut that no longer divides where the source did shows here, not in a distillation days later."""
    before, after = (max(n for n in tensor_sizes(shape) if n in _USUAL_TENSOR_SIZES) for shape in (source, target))
    lost = sorted({size for size in target.ffn_of_layers if size % before})
    if after < before and lost:
        log.warning(
            "ffn_hidden_size=%d divides by parallel.tensor=%d at most, the source by %d: target.ffn_hidden_size=%d would too",
            lost[0],
            math.gcd(lost[0], before),
            before,
            -(-lost[0] // before) * before,
        )


@contextlib.contextmanager
def _one_group(cfg: PruneConfig, goal: Goal) -> Iterator[None]:
    """One process group for all that follows: a file tool's, or where models run that of their device."""
    runs_models = cfg.loss_samples or (goal.scored and goal.measured)
    if not runs_models or world_size_from_env() == 1:
        with tool_job():
            yield
        return
    device = pick_device(cfg.device)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    with process_group(device):
        yield


def _importance(cfg: PruneConfig) -> ImportanceConfig:
    """The command that measures what this one needs."""
    return ImportanceConfig(
        output=f"{cfg.output.rstrip('/')}_scores",
        parallel=cfg.parallel,
        seed=cfg.seed,
        device=cfg.device,
        precision=cfg.precision,
        resume=cfg.resume,
        model=cfg.model,
        data=DataConfig(path=cfg.data.path, sequence_length=cfg.data.sequence_length),
        samples=cfg.samples,
        trainer=cfg.trainer,
        importance=cfg.importance,
    )


def decide(cfg: PruneConfig, goal: Goal) -> tuple[Kept, Kept | None]:
    """What stays, measuring scores where none are given; and the same with merged heads, where heads could be merged."""
    if goal.kept is not None:
        return goal.kept, goal.kept
    scores = None
    if goal.scored:
        where = cfg.scores
        if where is None:
            measure_importance(_importance(cfg))
            where = _importance(cfg).output
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
    inputs = {"model": folder.digest, "plan": kept_digest(kept)}
    with command_output(cfg, inputs) as out:
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
            "seconds": round(time.monotonic() - began, 2),
            **({"loss_around_the_cut": losses} if losses else {}),
        }
    _print(f"{folder.path} pruned into {cfg.output}", folder.shape, target, {"seconds": out.results["seconds"]})


def write_model(weights: Path, folder: ModelFolder, target: ModelShape, kept: Kept) -> str:
    """Write the pruned weights, every rank its share of the chunks; gives their digest."""
    reader = WeightReader(folder.weights)
    return write_weights(weights, target, partial(cut_chunk, reader, folder.shape, kept), "prune")


def _write_companions(folder: ModelFolder, target: Path, kept: Kept) -> None:
    """Tokenizer and Hugging Face files; with a smaller vocabulary the tokenizer is cut too, and its ids are written out."""
    if kept.vocab is None:
        copy_companions(folder, target)
        return
    write_tokenizer(folder.tokenizer_path, target / TOKENIZER, kept.vocab)
    (target / KEPT_FILE).write_text(json.dumps(kept.vocab.tolist()) + "\n", encoding="utf-8")
    if (folder.path / HF_FILES).is_dir():
        (target / HF_FILES).mkdir()
        for file in sorted((folder.path / HF_FILES).iterdir()):
            values = renumber_config(json.loads(file.read_text(encoding="utf-8")), kept.vocab.tolist())
            (target / HF_FILES / file.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _dry_run(cfg: PruneConfig, goal: Goal) -> None:
    """What would be made, by counting; of a folder that is there already, whether it is this one."""
    measures = goal.scored and goal.measured
    if not measures:
        kept, _ = decide(cfg, goal)
        inputs = {"model": goal.folder.digest, "plan": kept_digest(kept)}
        check_command_output(cfg, inputs)
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
