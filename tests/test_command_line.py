"""The command line before a command: its words taken apart, which command, in how many processes, and what is checked here."""

import os
import runpy
import sys
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron import __version__, ending, launcher
from minitron_megatron.cli import help as help_pages
from minitron_megatron.cli import logs, main, starting
from minitron_megatron.cli.arguments import (
    _depth,
    _takes_list,
    _takes_text,
    as_override,
    check_words,
    is_for_hydra,
    is_override,
    words_after_dashes,
    words_that_stand_alone,
)
from minitron_megatron.cli.commands import COMMANDS, Command
from minitron_megatron.cli.flags import check_flags
from minitron_megatron.config import (
    CompressConfig,
    DistillConfig,
    EvaluateConfig,
    LayersConfig,
    PruneConfig,
    SearchConfig,
    ThroughputConfig,
    options,
)
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import ROOT, typed_options


def test_each_file_of_launch_starts_its_own_command(monkeypatch):
    """And nothing where it is imported."""
    started = []
    monkeypatch.setattr(main, "command", started.append)
    for file in sorted((ROOT / "launch").glob("*.py")):
        runpy.run_path(str(file), run_name="imported")
        assert started == []
        runpy.run_path(str(file), run_name="__main__")
        assert started == [file.stem]
        started.clear()


# Words

