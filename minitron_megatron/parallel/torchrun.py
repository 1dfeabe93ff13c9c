"""torchrun that says one line: `python -m minitron_megatron.parallel.torchrun …` takes what torchrun takes.

    a signal, Ctrl-C ──▶ this, on every node ──▶ each of its processes, which may save and then end
    exit status      ◀── that of the first process that failed

torchrun by itself dies of SIGUSR1, kills its processes 30 seconds after a SIGTERM (too few to save), exits with 1 whatever
they exited with (a mistake of the user, 2, and a wish to be requeued, 75, would look like a crash), and prints a page about
a failure whose reason its process has said (ending.py). Only a process that was killed cannot: its rank and signal are said here.
On one node the port is a free one. The first process of a node that ends with another status than 0 ends the others there: what
has to be finished comes before a barrier.
"""

import argparse
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from minitron_megatron.claims import CLAIM, LAUNCHER, TOLD, Claim, read_claim, say, speak_for
from minitron_megatron.errors import in_one_line
from minitron_megatron.first_moments import NAMES, REQUEUE, STATUS_OF_SIGNAL, USER_MISTAKE
from minitron_megatron.readers import leave_lost_readers
from minitron_megatron.unheard import Listener

# Processes that do not answer a second Ctrl-C wait in a library for one another.
SECONDS_AFTER_SECOND_CTRL_C = 5
SECONDS_FOR_OTHER_NODES = 12.0
_LIKELY = {
    signal.SIGKILL: "most often the machine was out of memory (dmesg says so), or someone ended it",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGBUS: "a crash; most often /dev/shm or the disk of a mapped file is full",
    signal.SIGABRT: "a library gave up; what it wrote stands above",
    signal.SIGTERM: "someone ended it",
}
SAVED_BEFORE = "what was saved before is kept, and the same command goes on from it"
# Options of torchrun that say where processes of several nodes meet.
_MEETING = ("--nnodes", "--node-rank", "--rdzv", "--master", "--standalone")


def children(of: int) -> list[int]:
    """Process ids of the direct children, by /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # "pid (name) state parent …", where a name may hold blanks and parentheses
            stat = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        state, parent = stat.rpartition(")")[2].split()[:2]
        if int(parent) == of and state != "Z":
            found.append(int(folder.name))
    return found


def exit_status(code: int) -> int:
    """A process's return code as a shell's exit status: 128 + n where signal n ended it."""
    return 128 - code if code < 0 else code


def understood(words: list[str]) -> argparse.Namespace:
    """What torchrun makes of its words."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(words)


def completed(words: list[str], given: argparse.Namespace, folder: Path) -> list[str]:
    """torchrun's words, with a free port on one node, its logs in `folder`, and signals left to this module, unless they say."""
    own = ["--signals-to-handle=SIGQUIT"]
    before = words[: len(words) - len(given.training_script_args) - 1]
    if not any(word.replace("_", "-").startswith(_MEETING) for word in before):
        own += ["--standalone", "--local-addr=127.0.0.1"]
    if not given.log_dir:
        own.append(f"--log-dir={folder}")
    return [*own, *words]


