"""What a signal does while a command is still importing: one line, and the exit status that ending.py gives later on.

Nothing but Python's own `signal` is imported here. cli/main.py begins with it.
"""

import os
import signal
from types import FrameType

# What the user can mend.
USER_MISTAKE = 2
# EX_TEMPFAIL of sysexits.h: not finished; the same command continues.
REQUEUE = 75
# The kernel sends SIGHUP when a terminal closes, or its connection drops; under nohup it is ignored, here too.
STATUS_OF_SIGNAL = {signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGTERM: 143, signal.SIGUSR1: REQUEUE}
NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (its terminal closed)",
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
}
NOTHING_KEPT = "nothing of this start is kept; the same command goes on from what was there before"


def _stop(number: int, _: FrameType | None) -> None:
    try:  # noqa: SIM105  contextlib is one more import
        os.write(2, f"stopped by {NAMES[number]}: {NOTHING_KEPT}\n".encode())
    except OSError:  # nobody reads it: the terminal is gone
        pass
    os._exit(STATUS_OF_SIGNAL[number])


def handle_first_signals() -> dict[int, object]:
    """End in a line until `give_back`; gives the handlers that were there. A rank dies of the signal: its launcher says so."""
    before: dict[int, object] = {}
    for number in STATUS_OF_SIGNAL:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            try:
                before[number] = signal.signal(number, signal.SIG_DFL if "RANK" in os.environ else _stop)
            except ValueError:
                break  # imported by a thread, which has no say in signals
    return before


def give_back(before: dict[int, object]) -> None:
    """The handlers that were there before: this was an import, not a command, or ending.py takes over."""
    for number, handler in before.items():
        signal.signal(number, handler)
