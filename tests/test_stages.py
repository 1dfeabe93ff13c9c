"""Stages of something longer: how they are started, when they are done, how they end, and what is written of them."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron import composing, ending, stages
from minitron_megatron.checkpoints.folder import output_folder
from minitron_megatron.cli import spelling
from minitron_megatron.composing import check_data, check_root, flat_options, naming, stage_processes
from minitron_megatron.config import CompressConfig
from minitron_megatron.errors import UserError
from minitron_megatron.stages import (
    Ended,
    Stages,
    is_whole,
    program_of,
    read_stages,
    run_program,
    runnable,
    stage_words,
    start_words,
)


@pytest.fixture
def typed_here(monkeypatch):
    monkeypatch.setattr(spelling, "TYPED", ["launch/compress.py"])
    monkeypatch.setattr(spelling, "python_word", lambda: "python")
    monkeypatch.setattr(spelling, "minitron_words", lambda: ["minitron"])


@pytest.mark.parametrize(
    ("start", "processes", "words"),
    [
        ("minitron --nproc-per-node {processes}", 1, "python launch/prune.py"),
        ("minitron --nproc-per-node {processes}", 3, "minitron --nproc-per-node 3 prune"),
        ("torchrun --nproc-per-node={processes}", 2, "torchrun --nproc-per-node=2 launch/prune.py"),
        ("srun -n {processes} 'a b' {processes}", 2, "srun -n 2|a b|2 launch/prune.py"),
    ],
)
def test_how_a_stage_is_started(typed_here, start, processes, words):
    assert stage_words(start, processes, "prune") == [
        word for part in words.split("|") for word in ([part] if part == "a b" else part.split())
    ]


def test_programs_are_found_beside_python_or_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    beside = str(Path(sys.executable).parent / "torchrun")
    assert program_of("python") == program_of("minitron") == sys.executable
    assert (
        program_of("torchrun") == beside and program_of("true").endswith("/true") and program_of("no_such_one") is None
    )
    assert runnable(["minitron", "prune", "a=1"]) == [sys.executable, "-m", "minitron_megatron", "prune", "a=1"]
    assert runnable(["python", "launch/x.py"]) == [sys.executable, "launch/x.py"]
    assert runnable(["no_such_one", "x"]) == ["no_such_one", "x"] and runnable(["torchrun", "x"]) == [beside, "x"]
    with pytest.raises(UserError, match=r"start=a 'b cannot be read \(No closing quotation\): mend its quotes"):
        start_words("a 'b", 2)


def test_an_output_is_whole_with_its_manifest_or_its_models(tmp_path):
    for name, whole in (("a/manifest.yaml", True), ("b/model/manifest.yaml", True), ("c/other/manifest.yaml", False)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        assert is_whole(tmp_path / name.partition("/")[0]) is whole


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", []), ("[]", []), ("3", []), (None, []),
        ('{"a": {"seconds": 1, "what": null}, "b": {"seconds": 1}, "c": 3, "d": {"what": 1}}', ["a"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_not_done(tmp_path, text, found):
    if text is not None:
        (tmp_path / "stages.json").write_text(text)
    assert list(read_stages(tmp_path / "stages.json")) == found


def made(path: Path, text: str = "x") -> None:
    with output_folder(path, command="x", config={}, inputs={}, resume=True) as out:
        (out.path / "file").write_text(text)


class Ends:
    """Stands for a stage's program, which makes its output where it is to, and ends so."""

    def __init__(self, ended: Ended, output: Path | None = None, text: str = "x") -> None:
        self.ended, self.output, self.text, self.ran = ended, output, text, []

    def __call__(self, program: list[str], processes: int) -> Ended:
        self.ran.append((program, processes))
        if self.output is not None:
            made(self.output, self.text)
        return self.ended


