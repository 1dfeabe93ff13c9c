"""The launcher of several processes, without any: words, signals, and what it says of ends that could not say it themselves."""

import json
import os
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.claims import CLAIM, LAUNCHER, TOLD, Claim
from minitron_megatron.first_moments import NAMES, STATUS_OF_SIGNAL
from minitron_megatron.parallel import torchrun
from minitron_megatron.parallel.torchrun import (
    SAVED_BEFORE,
    Launcher,
    children,
    completed,
    exit_status,
    how_it_was_killed,
)

HERE = f"rank 3 on {socket.gethostname()}"
HANGS_UP = NAMES[signal.SIGHUP]


@pytest.mark.parametrize(("code", "status"), [(0, 0), (2, 2), (75, 75), (-9, 137), (-15, 143), (-1, 129)])
def test_a_return_code_is_a_shells_status(code, status):
    assert exit_status(code) == status


@pytest.mark.parametrize(
    ("words", "log_dir", "own"),
    [
        ("x.py a", None, "--standalone --local-addr=127.0.0.1 --log-dir=/f"),
        ("x.py a", "/mine", "--standalone --local-addr=127.0.0.1"),
        *((f"{one} x.py a", None, "--log-dir=/f") for one in
          ("--nnodes=2", "--nnodes 2", "--node_rank=1", "--rdzv-id x", "--rdzv_backend=c10d", "--master_port 5", "--standalone")),
        ("x.py --nnodes", None, "--standalone --local-addr=127.0.0.1 --log-dir=/f"),
        ("--nproc-per-node=2 x.py a b", None, "--standalone --local-addr=127.0.0.1 --log-dir=/f"),
    ],
)  # fmt: skip
def test_words_that_torchrun_gets_besides(words, log_dir, own):
    """On one node a free port; what the program gets is the program's."""
    words = words.split()
    given = SimpleNamespace(training_script_args=words[words.index("x.py") + 1 :], log_dir=log_dir)
    assert completed(words, given, Path("/f")) == ["--signals-to-handle=SIGQUIT", *own.split(), *words]


def test_children_are_those_that_run():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert (
            pid in children(os.getpid()) and os.getpid() in children(os.getppid()) and pid not in children(os.getppid())
        )
    finally:
        os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pid not in children(os.getpid())
    os.waitpid(pid, 0)


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """A launcher of processes 11 and 12, with what it has sent them."""
    made = Launcher(tmp_path)
    made.sent = []
    monkeypatch.setattr(torchrun, "children", lambda of: [11, 12] if of == os.getpid() else [])
    monkeypatch.setattr(torchrun.os, "kill", lambda pid, number: made.sent.append((pid, number)))
    monkeypatch.setattr(torchrun.os, "killpg", lambda pid, number: made.sent.append((pid, number)))
    return made


@pytest.mark.parametrize(
    ("number", "passed"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGHUP),
    ],
)
def test_signals_go_to_every_process_and_are_noted(launcher, tmp_path, number, passed):
    heard = []
    launcher.listener = SimpleNamespace(heard=lambda: heard.append(1))
    launcher.pass_on(number, None)
    assert launcher.sent == [(11, passed), (12, passed)] and launcher.told == [number] and heard == [1]
    assert (tmp_path / TOLD).exists()


def test_a_second_ctrl_c_gives_processes_some_seconds(launcher, monkeypatch):
    timers = []
    monkeypatch.setattr(
        torchrun.threading,
        "Timer",
        lambda seconds, work: timers.append((seconds, work)) or SimpleNamespace(start=lambda: None),
    )
    for number, waits in (
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        (signal.SIGUSR1, 0),
        (signal.SIGINT, 1),
        (signal.SIGINT, 1),
    ):
        launcher.pass_on(number, None)
        assert len(timers) == waits
    launcher.sent.clear()
    ((seconds, kill),) = timers
    kill()
    assert seconds == torchrun.SECONDS_AFTER_SECOND_CTRL_C == 5 and launcher.killed_all
    assert launcher.sent == [(11, signal.SIGKILL), (12, signal.SIGKILL)]


def claim(folder: Path, start: int, **values) -> None:
    file = folder / "run" / f"attempt_{start}" / CLAIM
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps(asdict(Claim(**{"rank": 1, "host": "h", "status": 2, "pid": 1, "when": time.time(), **values})))
    )


def ended(code: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, pid=4321)


