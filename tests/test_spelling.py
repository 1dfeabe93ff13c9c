"""Commands in what is printed are spelt as the one that prints was started, whatever is in front of it."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron import stages
from minitron_megatron.cli import spelling
from minitron_megatron.demo_plan import make_plan
from minitron_megatron.errors import UserError
from minitron_megatron.plain_text import commented
from tests.test_commands import ROOT
from tests.test_demo import VERY_SLOW

# What reads or writes paths of launch/ itself.
READS_PATHS = {"cli/main.py", "cli/spelling.py", "report/folders.py", "report/lineage.py", "status.py", "submit.py"}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """The shell finds this Python and what pip installed beside it."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def texts(file: Path) -> list[str]:
    """Strings of a module, without its docstrings; of f-strings their parts."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    heads = [node.body[0] for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [head.value for head in heads if isinstance(head, ast.Expr)]
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if not any(node is one for one in docstrings)]


def test_no_text_says_how_commands_are_started():
    """A user of an installed package has neither launch/ nor slurm/ nor a Makefile: names come from spelling.py."""
    package = ROOT / "minitron_megatron"
    for file in package.rglob("*.py"):
        if str(file.relative_to(package)) not in READS_PATHS:
            found = [text for text in texts(file) if "launch/" in text or "slurm/" in text]
            assert not found, (file, found)


def minitron() -> list[str]:
    there = (Path(sys.executable).parent / "minitron").is_file()
    return ["minitron"] if there else ["python", "-m", "minitron_megatron"]


@pytest.mark.parametrize(
    ("typed", "called", "words"),
    [
        ("minitron compress", "minitron prune", None),
        ("launch/compress.py", "launch/prune.py", ["python", "launch/prune.py"]),
        ("../a b/launch/compress.py", "launch/prune.py", ["python", "../a b/launch/prune.py"]),
        ("/usr/bin/pytest", "minitron prune", None),
    ],
)
def test_a_command_is_spelt_as_this_one(monkeypatch, typed, called, words):
    monkeypatch.setattr(spelling, "TYPED", [typed, "model=a b"])
    words = words or [*minitron(), "prune"]
    assert spelling.called("prune") == called
    assert spelling.program_words("prune") == words
    assert Path(spelling.script("compress.sh")).is_absolute() == ("launch" not in typed)
    assert spelling.script("compress.sh").endswith("slurm/compress.sh")
    assert shlex.split(spelling.line_of("prune", ["model=a b"])) == [*words, "model=a b"]
    assert spelling.program_words("prune", 2) == [*minitron(), "--nproc-per-node", "2", "prune"]
    start = "minitron --nproc-per-node {processes}"
    assert stages.stage_words(start, 1, "prune") == words
    assert stages.stage_words(start, 2, "prune") == [*minitron(), "--nproc-per-node", "2", "prune"]
    launched = stages.stage_words("srun -n {processes} python", 2, "prune")
    assert launched == [
        "srun",
        "-n",
        "2",
        "python",
        *(words[1:] if "launch" in typed else ["-m", "minitron_megatron", "prune"]),
    ]
    # Whatever the shell finds, this Python runs it.
    assert stages.runnable(words)[0] == sys.executable or stages.runnable(words)[0].startswith(
        str(Path(sys.executable).parent)
    )


ODD_NAMES = [
    "o/n\nl/m",
    "x: 1\ny: 2",
    "it's\n\\",
    "\x85a",
    "a\u2028b",
    "\x1b[31m",
    "\udcc3\udcbc",
    "a\tb",
    "plain",
    "a b'c",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_line_to_paste_is_one_line_and_names_the_same_folder(name):
    line = spelling.line_of("prune", [f"model={name}"])
    assert len(line.splitlines()) == 1 and commented(line) == f"# {line}\n"
    said = subprocess.run(["bash", "-c", f"printf %s {spelling.quoted(name)}"], capture_output=True, check=True).stdout
    assert said == os.fsencode(name)


@given(st.text())
def test_a_head_is_no_part_of_the_yaml_that_follows(name):
    head = commented(f"of {name}", spelling.line_of("prune", [f"model={name}"]))
    assert yaml.safe_load(head + "num_layers: 3\n") == {"num_layers": 3}
    assert head.encode() and all(line.startswith("# ") for line in head.splitlines())


def test_lines_and_heads_are_written_in_one_place():
    """Words of a user go into lines for the shell by spelling.py, into heads of files by commented()."""
    package = ROOT / "minitron_megatron"
    for file in package.rglob("*.py"):
        text, name = file.read_text(encoding="utf-8"), str(file.relative_to(package))
        assert "shlex.join" not in text or name == "cli/spelling.py", name
        heads = re.findall(r'f"#+ [^"]*{', text)
        assert not heads or name in {"plain_text.py", "report/page.py", "checkpoints/megatron_lm.py"}, (name, heads)


@pytest.mark.parametrize(
    ("typed", "advice"),
    [("minitron demo", "them with minitron demo minutes="), ("launch/demo.py", "them with make demo MINUTES=")],
)
def test_the_demo_advises_what_there_is(monkeypatch, typed, advice):
    monkeypatch.setattr(spelling, "TYPED", [typed])
    with pytest.raises(UserError) as error:
        make_plan(VERY_SLOW, 1)
    assert advice in str(error.value) and ("make" in str(error.value)) == ("launch" in typed)
