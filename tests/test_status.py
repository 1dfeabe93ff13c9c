"""How outputs stand: every state, half-written and damaged folders too, within a second and a half."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from minitron_megatron import starts
from minitron_megatron.errors import UserError
from minitron_megatron.starts import STARTS, born, is_alive, read_starts, record_start, seconds_left
from minitron_megatron.status import look_at
from tests.test_commands import ROOT, environment, error_of, run


def write(file: Path, values: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def whole(folder: Path, command: str = "python launch/prune.py model=m", **results) -> Path:
    write(folder / "data.bin", "x")
    write(
        folder / "manifest.yaml",
        {
            "command": command,
            "made": "today",
            "digest": "d",
            "seconds": 200.0,
            "results": results,
            "files": {"data.bin": 1},
        },
    )
    return folder


def start_of(pid: int, **values) -> str:
    line = {"time": time.time(), "step": 0, "host": starts.socket.gethostname(), "pid": pid, "born": born(pid)}
    return json.dumps({**line, "command": "python launch/distill.py a=b", "directory": "/some where", **values}) + "\n"


def training(folder: Path, steps: int = 10, done: int = 4, **metrics) -> Path:
    trainer = {"steps": steps, "tokens": None, "global_batch_size": 2}
    write(folder / "config.yaml", {"trainer": trainer, "data": {"sequence_length": 8}})
    lines = [
        {"step": n, "loss": 1 / n, "tokens_per_second": 100.0, "step_seconds": 2.0, "skipped": n // 4, **metrics}
        for n in range(1, done + 1)
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000004").mkdir()
    return folder


def long_form(folder: Path) -> dict[str, str]:
    return dict(look_at(folder).lines)


def test_a_run_that_goes_on(tmp_path):
    run_folder = training(tmp_path / "run")
    write(run_folder / STARTS, start_of(os.getpid()))
    (run_folder / "checkpoints" / ".step_00000006.ab12.partial").mkdir()
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line that is being written
    found = look_at(run_folder)
    assert (found.state, found.kind) == ("running", "distill")
    says = dict(found.lines)
    assert says["step"] == "4 of 10" and says["loss"].startswith("0.2500, before 1.0000, 0.5000, 0.3333")
    assert says["time left"] == "12 s" and says["tokens/s"] == "100" and says["skipped steps"] == "1"
    assert says["checkpoints"].startswith("step_00000004, ") and "another one is being written" in says["checkpoints"]
    assert f"process {os.getpid()}" in says["lock"] and "continue" not in says


def test_a_run_that_stopped_says_how_to_go_on(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        number = born(ended.pid)
    run_folder = training(tmp_path / "run")
    write(run_folder / STARTS, start_of(ended.pid, born=number) + start_of(ended.pid, born=number, step=2))
    found = look_at(run_folder)
    assert found.state == "stopped"
    says = dict(found.lines)
    assert says["continue"] == "cd '/some where' && python launch/distill.py a=b"
    assert says["starts"].startswith("2 (1 restarts)") and "again from step 2" in says["starts"]
    assert says["time left"] == "12 s once it goes on"


def test_a_lock_that_is_held_means_that_it_runs(tmp_path):
    run_folder = training(tmp_path / "run")
    (run_folder / ".model.partial").mkdir()
    lock = os.open(run_folder / ".model.partial", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert look_at(run_folder).state == "running"
        assert long_form(run_folder)["lock"] == f"held by process {os.getpid()}, which runs"
        # Looking takes no lock that a run could meet.
        other = os.open(run_folder / ".model.partial", os.O_RDONLY)
        os.close(other)
    finally:
        os.close(lock)
    assert look_at(run_folder).state == "stopped"


def test_a_process_of_the_same_number_is_another_one():
    line = json.loads(start_of(os.getpid()))
    assert is_alive(line) is True and is_alive({**line, "born": line["born"] - 1}) is False
    assert is_alive({**line, "host": "another"}) is None


def test_a_run_on_another_machine_is_taken_to_run_while_it_writes(tmp_path):
    run_folder = training(tmp_path / "run")
    write(run_folder / STARTS, start_of(1, host="node7"))
    assert look_at(run_folder).state == "running"
    os.utime(run_folder / "metrics.jsonl", (1e9, 1e9))
    assert look_at(run_folder).state == "stopped" and "node7 cannot be seen from here" in long_form(run_folder)["lock"]


def test_diverged_failed_and_done(tmp_path):
    diverged = training(tmp_path / "diverged")
    write(diverged / "diverged.txt", "10 steps in a row were skipped\ngo on from step 4, with\nother words")
    told = long_form(diverged)
    assert look_at(diverged).state == "diverged" and told["diverged"] == "10 steps in a row were skipped"
    assert told["how to go on"] == "go on from step 4, with other words"
    failed = tmp_path / "failed"
    write(failed / "config.yaml", {"trainer": {"steps": 3}})
    write(failed / STARTS, start_of(2**22 + 1, born=1))
    assert look_at(failed).state == "failed"
    done = training(tmp_path / "done", done=10)
    whole(done / "model", "python launch/distill.py x=y")
    assert (look_at(done).state, look_at(done).kind) == ("done", "distill")


def test_tokens_make_steps(tmp_path):
    run_folder = training(tmp_path / "run")
    write(
        run_folder / "config.yaml",
        {"trainer": {"steps": None, "tokens": 100.0, "global_batch_size": 2}, "data": {"sequence_length": 8}},
    )
    assert long_form(run_folder)["step"] == "4 of 7"


def test_a_folder_of_outputs_is_a_table_whatever_is_in_it(tmp_path):
    whole(tmp_path / "a", loss=2.5)
    training(tmp_path / "deep" / "er" / "run")
    write(tmp_path / ".b.partial" / "half.bin", "1234")
    write(tmp_path / "broken" / "manifest.yaml", "files: [")
    write(whole(tmp_path / "cut") / "data.bin", "").unlink()
    write(tmp_path / "odd" / "config.yaml", "\x00\x01")
    write(tmp_path / "chain" / "stages.json", '{"prune": {"seconds": 3, "what": 1}, "x": 5')
    write(tmp_path / "notes" / "readme.txt", "hello")
    found = look_at(tmp_path)
    states = {one.path.name: one.state for one in found.inside}
    assert states == {
        "a": "done",
        "run": "stopped",
        "b": "stopped",
        "broken": "damaged",
        "cut": "damaged",
        "odd": "failed",
        "chain": "stopped",
    }
    assert all("\n" not in one.about for one in found.inside)


def test_a_chain_shows_the_stage_that_it_is_at(tmp_path):
    write(
        tmp_path / "stages.json",
        json.dumps({"importance": {"seconds": 5, "what": 1}, "prune": {"seconds": 2, "what": 2}}),
    )
    whole(tmp_path / "scores")
    distilled = training(tmp_path / "distilled")
    write(distilled / STARTS, start_of(os.getpid()))
    found = look_at(tmp_path)
    assert found.state == "running" and "distilled: step 4 of 10" in found.about
    shutil.rmtree(distilled)
    write(tmp_path / "chain.json", "{}")
    assert look_at(tmp_path).state == "done"


def test_an_output_that_is_being_written_is_found_by_its_name(tmp_path):
    write(tmp_path / ".data.partial" / "train.bin", "x" * 100)
    write(tmp_path / ".data.partial" / STARTS, start_of(os.getpid(), command="python launch/prepare_data.py x=y"))
    found = look_at(tmp_path / "data")
    assert (found.state, found.kind) == ("running", "prepare_data")


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist: give an output folder"):
        look_at(tmp_path / "none")
    assert "folder=none does not exist" in error_of(run("status", "none", cwd=tmp_path))


def test_starts_are_kept_and_a_folder_that_cannot_be_written_goes_without(tmp_path):
    record_start(tmp_path, 3)
    record_start(tmp_path / "no such folder")
    (line,) = read_starts(tmp_path)
    assert line["step"] == 3 and is_alive(line)


def test_it_is_light_and_takes_bare_names(tmp_path):
    """User time, since a loaded machine's clock says little: what it imports is what it takes."""
    whole(tmp_path / "it's [one]")
    whole(tmp_path / "two")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run("status", tmp_path / "it's [one]", tmp_path / "two")
    assert done.returncode == 0 and done.stdout.count(": done (prune)") == 2, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5
    code = "import sys, minitron_megatron.launcher, minitron_megatron.status; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert not {"torch", "megatron", "transformers"} & {name.partition(".")[0] for name in loaded.stdout.split()}


