"""Random models of any preset: for tests, benchmarks and rehearsals of a job before the real weights are at hand.

Each chunk has a generator of its own, seeded by its name and place: the same bits for any number of ranks.
"""

import hashlib
import time
from functools import partial

import torch

from minitron_megatron.checkpoints.export_checks import check_random_model
from minitron_megatron.checkpoints.folder import WEIGHTS
from minitron_megatron.checkpoints.hf_folder import print_shape, write_shape
from minitron_megatron.checkpoints.weights import Chunk, write_weights
from minitron_megatron.config import RandomModelConfig
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.tools import tool_job

# GPT's usual initial spread of weights.
STANDARD_DEVIATION = 0.02


def fill_at_random(shape: ModelShape, seed: int, chunk: Chunk, out: torch.Tensor) -> None:
    """Normal values with σ = 0.02 around the row's mean (gains near 1, the rest near 0); padded vocabulary rows zero."""
    name = f"{seed}:{chunk.slot.row.name}:{chunk.offsets}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    out.normal_(chunk.slot.row.mean, STANDARD_DEVIATION, generator=generator)
    if "vocab" in chunk.slot.row.axes and chunk.stop > shape.vocab_size:
        out[max(0, shape.vocab_size - chunk.start) :] = 0


def make_random_model(cfg: RandomModelConfig, shape: ModelShape | None = None) -> None:
    """`launch/random_model.py`: a model folder with random weights of a preset's shape."""
    with tool_job():
        shape = shape or check_random_model(cfg)
        if cfg.dry_run:
            print_shape("would be made", shape)
            return
        with command_output(cfg, {}) as out:
            if out.done:
                return
            began = time.monotonic()
            fill = partial(fill_at_random, shape, cfg.seed)
            out.digest = write_weights(out.path / WEIGHTS, shape, fill, "random weights")
            if collectives.is_rank_zero():
                write_shape(out.path, shape)
            out.results = {"parameters": count_parameters(shape), "seconds": round(time.monotonic() - began, 2)}
        print_shape(f"{cfg.output}: random weights", shape, out.results)
