"""Which run a checkpoint is of: an id that a run gets at its beginning, kept in output/run.json and in each of its checkpoints.

A checkpoint of another run, put in the place of one of ours, may fit in every tensor and name the same inputs: another seed or
rate shows in nothing but its id and the options that it names. It is refused; trainer.start_from begins with another run's.
Checkpoints of an earlier version have no id, and are taken as they are. Nothing here needs torch.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minitron_megatron.changing import differences, in_words
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json, write_whole
from minitron_megatron.train import saved

FILE = "run.json"


def identify(run: Path) -> str:
    """The id of the run in a folder, which gets one where it has none. Rank 0's, once `check_own` has let it pass."""
    own = _kept(run)
    if own is None:
        own = next(iter({one.run for one in _written(run).values()}), None) or secrets.token_hex(8)
        write_whole(run / FILE, json.dumps({"id": own}) + "\n")
    return own


def check_own(
    run: Path, fixed: Mapping[str, Any], length: Mapping[str, Any], inputs: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise UserError, naming it, where a checkpoint in the output folder is of another run.

    Where run.json is gone or cannot be read, the run is that of the checkpoints with its options.

    Args:
        run: the output folder.
        fixed: options that decide the run's samples and arithmetic, by dotted names.
        length: those that decide its length, which may have grown.
        inputs: digests of what it reads, by name.
    """
    there, own = _written(run), _kept(run)
    if own is None:
        ours = {one.run for one in there.values() if not _differences(one, fixed, inputs)}
        if len(ours) > 1:
            raise UserError(
                f"{run / 'checkpoints'} has checkpoints of {len(ours)} runs with the same options, and {run / FILE}, which says "
                "which of them this is, is gone: put it back, or remove the checkpoints of the others"
            )
        own = next(iter(ours), None)
    for path, one in there.items():
        if one.run != own:
            how = ", ".join(_differences(one, {**fixed, **length}, inputs)[:2])
            raise UserError(
                f"{path} is of another run ({f'with {how}' if how else 'with the same options'}): put back the one of "
                f"output={run} or remove it; with trainer.start_from={path} a run in another output= begins with it"
            )


def _written(run: Path) -> dict[Path, saved.Written]:
    """What checkpoints say that name their run, by their folders."""
    found = saved.described(run / "checkpoints")
    return {path: one for path, one in found if isinstance(one, saved.Written) and one.run is not None}


def _differences(written: saved.Written, now: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Options of a checkpoint's run that are others now, in words; a copy of an input is no other one."""
    before = saved.with_copies(saved.options_of(written, now) or {}, written.inputs, now, inputs)
    return [in_words(name, before[name], now[name]) for name in differences(before, now)]


def _kept(run: Path) -> str | None:
    """What run.json says; None where it is not there or says nothing."""
    try:
        own = read_json(run / FILE)["id"]
        return own if isinstance(own, str) and own else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
