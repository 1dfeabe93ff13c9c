"""A copy of the repository in which one bug at a time is tried, by tests in processes that need not import torch anew.

server: third-party libraries, imported once ──fork──▶ pytest on the copy, which imports the product and the tests from it
                                             ──fork──▶ workers of its pool (tests/pool.py)
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.mutant import Mutant
from tests.mutants.rooms import ROOT

DEFAULT, SLOW, ALL = "not slow and not gpu", "slow and not gpu", "not gpu"
_OUTCOME = "outcome.json"


class Outcome(NamedTuple):
    """The tests that failed; why there is no answer, or None; seconds."""

    failed: list[str]
    problem: str | None
    seconds: float


class Workshop:
    """A copy of the working tree. `tests` runs some of its tests; `having` puts a bug in for a while."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.log = folder / "tree", folder / "log.txt"
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink() or source.exists():
                shutil.copy2(source, target, follow_symlinks=False)
        (self.tree / ".venv").symlink_to(ROOT / ".venv")
        # Tests may ask which files there are.
        subprocess.run(["git", "init", "--quiet"], cwd=self.tree, check=True)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["tests.mutants.heavy"])
        self._written = time.time()

    @contextlib.contextmanager
    def having(self, mutant: Mutant) -> Iterator[None]:
        """The copy has a bug. Raises StaleError."""
        file = self.tree / mutant.file
        before = file.read_text(encoding="utf-8")
        self._write(file, mutant.changed(before))
        try:
            yield
        finally:
            self._write(file, before)

    def _write(self, file: Path, text: str) -> None:
        """Each text at a second of its own: Python takes a compiled file for that of a source of the same size and second."""
        file.write_text(text, encoding="utf-8")
        self._written += 1
        os.utime(file, (self._written, self._written))

    def tests(self, names: Sequence[str], *, marked: str, limit: float, every: bool = False) -> Outcome:
        """Run tests of the copy until one fails, or `every` one of them, for `limit` seconds at most."""
        outcome = self.tree.parent / _OUTCOME
        outcome.unlink(missing_ok=True)
        words = [*([] if every else ["-x"]), "-m", marked, *names]
        began = time.monotonic()
        process = self._context.Process(target=run_tests, args=(str(self.tree), str(self.log), words))
        process.start()
        process.join(limit)
        hung = process.is_alive()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        seconds = round(time.monotonic() - began, 1)
        if hung:
            return Outcome([], f"no end after {limit:g} s", seconds)
        if not outcome.is_file():
            return Outcome([], f"pytest died: see {self.log}", seconds)
        said = json.loads(outcome.read_text())
        return Outcome(said["failed"], said["problem"], seconds)


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """A workshop in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        yield Workshop(Path(folder))


def run_tests(tree: str, log: str, words: list[str]) -> None:
    """In a fork of the server: pytest in the copy, with all that it prints in a file."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "minitron_megatron")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [tree, *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ |= {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    # Processes that the tests start in this way come from the same server.
    forkserver._forkserver.ensure_running = lambda: None
    import pytest

    noticed = _Noticed()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *words], plugins=[noticed])
    # 5: no test has this mark.
    problem = None if status in (0, 1, 5) or noticed.failed else f"pytest ended with status {int(status)}: see {log}"
    Path(tree).parent.joinpath(_OUTCOME).write_text(json.dumps({"failed": noticed.failed, "problem": problem}))
    sys.stdout.flush()


class _Noticed:
    """A plugin of pytest: the tests, and files of tests, that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's part is over."""
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        """A file was read."""
        if report.failed:
            self.failed.append(report.nodeid)
