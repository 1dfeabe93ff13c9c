"""Commands of launch/ as users start them, on one GPU or several."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_commands import TORCHRUN

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, *words: Any, gpus: int = 1, env: dict[str, str] | None = None) -> None:
    """`launch/NAME.py` with these options; skips a test that needs more GPUs than there are."""
    if gpus > torch.cuda.device_count():
        pytest.skip(f"needs {gpus} CUDA devices")
    # Standalone, torchrun finds a port of its own, whatever else starts at the same time.
    start = [TORCHRUN, "--standalone", "--nproc-per-node", str(gpus)]
    done = subprocess.run(
        [
            *(start if gpus > 1 else [sys.executable]),
            str(ROOT / "launch" / f"{name}.py"),
            *map(str, words),
            "device=cuda",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "4", **(env or {})},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
