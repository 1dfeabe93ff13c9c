"""Whether a signal went to this process alone or to its whole process group, which a handler in Python is not told.

A terminal's Ctrl-C, `timeout` and whoever kills a group reach a child, too; `kill PID` and `timeout --foreground` do not:

    signal ──▶ group:  this process, its child, the witness (which dies of it)
    signal ──▶ this process alone:  the witness lives
"""

import contextlib
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

# The kernel gives a group's signal to one process after another, within milliseconds. That one has it shows at once, also
# where a busy machine lets it end later.
SECONDS = 0.5


class Witness:
    """A process of the same group that does nothing; it ends with this one, however that ends."""

    def __enter__(self) -> "Witness":
        self._process = self._start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def heard(self, number: int) -> bool:
        """Whether the group has just got this signal, for which this process's handler runs."""
        if self._process is None:
            return number == signal.SIGINT
        until, heard = time.monotonic() + SECONDS, False
        while not heard and self._process.poll() is None and time.monotonic() < until:
            heard = _has(self._process.pid, number)
            time.sleep(0.001)
        if not heard and self._process.poll() is None:
            return False
        heard = heard or self._process.returncode == -number
        self._end()
        self._process = self._start()
        return heard

    @staticmethod
    def _start() -> subprocess.Popen | None:
        # It reads what nobody writes: the end of the pipe is the end of this process.
        try:
            return subprocess.Popen(
                ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError:
            return None

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _has(pid: int, number: int) -> bool:
    """Whether a process has got a signal that it has not met yet."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) >> number - 1 & 1:
                return True
    return False
