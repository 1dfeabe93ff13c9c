"""What cutting a model costs against copying its files, and what it holds in memory meanwhile."""

import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder
from minitron_megatron.checkpoints.index import total_bytes
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import write_weights
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.importance.scores import Scores
from minitron_megatron.models.axes import PROBES
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.cut import cut_chunk
from minitron_megatron.prune.select import choose, target_shape


def pruning_over_copying(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds to cut a model folder to `target=` by random scores, and to copy its weight files: medians, in turn.

    The copy is rank 0's, file by file. Both are followed by a sync, so that neither leaves its bytes to the other.
    """
    folder = open_model_folder(cfg.model.folder("model"))
    target = target_shape(folder.shape, vars(cfg.target), [])
    kept = choose(folder.shape, target, random_scores(folder.shape, cfg.seed), [])
    scratch = Path(cfg.output).parent / f".{Path(cfg.output).name}.scratch"

    def cut() -> None:
        reader = WeightReader(folder.weights)
        write_weights(scratch, target, partial(cut_chunk, reader, folder.shape, kept), "prune")

    from megatron.core import dist_checkpointing  # noqa: F401 (one of the libraries: writing imports it)

    libraries = _peak_bytes()
    copies, cuts = [], []
    for _ in range(cfg.repeats):
        copies.append(_timed(lambda: _copy(folder, scratch), scratch))
        cuts.append(_timed(cut, scratch))
    copied, pruned = statistics.median(copies), statistics.median(cuts)
    peaks = collectives.all_gather_objects((_peak_bytes(), _peak_bytes() - libraries))
    return {
        "source_bytes": total_bytes(folder.shape),
        "target_bytes": total_bytes(target),
        "copy_seconds": copied,
        "prune_seconds": pruned,
        "prune_over_copy": pruned / copied,
        "peak_resident_bytes_of_a_rank": max(peak for peak, _ in peaks),
        "of_it_above_the_libraries": max(above for _, above in peaks),
    }


def random_scores(shape: ModelShape, seed: int) -> Scores:
    """Scores that say nothing, so that what is kept lies anywhere."""
    draw = np.random.default_rng(seed)
    lengths = {"ffn": max(shape.ffn_of_layers), "kv_groups": shape.num_attention_heads, "hidden": shape.hidden_size}
    scores = {probe.score: draw.random((shape.num_layers, lengths[probe.axis]), np.float32) for probe in PROBES}
    return Scores({**scores, "layers": draw.random(shape.num_layers, np.float32)}, "")


def _copy(folder: ModelFolder, scratch: Path) -> None:
    if collectives.is_rank_zero():
        shutil.copytree(folder.weights, scratch)


def _timed(work: Callable[[], None], scratch: Path) -> float:
    """Seconds until the bytes are on the disk; what `work` wrote is removed."""
    collectives.barrier()
    began = time.perf_counter()
    work()
    collectives.barrier()
    if collectives.is_rank_zero():
        os.sync()
    collectives.barrier()
    seconds = time.perf_counter() - began
    if collectives.is_rank_zero():
        shutil.rmtree(scratch)
        os.sync()
    collectives.barrier()
    return seconds


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
