"""What a command shows: result tables and progress bars, from rank 0 alone, plain where there is no terminal."""

import codecs
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from minitron_megatron.claims import number_of
from minitron_megatron.plain_text import escaped, one_line
from minitron_megatron.readers import leave_lost_readers

log = logging.getLogger(__name__)
# Without a terminal a bar cannot move: say how far it is now and then instead.
SECONDS_BETWEEN_LINES = 15.0
# What takes less needs no word.
SECONDS_OF_SILENCE = 1.5
# Columns of a terminal that progress needs to show all it has; what a table's column has for words at the least.
_ROOM_FOR_BARS, _WORD = 90, 8
# Without a terminal: columns of what is printed, and as few as COLUMNS may say.
_WIDTH, _LEAST_WIDTH = 120, 20
# How signs that this program writes look without UTF-8.
_SIGNS = "▶ ◀ → … × · ≤ ≥ ± − – — ² ³ ᵀ ₁ ₂ ⁻ ‖ Σ σ α β √ ∞ µ “ ” ‘ ’".split()
_WORDS = "> < -> ... x . <= >= +- - - - ^2 ^3 ^T 1 2 ^- || sum sigma alpha beta sqrt inf u \" \" ' '".split()
_SPELLINGS = {
    **dict.fromkeys("─━═┄", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇┠┨┯┷┿╋┳┻╺╸╭╮╰╯", "+"),
    **dict(zip(_SIGNS, _WORDS, strict=True)),
    "\N{NO-BREAK SPACE}": " ",
}


def speaks() -> bool:
    """Whether this process is the one that prints (rank 0 of a torchrun job, or the only process)."""
    return number_of("RANK", 0) == 0


def write_anywhere() -> None:
    """Have standard output and error take every text, whatever the terminal's encoding: what it lacks is spelled in ASCII."""
    codecs.register_error("in_ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="in_ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: nearest spelling of what could not be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    odd = error.object[error.start : error.end]
    return "".join(_SPELLINGS.get(character, "?") for character in odd), error.end


def console(width: int = _WIDTH) -> Console:
    """A console on standard output; where there is no terminal, as wide as COLUMNS says, else `width`: logs are read wide."""
    plain = _Console()
    return plain if plain.is_terminal else _Console(width=max(_LEAST_WIDTH, number_of("COLUMNS", width)))


class _Console(Console):
    """A console to which text is text: nothing in it is markup, an emoji's name or a word to the terminal."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(escaped(text), **{**how, "markup": False, "emoji": False})

    def on_broken_pipe(self) -> None:
        """Work outlives who reads of it: rich would end the program."""
        leave_lost_readers()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table under its title; numbers to the right. Titles, numbers and paths are never broken.

    Where the terminal is too narrow for the columns, each row is a table of its own, or a few lines.
    """
    if not speaks():
        return
    screen = console()

    def say(text: str, **how: Any) -> None:
        screen.print(text, highlight=False, soft_wrap=True, **how)

    say(title, style="bold")
    if table := _table(columns, rows, screen.width):
        screen.print(table)
        return
    pairs = [list(zip(columns[1:], row[1:], strict=True)) for row in rows]
    names = [format_value(row[0]) for row in rows]
    if len(columns) == 2:
        for name, ((_, value),) in zip(names, pairs, strict=True):
            say(f"  {name}  {format_value(value)}")
        return
    tables = [_table([columns[0], name], found, screen.width) for name, found in zip(names, pairs, strict=True)]
    for name, found, table in zip(names, pairs, tables, strict=True):
        if all(tables):
            screen.print(table)
            continue
        say(f"{columns[0]}  {name}" if columns[0] else name)
        for column, value in found:
            say(f"  {column}  {format_value(value)}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], width: int) -> Table | None:
    """A table that is at most so wide; None where that would break a number or a path."""
    table = Table()
    least, most = [], []
    for i, column in enumerate(columns):
        values = [row[i] for row in rows]
        numeric = i > 0 and all(isinstance(value, int | float) for value in values)
        longest = max((_length(format_value(value)) for value in values), default=1)
        most.append(max(longest, _length(column)))
        least.append(max(longest if numeric else min(_WORD, most[-1]), *map(_narrowest, [column, *values])))
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    # Two blanks and a line a column, and a line.
    room = width - 3 * len(columns) - 1
    if sum(least) > room:
        return None
    if sum(most) > room:
        for column, size in zip(table.columns, _shares(least, most, room), strict=True):
            column.width = size
    for row in rows:
        table.add_row(*(format_value(value) for value in row))
    return table


def _length(text: str) -> int:
    """Columns of a terminal that a text takes in its longest line."""
    return max(map(cell_len, escaped(text).split("\n")))


def _narrowest(value: object) -> int:
    """Columns that a cell needs so that no number and no path in it is broken."""
    text = format_value(value)
    whole = [text] if isinstance(value, Path) else [w for w in text.split() if "/" in w or w.lstrip("-")[:1].isdigit()]
    return max(map(_length, whole), default=0)


def _shares(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths of columns that want more than there is: the least, and of what is left as much for each as for another."""
    sizes = list(least)
    while left := [i for i, size in enumerate(sizes) if size < most[i]][: room - sum(sizes)]:
        for i in left:
            sizes[i] += 1
    return sizes


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same as Markdown, a line a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (" ".join(format_value(value).split()).replace("|", "\\|") for value in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_value(value: object) -> str:
    """A number with thousands separators or four significant figures; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1e4):
        return f"{int(value):,}"
    return f"{value:.5g}"


def format_time(seconds: object) -> str:
    """Seconds in the largest unit of which there are two; a dash for what is no number."""
    if not isinstance(seconds, int | float):
        return "–"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def format_gib(gib: float) -> str:
    """Memory or disk space, in GiB; below one in MiB."""
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{1024 * gib:,.0f} MiB"


@contextmanager
def progress(
    description: str, total: int, *, unit: str = "", made: str = "", done: int = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar over `total` units (`unit="B"` shows bytes and their rate), `done` of them by an earlier run.

    Yields `advance(n, made=0)`, which moves it on by n units; where something else comes out of them (`made="tokens"`), its
    rate is shown too.
    """
    if not speaks():
        yield lambda n, made=0: None
        return
    screen = console()
    rate = _Rate(made)
    if not screen.is_terminal:
        yield _lines(description, total, unit, done, rate)
        return
    counts = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn()]
    with bars_with(screen, *counts, TextColumn("{task.fields[rate]}", markup=False)) as bars:
        task = bars.add_task(one_line(description), total=total, completed=done, rate="")

        def advance(n: int, made: int = 0) -> None:
            bars.update(task, advance=n, rate=rate.add(made))

        yield advance


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what is going on where nothing can be counted, once it has taken more than a moment."""
    timer = threading.Timer(SECONDS_OF_SILENCE, log.info, ("%s …", what))
    timer.daemon = True
    if speaks():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bars_with(screen: Console, *columns: ProgressColumn, disable: bool = False) -> Progress:
    """Progress bars that show `columns` too. A narrow terminal has no room for the bar itself and for what has passed."""
    narrow = screen.width < _ROOM_FOR_BARS
    return Progress(
        TextColumn("{task.description}", markup=False),
        *([] if narrow else [BarColumn()]),
        *columns,
        *([] if narrow else [TimeElapsedColumn()]),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=screen,
        disable=disable,
    )


class _Rate:
    """How much of something is made a second since the start, in words; nothing where it has no name."""

    def __init__(self, name: str) -> None:
        self.name, self.made, self.began = name, 0, time.monotonic()

    def add(self, made: int) -> str:
        self.made += made
        return f"{self.made / max(time.monotonic() - self.began, 1e-9):,.0f} {self.name}/s" if self.name else ""


def _lines(description: str, total: int, unit: str, before: int, rate: _Rate) -> Callable[..., None]:
    done, last = before, time.monotonic()

    def advance(n: int, made: int = 0) -> None:
        nonlocal done, last
        done += n
        words = rate.add(made)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = (last - rate.began) * (total - done) / max(done - before, 1)
            of = f"{100 * done / max(total, 1):.0f} % of {total:,} {unit}".rstrip()
            log.info("%s", ", ".join(part for part in (f"{description}: {of}", words, f"{left:,.0f} s left") if part))

    return advance
