"""Names of folders and words of files are shown as they are, wherever they are shown; nothing in them is obeyed."""

import io
import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron import console
from minitron_megatron.cli.logs import _PlainLines
from minitron_megatron.ending import reason_of
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import ROOT
from minitron_megatron.plain_text import escaped, one_line

HOSTILE = [
    "[/]",
    "x[/red]",
    "[red]x",
    ":smile:",
    "\x1b[31m",
    "\x1b]0;T\x07",
    "a\rb",
    "\u202egpj",
    "\udc80",
    "[link=x]",
    "\\[",
]
# Short, so that no cell is folded.
names = st.one_of(st.sampled_from(HOSTILE), st.text("[]/:\\red \x1b\x07\x9b\u202e\ud800smile", min_size=1, max_size=12))


def shown(show) -> str:
    """What is written to a terminal, without the colours that are ours."""
    out = io.StringIO()

    class Terminal(console._Console):
        def __init__(self, width: int | None = None) -> None:
            super().__init__(width=200)
            self.file = out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_Console", Terminal)
        show()
    return out.getvalue()


@given(names)
def test_text_is_text_in_tables_titles_and_lines(name):
    whole = escaped(name).strip()
    table = shown(lambda: console.print_table(f"<{name}>", ["", name], [["a", name], [name, 1]]))
    line = shown(lambda: console.console().print(f"<{name}>", highlight=False))
    for text in (table, line):
        text.encode()
        assert f"<{escaped(name)}>" in text
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert table.count(whole) >= 3


@given(names)
def test_text_is_text_in_progress_and_logs(name):
    def show() -> None:
        bars = console.bars_with(console.Console(file=io.StringIO(), force_terminal=True, width=200))
        bars.add_task(one_line(name), total=2)
        with bars.console.capture() as captured:
            bars.console.print(bars.get_renderable())
        assert one_line(name).strip() in captured.get()

    show()
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (name,), None)
    assert _PlainLines("%(message)s").format(record) == escaped(name)


@given(st.text())
def test_a_mistake_is_one_line_whatever_is_in_it(text):
    said = reason_of(UserError(text)).text
    assert len(said.splitlines()) <= 1
    said.encode()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=null"], "seed=null: it needs a value"),
        (["trainer=null"], "trainer=null: it needs a value"),
        (["data=null"], "data=null: it needs a value"),
        (["seed=" + "9" * 5000], "seed= has a number of more than 300 digits"),
        (["output=${seed}"], "has an interpolation"),
        (["teacher=a\nb"], "a\\nb does not exist"),
        (["teacher=~t"], "~t does not exist"),
        (["chain=~t.yaml"], "chain=~t.yaml"),
    ],
)
def test_odd_values_are_mistakes_in_one_line(tmp_path, words, says):
    given = {word.partition("=")[0] for word in words}
    usual = ["teacher=x", "student=x", "data.path=x", "output=x", "trainer.steps=1"]
    if words[0].startswith("chain"):
        usual = ["model=x", "output=x"]
    usual = [word for word in usual if not {word.partition("=")[0], word.partition(".")[0]} & given]
    program = [sys.executable, str(ROOT / "launch" / f"{'compress' if 'chain' in given else 'distill'}.py")]
    done = subprocess.run([*program, *usual, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["[/]", "x[/red]", "\x1b[31m", "a\nb"])
def test_a_folder_of_any_name_has_a_status(tmp_path, name):
    (tmp_path / name.replace("/", "_") / "out").mkdir(parents=True)
    inside = tmp_path / name
    inside.mkdir(parents=True, exist_ok=True)
    for one in ("a", "b"):
        (inside / one).mkdir()
        (inside / one / "stages.json").write_text("{}")
    words = [sys.executable, "-m", "minitron_megatron", "status", f"folder={inside}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ}, check=False)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert "stages" in done.stdout
