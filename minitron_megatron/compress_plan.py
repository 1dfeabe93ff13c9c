"""What `launch/compress.py` is going to run: what it starts from, and every stage of every round composed and checked.

    hf=    ──import_hf──▶ teacher ─┐
    input= ─prepare_data─▶ data ───┴─▶ rounds: as given, or one to the budget or target, whose options are chosen (choosing.py)

The target of a search is not known before it has run. Until then the largest shape within the budget stands for it, and what is
chosen by the student's size is chosen by that shape in any case: a run that continues chooses the same.
"""

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.changing import free_options
from minitron_megatron.checkpoints.folder import MANIFEST, ModelFolder, check_space, open_model_folder
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.chosen import Choices, Pair, Text
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.composing import Stage, check_data, check_root, compose_stage, flat_options, naming
from minitron_megatron.config import (
    BudgetConfig,
    CompressConfig,
    RoundConfig,
    check,
    flat,
    number_of_steps,
    options,
    tokens_of_run,
)
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.estimate import estimate_tokens
from minitron_megatron.data.folder import check_enough, data_digest, open_data
from minitron_megatron.data.prepare import check_documents, check_fraction, find_inputs
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.tokenizer import check_tokenizer, check_vocabulary, load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.families import check_exportable
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.plain_files import read_json
from minitron_megatron.prune.select import target_shape
from minitron_megatron.search.budget import Budget
from minitron_megatron.search.found import target_file
from minitron_megatron.search.scan import scan
from minitron_megatron.search.space import SIZES, Space, make_space, uniform
from minitron_megatron.stages import write_json
from minitron_megatron.train.distill_checks import check_pair

# Each stage's command and its folder, in order.
FOLDERS = {
    "importance": "scores",
    "search": "found",
    "prune": "pruned",
    "distill": "distilled",
    "evaluate": "evaluation",
}
STAGES_FILE, SUMMARY, CHOSEN = "stages.json", "chain.json", "chosen.json"
TEACHER, DATA, EXPORTED, REPORT = "teacher", "data", "hf", "report"
_INPUTS = {
    "importance": ("model",),
    "search": ("model", "scores"),
    "prune": ("model", "scores"),
    "distill": ("teacher", "student"),
    "evaluate": ("model",),
}
# What is set here itself. A plan's indices are those of one model, and stand for scores.
_SET_BY_CHAIN = frozenset("model hf input teacher student scores plan folders output resume dry_run hydra".split())
# Stands for the model's and the data's folders in the command lines of a rehearsal by sizes alone.
_NO_MODEL, _NO_DATA = "MODEL", "DATA"
# How far the tokens to train on may be off before they are prepared: where all text was counted (its documents are split by
# chance), and where they are estimated.
_UNSURE = {True: 1.2, False: 1.5}
# Below so many bytes of text a tenth of it is for validation, rather than a twentieth.
_SMALL_TEXT = 8_000_000


@dataclass(frozen=True)
class Source:
    """What all starts from.

    Attributes:
        model: the first model's folder; of hf= the one that it is going to be imported into.
        shape: its sizes.
        text: tokens that there are; None in a rehearsal without data.
        ready: whether the data are prepared.
        stages: import_hf and prepare_data, where they are needed.
        inputs: what tells that something else is started from, by name.
    """

    model: str
    shape: ModelShape
    text: Text | None
    ready: bool
    stages: list[Stage]
    inputs: dict[str, str]


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


@dataclass(frozen=True)
class Plan:
    """All stages, in the order in which they run: those of `source`, of each round, and `last`.

    `chosen` is what was chosen, if anything was, for what is in `asked`.
    """

    source: Source
    rounds: list[Round]
    last: list[Stage]
    chosen: Choices | None
    asked: Any = None

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """Every stage with its name."""
        return [
            *((stage.command, stage) for stage in self.source.stages),
            *((name_of(one.name, stage.command), stage) for one in self.rounds for stage in one.stages.values()),
            *((stage.command, stage) for stage in self.last),
        ]


