"""Signals that Python cannot answer: the main thread waits in C++ code, for other nodes or a store, and runs no handler.

a signal ──▶ C handler ──▶ byte in a pipe ──▶ a thread ──▶ has the Python handler run within so many seconds? no ──▶ answer
                 └──▶ Python handler, as soon as the main thread is back in Python
"""

import os
import signal
import threading
import time
from collections.abc import Callable

# A collective of a step or a long read ends within that, mostly.
SECONDS = 5.0


class Listener:
    """A thread that answers the signals of one handler where the main thread does not; make it in the main thread."""

    def __init__(self, handler: Callable, answer: Callable[[int], None], seconds: float = SECONDS) -> None:
        self._handler, self._answer, self._seconds, self._heard = handler, answer, seconds, 0.0
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # A child's signals are its own.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, daemon=True).start()

    def heard(self) -> None:
        """The handler runs: nobody else answers this signal."""
        self._heard = time.monotonic()

    def _listen(self) -> None:
        # Signals are the main thread's: C++ code of its that a signal interrupts may want to know.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while arrived := os.read(self._reading, 1):
            # The handler may have run before this thread has: what it answered a moment ago was this signal.
            number, read = arrived[0], time.monotonic()
            since = read - 1
            while time.monotonic() < read + self._seconds and self._heard < since:
                time.sleep(0.05)
            # A training loop has a handler of its own meanwhile, which waits for the end of its step.
            if self._heard < since and signal.getsignal(number) == self._handler:
                self._answer(number)
