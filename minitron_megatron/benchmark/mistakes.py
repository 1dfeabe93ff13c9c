"""How soon a mistake is said, and how soon work begins: every command as a whole process, as users start it.

    mistake    python launch/NAME.py, with a folder that is not there       ─▶ error: …     seconds until the process has ended
    start      python launch/NAME.py, on a model of some thousand numbers   ─▶ manifest     seconds_starting (cli/starting.py)

Other work on the machine makes both longer: the load before the first is among the results, and a warning is given. Seconds of
processor time are there too, which other work lengthens less.
"""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import MANIFEST, load_yaml, output_folder
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.data.indexed import SplitWriter, token_dtype
from minitron_megatron.errors import UserError
from minitron_megatron.stages import ROOT

log = logging.getLogger(__name__)
# Processes that run or wait, on average over a minute, above which a machine is not idle.
IDLE_LOAD = 0.3
# A folder that is not there; for commands that read none an output that is something else.
MISTAKES: dict[str, str] = {
    "demo": "output=other",
    "smollm2": "output=other",
    "import_hf": "hf=nowhere",
    "import_nemo": "nemo=nowhere",
    "random_model": "model=smollm2_135m output=other",
    "prepare_data": "input=nowhere model=nowhere",
    "adopt_data": "train=nowhere validation=nowhere model=nowhere",
    "importance": "model=nowhere data.path=nowhere",
    "merge_scores": "scores=[nowhere,other]",
    "layers": "model=nowhere data.path=nowhere",
    "search": "model=nowhere scores=nowhere budget.parameters=1000",
    "prune": "model=nowhere scores=nowhere",
    "cache_teacher": "teacher=nowhere data.path=nowhere trainer.steps=1",
    "correct_teacher": "model=nowhere data.path=nowhere trainer.steps=1",
    "distill": "teacher=nowhere student=nowhere data.path=nowhere trainer.steps=1",
    "evaluate": "model=nowhere data.path=nowhere",
    "export_hf": "model=nowhere",
    "export_megatron": "model=nowhere",
    "export_nemo": "model=nowhere",
    "throughput": "models={one:nowhere}",
    "compress": "model=nowhere data.path=nowhere budget.parameters=1000",
    "distill_candidates": "found=nowhere data.path=nowhere",
    "benchmark": "measure=prune model=nowhere",
    "report": "folders=nowhere",
    "status": "folder=nowhere",
    "submit": "submit=false command=nowhere",
}
# A tiny model through the commands that work on one, in an order in which each has what it needs.
_LENGTH = "data.sequence_length=32"
_STEP = f"data.path=data {_LENGTH} trainer.steps=1 trainer.global_batch_size=1 trainer.validation_samples=0"
STARTS: dict[str, str] = {
    "random_model": "model=smollm2_135m model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=128 "
    "model.num_attention_heads=4 model.num_query_groups=2 model.head_dim=16 model.vocab_size=512",
    "export_hf": "model=random_model",
    "import_hf": "hf=export_hf",
    "export_megatron": "model=random_model",
    "export_nemo": "model=random_model",
    "import_nemo": "nemo=export_nemo",
    "importance": f"model=random_model data.path=data {_LENGTH} samples=2",
    "layers": f"model=random_model data.path=data {_LENGTH} samples=2",
    "search": "model=random_model scores=importance budget.parameters=100000 space.multiple=16 space.tensor=1",
    "prune": "model=random_model scores=importance target.ffn_hidden_size=64",
    "cache_teacher": f"teacher=random_model distill.top_k=8 {_STEP}",
    "correct_teacher": f"model=random_model {_STEP} optim.warmup_steps=1 logger.wandb=disabled",
    "distill": f"teacher=random_model student=prune {_STEP} optim.warmup_steps=1 logger.wandb=disabled",
    "evaluate": f"model=random_model data.path=data {_LENGTH} samples=2",
    "report": "folders=prune",
}


def first_mistakes_and_starts(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Medians of `repeats` processes a command, one after another: seconds and seconds of processor time of its first mistake,
    and seconds to its first useful work; with the machine's load before the first.
    """
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        log.warning("other work runs here (load %.2f over the last minute): times are upper bounds", load)
    with tempfile.TemporaryDirectory(prefix="starting-") as scratch:
        folder = Path(scratch)
        (folder / "other").mkdir()
        (folder / "other" / "file").touch()
        _write_data(folder / "data")
        rows: dict[str, dict[str, float]] = {name: {} for name in COMMANDS}
        with progress("starting", len(MISTAKES) + len(STARTS), unit="commands") as advance:
            for name, words in MISTAKES.items():
                found = [_mistake(folder, name, words.split()) for _ in range(cfg.repeats + 1)][1:]
                rows[name]["mistake_seconds"] = statistics.median(seconds for seconds, _ in found)
                rows[name]["mistake_processor_seconds"] = statistics.median(cpu for _, cpu in found)
                advance(1)
            for name, words in STARTS.items():
                starts = [_start(folder, name, words.split(), number) for number in range(cfg.repeats)]
                rows[name]["seconds_starting"] = statistics.median(starts)
                advance(1)
    return {"rows": rows, "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}


def show(results: Mapping[str, Any]) -> None:
    """Print a row for each command."""
    columns = ("mistake_seconds", "mistake_processor_seconds", "seconds_starting")
    rows = [[name, *(f"{row[c]:.2f}" if c in row else "" for c in columns)] for name, row in results["rows"].items()]
    title = f"mistakes and starts, load {results['load_before']} before and {results['load_after']} after"
    print_table(title, ["", "first mistake, s", "of a processor, s", "first useful work after, s"], rows)


def _run(folder: Path, name: str, words: list[str]) -> tuple[subprocess.CompletedProcess, float, float]:
    """A command in a process of its own: how it ended, its seconds, and its seconds of processor time."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    before, began = os.times(), time.perf_counter()
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done, seconds, cpu


def _mistake(folder: Path, name: str, words: list[str]) -> tuple[float, float]:
    outputs = [] if any(word.startswith(("output=", "folder=")) for word in words) else ["output=output"]
    done, seconds, cpu = _run(folder, name, [*words, *outputs])
    if done.returncode != 2 or not done.stderr.startswith("error: "):
        raise UserError(
            f"{name} {' '.join(words)} was to be refused, and ended with {done.returncode}: {done.stderr[-300:]}"
        )
    return seconds, cpu


def _start(folder: Path, name: str, words: list[str], number: int) -> float:
    # The first output is what later commands start from.
    output = folder / (name if number == 0 else f"{name}_{number}")
    done, *_ = _run(folder, name, [*words, f"output={output}"])
    if done.returncode:
        raise UserError(f"{name} {' '.join(words)} ended with {done.returncode}: {done.stderr[-300:]}")
    at = output if (output / MANIFEST).is_file() else output / "model"
    return float(load_yaml(at / MANIFEST)["seconds_starting"])


def _write_data(path: Path) -> None:
    """A data folder of random ids of a vocabulary of 512."""
    draw, dtype = np.random.default_rng(0), token_dtype(512)
    with output_folder(path, command="benchmark", config={}, inputs={}, resume=False) as out:
        for split in ("train", "validation"):
            with SplitWriter(out.path / split, dtype) as writer:
                for _ in range(8):
                    writer.add(draw.integers(2, 512, 512).astype(dtype))
                writer.finish()
                writer.forget()
            out.results[split] = {"documents": 8, "tokens": 8 * 512, "bytes": None}
        out.results |= {"vocab_size": 512, "token_dtype": dtype.name, "end_of_document": 1, "tokenizer": "none"}
