"""What was given to `launch/compress.py`: whether that is a command, the options of each stage, and the student's shape by it.

The target of a search is not known before it has run. Until then the largest shape within the budget stands for it, and what is
chosen by the student's size is chosen by that shape in any case: a run that continues chooses the same.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.composing import Stage, compose_stage, flat_options, naming
from minitron_megatron.config import BudgetConfig, CompressConfig, RoundConfig, options
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.checks import asks_for_a_cut
from minitron_megatron.prune.select import target_shape
from minitron_megatron.search.budget import Budget
from minitron_megatron.search.scan import check_smaller, scan
from minitron_megatron.search.space import Space, make_space, uniform

# Each stage's command and its folder, in order.
FOLDERS = {
    "importance": "scores",
    "search": "found",
    "prune": "pruned",
    "distill": "distilled",
    "evaluate": "evaluation",
}
# Stands for the model's and the data's folders in the command lines of a rehearsal by sizes alone.
NO_MODEL, NO_DATA = "MODEL", "DATA"
_INPUTS = {
    "importance": ("model",),
    "search": ("model", "scores"),
    "prune": ("model", "scores"),
    "distill": ("teacher", "student"),
    "evaluate": ("model",),
}
# What is set here itself. A plan's indices are those of one model, and stand for scores.
_SET_BY_CHAIN = frozenset("model hf input teacher student scores plan folders output resume dry_run hydra".split())
_HOW_SMALL = (
    "how small is not said: give budget.parameters=4.5e9 (search finds the shape), target=PRESET, chain=PRESET (--help "
    "lists them), or rounds='[{name: …, prune: {…}}, …]'"
)
_LIMITS = "parameters non_embedding_parameters memory_gib flops_per_token latency_ms tokens_per_second".split()


def check_asked(cfg: CompressConfig) -> bool:
    """Whether there is one round, to the budget or target, whose options are chosen. Raises UserError for what is no command."""
    rehearsal = is_rehearsal(cfg)
    if cfg.hf and (cfg.model.path or cfg.model.family):
        raise UserError("hf= and model=: give one of them, a Hugging Face folder or a model folder")
    if not rehearsal and not cfg.hf and not cfg.model.path:
        raise UserError("no model: give hf=FOLDER (Hugging Face) or model=FOLDER (the output of import_hf)")
    if cfg.input and cfg.data.path:
        raise UserError("input= and data.path=: give one of them, text or a data folder")
    if not rehearsal and not cfg.input and not cfg.data.path:
        raise UserError("no text: give input=FILE (text, .jsonl, …) or data.path=FOLDER (the output of prepare_data)")
    budget, target = given_limits(cfg.budget), [k for k, v in vars(cfg.target).items() if v is not None]
    if cfg.rounds and (budget or target):
        what = f"budget.{budget[0]}=" if budget else f"target.{target[0]}="
        raise UserError(
            f"{what} is for one round, and chain= or rounds= have targets of their own: leave one of them out"
        )
    if budget and target:
        raise UserError(
            f"budget.{budget[0]}= and target.{target[0]}=: give one of them, what it may cost or what it is to be"
        )
    if not (budget or target or cfg.rounds or flat_options(cfg.prune, "prune")):
        raise UserError(_HOW_SMALL)
    idle = {
        "prepare_data": None if cfg.input else "input=",
        "search": None if budget else "a budget",
        "export_hf": None if cfg.export else "export=true",
    }
    for stage, needs in idle.items():
        if needs and (own := flat_options(getattr(cfg, stage), stage)):
            raise UserError(f"{stage}.{next(iter(own))}= is of a stage that does not run without {needs}: leave it out")
    if twice := next((key for key in flat_options(cfg.search, "search") if key.partition(".")[0] == "budget"), None):
        raise UserError(f"search.{twice}= would be a second budget: write {twice}=, which the search takes")
    return not cfg.rounds


def is_rehearsal(cfg: CompressConfig) -> bool:
    """Whether sizes alone are planned for, without a model."""
    return cfg.dry_run and cfg.model.path is None and cfg.hf is None


def given_limits(budget: BudgetConfig) -> list[str]:
    """Options of a budget that say that there is one."""
    return [name for name in (*_LIMITS, "table") if getattr(budget, name) is not None]


def own_options(given: CompressConfig | RoundConfig, stage: str) -> dict[str, Any]:
    """Options that were given for a stage. Raises UserError for what is not the user's to give."""
    own = flat_options(getattr(given, stage), stage)
    taken = [key for key in own if key.partition(".")[0] in _SET_BY_CHAIN]
    if taken:
        raise UserError(f"{taken[0]} is set by the chain: leave it out")
    return own


