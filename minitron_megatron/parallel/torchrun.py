"""torchrun for job scripts: `python -m minitron_megatron.parallel.torchrun …` takes what torchrun takes.

    srun ──SIGUSR1 or SIGTERM──▶ this, on every node ──▶ each of its processes, which may save and then end
    srun ◀──exit status────────── this ◀─── that of the first process that failed

torchrun by itself dies of SIGUSR1, kills its processes 30 seconds after a SIGTERM (too few to save), and exits with 1 whatever
they exited with: a mistake of the user (2) and a wish to be requeued (75) would look like a crash. The first process of a node
that ends with another status than 0 ends the others there: what has to be finished comes before a barrier.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

# EX_TEMPFAIL of sysexits.h: saved, not finished; the same command continues.
REQUEUE = 75
_PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
# torchrun's own list without SIGTERM.
_LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


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
        if int(stat.rpartition(")")[2].split()[1]) == of:
            found.append(int(folder.name))
    return found


def _pass_on(number: int, _: Any) -> None:
    """Send a signal to every process of this node; before there are any, nothing is lost by ending at once."""
    workers = children(os.getpid())
    if not workers:
        sys.exit(REQUEUE if number == signal.SIGUSR1 else 128 + number)
    for pid in workers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def exit_status(code: int) -> int:
    """A process's return code as a shell's exit status: 128 + n where signal n ended it."""
    return 128 - code if code < 0 else code


def main() -> None:
    """Run torchrun with this process's arguments and end with its processes' exit status."""
    for number in _PASSED_ON:
        signal.signal(number, _pass_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun([f"--signals-to-handle={_LEFT_TO_TORCHRUN}", *sys.argv[1:]])
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # Its processes have said what is wrong; torchrun's table of them is in the log too.
        sys.exit(exit_status(first.exitcode))


if __name__ == "__main__":
    main()
