"""A large cut in several rounds, each round's student the next one's source (arXiv 2407.14679, 15B → 8B → 4B).

    model ──importance──▶ scores ──prune──▶ pruned ──distill──▶ distilled ──▶ the next round
      └────────────────────────── teaches ─────┘                    └─evaluate─▶ evaluation

    output/ROUND/{scores,pruned,distilled,evaluation}      one folder a stage, each whole or not there
    output/stages.json, chain.json                         what is done; the result of every round

The stages are the commands of launch/ (stages.py). All of them are composed and checked with the shapes they will meet before
the first one starts.
"""

import json
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import RESULTS, ModelFolder, open_model_folder, read_manifest
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.composing import Stage, check_data, check_root, compose_stage, flat_options, naming
from minitron_megatron.config import (
    CompressConfig,
    RoundConfig,
    check,
    number_of_steps,
    options,
    tokens_of_run,
)
from minitron_megatron.console import console, print_table
from minitron_megatron.data.folder import check_enough, data_digest
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.prune.select import target_shape
from minitron_megatron.stages import Stages, start_words, write_json
from minitron_megatron.train.distill import check_pair

# Each stage's command and its folder, in order.
FOLDERS = {"importance": "scores", "prune": "pruned", "distill": "distilled", "evaluate": "evaluation"}
STAGES_FILE, SUMMARY = "stages.json", "chain.json"
# What the chain sets itself. A plan's indices are those of one model, and stand for scores.
_SET_BY_CHAIN = frozenset("model teacher student scores plan output resume dry_run hydra".split())
# Stands for the model's folder in the command lines of a rehearsal by sizes alone.
_NO_FOLDER = "MODEL"


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


def compress(cfg: CompressConfig) -> None:
    """`launch/compress.py`: check the whole chain, then run what is not done of it."""
    if world_size_from_env() > 1:
        raise UserError("start launch/compress.py with plain python: processes= and start= say how its stages start")
    root, rehearsal = Path(cfg.output), cfg.dry_run and cfg.model.path is None
    folder = None if rehearsal else open_model_folder(cfg.model.folder("model"))
    shape = folder.shape if folder else ModelShape.from_dict(cfg.model.sizes("model"), "model")
    pick_device(cfg.device)
    rounds = plan_rounds(cfg, shape)
    for one in rounds:
        check_round(one, with_data=not rehearsal)
    check_root(root, STAGES_FILE, "a chain", cfg.resume)
    if folder:
        check_weights(folder)
    if cfg.dry_run:
        _show_plan(cfg, rounds)
        return
    results = _run(cfg, folder, rounds)
    summary = {"model": str(folder.path), "parameters": count_parameters(shape), "rounds": results}
    write_json(root / SUMMARY, summary)
    _show_results(summary)
    console().print(f"Written: {root / SUMMARY}")


def plan_rounds(cfg: CompressConfig, first: ModelShape) -> list[Round]:
    """Every round with its commands composed, and its shapes following from the first model's. Raises UserError."""
    root = Path(cfg.output)
    start = source = (cfg.model.path or _NO_FOLDER, first)
    rounds = []
    for written in read_rounds(cfg.rounds):
        teacher = source if written.teacher == "source" else start
        at = {stage: root / written.name / folder for stage, folder in FOLDERS.items()}
        inputs = {
            "importance": {"model": source[0]},
            "prune": {"model": source[0], "scores": at["importance"]},
            "distill": {"teacher": teacher[0], "student": at["prune"]},
            "evaluate": {"model": at["distill"]},
        }
        stages = {
            stage: _compose(cfg, written, stage, inputs[stage], at[stage])
            for stage in FOLDERS
            if stage != "evaluate" or cfg.perplexity
        }
        with _named(written.name, "prune"):
            pruning = stages["prune"].config
            target = target_shape(source[1], vars(pruning.target), list(pruning.drop_layers), pruning.prune)
        rounds.append(Round(written.name, source[1], teacher[1], target, stages))
        source = (str(at["distill"]), target)
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
        with _named(name):
            unknown = [str(key) for key in value if key not in known]
            if unknown:
                raise UserError(f"unknown option {unknown[0]!r}: a round has {', '.join(known)}")
            if Path(name).name != name or name.startswith(".") or name in (STAGES_FILE, SUMMARY):
                raise UserError("a round's name is that of its folder: no slashes and no dot in front")
            if name in rounds:
                raise UserError("there are two rounds of this name: each needs a folder of its own")
            rounds[name] = RoundConfig(**{**value, "name": name})
            check(rounds[name])
    return list(rounds.values())


