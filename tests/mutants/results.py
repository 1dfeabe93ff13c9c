"""What was found about each mutant: a line of JSON each, so that a run goes on where the last one ended, and a summary."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants.mutant import Mutant


@dataclass(frozen=True)
class Result:
    """A mutant's fate. `by`: the test that noticed it, or "no end" where one hung; `slow`: slow tests were asked too."""

    mutant: str
    bug: str
    file: str
    room: str
    kind: str
    by: str | None
    slow: bool
    seconds: float

    @classmethod
    def of(cls, mutant: Mutant, by: str | None, slow: bool, seconds: float) -> "Result":
        """The fate of a mutant."""
        return cls(mutant.name, mutant.bug, mutant.file, mutant.room, mutant.kind, by, slow, round(seconds, 1))


class Results:
    """A file of results; of several about one mutant the last counts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Result] = {}
        # Tests that pass where there is no bug.
        self.sound: set[str] = set()
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                said = json.loads(line)
                if "sound" in said:
                    self.sound |= set(said["sound"])
                else:
                    self.found[said["mutant"]] = Result(**said)

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.found[result.mutant] = result
        self._append(asdict(result))

    def are_sound(self, tests: Sequence[str]) -> None:
        """Keep that tests pass where there is no bug."""
        self.sound |= set(tests)
        self._append({"sound": sorted(tests)})

    def _append(self, values: dict) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def summary(results: Sequence[Result], slow: bool) -> str:
    """Show how many were noticed, by room and by kind, and who was not; gives the same in a line."""
    console = Console()
    for title, part in (("room", lambda r: r.room), ("kind", lambda r: r.kind)):
        table = Table(title=f"noticed, by {title}")
        for column in (title, "mutants", "default tests", *(["slow tests"] if slow else []), "survivors"):
            table.add_column(column, justify="left" if column == title else "right")
        for name in sorted({part(r) for r in results}):
            rows = [r for r in results if part(r) == name]
            table.add_row(name, str(len(rows)), *map(str, _counts(rows, slow)))
        console.print(table)
    for result in results:
        if result.by is None:
            console.print(f"survived: {result.file}: {result.bug} ({result.kind})", markup=False, soft_wrap=True)
    by_default, *by_slow, left = _counts(results, slow)
    share = 100 / max(1, len(results))
    line = f"{len(results)} mutants: {by_default} noticed by default tests ({by_default * share:.1f} %)"
    line += f", {by_slow[0]} more by slow ones" if slow else ""
    line += f"; {left} survived ({100 - left * share:.1f} % noticed)"
    console.print(line, highlight=False, soft_wrap=True)
    return line


def _counts(results: Sequence[Result], slow: bool) -> list[int]:
    counted = Counter("left" if r.by is None else "slow" if r.slow else "default" for r in results)
    return [counted["default"], *([counted["slow"]] if slow else []), counted["left"]]
