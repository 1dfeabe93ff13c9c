"""Why a process ends before its time: said once a job, by the rank that failed first. The others end without a word.

    a rank fails ──▶ takes its node's claim, a file ──▶ takes the job's claim, in its store (several nodes) ──▶ speaks
                        │ taken                             │ taken
                        └──▶ waits until it is said ◀───────┘ ends with the first one's exit status

Exit status: 0 done, 2 the user can mend it, 1 anything else; 130 Ctrl-C, 143 SIGTERM, 75 SIGUSR1 (to be continued). Whoever
cannot learn whether the reason was said says its own: twice is better than never. torch is imported for the claim of
several nodes alone.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.first_moments import NAMES, NOTHING_KEPT, STATUS_OF_SIGNAL
from minitron_megatron.plain_files import parse_json
from minitron_megatron.plain_text import one_line

USER_MISTAKE = 2
# A process that lost its peer, or was told to end, waits so long for the reason of the one that failed first.
SECONDS_OF_PATIENCE = 5.0
# torchrun kills 30 s after it has told a process to end: what is to be said is said before.
SECONDS_FOR_THE_STORE = 15.0
SECONDS_UNTIL_SAID = 20.0
# A folder of parallel/torchrun.py, for its processes: it says itself which of them were killed, and the file TOLD in there says
# that the signal which they get is the user's.
LAUNCHER = "MINITRON_LAUNCHER"
TOLD = "told"
# Which rank speaks, beside the logs of torchrun's processes.
CLAIM = "first_failure.json"
# Troubles with files that a user can put right.
_OF_THE_USER = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENAMETOOLONG,
    )
)
# What gloo, NCCL and the store say when the process at the other end is gone.
_PEER_IS_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited|ncclRemoteError|socket closed"
    r"|failed to recv, got 0 bytes|connect.*timed out|timed out waiting \d+ms|wait timeout|store is unreachable",
    re.IGNORECASE,
)
# Their own words, not another library's of a connection of its own.
_OF_GROUPS = re.compile(r"gloo|nccl|TCPStore|store is unreachable|wait timeout|ProcessGroup", re.IGNORECASE)
_BEGAN = time.time()
# Without torchrun the ranks of a job begin one after another: a rank may find the claim of one that failed before it began.
SECONDS_BETWEEN_RANKS = 30.0

try:
    _FOLDER = os.getcwd()
except OSError:  # it was removed
    _FOLDER = ""

SOME_KEPT = "what is done so far is kept; the same command continues"


class Stopped(BaseException):
    """A signal asked for the end: what has begun is unwound, and the command ends."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {NAMES[number]}: {_State.kept[-1]()}")
        self.number = number


@dataclass(frozen=True)
class Reason:
    """Why a process ends: one line, an exit status, a traceback where it is a bug.

    word: "error", or "stopped" where a signal asked for it.
    follows: whether it is likely to follow from another process's end, whose reason is the better one.
    """

    text: str
    status: int
    word: str = "error"
    trace: str = ""
    follows: bool = False


@dataclass(frozen=True)
class Claim:
    """Who speaks for a node or a job, how it ends, and whether the reason has been printed.

    text: the reason. when: seconds since the epoch. silent: ranks that left the word to it.
    """

    rank: int
    host: str
    status: int
    pid: int
    said: bool = False
    text: str = ""
    when: float = 0.0
    silent: tuple[int, ...] = ()


class _State:
    """What this process has said, and what an end leaves of its work, innermost last."""

    status: int | None = None
    handles = False
    kept: ClassVar[list[Callable[[], str]]] = [lambda: NOTHING_KEPT]


@contextlib.contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """While this work goes on, `what()` says what an end by a signal leaves of it, and how to go on."""
    _State.kept.append(what)
    try:
        yield
    finally:
        _State.kept.remove(what)


