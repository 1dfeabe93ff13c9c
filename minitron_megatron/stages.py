"""Commands as the stages of something longer: each in a process of its own, printed before it runs.

    output/stages.json    what is done: {stage: {seconds, what, starting}}, `what` being its command and what the whole starts
                          from, `starting` the seconds that the command took to its first useful work. Paths in the folder
                          of the whole are written as of {output}: it may be copied, or get another name

A stage is done when its output is whole (its command wrote the manifest) and it was asked for in the same words; then a
second run passes it by. Asked for otherwise, its command runs again and says itself what it thinks of the output it finds.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minitron_megatron.checkpoints.folder import MANIFEST, read_manifest
from minitron_megatron.checkpoints.locks import another_run
from minitron_megatron.checkpoints.unfinished import check_nobody_writes
from minitron_megatron.cli import spelling
from minitron_megatron.config import CompressConfig
from minitron_megatron.console import console
from minitron_megatron.ending import NAMES, NOTHING_KEPT, STATUS_OF_SIGNAL, keeping, stop_together
from minitron_megatron.errors import UserError
from minitron_megatron.machine import usable_cores
from minitron_megatron.parallel.torchrun import exit_status, how_it_was_killed, killed_for_memory
from minitron_megatron.plain_files import read_json, write_whole
from minitron_megatron.readers import leave_lost_readers
from minitron_megatron.starts import STARTS, record_start
from minitron_megatron.witness import Witness

ROOT = Path(__file__).resolve().parent.parent
# What is done, in the folder of a whole.
STAGES_FILE = "stages.json"
STAGES_KEPT = "the stages that are done are kept; the same command goes on from there"
# In a command that is done: the folder of the whole.
HERE = "{output}"
# In the environment of a stage: what follows on it is known already, and need not be said.
STAGE = "MINITRON_STAGE"
# Imports and checks of a command that computes, of several processes of it, and of one that does not, in times of torch's.
START, START_OF_SEVERAL, START_OF_LIGHT = 2.0, 2.5, 1.0
# A daemon that a stage left behind may hold its standard error open: do not wait for that one.
SECONDS_FOR_LAST_WORDS = 10.0


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def stage_words(start: str, processes: int, name: str) -> list[str]:
    """The words that start `processes` of a command, before its options, as they can be typed here.

    Raises UserError when `start` cannot be read.
    """
    if processes == 1:
        return spelling.program_words(name)
    words = start_words(start, processes)
    if words[:1] == ["minitron"]:
        return [*spelling.minitron_words(), *words[1:], name]
    return [*words, *spelling.words_after_start(name)]


def start_words(start: str, processes: int) -> list[str]:
    """The words of `start` for so many processes. Raises UserError when they cannot be taken apart."""
    try:
        return shlex.split(start.replace("{processes}", str(processes)))
    except ValueError as error:
        raise UserError(f"start={start} cannot be read ({error}): mend its quotes") from None


def runnable(words: Sequence[str]) -> list[str]:
    """The same words with this Python, whatever the PATH says."""
    program, *rest = words
    if program == "minitron":
        rest = ["-m", "minitron_megatron", *rest]
    return [program_of(program) or program, *rest]


def program_of(word: str) -> str | None:
    """Where a program is: this Python, beside it (torchrun), or on the PATH; None when nowhere."""
    if word in ("python", "minitron"):
        return sys.executable
    beside_python = Path(sys.executable).parent / word
    return str(beside_python) if beside_python.is_file() else shutil.which(word)


def is_whole(output: Path) -> bool:
    """Whether a command's output is there; a training run's is its model/."""
    return (output / MANIFEST).is_file() or (output / "model" / MANIFEST).is_file()


def read_stages(file: Path) -> dict[str, dict[str, Any]]:
    """What is done, by the file of an earlier run; what cannot be read of it is not done, its command will find out."""
    try:
        values = read_json(file)
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        name: stage for name, stage in values.items() if isinstance(stage, dict) and {"seconds", "what"} <= set(stage)
    }


@contextmanager
def keeping_stages(root: Path) -> Iterator[None]:
    """While the stages of a whole run: an end between two of them, or before the next, leaves those that are done."""

    def kept() -> str:
        done = any(read_stages(file) for pattern in (STAGES_FILE, f"*/*/{STAGES_FILE}") for file in root.glob(pattern))
        return STAGES_KEPT if done else NOTHING_KEPT

    with keeping(kept):
        yield


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Make the folder of a whole before what takes time, and keep a second run out of it until this one ends.

    Where nothing comes of it, as after a mistake that shows while it is planned, what was made is taken away again.

    Raises UserError where another run is at work there.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    lock = _lock(root)
    try:
        with keeping_stages(root):
            yield
    finally:
        marks = {STAGES_FILE, STARTS}
        if {path.name for path in root.iterdir()} <= marks and not read_stages(root / STAGES_FILE):
            for name in marks:
                (root / name).unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        os.close(lock)


def _lock(root: Path) -> int:
    """The descriptor that keeps others out of a folder, which is made. Raises UserError where another run has it."""
    while True:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have taken the folder away.
            if os.path.samestat(os.fstat(lock), root.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise another_run("is at work in", root) from None
        except FileNotFoundError:
            pass
        os.close(lock)


class Stages:
    """Runs stages once, times them, and remembers that they are done."""

    def __init__(
        self,
        file: Path,
        *,
        words: Sequence[str] = (),
        inputs: Mapping[str, str] | None = None,
        start: str = CompressConfig.start,
        root: Path | None = None,
    ) -> None:
        """Stages that are remembered in a file.

        Args:
            file: where what is done is written.
            words: options that every command gets.
            inputs: digest, by name, of what the first stages start from; with other ones nothing counts as done.
            start: how a stage of several processes is started.
            root: the folder of the whole; that of the file, if not given.
        """
        self.file, self.words, self.inputs, self.start = file, tuple(words), dict(inputs or {}), start
        self.root = root or file.parent
        self.done = read_stages(file)
        # Digests of outputs by stage, of those that this start has come past.
        self.outputs: dict[str, str] = {}
        write_json(self.file, self.done)
        record_start(file.parent)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, in the order of their first runs."""
        return {name: stage["seconds"] for name, stage in self.done.items()}

    @property
    def starting(self) -> dict[str, float]:
        """Seconds that each stage that is a command took to its first useful work."""
        return {name: stage["starting"] for name, stage in self.done.items() if stage.get("starting") is not None}

    def run(
        self, name: str, there: Path, work: Callable[[], None], what: Any = None, output: Path | None = None
    ) -> None:
        """Do `work` unless it was done before, as `what`, and the file or folder that shows it is still `there`.

        `output` is its command's, if it is one. Where an output of a stage before is another one now, the work is for the command
        to judge: it compares what it reads. Raises UserError where the stage's own output is another one now.
        """
        before, past = self._before(name), dict(self.outputs)
        if before and before["what"] == what and there.exists() and before.get("past", past) == past:
            self._note_output(name, output, before.get("digest"))
            console().print(f"{name}: done before in {before['seconds']:.0f} s ({there})", style="dim")
            return
        began = time.monotonic()
        with keeping(lambda: self._kept(name)):
            work()
        self.done[name] = {"seconds": round(time.monotonic() - began, 1), "what": what, "past": past}
        if output is not None:
            self.done[name]["starting"] = _of_manifest(output, "seconds_starting")
            self.done[name]["digest"] = self._note_output(name, output)
        write_json(self.file, self.done)

    def _note_output(self, name: str, output: Path | None, before: str | None = None) -> str | None:
        """Keep the digest of a stage's output, None where it has none.

        Raises UserError where it is damaged, or was another one `before`.
        """
        try:
            digest = None if output is None else _of_manifest(output, "digest")
        except UserError as error:
            raise UserError(f"{name}: {error}: remove {output}, and the same command does") from None
        if digest is not None:
            self.outputs[name] = digest
        if before not in (None, digest):
            raise UserError(
                f"{name}: {output} is another one than was made here ({digest}, not {before}): put the first one back, or "
                "choose another output="
            )
        return digest

    def command(
        self,
        name: str,
        output: Path,
        command: str,
        *words: str,
        processes: int = 1,
        whole: Callable[[Path], bool] = is_whole,
    ) -> None:
        """A stage that is one command. Raises UserError with its name when it fails.

        Args:
            name: of the stage.
            output: of its command.
            command: its name.
            words: its options.
            processes: how many of it.
            whole: whether an output is what the stage is to make.
        """
        options = [*words, *self.words, f"output={output}"]
        asked: list[Ended] = []
        words = [*stage_words(self.start, processes, command), *options]
        line = spelling.joined(words)

        def work() -> None:
            # A stage outlives a whole that was killed.
            try:
                check_nobody_writes(output)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            console().print(f"\n$ {line}", style="bold", highlight=False, soft_wrap=True)
            ended = Ended(*run_program(runnable(words), processes))
            if ended.finished and whole(output):
                asked.append(ended)
                return
            if ended.status in STATUS_OF_SIGNAL.values():
                reason = (ended.reason or f"{_by(ended.status)}: {NOTHING_KEPT}").replace(
                    NOTHING_KEPT, self._kept(name)
                )
                stop_together(f"in {name}, {reason}", ended.status)
            if ended.status:
                status = f"ended with status {ended.status}; mend what it says and run the same command again"
                raise UserError(f"{name}: {ended.reason or status}")
            if not whole(output):
                raise UserError(f"{name}: stopped before its end; the same command continues it")

        what = self._placed({"command": [command, *options], "inputs": self.inputs})
        self.run(name, output if whole(output) else output / MANIFEST, work, what, output)
        if asked:
            status = asked[0].status
            stop_together(f"after {name}, {_by(status)}: {name} is done; the same command goes on from there", status)

    def _before(self, name: str) -> dict[str, Any] | None:
        """What is known of a stage, its command with the folder of the whole as HERE."""
        before = self.done.get(name)
        return before and {**before, "what": self._placed(before["what"])}

    def _placed(self, what: Any) -> Any:
        """A stage's command with the folder of the whole as HERE."""
        if not isinstance(what, dict) or not isinstance(words := what.get("command"), list):
            return what
        root = re.compile(rf"(?<![\w./-]){re.escape(str(self.root))}(?![\w.-])")
        return {**what, "command": [root.sub(HERE, str(word)) for word in words]}

    def _kept(self, name: str) -> str:
        """What an end in the middle of a stage leaves, whose command keeps nothing of it."""
        before = [one for one in self.done if one != name]
        if not before:
            return f"no stage was done before it; the same command begins with {name}"
        return f"the stages before {name} are kept; the same command continues with it"