def check_compress(cfg: CompressConfig) -> None:
    """What can be said before torch is there. Raises UserError.

    Options, model, text and output; and where the rounds, their data and their processes are given, all of `make_plan`.
    """
    if world_size_from_env() > 1:
        raise UserError("start launch/compress.py with plain python: processes= and start= say how its stages start")
    rehearsal = cfg.dry_run and cfg.model.path is None and cfg.hf is None
    chooses = _check_asked(cfg, rehearsal)
    check_root(Path(cfg.output), STAGES_FILE, "a chain", cfg.resume)
    if rehearsal:
        return
    if chooses or cfg.input or cfg.processes is None:
        _check_source(cfg)
    else:
        # The device is asked for what is chosen.
        make_plan(cfg, "cpu")


def _check_source(cfg: CompressConfig) -> None:
    """The model, and the text or data; tokens are not counted."""
    if cfg.hf:
        source = HfFolder(cfg.hf)
        source.check()
        _import_stage(cfg, source)
        shape = source.shape
    else:
        folder = open_model_folder(cfg.model.folder("model"))
        check_weights(folder)
        shape = folder.shape
    if not cfg.rounds:
        _check_given(cfg, shape)
    if cfg.input:
        find_inputs(cfg.input)
        check_tokenizer(cfg.hf or cfg.model.folder("model"))
    else:
        data = open_data(cfg.data.path, "train", shape, 1)
        check_same_tokenizer(data, {"hf": cfg.hf, "model": cfg.model.path})


def make_plan(cfg: CompressConfig, device: str) -> Plan:
    """Everything composed and checked as far as it can be by now. Raises UserError.

    Args:
        cfg: the command's options.
        device: "cuda" or "cpu", where the stages are going to run.
    """
    rehearsal = cfg.dry_run and cfg.model.path is None and cfg.hf is None
    chooses = _check_asked(cfg, rehearsal)
    source = open_source(cfg, rehearsal)
    data = cfg.data.path or (str(Path(cfg.output) / DATA) if cfg.input else _NO_DATA)
    cfg = replace(cfg, data=replace(cfg.data, path=data))
    chosen = asked = None
    if chooses:
        cfg, chosen, asked = _choose(cfg, source, device)
    epochs = 1.0 if cfg.data.max_epochs is None else cfg.data.max_epochs
    cfg = replace(cfg, data=replace(cfg.data, max_epochs=epochs))
    rounds = plan_rounds(cfg, source, chosen)
    for one in rounds:
        check_round(one, source)
    last = _last_stages(cfg, rounds) if cfg.export else []
    if not rehearsal and not Path(cfg.output).exists():
        _check_room(cfg, source, rounds)
    return Plan(source, rounds, last, chosen, asked)


def given_limits(budget: BudgetConfig) -> list[str]:
    """Options of a budget that say that there is one."""
    return [name for name in (*_LIMITS, "table") if getattr(budget, name) is not None]


_LIMITS = "parameters non_embedding_parameters memory_gib flops_per_token latency_ms tokens_per_second".split()


def _check_asked(cfg: CompressConfig, rehearsal: bool) -> bool:
    """Whether there is one round, to the budget or target, whose options are chosen. Raises UserError for what is no command."""
    if cfg.hf and (cfg.model.path or cfg.model.family):
        raise UserError("hf= and model=: give one of them, a Hugging Face folder or a model folder")
    if not rehearsal and not cfg.hf and not cfg.model.path:
        raise UserError("no model: give hf=FOLDER (Hugging Face) or model=FOLDER (the output of import_hf)")
    if cfg.input and cfg.data.path:
        raise UserError("input= and data.path=: give one of them, text or a data folder")
    if not rehearsal and not cfg.input and not cfg.data.path:
        raise UserError("no text: give input=FILE (text, .jsonl, …) or data.path=FOLDER (the output of prepare_data)")
    if cfg.data.max_epochs is not None and cfg.data.max_epochs <= 0:
        raise UserError(
            f"data.max_epochs={cfg.data.max_epochs:g} must be above 0: it is how often the text may be read"
        )
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
        raise UserError(
            "no rounds: give budget.parameters=4.5e9 (search finds the shape), target=PRESET, chain=PRESET (--help lists them), "
            "or rounds='[{name: …, prune: {…}}, …]'"
        )
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


