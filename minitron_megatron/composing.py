"""Stages of something longer as configs: each command's options out of those of the whole, checked before the first one runs.

    options of the whole (seed, parallel, data, …) ─┐
    options of the stage (`distill={…}`)           ─┴─▶ words ─▶ the config that the command would make of them ─▶ Stage

Options that a command gets later are a stage's at once: nothing here knows any of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import check_output
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import CompressConfig, DistillCandidatesConfig, flat, options
from minitron_megatron.data.folder import Data, open_data
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.stages import program_of, start_words
from minitron_megatron.words import word

# Options of the whole that every stage gets, where they are not the default anyway.
_COMMON = ("seed", "device", "precision", "verify", "parallel", "data")
Whole = CompressConfig | DistillCandidatesConfig


@dataclass(frozen=True)
class Stage:
    """One command, with its options as words and as the config that they make."""

    command: str
    words: tuple[str, ...]
    output: Path
    processes: int
    config: Any


def compose_stage(
    cfg: Whole, command: str, inputs: Mapping[str, object], own: Mapping[str, Any], output: Path
) -> Stage:
    """A stage as its command will read it: what it works on, the options of the whole, over them its own. Raises UserError."""
    own = dict(own)
    processes = stage_processes(cfg, own.pop("processes", cfg.processes))
    kind = COMMANDS[command].config
    known = {o.name for o in options(kind) if o.name.partition(".")[0] not in kind.unread}
    given = {**inputs, **{key: value for key, value in _common(cfg).items() if key in known}, **own}
    words = tuple(f"{key}={word(value)}" for key, value in given.items())
    return Stage(command, words, output, processes, compose(command, [*words, f"output={output}"]))


def flat_options(values: Any, stage: str) -> dict[str, Any]:
    """A stage's options by their dotted names, however they are nested; of two of the same name the last counts."""
    if not isinstance(values, Mapping):
        raise UserError(f"{stage}={values} must be a mapping of options, as in {{samples: 64}}")
    return flat(values)


def _common(cfg: Whole) -> dict[str, Any]:
    """Options of the whole that are its stages' too, by their dotted names."""
    given = {o.name: (attrgetter(o.name)(cfg), o.default) for o in options(type(cfg))}
    return {k: value for k, (value, default) in given.items() if k.partition(".")[0] in _COMMON and value != default}


def stage_processes(cfg: Whole, processes: Any) -> int:
    """The number of processes of a stage, checked together with what starts them. Raises UserError."""
    if type(processes) is not int or processes < 1:
        raise UserError(f"processes={processes} must be a whole number of at least 1")
    program = "python" if processes == 1 else start_words(cfg.start, processes)[0]
    if program_of(program) is None:
        raise UserError(f"start={cfg.start}: there is no program {program!r} here")
    if "{processes}" not in cfg.start and processes not in (1, cfg.processes):
        raise UserError(
            f"processes={processes}, but start= always starts processes={cfg.processes}: write {{processes}} into start="
        )
    return processes


def check_data(cfg: Any, splits: list[str], shape: ModelShape, samples: int) -> Data:
    """The data. Raises UserError unless they have these splits, and the first of them so many whole samples."""
    length = cfg.data.sequence_length
    data, *_ = [open_data(cfg.data.path, split, shape, length) for split in splits]
    tokens = data.tokens(splits[0])
    if tokens < samples * length:
        raise UserError(
            f"{samples} samples of {length} tokens are asked for, the {splits[0]} split has {tokens:,} tokens: "
            f"use samples={max(1, tokens // length)}, or prepare more text"
        )
    return data


def check_root(root: Path, mark: str, what: str, resume: bool) -> None:
    """Raise UserError when the output of a whole cannot be made, or is something else.

    Args:
        root: the output.
        mark: a file that is in it from its beginning.
        what: it is, as in "a chain".
        resume: whether one that is there may be continued.
    """
    if not root.is_dir():
        check_output(root, config={}, inputs={}, resume=resume)
    elif (root / mark).is_file():
        if not resume:
            raise UserError(f"output={root} has {what} in it and resume=false: remove it or choose another output=")
    # Hidden: what a run left that was killed while it began.
    elif any(not path.name.startswith(".") for path in root.iterdir()):
        raise UserError(f"output={root} exists and is not the folder of {what}: choose another output=")


@contextmanager
def naming(*names: str) -> Iterator[None]:
    """Put the names of round and stage before a mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{', '.join(name for name in names if name)}: {error}") from error