def _by(status: int) -> str:
    """The signal with which a process ends in such a status."""
    return f"by {NAMES[next(number for number, one in STATUS_OF_SIGNAL.items() if one == status)]}"


def _of_manifest(output: Path, key: str) -> Any:
    """What the manifest of a command's output, or of the model that a training run published, says; None where it does not.

    Raises UserError where one of its files is missing, or has another size.
    """
    folder = next((folder for folder in (output, output / "model") if (folder / MANIFEST).is_file()), None)
    return None if folder is None else read_manifest(folder).get(key)


class Ended(NamedTuple):
    """How a program ended: its exit status, and why it ended before its time.

    Where this process was asked to end meanwhile, the status is the one of that signal, whatever the program made of it;
    `finished` says that it came to its own end nevertheless.
    """

    status: int
    reason: str
    finished: bool = False


def run_program(program: list[str], processes: int) -> Ended:
    """Run a program to its end; why it ended is left to the caller to show.

    A status of STATUS_OF_SIGNAL where this process was asked to end: no other starts.
    """
    threads = str(max(1, usable_cores() // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, STAGE: "1"}
    reasons: list[str] = []

    def start() -> subprocess.Popen:
        return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")

    def listen(child: subprocess.Popen) -> None:
        with child.stderr as lines:
            for line in lines:
                word, _, reason = line.partition(" ")
                if word in ("error:", "stopped"):
                    reasons.append(reason.strip())
                else:
                    with contextlib.suppress(OSError):  # nobody reads it
                        print(line, end="", file=sys.stderr, flush=True)

    killed_before = killed_for_memory()
    with outlive(start) as (child, asked):
        listener = threading.Thread(target=listen, args=(child,), daemon=True)
        listener.start()
        child.wait()
    listener.join(SECONDS_FOR_LAST_WORDS)
    status = exit_status(child.returncode)
    if asked and status not in STATUS_OF_SIGNAL.values():
        status = STATUS_OF_SIGNAL[asked[0]]
    elif child.returncode < 0 and not asked and not reasons:
        reasons.append(how_it_was_killed(-child.returncode, killed_before))
    return Ended(status, reasons[0] if reasons else "", finished=bool(asked) and child.returncode == 0)


@contextmanager
def outlive(start: Callable[[], subprocess.Popen]) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """Start a child, and let it end first when this process is asked to; yields it and the signals that asked.

    They are passed on, also one that comes while the child starts, but where the child has them already: a terminal's Ctrl-C
    reaches every process of the group, and a second one would end the child at once.
    """
    asked: list[int] = []
    started: list[subprocess.Popen] = []
    with Witness() as witness:

        def ask(number: int, _: Any) -> None:
            asked.append(number)
            leave_lost_readers()
            if started and not witness.heard(number):
                started[0].send_signal(number)

        heeded = [number for number in STATUS_OF_SIGNAL if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in heeded}
        try:
            started.append(start())
            if asked:
                started[0].send_signal(asked[0])
            yield started[0], asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
