"""Fixtures: `gloo`, which runs a function in several processes."""

import os
import signal
from collections.abc import Iterator
from typing import Any

# Tiny models: threads that wait for one another cost more than they save, in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist says how wide its terminal is, and commands heed that.
os.environ.pop("COLUMNS", None)
# Files of tests that run beside one another start torchrun on ports of their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("PET_MASTER_PORT", str(29510 + int(worker.removeprefix("gw"))))

import pytest
from hypothesis import settings

from tests import bars, computing
from tests.pool import Pool

# Files whose slow tests take longest begin first: at the end one would run alone.
LONGEST = ("ending", "slurm", "compress", "readme", "commands", "one_command", "distill", "next", "train", "memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


# A shell that starts the tests in the background has them ignore Ctrl-C, and nohup a closed terminal: what they start would
# inherit that, but no handlers.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# How long an example takes says more about what else runs on the machine than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _watching(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ[computing.VARIABLE] = str(tmp_path_factory.mktemp("computing") / "bf16")
    computing.watch()
    bars.watch()


@pytest.fixture(autouse=True)
def _bf16_has_its_mark(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if computing.seen() and request.node.get_closest_marker("bf16") is None:
        pytest.fail("computes with a bfloat16 model: mark it bf16", pytrace=False)


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process, for functions that reduce over one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo(world_size, function, *args, layout=…)` gives each rank's result; see tests/pool.py."""
    with Pool() as pool:
        yield pool
