"""Hugging Face configs and our shapes: which architectures are read and written, and what is refused by name.

A family is an axis table (axes.py) plus what is here. Reading refuses every feature that the table does not describe,
rather than importing a model that computes something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import DTYPES, ModelShape, RopeScaling


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    `fixed` are config keys whose value must be just this; `defaults` are what transformers takes for keys that a config
    leaves out, where that is not what everyone takes. `norm_eps` is the key of the norms' epsilon, and `partial_rotary`
    says whether rotary embeddings may turn a part of each head only.
    """

    architecture: str
    model_type: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    partial_rotary: bool = False


_SILU, _NO_BIAS = {"hidden_act": "silu"}, {"attention_bias": False, "mlp_bias": False}
_WHOLE_WINDOW = {"use_sliding_window": False}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", {**_SILU, **_NO_BIAS}),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {**_SILU, **_NO_BIAS, "sliding_window": None},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", {**_SILU, **_WHOLE_WINDOW}, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_SILU, **_WHOLE_WINDOW, "attention_bias": False},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        "nemotron",
        {"hidden_act": "relu2", **_NO_BIAS},
        defaults={"partial_rotary_factor": 0.5},
        norm_eps="norm_eps",
        partial_rotary=True,
    ),
}


def shape_from_hf(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape of a Hugging Face model by its config.json (transformers 4 or 5). Raises UserError."""
    name, family = _family(config, where)
    config = {**family.defaults, **config}
    _check_features(config, family, where)
    rope = config.get("rope_parameters") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"{where}: dtype {dtype} is not supported: convert the model to one of {', '.join(DTYPES)}")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            family=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=config[family.norm_eps],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=dtype,
            rope_scaling=_rope_scaling(config.get("rope_scaling") or rope, where),
            rotary_percent=_rotary_percent(config),
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None


def _family(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    architecture = (config.get("architectures") or ["unnamed"])[0]
    for name, family in FAMILIES.items():
        if family.architecture == architecture:
            return name, family
    known = ", ".join(f.architecture for f in FAMILIES.values())
    raise UserError(f"{where}: architecture {architecture} is not supported: use one of {known}")


def _check_features(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Raise UserError for what the family's table does not describe."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: {key} is not a mapping")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(f"{where}: {key} that differ between layers are not supported")
    for key, value in {**family.fixed, "quantization_config": None}.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key}={config[key]!r} is not supported for {family.architecture} (only {value!r})"
            )
    windows = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windows:
        raise UserError(f"{where}: layer_types has {windows[0]}: only full_attention is supported")
    if _rotary_percent(config) != 1 and not family.partial_rotary:
        raise UserError(
            f"{where}: partial_rotary_factor={_rotary_percent(config)} is not supported for {family.architecture}"
        )


def _rotary_percent(config: Mapping[str, Any]) -> float:
    """Under either name: transformers 5 has it in rope_parameters, 4 beside them."""
    rope = config.get("rope_parameters") or {}
    for percent in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if percent is not None:
            return percent
    return 1.0


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
    if family.partial_rotary:
        rope["partial_rotary_factor"] = shape.rotary_percent
    # layer_types has an entry a layer; where all are alike, transformers makes it itself.
    kept = {k: v for k, v in source.items() if k not in ("layer_types", "_name_or_path")}
    return {
        **kept,
        **family.fixed,
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
        family.norm_eps: shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        # Both spellings, so that transformers 4 and 5, vLLM and TensorRT-LLM read the same model.
        "rope_theta": shape.rope_theta,
        **({"partial_rotary_factor": shape.rotary_percent} if family.partial_rotary else {}),
        "rope_parameters": rope,
        "rope_scaling": {"rope_type": "llama3", **vars(shape.rope_scaling)} if shape.rope_scaling else None,
        "dtype": shape.dtype,
        "torch_dtype": shape.dtype,
    }
