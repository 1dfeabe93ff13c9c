"""Tables in terminals of any width: numbers, titles and paths stay whole, and what has borders fits."""

import io
import time
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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1234567, "1,234,567"), (0, "0"), (True, "True"), (None, "None"), ("a", "a"), (Path("a/b"), "a/b"), (1.0, "1"),
        (9999.0, "9999"), (10000.0, "10,000"), (-10000.0, "-10,000"), (10000.5, "10000"), (1.234567, "1.2346"), (1e-7, "1e-07"),
    ],
)  # fmt: skip
def test_numbers_have_separators_or_five_figures(value, said):
    assert console.format_value(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "–"), ("1", "–"), (0, "0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h"),
     (172799, "48.0 h"), (172800, "2.0 days"), (86400 * 2000, "2,000.0 days")],
)  # fmt: skip
def test_times_are_in_the_largest_unit_of_which_there_are_two(seconds, said):
    assert console.format_time(seconds) == said


def test_a_table_in_markdown_is_a_line_a_row():
    rows = [["a|b\nc", 1234], ["d  e", 0.5]]
    assert console.markdown_table(["x", "y"], rows) == "| x | y |\n|---|---|\n| a\\|b c | 1,234 |\n| d e | 0.5 |"


def test_what_a_terminal_lacks_is_spelt_or_a_question_mark():
    error = UnicodeEncodeError("ascii", "a→β漢x", 1, 4, "odd")
    assert console._in_ascii(error) == ("->beta?", 4)
    with pytest.raises(UnicodeDecodeError):
        console._in_ascii(UnicodeDecodeError("ascii", b"\xff", 0, 1, "odd"))
    # Each sign has its own.
    assert console._SPELLINGS["≤"] == "<=" and console._SPELLINGS["┃"] == "|" and console._SPELLINGS["╸"] == "+"
    assert console._SPELLINGS["“"] == '"' and console._SPELLINGS["’"] == "'" and console._SPELLINGS["━"] == "-"


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, caplog):
    """Of a total, with the rate of what is made, and what is left at the pace of this start alone."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"), console.progress("reading", 2000, unit="B", made="tokens", done=1000) as advance:
        now[0] = 115.0
        advance(100, made=300)
        assert caplog.messages == []
        now[0] = 120.0
        advance(100, made=1700)
        assert caplog.messages == ["reading: 60 % of 2,000 B, 100 tokens/s, 80 s left"]
        now[0] = 135.0
        advance(100)
        assert len(caplog.messages) == 1
        now[0] = 135.5
        advance(700, made=1)
        assert caplog.messages[1] == "reading: 100 % of 2,000 B, 56 tokens/s, 0 s left"
    with caplog.at_level("INFO"), console.progress("odd", 0) as advance:
        now[0] = 200.0
        advance(0)
    assert caplog.messages[2] == "odd: 0 % of 0, 0 s left"
    monkeypatch.setenv("RANK", "1")
    with console.progress("reading", 10) as advance:
        now[0] = 900.0
        advance(10, made=3)
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_what_takes_long_is_said_once_by_one_rank(monkeypatch, caplog, rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(console, "SECONDS_OF_SILENCE", 0.01)
    with caplog.at_level("INFO"), console.busy("waiting"):
        time.sleep(0.1)
    assert caplog.messages == ["waiting …"] * said
    with console.busy("short"):
        pass
    time.sleep(0.05)
    assert "short" not in caplog.text


@pytest.mark.parametrize(("width", "columns"), [(89, 3), (90, 5)])
def test_a_narrow_terminal_has_no_bar(width, columns):
    bars = console.bars_with(console._Console(width=width))
    assert len(bars.columns) == columns


@pytest.mark.parametrize(
    ("cell", "least"),
    [("a bc/de fgh", 5), (Path("a b/c d"), 7), ("word -12x z", 4), ("words", 0), ("", 0), (12345, 6), ("a\nb/cc", 4)],
)
def test_what_of_a_cell_may_not_be_broken(cell, least):
    assert console._narrowest(cell) == least


def test_a_table_too_wide_is_one_for_each_row_or_lines():
    columns, rows = ["name", "path", "n"], [["a", Path("x" * 30), 5], ["b", Path("y" * 10), 6]]
    first = next(line for line in shown(60, "t", columns, rows) if "x" in line)
    assert first.split("│")[1:3] == [" a    ", f" {'x' * 30} "]
    lines = shown(30, "t", columns, rows)
    assert lines == ["t", "name  a", f"  path  {'x' * 30}", "  n  5", "name  b", f"  path  {'y' * 10}", "  n  6"]
    assert shown(20, "t", ["name", "n"], [["a", 10**20], ["b", 7]]) == ["t", f"  a  {10**20:,}", "  b  7"]