def reason_of(error: BaseException) -> Reason:
    """One line and an exit status for whatever ended the work."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, Stopped):
            # torchrun sends SIGTERM to the others when one process ends.
            follows = cause.number == signal.SIGTERM and several() and not _told_by_launcher()
            return Reason(str(cause), STATUS_OF_SIGNAL[cause.number], "stopped", follows=follows)
    if isinstance(error, UserError):
        return Reason(one_line(str(error)), USER_MISTAKE)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_USER:
        advice = "mend it or choose another place, and run the same command again"
        return Reason(one_line(f"{error.filename}: {error.strerror}: {advice}"), USER_MISTAKE)
    trace = "".join(traceback.format_exception(error))
    if several() and any(_is_of_a_peer(cause) for cause in chain):
        where = _last_own_line(error)
        surely = any(_OF_GROUPS.search(str(cause)) for cause in chain)
        text = f"lost another process of the job{where}: {in_one_line(error, 200)}"
        return Reason(text, 1, trace="" if surely else trace, follows=True)
    return Reason(f"{type(error).__name__}: {in_one_line(error, 200)}", 1, trace=trace)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_a_peer(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"RuntimeError", "ConnectionError"}) and bool(_PEER_IS_GONE.search(str(error)))


def _last_own_line(error: BaseException) -> str:
    """Where of this software the error came from, as " in train/loop.py, line 3"."""
    package = Path(__file__).resolve().parent
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)
    ]
    return f" in {Path(frames[-1].filename).relative_to(package)}, line {frames[-1].lineno}" if frames else ""


def report(error: BaseException) -> int:
    """Say why this process ends, unless that was said or another rank speaks for the job; gives the exit status."""
    return _report(reason_of(error))


@contextlib.contextmanager
def said_at_once() -> Iterator[None]:
    """A rank says why it ends before its groups are given up, which may wait for others."""
    try:
        yield
    except Exception as error:
        if _State.handles and several():
            report(error)
        raise


def _report(reason: Reason) -> int:
    if _State.status is not None:
        return _State.status
    _State.status = reason.status
    with _no_signals():
        if several():
            _State.status = _as_one_of_several(reason)
        else:
            say(f"{reason.word}{':' if reason.word == 'error' else ''} {reason.text}")
    return _State.status


def is_a_bug(error: BaseException) -> bool:
    """Whether nobody but a developer can mend it: its traceback is wanted."""
    return bool(reason_of(error).trace)


def finish_whatever_comes() -> None:
    """What is left is short, and makes a command's work whole: from here on only Ctrl-C cuts it off."""
    if _State.handles:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def no_more_signals() -> None:
    """The command has done its work, or has said why not: a request to end comes too late to change its exit status."""
    finish_whatever_comes()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _State.status is not None and several():
        # What libraries write on their way out adds nothing to the reason that was given.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def stop_together(text: str, status: int) -> NoReturn:
    """End all ranks, which agreed on it, in one line of rank 0."""
    say_from_rank_zero(f"stopped {text}")
    _State.status = status
    raise SystemExit(status)


def say(text: str) -> None:
    """Print text on standard error, wherever it is called: in a signal's handler too, or when the terminal is gone."""
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=sys.stderr, flush=True)
        except RuntimeError:  # the signal came in the middle of a line
            os.write(2, f"{text}\n".encode())


def say_from_rank_zero(text: str) -> None:
    """The same from one process of a job alone."""
    if _number("RANK", 0) == 0:
        say(text)


# --- Several processes ----------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this is a rank of a job of several processes."""
    return "RANK" in os.environ and _number("WORLD_SIZE", 1) > 1


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return default


def _spans_nodes() -> bool:
    """Whether other nodes may have ranks of this job."""
    for variable in ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"):  # of torchrun, of srun
        if variable in os.environ:
            return _number(variable, 2) > 1
    return os.environ.get("MASTER_ADDR", "localhost") not in ("localhost", "127.0.0.1", "::1")


