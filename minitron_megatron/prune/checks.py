"""What launch/prune.py checks by its options and folders alone: before torch is there."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf_folder import companion_stamps
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.cli import spelling
from minitron_megatron.config import DataConfig, ImportanceConfig, PruneConfig
from minitron_megatron.data.folder import Data, data_digest, open_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.vocabulary import check_cut
from minitron_megatron.errors import UserError
from minitron_megatron.importance.checks import check_calibration
from minitron_megatron.importance.layers import load_layer_analysis
from minitron_megatron.importance.scores import check_scores, load_scores
from minitron_megatron.models.families import FAMILIES, check_exportable, class_of_export
from minitron_megatron.models.limits import check_layout, check_sequence, tensor_sizes
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.named import Named, named_target
from minitron_megatron.prune.plan import kept_digest, read_plan
from minitron_megatron.prune.select import Kept, needs_scores, target_shape

log = logging.getLogger(__name__)
# Tensor-parallel sizes that models are usually run with.
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
    inputs: dict[str, str]
    named: Named | None = None

    @property
    def runs_models(self) -> bool:
        """Whether scores are to be measured first."""
        return self.scored and self.measured

    @property
    def scored(self) -> bool:
        """Whether the target leaves anything for scores to choose."""
        return self.kept is None and needs_scores(self.folder.shape, self.target, self.drop_layers)


def check_prune(cfg: PruneConfig) -> Goal | None:
    """Model, target or plan, scores, data and output; None for a rehearsal by sizes alone. Raises UserError."""
    if cfg.dry_run and cfg.model.path is None:
        source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
        Layout.from_config(cfg.parallel)
        _check_asked(cfg)
        target_shape(source, vars(cfg.target), list(cfg.drop_layers), cfg.prune)
        return None
    folder = open_model_folder(cfg.model.folder("model"))
    check_weights(folder)
    source, kept, named = folder.shape, None, None
    drop_layers = list(cfg.drop_layers)
    if cfg.plan:
        _check_plan_alone(cfg)
        target, kept = read_plan(Path(cfg.plan), source, folder.digest)
    else:
        drop_layers = drop_layers or _best_block(cfg, folder)
        _check_asked(cfg)
        target = target_shape(source, vars(cfg.target), drop_layers, cfg.prune)
        named = named_target(spelling.TYPED[1:], vars(cfg.target))
    if target.vocab_size < source.vocab_size:
        check_cut(folder)
    data = None
    if cfg.data.path and (cfg.loss_samples or not cfg.scores):
        data = open_data(cfg.data.path, "train", source, cfg.data.sequence_length)
        check_same_tokenizer(data, {"model": folder.path})
    elif cfg.data.path:
        # Nothing is measured on it, but what is named is there.
        data_digest(cfg.data.path)
    inputs = _inputs(cfg, folder, data)
    goal = Goal(folder, target, drop_layers, data, kept, cfg.scores is None, inputs, named)
    # Later commands run what this one makes: what they would refuse is refused before it is cut.
    check_layout(target, Layout.from_config(cfg.parallel), "the target", resizing=None if cfg.plan else "target")
    _check_measuring(cfg, goal)
    if cfg.scores and goal.scored:
        check_scores(load_scores(cfg.scores), source, folder.digest, str(cfg.scores))
        inputs["scores"] = read_manifest(cfg.scores)["digest"]
    # What scores choose is not known yet.
    check_command_output(cfg, inputs | ({"plan": kept_digest(kept)} if kept else {}))
    _warn_of_idle_options(cfg, goal)
    if named:
        named.say()
    if target == source:
        log.warning(
            "nothing is cut: the target is as large as model=%s, and the output is that model again", folder.path
        )
    _warn_of_exports(target)
    _warn_of_layouts(source, target)
    return goal


def asks_for_a_cut(cfg: PruneConfig) -> bool:
    """Whether a size, layers or a plan are given: the output would be the model again otherwise."""
    return bool(cfg.plan or cfg.drop_layers) or any(size is not None for size in vars(cfg.target).values())


def _check_asked(cfg: PruneConfig) -> None:
    """Raise UserError where nothing is asked for."""
    if not asks_for_a_cut(cfg):
        raise UserError(
            "nothing to prune: give a size, such as target.num_layers= or target.ffn_hidden_size=, target=FILE (of search), "
            "plan= or drop_layers="
        )


def _inputs(cfg: PruneConfig, folder: ModelFolder, data: Data | None) -> dict[str, str]:
    """Digests of what is read beside scores: the model and what lies beside it, a layer analysis, data that losses are of."""
    inputs = {"model": folder.digest, **companion_stamps(folder)}
    if cfg.layers and not cfg.drop_layers:
        inputs["layers"] = read_manifest(cfg.layers)["digest"]
    if cfg.loss_samples and data is not None:
        inputs["data"] = data.digest
    return inputs


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
    measures = goal.runs_models
    if cfg.dry_run and measures and not cfg.data.path:
        return
    if measures and not cfg.data.path:
        raise UserError("scores= is missing: give the output of importance, or data.path= to measure them now")
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
    if measures and goal.data:
        check_calibration(importance_command(cfg), goal.data)


def _warn_of_idle_options(cfg: PruneConfig, goal: Goal) -> None:
    """Scores choose only where there is a choice; merging and averaging say how heads go, not that they do."""
    if goal.kept is not None:
        return
    if cfg.scores and not goal.scored:
        log.info("scores=%s has no effect: the target leaves nothing for scores to choose", cfg.scores)
    source, target = goal.folder.shape, goal.target
    if cfg.prune.heads == "merge" and target.num_attention_heads == source.num_attention_heads:
        log.warning("prune.heads=merge does nothing: the target keeps all %d heads", source.num_attention_heads)
    if cfg.prune.groups == "mean" and target.num_query_groups == source.num_query_groups:
        log.warning("prune.groups=mean does nothing: the target keeps all %d groups", source.num_query_groups)


def _warn_of_exports(target: ModelShape) -> None:
    if (exported := class_of_export(target)) is not FAMILIES[target.family]:
        log.warning(
            "hidden_size=%d is not a multiple of num_attention_heads=%d, which transformers 5 refuses of a Llama: the target "
            "will be exported as %s, which computes the same",
            target.hidden_size,
            target.num_attention_heads,
            exported.architecture,
        )
    try:
        check_exportable(target, "the target")
    except UserError as error:
        log.warning("%s", error)


def importance_command(cfg: PruneConfig) -> ImportanceConfig:
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
