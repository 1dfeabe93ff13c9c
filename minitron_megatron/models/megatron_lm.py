"""A shape as Megatron-LM's command line: the arguments that make its pretrain_gpt.py build the same model.

Names and meanings are those of megatron.training 0.19 (arguments.py and models/gpt.py there), which has some of a model's
numbers as constants: a shape with others is refused, rather than exported as a model that computes something else.
"""

from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import TRAITS
from minitron_megatron.models.shape import VOCAB_MULTIPLE, ModelShape, RopeScaling

# What Megatron-LM's builders use with --use-rope-scaling. They parse --rope-scaling-factor, and none of them reads it.
ROPE_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_FLAGS_OF_ACTIVATION = {("silu", True): "--swiglu", ("squared_relu", False): "--squared-relu"}
_INSTEAD = "load its weights/ into a megatron.core GPTModel of your own instead (docs/formats.md)"

# Option and its value; None for flags.
Arguments = dict[str, str | None]


def check_expressible(shape: ModelShape, where: str) -> None:
    """Raise UserError for a shape that Megatron-LM's arguments cannot say."""
    if not shape.uniform:
        raise UserError(
            f"{where} has layers of different ffn_hidden_size, and Megatron-LM has one --ffn-hidden-size for all (its "
            "heterogeneous layers are Llama-Nemotron's alone): prune to one ffn_hidden_size to export"
        )
    if shape.rope_theta != int(shape.rope_theta):
        raise UserError(
            f"{where} has rope_theta={shape.rope_theta}, and Megatron-LM's --rotary-base is a whole number: {_INSTEAD}"
        )
    for name, value in vars(shape.rope_scaling or ROPE_SCALING).items():
        only = getattr(ROPE_SCALING, name)
        if value != only:
            raise UserError(
                f"{where} has rope_scaling.{name}={value:g}, and Megatron-LM's pretrain_gpt.py uses {only:g}, whatever its "
                f"arguments say: {_INSTEAD}"
            )


def model_arguments(shape: ModelShape) -> Arguments:
    """Megatron-LM's arguments for a model, without its tokenizer and without anything of layout or training.

    Dropout is one of them: Megatron-LM's default is 0.1. The vocabulary's padding is given outright, so that it is the
    checkpoint's whatever the tokenizer counts and the tensor-parallel size is.
    """
    traits = TRAITS[shape.family]
    sizes = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--num-query-groups": shape.num_query_groups,
        "--kv-channels": shape.head_dim,
        "--max-position-embeddings": shape.max_position_embeddings,
        "--vocab-size": shape.vocab_size,
        "--padded-vocab-size": shape.padded_vocab_size,
        "--make-vocab-size-divisible-by": VOCAB_MULTIPLE,
        "--position-embedding-type": "rope",
        "--rotary-base": int(shape.rope_theta),
        "--rotary-percent": shape.rotary_percent,
        **({"--rope-scaling-factor": shape.rope_scaling.factor} if shape.rope_scaling else {}),
        "--normalization": traits.normalization,
        "--norm-epsilon": shape.norm_eps,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
    }
    flags = {
        "--group-query-attention": True,
        "--use-rope-scaling": shape.rope_scaling is not None,
        "--apply-layernorm-1p": traits.zero_centered_gain,
        "--qk-layernorm": traits.qk_norm,
        "--add-qkv-bias": traits.qkv_bias,
        "--disable-bias-linear": True,
        _FLAGS_OF_ACTIVATION[traits.activation, traits.gated]: True,
        "--untie-embeddings-and-output-weights": not shape.tied_embeddings,
        "--bf16": shape.dtype == "bfloat16",
    }
    values: Arguments = {name: str(value) for name, value in sizes.items()}
    return values | dict.fromkeys(name for name, wanted in flags.items() if wanted)


def words(arguments: Arguments) -> list[str]:
    """Arguments as the words of a command line."""
    return [word for name, value in arguments.items() for word in ((name,) if value is None else (name, value))]
