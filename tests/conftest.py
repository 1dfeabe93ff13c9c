"""Fixtures: `gloo`, which runs a function in several processes."""

import os
from collections.abc import Iterator

# Tiny models: threads that wait for one another cost more than they save, in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Files of tests that run beside one another start torchrun on ports of their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("PET_MASTER_PORT", str(29510 + int(worker.removeprefix("gw"))))

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo(world_size, function, *args, layout=…)` gives each rank's result; see tests/pool.py."""
    with Pool() as pool:
        yield pool
