"""Which process says why a job ends: the rank that failed first, once, whatever node it is on. The others end without a word.

    a rank fails ──▶ takes its node's claim, a file ──▶ takes the job's claim, in its store (several nodes) ──▶ speaks
                        │ taken                             │ taken
                        └──▶ waits until it is said ◀───────┘ ends with the first one's exit status

Whoever cannot learn whether the reason was said says its own: twice is better than never. A rank that waits for one that failed
on another node looks for the job's claim (`look_for_a_claim`). torch is imported for the claim of several nodes alone.
"""

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron_megatron.plain_files import parse_json

# A process that lost its peer, or was told to end, waits so long for the reason of the one that failed first.
SECONDS_OF_PATIENCE = 5.0
SECONDS_BETWEEN_LOOKS = 2.0
# torchrun kills 30 s after it has told a process to end: what is to be said is said before.
SECONDS_FOR_THE_STORE = 15.0
SECONDS_UNTIL_SAID = 20.0
# A folder of parallel/torchrun.py, for its processes: it says itself which of them were killed, and the file TOLD in there says
# that the signal which they get is the user's.
LAUNCHER = "MINITRON_LAUNCHER"
TOLD = "told"
# In the same folder, for the launcher: where the job's ranks meet.
MEETING = "meeting.json"
_OF_MEETING = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
# In the environment of this node's processes: the reason that its launcher has said before they started.
SAID_EARLY = "MINITRON_SAID"
# Which rank speaks, beside the logs of torchrun's processes.
CLAIM = "first_failure.json"
_BEGAN = time.time()
# Without torchrun the ranks of a job begin one after another: a rank may find the claim of one that failed before it began.
SECONDS_BETWEEN_RANKS = 30.0

try:
    _FOLDER = os.getcwd()
except OSError:  # it was removed
    _FOLDER = ""


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


def say(text: str) -> None:
    """Print text on standard error, wherever it is called: in a signal's handler too, or when the terminal is gone."""
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=sys.stderr, flush=True)
        except RuntimeError:  # the signal came in the middle of a line
            os.write(2, f"{text}\n".encode())


def say_from_rank_zero(text: str) -> None:
    """The same from one process of a job alone."""
    if number_of("RANK", 0) == 0:
        say(text)


def several() -> bool:
    """Whether this is a rank of a job of several processes."""
    return "RANK" in os.environ and number_of("WORLD_SIZE", 1) > 1


def number_of(variable: str, default: int) -> int:
    """What an environment variable says, as a number; the default where it says none."""
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return default


def spans_nodes() -> bool:
    """Whether other nodes may have ranks of this job."""
    for variable in ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"):  # of torchrun, of srun
        if variable in os.environ:
            return number_of(variable, 2) > 1
    return os.environ.get("MASTER_ADDR", "localhost") not in ("localhost", "127.0.0.1", "::1")


def looks_for_others() -> bool:
    """Whether this process is to look for a rank that failed and of whose end no torchrun tells it.

    torchrun ends the processes of its node: one of them looks at the other nodes. Without it each looks.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        return spans_nodes() and number_of("LOCAL_RANK", 0) == 0
    return True


def as_one_of_several(reason: Reason) -> int:
    """Say the reason, or leave the word to the rank that failed first; gives the exit status of who speaks."""
    mine = Claim(
        number_of("RANK", 0), socket.gethostname(), reason.status, os.getpid(), text=reason.text, when=time.time()
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
    if spans_nodes():
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

    return "TORCHELASTIC_RUN_ID" in os.environ and len(children(os.getppid())) < number_of("LOCAL_WORLD_SIZE", 1)


def told_by_launcher() -> bool:
    """Whether the signal came through parallel/torchrun.py from outside, to all processes."""
    return LAUNCHER in os.environ and (Path(os.environ[LAUNCHER]) / TOLD).exists()


def say_early(text: str) -> None:
    """Say on one of several nodes why the job is going to end, before the nodes have met: its ranks then find the same."""
    say(f"error: {text} (on {socket.gethostname()}: the job ends with it once all of its nodes are there)")
    os.environ[SAID_EARLY] = text


def _speak(reason: Reason, mine: Claim) -> None:
    if reason.text == os.environ.get(SAID_EARLY):
        return
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
        found.append(_store_of_job(5).compare_set(_key_of_start(), "", mine).decode())


def _store_of_job(seconds: float) -> Any:
    """A connection of its own to the store where the job's ranks meet, which is there within so many seconds or raises."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=seconds)
    return TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)


def _key_of_start() -> str:
    # A job that is started again can speak again.
    return f"minitron_megatron/first_failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def leave_address() -> None:
    """Tell the launcher where the job's ranks meet: it speaks there for a process of this node that was killed."""
    if LAUNCHER in os.environ and spans_nodes() and number_of("LOCAL_RANK", 0) == 0:
        where = {name: os.environ[name] for name in _OF_MEETING if name in os.environ}
        with contextlib.suppress(OSError):
            (Path(os.environ[LAUNCHER]) / MEETING).write_text(json.dumps(where), encoding="utf-8")


def speak_for(rank: int, status: int, text: str, folder: Path) -> None:
    """Tell other nodes' ranks that one of this node was killed: they end, with its status. For the launcher and its folder."""
    with contextlib.suppress(OSError, ValueError):
        where = parse_json((folder / MEETING).read_text(encoding="utf-8"))
        os.environ.update({name: str(where[name]) for name in _OF_MEETING if name in where})
        _first_of_job(Claim(rank, socket.gethostname(), status, os.getpid(), said=True, text=text, when=time.time()))


def look_for_a_claim(stop: threading.Event, seconds: float, ends_itself: Callable[[], bool]) -> None:
    """Until `stop`: end this process, without a word, when a rank has failed that nobody ends it for, one on another node.

    Args:
        stop: set when it no longer waits for others.
        seconds: the ranks' store may take to appear.
        ends_itself: whether it has noticed, or is not to be ended.
    """
    follows = Reason("another rank failed", 1, follows=True)
    mine = Claim(number_of("RANK", 0), socket.gethostname(), 1, os.getpid(), text=follows.text, when=time.time())
    file, store, first = claim_file(), None, None
    with contextlib.suppress(Exception):  # a store that is gone: its rank's end shows otherwise
        while first is None:
            if spans_nodes():
                store = store or _store_of_job(seconds)
                key = _key_of_start()
                first = _claim_in(store.get(key).decode()) if store.check([key]) else None
            elif file is not None and (claim := read_claim(file)) is not None and claim.when >= _BEGAN:
                first = claim
            if first is None and stop.wait(SECONDS_BETWEEN_LOOKS):
                return
    # Who notices it, and is unwound in order, ends by itself.
    if first is None or stop.wait(SECONDS_OF_PATIENCE) or ends_itself():
        return
    if file is not None:
        with contextlib.suppress(OSError):
            _claim(file, follows, mine)
            _mark_as_said(file, mine, first)
    os._exit(first.status)


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
