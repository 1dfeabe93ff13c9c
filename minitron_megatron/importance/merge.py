"""Scores of several runs on parts of the calibration data into the scores of the whole.

Every statistic is a sum over samples, so a long calibration can be shared out over jobs that know nothing of each other:

    importance.py samples=512                    ─┐
    importance.py samples=512 first_sample=512   ─┴─ merge_scores.py ──▶ what samples=1024 gives
"""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import read_output
from minitron_megatron.config import MergeScoresConfig
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import FILE, save_scores
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.tools import tool_job

log = logging.getLogger(__name__)
# What runs must have in common for their sums to mean the same.
_SHARED = ("sequence_length", "sequence_aggregation", "batch_aggregation", "heads", "head_dim")


@dataclass(frozen=True)
class Merging:
    """Scores folders that belong together: their manifests, the parts of the data that they saw, digests for the manifest."""

    folders: list[Path]
    manifests: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    inputs: dict[str, str]


def check_merge(cfg: MergeScoresConfig) -> Merging:
    """Scores folders and output, before torch is there. Raises UserError."""
    folders = [Path(path) for path in cfg.scores]
    if len(folders) < 2:
        raise UserError("scores=[…] needs two scores folders or more (outputs of importance)")
    manifests = [_manifest(folder) for folder in folders]
    parts = [part for manifest in manifests for part in manifest["results"]["parts"]]
    _check(folders, manifests, parts)
    inputs = {"model": manifests[0]["inputs"]["model"]}
    for number, manifest in enumerate(manifests, start=1):
        inputs[f"scores {number}"] = manifest["digest"]
    check_command_output(cfg, inputs)
    return Merging(folders, manifests, parts, inputs)


def merge_scores(cfg: MergeScoresConfig, checked: Merging | None = None) -> None:
    """`launch/merge_scores.py`: two or more scores folders into one."""
    # Sums are torch's.
    from minitron_megatron.importance.sums import finish_scores, load_statistics, save_statistics

    checked = checked or check_merge(cfg)
    folders, manifests, parts, inputs = checked.folders, checked.manifests, checked.parts, checked.inputs
    statistics = [load_statistics(folder) for folder in folders]
    if cfg.dry_run:
        log.info("%d scores folders would be merged into %s", len(folders), cfg.output)
        return
    with (
        tool_job(),
        command_output(cfg, inputs) as out,
    ):
        if out.done:
            return
        results = [manifest["results"] for manifest in manifests]
        out.results = {
            **{name: results[0][name] for name in _SHARED},
            **{name: sum(r[name] for r in results) for name in ("samples", "tokens")},
            "parts": parts,
        }
        if collectives.is_rank_zero():
            whole = sum(statistics[1:], statistics[0])
            save_scores(out.path, finish_scores(whole, out.results))
            save_statistics(out.path, whole)
            log.info("%s: scores of %d samples out of %d folders", cfg.output, out.results["samples"], len(folders))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_output(folder, FILE, "importance", "scores=")
    results, inputs = manifest.get("results"), manifest.get("inputs")
    whole = isinstance(results, dict) and {*_SHARED, "parts"} <= set(results) and isinstance(results["parts"], list)
    if not whole or not isinstance(inputs, dict):
        raise UserError(f"scores={folder} is not a scores folder: give outputs of importance")
    return manifest


def _check(folders: list[Path], manifests: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    """Raise UserError for runs that do not belong together, or that saw the same samples."""
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        if manifest["inputs"].get("model") != first["inputs"].get("model"):
            raise UserError(f"scores={folder} were measured on another model than {folders[0]} (digest differs)")
        for name in _SHARED:
            ours, theirs = first["results"][name], manifest["results"][name]
            if ours != theirs:
                raise UserError(f"scores={folder} have {name}={theirs}, {folders[0]} has {ours}: they do not add up")
    for part in parts:
        numbers = [part.get(name) for name in ("seed", "first_sample", "samples")] if isinstance(part, dict) else [None]
        if not all(type(one) is int for one in numbers) or not isinstance(part.get("data"), str):
            raise UserError(f"scores={folders[0]} or another of them: parts in its manifest are damaged: measure again")
    ordered = sorted(parts, key=lambda part: (part["data"], part["seed"], part["first_sample"]))
    for one, other in itertools.pairwise(ordered):
        same = (one["data"], one["seed"]) == (other["data"], other["seed"])
        if same and other["first_sample"] < one["first_sample"] + one["samples"]:
            raise UserError(
                f"sample {other['first_sample']} was measured twice: give runs on different data, first_sample= or seed="
            )
