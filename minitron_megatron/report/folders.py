"""The folders that a report is about: found by their manifests, read as what their files say they are."""

import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import (
    DIVERGED,
    MANIFEST,
    METRICS,
    SHAPE_FILE,
    load_yaml,
    read_manifest,
    verify_files,
)
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.plain_files import parse_json
from minitron_megatron.starts import read_starts

REPORT_FILES = ("report.html", "report.md")
# Folders inside outputs that hold no outputs themselves.
log = logging.getLogger(__name__)
_NOT_LOOKED_INTO = frozenset(("weights", "checkpoints", "wandb", "tokenizer", "huggingface"))
# What every step of training leaves.
_OF_A_STEP = ("step", "loss", "lr", "grad_norm", "tokens", "step_seconds")
_LAUNCH = re.compile(r"(?:.*/)?launch/(\w+)\.py")


@dataclass(frozen=True)
class RunFolder:
    """A whole output folder; that of a training run stands for its `model/`, where the manifest is.

    `name` is how the report calls it: its path below what all folders of the report share.
    """

    path: Path
    name: str
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of its contents."""
        return str(self.manifest["digest"])

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what it was made from, by the names of options."""
        return self.manifest["inputs"]

    @property
    def config(self) -> dict[str, Any]:
        """Every option of the command that made it."""
        return self.manifest["config"]

    @property
    def results(self) -> dict[str, Any]:
        """Figures that the command left."""
        return self.manifest["results"]

    @cached_property
    def words(self) -> list[str]:
        """The options of its command, as they were typed."""
        return [word for word in _split(self.manifest["command"])[1:] if "=" in word and not word.startswith("-")]

    @cached_property
    def command(self) -> str:
        """NAME of the launch/NAME.py, or minitron NAME, that made it; empty when another program did."""
        words = _split(self.manifest["command"])
        if words[:1] == ["minitron"]:
            return words[1] if len(words) > 1 else ""
        found = (_LAUNCH.fullmatch(word) for word in words)
        return next((match[1] for match in found if match), "")

    @cached_property
    def processes(self) -> int | None:
        """Processes that made it; of a run whose older manifest does not say, those of its last step."""
        last = next((line for line in reversed(self.metrics) if line.get("tokens_per_second_per_gpu")), None)
        of_run = round(last["tokens_per_second"] / last["tokens_per_second_per_gpu"]) if last else None
        return self.manifest.get("processes", of_run)

    @cached_property
    def device(self) -> str | None:
        """Name of each process's GPU, or cpu; where an older manifest does not say, what a run's metrics give away."""
        on = {"cpu" if "resident_gib" in line else "GPU" for line in self.metrics if "step_seconds" in line}
        return self.manifest.get("device", on.pop() if len(on) == 1 else None)

    @cached_property
    def shape(self) -> ModelShape | None:
        """Sizes of a model folder; None of any other. Raises UserError when they make no sense."""
        file = self.path / SHAPE_FILE
        return ModelShape.from_dict(load_yaml(file), str(file)) if SHAPE_FILE in self.manifest["files"] else None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of a training run; none of any other folder. Raises UserError when they are damaged."""
        file = self.path.parent / METRICS
        if self.path.name != "model" or not file.is_file():
            return []
        return read_metrics(file)

    @cached_property
    def starts(self) -> int | None:
        """How often a training run was started: once, and once for each restart; None where it did not note that."""
        return number_of_starts(self.path.parent) if self.path.name == "model" else None

    def has(self, file: str) -> bool:
        """Whether the folder was made with a file of this name."""
        return file in self.manifest["files"]

    def read_json(self, file: str) -> Any:
        """A JSON file of a command that measures. Raises UserError when it cannot be read, or is not as it was written."""
        try:
            return parse_json(_text(self._compared / file))
        except ValueError as error:
            raise UserError(f"{self.path / file} is damaged ({error}): make the folder again") from None

    def read_yaml(self, file: str) -> dict[str, Any]:
        """A YAML file of a command that measures. Raises UserError when it cannot be read, or is not as it was written."""
        return load_yaml(self._compared / file)

    @cached_property
    def _compared(self) -> Path:
        """Its path, once all of its files were compared with its digest. Raises UserError."""
        verify_files(self.path, self.digest)
        return self.path


@dataclass(frozen=True)
class UnfinishedRun:
    """A training run without a model: it trains, was stopped, or was ended by its spike guard."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def starts(self) -> int | None:
        """As of RunFolder."""
        return number_of_starts(self.path)

    @property
    def diverged(self) -> str | None:
        """Why its spike guard ended it, if it did."""
        file = self.path / DIVERGED
        return _text(file).strip().partition("\n")[0] if file.is_file() else None


