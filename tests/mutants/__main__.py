"""`python -m tests.mutants option=value …`: tries mutants one after the other; see the package's description."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.generate import generated
from tests.mutants.mutant import Mutant, StaleError, listed, problems
from tests.mutants.results import Result, Results, summary
from tests.mutants.rooms import ROOT, owner, product
from tests.mutants.workshop import ALL, DEFAULT, SLOW, Workshop, workshop

HUNG = "no end"


@dataclass
class Options:
    """Options of the command.

    room: mutants of this room alone, as prune.
    file: mutants of files whose path begins so.
    seed: instead of the listed mutants, some that are drawn from the files' syntax trees.
    count: how many: of the listed ones the first, of drawn ones 40 unless it is given.
    slow: what default tests do not notice is tried with the slow ones too.
    held: only the mutants whose test the list names, and only that test: minutes instead of hours.
    again: survivors that the results name are tried again, as after a test was added.
    anew: all are tried again; a test that noticed one before comes first.
    limit: seconds that the tests of a mutant may take; ten times as long for slow ones.
    results: the file of results, which a run goes on from.
    check: only look whether the listed mutants can still be made.
    """

    room: str = ""
    file: str = ""
    seed: int | None = None
    count: int | None = None
    slow: bool = False
    held: bool = False
    again: bool = False
    anew: bool = False
    limit: float = 300.0
    results: Path = ROOT / "outputs" / "mutants.jsonl"
    check: bool = False


def parse(words: Sequence[str]) -> Options:
    """Options out of words like room=prune."""
    kinds = {
        "slow": bool,
        "held": bool,
        "again": bool,
        "anew": bool,
        "check": bool,
        "seed": int,
        "count": int,
        "limit": float,
        "results": Path,
    }
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in {field.name for field in fields(Options)}:
            raise SystemExit(f"{word} is not an option.\n{Options.__doc__}")
        kind = kinds.get(name, str)
        given[name] = value.lower() in ("true", "1", "yes") if kind is bool else kind(value)
    return Options(**given)


def chosen(options: Options) -> list[Mutant]:
    """The mutants that are asked for."""

    def wanted(file: str) -> bool:
        there = owner(file)
        return file.startswith(options.file) and (
            not options.room or (there is not None and there.room == options.room)
        )

    if options.seed is None:
        return [m for m in listed() if wanted(m.file) and (m.held_by or not options.held)][: options.count]
    files = [file for file in product() if file.endswith(".py") and owner(file) and wanted(file)]
    return generated(files, options.seed, options.count or 40)


def try_out(shop: Workshop, mutant: Mutant, options: Options, first: str | None) -> Result:
    """Run the tests that are to notice a mutant, the likeliest first, until one does."""
    spent, of_file = 0.0, [] if options.held else [list(owner(mutant.file).tests)]
    asked = [*([[first]] if first else []), *of_file]
    rounds = [(names, DEFAULT, options.limit) for names in asked]
    rounds += [(names, SLOW, 10 * options.limit) for names in asked if options.slow]
    with shop.having(mutant):
        for names, marked, limit in rounds:
            outcome = shop.tests(names, marked=marked, limit=limit)
            spent += outcome.seconds
            if outcome.failed or outcome.problem:
                by = outcome.failed[0] if outcome.failed else f"{HUNG}: {outcome.problem}"
                return Result.of(mutant, by, marked == SLOW, spent)
    return Result.of(mutant, None, options.slow, spent)


def hint(mutant: Mutant, before: Result | None) -> str | None:
    """The test to begin with: the one that is named, or that noticed it before."""
    if mutant.held_by:
        file, _, function = mutant.held_by.partition("::")
        return f"tests/test_{file}.py::{function}"
    noticed = before is not None and before.by is not None and not before.by.startswith(HUNG)
    return before.by if noticed else None


def run(options: Options) -> int:
    """Try what is asked for; gives the exit status."""
    mutants = chosen(options)
    wrong = problems(mutants)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong or options.check:
        return 2 if wrong else 0
    results = Results(options.results)
    to_do = [
        m for m in mutants
        if options.anew or (before := results.found.get(m.name)) is None
        or (before.by is None and (options.again or (options.slow and not before.slow)))
    ]  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # The bar is drawn by this thread alone.
    with workshop() as shop, Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("mutants", total=len(mutants), completed=len(mutants) - len(to_do))
        for mutant in to_do:
            progress.update(task, description=f"{mutant.room}: {mutant.bug}"[:60].replace("[", r"\["), refresh=True)
            result = try_out(shop, mutant, options, hint(mutant, results.found.get(mutant.name)))
            results.add(result)
            said = "survived" if result.by is None else f"noticed by {result.by}"
            progress.console.print(
                f"{mutant.file}: {mutant.bug}: {said} ({result.seconds:.0f} s)", markup=False, soft_wrap=True
            )
            progress.update(task, advance=1, refresh=True)
        progress.update(task, description="the tests that noticed, without a bug", refresh=True)
        unsound = check_sound(shop, results, mutants, options.limit)
    found = [results.found[m.name] for m in mutants]
    summary(found, options.slow)
    for test in unsound:
        print(f"error: {test} fails without a bug too: what it noticed is not known", file=sys.stderr)
    return 1 if unsound else 0


def check_sound(shop: Workshop, results: Results, mutants: Sequence[Mutant], limit: float) -> list[str]:
    """Tests that noticed something and fail where there is no bug."""
    by = {results.found[m.name].by for m in mutants} - {None}
    tests = sorted(test for test in by - results.sound if not test.startswith(HUNG))
    if not tests:
        return []
    outcome = shop.tests(tests, marked=ALL, limit=max(limit, 60 * len(tests)), every=True)
    if outcome.problem:
        return [f"{len(tests)} tests ({outcome.problem})"]
    results.are_sound(sorted(set(tests) - set(outcome.failed)))
    return outcome.failed


if __name__ == "__main__":
    try:
        sys.exit(run(parse(sys.argv[1:])))
    except StaleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