def test_a_stages_command_gets_the_words_of_all_and_its_output(typed_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "run_program", ends := Ends(Ended(0, ""), tmp_path / "out"))
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=iter([10.0, 12.34]).__next__))
    one = Stages(tmp_path / "stages.json", words=["seed=5"], inputs={"model": "d"}, start="torchrun {processes}")
    one.command("the cut", tmp_path / "out", "prune", "model=a b", processes=2)
    line = f"torchrun 2 launch/prune.py 'model=a b' seed=5 output={tmp_path}/out"
    assert f"\n$ {line}\n" in capsys.readouterr().out
    options = ["model=a b", "seed=5", f"output={tmp_path}/out"]
    assert ends.ran == [([program_of("torchrun"), "2", "launch/prune.py", *options], 2)]
    written = json.loads((tmp_path / "stages.json").read_text())
    kept = ["model=a b", "seed=5", "output={output}/out"]
    assert written["the cut"]["what"] == {"command": ["prune", *kept], "inputs": {"model": "d"}}
    assert (one.seconds, written["the cut"]["seconds"], written["the cut"]["past"]) == ({"the cut": 2.3}, 2.3, {})
    assert written["the cut"]["digest"] == one.outputs["the cut"] and one.starting.keys() <= {"the cut"}
    assert one.starting == (
        {} if written["the cut"]["starting"] is None else {"the cut": written["the cut"]["starting"]}
    )


def test_a_stage_is_done_in_the_same_words_from_the_same_inputs_with_its_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "run_program", ends := Ends(Ended(0, ""), tmp_path / "out"))

    def run(words=(), inputs=None, command="prune") -> int:
        Stages(tmp_path / "stages.json", words=words, inputs=inputs).command("cut", tmp_path / "out", command, "a=1")
        return len(ends.ran)

    assert [run(), run(), run(words=["b=1"]), run(words=["b=1"])] == [1, 1, 2, 2]
    assert [
        run(words=["b=1"], inputs={"x": "1"}),
        run(words=["b=1"], inputs={"x": "2"}),
        run(),
        run(command="import"),
    ] == [3, 4, 5, 6]
    assert f"cut: done before in 0 s ({tmp_path}/out)" in capsys.readouterr().out
    (tmp_path / "out" / "manifest.yaml").unlink()
    ends.output = None
    with pytest.raises(UserError, match="cut: stopped before its end; the same command continues it"):
        run(command="import")


def test_a_stage_whose_sources_are_others_now_runs_again(tmp_path):
    """And one whose own output is another one is refused."""
    ran = []

    def run(text: str, file: Path = tmp_path / "stages.json") -> None:
        one = Stages(file)
        for name in ("first", "second"):
            output = tmp_path / name
            one.run(name, output, lambda name=name, output=output: ran.append(name) or made(output, text), "w", output)

    run("a")
    run("a")
    assert ran == ["first", "second"]
    made(tmp_path / "other", "b")
    (tmp_path / "first").rename(tmp_path / "aside")
    (tmp_path / "other").rename(tmp_path / "first")
    with pytest.raises(
        UserError, match=r"^first: \S+/first is another one than was made here \(\S+, not \S+\): put the first"
    ):
        run("a")
    values = json.loads((tmp_path / "stages.json").read_text())
    del values["first"]
    (tmp_path / "stages.json").write_text(json.dumps(values))
    run("b")
    assert ran == ["first", "second", "first", "second"]
    (tmp_path / "first" / "file").write_text("damaged")
    with pytest.raises(UserError, match=rf"^first: .*: remove {tmp_path}/first, and the same command does"):
        run("b")


