"""What `status` says of an output, line by line, and of a row of them."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from minitron_megatron import status
from minitron_megatron.checkpoints import locks, places
from minitron_megatron.starts import STARTS, record_start, tail_of
from minitron_megatron.status import Status, look_at
from tests.test_status import start_of, training, whole, write

NOW = 1_000_000_000.0


@pytest.fixture(autouse=True)
def now(monkeypatch):
    monkeypatch.setattr(status.time, "time", lambda: NOW)


def at(path: Path, ago: float) -> Path:
    os.utime(path, (NOW - ago, NOW - ago))
    return path


def says(found: Status) -> dict[str, str]:
    return dict(found.lines)


# A run


def test_a_runs_lines_are_of_its_last_steps(tmp_path):
    """Rates and times are of the last 20, its losses of the last four."""
    run = training(tmp_path / "run", steps=3000, done=0)
    lines = [
        {
            "step": 1000 + n,
            "loss": 5.0 - n / 100,
            "tokens_per_second": 100.0 if n < 21 else 200.0,
            "step_seconds": 1.0 + n,
        }
        for n in range(1, 41)
    ]
    lines += [{"step": 1020, "validation_loss": 3.25}, {"step": 1040, "validation_loss": 3.5}]
    write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    at(run / "metrics.jsonl", 90)
    at(run / "checkpoints" / "step_00000004", 7200)
    write(run / STARTS, start_of(2**22 + 1, born=1, time=NOW - 300) + start_of(2**22 + 1, born=1, step=1000))
    found = look_at(run)
    assert (found.state, found.kind, found.about) == ("stopped", "distill", "step 1,040 of 3,000, loss 4.6000")
    # Each of the last 20 at its own rate, and the time of each: 31.5 s in the middle.
    seconds = range(22, 42)
    rate = sum((100.0 if n < 21 else 200.0) * s for n, s in zip(range(21, 41), seconds, strict=True)) / sum(seconds)
    assert found.lines == [
        ("step", "1,040 of 3,000"),
        ("loss", "4.6000, before 4.6300, 4.6200, 4.6100"),
        ("validation loss", "3.5000 at step 1,040"),
        ("tokens/s", f"{rate:.0f}"),
        ("tokens/s is", "mean of steps 1,021 to 1,040, without what is between steps"),
        ("time left", f"{1960 * 31.5 / 3600:,.1f} h once it goes on"),
        ("last line", "90 s ago"),
        ("checkpoints", "step_00000004, 2.0 h ago"),
        ("skipped steps", "0"),
        ("starts", "2 (1 restarts), first 5.0 min ago, again from step 1,000"),
        ("lock", f"process {2**22 + 1} on {socket.gethostname()} has ended"),
        ("continue", "cd '/some where' && python launch/distill.py a=b"),
    ]


def test_a_run_that_trains_says_what_is_left_and_not_how_to_go_on(tmp_path):
    run = training(tmp_path / "run")
    write(run / STARTS, start_of(os.getpid()))
    found = look_at(run)
    assert found.state == "running" and found.about == "step 4 of 10, loss 0.2500, 12 s left"
    assert (
        says(found)["time left"] == "12 s" and says(found)["lock"].endswith(" runs") and "continue" not in says(found)
    )
    write(run / "diverged.txt", "why\nhow")
    assert look_at(run).state == "running"


def test_a_finished_run_has_its_models_lines_too(tmp_path):
    run = training(tmp_path / "run", done=10)
    whole(run / "model", "python launch/distill.py a=b", loss=1.5)
    write(run / STARTS, start_of(2**22 + 1, born=1) + start_of(2**22 + 1, born=1, step=4))
    found = look_at(run)
    assert (found.state, found.about) == ("done", "step 10 of 10, loss 0.1000")
    assert [name for name, _ in found.lines][-3:] == ["made", "took", "took is"] and "lock" not in says(found)
    assert says(found)["took is"] == "of its last start" and says(found)["tokens/s is"].startswith(
        "mean of steps 1 to 10"
    )
    write(run / STARTS, start_of(2**22 + 1, born=1))
    assert "took is" not in says(look_at(run))
    (run / "model" / "data.bin").unlink()
    found = look_at(run)
    assert found.state == "damaged" and found.about.endswith("; data.bin is missing (1 of 1 files)")
    (run / STARTS).unlink()
    assert look_at(run).kind == "distill"


def test_a_run_without_a_step_has_failed_unless_it_saved_one(tmp_path):
    run = tmp_path / "run"
    write(run / "config.yaml", {"trainer": {"steps": 3}, "data": {"sequence_length": 8}})
    found = look_at(run)
    assert found.state == "failed" and found.about == "step 0 of 3"
    assert found.lines[0] == ("failed", "it ended before its first step: the same command says why")
    assert [says(found)[name] for name in ("last line", "checkpoints", "starts", "lock")] == [
        "none yet", "none yet", "not recorded", "held by nobody here",
    ]  # fmt: skip
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert look_at(run).state == "stopped"
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / ".step_00000002.partial")
    assert look_at(run).state == "failed"
    assert says(look_at(run))["checkpoints"] == "none yet, another one is being written"


@pytest.mark.parametrize(
    ("trainer", "length", "steps"),
    [
        ({"steps": 7}, 8, 7), ({"steps": 7, "tokens": 99}, 8, 7), ({"tokens": 96, "global_batch_size": 2}, 8, 6),
        ({"tokens": 97, "global_batch_size": 2}, 8, 7), ({"tokens": 97}, 8, None), ({}, 8, None), ({"steps": "x"}, 8, None),
        ({"tokens": 97, "global_batch_size": 0}, 8, None), (None, 8, None),
    ],
)  # fmt: skip
def test_steps_are_counted_as_a_run_does(trainer, length, steps):
    assert status._steps({"trainer": trainer, "data": {"sequence_length": length}}) == steps
    assert status._steps({"trainer": {"steps": 3}}) is None


STEP = {"step": 5, "loss": 1.0, "step_seconds": 2.0}


@pytest.mark.parametrize(
    ("trained", "steps", "starts", "left"),
    [
        ([], 10, [], None), ([STEP], None, [], None), ([STEP], 10, [], 10.0),
        ([{**STEP, "run_seconds": 12.0}], 10, [{"step": 2}], 20.0), ([{**STEP, "run_seconds": 12.0}], 10, [{"step": 5}], 10.0),
        ([{**STEP, "run_seconds": 12.0}], 10, [], 10.0), ([{**STEP, "run_seconds": 12.0}], 10, [{"step": None}], 10.0),
        ([{**STEP, "run_seconds": 12.0}], 10, [{"step": 2}, {"step": 4}], 60.0),
        ([{"step": 5, "loss": 1.0}], 10, [], None),
        ([{**STEP, "step_seconds": 9.0}, *[{**STEP, "step_seconds": 3.0}] * 11, *[STEP] * 9], 10, [], 15.0),
        ([*[{**STEP, "step_seconds": 3.0}] * 12, *[STEP] * 11], 10, [], 10.0),
    ],
)  # fmt: skip
def test_what_is_left_is_at_the_pace_of_the_start_or_of_the_last_steps(trained, steps, starts, left):
    assert status._seconds_left(trained, steps, starts) == left


@pytest.mark.parametrize(
    ("line", "found"),
    [({"x": 1}, True), ({"x": 1.5}, True), ({"x": "1"}, False), ({}, False), ({"x": float("nan")}, False)],
)
def test_what_is_a_number_of_a_line(line, found):
    assert status._number(line, "x") is found


# Starts and locks


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        ([], "not recorded"),
        ([{"time": NOW - 60}], "1 (0 restarts), first 60 s ago"),
        ([{"time": NOW - 60, "step": 0}, {"step": 1500}, {"step": None}],
         "3 (2 restarts), first 60 s ago, again from step 1,500"),
        ([{"time": NOW, "step": 0}, *({"step": n} for n in (1, 2, 3, 4))],
         "5 (4 restarts), first 0 s ago, again from step 2, step 3, step 4"),
        ([{"time": NOW + 60}], "1 (0 restarts), first 0 s ago"),
    ],
)  # fmt: skip
def test_starts_in_words(starts, said):
    assert status._words_of_starts(starts) == said


@pytest.mark.parametrize(
    ("lines", "owner"),
    [
        (["1: FLOCK  ADVISORY  WRITE 7 {0:02x}:{1:02x}:{2} 0 EOF"], 7),
        (["1: POSIX  ADVISORY  WRITE 7 {0:02x}:{1:02x}:{2} 0 EOF"], None),
        (["1: FLOCK  ADVISORY  WRITE 8 {0:02x}:{1:02x}:{3} 0 EOF", "2: FLOCK  ADVISORY  WRITE 7 {0:02x}:{1:02x}:{2} 0 EOF"], 7),
        # The same number on another disk.
        (["1: FLOCK  ADVISORY  WRITE 8 {4:02x}:{1:02x}:{2} 0 EOF", "2: FLOCK  ADVISORY  WRITE 7 {0:02x}:{1:02x}:{2} 0 EOF"], 7),
        (["1: FLOCK  ADVISORY  WRITE 8 {4:02x}:{1:02x}:{2} 0 EOF"], None),
        # Who waits holds nothing.
        (["1: -> FLOCK  ADVISORY  WRITE 8 {0:02x}:{1:02x}:{2} 0 EOF",
          "1: FLOCK  ADVISORY  WRITE 7 {0:02x}:{1:02x}:{2} 0 EOF"], 7),
        # A part of a disk, as a volume of Btrfs, has numbers of its own, and its locks those of the mount.
        (["1: FLOCK  ADVISORY  WRITE 7 fe:1f:{2} 0 EOF"], 7),
    ],
)  # fmt: skip
def test_a_lock_is_found_by_disk_and_number(tmp_path, monkeypatch, lines, owner):
    found = tmp_path.stat()
    device = os.major(found.st_dev), os.minor(found.st_dev)
    (tmp_path / "locks").write_text("\n".join(lines).format(*device, found.st_ino, found.st_ino + 1, device[0] + 1))
    (tmp_path / "mounts").write_text(f"36 35 254:31 / {tmp_path} rw - btrfs /dev/sda rw\n")
    monkeypatch.setattr(locks, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(places, "MOUNTS", tmp_path / "mounts")
    assert locks.holder(tmp_path) == owner


def test_who_holds_a_lock_in_words():
    dead, here = {"pid": 5, "host": socket.gethostname(), "born": 1}, json.loads(start_of(os.getpid()))
    assert status._words_of_lock(7, [dead]) == "held by process 7, which runs"
    assert status._words_of_lock(None, []) == "held by nobody here"
    assert status._words_of_lock(None, [here, dead]) == f"process 5 on {socket.gethostname()} has ended"
    assert status._words_of_lock(None, [dead, here]).endswith(f"{os.getpid()} on {socket.gethostname()} runs")
    assert status._words_of_lock(None, [{**dead, "host": "far"}]) == "process 5 on far cannot be seen from here"


@pytest.mark.parametrize(("host", "ago", "alive"), [("far", 599, True), ("far", 600, False), (None, 10**6, True)])
def test_what_cannot_be_seen_runs_while_it_writes(host, ago, alive):
    start = json.loads(start_of(os.getpid()))
    assert status._seems_alive({**start, **({"host": host} if host else {})}, NOW - ago) is alive


@pytest.mark.parametrize(
    ("starts", "running", "lines"),
    [
        ([], False, []),
        ([{"command": "c", "directory": "/a b"}], True, []),
        ([{"command": "c", "directory": "/a b"}], False, [("continue", "cd '/a b' && c")]),
        ([{"command": "c", "directory": "/x"}, {"command": "d"}], False, [("continue", "d")]),
        ([{"command": "c", "directory": str(Path.cwd())}], False, [("continue", "c")]),
    ],
)
def test_how_to_go_on_is_the_last_start_from_its_folder(starts, running, lines):
    assert status._how_to_go_on(starts, running) == lines


def test_a_start_is_noted_with_all_that_tells_it_from_others(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("minitron_megatron.cli.next_command.this_line", lambda: "the line")
    record_start(tmp_path, 5)
    record_start(tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / STARTS).read_text().splitlines())
    assert first == {
        "time": NOW, "step": 5, "host": socket.gethostname(), "pid": os.getpid(),
        "born": json.loads(start_of(os.getpid()))["born"],
        "processes": 3, "directory": str(Path.cwd()), "command": "the line",
    }  # fmt: skip
    assert second == {**first, "step": None}


def test_the_tail_of_a_file_is_its_whole_lines(tmp_path):
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps({"n": n}) for n in range(5)]
    file.write_text("\n".join([*lines[:2], "3", "{", *lines[2:]]) + "\n")
    assert [one["n"] for one in tail_of(file)] == [0, 1, 2, 3, 4] and tail_of(tmp_path / "none") == []
    size = file.stat().st_size
    assert [one["n"] for one in tail_of(file, size)] == [0, 1, 2, 3, 4]
    # What begins in the middle of a line loses it.
    assert [one["n"] for one in tail_of(file, size - 1)] == [1, 2, 3, 4]
    assert [one["n"] for one in tail_of(file, 20)] == [3, 4]


# Outputs that are no runs


def test_a_whole_output_has_its_figures_those_that_tell_most_first(tmp_path):
    results = {
        "seconds": 5.0,
        "samples": 4096,
        "kl": 0.25,
        "fine": True,
        "text": "x",
        "loss": 2.5,
        "zz": 1,
        "perplexity": 12.25,
    }
    folder = whole(tmp_path / "a", "minitron --nproc-per-node 4 evaluate model=m", **results)
    found = look_at(folder)
    assert (found.kind, found.state, found.about) == ("evaluate", "done", "loss 2.5, perplexity 12.25, kl 0.25")
    assert found.lines == [
        ("made", "today"), ("took", "3.3 min from its beginning to its end"), ("loss", "2.5"), ("perplexity", "12.25"), 
        ("kl", "0.25"), ("samples", "4,096"), ("seconds", "5"), ("zz", "1"),
        ("by", "minitron --nproc-per-node 4 evaluate model=m"),
    ]  # fmt: skip
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    write(folder / "manifest.yaml", {**manifest, "seconds_starting": 61.0, "results": [1]})
    assert says(look_at(folder))["took"].endswith("its end, after 61 s from the program's start to its work")
    write(folder / "manifest.yaml", {**manifest, "files": {"data.bin": 1, "b": 1, "c": 1}})
    assert look_at(folder).about == "b is missing (2 of 3 files)" and look_at(folder).lines == []
    for odd in (3, None, ["data.bin"]):
        write(folder / "manifest.yaml", {**manifest, "files": odd})
        found = look_at(folder)
        assert (found.state, found.about) == ("damaged", "manifest.yaml does not say which files it is of")
    write(folder / "manifest.yaml", {"files": {}})
    assert look_at(folder).lines == [("made", "–"), ("took", "– from its beginning to its end"), ("by", "–")]


@pytest.mark.parametrize(
    ("line", "command"),
    [("python launch/prune.py x", "prune"), ("minitron prune x", "prune"), ("minitron --nproc-per-node 12 prune x", "prune"),
     ("python -m minitron_megatron prune x", "prune"), ("other", "output"), ("", "output")],
)  # fmt: skip
def test_the_command_of_a_line(line, command):
    assert status._command_of(line) == command


def test_what_is_being_written_is_told_by_its_files(tmp_path):
    for name, ago in (("a.bin", 300), ("deep/b.bin", 120), ("", 500)):
        file = tmp_path / ".data.partial" / name
        if name:
            write(file, "x" * 1_500_000)
            at(file, ago)
    at(tmp_path / ".data.partial" / "deep", 400)
    at(tmp_path / ".data.partial", 400)
    found = look_at(tmp_path / "data")
    assert (found.kind, found.state, found.about) == ("output", "stopped", "2 files, 3.0 MB, written 2.0 min ago")
    assert found.lines == [("written so far", found.about), ("lock", "held by nobody here")]
    (tmp_path / ".empty.partial").mkdir()
    at(tmp_path / ".empty.partial", 60)
    assert look_at(tmp_path / "empty").about == "0 files, 0.0 MB, written 60 s ago"


def chain(root: Path, **files: object) -> Path:
    done = {"importance": {"seconds": 5}, "prune": {"seconds": 120.0}, "odd": 3, "odder": {"x": 1}}
    write(root / "stages.json", json.dumps(done))
    for name, values in files.items():
        write(root / name.replace("_json", ".json"), json.dumps(values))
    return root


def test_a_chains_lines_are_its_stages_and_what_is_not_done(tmp_path):
    root = chain(tmp_path / "chain")
    whole(root / "scores")
    training(root / "distilled", done=4)
    found = look_at(root)
    assert (found.kind, found.state) == ("stages", "stopped")
    assert found.about == "2 stages done; distilled: step 4 of 10, loss 0.2500"
    assert found.lines == [
        ("done", "importance 5 s, prune 2.0 min"), ("together", "2.1 min, the start of each stage's program included"),
        ("distilled", "stopped: step 4 of 10, loss 0.2500"),
    ]  # fmt: skip
    write(root / STARTS, start_of(2**22 + 1, born=1, command="python launch/compress.py a=b"))
    at(root / STARTS, 10)
    found = look_at(root)
    assert found.kind == "compress" and [name for name, _ in found.lines][-3:] == ["starts", "lock", "continue"]
    (root / "distilled" / "diverged.txt").write_text("why")
    assert look_at(root).state == "diverged"
    chain(root, chain_json={})
    assert look_at(root).state == "diverged"


@pytest.mark.parametrize("summary", ["chain_json", "summary_json", "results_json"])
def test_a_whole_is_done_with_its_summary_and_nothing_open(tmp_path, summary):
    root = chain(tmp_path / "chain", **{summary: {}})
    write(root / STARTS, start_of(2**22 + 1, born=1))
    found = look_at(root)
    assert found.state == "done" and found.lines[-1] == ("result", str(root / summary.replace("_json", ".json")))
    assert "lock" not in says(found) and found.about == "2 stages done"
    write(root / ".scores.partial" / "x", "x")
    assert look_at(root).state == "stopped"
    write(root / ".scores.partial" / STARTS, start_of(os.getpid()))
    assert look_at(root).state == "running"


def test_a_trial_of_candidates_is_a_whole_too(tmp_path):
    write(tmp_path / "trial" / "settings.json", "{}")
    found = look_at(tmp_path / "trial")
    assert (found.state, says(found)["done"]) == ("stopped", "no stage yet")
    write(tmp_path / "trial" / "stages.json", "[]")
    assert says(look_at(tmp_path / "trial"))["done"] == "no stage yet"


# Rows


def test_outputs_are_looked_for_three_folders_deep_and_in_order(tmp_path):
    for name in ("b", "a", "x/c", "x/y/d", "x/y/z/e", "weights/f", ".hidden/g", "targets/h"):
        whole(tmp_path / name)
    whole(tmp_path / "a" / "inside")
    write(tmp_path / ".w.partial" / "x", "x")
    found = look_at(tmp_path)
    assert [str(one.path.relative_to(tmp_path)) for one in found.inside] == ["a", "b", "w", "x/c", "x/y/d"]
    assert (found.kind, found.about) == ("folder", "5 outputs")
    (tmp_path / "none").mkdir()
    assert look_at(tmp_path / "none").about == "no outputs in it"


def test_rows_and_lines_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    whole(tmp_path / "a", loss=2.5)
    status._show(look_at(tmp_path))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}: 1 outputs" in shown and "│ a │ prune │ done │ loss 2.5 │" in shown
    status._show(look_at(tmp_path / "a"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'a'}: done (prune)" and lines[1] == "  made  today"
    assert lines[-1] == "  by    python launch/prune.py model=m"
    status._show(Status(tmp_path, "output", "damaged", "a reason"))
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: damaged (output)", "  a reason"]
    assert status._trend([{"loss": 1.0}]) == "the first" and time.time() == NOW
