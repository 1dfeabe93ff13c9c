"""Which checkpoints a run folder has, which are whole, and whether a run can go on from them: by their files, without torch.

    checkpoints/step_00000100/format.json     its step, figures and format, what its run is and computes in, digests of the run's
                                              inputs and of every file, and its own
    checkpoints/damaged_step_00000200/        one that was found damaged and passed over
    checkpoints/best.json                     of an earlier version: which had the lowest validation loss

A checkpoint is whole where every file is there in its size. Whether the bytes are those that were written is compared before one
is read (checkpoint.py, which writes and reads them). Which one is the best follows from the checkpoints alone.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from minitron_megatron.asked import STARTED_IN, as_copied, as_spelt_now
from minitron_megatron.changing import shortened
from minitron_megatron.checkpoints.digests import FileDigest
from minitron_megatron.checkpoints.folder import check_space, load_yaml
from minitron_megatron.config import TrainerConfig, flat
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.plain_files import read_json

BEST, FORMAT = "best.json", "format.json"
_NAME = re.compile(r"step_(\d{8})")
# Keys of format.json as an earlier version wrote it, and what such a checkpoint has at least.
_OF_EARLIER = frozenset(
    """optimizer scales tensor pipeline virtual_pipeline account_for_embedding account_for_loss pipeline_layout""".split()
)
_ALWAYS = (".metadata", "metadata.json")
_JUDGED_BY = "validation_loss"
# Options that name the inputs of a run, where they are called otherwise.
_OPTIONS = {"data": "data.path", "cache": "distill.cache"}


class Damaged(UserError):
    """A checkpoint that is not whole; the message is the reason alone, as in "__0_0.distcp is missing"."""


@dataclass(frozen=True)
class OfRun:
    """What every checkpoint of a run says of the run.

    Attributes:
        run: its identity (identity.py).
        options: that decide its samples, arithmetic, length and what is published, by dotted names; and the folder that they
            were typed in (asked.py).
        inputs: digests of what it is made from, by name.
        computed_in: what precision=auto is in it for a bfloat16 folder; None where nothing was left to decide.
    """

    run: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str]
    computed_in: str | None = None


@dataclass(frozen=True)
class Written:
    """What format.json says of a checkpoint; what an earlier version did not write is None.

    Attributes:
        optimizer: format of its state.
        scales: whether it has scales of FP8.
        places: what dp_reshardable depends on of the layout.
        step: optimizer steps done.
        inputs: digests of what the run was made from, by name.
        files: digests of all other files, by name.
        figures: of its step, by name: the loss and, where it was validated, the validation loss; those that are finite.
        keep_best: whether it is kept, too, for as long as no validation loss is lower.
        run, options, computed_in: as of `OfRun`.
    """

    optimizer: str
    scales: bool
    places: Mapping[str, Any]
    step: int | None = None
    inputs: Mapping[str, str] | None = None
    files: Mapping[str, FileDigest] | None = None
    figures: Mapping[str, float] | None = None
    keep_best: bool = False
    run: str | None = None
    options: Mapping[str, Any] | None = None
    computed_in: str | None = None

    def write(self, folder: Path) -> None:
        """Write format.json, onto the disk."""
        values = {**asdict(replace(self, files=None)), "files": {n: f.to_json() for n, f in (self.files or {}).items()}}
        with open(folder / FORMAT, "w", encoding="utf-8") as file:
            json.dump({**values, "digest": _own_digest(values)}, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Written":
        """Raises Damaged."""
        try:
            values = dict(read_json(folder / FORMAT))
            digest = values.pop("digest", None)
            if digest is None and set(values) <= _OF_EARLIER:
                kind, scales = values.pop("optimizer"), values.pop("scales", False)
                return cls(kind, scales, values)
            if digest != _own_digest(values):
                raise ValueError("its digest is that of something else")
            files = {name: FileDigest.from_json(one) for name, one in values.pop("files").items()}
            return cls(**values, files=files)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{FORMAT} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{FORMAT}: {in_one_line(error, 160)}") from None


def _own_digest(values: Mapping[str, Any]) -> str:
    return "blake3:" + blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there."""

    step: int
    path: Path
    written: Written


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run that were written to their end, oldest first; some may have been damaged since."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def newest_whole(folder: Path, known: Mapping[str, str] | None = None) -> tuple[Checkpoint | None, dict[str, str]]:
    """The newest checkpoint that is whole, and why newer ones are not.

    Args:
        folder: of a run's checkpoints.
        known: reasons why some are damaged, by name.

    Returns:
        The checkpoint, None where the run has none at all; and the reasons of all that are newer, by name.

    Raises:
        UserError: the run has checkpoints, and none is whole.
    """
    damaged: dict[str, str] = {}
    for step, path in reversed(find_checkpoints(folder)):
        try:
            if path.name in (known or {}):
                raise Damaged(known[path.name])
            return Checkpoint(step, path, _sized(path, step)), damaged
        except Damaged as error:
            damaged[path.name] = str(error)
    if damaged:
        name, reason = next(iter(damaged.items()))
        others = f"; {len(damaged) - 1} more are damaged too" if len(damaged) > 1 else ""
        raise UserError(
            f"{folder} has no whole checkpoint: {name} is damaged ({reason}){others}: put a whole one back, or remove "
            f"{folder} to begin the run anew"
        )
    return None, damaged