@pytest.mark.parametrize(
    ("ended", "whole", "says"),
    [
        (Ended(2, "a mistake"), False, "cut: a mistake"),
        (Ended(2, "a mistake"), True, "cut: a mistake"),
        (Ended(3, ""), False, "cut: ended with status 3; mend what it says and run the same command again"),
        (Ended(0, ""), False, "cut: stopped before its end; the same command continues it"),
        (Ended(0, "", finished=True), False, "cut: stopped before its end; the same command continues it"),
        (Ended(137, "was killed"), False, "cut: was killed"),
    ],
)
def test_how_a_stage_ends_that_is_not_done(tmp_path, monkeypatch, ended, whole, says):
    monkeypatch.setattr(stages, "run_program", Ends(ended, tmp_path / "out" if whole else None))
    one = Stages(tmp_path / "stages.json")
    with pytest.raises(UserError) as error:
        one.command("cut", tmp_path / "out", "prune")
    assert str(error.value) == says and json.loads((tmp_path / "stages.json").read_text()) == {}


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (Ended(130, ""), "stopped in cut, by Ctrl-C: no stage was done before it; the same command begins with cut\n"),
        (Ended(75, "at step 3, which is saved: continue"), "stopped in cut, at step 3, which is saved: continue\n"),
        (Ended(143, f"by SIGTERM: {ending.NOTHING_KEPT}"),
         "stopped in cut, by SIGTERM: no stage was done before it; the same command begins with cut\n"),
    ],
)  # fmt: skip
def test_a_stage_that_was_asked_to_end_says_what_is_kept(tmp_path, monkeypatch, capsys, ended, says):
    monkeypatch.setattr(stages, "run_program", Ends(ended))
    monkeypatch.setattr(ending._State, "status", None)
    with pytest.raises(SystemExit) as raised:
        Stages(tmp_path / "stages.json").command("cut", tmp_path / "out", "prune")
    assert (raised.value.code, capsys.readouterr().err) == (ended.status, says)