WRONG = {
    "--model=x": "--model=x: options have no dashes: write model=x",
    "--model x": "--model: options have no dashes: write model=x",
    "-model=x": "-model=x: options have no dashes: write model=x",
    "--dry-run": "--dry-run: options have no dashes: write dry_run=true",
    "--dry_run output=x": "--dry_run: options have no dashes: write dry_run=true",
    "--target.hidden-size 8": "--target.hidden-size: options have no dashes: write target.hidden_size=8",
    "--output": "--output: options have no dashes: write output=…",
    "-v": "-v is no option of launch/prune.py: options are written name=value, without dashes; --help lists all",
    "-o x": "-o is no option of launch/prune.py: options are written",
    "--outputs x": "--outputs is no option of launch/prune.py: did you mean output=x? options are written",
    "model X": "model is an option: write model=X",
    "model = X": "model is an option: write model=X",
    "model =X": "model is an option: write model=X",
    "model": "model is an option: write model=…",
    "target width": "target is an option: write target=width",
    "model= X": "model= X has a blank in it: write model=X",
    "extra": "extra is no option of launch/prune.py: options are written name=value; --help lists all",
    "modle X": "modle is no option of launch/prune.py: did you mean model=X? options are written",
    "a=1 ": "'' is no option of launch/prune.py",
    "--cfg": "--cfg needs one of job, hydra, all, as in --cfg job",
    "--cfg jobs": "--cfg needs one of job, hydra, all",
    "-cp": "-cp needs a word after it",
    "--nproc-per-node 2": "--nproc-per-node is no option of launch/prune.py: several processes are started as minitron "
    "--nproc-per-node 2 prune …",
    "--nproc=2": "--nproc=2 is no option of launch/prune.py: several processes are started as minitron --nproc-per-node 2 prune",
    "--standalone": "several processes are started as minitron --standalone prune …",
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_word_that_sets_no_option_is_told_how_it_is_written(monkeypatch, typed):
    monkeypatch.setattr("minitron_megatron.cli.spelling.TYPED", ["launch/prune.py"])
    with pytest.raises(UserError) as error:
        check_flags(typed.split(" "), "prune", PruneConfig)
    assert WRONG[typed] in str(error.value) and "quotes" not in str(error.value)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_any_option_with_dashes_or_blanks_is_told_how_it_is_written(name):
    """And the advice is taken."""
    kind = COMMANDS[name].config
    for option in options(kind):
        for words in ([f"--{option.name}=1"], [f"--{option.name.replace('_', '-')}", "1"], [option.name, "1"]):
            with pytest.raises(UserError) as error:
                check_flags(words, name, kind)
            advised = str(error.value).rpartition("write ")[2]
            assert advised == f"{option.name}=1"
            check_flags([advised], name, kind)


def test_flags_of_hydra_are_kept():
    for typed in (
        "--cfg job", "-c all model=x", "--cfg=job --resolve", "--package optim --cfg job", "-m seed=1,2", "--multirun",
        "--info", "-i defaults a=1", "--info=plugins", "-h", "--hydra-help", "-cd /x", "-sc install=bash", "a=1 --", "~a",
    ):  # fmt: skip
        check_flags(typed.split(), "prune", PruneConfig)


def test_the_version_is_this_softwares(minitron, monkeypatch, capsys):
    minitron("--version")
    monkeypatch.setattr(sys, "argv", ["launch/prune.py", "--version"])
    launcher.command(COMMANDS["prune"])
    assert capsys.readouterr().out == f"{__version__}\n" * 2


def test_what_is_said_of_a_check_is_left_to_the_ranks(monkeypatch, capsys):
    import logging

    log = logging.getLogger("minitron_megatron.x")
    fine = Command("prune", PruneConfig, "", "")
    monkeypatch.setattr(Command, "only_check", lambda *_: log.warning("all of them are taken"))
    monkeypatch.setattr(launcher, "_checked", lambda *_: SimpleNamespace(output="o", dry_run=True))
    for name in ("_lacking", "given_options", "idle_options"):
        monkeypatch.setattr(launcher, name, lambda *_: [])
    monkeypatch.setattr(launcher, "settle_lengths", lambda _: "")
    launcher._run(fine, None, frozenset(), only_check=True)
    assert "taken" not in capsys.readouterr().out
    log.warning("later")
    assert "later" in capsys.readouterr().out


def test_where_only_the_words_are_checked_hydras_flags_start_nothing(monkeypatch):
    monkeypatch.setattr(launcher, "_hydras_main", lambda *_: pytest.fail("it runs"))
    for words in (["-m", "seed=1,2"], ["hydra.job.name=x"]):
        monkeypatch.setattr(sys, "argv", ["prune", *words])
        launcher.command(COMMANDS["prune"], only_check=True)
    monkeypatch.setattr(sys, "argv", ["prune", "-m", "--seed=1,2"])
    with pytest.raises(UserError, match="options have no dashes"):
        launcher.command(COMMANDS["prune"], only_check=True)


@pytest.mark.parametrize(
    ("words", "start", "rest"),
    [
        ("prune a=1", "", "prune a=1"),
        ("--nproc-per-node 8 prune a=1", "--nproc-per-node 8", "prune a=1"),
        ("--nproc_per_node=8 prune --nnodes 2 a=1", "--nproc_per_node=8 --nnodes 2", "prune a=1"),
        ("prune --standalone a=1", "--standalone", "prune a=1"),
        ("--standalone=1 prune", "--standalone=1", "prune"),
        ("prune --help", "", "prune --help"),
    ],
)
def test_torchruns_options_are_told_from_the_commands(words, start, rest):
    assert main.split(words.split()) == (start.split(), rest.split())


def test_an_option_of_torchrun_needs_its_value():
    with pytest.raises(UserError, match="--nnodes needs a value, as in --nnodes 8"):
        main.split(["prune", "--nnodes"])
    assert main._values(["--nproc_per_node=8", "--nnodes", "2", "--standalone", "--rdzv-id", "x=y"]) == {
        "--nproc-per-node": "8", "--nnodes": "2", "--standalone": "", "--rdzv-id": "x=y",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "name"),
    [("prune", "prune"), ("launch/prune.py", "prune"), ("/a/launch/prune.py", "prune"), ("prune.py", "prune"),
     ("prone", "did you mean prune?"), ("--nproc", "--nproc is no option of minitron: did you mean --nproc-per-node? minitron"),
     ("--quiet", "--quiet is no option of minitron: minitron --help"),
     ("zzzzzz", "there is no command 'zzzzzz': minitron --help")],
)  # fmt: skip
def test_a_command_is_named_or_the_nearest_is_told(word, name):
    if name == "prune":
        assert main.find(word) == name
    else:
        with pytest.raises(UserError) as error:
            main.find(word)
        assert name in str(error.value)


