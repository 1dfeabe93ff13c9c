"""What was made from what: by the digests in manifests, and where those say nothing by the paths in commands.

An input's digest is that of the folder it came from, wherever that is now; of folders of equal contents it is the one that the
command names. Where a manifest has no digest of what guided a command (import_hf of its source, prune of a target that was edited
since it was ranked) the path in the command counts, if it is one folder's.
"""

import graphlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron_megatron.cli.spelling import joined
from minitron_megatron.report import plots
from minitron_megatron.report.folders import RunFolder
from minitron_megatron.report.page import Figure, Section, Table

_SHORT = 12
# Its digest is of a checkpoint, which is part of a folder.
_BEGINNING = "start_from"


@dataclass
class Lineage:
    """Folders, each after all that it was made from.

    `made_from[name]` has the options of its command that name another folder, and that folder: by digest, or (`by_path`) by
    path alone.
    """

    folders: list[RunFolder]
    made_from: dict[str, dict[str, RunFolder]]
    by_path: dict[str, set[str]] = field(default_factory=dict)

    def source(self, folder: RunFolder, *options: str) -> RunFolder | None:
        """The folder that came in by the first of these options that brought one."""
        return next((self.made_from[folder.name][o] for o in options if o in self.made_from[folder.name]), None)

    def origin(self, folder: RunFolder) -> RunFolder:
        """The model that a model was made from in the end: back through distillation, correction and pruning."""
        before = self.source(folder, "student", "model")
        return folder if before is None or before.shape is None else self.origin(before)

    def models(self) -> list[RunFolder]:
        """Model folders, in order."""
        return [folder for folder in self.folders if folder.shape]


def trace(folders: Sequence[RunFolder]) -> Lineage:
    """Who was made from whom."""
    by_digest: dict[str, list[RunFolder]] = {}
    for folder in sorted(folders, key=lambda one: one.manifest["made"]):
        by_digest.setdefault(folder.digest, []).append(folder)
    made_from, by_path = {}, {}
    for folder in folders:
        read = {**folder.inputs, **_ranked(folder)}
        digests = {o: _named(folder, o, by_digest[d]) for o, d in read.items() if d in by_digest}
        paths = {o: one for o, one in _by_path(folder, folders).items() if o not in digests}
        made_from[folder.name] = {o: one for o, one in {**digests, **paths}.items() if one is not folder}
        by_path[folder.name] = set(paths)
    return Lineage(_ordered(folders, made_from), made_from, by_path)


def _ranked(folder: RunFolder) -> dict[str, str]:
    """The search that a pruned model's target is of, where it is what was ranked there."""
    target = folder.results.get("target")
    known = isinstance(target, Mapping) and not target.get("others") and isinstance(target.get("search"), str)
    return {"target": target["search"]} if known else {}


def _edited(folder: RunFolder, option: str) -> str:
    """Of a target that is no longer what a search ranked, that it is not."""
    target = folder.results.get("target") if option == "target" else None
    return ", not as it was ranked" if isinstance(target, Mapping) and target.get("others") else ""


def _named(folder: RunFolder, option: str, equal: Sequence[RunFolder]) -> RunFolder:
    """Of folders of equal contents, oldest first, the one that an option of the command names; the first where it names none.

    Where the path names several, as relative ones of two places do, the one that is nearest to what was made of it.
    """
    given = folder.config.get(option)
    path = given.get("path") if isinstance(given, Mapping) else given
    if len(equal) == 1 or not isinstance(path, str):
        return equal[0]
    own = folder.path.resolve()

    def nearness(one: RunFolder) -> int:
        return len(Path(os.path.commonpath([own, one.path.resolve()])).parts)

    there = [one for one in equal if _is_in(path, one)]
    return max(there, key=nearness) if there else equal[0]