def _as_one_of_several(reason: Reason) -> int:
    mine = Claim(
        _number("RANK", 0), socket.gethostname(), reason.status, os.getpid(), text=reason.text, when=time.time()
    )
    file = claim_file()
    if reason.follows:
        first = _claimed_meanwhile(file, reason, mine)
        if first is not None:
            return _wait_until_said(file, first, reason, mine)
        if _a_neighbour_is_gone():
            if LAUNCHER in os.environ:
                return reason.status
            reason = Reason("another process of this node was killed, or ended without a word: torchrun names it", 1)
    if file is not None:
        with contextlib.suppress(OSError):  # no place for a claim: say it
            if not _claim(file, reason, mine):
                return _wait_until_said(file, None, reason, mine)
    if _spans_nodes():
        first = _first_of_job(mine)
        if first is not None:
            _mark_as_said(file, mine, first)
            return first.status
    _speak(reason, mine)
    _mark_as_said(file, mine, mine)
    return reason.status


def claim_file() -> Path | None:
    """The file that the first rank of a node makes.

    torchrun gives each start of a job a folder on each node. Without it the name is that of the job: where its processes meet,
    their command line and folder. Another job may have had that name before (`_is_of_my_job`).
    """
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent / CLAIM
    of_job = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID")
    name = "-".join(re.sub(r"\W", "_", os.environ.get(variable, "")) for variable in of_job)
    words = "\0".join((_FOLDER, *sys.orig_argv)).encode(errors="surrogateescape")
    folder = Path(tempfile.gettempdir()) / f"minitron-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder / f"{name}-{zlib.crc32(words):08x}.json"


def _is_of_my_job(claim: Claim, reason: Reason, mine: Claim) -> bool:
    """Whether the word may be left to a claim. With torchrun always; without it only to one of the same start, for all we know.

    Its reason is this rank's own too, or one that this rank's follows from; it is of this rank's time; and this rank has not
    spoken by it, or been silent for it, before: that was an earlier start of the job.
    """
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return True
    if mine.rank in (claim.rank, *claim.silent):
        return False
    if reason.follows:
        return claim.when >= _BEGAN
    return claim.text == reason.text and claim.when >= _BEGAN - SECONDS_BETWEEN_RANKS


def _claim(file: Path, reason: Reason, mine: Claim) -> bool:
    """Take a node's claim; False when the word is left to another rank, which has it."""
    with _one_at_a_time(file):
        try:
            with open(file, "x", encoding="utf-8") as out:
                json.dump(asdict(mine), out)
        except FileExistsError:
            if os.environ.get("TORCHELASTIC_ERROR_FILE"):
                return False
            if _left_to(file, reason, mine):
                return False
            _write(file, mine)
    return True