@pytest.fixture
def minitron(monkeypatch):
    """Gives what `minitron WORDS` does: what ran here, and with what torchrun was started."""
    monkeypatch.setattr(main, "ends_in_one_line", nullcontext)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def started(*words: str):
        seen = {"ran": [], "checked": [], "launched": None, "typed": None}

        def run(name, *, only_check=False):
            seen["checked" if only_check else "ran"].append((name, os.environ.get("WORLD_SIZE")))
            seen["typed"] = list(sys.argv)

        def launch(words):
            seen["launched"] = words
            raise SystemExit(0)

        monkeypatch.setattr(main, "run", run)
        monkeypatch.setattr(main, "_start", launch)
        monkeypatch.setattr(sys, "argv", ["minitron", *words])
        with suppress(SystemExit):
            main.main()
        return SimpleNamespace(**seen)

    return started


def test_one_process_runs_here_and_several_are_checked_here_first(minitron):
    one = minitron("prune", "a=1")
    assert (one.ran, one.checked, one.launched, one.typed) == ([("prune", None)], [], None, ["minitron prune", "a=1"])
    many = minitron("--nproc-per-node", "4", "--nnodes", "2", "prune", "a=1")
    start = ["--nproc-per-node", "4", "--nnodes", "2", "-m", "minitron_megatron", "prune", "a=1"]
    assert (many.ran, many.checked, many.launched) == ([], [("prune", "8")], start)
    assert sys.argv == ["minitron prune", "a=1"] and "WORLD_SIZE" not in os.environ
    # What cannot be known before they start is not checked here.
    for start in (["--nproc-per-node", "gpu"], ["--nnodes", "1:2"]):
        left = minitron(*start, "prune")
        assert (left.checked, left.launched) == ([], [*start, "-m", "minitron_megatron", "prune"])
    # Of several configs the words alone are.
    assert minitron("--nproc-per-node", "2", "prune", "-m").checked == [("prune", "2")]
    assert minitron("--standalone", "prune", "--", "x").checked == [("prune", "1")]
    helped = minitron("--nproc-per-node", "2", "prune", "--help")
    assert (helped.ran, helped.launched) == ([("prune", None)], None)


def test_a_module_of_this_softwares_own_is_torchruns_to_start(minitron):
    assert minitron("--nproc-per-node", "2", "-m", "minitron_megatron.demo_speed", "x").launched == [
        "--nproc-per-node", "2", "-m", "minitron_megatron.demo_speed", "x",
    ]  # fmt: skip
    for words in (["-m"], ["-m", "os.path"], ["-m", "minitron_megatronx"]):
        with pytest.raises(UserError, match="-m"):
            minitron(*words)