def open_source(cfg: CompressConfig, rehearsal: bool) -> Source:
    """What all starts from, checked. Raises UserError."""
    root, inputs, stages = Path(cfg.output), {}, []
    if cfg.budget.table:
        inputs |= file_stamps(Path(), [Path(cfg.budget.table)])
    if rehearsal:
        shape, model = ModelShape.from_dict(cfg.model.sizes("model"), "model"), _NO_MODEL
    elif cfg.hf:
        hf, model = HfFolder(cfg.hf), str(root / TEACHER)
        hf.check()
        shape = hf.shape
        inputs |= hf.stamps
        stages.append(_import_stage(cfg, hf))
    else:
        folder: ModelFolder = open_model_folder(cfg.model.folder("model"))
        check_weights(folder)
        shape, model, inputs["model"] = folder.shape, str(folder.path), folder.digest
        # The digest is that of the weights alone.
        inputs |= file_stamps(folder.path, folder.tokenizer_path.glob("*"))
    if not cfg.input:
        text = None
        if cfg.data.path and not rehearsal:
            data, inputs["data"] = open_data(cfg.data.path, "train", shape, 1), data_digest(cfg.data.path)
            check_same_tokenizer(data, {"hf": cfg.hf, "model": cfg.model.path})
            text = Text(data.tokens("train"), data.tokens("validation"), exact=True)
        return Source(model, shape, text, text is not None, stages, inputs)
    files = find_inputs(cfg.input)
    inputs["data"] = _stamp(files)
    small = sum(file.stat().st_size for file in files) < _SMALL_TEXT
    typed = cfg.input if isinstance(cfg.input, str) else list(cfg.input)
    with naming("prepare_data"):
        own = {"validation_fraction": 0.1 if small else 0.05, **_own(cfg, "prepare_data"), "processes": 1}
        stage = compose_stage(cfg, "prepare_data", {"model": model, "input": typed}, own, root / DATA)
    stages.append(stage)
    with naming("prepare_data"):
        check_fraction(stage.config.validation_fraction)
    if (stage.output / MANIFEST).is_file():
        data = open_data(str(stage.output), "train", shape, 1)
        return Source(model, shape, Text(data.tokens("train"), data.tokens("validation"), True), True, stages, inputs)
    if rehearsal:
        return Source(model, shape, None, False, stages, inputs)
    with naming("prepare_data"):
        check_documents(files, stage.config)
    tokenizer_of = Path(cfg.hf or model)
    tokenizer = load_tokenizer(tokenizer_of)
    check_vocabulary(tokenizer_of, tokenizer)
    tokens, exact = estimate_tokens(files, stage.config.text_key, Encoder.of(tokenizer, stage.config))
    for_validation = round(stage.config.validation_fraction * tokens)
    return Source(model, shape, Text(tokens - for_validation, for_validation, exact), False, stages, inputs)


def _check_given(cfg: CompressConfig, shape: ModelShape) -> None:
    """Every option of a stage as it was given, and the budget or target. Raises UserError."""
    cfg = replace(cfg, processes=cfg.processes or 1, data=replace(cfg.data, path=cfg.data.path or _NO_DATA))
    for stage in FOLDERS:
        _given_config(cfg, stage)
    _planned_target(cfg, shape)


def _given_config(cfg: CompressConfig, stage: str) -> Any:
    """A stage's config by what was given for it, its inputs aside: every option has its type. Raises UserError."""
    with naming(stage):
        own = {key: value for key, value in _own(cfg, stage).items() if key != "processes"}
        inputs = {key: _NO_MODEL for key in _INPUTS[stage]}
        return compose_stage(cfg, stage, inputs, own, Path(FOLDERS[stage])).config


def _import_stage(cfg: CompressConfig, hf: HfFolder) -> Stage:
    """The import. Raises UserError where what is there was imported from other files."""
    with naming("import_hf"):
        stage = compose_stage(cfg, "import_hf", {"hf": cfg.hf}, {"processes": 1}, Path(cfg.output) / TEACHER)
        check_command_output(stage.config, hf.stamps)
    return stage


def _stamp(files: list[Path]) -> str:
    """What tells that files have changed, without reading them."""
    stats = [(str(file), file.stat()) for file in files]
    return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _own(given: CompressConfig | RoundConfig, stage: str) -> dict[str, Any]:
    """Options that were given for a stage. Raises UserError for what is not the user's to give."""
    own = flat_options(getattr(given, stage), stage)
    taken = [key for key in own if key.partition(".")[0] in _SET_BY_CHAIN]
    if taken:
        raise UserError(f"{taken[0]} is set by the chain: leave it out")
    return own