def read_metrics(file: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; of a run that may be writing it (`growing`) without a last one that is cut off.

    Raises UserError when one is damaged.
    """
    lines, texts = [], _text(file).splitlines()
    for number, line in enumerate(texts, 1):
        try:
            values = parse_json(line)
            needed = _OF_A_STEP if "loss" in values else ("step",)
            if odd := [name for name in needed if not isinstance(values[name], int | float)]:
                raise TypeError(f"{odd[0]} is no number")
        except (ValueError, KeyError, TypeError) as error:
            if growing and number == len(texts):
                break
            raise UserError(
                f"{file}, line {number} is damaged ({error!r}): mend it, or leave the run out of folders="
            ) from None
        lines.append(values)
    return lines


def number_of_starts(run: Path) -> int | None:
    """Starts of a training run as it notes them (starts.py)."""
    return len([one for one in read_starts(run) if one.get("step") is not None]) or None


def find(given: Sequence[str]) -> tuple[list[RunFolder], list[UnfinishedRun]]:
    """Every output folder in or below the given ones, by path, and every run without a model; earlier reports are left out.

    Raises UserError when one is missing, has no output in it, or is damaged.
    """
    found: dict[Path, Path] = {}
    begun: dict[Path, dict[str, Any]] = {}
    for where in given:
        root = Path(where)
        if not root.is_dir():
            raise UserError(f"folders={where} does not exist or is not a folder: give outputs, or a folder of them")
        inside, runs = _manifests(root), _unfinished(root)
        if not inside and not runs:
            raise UserError(f"folders={where}: no folder in it has a {MANIFEST}, so none is an output of a command")
        found |= {path.resolve(): path for path in inside}
        begun |= runs
    manifests = {path: _checked(read_manifest(path), path) for path in found.values()}
    kept = {path: values for path, values in manifests.items() if not set(REPORT_FILES) <= set(values["files"])}
    if not kept and not begun:
        raise UserError(f"folders={','.join(given)}: there are only reports in it")
    names = _names([*kept, *begun])
    whole = [
        RunFolder(path, names[path], values) for path, values in sorted(kept.items(), key=lambda one: names[one[0]])
    ]
    unfinished = []
    for path, config in begun.items():
        file = path / METRICS
        metrics = read_metrics(file, growing=True) if file.is_file() else []
        unfinished.append(UnfinishedRun(path, names[path], config, metrics))
    return whole, sorted(unfinished, key=lambda one: one.name)


def walk(root: Path | str) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and what may have outputs below it, in order: (folder, names of its folders, names of its files).

    A folder that cannot be listed is named in a warning: a report without it looks whole.
    """

    def name(error: OSError) -> None:
        log.warning("%s is left out: it cannot be listed (%s)", error.filename, error.strerror)

    for where, inside, files in os.walk(root, onerror=name):
        yield Path(where), list(inside), files
        inside[:] = sorted(name for name in inside if name not in _NOT_LOOKED_INTO and not name.startswith("."))


def _manifests(root: Path) -> list[Path]:
    return [where for where, _, files in walk(root) if MANIFEST in files]


def _unfinished(root: Path) -> dict[Path, dict[str, Any]]:
    """Configs of runs that have begun and have no model, by their folders."""
    found = {}
    for run, inside, files in walk(root):
        begun = "config.yaml" in files and "checkpoints" in inside and not (run / "model" / MANIFEST).is_file()
        if begun and isinstance((config := load_yaml(run / "config.yaml")).get("trainer"), dict):
            found[run.resolve()] = config
    return found


def _checked(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """A manifest with everything that a report reads. Raises UserError."""
    kinds = {"command": str, "made": str, "inputs": dict, "results": dict, "config": dict, "versions": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{path / MANIFEST} is damaged ({key} is missing or odd): make the folder again")
    for key, kind in {"processes": int, "seconds": int | float, "device": str}.items():
        if not isinstance(manifest.get(key), kind | None):
            raise UserError(f"{path / MANIFEST} is damaged ({key} is odd): make the folder again")
    return manifest


def _names(paths: list[Path]) -> dict[Path, str]:
    """What each is called: its path below what all share, a training run's without `model`."""
    shown = {
        path: path.parent if (path.parent / METRICS).is_file() and path.name == "model" else path for path in paths
    }
    whole = {path: one.resolve() for path, one in shown.items()}
    shared = Path(os.path.commonpath([one.parent for one in whole.values()]))
    return {path: one.relative_to(shared).as_posix() for path, one in whole.items()}


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None