def test_a_rank_starts_no_processes(minitron, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^--nproc-per-node inside a job that has its processes: leave it out$"):
        minitron("--nproc-per-node", "2", "prune")
    assert minitron("prune").ran == [("prune", None)]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_with_a_line_each(minitron, capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "300")
    minitron(*words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == main._USAGE.splitlines()
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[4:]}
    assert list(listed) == list(COMMANDS) and all(listed.values())
    assert listed["status"].startswith("How outputs stand: done, running,")


def test_what_ends_a_command_is_reported_unless_it_is_a_bug_of_one_process(monkeypatch):
    seen = []
    monkeypatch.setattr(ending, "handle_signals", lambda: seen.append("handle"))
    monkeypatch.setattr(ending, "no_more_signals", lambda: seen.append("over"))
    monkeypatch.setattr(ending, "report", lambda error: seen.append(type(error).__name__) or 7)
    for several, error, ended, reported in (
        (False, UserError("x"), SystemExit, True), (False, ValueError("x"), ValueError, False),
        (True, ValueError("x"), SystemExit, True), (False, SystemExit(3), SystemExit, False),
        (False, ending.Stopped(2), SystemExit, True),
    ):  # fmt: skip
        seen.clear()
        monkeypatch.setattr(main, "several", lambda several=several: several)
        with pytest.raises(ended) as raised, main.ends_in_one_line():
            raise error
        assert seen == ["handle", *([type(error).__name__] if reported else []), "over"]
        assert ended is not SystemExit or raised.value.code == (7 if reported else 3)


# Words of a command


@pytest.mark.parametrize(
    ("word", "override", "hydras"),
    [("a=1", True, False), ("--cfg", False, False), ("--x=1", False, False), ("job", False, False),
     ("hydra.run.dir=x", True, True),
     ("+hydra.x=1", True, True), ("hydra/x=1", True, True), ("hydrant=1", True, False), ("+a=1", True, False)],
)  # fmt: skip
def test_what_sets_an_option_and_what_is_hydras(word, override, hydras):
    assert (is_override(word), is_for_hydra(word)) == (override, hydras)
    assert typed_options(["+a.b=1", "--x=2", "c", "d="]) == {"a.b", "d"}


def test_words_after_dashes_are_a_list():
    assert words_after_dashes(["a=1", "--", "b", "--", "it's"], "command") == ["a=1", r"command=['b','--','it\'s']"]
    assert words_after_dashes(["a=1"], "command") == ["a=1"] and words_after_dashes(["--"], "c") == ["c=[]"]


def test_words_that_stand_alone_are_one_value_or_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert words_that_stand_alone(["x", "seed=1", "--cfg"], "folder") == ["seed=1", "--cfg", "folder=x"]
    assert words_that_stand_alone(["x", "a=b"], "folder") == ["folder=['x','a=b']"]
    assert words_that_stand_alone(["seed=1"], "folder") == ["seed=1"]


@pytest.mark.parametrize(
    ("word", "depth"), [("", 0), ("a=b", 0), ("a=[b]", 1), ("[{(", 3), ("[a][b]", 1), ("]]][", 0), ("[[]{}]", 2)]
)
def test_depth_is_of_brackets_that_are_open_at_once(word, depth):
    assert _depth(word) == depth


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=x", "scores=y"], None), (["~model"], "~model: options cannot be deleted, only set"),
        (["model=x", "model=y"], "model= is given twice"), (["model=x", "+model=y"], "model= is given twice"),
        (["seed=" + "1" * 301], "seed= has a number of more than 300 digits"), (["seed=" + "1" * 300], None),
        (["model=${x}"], "has an interpolation"), (["model=${x}", "-m"], None), (["model=${x}", "--multirun"], None),
        (["target.hiden_size=3"], "did you mean target.hidden_size?"), (["zzzzzzz=3"], "of launch/prune.py: --help lists all"),
        (["target=mn_minitron_8"], "did you mean mn_minitron_8b?"), (["target=zzzzz"], "use one of"),
        (["target=mn_minitron_8b,zzzzz", "-m"], "target=zzzzz is not a preset of conf/target"),
        (["target=mn_minitron_8b,minitron_4b", "-m"], None), (["target={hidden_size: 3}"], None), (["prune={heads: x}"], None),
        (["hydra.run.dir=x", "hydra.run.dir=y"], None), (["--cfg", "job", "job"], None), (["model.path=x"], None),
        (["a." * 51 + "b=1"], "nested more than 50 deep"), (["model=" + "[" * 51], "model is nested more than 50 deep"),
        (["x" * 41 + "=" + "[" * 51], "x" * 40 + "… is nested"),
    ],
)  # fmt: skip
def test_words_that_are_refused(monkeypatch, words, says):
    monkeypatch.setattr("minitron_megatron.cli.spelling.TYPED", ["launch/prune.py"])
    if says is None:
        check_words(words, "prune", PruneConfig)
    else:
        with pytest.raises(UserError) as error:
            check_words(words, "prune", PruneConfig)
        assert says in str(error.value)


def test_a_folder_in_place_of_a_preset_is_told_with_what_is_in_it(tmp_path):
    with pytest.raises(UserError, match=r"it is a folder: give a preset's file, or one of "):
        check_words([f"target={tmp_path}"], "prune", PruneConfig)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "rank_01.yaml").touch()
    with pytest.raises(UserError, match=rf"give a preset's file, such as {tmp_path}/targets/rank_01.yaml, or one of "):
        check_words([f"target={tmp_path}"], "prune", PruneConfig)


