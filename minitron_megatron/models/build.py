"""From sizes to Megatron: builds this rank's part of a real megatron.core GPTModel, and refuses layouts that do not fit.

Layers are of one of two engines: Megatron's local ones, on CPUs and GPUs alike, or Transformer Engine's on GPUs, with fused
norms, rotary embeddings and attention. Checkpoint keys follow Transformer Engine's names, as Megatron's own local layers
write them, so a model folder serves both.
"""

import copy
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from minitron_megatron.console import busy
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import TRAITS, Traits
from minitron_megatron.models.limits import computing_dtype, pipeline_layout
from minitron_megatron.models.shape import ModelShape, RopeScaling
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import asks_machine, of_this_machine, say


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)². Megatron's own is compiled at its first call, which needs a C++ compiler on CPUs."""
    return F.relu(x).square()


ACTIVATIONS = {"silu": F.silu, "squared_relu": squared_relu}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def model_dtype(shape: ModelShape, precision: str) -> torch.dtype:
    """The dtype to compute in (models/limits.py, `computing_dtype`)."""
    return DTYPES[computing_dtype(shape, precision)]


def foretell_dtype(precision: str, device: torch.device, *shapes: ModelShape) -> None:
    """For dry runs, which have no job: say what `precision=auto` would be for such models on this machine."""
    if device.type == "cpu" and asks_machine(precision, *(shape.dtype for shape in shapes)):
        say(of_this_machine(), "would compute")


def pick_engine(engine: str, layout: Layout, dtype: torch.dtype, device: torch.device, name: str = "model") -> str:
    """The engine that layers are built of, te or local. Raises UserError where it cannot run.

    `auto` is Transformer Engine for bfloat16 on CUDA, where it is installed. float32 asks for exact sums: Transformer Engine's
    float32 products are TF32 ones (ten bits of mantissa), so `auto` leaves it to local layers. `name` is the option's.
    """
    if engine == "te" and device.type != "cuda":
        raise UserError(f"{name}.engine=te needs a CUDA device, and this runs on the CPU: use {name}.engine=auto")
    exists = device.type == "cuda" and _have_transformer_engine()
    if engine == "te" and not exists:
        raise UserError(
            f"{name}.engine=te needs Transformer Engine, which cannot be imported here: use the image of docker/Dockerfile, "
            f"or {name}.engine=local"
        )
    if layout.context > 1 and exists and engine != "local" and dtype is not torch.bfloat16:
        raise UserError(
            f"{layout.option}.context={layout.context} needs precision=bf16: attention over context-parallel ranks is fused, "
            "and fused attention takes no float32"
        )
    if engine == "auto":
        engine = "te" if exists and dtype is torch.bfloat16 else "local"
    if layout.context > 1 and engine == "local":
        raise UserError(
            f"{layout.option}.context={layout.context} needs Transformer Engine's attention, and the {name} is of Megatron's "
            f"local layers: use {layout.option}.tensor with {layout.option}.sequence=true for long sequences"
        )
    return engine


def check_fused(option: str, value: str, instead: str, engine: str, dtype: torch.dtype) -> None:
    """Raise UserError where an engine (te or local) or dtype is not what option=value needs; option=instead does without."""
    if engine != "te" or dtype is not torch.bfloat16:
        raise UserError(
            f"{option}={value} needs Transformer Engine's layers in bf16 on a GPU: set precision=bf16 on a machine that has "
            f"both, or {option}={instead}"
        )


def _have_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _have_fused_rotation() -> bool:
    from megatron.core.transformer.attention import HAVE_FUSED_QKV_ROPE

    return HAVE_FUSED_QKV_ROPE