@pytest.mark.parametrize(
    ("code", "told", "claimed", "status", "says"),
    [
        (3, [], False, 3, f"error: {HERE} ended with status 3 and did not say why\n"),
        (3, [], True, 3, ""),
        (3, [signal.SIGTERM], False, 3, ""),
        (75, [], False, 75, ""),
        (2, [], True, 2, ""),
        (-signal.SIGSEGV, [], False, 139, f"error: {HERE} was killed by SIGSEGV: a crash in compiled code\n"),
        (-signal.SIGSEGV, [], True, 139, f"error: {HERE} was killed by SIGSEGV: a crash in compiled code\n"),
        (-signal.SIGTERM, [], False, 143, f"error: {HERE} was killed by SIGTERM: someone ended it\n"),
        (-signal.SIGTERM, [signal.SIGTERM], False, 143, f"stopped by SIGTERM: {HERE} had not begun; {SAVED_BEFORE}\n"),
        (-signal.SIGTERM, [signal.SIGTERM], True, 143, ""),
        (-signal.SIGINT, [signal.SIGINT], False, 130, f"stopped by Ctrl-C: {HERE} had not begun; {SAVED_BEFORE}\n"),
        (-signal.SIGHUP, [signal.SIGHUP], False, 129, f"stopped by {HANGS_UP}: {HERE} had not begun; {SAVED_BEFORE}\n"),
        (-signal.SIGUSR1, [signal.SIGUSR1], False, 75, f"stopped by SIGUSR1: {HERE} had not begun; {SAVED_BEFORE}\n"),
    ],
)
def test_what_a_process_could_not_say_is_said_for_it(launcher, tmp_path, capsys, code, told, claimed, status, says):
    launcher.told = told
    if claimed:
        claim(tmp_path, 0)
    assert launcher._after(3, ended(code)) == status and capsys.readouterr().err == says
    # What it had started is ended with it.
    assert launcher.sent == [(4321, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("claimed", "says"), [(False, f"stopped by Ctrl-C: {HERE} did not end by itself; {SAVED_BEFORE}\n"), (True, "")]
)
def test_processes_that_had_to_be_killed_ended_by_ctrl_c(launcher, tmp_path, capsys, claimed, says):
    launcher.killed_all, launcher.told = True, [signal.SIGINT]
    if claimed:
        claim(tmp_path, 0)
    assert launcher._after(3, ended(-9)) == 130 and capsys.readouterr().err == says


@pytest.mark.parametrize(("code", "spoken"), [(-signal.SIGKILL, True), (3, True), (75, False)])
def test_other_nodes_are_told_of_a_process_that_cannot_speak(launcher, tmp_path, monkeypatch, code, spoken):
    said = []
    monkeypatch.setattr(torchrun, "speak_for", lambda *given: said.append(given))
    for several in (False, True):
        launcher.several_nodes = several
        launcher._after(3, ended(code))
        assert len(said) == (several and spoken)
    if spoken:
        assert said[0][:2] == (3, exit_status(code)) and said[0][3] == tmp_path and said[0][2]


def test_reasons_are_of_this_run_and_of_its_last_start_in_the_order_of_time(launcher, tmp_path):
    launcher.began, launcher.restarts = 1000.0, 1
    claim(tmp_path, 0, when=1005.0, rank=5)
    claim(tmp_path / "x", 0, when=1003.0, rank=3)
    claim(tmp_path / "y", 0, when=999.9, rank=9)
    claim(tmp_path / "z", 1, when=1000.0, rank=0)
    assert [one.rank for one in launcher._claims()] == [0, 3, 5] and [one.rank for one in launcher._claims(1)] == [0]
    assert [one.rank for one in launcher._claims(0)] == [3, 5]
    (tmp_path / "z" / "run" / "attempt_1" / CLAIM).write_text("{")
    assert launcher._claims(1) == []


@pytest.mark.parametrize(
    ("number", "now", "says"),
    [
        (
            signal.SIGKILL,
            5,
            "was killed by SIGKILL: most often the machine was out of memory (dmesg says so), or someone ended it",
        ),
        (signal.SIGKILL, 6, "was killed by SIGKILL: the kernel killed processes here meanwhile since memory was out"),
        (signal.SIGBUS, 6, "was killed by SIGBUS: a crash; most often /dev/shm or the disk of a mapped file is full"),
        (signal.SIGABRT, 6, "was killed by SIGABRT: a library gave up; what it wrote stands above"),
        (signal.SIGPIPE, 6, "was killed by SIGPIPE"),
    ],
)
def test_what_killed_a_process_in_words(monkeypatch, number, now, says):
    monkeypatch.setattr(torchrun, "killed_for_memory", lambda: now)
    assert how_it_was_killed(number, 5) == says


def test_the_kernels_count_of_processes_that_it_killed(monkeypatch):
    text = "oom_killed 1\nother 2\noom_kill 34\nlast 5\n"
    monkeypatch.setattr(torchrun.Path, "read_text", lambda self, encoding: text if str(self) == "/proc/vmstat" else "")
    assert torchrun.killed_for_memory() == 34
    monkeypatch.setattr(torchrun.Path, "read_text", lambda self, encoding: "oom_kill x\n")
    assert torchrun.killed_for_memory() == 0


@pytest.mark.parametrize(
    ("error", "claims", "status", "says"),
    [
        (None, [], 0, ""),
        (RuntimeError("odd\nthing"), [], 1, f"error: torchrun on {socket.gethostname()}: odd thing\n"),
        (ValueError("odd"), [], 2, f"error: torchrun on {socket.gethostname()}: odd\n"),
        (OSError("odd"), [], 2, f"error: torchrun on {socket.gethostname()}: odd\n"),
        (RuntimeError("EADDRINUSE"), [], 2,
         f"error: torchrun on {socket.gethostname()}: EADDRINUSE: choose another --master-port or --rdzv-endpoint\n"),
        (RuntimeError("odd"), [5, 9], 9, ""),
    ],
)  # fmt: skip
def test_how_a_run_of_torchrun_ends(launcher, monkeypatch, capsys, error, claims, status, says):
    import logging

    import torch.distributed.run

    def run(words):
        assert words == ["a"]
        if error:
            raise error

    monkeypatch.setattr(torch.distributed.run, "main", run)
    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr(launcher, "_claims", lambda: [SimpleNamespace(status=one) for one in claims])
    assert launcher.run(["a"]) == status and capsys.readouterr().err == says


@pytest.mark.parametrize("several", [False, True])
def test_who_may_hold_the_store_waits_for_other_nodes(launcher, monkeypatch, several):
    import logging

    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    slept = []
    error = ChildFailedError.__new__(ChildFailedError)
    monkeypatch.setattr(ChildFailedError, "get_first_failure", lambda _: (3, ended(7)))
    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr(torchrun.time, "sleep", slept.append)
    monkeypatch.setattr(torch.distributed.run, "main", lambda _: (_ for _ in ()).throw(error))
    launcher.several_nodes = several
    assert launcher.run([]) == 7 and slept == [torchrun.SECONDS_FOR_OTHER_NODES] * several
    stopped = SignalException("x", signal.SIGTERM)
    monkeypatch.setattr(torch.distributed.run, "main", lambda _: (_ for _ in ()).throw(stopped))
    assert launcher.run([]) == 143


@pytest.mark.parametrize(
    ("given", "several", "shares"),
    [({}, False, None), ({"nnodes": True}, True, None), ({"nnodes": True, "max_restarts": 2}, True, "1"),
     ({"max_restarts": 2}, False, None)],
)  # fmt: skip
def test_a_run_is_prepared_for_its_nodes_its_starts_and_its_logs(monkeypatch, tmp_path, given, several, shares):
    """In a folder that its processes know, which goes with it; a signal that is ignored stays so."""
    import torch.distributed.run  # noqa: F401

    seen, handled = {}, []
    for name in (LAUNCHER, "TORCH_CPP_LOG_LEVEL", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torchrun, "Listener", lambda *given: ("listener", *given))
    monkeypatch.setattr(torchrun.signal, "signal", lambda number, handler: handled.append((number, handler)))
    ignored = signal.SIGHUP if several else None
    monkeypatch.setattr(
        torchrun.signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL
    )

    def run(self, words):
        folder = Path(os.environ[LAUNCHER])
        seen.update(vars(self), words=words, there=folder.is_dir(), same=folder == self.folder)
        return 7

    monkeypatch.setattr(Launcher, "run", run)
    logs = tmp_path / "logs"
    restarts = given.get("max_restarts", 0)
    start = ["--nnodes=2"] * several + [f"--max-restarts={restarts}"]
    assert torchrun.launch([*start, f"--log-dir={logs}", "x.py", "a"]) == 7
    assert seen["there"] and seen["same"] and not seen["folder"].exists() and seen["logs"] == logs
    assert (seen["several_nodes"], seen["restarts"]) == (several, restarts)
    assert ("--standalone" in seen["words"]) is not several and seen["words"][-2:] == ["x.py", "a"]
    assert (
        os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == shares and os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    )
    assert [number for number, _ in handled] == [number for number in STATUS_OF_SIGNAL if number != ignored]
    assert seen["listener"][0] == "listener"