def _choose(cfg: CompressConfig, source: Source, device: str) -> tuple[CompressConfig, Choices, Any]:
    """The config with its length settled, everything else that is chosen, as before where it was chosen before, and for what."""
    # Torch's: the machine is measured.
    from minitron_megatron.choosing import choose, choose_length

    given = {}
    for stage in FOLDERS:
        with naming(stage):
            own = _own(cfg, stage)
        # As numbers, where they were typed as such.
        typed = flat(resolved_config(_given_config(cfg, stage)))
        given[stage] = {key: typed.get(key, value) for key, value in own.items()}
    length, why = choose_length(cfg, source.shape, source.text, device)
    cfg = replace(cfg, data=replace(cfg.data, sequence_length=length))
    # Any target divides as the source does: the search's own default sees to it.
    student = _planned_target(cfg, source.shape)
    asked = json.loads(
        json.dumps([_lasting(cfg), source.inputs, vars(source.text) if source.text else None], default=str)
    )
    chosen = _chosen_before(Path(cfg.output) / CHOSEN, asked)
    if chosen is None:
        chosen = choose(cfg, Pair(source.shape, student), source.text, device, given)
        chosen.lines.insert(0, ("samples", f"{length:,} tokens", why))
    return cfg, chosen, asked


def remember_choices(root: Path, plan: Plan) -> None:
    """Keep what was chosen: a run that continues, perhaps on another machine, goes on with it."""
    write_json(root / CHOSEN, {"asked": plan.asked, "options": plan.chosen.options, "lines": plan.chosen.lines})


def _lasting(cfg: CompressConfig) -> dict[str, Any]:
    """Options that what is chosen follows from; not those of a stage that may change when it continues."""
    of_this_start = ("dry_run", "resume", "verify", "processes", "start", "cluster")
    found = {key: value for key, value in resolved_config(cfg).items() if key not in of_this_start}
    for stage in FOLDERS:
        free = free_options(COMMANDS[stage].config)
        found[stage] = {k: v for k, v in flat_options(found[stage], stage).items() if k not in free}
    return found


