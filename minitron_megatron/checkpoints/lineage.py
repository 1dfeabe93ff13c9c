"""How a model came about, read back from the manifests of its ancestors: distilled ◀ pruned ◀ imported ◀ Hugging Face folder.

A manifest has the digest of each input and the path that it had. An ancestor counts where its folder is still there and has
that digest, or the very files that an import has read; where it has not, the line ends with the digest alone.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_megatron.changing import in_words, other_in_words
from minitron_megatron.checkpoints.folder import MANIFEST, SHAPE_FILE, ModelFolder, load_yaml, read_manifest
from minitron_megatron.checkpoints.stamps import PREFIX, file_stamps
from minitron_megatron.config import flat
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape


@dataclass(frozen=True)
class _Kind:
    """What the options of a command show it to be, and which of them names the model that it changed."""

    name: str
    options: frozenset[str]
    source: str


_KINDS = (
    _Kind("distilled", frozenset({"teacher", "student", "distill"}), "student.path"),
    _Kind("corrected", frozenset({"model", "trainer", "optim"}), "model.path"),
    _Kind("pruned", frozenset({"model", "target", "drop_layers"}), "model.path"),
    _Kind("exported", frozenset({"model", "max_shard_gb"}), "model.path"),
    _Kind("imported", frozenset({"hf"}), "hf"),
    _Kind("imported from NeMo", frozenset({"nemo"}), "nemo"),
)


@dataclass(frozen=True)
class Step:
    """One model on the way: where it was, its digest where known, and its manifest where its folder is still at hand."""

    path: Path
    digest: str | None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Options of the command that made it."""
        return self.manifest.get("config") or {}

    @property
    def results(self) -> Mapping[str, Any]:
        """What the command found."""
        return self.manifest.get("results") or {}

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of what it was made from, by name."""
        return self.manifest.get("inputs") or {}

    @property
    def beginning(self) -> str:
        """The checkpoint of another run that a training began with, and how its options differ, in words; empty without one."""
        return beginning_in_words(self.manifest)

    @property
    def command(self) -> str:
        """The command as it was typed; empty when its manifest is not at hand."""
        return self.manifest.get("command", "")

    @property
    def kind(self) -> str:
        """What was done: distilled, corrected, pruned, exported or imported; `made` for others, `source` without a manifest."""
        kind = self._kind()
        return kind.name if kind else "made" if self.manifest else "source"

    @property
    def shape(self) -> ModelShape | None:
        """Its sizes, where they are at hand."""
        file = self.path / SHAPE_FILE
        return ModelShape.from_dict(load_yaml(file), str(file)) if self.manifest and file.is_file() else None

    def of(self, option: str) -> Any:
        """An option of the command by its dotted name; None where it has none."""
        return flat(self.config).get(option)

    def _kind(self) -> _Kind | None:
        return next((kind for kind in _KINDS if kind.options <= set(self.config)), None)

    def input(self, option: str) -> "Step | None":
        """The model that an option such as `teacher.path` named, with what its own manifest says if it is still there."""
        path = self.of(option)
        if path is None:
            return None
        digest = self.inputs.get(option.removesuffix(".path"))
        return _read_by_import(Path(path), self.inputs) if digest is None else find_step(Path(path), digest)

    def source(self) -> "Step | None":
        """The model that this one was made from."""
        kind = self._kind()
        return self.input(kind.source) if kind else None


def beginning_in_words(manifest: Mapping[str, Any]) -> str:
    """As of `Step.beginning`."""
    began = manifest.get("started_from")
    if not began:
        return ""
    of = f"{began['takes']} of {began['checkpoint']} ({began['stamp']})"
    words = [in_words(name, *values) for name, values in began["options"].items()]
    words += [other_in_words(name, *values) for name, values in (began.get("others") or {}).items()]
    return f"{of}, which had {'; '.join(words)}" if words else of


def _read_by_import(path: Path, inputs: Mapping[str, str]) -> Step:
    """A folder that is known by stamps of its files; an export is one with its manifest, where none of them was replaced."""
    stamps = {name: stamp for name, stamp in inputs.items() if name.startswith(PREFIX)}
    with contextlib.suppress(UserError, OSError):
        files = [path / name.removeprefix(PREFIX) for name in stamps]
        if files and (path / MANIFEST).is_file() and file_stamps(path, files) == stamps:
            return find_step(path, read_manifest(path)["digest"])
    return Step(path, None)


def find_step(path: Path, digest: str) -> Step:
    """A folder, or its model, as a step; without its manifest unless it is whole and has this digest."""
    for folder in (path, path / "model"):
        if (folder / MANIFEST).is_file():
            try:
                manifest = read_manifest(folder)
            except UserError:
                continue
            if manifest["digest"] == digest:
                return Step(folder, manifest["digest"], manifest)
    return Step(path, digest)


def lineage(folder: ModelFolder) -> list[Step]:
    """The model and its ancestors, newest first."""
    return _line(Step(folder.path, folder.digest, read_manifest(folder.path)))


def teachers(steps: list[Step]) -> list[Step]:
    """Teachers of the steps that were distilled, with their ancestors, where these are not among the steps themselves."""
    known = {step.digest for step in steps}
    found: list[Step] = []
    for step in steps:
        teacher = step.input("teacher.path") if step.kind == "distilled" else None
        for one in _line(teacher) if teacher else []:
            if one.digest in known or any(one == other for other in found):
                break
            found.append(one)
    return found


def _line(step: Step) -> list[Step]:
    steps, seen = [step], {step.path.absolute()}
    while (before := steps[-1].source()) is not None and before.path.absolute() not in seen:
        steps.append(before)
        seen.add(before.path.absolute())
    return steps
