"""`launch/search.py`: a model, its scores and a budget into a folder of targets for `launch/prune.py`, best first.

candidates.yaml       every ranked shape and every shape on a front: sizes, costs, predicted damage by axis
targets/rank_01.yaml  … of each ranked shape, as `target=` takes it, with the command that prunes to it
parameters.svg        … of each limited quantity: predicted damage against it
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minitron_megatron.checkpoints.folder import (
    ModelFolder,
    open_model_folder,
    read_manifest,
)
from minitron_megatron.cli.spelling import line_of
from minitron_megatron.config import SearchConfig
from minitron_megatron.console import print_table, speaks
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import LayerAnalysis, load_layer_analysis
from minitron_megatron.importance.scores import check_scores, load_scores
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.tools import tool_job
from minitron_megatron.plain_text import commented
from minitron_megatron.report import plots
from minitron_megatron.search.budget import QUANTITIES, Budget
from minitron_megatron.search.found import FILE, TARGETS, Source, target_file
from minitron_megatron.search.predict import AXES, Predictor, make_predictor
from minitron_megatron.search.scan import Found, check_smaller, scan
from minitron_megatron.search.space import SIZES, Space, frozen_axes, make_space, settle_space, uniform

log = logging.getLogger(__name__)
# Quantities as columns of the table, and those that are counts.
_IN_SHORT = {
    "parameters": "parameters",
    "non_embedding_parameters": "in layers",
    "memory_gib": "GiB",
    "flops_per_token": "FLOP/token",
    "latency_ms": "ms",
}
_WHOLE = ("parameters", "non_embedding_parameters")


@dataclass(frozen=True)
class Candidate:
    """One shape: its rank if it is one of the best, the fronts that it is on, its costs, and its predicted damage by axis."""

    rank: int | None
    target: dict[str, int]
    fronts: list[str]
    costs: dict[str, float]
    lost: dict[str, float]

    @property
    def loss(self) -> float:
        """Predicted damage."""
        return sum(self.lost.values())

    @property
    def file(self) -> str:
        """Its target file, inside the output; ranked shapes have one."""
        return target_file(self.rank)

    def to_yaml(self) -> dict[str, Any]:
        """As it stands in candidates.yaml."""
        ranked = {"rank": self.rank} if self.rank else {}
        predicted = {"predicted_loss": self.loss, "predicted_loss_by_axis": self.lost}
        return {**ranked, **self.target, **self.costs, **predicted, "on_front_of": self.fronts}


@dataclass(frozen=True)
class Searching:
    """A model, its space and budget, checked; without scores there is nothing to rank by, and shapes are only counted."""

    shape: ModelShape
    budget: Budget
    space: Space
    folder: ModelFolder | None = None
    predictor: Predictor | None = None
    inputs: dict[str, str] = field(default_factory=dict)


def check_search(cfg: SearchConfig) -> Searching:
    """Model, scores, space, budget and output. Raises UserError."""
    if cfg.dry_run and cfg.model.path is None:
        source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
        budget, space = Budget.of(uniform(source), cfg.budget), _space(cfg, source, None)
        check_smaller(space, budget)
        return Searching(source, budget, space)
    folder = open_model_folder(cfg.model.folder("model"))
    budget = Budget.of(uniform(folder.shape), cfg.budget)
    analysis = _analysis(cfg, folder)
    judged = None if analysis is None else {folder.shape.num_layers - cut for cut in (0, *analysis.blocks)}
    space = _space(cfg, folder.shape, judged)
    check_smaller(space, budget)
    if cfg.scores is None:
        if not cfg.dry_run:
            raise UserError("scores= is missing: give the output of importance; a dry run can do without")
        return Searching(folder.shape, budget, space)
    scores = load_scores(cfg.scores)
    check_scores(scores, folder.shape, folder.digest, cfg.scores)
    inputs = {"model": folder.digest, "scores": read_manifest(cfg.scores)["digest"]}
    if budget.latency:
        inputs["table"] = budget.latency.digest
    if cfg.layers:
        inputs["layers"] = read_manifest(cfg.layers)["digest"]
    check_command_output(cfg, inputs)
    predictor = make_predictor(folder.shape, scores, space, cfg.rank, cfg.prune, analysis)
    return Searching(folder.shape, budget, space, folder, predictor, inputs)


def search_shapes(cfg: SearchConfig, checked: Searching | None = None) -> None:
    """Scan, rank, write."""
    checked = checked or check_search(cfg)
    if cfg.dry_run or checked.predictor is None:
        _count(checked.shape, checked.space, checked.budget)
        return
    _write(cfg, checked.folder, checked.budget, checked.predictor, checked.inputs)


def _space(cfg: SearchConfig, source: ModelShape, judged: set[int] | None) -> Space:
    """The space, with what is not given taken of the model's sizes; what that is, and what does not vary, is said."""
    settled = settle_space(source, cfg.space)
    space = make_space(source, settled, cfg.prune, judged)
    chosen = [
        f"space.{name}={getattr(settled, name)}" for name in ("multiple", "tensor") if getattr(cfg.space, name) is None
    ]
    if chosen:
        log.info("%s, by the model's sizes", " and ".join(chosen))
    for name, why in frozen_axes(source, settled, space).items():
        log.info("%s stays %s: %s", name, getattr(uniform(source), name), why)
    # What was chosen belongs to the output as what was given does.
    cfg.space = settled
    return space


def _analysis(cfg: SearchConfig, folder: ModelFolder) -> LayerAnalysis | None:
    if cfg.layers is None:
        return None
    analysis = load_layer_analysis(cfg.layers)
    analysis.check_model(folder.digest)
    return analysis


