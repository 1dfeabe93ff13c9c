"""Candidates that were distilled for a while (launch/distill_candidates.py): whose folder has no manifest of its own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import MANIFEST, RESULTS
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json
from minitron_megatron.report import plots
from minitron_megatron.report.folders import RunFolder, walk
from minitron_megatron.report.page import Figure, Section, Table

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Trial:
    """What became of the candidates of a search, as its results.json has it."""

    path: Path
    found: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of its results."""
        return "sha256:" + hashlib.sha256((self.path / RESULTS).read_bytes()).hexdigest()

    def has(self, folder: RunFolder) -> bool:
        """Whether a folder is of one of its candidates."""
        return folder.path.resolve().is_relative_to(self.path.resolve())

    def won(self, folder: RunFolder) -> bool:
        """Whether a folder is of the candidate that learned best."""
        rank = f"rank_{self.found['winner']['rank']:02d}"
        return self.has(folder) and rank in folder.path.resolve().relative_to(self.path.resolve()).parts


def find_trials(given: Sequence[str]) -> list[Trial]:
    """Every finished trial in or below the given folders. Raises UserError when one is damaged."""
    found: dict[Path, Trial] = {}
    for root in given:
        for where, _, files in walk(root):
            if SETTINGS in files and RESULTS in files and MANIFEST not in files:
                found[where.resolve()] = Trial(where, _read(where / RESULTS))
    return list(found.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
        ranks = {one["rank"] for one in values["candidates"]}
        if values["winner"]["rank"] not in ranks or not all(one["validation_kl"] for one in values["candidates"]):
            raise ValueError("the winner, or the KL of a candidate, is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        pass_on_unless_damage(error)
        raise UserError(f"{file} is damaged ({error!r}): remove it and run distill_candidates again") from None
    return values


def trial_section(trial: Trial) -> Section:
    """The candidates from the best to the worst, their order before, and their curves."""
    try:
        return _section(trial)
    except (KeyError, TypeError, ValueError) as error:
        file = trial.path / RESULTS
        raise UserError(f"{file} is damaged ({error!r}): remove it and run distill_candidates again") from None


def trial_table(found: Mapping[str, Any]) -> Table:
    """The candidates of a results.json, from the best to the worst."""
    rungs = [str(step) for step in found["rungs"]]
    columns = ["place", "rank before", "layers × hidden × ffn", "heads/kv", "parameters", "predicted damage"]
    rows = [
        [
            str(one["place"]),
            str(one["rank"]),
            f"{one['num_layers']} × {one['hidden_size']} × {one['ffn_hidden_size']}",
            f"{one['num_attention_heads']}/{one['num_query_groups']}",
            f"{one['parameters']:,}",
            f"{one['predicted_loss']:.4f}",
            *(_kl(one["validation_kl"], step) for step in rungs),
        ]
        for one in found["candidates"]
    ]
    caption = "Validation KL in nats a token; – where it was out, or had diverged"
    return Table([*columns, *(f"KL, step {step}" for step in rungs)], rows, caption)


def _kl(by_step: Mapping[str, float | None], step: str) -> str:
    if step not in by_step:
        return "–"
    return "diverged" if by_step[step] is None else f"{by_step[step]:.4f}"


def trial_sentences(found: Mapping[str, Any]) -> list[str]:
    """What halving saved, and what the prediction was worth."""
    lines = [
        f"{found['steps_run']:,} steps rather than the {found['steps_of_all']:,} of all {len(found['candidates'])} candidates "
        f"to the end: {found['saving']:.0%} less."
    ]
    for step, value in found["rank_correlation_with_prediction"].items():
        if value is not None:
            lines.append(f"Rank correlation of the predicted damage with the KL after step {step}: {value:.2f}.")
    return lines


def trial_plots(found: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name: `rankings`, the order before and after, and `kl`, each candidate's validation KL."""
    shapes = {
        one["rank"]: f"{row[2]}, {row[3]}"
        for one, row in zip(found["candidates"], trial_table(found).rows, strict=True)
    }
    curves = {
        shapes[one["rank"]]: {int(step): kl for step, kl in one["validation_kl"].items() if kl is not None}
        for one in found["candidates"]
    }
    return {
        "rankings": plots.rankings([shapes[rank] for rank in sorted(shapes)], list(curves)),
        "kl": plots.curves_by_name(curves, "validation KL (nats a token)"),
    }


def _section(trial: Trial) -> Section:
    found, drawn = trial.found, trial_plots(trial.found)
    return Section(
        f"Candidates tried: {trial.path.resolve().name}",
        " ".join(trial_sentences(found)),
        [trial_table(found)],
        [
            Figure("Order before, by predicted damage, and after", drawn["rankings"]),
            Figure("Validation KL over steps", drawn["kl"]),
        ],
        card=True,
    )