class Launcher:
    """One run of torchrun on this node; `told` are the signals that came from outside, `logs` is where its processes' are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs, self.began = folder, folder, time.time()
        self.told, self.killed_before = [], killed_for_memory()
        self.several_nodes, self.restarts, self.killed_all = False, 0, False
        self.listener: Listener | None = None

    def pass_on(self, number: int, _: FrameType | None) -> None:
        """Send a signal to every process of this node; before there are any, nothing is lost by ending at once."""
        if self.listener:
            self.listener.heard()
        leave_lost_readers()
        self.told.append(number)
        (self.folder / TOLD).touch()
        workers = children(os.getpid())
        if not workers:
            say(f"stopped by {NAMES[number]}: no process was at work; {SAVED_BEFORE}")
            sys.exit(STATUS_OF_SIGNAL[number])
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if self.told.count(signal.SIGINT) == 2:
            timer = threading.Timer(SECONDS_AFTER_SECOND_CTRL_C, self._kill_all)
            timer.daemon = True
            timer.start()

    def _kill_all(self) -> None:
        self.killed_all = True
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def pass_on_while_waiting(self, number: int) -> None:
        """The same from a thread: torchrun waits for other nodes, in C++ code that no handler interrupts."""
        try:
            self.pass_on(number, None)
        except SystemExit as ended:
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(int(ended.code or 0))

    def run(self, words: list[str]) -> int:
        """Run torchrun; gives the exit status of what it started."""
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main as torchrun

        # The table of its processes, and what it tells of their ends.
        logging.disable(logging.ERROR)
        try:
            torchrun(words)
        except ChildFailedError as error:
            status = self._after(*error.get_first_failure())
            if self.several_nodes:
                # This process may hold the store in which other nodes look for who spoke first.
                time.sleep(SECONDS_FOR_OTHER_NODES)
            return status
        except SignalException as error:
            return 128 + error.sigval
        except Exception as error:
            # Its rendezvous: a port that is taken, nodes that do not come or that ended first.
            if claims := self._claims():
                return claims[-1].status
            advice = ": choose another --master-port or --rdzv-endpoint" if "EADDRINUSE" in str(error) else ""
            say(f"error: torchrun on {socket.gethostname()}: {in_one_line(error, 300)}{advice}")
            return USER_MISTAKE if isinstance(error, ValueError | OSError) or advice else 1
        return 0

    def _claims(self, start: int | str = "*") -> list[Claim]:
        """Of the processes of one start of this run, or of all; in a folder that the user named others' may lie beside."""
        found = [read_claim(file) for file in self.logs.rglob(f"attempt_{start}/{CLAIM}")]
        own = [claim for claim in found if claim is not None and claim.when >= self.began]
        return sorted(own, key=lambda claim: claim.when)

    def _after(self, rank: int, failure: object) -> int:
        """Say what the process that failed first could not say itself; gives its exit status."""
        code, where = failure.exitcode, f"rank {rank} on {socket.gethostname()}"
        # What it had started, such as a checkpoint's writer, works for nobody now.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(failure.pid, signal.SIGKILL)
        if self.killed_all and signal.SIGINT in self.told:
            if not self._claims(self.restarts):
                say(f"stopped by {NAMES[signal.SIGINT]}: {where} did not end by itself; {SAVED_BEFORE}")
            return STATUS_OF_SIGNAL[signal.SIGINT]
        if code < 0 and -code in self.told:
            # One that had begun may have spoken.
            if not self._claims(self.restarts):
                say(f"stopped by {NAMES.get(-code, signal.Signals(-code).name)}: {where} had not begun; {SAVED_BEFORE}")
            return STATUS_OF_SIGNAL.get(-code, exit_status(code))
        if code < 0:
            text = how_it_was_killed(-code, self.killed_before)
        elif not self.told and code != REQUEUE and not self._claims(self.restarts):
            text = f"ended with status {code} and did not say why"
        else:
            return exit_status(code)
        say(f"error: {where} {text}")
        if self.several_nodes:
            speak_for(rank, exit_status(code), text, self.folder)
        return exit_status(code)


def how_it_was_killed(number: int, killed_before: int) -> str:
    """What ended a process that could not say so itself, as "was killed by SIGKILL: …".

    killed_before: `killed_for_memory()` when it was started.
    """
    likely = _LIKELY.get(number, "")
    if number == signal.SIGKILL and killed_for_memory() > killed_before:
        likely = "the kernel killed processes here meanwhile since memory was out"
    return f"was killed by {signal.Signals(number).name}{likely and ': '}{likely}"


def killed_for_memory() -> int:
    """How many processes the kernel of this machine has killed for memory since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def launch(words: list[str]) -> int:
    """Run torchrun with these words, and give the exit status of its processes."""
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        launcher = Launcher(Path(folder))
        os.environ[LAUNCHER] = folder
        # Of the store, when nodes end one after another: a page of addresses.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        launcher.listener = Listener(launcher.pass_on, launcher.pass_on_while_waiting)
        for number in STATUS_OF_SIGNAL:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, launcher.pass_on)
        given = understood(words)
        # torchrun gives up in the last start.
        launcher.restarts = given.max_restarts
        if given.log_dir:
            launcher.logs = Path(given.log_dir)
        words = completed(words, given, launcher.folder)
        launcher.several_nodes = "--standalone" not in words
        if launcher.several_nodes and given.max_restarts:
            # Each start then has a store of its own, which ends with rank 0: a reason may be said on each node.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        return launcher.run(words)


def main() -> NoReturn:
    """`python -m minitron_megatron.parallel.torchrun`."""
    sys.exit(launch(sys.argv[1:]))


if __name__ == "__main__":
    main()