def _sized(path: Path, step: int) -> Written:
    """What a checkpoint is, whose files all have their sizes. Raises Damaged."""
    written = Written.read(path)
    if written.step not in (None, step):
        raise Damaged(f"it is of step {written.step}")
    sizes = dict.fromkeys(_ALWAYS) if written.files is None else {n: f.size for n, f in written.files.items()}
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{name} is missing") from None
        if found != size and not (size is None and found):
            raise Damaged(f"{name} has {found} bytes" + ("" if size is None else f" instead of {size}"))
    return written


def whole(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError where it is damaged."""
    step = int(path.name.removeprefix("step_"))
    try:
        return Checkpoint(step, path, _sized(path, step))
    except Damaged as error:
        raise is_damaged(path, str(error)) from None


def is_damaged(path: Path, reason: str) -> UserError:
    """What is said of a checkpoint that was named, and is not whole."""
    return UserError(f"{path} is damaged ({reason}): put it back as it was, or name another checkpoint")


def computed_in(folder: Path) -> str | None:
    """What the newest whole checkpoint of a run says that precision=auto is in it; None where none says it. Raises UserError."""
    there, _ = newest_whole(folder)
    return there and there.written.computed_in


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name by which no run takes it; gives where it is then."""
    aside = path.with_name(f"damaged_{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def described(folder: Path) -> Iterator[tuple[Path, Written | Damaged]]:
    """Every checkpoint of a run with what its format.json says, or why that cannot be known, oldest first."""
    for _, path in find_checkpoints(folder):
        try:
            yield path, Written.read(path)
        except Damaged as error:
            yield path, error


def figures_of(path: Path, written: Written) -> dict[str, float]:
    """Figures of a checkpoint's step, by name; of an earlier version's the validation loss alone, where it was the best."""
    if written.figures is not None:
        return dict(written.figures)
    try:
        marked = read_json(path.parent / BEST)
        name, loss = f"step_{marked['step']:08d}", float(marked[_JUDGED_BY])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return {_JUDGED_BY: loss} if name == path.name and math.isfinite(loss) else {}


def find_best(folder: Path, *, kept: bool = False) -> tuple[Path, float] | None:
    """The checkpoint with the lowest validation loss and that loss, the first of equal ones; None where none was validated.

    `kept` asks for those alone that were written with trainer.keep_best=true.
    """
    found = []
    for path, written in described(folder):
        if isinstance(written, Damaged) or (kept and not written.keep_best and written.figures is not None):
            continue
        if (loss := figures_of(path, written).get(_JUDGED_BY)) is not None:
            found.append((path, loss))
    return min(found, key=lambda one: one[1], default=None)


def best_whole(folder: Path) -> tuple[Checkpoint, float]:
    """The checkpoint with the lowest validation loss, and that loss.

    Raises UserError where there is none, it is damaged, or one that is damaged may be the best.
    """
    for path, written in described(folder):
        if isinstance(written, Damaged):
            raise UserError(
                f"{path} is damaged ({written}), and may be the best checkpoint: put it back as it was, remove it, or give "
                "trainer.publish=last"
            )
    best = find_best(folder)
    if best is None:
        raise UserError(
            f"{folder} has no best checkpoint: with trainer.keep_best=true no validation loss was a finite number, or it was set "
            "aside; the same command with trainer.publish=last publishes the last"
        )
    path, step = best[0], int(best[0].name.removeprefix("step_"))
    try:
        return Checkpoint(step, path, _sized(path, step)), best[1]
    except Damaged as error:
        raise best_is_damaged(path, str(error)) from None


def best_is_damaged(path: Path, reason: str) -> UserError:
    """What is said where the best checkpoint cannot be published."""
    return UserError(
        f"{path}, the best checkpoint, is damaged ({reason}): put it back as it was, or give trainer.publish=last"
    )


def places(layout: Layout) -> dict[str, Any]:
    """What dp_reshardable depends on, by the names of the options."""
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "account_for_embedding": layout.account_for_embedding,
        "account_for_loss": layout.account_for_loss,
        "pipeline_layout": layout.pipeline_layout,
    }


def check_readable(found: Checkpoint, layout: Layout) -> None:
    """Raise UserError when a layout cannot go on from a checkpoint: before any model is built."""
    there, now = found.written, places(layout)
    if (there.optimizer != "dp_reshardable" and not there.scales) or there.places == now:
        return
    was = " ".join(f"parallel.{name}={value}" for name, value in there.places.items() if value != now.get(name))
    why = "trainer.fp8=delayed" if there.scales else "trainer.checkpoint_format=dp_reshardable"
    raise UserError(
        f"{found.path} was written with {why}, which another number of data-parallel ranks can read and no other layout: "
        f"use {was}"
    )


def check_inputs(run: Path, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Raise UserError, naming the first, where a run would go on with other inputs than it had `before` (None: not noted)."""
    if before is None:
        return
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            option = f"{_OPTIONS.get(name, name)}=" if " " not in name else name
            raise UserError(
                f"output={run}: {option} is another one than the run has had so far ({shortened(before.get(name))}, now "
                f"{shortened(now.get(name))}): give the same, or choose another output="
            )


def options_of(written: Written, now: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of a checkpoint's run, by their dotted names, its paths spelt as in `now`; None where it does not say them."""
    if written.options is None:
        return None
    found = dict(written.options)
    return as_spelt_now(found, found.pop(STARTED_IN, None), now)


def with_copies(
    options: Mapping[str, Any], read: Mapping[str, str] | None, now: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Options of a run, by their dotted names, each path to a copy of what is read now as it is spelt now.

    Args:
        options: of the run.
        read: digests, by name, of what it has read; None where that was not noted.
        now: options of this process.
        inputs: digests of what it reads.
    """
    same = {_OPTIONS.get(name, f"{name}.path") for name, one in (read or {}).items() if inputs.get(name) == one}
    return {**options, **as_copied({name: value for name, value in options.items() if name in same}, now)}


def read_options(run: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run folder notes, by their dotted names, its paths spelt as in `now`. Raises UserError."""
    found = flat(load_yaml(run / "config.yaml"))
    return as_spelt_now(found, found.pop(STARTED_IN, None), now)


def check_room(folder: Path, parameters: int, bytes_per_weight: int, options: TrainerConfig) -> None:
    """Raise UserError when the checkpoints that the run will hold at once, and one being written, have no room.

    A parameter takes its own bytes and 12 of the optimizer (float32 master weights and both moments of Adam).
    """
    wanted = options.keep_last + 1 + options.keep_best - len(find_checkpoints(folder))
    need = max(1, wanted) * parameters * (bytes_per_weight + 12)
    why = f"trainer.keep_last={options.keep_last} and one being written"
    check_space(folder, need, f"the checkpoints of {folder.parent}", why=why)
