"""Hugging Face configs and our shapes: which architectures are read and written, and what is refused by name.

A family is an axis table (axes.py), the table of its keys (hf_keys.py), and what is here. Reading refuses every key that the
tables do not know, and every feature that they do not describe, rather than importing a model that computes something else.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.config_keys import number, shown, truth, whole_number, words
from minitron_megatron.models.hf_keys import FAMILIES, Family
from minitron_megatron.models.hf_rope import rope_of
from minitron_megatron.models.shape import DTYPES, SIZES, ModelShape

__all__ = ["FAMILIES", "check_exportable", "class_of_export", "hf_config", "shape_from_hf"]

log = logging.getLogger(__name__)


def shape_from_hf(config: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> ModelShape:
    """The shape of a Hugging Face model by its config.json (transformers 4 or 5).

    Args:
        config: what is in it.
        where: the file, for errors.
        ignored: keys that the user says change nothing of what the model computes.

    Raises:
        UserError: it names the key.
    """
    name, family = _family(config, where)
    family.keys.check({**family.defaults, **config}, where, family.architecture, ignored)
    hidden, heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    layers = _size(config, "num_hidden_layers", where)
    _check_layer_types(config, layers, where)
    rope = rope_of(config, family, where)
    try:
        return ModelShape(
            family=name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_size(config, "intermediate_size", where),
            num_attention_heads=heads,
            num_query_groups=_size(config, "num_key_value_heads", where, family, absent=heads),
            head_dim=_head_dim(config, family, hidden // heads, where),
            vocab_size=_size(config, "vocab_size", where),
            max_position_embeddings=_size(config, "max_position_embeddings", where),
            rope_theta=rope.theta,
            norm_eps=number({**family.defaults, **config}, family.norm_eps, where),
            tied_embeddings=truth(config, "tie_word_embeddings", where),
            dtype=_dtype(config, where),
            rope_scaling=rope.scaling,
            rotary_percent=rope.percent,
        )
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


# Our names of sizes that a config calls otherwise.
_OUR_NAMES = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "kv_channels": "head_dim",
}


def _size(
    config: Mapping[str, Any], key: str, where: str, family: Family | None = None, absent: int | None = None
) -> int:
    """A size; where a config has none, the family's, and where it has a null, or there is none either, `absent`."""
    values = config if family is None or key in config else family.defaults
    if family is not None and key in family.no_null and key in config and config[key] is None:
        raise UserError(f"{where}: {key}=null is no value of it for {family.architecture}: write the number")
    if absent is not None and values.get(key) is None:
        return absent
    return whole_number(values, key, where, SIZES[_OUR_NAMES.get(key, key)])


def _head_dim(config: Mapping[str, Any], family: Family, share: int, where: str) -> int:
    """Channels of a head: `share` of the hidden size where it is not said. Nemotron's kv_channels must say the same."""
    size = _size(config, "head_dim", where, family, absent=share)
    if (other := _size(config, "kv_channels", where, absent=size)) != size:
        raise UserError(
            f"{where}: kv_channels={other} and heads of {size} channels contradict each other: say head_dim"
        )
    return size


def _dtype(config: Mapping[str, Any], where: str) -> str:
    named = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    found = next(iter(named.values()), "float32")
    if not isinstance(found, str) or found not in DTYPES:
        said = found if isinstance(found, str) else shown(found)
        raise UserError(f"{where}: dtype {said} is not supported: convert the model to one of {', '.join(DTYPES)}")
    if any(value != found for value in named.values()):
        raise UserError(
            f"{where}: dtype={found} and torch_dtype={shown(named['torch_dtype'])} contradict each other: leave the one that is "
            "right"
        )
    return found


def _family(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """The family by the architecture, which the model_type must go with: transformers goes by that. Raises UserError."""
    kind, named = config.get("model_type"), words(config, "architectures", where)
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: model_type={shown(kind)} must be a name")
    for name, family in FAMILIES.items():
        if named[:1] == [family.architecture] or (not named and kind == family.model_type):
            if kind not in (None, family.model_type):
                raise UserError(
                    f"{where}: model_type={kind!r} and architectures={named[0]!r} contradict each other: transformers takes the "
                    f"model_type; {family.architecture} has {family.model_type!r}"
                )
            return name, family
    known = ", ".join(f.architecture for f in FAMILIES.values())
    raise UserError(f"{where}: architecture {(named or ['unnamed'])[0]} is not supported: use one of {known}")


def _check_layer_types(config: Mapping[str, Any], layers: int, where: str) -> None:
    """Raise UserError for layers that do not attend to everything, or where the list is of another model."""
    kinds = words(config, "layer_types", where)
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise UserError(f"{where}: layer_types has {others[0]}: only full_attention is supported")
    if kinds and len(kinds) != layers:
        raise UserError(
            f"{where}: layer_types has {len(kinds)} entries, num_hidden_layers={layers}: one a layer is needed"
        )


def check_exportable(shape: ModelShape, where: str) -> None:
    """Raise UserError for a shape that a Hugging Face config cannot say."""
    if not shape.uniform:
        raise UserError(
            f"{where} has layers of different ffn_hidden_size, and the config of {FAMILIES[shape.family].architecture} has one "
            "intermediate_size for all: prune to one ffn_hidden_size to export"
        )


def class_of_export(shape: ModelShape) -> Family:
    """The architecture that a shape is exported as: its own, unless transformers' class refuses its sizes.

    That is Llama, where the hidden size is not a multiple of the heads: Mistral computes the same, and takes any.
    """
    own = FAMILIES[shape.family]
    odd = own.whole_heads and shape.hidden_size % shape.num_attention_heads
    return FAMILIES["mistral"] if odd else own


# Of the source's keys: what no copy of a config should say.
_NOT_KEPT = frozenset(("_name_or_path", "_model_name_or_path", "name_or_path", "_commit_hash"))


def hf_config(shape: ModelShape, source: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a shape; keys of `source` (the imported model's own) that are no sizes, and known, are kept."""
    family = class_of_export(shape)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling:
        rope |= {"rope_type": "llama3", **vars(shape.rope_scaling)}
    if family.partial_rotary:
        rope["partial_rotary_factor"] = shape.rotary_percent
    # Sizes and what follows from them are the shape's; the rest is kept, where it is known.
    keys = family.keys
    kept = {k: v for k, v in source.items() if keys.knows(k) and k not in keys.read and k not in _NOT_KEPT}
    lost = [k for k, v in source.items() if v is not None and not keys.knows(k)]
    if lost:
        log.warning("config.json: %s left out: not known for %s", ", ".join(lost), family.architecture)
    return {
        **kept,
        **{key: values[0] for key, values in family.fixed.items()},
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