def _chosen_before(file: Path, asked: Any) -> Choices | None:
    """What an earlier run with the same options chose, on whatever machine."""
    try:
        values = read_json(file)
        if values["asked"] != asked:
            return None
        return Choices(dict(values["options"]), [tuple(line) for line in values["lines"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _planned_target(cfg: CompressConfig, source: ModelShape) -> ModelShape:
    """The student's shape as far as it is known before a search: the largest within the budget. Raises UserError."""
    if not given_limits(cfg.budget):
        with naming("prune"):
            own = _prune_options(cfg)
            pruning = compose_stage(cfg, "prune", {"model": "x", "scores": "x"}, own, Path("x")).config
            return target_shape(source, vars(pruning.target), list(pruning.drop_layers), pruning.prune)
    with naming("search"):
        searching = _search_stage(cfg, "x", Path("x")).config
        whole = uniform(source)
        budget = Budget.to_prune(whole, searching.budget)
        space = make_space(source, searching.space, searching.prune)
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


def _prune_options(cfg: CompressConfig) -> dict[str, Any]:
    """Options of prune of the one round: those given, and the target."""
    own = _own(cfg, "prune")
    targets = {f"target.{name}": value for name, value in vars(cfg.target).items() if value is not None}
    return {**targets, **own}


def _search_stage(cfg: CompressConfig, model: object, output: Path) -> Stage:
    """The search of the one round; heads, groups and layers go as prune is told."""
    limits = {
        f"budget.{o.name}": getattr(cfg.budget, o.name)
        for o in options(BudgetConfig)
        if getattr(cfg.budget, o.name) != o.default
    }
    ways = {key: value for key, value in _own(cfg, "prune").items() if key.startswith("prune.")}
    inputs = {"model": model, "scores": output.parent / FOLDERS["importance"]}
    return compose_stage(cfg, "search", inputs, {**limits, **ways, **_own(cfg, "search"), "processes": 1}, output)


def plan_rounds(cfg: CompressConfig, source: Source, chosen: Choices | None) -> list[Round]:
    """Every round with its commands composed, and its shapes following from the first model's. Raises UserError."""
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
                        stages[stage] = _search_stage(cfg, model[0], at["search"])
            elif stage != "evaluate" or cfg.perplexity:
                stages[stage] = _compose(cfg, written, stage, inputs[stage], at, model[1], chosen)
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


_NAMES_TAKEN = (STAGES_FILE, SUMMARY, CHOSEN, TEACHER, DATA, EXPORTED, REPORT)


def _compose(
    cfg: CompressConfig,
    written: RoundConfig,
    stage: str,
    inputs: Mapping[str, object],
    at: Mapping[str, Path],
    source: ModelShape,
    chosen: Choices | None,
) -> Stage:
    """A stage as its command will read it: the chain's options, over them the round's. Raises UserError."""
    with named(written.name, stage):
        own = {**_own(cfg, stage), **_own(written, stage)}
        if chosen:
            own = chosen.of(stage, own)
        if stage != "prune":
            return compose_stage(cfg, stage, inputs, own, at[stage])
        if given_limits(cfg.budget):
            return _compose_searched(cfg, source, inputs, own, at)
        if not cfg.rounds:
            own = {**_prune_options(cfg), **own}
        if not set(own) - {"processes"}:
            raise UserError("nothing to cut: give it a target, as in prune: {target: {hidden_size: …}}")
        return compose_stage(cfg, stage, inputs, own, at[stage])


def _compose_searched(
    cfg: CompressConfig, source: ModelShape, inputs: Mapping[str, object], own: dict[str, Any], at: Mapping[str, Path]
) -> Stage:
    """prune to the best shape that a search finds; until it has run its sizes are those that the plan takes for them."""
    taken = next((key for key in own if key.partition(".")[0] == "target"), None)
    if taken:
        raise UserError(f"{taken}= and budget.{given_limits(cfg.budget)[0]}=: give one of them")
    file = at["search"] / target_file(1)
    if file.is_file():
        return compose_stage(cfg, "prune", {**inputs, "target": file}, own, at["prune"])
    planned = {f"target.{name}": getattr(_planned_target(cfg, source), name) for name in SIZES}
    stage = compose_stage(cfg, "prune", {**inputs, **planned}, own, at["prune"])
    words = [word for word in stage.words if not word.startswith("target.")]
    return replace(stage, words=(*words, f"target={file}"))


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
    """Raise UserError where a run on text that is not prepared yet would clearly read it more often than it may."""
    epochs = tokens / max(1, text.train)
    if epochs > most * _UNSURE[text.exact]:
        raise UserError(
            f"the run takes {tokens:,} tokens, and input= has about {text.train:,} to train on ({epochs:,.4g} epochs): give more "
            "text, lower distill.trainer.tokens= or distill.trainer.steps=, or allow it by "
            f"data.max_epochs={math.ceil(epochs * _UNSURE[text.exact])}"
        )


def _check_room(cfg: CompressConfig, source: Source, rounds: list[Round]) -> None:
    """Raise UserError where the disk has no room for the models and checkpoints of a run that has not begun."""
    item = {"float32": 4}.get(source.shape.dtype, 2)
    need = count_parameters(source.shape) * item if cfg.hf else 0
    for one in rounds:
        kept = one.stages["distill"].config.trainer.keep_last + 1
        need += count_parameters(one.target) * (2 * item + kept * (item + 12))
    need += count_parameters(rounds[-1].target) * item if cfg.export else 0
    check_space(Path(cfg.output), need, f"output={cfg.output}", why="models and checkpoints of every round")


def _last_stages(cfg: CompressConfig, rounds: list[Round]) -> list[Stage]:
    """Export of the last student, and the report. Raises UserError for a shape that cannot be exported."""
    root, last = Path(cfg.output), rounds[-1]
    with naming("export_hf"):
        check_exportable(last.target, "the student")
        inputs: dict[str, Any] = {"model": last.stages["distill"].output}
        if "evaluate" in last.stages:
            inputs["results"] = [str(last.stages["evaluate"].output)]
        export = compose_stage(cfg, "export_hf", inputs, {**_own(cfg, "export_hf"), "processes": 1}, root / EXPORTED)
    with naming("report"):
        report = compose_stage(cfg, "report", {"folders": str(root)}, {"processes": 1}, root / REPORT)
    return [export, report]


def named(round_name: str, stage: str = "") -> AbstractContextManager[None]:
    """Put the names of round and stage before a mistake."""
    return naming(name_of(round_name, stage))


def name_of(round_name: str, stage: str = "") -> str:
    """A stage as it is called in messages and in stages.json."""
    return ", ".join(part for part in (f"round {round_name}" if round_name else "", stage) if part)