def _left_to(file: Path, reason: Reason, mine: Claim) -> Claim | None:
    """The claim to which this rank leaves the word, which then says so."""
    claim = read_claim(file)
    if claim is None or not _is_of_my_job(claim, reason, mine):
        return None
    if not os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _write(file, replace(claim, silent=(*claim.silent, mine.rank)))
    return claim


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Of the processes that look at a claim and change it; a lock that cannot be had in time is done without."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        yield  # making the file is all
        return
    with open(file.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        deadline = time.monotonic() + SECONDS_OF_PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        yield


def _claim_in(text: str) -> Claim:
    values = parse_json(text)
    return Claim(**{**values, "silent": tuple(values["silent"])})


def read_claim(file: Path | None) -> Claim | None:
    """The claim in a file, None when there is none or it is being written."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if file is not None:
            return _claim_in(file.read_text(encoding="utf-8"))
    return None


def _write(file: Path, claim: Claim) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(claim)), encoding="utf-8")
    partial.replace(file)


def _mark_as_said(file: Path | None, mine: Claim, first: Claim) -> None:
    """Have the node's claim, which is `mine`, say that the reason of `first` is printed."""
    with contextlib.suppress(OSError):
        if file is not None:
            with _one_at_a_time(file):
                now = read_claim(file) or mine
                if (now.rank, now.pid) == (mine.rank, mine.pid):
                    _write(file, replace(first, said=True, when=mine.when, silent=now.silent))


def _claimed_meanwhile(file: Path | None, reason: Reason, mine: Claim) -> Claim | None:
    """The claim of a rank that failed before this one, which may still be on its way to say so."""
    deadline, more = time.monotonic() + SECONDS_OF_PATIENCE, file is not None
    while more:
        more = time.monotonic() < deadline and not _a_neighbour_is_gone()
        with contextlib.suppress(OSError), _one_at_a_time(file):
            if (claim := _left_to(file, reason, mine)) is not None:
                return claim
        time.sleep(0.05)
    return None


def _wait_until_said(file: Path, first: Claim | None, reason: Reason, mine: Claim) -> int:
    """The first one's exit status, once its reason is printed; this one's where it will not be."""
    deadline = time.monotonic() + SECONDS_UNTIL_SAID
    while time.monotonic() < deadline:
        first = read_claim(file) or first
        if first is not None and first.said:
            return first.status
        if first is not None and not Path(f"/proc/{first.pid}").exists():
            break
        time.sleep(0.05)
    if (first := read_claim(file)) is not None and first.said:
        return first.status
    _speak(reason, mine)
    return reason.status


def _a_neighbour_is_gone() -> bool:
    """Whether torchrun, this process's parent, has fewer processes than it started."""
    from minitron_megatron.parallel.torchrun import children

    return "TORCHELASTIC_RUN_ID" in os.environ and len(children(os.getppid())) < _number("LOCAL_WORLD_SIZE", 1)


def _told_by_launcher() -> bool:
    """Whether the signal came through parallel/torchrun.py from outside, to all processes."""
    return LAUNCHER in os.environ and (Path(os.environ[LAUNCHER]) / TOLD).exists()


def _speak(reason: Reason, mine: Claim) -> None:
    where = f"rank {mine.rank} on {mine.host}"
    head = f"error: {where}: {reason.text}" if reason.word == "error" else f"{reason.word} {reason.text} ({where})"
    say(f"{head}\n{reason.trace}".rstrip())


def _first_of_job(mine: Claim) -> Claim | None:
    """The claim of another node's rank, None when `mine` is the first, or when no store answers in time."""
    found: list[str] = []
    shown = os.dup(2)
    seeker = threading.Thread(target=_ask_store, args=(json.dumps(asdict(mine)), found), daemon=True)
    seeker.start()
    seeker.join(SECONDS_FOR_THE_STORE)
    os.dup2(shown, 2)  # where it still waits
    os.close(shown)
    if not found:
        return None
    first = _claim_in(found[0])
    return None if first == mine else first


def _ask_store(mine: str, found: list[str]) -> None:
    with contextlib.suppress(Exception), _no_errors_shown():
        from torch.distributed import TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
            wait_for_workers=False,
        )
        # A job that is started again can speak again.
        key = f"minitron_megatron/first_failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        found.append(store.compare_set(key, "", mine).decode())


@contextlib.contextmanager
def _no_errors_shown() -> Iterator[None]:
    """Nothing that C++ writes on standard error: a store that is gone has pages to say."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- Signals --------------------------------------------------------------------------------------------------------


def handle_signals() -> None:
    """From here on SIGINT, SIGTERM and SIGUSR1 end this process in one line; processes that it forks keep the default."""
    owner, _State.handles = os.getpid(), True

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        stopped = Stopped(number)
        if several():
            # What is unwound may wait for ranks that are gone.
            report(stopped)
        raise stopped

    for number in STATUS_OF_SIGNAL:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """A process that is saying why it ends is not cut short."""
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, signal.SIG_IGN) for number in STATUS_OF_SIGNAL}
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
