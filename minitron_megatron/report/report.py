"""`launch/report.py`: one page about any set of output folders, and a model card in Markdown.

    folders, found by their manifests ─▶ lineage, by digests ─▶ sections for what is there ─▶ report.html, report.md

`output=` is a folder for both, or one file: NAME.html or NAME.md. A report is a view of other folders: it is made anew each time,
in place of an earlier report and of nothing else, and appears whole or not at all.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.checkpoints.folder import MANIFEST, RESULTS, check_output, output_folder, read_manifest
from minitron_megatron.cli.spelling import command_line
from minitron_megatron.config import ReportConfig
from minitron_megatron.console import print_table, speaks
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.report.cutting import cut_sections, importance_sections, layer_sections, search_sections
from minitron_megatron.report.folders import REPORT_FILES, RunFolder, UnfinishedRun, find
from minitron_megatron.report.lineage import Lineage, commands_section, lineage_section, trace
from minitron_megatron.report.models import (
    measurements_section,
    models_section,
    results_section,
    student,
    teacher_of,
    throughput_section,
)
from minitron_megatron.report.opening import opening
from minitron_megatron.report.page import MARK, Section, write_card, write_page
from minitron_megatron.report.training import cost_section, recipe_section, training_sections, unfinished_section
from minitron_megatron.report.trials import Trial, find_trials, trial_section

log = logging.getLogger(__name__)
_WRITERS = {".html": write_page, ".md": write_card}


@dataclass(frozen=True)
class Page:
    """What is said, in whatever form."""

    title: str
    subtitle: str
    sections: list[Section]

    def write(self, file: Path, kind: str) -> None:
        """Write it as .html or .md."""
        _WRITERS[kind](file, self.title, self.subtitle, self.sections)


@dataclass(frozen=True)
class Reporting:
    """What a page is to be about, found and checked: output folders, runs, trials, and digests for the manifest."""

    folders: list[RunFolder]
    unfinished: list[UnfinishedRun]
    trials: list[Trial]
    inputs: dict[str, str]


def check_report(cfg: ReportConfig) -> Reporting:
    """Folders and output. Raises UserError."""
    given = [cfg.folders] if isinstance(cfg.folders, str) else cfg.folders
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise UserError(f"folders={cfg.folders} must be a folder, or a list of them: [outputs/a,outputs/b]")
    output = Path(cfg.output)
    given = [os.path.expanduser(one) for one in given]
    (folders, unfinished), trials = find(given), find_trials(given)
    # Candidates that a finished trial left behind are in its table.
    unfinished = [one for one in unfinished if not any(trial.has(one) for trial in trials)]
    inputs = {one.name: one.digest for one in folders} | {f"{one.path}/{RESULTS}": one.digest for one in trials}
    if _as_file(output):
        _check_file(output, cfg.resume)
    else:
        _check_folder(output, cfg.resume)
    return Reporting(folders, unfinished, trials, inputs)


def _as_file(output: Path) -> bool:
    """Whether `output=` names one file."""
    return output.suffix in _WRITERS and not output.is_dir()


def report(cfg: ReportConfig, checked: Reporting | None = None) -> None:
    """Find, check, trace, write. One process works; others of a torchrun job return."""
    if not speaks():
        return
    checked = checked or check_report(cfg)
    folders, unfinished, trials, inputs = checked.folders, checked.unfinished, checked.trials, checked.inputs
    output, config = Path(cfg.output), resolved_config(cfg)
    as_file = _as_file(output)
    lineage = trace(folders)
    about = student(lineage, trials, cfg.student)
    page = Page(*_title(lineage, about, cfg.title), sections_of(lineage, trials, about, unfinished))
    if cfg.dry_run:
        rows = [
            [one.name, one.command, ", ".join(x.name for x in lineage.made_from[one.name].values())] for one in folders
        ]
        rows += [[one.name, "has not ended", ""] for one in unfinished]
        print_table("would be reported", ["folder", "made by", "from"], rows)
        return
    if as_file:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        page.write(partial, output.suffix)
        partial.replace(output)
        _say(output, folders, unfinished)
        return
    how = {"command": command_line(), "config": config, "inputs": inputs}
    with output_folder(output, **how, resume=cfg.resume, anew=True) as out:
        for name in REPORT_FILES:
            page.write(out.path / name, Path(name).suffix)
        out.results = {"folders": len(folders)}
    _say(output / REPORT_FILES[0], folders, unfinished)


def _say(file: Path, folders: Sequence[RunFolder], unfinished: Sequence[UnfinishedRun]) -> None:
    more = f"; not ended: {', '.join(one.name for one in unfinished)}" if unfinished else ""
    log.info("%s: %d folders%s", file, len(folders), more)


def _check_folder(output: Path, resume: bool) -> None:
    """Raise UserError unless a folder may be written there: what it replaces must be a report."""
    check_output(output, config={}, inputs={}, resume=resume, anew=True)
    if (output / MANIFEST).is_file() and not set(REPORT_FILES) <= set(read_manifest(output)["files"]):
        raise UserError(f"output={output} exists and is not a report: choose another output=")


def _check_file(output: Path, resume: bool) -> None:
    """Raise UserError unless a file may be written there."""
    if not output.exists():
        return
    with open(output, encoding="utf-8", errors="replace") as file:
        ours = MARK in file.read(1000)
    if not ours:
        raise UserError(f"output={output} exists and is not a report: choose another output=")
    if not resume:
        raise UserError(f"output={output} exists and resume=false: remove it or choose another output=")


def sections_of(
    lineage: Lineage,
    trials: Sequence[Trial] = (),
    about: RunFolder | None = None,
    unfinished: Sequence[UnfinishedRun] = (),
) -> list[Section]:
    """The sections that there is something to say in, from what came out to how it was made."""
    found = [
        models_section(lineage),
        results_section(lineage, about),
        throughput_section(lineage),
        recipe_section(lineage),
        *training_sections(lineage),
        unfinished_section(unfinished),
        *search_sections(lineage),
        *map(trial_section, trials),
        *cut_sections(lineage),
        *importance_sections(lineage),
        *layer_sections(lineage),
        measurements_section(lineage),
        cost_section(lineage),
        lineage_section(lineage),
        commands_section(lineage),
    ]
    return [section for section in found if section]


def _title(lineage: Lineage, about: RunFolder | None, given: str | None) -> tuple[str, str]:
    """A heading, and what there is to say of the page's model in a sentence."""
    made = f"From the manifests of {len(lineage.folders)} folders."
    if about is None:
        return given or f"Report of {len(lineage.folders)} folders", made
    teacher, count = teacher_of(lineage, about), count_parameters(about.shape)
    share = f": {100 * count / count_parameters(teacher.shape):.0f} % of {teacher.name}" if teacher is not about else ""
    return given or about.name + share, f"{opening(lineage, about)} {made}"