SAYS = """
import os, sys
print(os.environ["OMP_NUM_THREADS"], os.environ["MINITRON_STAGE"], flush=True)
for line in ("a word", "error: first reason ", "stopped by x", "errors: more", "error:none"):
    print(line, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("given", "processes", "threads"), [(None, 1, "7"), (None, 3, "2"), (None, 9, "1"), ("5", 1, "5")]
)
def test_a_programs_reason_is_its_first_and_the_rest_is_shown(monkeypatch, capfd, given, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(stages, "usable_cores", lambda: 7)
    assert run_program([sys.executable, "-c", SAYS, "3"], processes) == Ended(3, "first reason", finished=False)
    out, err = capfd.readouterr()
    assert (out, err) == (f"{threads} 1\n", "a word\nerrors: more\nerror:none\n")


# What is composed


@pytest.mark.parametrize(
    ("processes", "start", "whole", "says"),
    [
        (1, "x", 1, None), (2, "minitron {processes}", 1, None), (2, "python -n 2", 2, None), (1, "python -n 2", 2, None),
        (3, "python -n 2", 2, "processes=3, but start= always starts processes=2: write {processes} into start="),
        (0, "minitron {processes}", 1, "processes=0 must be a whole number of at least 1"),
        (-1, "minitron {processes}", 1, "=-1 must"),
        (True, "minitron {processes}", 1, "processes=True must"), ("2", "minitron {processes}", 1, "processes=2 must"),
        (1.0, "minitron {processes}", 1, "processes=1.0 must"),
        (2, "no_such_one {processes}", 1, "start=no_such_one {processes}: there is no program 'no_such_one' here"),
    ],
)  # fmt: skip
def test_processes_of_a_stage_can_be_started(processes, start, whole, says):
    cfg = SimpleNamespace(start=start, processes=whole)
    if says is None:
        assert stage_processes(cfg, processes) == processes
    else:
        with pytest.raises(UserError) as error:
            stage_processes(cfg, processes)
        assert says in str(error.value)


def test_options_of_the_whole_are_a_stages_where_they_are_no_defaults():
    cfg = CompressConfig(output="x")
    assert composing._common(cfg) == {}
    cfg = replace(
        cfg, seed=5, precision="fp32", verify=not cfg.verify, resume=False, processes=3, dry_run=True, device="cpu",
        parallel=replace(cfg.parallel, tensor=2), data=replace(cfg.data, path="d", sequence_length=7),
    )  # fmt: skip
    assert composing._common(cfg) == {
        "seed": 5, "precision": "fp32", "verify": cfg.verify, "device": "cpu", "parallel.tensor": 2, "data.path": "d",
        "data.sequence_length": 7,
    }  # fmt: skip


def test_nested_options_are_dotted_and_the_last_of_a_name_counts():
    assert flat_options({"a": {"b": 1, "c": {"d": 2}}, "e.f": 3}, "x") == {"a.b": 1, "a.c.d": 2, "e.f": 3}
    assert flat_options({"a": {"b": 1}, "a.b": 2}, "x") == {"a.b": 2}
    with pytest.raises(UserError, match=r"x=3 must be a mapping of options, as in \{samples: 64\}"):
        flat_options(3, "x")


@pytest.mark.parametrize(
    ("tokens", "samples", "says"),
    [
        (100, 10, None),
        (99, 10, "use samples=9, or"),
        (9, 10, "use samples=1, or"),
        (10, 1, None),
        (9, 1, "use samples=1"),
    ],
)
def test_the_first_split_has_the_samples_and_the_others_are_there(monkeypatch, tokens, samples, says):
    opened = []
    monkeypatch.setattr(
        composing, "open_data",
        lambda path, split, shape, length: opened.append((path, split, shape, length))
        or SimpleNamespace(tokens=lambda of: tokens if of == split == "train" else 0, split=split),
    )  # fmt: skip
    cfg = SimpleNamespace(data=SimpleNamespace(path="d", sequence_length=10))
    if says is None:
        assert check_data(cfg, ["train", "validation"], "shape", samples).split == "train"
    else:
        with pytest.raises(
            UserError, match=f"{samples} samples of 10 tokens are asked for, the train split has {tokens} t.*{says}"
        ):
            check_data(cfg, ["train", "validation"], "shape", samples)
    assert opened == [("d", "train", "shape", 10), ("d", "validation", "shape", 10)]


@pytest.mark.parametrize(
    ("files", "resume", "says"),
    [
        ([], True, None), ([".hidden"], True, None), (["mark"], True, None), (["mark", "more"], True, None), ([], False, None),
        (["more"], True, "exists and is not the folder of a chain: choose another output="),
        ([".hidden", "more"], True, "is not the folder of"), (["mark"], False, "has a chain in it and resume=false: remove it"),
    ],
)  # fmt: skip
def test_a_folder_of_a_whole_is_new_or_its_own(tmp_path, files, resume, says):
    for name in files:
        (tmp_path / name).touch()
    if says is None:
        check_root(tmp_path, "mark", "a chain", resume)
    else:
        with pytest.raises(UserError, match=says):
            check_root(tmp_path, "mark", "a chain", resume)


def test_names_stand_before_a_mistake():
    with pytest.raises(UserError, match=r"^round a, prune: a mistake$"), naming("round a", "", "prune"):
        raise UserError("a mistake")
    with pytest.raises(ValueError, match=r"^a bug$"), naming("x"):
        raise ValueError("a bug")


@pytest.mark.parametrize("where", ["stages.json", "candidates/rank_01/stages.json", None])
def test_an_end_between_two_stages_says_that_those_before_are_kept(tmp_path, where):
    """Of a chain, of a demo, and of candidates, each of which has stages of its own."""
    root = tmp_path / "a"
    for within in (stages.alone_in, stages.keeping_stages):
        with within(root):
            assert str(ending.Stopped(15)) == f"by SIGTERM: {ending.NOTHING_KEPT}"
            if where:
                (root / where).parent.mkdir(parents=True, exist_ok=True)
                (root / where).write_text('{"prune": {"seconds": 1, "what": {}}}')
                said = "by SIGTERM: the stages that are done are kept; the same command goes on from there"
                assert str(ending.Stopped(15)) == said
                (root / where).write_text("{}")
    assert str(ending.Stopped(15)) == f"by SIGTERM: {ending.NOTHING_KEPT}"


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    """And nothing that was there before, or that has something in it."""
    with stages.alone_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with stages.alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "stages.json").write_text("{}")
        (tmp_path / "a" / "b" / "starts.jsonl").touch()
    assert [one.name for one in tmp_path.iterdir()] == ["a"] and list((tmp_path / "a").iterdir()) == []
    with stages.alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "more").touch()
        with pytest.raises(UserError, match="another run is at work in"), stages.alone_in(tmp_path / "a" / "b"):
            pass
    assert (tmp_path / "a" / "b" / "more").is_file()
    with stages.alone_in(tmp_path / "a" / "b"):
        os.utime(tmp_path / "a" / "b")