@pytest.mark.parametrize(
    ("kind", "word", "override"),
    [
        (PruneConfig, "model=a/b", "model.path=a/b"),
        (PruneConfig, "model=llama3_1_8b", "model=llama3_1_8b"),
        (DistillConfig, "teacher=llama3_1_8b", "model@teacher=llama3_1_8b"),
        (DistillConfig, "student=a b", "student.path='a b'"),
        (DistillConfig, "+student=it's", r"student.path='it\'s'"),
        (PruneConfig, "scores=", "scores=''"),
        (PruneConfig, "scores='a b'", "scores='a b'"),
        (PruneConfig, "seed=3", "seed=3"),
        (PruneConfig, "--cfg", "--cfg"),
        (PruneConfig, "scores=~", f"scores={Path.home()}"),
        (PruneConfig, "scores=~/x", f"scores={Path.home()}/x"),
        (PruneConfig, "scores=~x", "scores='~x'"),
        (CompressConfig, "distill={a: 1}", "++distill={a: 1}"),
        (CompressConfig, "distill.optim.lr=1", "++distill.optim.lr=1"),
        (LayersConfig, "tasks=arc", "tasks=[arc]"),
        (LayersConfig, "tasks=a b", "tasks=['a b']"),
        (LayersConfig, "tasks='a b'", "tasks=['a b']"),
        (LayersConfig, "tasks=[a,b]", "tasks=[a,b]"),
        (LayersConfig, "tasks=null", "tasks=null"),
        (LayersConfig, "tasks=a,b", "tasks='a,b'"),
        (PruneConfig, "prune.heads=x", "prune.heads=x"),
    ],
)
def test_how_hydra_is_given_a_word(kind, word, override):
    assert as_override(word, kind) == override


def test_which_options_take_lists_and_text():
    assert [_takes_list(name, LayersConfig) for name in ("tasks", "split", "none")] == [True, False, False]
    assert [_takes_text(name, EvaluateConfig) for name in ("split", "seed", "none")] == [True, False, False]
    assert _takes_text("models", ThroughputConfig)


# Commands, help, logs


def test_a_command_checks_says_what_it_does_and_runs_with_what_the_check_found(monkeypatch, caplog):
    seen = []
    functions = {"a:check": lambda cfg: seen.append("check") or "found", "b:run": lambda *given: seen.append(given)}
    monkeypatch.setattr("minitron_megatron.cli.commands._load", functions.get)
    command = Command("prune", PruneConfig, "a:check", "b:run")
    cfg = PruneConfig(output="o", dry_run=False)
    with caplog.at_level("INFO"):
        command(cfg)
        assert seen == ["check", (cfg, "found")] and caplog.text.count("prune into o: ") == 1
        command(PruneConfig(output="o", dry_run=True))
        command.only_check(cfg)
    assert seen[2:] == ["check", (PruneConfig(output="o", dry_run=True), "found"), "check"]
    assert caplog.text.count("prune into o: ") == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("search", SearchConfig), ("compress", CompressConfig), ("evaluate", EvaluateConfig)]
)
def test_help_has_a_row_an_option_with_its_type_default_and_words(monkeypatch, capsys, name, kind):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("minitron_megatron.cli.spelling.TYPED", [f"launch/{name}.py"])
    help_pages.show_help(name, kind)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"launch/{name}.py: {kind.__doc__.split(':')[0]}")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}
    for one in help_pages._shown(kind):
        default = "required" if one.default == "???" else "" if one.default is None else str(one.default)
        assert rows[one.name].startswith(" ".join(f"{one.type.replace(' | None', '')} {default} {one.doc}".split())), (
            one.name
        )
        assert not one.choices or rows[one.name].endswith("]")
    # A model is one option: its sizes come with a preset.
    assert "model" in rows and "model.path" not in rows and "model.hidden_size" not in rows
    assert any(line.startswith("model=PRESET or FILE.yaml: ") and "llama3_1_8b" in line for line in lines)
    assert f"launch/{name}.py {help_pages.example(kind)}" in lines[2] and "--nproc-per-node 2" in lines[3]


def test_ranks_but_the_first_log_warnings_alone(monkeypatch):
    import logging

    kept = logging.root.handlers[:], logging.root.level
    try:
        for rank, level in ((0, logging.INFO), (1, logging.WARNING)):
            monkeypatch.setenv("RANK", str(rank))
            ours = logging.getLogger("minitron_megatron.some.module")
            ours.disabled = True
            logs.start_logging()
            assert logging.getLogger("minitron_megatron").level == level and not ours.disabled
            assert logging.root.level == logging.WARNING
    finally:
        logging.root.handlers[:], logging.root.level = kept
        logging.getLogger("minitron_megatron").setLevel(logging.NOTSET)
    record = logging.LogRecord("x", 20, "f", 1, "a\x1b[1m %s", ("b",), None)
    assert logs._PlainLines("%(message)s").format(record) == "a\\x1b[1m b"


