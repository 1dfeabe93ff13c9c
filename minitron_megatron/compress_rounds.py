"""The rounds of `launch/compress.py`: every stage composed, shapes that follow from the first model's, what it would refuse.

A round prunes the student of the one before, and distills it. The one round to a budget or target has no name and is no folder.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_megatron.chosen import Choices, Text
from minitron_megatron.composing import Stage, check_data, compose_stage
from minitron_megatron.compress_given import FOLDERS, given_limits, named, own_options, prune_options, search_stage
from minitron_megatron.compress_source import DATA, TEACHER, Source
from minitron_megatron.config import (
    CompressConfig,
    RoundConfig,
    check,
    number_of_steps,
    options,
    tokens_of_run,
)
from minitron_megatron.data.folder import check_enough
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.checks import asks_for_a_cut
from minitron_megatron.prune.select import target_shape
from minitron_megatron.search.found import read_search, target_file
from minitron_megatron.search.space import SIZES
from minitron_megatron.stages import STAGES_FILE, is_whole
from minitron_megatron.train.distill_checks import check_pair

log = logging.getLogger(__name__)
SUMMARY, CHOSEN = "chain.json", "chosen.json"
EXPORTED, REPORT = "hf", "report"
# Of the folder of a whole, what no round can be called.
_NAMES_TAKEN = (STAGES_FILE, SUMMARY, CHOSEN, TEACHER, DATA, EXPORTED, REPORT)
# How far the tokens to train on may be off before they are prepared: where all text was counted (its documents are split by
# chance), and where they are estimated.
_UNSURE = {True: 1.2, False: 1.5}


@dataclass(frozen=True)
class Round:
    """One round with the shapes that it meets: `source` is pruned to `target`, which `teacher` teaches."""

    name: str
    source: ModelShape
    teacher: ModelShape
    target: ModelShape
    stages: dict[str, Stage]

    @property
    def tokens(self) -> int:
        """Tokens of its distillation."""
        return tokens_of_run(self.stages["distill"].config)

    @property
    def share(self) -> float:
        """Parameters that are left of the source's."""
        return count_parameters(self.target) / count_parameters(self.source)

    @property
    def searched(self) -> bool:
        """Whether its target is that of a search."""
        return "search" in self.stages


def plan_rounds(
    cfg: CompressConfig, source: Source, chosen: Choices | None = None, planned: ModelShape | None = None
) -> list[Round]:
    """Every round with its commands composed, and its shapes following from the first model's. Raises UserError.

    Args:
        cfg: the command's options.
        source: what is started from.
        chosen: options of stages that were chosen.
        planned: the student's shape until a search has found one.
    """
    root = Path(cfg.output)
    start = model = (source.model, source.shape)
    rounds = []
    written_rounds = read_rounds(cfg.rounds) if cfg.rounds else [RoundConfig(name="")]
    for written in written_rounds:
        teacher = model if written.teacher == "source" else start
        at = {stage: root / written.name / folder for stage, folder in FOLDERS.items()}
        inputs = {
            "importance": {"model": model[0]},
            "prune": {"model": model[0], "scores": at["importance"]},
            "distill": {"teacher": teacher[0], "student": at["prune"]},
            "evaluate": {"model": at["distill"], "teacher": teacher[0]},
        }
        stages: dict[str, Stage] = {}
        for stage in FOLDERS:
            if stage == "search":
                if given_limits(cfg.budget):
                    with named(written.name, stage):
                        stages[stage] = search_stage(cfg, model[0], at["search"])
            elif stage != "evaluate" or cfg.perplexity:
                stages[stage] = _compose(cfg, written, stage, inputs[stage], at, chosen, planned)
        with named(written.name, "prune"):
            pruning = stages["prune"].config
            target = target_shape(model[1], vars(pruning.target), list(pruning.drop_layers), pruning.prune)
        rounds.append(Round(written.name, model[1], teacher[1], target, stages))
        model = (str(at["distill"]), target)
    return rounds


def read_rounds(values: Any) -> list[RoundConfig]:
    """`rounds=` as it is written, every round checked on its own. Raises UserError."""
    if not isinstance(values, list) or not values:
        raise UserError("no rounds: give chain=PRESET (--help lists them) or rounds='[{name: …, prune: {…}}, …]'")
    known = [o.name for o in options(RoundConfig)]
    rounds: dict[str, RoundConfig] = {}
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping) or value.get("name") in (None, ""):
            raise UserError(f"round {number} of rounds= has no name: write {{name: …, prune: {{…}}, distill: {{…}}}}")
        name = str(value["name"])
        with named(name):
            unknown = [str(key) for key in value if key not in known]
            if unknown:
                raise UserError(f"unknown option {unknown[0]!r}: a round has {', '.join(known)}")
            if Path(name).name != name or name.startswith(".") or name in _NAMES_TAKEN:
                raise UserError(
                    f"a round's name is that of its folder: no slashes, no dot in front, none of {', '.join(_NAMES_TAKEN)}"
                )
            if name in rounds:
                raise UserError("there are two rounds of this name: each needs a folder of its own")
            rounds[name] = RoundConfig(**{**value, "name": name})
            check(rounds[name])
    return list(rounds.values())