def _fusions(te: bool, traits: Traits) -> dict[str, bool]:
    """Which of an engine's fused kernels to use."""
    return {
        # Megatron's own, compiled by torch, moves its bytes at half the speed.
        "use_te_activation_func": te and traits.gated,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": te,
        "apply_rope_fusion": te,
        # Takes queries, keys and values apart on the way; norms of heads come between.
        "fused_single_qkv_rope": te and not traits.qk_norm and _have_fused_rotation(),
        # These belong to apex and to Megatron's own attention.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def check_document_masks(reset_attention_mask: bool, engine: str, name: str) -> None:
    """Raise UserError where a model's engine (te or local) cannot keep the documents of a sample apart."""
    if reset_attention_mask and engine == "te":
        raise UserError(f"data.reset_attention_mask needs Megatron's local layers: use {name}.engine=local")


def transformer_config(
    shape: ModelShape, layout: Layout, dtype: torch.dtype, engine: str, training: Mapping[str, Any] | None = None
) -> Any:
    """The megatron.core TransformerConfig of a model in a layout, for an engine (te or local).

    `training` has fields of it that follow from what is done with the model: activation recomputation, FP8.
    """
    from megatron.core.transformer import TransformerConfig

    kind = TransformerConfig if shape.uniform else _per_layer_config()
    traits = TRAITS[shape.family]
    config = kind(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=max(shape.ffn_of_layers),
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization=traits.normalization,
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=traits.zero_centered_gain,
        activation_func=ACTIVATIONS[traits.activation],
        gated_linear_unit=traits.gated,
        add_bias_linear=False,
        add_qkv_bias=traits.qkv_bias,
        qk_layernorm=traits.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        pipeline_model_parallel_layout=pipeline_layout(shape.num_layers, layout),
        context_parallel_size=layout.context,
        # With two stages the interleaved schedule sends activations and gradients between the same two ranks in one batch,
        # where they may be taken for each other: separate, overlapped transfers keep them apart.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        # Weights are always read from a folder: drawing random ones first would hold each whole matrix on every rank.
        perform_initialization=False,
        use_cpu_initialization=_on_cpu(),
        transformer_impl="transformer_engine" if engine == "te" else "local",
        **_fusions(engine == "te", traits),
        # Sums of token losses are divided once by the global token count: the same for any split over ranks.
        calculate_per_token_loss=True,
        heterogeneous_block_specs=not shape.uniform,
        **(training or {}),
    )
    if not shape.uniform:
        config.ffn_of_layers = shape.ffn_of_layers
    return config


def _on_cpu() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_backend() != "nccl"


def _per_layer_config() -> type:
    """A TransformerConfig whose layers have feed-forward sizes of their own, by Megatron's way for heterogeneous blocks."""
    from megatron.core.transformer import TransformerConfig

    class PerLayerConfig(TransformerConfig):
        """Megatron asks for each layer's config while it builds it, and gives each a checkpoint key of its own."""

        ffn_of_layers: tuple[int, ...] = ()

        def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
            """The config of one layer; `layer_number` counts from 1 over the whole model."""
            own = copy.copy(self)
            own.ffn_hidden_size = self.ffn_of_layers[layer_number - 1]
            return own

    return PerLayerConfig


def layer_spec(config: Any, vp_stage: int | None, stage: int | None = None) -> Any:
    """What the layers of a pipeline stage (this rank's, if not given), and the norm after them, are made of."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    spec, norm = _te_spec(config) if config.transformer_impl == "transformer_engine" else _local_spec(config)
    layers = get_num_layers_to_build(config, vp_stage, stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)


# Transformer Engine's variable: 1 lets attention's backward pass add in any order.
_ANY_ORDER = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def attention_in_fixed_order() -> bool:
    """Whether fused attention's backward pass adds in a fixed order, so that a run that continues repeats its losses bit for bit.

    It does unless the user has set NVTE_ALLOW_NONDETERMINISTIC_ALGO=1, which is a little faster and takes less memory.
    """
    return os.environ.get(_ANY_ORDER, "0") == "0"


def _te_spec(config: Any) -> tuple[Any, type]:
    """Transformer Engine's layers, and its norm."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    # Before Hopper this takes flash-attn 2.4.1 or later.
    os.environ.setdefault(_ANY_ORDER, "0")
    spec = get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm, use_te_activation_func=config.use_te_activation_func
    )
    return spec, TENorm


def _local_spec(config: Any) -> tuple[Any, type]:
    """Megatron's local layers with a norm that works under sequence parallelism, and that norm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from minitron_megatron.models.norms import Norm

    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    if config.qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
    return spec, Norm


def scaled_inverse_frequencies(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3's rotary frequencies: long wavelengths slowed by `factor`, short ones kept, a ramp between.

    Megatron has the ramp's bounds as constants, so it is done here for any of them.
    """
    wavelength = 2 * math.pi / inv_freq
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    ramp = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * inv_freq / scaling.factor + ramp * inv_freq


def build_gpt(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    engine: str,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    training: Mapping[str, Any] | None = None,
    groups: Any = None,
) -> torch.nn.Module:
    """One pipeline chunk of the model on this rank, of an engine (te or local), uninitialised.

    Fill it with checkpoints.weights.load_model.
    """
    from megatron.core.models.gpt import GPTModel

    config = transformer_config(shape, layout, dtype, engine, training)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, vp_stage, groups.pp.rank() if groups else None),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rotary_percent=shape.rotary_percent,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if shape.rope_scaling:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = scaled_inverse_frequencies(rotary.inv_freq, shape.rope_scaling)
    return model.cuda(torch.cuda.current_device())


@busy("building the model")
def build_model_chunks(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    engine: str = "auto",
    training: Mapping[str, Any] | None = None,
    groups: Any = None,
) -> list[torch.nn.Module]:
    """This rank's pipeline chunks: one, or `virtual_pipeline` of them in an interleaved schedule.

    `engine` is auto, te or local (pick_engine), `training` as of transformer_config. `groups` are the layout's
    (parallel/layout.py, `process_groups`), if it is not the one that Megatron's own state is set up for. Raises UserError
    where it cannot run.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage

    device = torch.device("cpu" if _on_cpu() else "cuda")
    picked = pick_engine(engine, layout, dtype, device)
    if groups is not None:
        first, last = is_pp_first_stage(groups.pp), is_pp_last_stage(groups.pp)
        given = {"pre_process": first, "post_process": last, "training": training, "groups": groups}
        return [build_gpt(shape, layout, dtype, picked, **given)]

    def stage(vp: int | None) -> torch.nn.Module:
        return build_gpt(
            shape,
            layout,
            dtype,
            picked,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=vp is None, vp_stage=vp),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=vp is None, vp_stage=vp),
            vp_stage=vp,
            training=training,
        )

    return [stage(vp) for vp in (range(layout.virtual_pipeline) if layout.virtual_pipeline else [None])]