def _by_path(folder: RunFolder, folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Folders that stand in the command's options, where their digest is not in the manifest."""
    found = {}
    for word in folder.words:
        option, _, value = word.partition("=")
        option = _BEGINNING if option == f"trainer.{_BEGINNING}" else option.partition(".")[0]
        for i, path in enumerate(value.strip("[]").split(",")):
            # A blend's digest is of several folders; a Hugging Face folder's may be of all its files.
            known = option in folder.inputs and "," not in value and option not in ("hf", _BEGINNING)
            if option == "output" or known or "/" not in path:
                continue
            there = [one for one in folders if one is not folder and _is_in(path, one)]
            if len(there) == 1:
                found[option if i == 0 else f"{option} {i + 1}"] = there[0]
    return found


def _is_in(path: str, folder: RunFolder) -> bool:
    """Whether a path is a folder, or in it, by what its own command called it."""
    output = folder.config.get("output")
    return isinstance(output, str) and Path(path).is_relative_to(output)


def _ordered(folders: Sequence[RunFolder], made_from: dict[str, dict[str, RunFolder]]) -> list[RunFolder]:
    """After what each was made from; else in the order they were made."""
    known = {folder.name: folder for folder in folders}
    sorter = graphlib.TopologicalSorter({n: {one.name for one in made_from[n].values()} for n in known})
    try:
        sorter.prepare()
    except graphlib.CycleError:
        # Only by paths that were used again for something else: what was made later was made from what was there.
        return sorted(folders, key=lambda one: one.manifest["made"])
    ordered: list[RunFolder] = []
    ready: list[str] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        ready.sort(key=lambda name: (known[name].manifest["made"], name))
        ordered.append(known[ready.pop(0)])
        sorter.done(ordered[-1].name)
    return ordered


def short(digest: str) -> str:
    """A digest as tables show it."""
    kind, _, value = digest.partition(":")
    return f"{kind}:{value[:_SHORT]}"


def lineage_section(lineage: Lineage) -> Section:
    """The drawing, and a table with every digest."""
    rows = []
    for folder in lineage.folders:
        sources = {
            option: f"{option}={one.name}"
            + (f" (by path{_edited(folder, option)})" if option in lineage.by_path[folder.name] else "")
            for option, one in lineage.made_from[folder.name].items()
        }
        outside = [
            f"{option}={short(value)}"
            for option, value in folder.inputs.items()
            if option not in sources and value.startswith(("sha256:", "blake3:"))
        ]
        made_from = ", ".join([*sources.values(), *outside]) or "–"
        rows.append([folder.name, folder.command or "–", made_from, folder.digest])
    return Section(
        "Lineage",
        "Each folder, what made it, and from what: an input's digest is that of the folder it came from. Where a manifest has no "
        "digest of an input, the path in the command says it. In the drawing an arrow is left out where others lead there.",
        tables=[Table(["folder", "made by", "from", "digest"], rows)],
        figures=[
            Figure(
                "What was made from what; dotted where a path alone says so",
                plots.tree(*_drawing(lineage)),
                natural=True,
            )
        ]
        if len(rows) > 1
        else [],
        card=True,
    )


def _drawing(lineage: Lineage) -> tuple[list[tuple[str, str]], list[tuple[int, int, bool]]]:
    """Rows (name, command), and arrows (from row, to row, by path alone) without those that follow from others."""
    row = {folder.name: i for i, folder in enumerate(lineage.folders)}
    before: dict[int, dict[int, bool]] = {i: {} for i in row.values()}
    for name, sources in lineage.made_from.items():
        for option, one in sources.items():
            i, j = row[name], row[one.name]
            if j < i:
                before[i][j] = before[i].get(j, True) and option in lineage.by_path[name]
    ancestors: dict[int, set[int]] = {}
    for i in sorted(before):
        ancestors[i] = set(before[i]).union(*(ancestors[j] for j in before[i]))
    arrows = [
        (j, i, by_path)
        for i, sources in before.items()
        for j, by_path in sources.items()
        if not any(j in ancestors[k] for k in sources)
    ]
    return [(folder.name, folder.command) for folder in lineage.folders], arrows


def commands_section(lineage: Lineage) -> Section:
    """What repeats everything, in order."""
    return Section(
        "Commands",
        "What made these folders, in order, from the repository's root.",
        commands=[_command(folder) for folder in lineage.folders],
        card=True,
    )


def _command(folder: RunFolder) -> str:
    """As a user types it: the file below the repository, or minitron, as where there were several processes."""
    if not folder.command:
        return str(folder.manifest["command"])
    many = folder.processes or 1
    # "python … /…/launch/NAME.py …" or "minitron NAME …"
    words = shlex.split(folder.manifest["command"])
    name = next(i for i, word in enumerate(words) if Path(word).stem == folder.command)
    options = words[name + 1 :]
    start = ["minitron", folder.command] if words[0] == "minitron" else ["python", f"launch/{folder.command}.py"]
    if many > 1:
        start = ["minitron", "--nproc-per-node", str(many), folder.command]
    return joined([*start, *options])