def given_config(cfg: CompressConfig, stage: str) -> Any:
    """A stage's config by what was given for it, its inputs aside: every option has its type. Raises UserError."""
    with naming(stage):
        own = {key: value for key, value in own_options(cfg, stage).items() if key != "processes"}
        inputs = {key: NO_MODEL for key in _INPUTS[stage]}
        return compose_stage(cfg, stage, inputs, own, Path(FOLDERS[stage])).config


def planned_target(cfg: CompressConfig, source: ModelShape) -> ModelShape:
    """The student's shape as far as it is known before a search: the largest within the budget. Raises UserError."""
    if not given_limits(cfg.budget):
        with naming("prune"):
            own = prune_options(cfg)
            pruning = compose_stage(cfg, "prune", {"model": "x", "scores": "x"}, own, Path("x")).config
        if not asks_for_a_cut(pruning):
            raise UserError(_HOW_SMALL)
        with naming("prune"):
            return target_shape(source, vars(pruning.target), list(pruning.drop_layers), pruning.prune)
    with naming("search"):
        searching = search_stage(cfg, "x", Path("x")).config
        whole = uniform(source)
        budget = Budget.of(whole, searching.budget)
        space = make_space(source, searching.space, searching.prune)
        check_smaller(space, budget)
        scan(space, budget)
        return target_shape(source, _largest(space, budget), [], searching.prune)


def _largest(space: Space, budget: Budget) -> dict[str, int]:
    """Sizes of the shape within the budget that uses most of it."""
    best, most = 0, -1.0
    for numbers in space.numbers():
        used = np.max([budget.cost(n, space.lengths(numbers)) / limit for n, limit in budget.limits.items()], axis=0)
        used[used > 1] = -1
        if used.max() > most:
            best, most = int(numbers[used.argmax()]), float(used.max())
    return space.target(best)


def prune_options(cfg: CompressConfig) -> dict[str, Any]:
    """Options of prune of the one round: those given, and the target."""
    own = own_options(cfg, "prune")
    targets = {f"target.{name}": value for name, value in vars(cfg.target).items() if value is not None}
    return {**targets, **own}


def search_stage(cfg: CompressConfig, model: object, output: Path) -> Stage:
    """The search of the one round; heads, groups and layers go as prune is told."""
    limits = {
        f"budget.{o.name}": getattr(cfg.budget, o.name)
        for o in options(BudgetConfig)
        if getattr(cfg.budget, o.name) != o.default
    }
    ways = {key: value for key, value in own_options(cfg, "prune").items() if key.startswith("prune.")}
    inputs = {"model": model, "scores": output.parent / FOLDERS["importance"]}
    return compose_stage(
        cfg, "search", inputs, {**limits, **ways, **own_options(cfg, "search"), "processes": 1}, output
    )


def named(round_name: str, stage: str = "") -> AbstractContextManager[None]:
    """Put the names of round and stage before a mistake."""
    return naming(name_of(round_name, stage))


def name_of(round_name: str, stage: str = "") -> str:
    """A stage as it is called in messages and in stages.json."""
    return ", ".join(part for part in (f"round {round_name}" if round_name else "", stage) if part)
