"""Fixtures: `gloo`, which runs a function in several processes."""

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo(world_size, function, *args, layout=…)` gives each rank's result; see tests/pool.py."""
    with Pool() as pool:
        yield pool
