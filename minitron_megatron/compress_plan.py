"""What `launch/compress.py` is going to run: what it starts from, and every stage of every round composed and checked.

    hf=    ──import_hf──▶ teacher ─┐
    input= ─prepare_data─▶ data ───┴─▶ rounds: as given, or one to the budget or target, whose options are chosen (choosing.py)

What files and options tell is checked once, before torch is there (`check_compress`); what the machine and the number of tokens
decide comes after it (`make_plan`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron_megatron.asked import Asked
from minitron_megatron.changing import free_options
from minitron_megatron.checkpoints.folder import check_space
from minitron_megatron.chosen import Choices, Pair
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.composing import Stage, check_root, compose_stage, flat_options, naming
from minitron_megatron.compress_given import (
    FOLDERS,
    NO_DATA,
    check_asked,
    given_config,
    is_rehearsal,
    name_of,
    own_options,
    planned_target,
)
from minitron_megatron.compress_rounds import (
    CHOSEN,
    EXPORTED,
    REPORT,
    Round,
    check_round,
    plan_rounds,
)
from minitron_megatron.compress_source import DATA, Source, count_text, open_source
from minitron_megatron.config import CompressConfig, flat
from minitron_megatron.console import format_gib
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.machine import GIB_OF_PROGRAM, free_gib
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.families import check_exportable
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import world_size_from_env
from minitron_megatron.plain_files import read_json
from minitron_megatron.stages import STAGES_FILE, read_stages, write_json

# Options from which nothing that is chosen follows: where the output is, and how this start is done.
_OF_THIS_START = frozenset({"output", "dry_run", "resume", "verify", "processes", "start", "cluster"})


@dataclass(frozen=True)
class Plan:
    """All stages, in the order in which they run: those of `source`, of each round, and `last`.

    `chosen` is what was chosen, if anything was, for what is in `asked`.
    """

    source: Source
    rounds: list[Round]
    last: list[Stage]
    chosen: Choices | None
    asked: Asked | None = None

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """Every stage with its name."""
        return [
            *((stage.command, stage) for stage in self.source.stages),
            *((name_of(one.name, stage.command), stage) for one in self.rounds for stage in one.stages.values()),
            *((stage.command, stage) for stage in self.last),
        ]


@dataclass(frozen=True)
class Checked:
    """What the check has found, for the plan: nothing of it is looked at again.

    Attributes:
        source: the model, and text or data.
        given: options of each stage that were given, where the others are chosen.
        student: the student's shape as far as it is known before a search, likewise.
        plan: all of it, where neither the machine nor a count of tokens decides anything.
    """

    source: Source
    given: Mapping[str, Mapping[str, Any]] | None = None
    student: ModelShape | None = None
    plan: Plan | None = None


def check_compress(cfg: CompressConfig) -> Checked:
    """What can be said before torch is there. Raises UserError.

    Options, model, text and output; the options and shapes of rounds; where their data and processes are given, the whole plan.
    """
    if world_size_from_env() > 1:
        raise UserError("start compress in one process: processes= and start= say how its stages start")
    _check_processes(cfg)
    chooses = check_asked(cfg)
    check_root(Path(cfg.output), STAGES_FILE, "a chain", cfg.resume)
    return _check_given(cfg, chooses)


def _check_processes(cfg: CompressConfig) -> None:
    """Programs alone may be more than this machine holds: said before anything is worked out for each. Raises UserError."""
    processes, free = cfg.processes or 1, free_gib()
    need = processes * GIB_OF_PROGRAM
    elsewhere = cfg.start != CompressConfig.start or cfg.cluster.gpu
    if processes > 1 and need > free and not elsewhere:
        raise UserError(
            f"processes={processes}: the programs alone take {format_gib(need)} of memory, and {format_gib(free)} are free here: "
            f"give at most {max(1, int(free / GIB_OF_PROGRAM))}, or start= for other machines"
        )


def _check_given(cfg: CompressConfig, chooses: bool) -> Checked:
    """Model, text, and the options of every stage."""
    source = open_source(cfg)
    # Whatever is not known yet is as a stage would have it.
    known = replace(_with_data(cfg), processes=cfg.processes or 1)
    if chooses:
        given = {stage: _typed(known, stage) for stage in FOLDERS}
        return Checked(source, given, planned_target(known, source.shape))
    if source.files or cfg.processes is None:
        if cfg.processes or "{processes}" in cfg.start:
            plan_rounds(_with_epochs(known), source)
        return Checked(source)
    # The device is asked for what is chosen.
    return Checked(source, plan=make_plan(cfg, "cpu", Checked(source)))


def make_plan(cfg: CompressConfig, device: str, checked: Checked | None = None) -> Plan:
    """Everything composed and checked as far as it can be by now. Raises UserError.

    Args:
        cfg: the command's options.
        device: "cuda" or "cpu", where the stages are going to run.
        checked: what `check_compress` has found.
    """
    checked = checked or _check_given(cfg, check_asked(cfg))
    source, cfg = count_text(cfg, checked.source), _with_data(cfg)
    chosen = asked = None
    if checked.given is not None:
        cfg, chosen, asked = _choose(cfg, source, checked, device)
    cfg = _with_epochs(cfg)
    rounds = plan_rounds(cfg, source, chosen, checked.student)
    for one in rounds:
        check_round(one, source)
    last = _last_stages(cfg, rounds) if cfg.export else []
    if not is_rehearsal(cfg) and not read_stages(Path(cfg.output) / STAGES_FILE):
        _check_room(cfg, source, rounds)
    return Plan(source, rounds, last, chosen, asked)


def _with_data(cfg: CompressConfig) -> CompressConfig:
    """With the folder of its data, as it is or is going to be."""
    data = cfg.data.path or (str(Path(cfg.output) / DATA) if cfg.input else NO_DATA)
    return replace(cfg, data=replace(cfg.data, path=data))


def _with_epochs(cfg: CompressConfig) -> CompressConfig:
    epochs = 1.0 if cfg.data.max_epochs is None else cfg.data.max_epochs
    return replace(cfg, data=replace(cfg.data, max_epochs=epochs))


def _typed(cfg: CompressConfig, stage: str) -> dict[str, Any]:
    """Options that were given for a stage: as numbers, where they were typed as such. Raises UserError."""
    typed = flat(resolved_config(given_config(cfg, stage)))
    with naming(stage):
        return {key: typed.get(key, value) for key, value in own_options(cfg, stage).items()}


def _choose(
    cfg: CompressConfig, source: Source, checked: Checked, device: str
) -> tuple[CompressConfig, Choices, Asked]:
    """The config with its length settled, everything else that is chosen, as before where it was chosen before, and for what."""
    # Torch's: the machine is measured.
    from minitron_megatron.choosing import choose, choose_length

    length, why = choose_length(cfg, source.shape, source.text, device)
    cfg = replace(cfg, data=replace(cfg.data, sequence_length=length))
    text = {f"text.{name}": value for name, value in vars(source.text).items()} if source.text else {}
    asked = Asked.now({**_lasting(cfg), **text}, source.inputs, frozenset())
    chosen = _chosen_before(Path(cfg.output) / CHOSEN, asked)
    if chosen is None:
        chosen = choose(cfg, Pair(source.shape, checked.student), source.text, device, checked.given)
        chosen.lines.insert(0, ("samples", f"{length:,} tokens", why))
    return cfg, chosen, asked


def remember_choices(root: Path, plan: Plan) -> None:
    """Keep what was chosen: a run that continues, perhaps on another machine, goes on with it."""
    asked = json.loads(json.dumps(plan.asked.record(), default=str))
    write_json(root / CHOSEN, {"asked": asked, **asdict(plan.chosen)})


def _lasting(cfg: CompressConfig) -> dict[str, Any]:
    """Options that what is chosen follows from; not those of a stage that may change when it continues."""
    found = {key: value for key, value in resolved_config(cfg).items() if key not in _OF_THIS_START}
    for stage in FOLDERS:
        free = free_options(COMMANDS[stage].config)
        found[stage] = {k: v for k, v in flat_options(found[stage], stage).items() if k not in free}
    return found


def _chosen_before(file: Path, asked: Asked) -> Choices | None:
    """What an earlier run with the same options chose, on whatever machine."""
    try:
        values = read_json(file)
        before = Asked.read(values["asked"], _OF_THIS_START)
        if before.as_spelt_in(asked).fingerprint() != asked.fingerprint():
            return None
        return Choices(dict(values["options"]), [tuple(line) for line in values["lines"]], dict(values["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
        export = compose_stage(
            cfg, "export_hf", inputs, {**own_options(cfg, "export_hf"), "processes": 1}, root / EXPORTED
        )
    with naming("report"):
        report = compose_stage(cfg, "report", {"folders": str(root)}, {"processes": 1}, root / REPORT)
    return [export, report]