def _compose(
    cfg: CompressConfig, written: RoundConfig, stage: str, inputs: Mapping[str, object], output: Path
) -> Stage:
    """A stage as its command will read it: the chain's options, over them the round's. Raises UserError."""
    with _named(written.name, stage):
        own = {**flat_options(getattr(cfg, stage), stage), **flat_options(getattr(written, stage), stage)}
        taken = [key for key in own if key.partition(".")[0] in _SET_BY_CHAIN]
        if taken:
            raise UserError(f"{taken[0]} is set by the chain: leave it out")
        if stage == "prune" and not set(own) - {"processes"}:
            raise UserError("nothing to cut: give it a target, as in prune: {target: {hidden_size: …}}")
        return compose_stage(cfg, stage, inputs, own, output)


def check_round(one: Round, *, with_data: bool) -> None:
    """Raise UserError, naming round and stage, for what a stage would refuse once its turn comes."""
    for stage in one.stages.values():
        with _named(one.name, stage.command):
            cfg, splits = stage.config, ["train"]
            if stage.command == "prune":
                continue  # its target is checked where the shapes follow from one another
            layout = Layout.from_config(cfg.parallel, stage.processes)
            if stage.command == "distill":
                number_of_steps(cfg)
                check_pair(one.teacher, one.target, cfg, layout)
                splits += ["validation"] if cfg.trainer.validation_samples else []
            else:
                check_layout(one.source if stage.command == "importance" else one.target, layout)
                check_sequence(cfg.data.sequence_length, layout)
                splits = [cfg.split] if stage.command == "evaluate" else splits
            if with_data:
                data = check_data(
                    cfg, splits, one.target, cfg.first_sample + cfg.samples if stage.command == "importance" else 1
                )
                if stage.command == "distill":
                    check_enough(data, one.tokens, cfg.data.max_epochs)


def _named(round_name: str, stage: str = "") -> AbstractContextManager[None]:
    """Put the names of round and stage before a mistake."""
    return naming(_name(round_name, stage))


def _name(round_name: str, stage: str = "") -> str:
    return f"round {round_name}, {stage}" if stage else f"round {round_name}"


def _run(cfg: CompressConfig, folder: ModelFolder, rounds: list[Round]) -> list[dict[str, Any]]:
    """Run the stages that are not done; gives the result of every round."""
    root = Path(cfg.output)
    root.mkdir(parents=True, exist_ok=True)
    inputs = {"model": folder.digest, "data": data_digest(cfg.data.path)}
    stages = Stages(root / STAGES_FILE, inputs=inputs, start=cfg.start)
    results = []
    for one in rounds:
        for stage in one.stages.values():
            name = _name(one.name, stage.command)
            stages.command(name, stage.output, stage.file, *stage.words, processes=stage.processes)
        results.append(_result(one, stages.seconds))
    return results


def _result(one: Round, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a finished round gave: sizes, its student's digest, loss and perplexity if it was evaluated, seconds a stage."""
    student = one.stages["distill"].output / "model"
    manifest = read_manifest(student)
    measured: dict[str, Any] = {}
    if "evaluate" in one.stages:
        measured = json.loads((one.stages["evaluate"].output / RESULTS).read_text(encoding="utf-8"))
    return {
        "name": one.name,
        "model": str(student),
        "digest": manifest["digest"],
        "parameters": count_parameters(one.target),
        "share_of_source": one.share,
        "tokens": one.tokens,
        "distillation_loss": manifest["results"].get("loss"),
        "loss": measured.get("loss"),
        "perplexity": measured.get("perplexity"),
        "seconds": {stage: seconds[_name(one.name, stage)] for stage in one.stages},
    }


def _show_plan(cfg: CompressConfig, rounds: list[Round]) -> None:
    """The dry run's table and every command line."""
    rows = [
        [
            one.name,
            count_parameters(one.source),
            count_parameters(one.target),
            f"{one.share:.1%}",
            one.tokens,
            ", ".join(f"{stage.command} {stage.processes}" for stage in one.stages.values()),
        ]
        for one in rounds
    ]
    print_table(
        f"would be run in {cfg.output}", ["round", "parameters", "pruned", "share", "tokens", "processes"], rows
    )
    for stage in (stage for one in rounds for stage in one.stages.values()):
        words = [*start_words(cfg.start, stage.processes), stage.file, *stage.words, f"output={stage.output}"]
        console().print(f"$ {shlex.join(words)}", markup=False, highlight=False, soft_wrap=True)


def _show_results(summary: Mapping[str, Any]) -> None:
    columns = ["round", "parameters", "share", "loss", "perplexity", "seconds", "student"]
    rows: list[list[Any]] = [["", summary["parameters"], "", "", "", "", summary["model"]]]
    for one in summary["rounds"]:
        loss, perplexity = ("" if one[name] is None else one[name] for name in ("loss", "perplexity"))
        seconds = sum(one["seconds"].values())
        rows.append(
            [one["name"], one["parameters"], f"{one['share_of_source']:.1%}", loss, perplexity, seconds, one["model"]]
        )
    print_table("The chain", columns, rows)
