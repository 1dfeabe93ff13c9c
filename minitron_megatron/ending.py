"""Why a process ends before its time, in one line, and with which exit status; of several processes one speaks (claims.py).

Exit status: 0 done, 2 the user can mend it, 1 anything else; 130 Ctrl-C, 129 SIGHUP, 143 SIGTERM, 75 SIGUSR1 (to be
continued).
"""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from minitron_megatron.claims import (
    Reason,
    as_one_of_several,
    leave_address,
    look_for_a_claim,
    looks_for_others,
    say,
    say_early,
    say_from_rank_zero,
    several,
    told_by_launcher,
)
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.first_moments import NAMES, NOTHING_KEPT, STATUS_OF_SIGNAL, USER_MISTAKE
from minitron_megatron.plain_text import one_line
from minitron_megatron.readers import leave_lost_readers
from minitron_megatron.unheard import Listener

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
        errno.ELOOP,
        errno.EBUSY,
        errno.EXDEV,
        errno.EMFILE,
        errno.ENFILE,
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
SOME_KEPT = "what is done so far is kept; the same command continues"


class Stopped(BaseException):
    """A signal asked for the end: what has begun is unwound, and the command ends."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {NAMES[number]}: {_State.kept[-1]()}")
        self.number = number


class _State:
    """What this process has said, and what an end leaves of its work, innermost last."""

    status: int | None = None
    handles = finishing = False
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
            follows = cause.number == signal.SIGTERM and several() and not told_by_launcher()
            return Reason(str(cause), STATUS_OF_SIGNAL[cause.number], "stopped", follows=follows)
    if isinstance(error, UserError):
        return Reason(one_line(str(error)), USER_MISTAKE)
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Reason(
            f"{error.strerror}, where this was writing: free some and run the same command again", USER_MISTAKE
        )
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


def report_early(error: BaseException) -> None:
    """Say on one of several nodes what its ranks are going to end with."""
    say_early(reason_of(error).text)


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


@contextlib.contextmanager
def ending_with_others(seconds: float) -> Iterator[None]:
    """Within it this process ends when a rank on another node has failed: it may wait for that one where no library notices.

    Where they meet, for one, and in an NCCL collective. One process a node looks; torchrun ends the others there. `seconds` is
    how long the ranks' store may take to appear.
    """
    stop = threading.Event()
    if _State.handles and several() and looks_for_others():
        own = (stop, seconds, lambda: _State.status is not None or _State.finishing)
        threading.Thread(target=look_for_a_claim, args=own, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _report(reason: Reason) -> int:
    if _State.status is not None:
        return _State.status
    _State.status = reason.status
    with _no_signals():
        if several():
            _State.status = as_one_of_several(reason)
        else:
            say(f"{reason.word}{':' if reason.word == 'error' else ''} {reason.text}")
    return _State.status


def is_a_bug(error: BaseException) -> bool:
    """Whether nobody but a developer can mend it: its traceback is wanted."""
    return bool(reason_of(error).trace)


def finish_whatever_comes() -> None:
    """What is left is short, and makes a command's work whole: from here on only Ctrl-C cuts it off."""
    _State.finishing = True
    if _State.handles:
        for number in set(STATUS_OF_SIGNAL) - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)


def no_more_signals() -> None:
    """The command has done its work, or has said why not: a request to end comes too late to change its exit status."""
    finish_whatever_comes()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What could not be written would be an exit status of its own, Python's.
    leave_lost_readers()
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


# --- Signals --------------------------------------------------------------------------------------------------------


def handle_signals() -> None:
    """From here on the signals of STATUS_OF_SIGNAL end this process in one line; processes that it forks keep the default."""
    owner, _State.handles = os.getpid(), True

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        listener.heard()
        leave_lost_readers()
        if _is_importing(frame):
            end_at_once(number)
        stopped = Stopped(number)
        if several():
            # What is unwound may wait for ranks that are gone.
            report(stopped)
        raise stopped

    def end_at_once(number: int) -> None:
        report(Stopped(number))
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the signal came in the middle of a line
            sys.stdout.flush()
        os._exit(STATUS_OF_SIGNAL[number])

    listener = Listener(stop, end_at_once)
    for number in STATUS_OF_SIGNAL:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    leave_address()


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: libraries in C++, which import others, abort where that raises."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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
