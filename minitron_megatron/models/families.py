"""Hugging Face configs and our shapes: which architectures are read and written, and what is refused by name.

A family is an axis table (axes.py) plus what is here. Reading refuses every feature that the table does not describe,
rather than importing a model that computes something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import DTYPES, ModelShape, RopeScaling


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture. `fixed` are config keys that must have just this value where they are present."""

    architecture: str
    model_type: str
    fixed: Mapping[str, Any]


_SILU_NO_BIAS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", _SILU_NO_BIAS),
    "mistral": Family("MistralForCausalLM", "mistral", {**_SILU_NO_BIAS, "sliding_window": None}),
}


def shape_from_hf(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape of a Hugging Face model by its config.json (transformers 4 or 5). Raises UserError."""
    architecture = (config.get("architectures") or ["unnamed"])[0]
    wrong = [key for key in ("rope_parameters", "rope_scaling") if not isinstance(config.get(key) or {}, Mapping)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]} is not a mapping")
    family = next((name for name, f in FAMILIES.items() if f.architecture == architecture), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(f"{where}: architecture {architecture} is not supported: use one of {known}")
    for key, value in FAMILIES[family].fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key}={config[key]!r} is not supported for {architecture} (only {value!r})")
    rope = config.get("rope_parameters") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"{where}: dtype {dtype} is not supported: convert the model to one of {', '.join(DTYPES)}")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=config["rms_norm_eps"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=dtype,
            rope_scaling=_rope_scaling(config.get("rope_scaling") or rope, where),
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported: only default and llama3 are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(*(rope[name] for name in names))


def check_exportable(shape: ModelShape, where: str) -> None:
    """Raise UserError for a shape that a Hugging Face config cannot say."""
    if not shape.uniform:
        raise UserError(
            f"{where} has layers of different ffn_hidden_size, and the config of {FAMILIES[shape.family].architecture} has one "
            "intermediate_size for all: prune to one ffn_hidden_size to export"
        )


def hf_config(shape: ModelShape, source: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a shape; keys of `source` (the imported model's own) that are no sizes are kept."""
    family = FAMILIES[shape.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling:
        rope |= {"rope_type": "llama3", **vars(shape.rope_scaling)}
    kept = {k: v for k, v in source.items() if k not in ("rope_scaling", "torch_dtype", "_name_or_path")}
    return {
        **kept,
        **{k: v for k, v in family.fixed.items() if v is not None},
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        # Both spellings, so that transformers 4 and 5, vLLM and TensorRT-LLM read the same model.
        "rope_theta": shape.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if shape.rope_scaling else None,
        "dtype": shape.dtype,
        "torch_dtype": shape.dtype,
    }
