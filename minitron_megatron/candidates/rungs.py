"""rung_N.json: what a candidate was after a rung, and of which candidate, model and trial: compared when it is read."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from minitron_megatron.candidates.plan import Candidate, Plan
from minitron_megatron.checkpoints.folder import load_json, open_model_folder, read_manifest
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.search.space import SIZES
from minitron_megatron.stages import is_whole, write_json

# What there is to do about a file of a trial that is no good.
AGAIN = ": remove it and run the same command again"


def identity(plan: Plan, one: Candidate, rung: int) -> dict[str, Any]:
    """What a file of a rung is of: candidate, rung, its model while that is there, and all that the trial was asked for."""
    asked = json.dumps({k: v for k, v in plan.settings.items() if v is not None}, sort_keys=True).encode()
    pruned = {"pruned": read_manifest(one.prune.output)["digest"]} if is_whole(one.prune.output) else {}
    return {
        "rank": one.rank,
        "rung": rung,
        "step": plan.rungs[rung - 1],
        **pruned,
        "trial": f"sha256:{hashlib.sha256(asked).hexdigest()}",
    }


def write_rung(plan: Plan, one: Candidate, rung: int, found: Mapping[str, Any]) -> None:
    """Write what a candidate was after a rung."""
    write_json(one.after(rung), {**found, **identity(plan, one, rung)})


def read_rung(plan: Plan, one: Candidate, rung: int) -> dict[str, Any]:
    """Step, validation_loss and validation_perplexity of a candidate after a rung. Raises UserError, as where it is another's.

    Of one that has diverged, why, and an infinite loss.
    """
    file = one.after(rung)
    if not file.is_file():
        raise UserError(f"{file} is not there: rung {rung} of rank {one.rank} was not run to its end")
    found = load_json(file, AGAIN)
    for name, wanted in identity(plan, one, rung).items():
        if (has := found.get(name)) != wanted:
            raise UserError(f"{file} is not of this candidate and rung ({name} is {has}, not {wanted}){AGAIN}")
    if isinstance(found.get("diverged"), str):
        found["validation_loss"] = math.inf
    if not isinstance(found.get("validation_loss"), float):
        raise UserError(f"{file} is damaged{AGAIN}")
    return found


def shape_of(one: Candidate) -> ModelShape:
    """The shape that a candidate was pruned to, as its model folder has it. Raises UserError where that is of another one."""
    if not is_whole(one.prune.output):
        return one.shape
    shape = open_model_folder(one.prune.output).shape
    wrong = next((name for name in SIZES if getattr(shape, name) != getattr(one.shape, name)), None)
    if wrong:
        raise UserError(
            f"{one.prune.output} has {wrong}={getattr(shape, wrong)}, rank {one.rank} of the search is "
            f"{getattr(one.shape, wrong)}: put the right one back, or choose another output="
        )
    return shape
