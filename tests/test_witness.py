"""A stage gets each signal once, however it was sent, and what it finished before its end is done."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minitron_megatron import ending, stages, witness
from minitron_megatron.checkpoints.folder import MANIFEST
from minitron_megatron.launcher import ROOT
from minitron_megatron.stages import Ended, Stages


def asked_meanwhile(folder, code, kill):
    """A program that counts its SIGINTs is run as a stage, which `kill` stops once it is ready; gives its end and the count."""
    ready, counts = folder / "ready", folder / "counts"
    counting = f"""
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, lambda *_: (got.append(1), open({str(counts)!r}, "w").write(str(len(got)))))
open({str(ready)!r}, "w").close()
until = time.monotonic() + 30
while not got and time.monotonic() < until: time.sleep(0.01)
time.sleep(1)
{code}
"""
    running = f"""
import sys
from minitron_megatron.stages import run_program
print(*run_program([sys.executable, "-c", {counting!r}], 1), sep="|")
"""
    program = [sys.executable, "-c", running]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT) as one:
        while not ready.exists() and one.poll() is None:
            time.sleep(0.01)
        kill(one.pid)
        said = one.communicate(timeout=60)[0].strip()
    return said, counts.read_text()


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_stage_gets_each_signal_once(tmp_path, kill, number, status):
    """A supervisor asks this process alone, a terminal the whole group: a second Ctrl-C would end the stage at once."""
    said, times = asked_meanwhile(tmp_path, "sys.exit(5)", lambda pid: kill(pid, number))
    assert (said, times) == (f"{status}||False", "1")


def test_a_stage_that_came_to_its_end_is_done_though_it_was_asked(tmp_path, monkeypatch, capsys):
    """The whole ends for the signal, and says so; the same command goes on behind the stage."""
    output = tmp_path / "out"

    def run(words, processes):
        output.mkdir()
        (output / MANIFEST).write_text("digest: a\nfiles: {}\n")
        return Ended(130, "", finished=True)

    monkeypatch.setattr(stages, "run_program", run)
    monkeypatch.setattr(ending._State, "status", None)
    with pytest.raises(SystemExit) as raised:
        Stages(tmp_path / "stages.json").command("distill", output, "distill")
    assert raised.value.code == 130
    said = "stopped after distill, by Ctrl-C: distill is done; the same command goes on from there\n"
    assert capsys.readouterr().err == said
    Stages(tmp_path / "stages.json").command("distill", output, "distill")
    assert "done before" in capsys.readouterr().out


def test_a_witness_dies_of_what_its_group_gets_and_ends_with_the_stage(monkeypatch):
    """Another takes its place; where none can be started, Ctrl-C counts as the group's."""
    monkeypatch.setattr(witness, "SECONDS", 0.1)
    with witness.Witness() as one:
        first = one._process
        assert first.poll() is None and not one.heard(signal.SIGTERM) and one._process is first
        monkeypatch.setattr(witness, "SECONDS", 10.0)
        first.send_signal(signal.SIGTERM)
        assert one.heard(signal.SIGTERM) and first.returncode == -signal.SIGTERM
        second = one._process
        assert second is not first and second.poll() is None
        second.send_signal(signal.SIGUSR1)
        assert not one.heard(signal.SIGTERM) and one._process is not second
        third = one._process
    assert third.returncode == -signal.SIGKILL

    def none(*_, **__):
        raise OSError

    monkeypatch.setattr(witness.subprocess, "Popen", none)
    with witness.Witness() as one:
        assert one.heard(signal.SIGINT) and not one.heard(signal.SIGTERM) and one._process is None