def test_seconds_to_the_first_work_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(starting, "_began", None)
    assert starting.seconds_starting(1.234) == 1.23
    monkeypatch.setattr(starting, "seconds_of_process", iter([2.345, 9.0]).__next__)
    starting.at_work()
    starting.at_work()
    assert starting.seconds_starting(1.0) == 2.35 or starting.seconds_starting(1.0) == 2.34


# From words to a config


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Value 'x' of type 'str' could not be converted to Integer\n    full_key: seed\n    object_type=X",
         "seed=x must be a whole number"),
        ("Value 'x' of type 'str' could not be converted to Float\n    full_key: a.b", "a.b=x must be a number"),
        ("Value 'x' is not a valid bool (type str)\n    full_key: a", "a=x must be true or false"),
        ("Value 'x' of type 'str' could not be converted to Odd\n    full_key: a", "a=x must be Odd"),
        ("field 'a' is not Optional\n    full_key: b.a", "b.a=null: it needs a value; leave it out for its default"),
        ("field 'a' is not Optional", "a=null: it needs a value; leave it out for its default"),
        ("Invalid value assigned: str is not a ListConfig, list or tuple.\n    full_key: a", "a must be a list, as a=[…,…]"),
        ("something else\n    full_key: a", "a: something else"), ("something of a\n    full_key: a", "something of a"),
        ("something", "something"),
    ],
)  # fmt: skip
def test_complaints_of_hydra_are_one_line(said, told):
    assert launcher._first_line(ValueError(said)) == told
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = ValueError(said)
    assert launcher._first_line(wrapped) == told


@pytest.mark.parametrize(
    ("name", "output", "dry_run", "rank", "looked"),
    [
        ("prune", "a/b", False, 0, ("a/b", True)), ("prune", "a/b", True, 0, ("a/b", False)),
        ("prune", "a/b", False, 1, ("a/b", False)), ("report", "a/b.html", False, 0, ("a", True)),
        ("report", "a/b.md", False, 0, ("a", True)), ("report", "a/b", False, 0, ("a/b", True)),
        ("prune", "a/b.md", False, 0, ("a/b.md", True)), ("status", None, False, 0, None),
    ],
)  # fmt: skip
def test_where_an_output_is_to_be_is_tried_by_one_rank_of_a_real_run(monkeypatch, name, output, dry_run, rank, looked):
    found = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(
        "minitron_megatron.checkpoints.folder.check_place", lambda place, try_it: found.append((str(place), try_it))
    )
    launcher._check_place(name, SimpleNamespace(output=output, dry_run=dry_run))
    assert found == ([looked] if looked else [])


def test_what_libraries_say_of_themselves_is_not_shown(monkeypatch):
    import logging

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    names = ("megatron.core.utils", "torch.utils.cpp_extension", "matplotlib")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            logs.be_quiet()
            for text in (
                "apex is not installed",
                "Apex is not installed, x",
                "full scope is deprecated",
                "CUDA is not available",
            ):
                warnings.warn(text, stacklevel=1)
            warnings.warn("a warning of ours", stacklevel=1)
        assert [str(one.message) for one in shown] == ["a warning of ours"] and os.environ["TQDM_DISABLE"] == "1"
        assert {logging.getLogger(name).level for name in names} == {logging.ERROR}
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    with warnings.catch_warnings():
        logs.be_quiet()
    assert os.environ["TQDM_DISABLE"] == "0"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_works_in_the_folder_that_its_output_leads_to(tmp_path, monkeypatch, name):
    """Of a link, and of `.`: what is made of an output's name, such as the partial folder beside it, is made of that one's."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("real")
    for output, meant in (("link", tmp_path / "real"), (".", tmp_path), ("link/a", "link/a"), ("x", "x")):
        config = SimpleNamespace(output=output, dry_run=True)
        launcher._check_place(name, config)
        assert config.output == str(meant)
