"""Tensor-parallel transfers beside matrix products, by Transformer Engine's user buffers, for the model that is trained.

    without    gather tokens ─▶ product ─▶ scatter sums          one after another, over NCCL (arXiv 2205.05198, section 4.2.2)
    with       a rank's part of a product runs while the next rank's tokens arrive

The buffers have the size of one model's tokens, so a teacher beside it has none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.build import check_fused
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.deciding import ask_rank_zero
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import OVERLAP_OPTION


def overlap_fields(wanted: bool) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a model whose transfers overlap; none without."""
    return {"tp_comm_overlap": True} if wanted else {}


def check_overlap_device(wanted: bool, engine: str, dtype: torch.dtype) -> None:
    """Raise UserError where a model's engine (te or local) or its precision cannot overlap transfers."""
    if not wanted:
        return
    check_fused(OVERLAP_OPTION, "true", "false", engine, dtype)
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        raise UserError(
            f"{OVERLAP_OPTION}=true needs CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment: transfers start first then"
        )


@contextmanager
def user_buffers(trainer: TrainerConfig, shape: ModelShape, layout: Layout, sequence_length: int) -> Iterator[None]:
    """Buffers for the micro-batches of a model in this layout, where they are asked for; in a live job, before it is built."""
    if not trainer.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    # Who keeps NCCL from NVLink's multicast does not want it here either.
    if ask_rank_zero(lambda: os.environ.get("NCCL_NVLS_ENABLE") == "0"):
        os.environ.setdefault("UB_SKIPMC", "1")
    modes = base.UserBufferQuantizationMode
    wanted = [modes.FP8] if trainer.fp8 != "none" else []
    wanted += [modes.NONE] if not wanted or trainer.fp8_bf16_layers else []
    tokens = trainer.micro_batch_size * sequence_length // layout.context
    base.initialize_ub(
        shape=[tokens, shape.hidden_size],
        tp_size=layout.tensor,
        quantization_modes=wanted,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