def _count(source: ModelShape, space: Space, budget: Budget) -> None:
    """What a dry run says: how large the space is, and how much of it fits."""
    found = scan(space, budget)
    print_table(
        "would be searched",
        ["axis", "sizes", "from", "to", "source"],
        [
            [name, len(sizes), int(sizes.min()), int(sizes.max()), str(getattr(source, name))]
            for name, sizes in zip(
                SIZES, (space.layers, space.hidden, space.ffn, *map(np.unique, space.heads.T)), strict=True
            )
        ],
    )
    log.info("%s shapes, of which %s fit the budget", f"{found.shapes:,}", f"{found.fitting:,}")


def candidates(budget: Budget, predictor: Predictor, found: Found) -> list[Candidate]:
    """The best shapes by rank, then those that are only on a front, by predicted damage."""
    space = predictor.space
    on_front = {name: set(front.tolist()) for name, front in found.fronts.items()}
    best = found.best.tolist()
    others = np.array(sorted(set().union(*on_front.values()) - set(best)), np.int64)
    numbers = np.concatenate((found.best, others[np.argsort(predictor.loss(others), kind="stable")]))
    costs = {name: budget.cost(name, space.lengths(numbers)).tolist() for name in budget.quantities}
    parts = {axis: lost.tolist() for axis, lost in predictor.parts(numbers).items()}
    return [
        Candidate(
            i + 1 if i < len(best) else None,
            space.target(number),
            [name for name, front in on_front.items() if number in front],
            {name: cost[i] for name, cost in costs.items()},
            {axis: lost[i] for axis, lost in parts.items()},
        )
        for i, number in enumerate(numbers.tolist())
    ]


def prune_command(cfg: SearchConfig, candidate: Candidate, layers_of_source: int) -> str:
    """The command that prunes the model to a ranked shape."""
    output = cfg.output.rstrip("/")
    source = Source(cfg.model.path, cfg.scores, cfg.layers, cfg.prune)
    given = source.options(candidate.target, layers_of_source)
    given |= {"target": f"{output}/{candidate.file}", "output": f"{output}_rank_{candidate.rank:02d}"}
    return line_of("prune", [f"{name}={value}" for name, value in given.items()])


def _write(
    cfg: SearchConfig, folder: ModelFolder, budget: Budget, predictor: Predictor, inputs: dict[str, str]
) -> None:
    found = scan(predictor.space, budget, predictor, cfg.keep)
    listed = candidates(budget, predictor, found)
    ranked = [one for one in listed if one.rank]
    commands = [prune_command(cfg, one, folder.shape.num_layers) for one in ranked]
    with (
        tool_job(),
        command_output(cfg, inputs) as out,
    ):
        if out.done:
            return
        out.results = {"shapes": found.shapes, "fitting": found.fitting, "best": ranked[0].to_yaml()}
        if budget.latency:
            out.results["latency_fit"] = {"shapes": budget.latency.shapes, "error": round(budget.latency.error, 4)}
        if collectives.is_rank_zero():
            _write_candidates(out.path, inputs["model"], budget, out.results, listed)
            _write_targets(out.path, ranked, commands)
            for name in budget.limits:
                _plot(out.path / f"{name}.svg", name, listed)
    _print(cfg, budget, out.results, ranked)


def _write_candidates(
    folder: Path, model: str, budget: Budget, results: dict[str, Any], listed: list[Candidate]
) -> None:
    values = {
        "model": model,
        "budget": {**budget.limits, "at_least": budget.options.at_least},
        "shapes": results["shapes"],
        "fitting": results["fitting"],
        "candidates": [one.to_yaml() for one in listed],
    }
    (folder / FILE).write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")


def _write_targets(folder: Path, ranked: list[Candidate], commands: list[str]) -> None:
    (folder / TARGETS).mkdir()
    for one, command in zip(ranked, commands, strict=True):
        what = f"Rank {one.rank}: {one.costs['parameters']:,} parameters, predicted damage {one.loss:.4f}."
        head = commented(what, command)
        (folder / one.file).write_text(head + yaml.safe_dump(one.target, sort_keys=False), encoding="utf-8")


def _plot(file: Path, quantity: str, listed: list[Candidate]) -> None:
    front = sorted((one.costs[quantity], one.loss) for one in listed if quantity in one.fronts)
    ranked = [(one.costs[quantity], one.loss) for one in listed if one.rank]
    file.write_text(plots.front(front, ranked, QUANTITIES[quantity], "predicted damage"), encoding="utf-8")


def _print(cfg: SearchConfig, budget: Budget, results: dict[str, Any], ranked: list[Candidate]) -> None:
    shown = list(dict.fromkeys(("parameters", *budget.limits)))
    rows = [
        [
            one.rank,
            " × ".join(str(one.target[name]) for name in SIZES[:3]),
            "/".join(str(one.target[name]) for name in SIZES[3:]),
            *(one.costs[name] if name in _WHOLE else f"{one.costs[name]:.4g}" for name in shown),
            *(f"{lost:.4f}" for lost in (one.loss, *one.lost.values())),
        ]
        for one in ranked
    ]
    title = (
        f"{cfg.output}: the best {len(rows)} of {results['fitting']:,} shapes that fit, of {results['shapes']:,}; "
        "predicted damage (docs/search.md), and its parts by axis"
    )
    columns = ["rank", "layers × hidden × ffn", "heads/kv", *(_IN_SHORT[name] for name in shown), "damage", *AXES]
    print_table(title, columns, rows)
    if not speaks():
        return
    if budget.latency:
        log.info(
            "milliseconds are fitted to %d shapes; for one that is left out of the fit they are up to %.1f %% off",
            budget.latency.shapes,
            100 * budget.latency.error,
        )
