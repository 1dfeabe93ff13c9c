"""Tables in terminals of any width: numbers, titles and paths stay whole, and what has borders fits."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron import console
from minitron_megatron.cli.help import show_help
from minitron_megatron.config import PruneConfig

PARTS = st.text("abcdefgh_0123", min_size=1, max_size=30)
PATHS = st.lists(PARTS, min_size=2, max_size=8).map("/".join)
CELLS = st.one_of(PATHS, st.integers(-(10**12), 10**12), PARTS, st.just("some words that may be taken apart " * 5))


def shown(width: int, *table) -> list[str]:
    """The lines of a table in a terminal of so many columns."""
    out, terminal = io.StringIO(), console._Console(width=width)
    terminal.file = out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "console", lambda: terminal)
        console.print_table(*table)
    return out.getvalue().splitlines()


@given(st.data(), st.integers(20, 160), PATHS, st.integers(2, 8), st.integers(0, 4))
def test_what_must_stay_whole_does(data, width, title, columns, rows):
    names = [f"c{i}" for i in range(columns)]
    cells = [[data.draw(CELLS) for _ in names] for _ in range(rows)]
    lines = shown(width, title, names, cells)
    assert lines[0] == title
    for cell in (cell for row in cells for cell in row):
        if "words" not in str(cell) and (isinstance(cell, int) or "/" in cell):
            assert any(console.format_value(cell) in line for line in lines), cell
    assert all(len(line) <= width for line in lines if line[:1] in "│┃┏└┡")


def test_a_path_with_blanks_is_whole_where_it_is_a_path():
    path = Path("/a folder with blanks/and another one")
    for width in (30, 60, 200):
        assert any(str(path) in line for line in shown(width, "t", ["", "it", "words"], [["a", path, "word " * 30]]))


def test_room_is_shared_by_what_wants_it():
    assert console._shares([3, 3, 8], [3, 40, 8], 30) == [3, 19, 8]
    assert console._shares([1, 1], [9, 9], 9) == [5, 4]
    assert console._shares([2, 2], [2, 3], 9) == [2, 3]


@pytest.mark.parametrize(
    ("columns", "width", "of_help"),
    [("60", 60, 60), ("200", 200, 200), ("", 120, 100), ("x", 120, 100), ("0", 20, 20), (None, 120, 100)],
)
def test_what_is_piped_is_as_wide_as_columns_says(monkeypatch, capsys, columns, width, of_help):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert console.console().width == width
    show_help("prune", PruneConfig)
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith((" ", "target=", "model="))]
    assert max(map(len, shown)) <= of_help


@pytest.mark.parametrize(
    ("gib", "words"), [(0.0, "0 MiB"), (0.03, "31 MiB"), (0.999, "1,023 MiB"), (1, "1.0 GiB"), (2048, "2,048.0 GiB")]
)
def test_little_memory_is_told_in_mib(gib, words):
    assert console.format_gib(gib) == words
