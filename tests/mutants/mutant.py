"""A mutant: one small bug at one place of one file. Lists of them are YAML, one a room."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.mutants.rooms import ROOT, owner

PLACES = Path(__file__).parent / "places"
# What kinds of bugs there are; what holds each of them is in docs/development.md.
KINDS = (
    "block",
    "invariant",
    "bound",
    "hostile",
    "restart",
    "durability",
    "arithmetic",
    "choice",
    "message",
    "generated",
)


class StaleError(Exception):
    """A listed mutant that cannot be made any more: the list is to follow the code."""


@dataclass(frozen=True)
class Mutant:
    """A bug: `before`, which the file has once, becomes `after`; `held_by` is the test that is to notice it, if it is named."""

    bug: str
    file: str
    before: str
    after: str
    kind: str
    held_by: str | None = None
    offset: int | None = None

    @property
    def name(self) -> str:
        """What results are kept by: the same bug at the same place."""
        return hashlib.sha256(repr((self.file, self.before, self.after, self.offset)).encode()).hexdigest()[:12]

    @property
    def room(self) -> str:
        """The room of its file."""
        found = owner(self.file)
        return found.room if found else ""

    def changed(self, text: str) -> str:
        """The file's text with the bug. Raises StaleError."""
        if self.offset is not None:
            end = self.offset + len(self.before)
            if text[self.offset : end] != self.before:
                raise StaleError(f"{self.file}: {self.bug}: the file is another now")
            return text[: self.offset] + self.after + text[end:]
        if (count := text.count(self.before)) != 1:
            raise StaleError(
                f"{self.file}: {self.bug}: its text is there {count} times instead of once: {self.before!r}"
            )
        return text.replace(self.before, self.after)


def listed() -> list[Mutant]:
    """All that are listed. Raises StaleError for a list that does not follow the code."""
    return list(_listed())


def _listed() -> Iterator[Mutant]:
    for file in sorted(PLACES.glob("*.yaml")):
        for path, entries in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            for entry in entries:
                yield Mutant(file=path, **entry)


def problems(mutants: list[Mutant]) -> list[str]:
    """What is wrong with a list: places that the code does not have (any more), files without a room, unknown tests and kinds."""
    found = []
    for mutant in mutants:
        try:
            text = (ROOT / mutant.file).read_text(encoding="utf-8")
            if mutant.changed(text) == text:
                raise StaleError(f"{mutant.file}: {mutant.bug}: changes nothing")
            if mutant.kind not in KINDS:
                raise StaleError(f"{mutant.file}: {mutant.bug}: {mutant.kind} is not one of {', '.join(KINDS)}")
            if owner(mutant.file) is None:
                raise StaleError(f"{mutant.file} has no room: name its tests in tests/mutants/rooms.py")
            if mutant.held_by:
                test, _, function = mutant.held_by.partition("::")
                held = ROOT / "tests" / f"test_{test}.py"
                function = function.rpartition("::")[2]
                if not held.is_file() or f"def {function}(" not in held.read_text(encoding="utf-8"):
                    raise StaleError(f"{mutant.file}: {mutant.bug}: there is no test {mutant.held_by}")
        except (StaleError, OSError) as error:
            found.append(str(error))
    return found
