"""What each command says is next: pasted into a shell it runs, whatever the paths are called."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.cli import next_command
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.next_command import NEXT, Next, free_name, line_of
from minitron_megatron.config import ImportanceConfig, ParallelConfig
from minitron_megatron.words import word
from tests.test_commands import ROOT, environment, run
from tests.tiny import TEXT, hf_model, save_hf

# What a command itself says is next, or that nothing is.
SAY_IT_THEMSELVES = {"demo", "submit", "benchmark", "status"}
ODD = "it's a $HOME, {odd} [name]"


def test_every_command_has_its_next():
    assert set(COMMANDS) == set(NEXT) | SAY_IT_THEMSELVES


def config(tmp_path: Path, **options) -> ImportanceConfig:
    return ImportanceConfig(output=str(tmp_path / "there"), **options)


def test_words_are_quoted_for_the_shell_and_for_hydra(tmp_path):
    found = Next("report", {"folders": [f"{ODD}/a", "plain/b"]}, "report")
    words = shlex.split(line_of(found, config(tmp_path)))
    assert words[-2] == "folders=['" + ODD.replace("'", "\\'") + "/a',plain/b]"
    assert words[-1] == f"output={tmp_path / 'report'}"
    assert (word(0.6e9), word(True), word({"a": 3})) == ("600000000", "true", "{a: 3}")


def test_an_output_that_is_there_is_not_named_again(tmp_path):
    assert free_name(tmp_path / "scores") == tmp_path / "scores"
    for made, then in (("scores", "scores_2"), ("scores_2", "scores_3")):
        (tmp_path / made).mkdir()
        assert free_name(tmp_path / "scores") == tmp_path / then


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_started_as_this_one_was(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(sys, "argv", ["launch/importance.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    given = config(tmp_path, parallel=ParallelConfig(tensor=2, sequence=True), device="cpu")
    prune = line_of(Next("prune", {"model": "m"}, "pruned"), given)
    search = line_of(Next("search", {"model": "m"}, "found"), given)
    many = "--nproc-per-node 2 launch/prune.py" if processes == 2 else "python launch/prune.py"
    assert many in prune and "parallel.tensor=2 parallel.sequence=true device=cpu" in prune
    assert search == f"python launch/search.py model=m output={tmp_path / 'found'}"


def test_a_python_that_the_shell_does_not_find_has_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/importance.py"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert line_of(Next("search", {}, "found"), config(tmp_path)).startswith(f"{shlex.quote(sys.executable)} launch/")


def test_stages_dry_runs_and_folders_that_went_away_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NEXT, "importance", lambda cfg: Next("search", {}, "found"))
    next_command.show_next("importance", config(tmp_path, dry_run=True))
    monkeypatch.setenv("MINITRON_STAGE", "1")
    next_command.show_next("importance", config(tmp_path))
    monkeypatch.delenv("MINITRON_STAGE")
    monkeypatch.setitem(NEXT, "importance", lambda cfg: next_command._shape(tmp_path / "gone"))
    next_command.show_next("importance", config(tmp_path))
    assert capsys.readouterr().out == ""


def last_line(printed: str) -> str:
    lines = printed.rstrip().splitlines()
    assert lines[-2] == "Next:", printed
    return lines[-1].strip()


def paste(line: str, folder: Path) -> str:
    """Run a line as a shell does that has this Python first; gives what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment(), "PATH": path},
        check=False,
    )
    assert shell.returncode == 0, (line, shell.stdout, shell.stderr)
    return shell.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_the_whole_road_by_pasting_what_is_said(tmp_path, processes):
    """From an import to a loaded export; only the text has to be filled in."""
    folder = tmp_path / ODD
    save_hf(hf_model(spread=0.02, max_position_embeddings=64), folder / "hf")
    (folder / "text.md").write_text("\n\n".join(f"{number}. {TEXT * 3}" for number in range(40)))
    printed = run("import_hf", f"hf={folder / 'hf'}", f"output={folder / 'teacher'}").stdout
    line = last_line(printed)
    assert "launch/prepare_data.py" in line and "input=TEXT.jsonl" in line
    printed = paste(line.replace("TEXT.jsonl", "text.md"), folder)
    commands = ["importance", "search", "prune", "distill", "evaluate", "export_hf"]
    for command in commands:
        line = last_line(printed)
        assert f"launch/{command}.py" in line
        if processes and command == "importance":
            line = line.replace("python ", f"torchrun --nproc-per-node {processes} ", 1)
        if command == "distill":
            line += " logger.wandb=disabled"
        printed = paste(line, folder)
        if processes and command in ("search", "prune"):
            assert "--nproc-per-node 2" in last_line(printed)
    loads = last_line(printed)
    assert "pipeline('text-generation'" in loads.replace("'\"'\"'", "'") and str(ROOT) not in loads
    paste(loads, folder)
