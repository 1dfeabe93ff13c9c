"""Megatron's data-parallel wrapper and distributed optimizer around a model's chunks.

Gradients are accumulated and reduced in float32 (`ddp.grad_reduce_in_fp32`); bf16 models have float32 master weights, and every
optimizer state is spread over the data-parallel ranks. Gradients are sums over tokens until `apply_gradients`, which divides and
clips a rank's share of them in one pass.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from minitron_megatron.automatic import is_on
from minitron_megatron.config import DdpConfig, OptimConfig, TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.fp8 import fp8_fields
from minitron_megatron.models.graphs import graph_fields, graph_safe_wrapping
from minitron_megatron.train.checks import recomputation
from minitron_megatron.train.overlap import overlap_fields


def check_optimizer(device: torch.device) -> None:
    """Raise UserError where Megatron would pick an Adam that does not go with the device: before any model is there."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if device.type == "cpu" and HAVE_APEX_OR_TE:
        raise UserError(
            "training on CPUs needs an environment without Transformer Engine and apex, whose fused Adam Megatron picks "
            "at import: use device=cuda, or the .venv that `make setup` makes"
        )
    if device.type == "cuda" and not HAVE_APEX_OR_TE:
        # The CPU adapter mends what Megatron's checkpoints get wrong with torch's own Adam; on GPUs nobody should need it.
        raise UserError(
            "training on GPUs needs Transformer Engine's or apex's fused Adam: use the image of docker/Dockerfile"
        )


def check_state_precision(options: OptimConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError where optim.state_precision is not for a model of this dtype on this device."""
    if options.state_precision == "fp32":
        return
    if dtype is not torch.bfloat16 or device.type != "cuda":
        raise UserError(
            f"optim.state_precision={options.state_precision} is Transformer Engine's, for bf16 models on GPUs: use fp32"
        )


def _fuse_gradient_sums(chunk: torch.nn.Module) -> None:
    """Have Transformer Engine's linears add their weights' gradients to the float32 ones within the products.

    Set on the modules, since Megatron would have apex do the same for its own output layer, whose product models/head.py makes.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def wrap_and_optimize(
    chunks: Sequence[torch.nn.Module], optim: OptimConfig, options: DdpConfig
) -> tuple[list[Any], Any]:
    """DistributedDataParallel chunks and their distributed AdamW; norms and biases have no weight decay."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import (
        OptimizerConfig,
        ParamGroupOverride,
        ParamKey,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )

    bf16 = next(chunks[0].parameters()).dtype is torch.bfloat16
    gathers, given = is_on(options.overlap_param_gather), asdict(options)
    given |= {"overlap_grad_reduce": is_on(options.overlap_grad_reduce), "overlap_param_gather": gathers}
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **given)
    for chunk in chunks:
        _fuse_gradient_sums(chunk)
    with graph_safe_wrapping(chunks[0].config):
        wrapped = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
        ]
    moments = torch.bfloat16 if optim.state_precision == "bf16" else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=gathers,
        use_precision_aware_optimizer=optim.state_precision != "fp32",
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        # It would save two bytes more, and Megatron cannot load such a checkpoint in another layout.
        store_param_remainders=False,
    )
    # Megatron's own rule: no weight decay of what has one dimension.
    groups = get_standard_config_overrides(config)
    if not optim.decay_embeddings:
        groups[ParamKey(attr="is_embedding_or_output_parameter")] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(config, wrapped, config_overrides=groups)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.no_sync_func = [w.no_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped, optimizer


def training_fields(options: TrainerConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a model that is trained. Raises UserError as `recomputation`."""
    return {
        **recomputation(options),
        **fp8_fields(options.fp8, bf16_layers=options.fp8_bf16_layers),
        **graph_fields(is_on(options.cuda_graphs)),
        **overlap_fields(options.tp_comm_overlap),
    }


def gather_weights(chunks: Sequence[Any]) -> None:
    """Have whole weights on every rank now, where gathering them is put off to the next forward pass."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def gradient_norm(optimizer: Any, tokens: int) -> float:
    """Norm of the mean loss's gradients over all ranks, before clipping; the same on every rank. Nothing is changed.

    `tokens` is what the sums of gradients are to be divided by.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm()) / tokens


def apply_gradients(optimizer: Any, tokens: int, grad_norm: float) -> None:
    """Update the parameters by what `gradient_norm` has read, divided by `tokens` and clipped to `optim.clip_grad`.

    Megatron's finalize_model_grads would divide every rank's whole buffer, and its optimizer's `step` make the norm again and
    clip in a pass of its own.
    """
    from megatron.core.optimizer.clip_grads import multi_tensor_applier, multi_tensor_scale_impl

    config = optimizer.config
    # Megatron's own rule of clipping.
    clip = min(1.0, config.clip_grad / (grad_norm + 1e-6)) if config.clip_grad > 0 else 1.0
    name = "decoupled_grad" if config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    held = [getattr(parameter, name, None) for parameter in optimizer.get_parameters()]
    # A rank of many may have no share.
    gradients = [gradient.detach() for gradient in held if gradient is not None]
    if gradients:
        overflow = torch.zeros(1, dtype=torch.int, device=gradients[0].device)
        multi_tensor_applier(multi_tensor_scale_impl, overflow, [gradients, gradients], clip / tokens)
    optimizer.step_with_ready_grads()


def set_adam(optimizer: Any, options: OptimConfig) -> None:
    """Give every parameter group these options of Adam, where a checkpoint of another run has brought its own."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (options.adam_beta1, options.adam_beta2), options.adam_eps


def set_learning_rate(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every parameter group the step's learning rate and its share of the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