def test_time_left_is_that_of_the_log_and_what_is_done_has_no_lock(tmp_path):
    run_folder = training(tmp_path / "run", run_seconds=40.0)
    write(run_folder / STARTS, start_of(os.getpid()))
    assert long_form(run_folder)["time left"] == f"{seconds_left(4, 10, 0, 40.0):.0f} s" == "60 s"
    assert long_form(run_folder)["tokens/s is"].startswith("mean of steps 1 to 4")
    whole(run_folder / "model")
    write(run_folder / STARTS, start_of(2**22 + 1, born=1))
    assert "lock" not in long_form(run_folder) and "its beginning to its end" in long_form(run_folder)["took"]


@pytest.mark.parametrize("reads", ["is_dir", "iterdir"])
def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, monkeypatch, reads):
    """Whoever may list outputs need not be allowed into each; root, which tests may be, is let in everywhere."""
    whole(tmp_path / "outputs" / "a" / "one")
    whole(tmp_path / "outputs" / "b" / "two")
    kept = getattr(Path, reads)

    def denied(path: Path):
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return kept(path)

    monkeypatch.setattr(Path, reads, denied)
    found = {one.path.name: one for one in look_at(tmp_path / "outputs").inside}
    assert (found["a"].state, found["a"].about) == ("unreadable", "Permission denied")
    assert found["two"].state == "done"
    if reads == "is_dir":
        with pytest.raises(UserError, match=r"cannot be looked at .Permission denied.: "):
            look_at(tmp_path / "outputs" / "a")


def test_time_that_is_left_is_at_the_pace_since_the_last_start():
    assert seconds_left(4, 10, 2, 40.0) == 120.0 and seconds_left(10, 10, 2, 40.0) == 0.0
    assert seconds_left(2, 10, 2, 40.0) == 320.0


def test_a_process_that_has_ended_does_not_run_though_nobody_has_asked_how():
    assert born(os.getpid()) > 0
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert born(ended.pid) is None
    ended.wait()