def _compose(
    cfg: CompressConfig,
    written: RoundConfig,
    stage: str,
    inputs: Mapping[str, object],
    at: Mapping[str, Path],
    chosen: Choices | None,
    planned: ModelShape | None,
) -> Stage:
    """A stage as its command will read it: the chain's options, over them the round's. Raises UserError."""
    with named(written.name, stage):
        own = {**own_options(cfg, stage), **own_options(written, stage)}
        if chosen:
            own = chosen.of(stage, own)
        if stage != "prune":
            return compose_stage(cfg, stage, inputs, own, at[stage])
        if given_limits(cfg.budget):
            return _compose_searched(cfg, planned, inputs, own, at)
        if not cfg.rounds:
            own = {**prune_options(cfg), **own}
        found = compose_stage(cfg, stage, inputs, own, at[stage])
        if not asks_for_a_cut(found.config):
            raise UserError("nothing to cut: give it a target, as in prune: {target: {hidden_size: …}}")
        return found


def _compose_searched(
    cfg: CompressConfig, shape: ModelShape, inputs: Mapping[str, object], own: dict[str, Any], at: Mapping[str, Path]
) -> Stage:
    """prune to the best shape that a search finds; until it has run its sizes are those that the plan takes for them."""
    taken = next((key for key in own if key.partition(".")[0] == "target"), None)
    if taken:
        raise UserError(f"{taken}= and budget.{given_limits(cfg.budget)[0]}=: give one of them")
    if is_whole(at["search"]):
        # By its sizes: the file of its target could be another one since.
        best = read_search(at["search"]).ranked[0]
        return compose_stage(cfg, "prune", {**inputs, **best.options}, own, at["prune"])
    planned = {f"target.{name}": getattr(shape, name) for name in SIZES}
    stage = compose_stage(cfg, "prune", {**inputs, **planned}, own, at["prune"])
    words = [word for word in stage.words if not word.startswith("target.")]
    return replace(stage, words=(*words, f"target={at['search'] / target_file(1)}"))


def check_round(one: Round, source: Source) -> None:
    """Raise UserError, naming round and stage, for what a stage would refuse once its turn comes."""
    for stage in one.stages.values():
        with named(one.name, stage.command):
            cfg, splits = stage.config, ["train"]
            if stage.command in ("prune", "search"):
                continue  # its target is checked where the shapes follow from one another
            layout = Layout.from_config(cfg.parallel, stage.processes)
            if stage.command == "distill":
                number_of_steps(cfg)
                check_pair(one.teacher, one.target, cfg, layout)
                splits += ["validation"] if cfg.trainer.validation_samples else []
            else:
                for shape in [one.source] if stage.command == "importance" else [one.target, one.teacher]:
                    check_layout(shape, layout)
                check_sequence(cfg.data.sequence_length, layout)
                splits = [cfg.split] if stage.command == "evaluate" else splits
            samples = cfg.first_sample + cfg.samples if stage.command == "importance" else 1
            if source.ready:
                data = check_data(cfg, splits, one.target, samples)
                if stage.command == "distill":
                    check_enough(data, one.tokens, cfg.data.max_epochs)
            elif source.text:
                _check_text(source.text, cfg.data.sequence_length, splits, samples)
                if stage.command == "distill":
                    _check_epochs(source.text, one.tokens, cfg.data.max_epochs)


def _check_text(text: Text, length: int, splits: list[str], samples: int) -> None:
    """Raise UserError where text that is not prepared yet has too few tokens, or by its size cannot have enough."""
    about = "" if text.exact else "about "
    for split in splits:
        tokens = getattr(text, split)
        if tokens < samples * length + 1:
            fewer, advice = tokens // length, ""
            if split == "validation":
                advice = "a larger prepare_data.validation_fraction=, "
            if samples > 1 and fewer:
                advice = f"importance.samples={fewer} at most, "
            raise UserError(
                f"input= has {about}{tokens:,} tokens for the {split} split, {samples} samples of {length} tokens are needed: "
                f"give more text, {advice}or lower data.sequence_length="
            )


def _check_epochs(text: Text, tokens: int, most: float) -> None:
    """Raise UserError where a run on text that is not prepared yet would clearly read it more often than it may.

    Where it may be so, that is said: it is known once the text is tokenised.
    """
    epochs = tokens / max(1, text.train)
    if epochs <= most:
        return
    takes = (
        f"the run takes {tokens:,} tokens, and input= has about {text.train:,} to train on ({epochs:,.4g} epochs): give more "
        "text, lower distill.trainer.tokens= or distill.trainer.steps=, or allow it by "
        f"data.max_epochs={math.ceil(epochs * _UNSURE[text.exact])}"
    )
    if epochs > most * _UNSURE[text.exact]:
        raise UserError(takes)
    log.warning("distill may be refused once the text is tokenised, for data.max_epochs=%g: %s", most, takes)
