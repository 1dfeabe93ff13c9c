"""Importing, exporting and pruning hold a small constant, however large the model is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def peak(*words: object) -> int:
    """Largest resident set of a command, in bytes."""
    name, *rest = map(str, words)
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *rest]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_peak_memory_is_far_below_the_model(tmp_path):
    """1.4 GB of weights, 1 GB of them the embedding: each command takes no more than 250 MB over a model of a few MB."""
    small = ("model=llama3_1_8b", "model.num_layers=2", "model.hidden_size=128", "model.vocab_size=1000")
    small = (*small, "model.num_attention_heads=4", "model.num_query_groups=2", "model.ffn_hidden_size=256")
    large = ("model=llama3_1_8b", "model.num_layers=2", "model.tied_embeddings=true", "model.ffn_hidden_size=4096")
    for kind, sizes in (("small", small), ("large", large)):
        peak("random_model", *sizes, f"output={tmp_path / kind}")
    weights = sum(f.stat().st_size for f in (tmp_path / "large" / "weights").iterdir())
    assert weights > 1.4e9
    for command, source in (("export_hf", "model={}"), ("import_hf", "hf={}_export_hf"), ("prune", "model={}")):
        extra = ["drop_layers=[0]"] if command == "prune" else []
        peaks = [
            peak(command, source.format(tmp_path / kind), *extra, f"output={tmp_path / kind}_{command}")
            for kind in ("small", "large")
        ]
        assert peaks[1] - peaks[0] < 250e6, (command, peaks)
