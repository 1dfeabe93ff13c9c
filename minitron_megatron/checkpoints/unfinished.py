"""The folder in which an output is written until it is whole, and what a killed run has left there.

    outputs/.name.partial/.made-of     options and inputs, as JSON: of a command that can continue

What such a command has left may be hours of work: another command, or the same with other options, is refused and told so.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from minitron_megatron.asked import Asked
from minitron_megatron.changing import differences, in_words
from minitron_megatron.checkpoints.locks import another_run, holder, is_locked, lock, unlock
from minitron_megatron.checkpoints.places import place_of
from minitron_megatron.checkpoints.stamps import say_others
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json
from minitron_megatron.starts import STARTS

_MADE_OF = ".made-of"
# What models compute in.
COMPUTED_IN = ".computed-in"
# What a partial folder has of its own, beside what will be in the whole one.
MARKS = (_MADE_OF, COMPUTED_IN, STARTS)


def partial_folder(path: Path) -> Path:
    """Where an output is written until it is whole."""
    place = place_of(path)
    return place.parent / f".{place.name}.partial"


def has_work(partial: Path) -> bool:
    """Whether a partial folder has anything to continue from."""
    return any(path.name not in MARKS and not path.name.startswith(".") for path in partial.iterdir())


def check_unfinished(path: Path, asked: Asked, resume: bool) -> None:
    """Raise UserError where an output is unfinished that a command can continue, and is not what is asked for.

    Args:
        path: of the output.
        asked: by the command, with the inputs that are known by now.
        resume: whether it may be continued.
    """
    partial = partial_folder(path)
    # Whoever writes it right now is told of where it is locked.
    if (before := _left(partial, asked)) is not None and not is_locked(partial):
        _check_same(path, before, replace(asked, inputs={**before.inputs, **asked.inputs}), resume)


def check_nobody_writes(path: Path) -> None:
    """Raise UserError where another run is seen to write a command's output, or the model of a training run."""
    for partial in (partial_folder(path), partial_folder(path / "model")):
        if holder(partial) is not None:
            raise another_run("is writing", partial)


def start_partial(path: Path, asked: Asked, resume: bool, continues: bool) -> int:
    """Lock the folder of an output that is going to be written, and empty it unless what is left there is continued.

    Raises UserError as `check_unfinished`, of all inputs, or where another run is writing it.
    """
    partial = partial_folder(path)
    partial.mkdir(parents=True, exist_ok=True)
    held = lock(partial)
    if held is None:
        raise another_run("is writing", partial)
    try:
        if (before := _left(partial, asked)) is not None:
            _check_same(path, before, asked, resume and continues)
            return held
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if continues:
            (partial / _MADE_OF).write_text(json.dumps(asked.record(), default=str), encoding="utf-8")
    except BaseException:
        unlock(held)
        raise
    return held


def _left(partial: Path, now: Asked) -> Asked | None:
    """What an unfinished output that can be continued was asked for; None where there is nothing to continue."""
    mark = partial / _MADE_OF
    if not mark.is_file() or not has_work(partial):
        return None
    try:
        return Asked.read(read_json(mark), frozenset()).as_spelt_in(now)
    except (ValueError, TypeError, AttributeError):
        return Asked({}, {}, None)


def _check_same(path: Path, before: Asked, now: Asked, resume: bool) -> None:
    same, partial = before.fingerprint() == now.fingerprint(), partial_folder(path)
    if same and resume:
        return
    if same:
        raise UserError(
            f"output={path} is unfinished and resume=false: leave that out to go on with it, or remove {partial}"
        )
    had, has = before.options, now.options
    first = next((in_words(name, had[name], has[name]) for name in differences(had, has)), "")
    others = say_others(before.inputs, now.inputs) if before.same_options(now) else ""
    raise UserError(
        f"output={path} is unfinished, and was begun {(first and f'with {first}') or others or 'with other options'}: give the "
        f"same to go on with it, remove {partial}, or choose another output="
    )
