"""What a command shows: result tables and progress bars, from rank 0 alone, plain where there is no terminal."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

log = logging.getLogger(__name__)
# Without a terminal a bar cannot move: say how far it is now and then instead.
SECONDS_BETWEEN_LINES = 15.0


def speaks() -> bool:
    """Whether this process is the one that prints (rank 0 of a torchrun job, or the only process)."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """A console on standard output, 120 columns wide where there is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table; numbers to the right."""
    if not speaks():
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        numeric = i > 0 and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(format_value(value) for value in row))
    console().print(table)


def format_value(value: object) -> str:
    """A number with thousands separators or four significant figures; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) or (value.is_integer() and abs(value) >= 1e4) else f"{value:.5g}"


@contextmanager
def progress(description: str, total: int, *, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` units (`unit="B"` shows bytes and their rate); yields the function that advances it."""
    if not speaks():
        yield lambda n: None
        return
    screen = console()
    if not screen.is_terminal:
        yield _lines(description, total, unit)
        return
    counts = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=screen) as bars:
        task = bars.add_task(description, total=total)
        yield lambda n: bars.advance(task, n)


def _lines(description: str, total: int, unit: str) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %.0f %% of %s %s", description, 100 * done / max(total, 1), f"{total:,}", unit)

    return advance
