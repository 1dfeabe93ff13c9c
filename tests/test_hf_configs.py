"""Configs of other programs are understood whole: each key is read, held to one value, harmless, or refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.config import FAMILY_NAMES
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.families import FAMILIES, hf_config, shape_from_hf
from minitron_megatron.models.nemo import CLASSES, fields_of_nemo1, fields_of_nemo2, model_yaml, shape_from_nemo
from tests.test_nemo import NEMO1, NEMO1_OF
from tests.tiny import LLAMA3, SIZES

LLAMA3_OF_4 = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}


def config_of(name: str = "llama", **changes) -> dict:
    """A config.json of a family, in the manner of transformers 4."""
    family = FAMILIES[name]
    sizes = {k: v for k, v in SIZES.items() if k != "rms_norm_eps"}
    window = {"sliding_window": None} if name == "mistral" else {}
    own = {"architectures": [family.architecture], "model_type": family.model_type, family.norm_eps: 1e-5}
    return {**sizes, **own, **window, "rope_theta": 10000.0, "torch_dtype": "bfloat16", **changes}


# Keys as published models have them.
REAL = {
    "llama": {
        "_name_or_path": "/fsx/loubna",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "initializer_range": 0.04,
        "is_llama_config": True,
        "pad_token_id": -1,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.47.1",
        "unsloth_version": "2025.3",
        "use_cache": True,
        "hidden_act": "swish",
        "mlp_bias": None,
    },
    "mistral": {"attention_dropout": 0.0, "transformers_version": "4.42.0.dev0", "use_cache": True},
    "qwen2": {
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_mrope": False,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * SIZES["num_hidden_layers"],
        "_attn_implementation_autoset": True,
    },
    "qwen3": {"attention_bias": False, "max_window_layers": 36, "sliding_window": None, "use_sliding_window": False},
    "nemotron": {"partial_rotary_factor": 0.5, "rope_percent": 0.5, "kv_channels": 8, "bos_token_id": 2},
}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_published_configs_are_read_and_what_is_harmless_is_kept(name):
    config = config_of(name, **REAL[name])
    shape = shape_from_hf(config, "config.json")
    written = hf_config(shape, config)
    assert shape_from_hf(written, "again") == shape
    for key in ("bos_token_id", "eos_token_id", "transformers_version", "max_window_layers"):
        assert written.get(key) == config.get(key)
    assert "_name_or_path" not in written and "layer_types" not in written and "kv_channels" not in written


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_transformers_itself_writes_is_known(name):
    """Every field of its class, whatever its version adds."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in config_of(name).items() if key != "architectures"}
    written = AutoConfig.for_model(**sizes).to_dict()
    unknown = [key for key, value in written.items() if value is not None and not FAMILIES[name].keys.knows(key)]
    assert not unknown
    shape_from_hf({**written, "architectures": [FAMILIES[name].architecture], "dtype": "bfloat16"}, "config.json")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"attention_multiplier": 0.5}, "attention_multiplier=0.5 is not known for LlamaForCausalLM"),
        (
            "llama",
            {"logits_soft_cap": 30.0, "residual_multiplier": 0.2},
            r"logits_soft_cap=30.0, residual_multiplier=0.2 are not",
        ),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not known for Qwen3ForCausalLM"),
        ("mistral", {"embedding_multiplier": 12}, r"as in ignore_keys=\[embedding_multiplier\]"),
        ("nemotron", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not known"),
        ("llama", {"use_bias": False}, "use_bias=False is not known"),
        ("llama", {"sliding_window": 1024}, "sliding_window=1024 is not supported for LlamaForCausalLM"),
        ("llama", {"is_causal": False}, "is_causal=False is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias=False is not supported"),
        (
            "llama",
            {"auto_map": {"AutoModel": "x.Y"}},
            "auto_map=a mapping is not supported: its layers are code of its own",
        ),
        ("llama", {"transformers_weights": "other.safetensors"}, "names a file of weights of its own"),
        ("llama", {"per_layer_config": {"0": {"hidden_size": 3}}}, "layers differ from one another"),
        ("llama", {"model_type": "mistral"}, "model_type='mistral' and architectures='LlamaForCausalLM' contradict"),
        ("qwen2", {"model_type": 3}, "model_type=3 must be a name"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list of names"),
        ("llama", {"dtype": "float32"}, "dtype=float32 and torch_dtype='bfloat16' contradict each other"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ("qwen2", {"layer_types": 3}, "layer_types=3 must be a list of names"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, num_hidden_layers=4"),
        ("nemotron", {"kv_channels": 4}, "kv_channels=4 and heads of 8 channels contradict"),
        (
            "nemotron",
            {"partial_rotary_factor": 0.5, "rope_percent": 1.0},
            "partial_rotary_factor=0.5 and rope_percent=1.0",
        ),
    ],
)
def test_other_keys_are_refused_by_name(name, change, says):
    with pytest.raises(UserError, match=says) as refused:
        shape_from_hf(config_of(name, **change), "config.json")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("config.json: ")


def test_a_null_says_that_there_is_no_such_thing():
    assert shape_from_hf(config_of(logits_soft_cap=None, attention_bias=None), "x") == shape_from_hf(config_of(), "x")


# Of which transformers 4 takes a null as false, or as one for each query head, and transformers 5 loads none.
TAKEN_AS_4 = {
    *((name, key) for name in FAMILY_NAMES for key in ("tie_word_embeddings", "use_sliding_window")),
    *((name, key) for name in FAMILY_NAMES for key in ("attention_bias", "mlp_bias")),
    ("mistral", "num_key_value_heads"),
}


def built_by_transformers(config: dict) -> tuple[int, float, int]:
    """Parameters, base of the rotary frequencies, and channels of a head that turn."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    own = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    parameters = sum(one.numel() for one in model.parameters())
    return parameters, own.rope_parameters["rope_theta"], 2 * len(model.model.rotary_emb.inv_freq)


def with_nulls(name: str) -> dict[str, dict]:
    """Configs of a family with a null at each key that is not harmless, and at each inside its rope."""
    config, keys = config_of(name), FAMILIES[name].keys
    found = {
        key: {**config, key: None} for key in sorted((keys.read | set(keys.only)) - {"model_type", "architectures"})
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rope |= {"partial_rotary_factor": 0.5} if FAMILIES[name].partial_rotary else {}
    for place in ("rope_parameters", "rope_scaling"):
        found |= {f"{place}.{key}": {**config, place: {**rope, key: None}} for key in rope}
    return found


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_null_is_what_it_is_to_transformers_or_refused(name):
    """A null is no missing key: transformers has defaults for that alone."""
    plain, taken = shape_from_hf(config_of(name), "x"), []
    for key, config in with_nulls(name).items():
        try:
            shape = shape_from_hf(config, "x")
        except UserError:
            continue
        taken.append(key)
        if (name, key) in TAKEN_AS_4:
            assert shape == (plain.resized(num_query_groups=plain.num_attention_heads) if "heads" in key else plain)
            continue
        found = built_by_transformers(config)
        assert found == (count_parameters(shape), shape.rope_theta, shape.head_dim * shape.rotary_percent), key
    assert {"rope_scaling", "kv_channels"} <= set(taken) and len(taken) > 5
    refused = {"rope_theta", "vocab_size", "rope_parameters.rope_theta", "rope_scaling.rope_type"}
    refused |= {
        "qwen2": {"head_dim"},
        "qwen3": {"head_dim"},
        "nemotron": {"partial_rotary_factor", "num_key_value_heads"},
    }.get(name, set())
    assert not refused & set(taken)


def test_keys_that_the_user_knows_are_passed_over_and_not_exported(tmp_path):
    config = config_of(my_note="made on Monday", attention_multiplier=1.0)
    shape = shape_from_hf(config, "x", ["my_note", "attention_multiplier"])
    assert shape == shape_from_hf(config_of(), "x")
    assert not {"my_note", "attention_multiplier"} & set(hf_config(shape, config))
    with pytest.raises(UserError, match=r"attention_multiplier=1\.0 is not known"):
        shape_from_hf(config, "x", ["my_note"])
    for ignored, why in (("nothing", "is not in it"), ("rope_theta", "is known, and has its own rules")):
        with pytest.raises(UserError, match=f"ignore_keys={ignored}: the key {why}"):
            shape_from_hf(config, "x", [ignored])


# Rotary embeddings, which are said in several places


def test_the_inner_base_counts_where_no_other_is_said():
    base = {key: value for key, value in config_of().items() if key != "rope_theta"}
    for key in ("rope_scaling", "rope_parameters"):
        inside = {"rope_type": "default", "rope_theta": 500000.0}
        assert shape_from_hf({**base, key: inside}, "x").rope_theta == 500000.0
        assert shape_from_hf({**base, key: {**LLAMA3, "rope_theta": 2e5}}, "x").rope_theta == 2e5
    assert shape_from_hf(base, "x").rope_theta == 10000.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta=500000.0 and rope_theta=1",
        ),
        (
            {"rope_scaling": {**LLAMA3, "rope_theta": 3e4}},
            "rope_scaling.rope_theta=30000.0 and rope_theta=10000.0 contradict",
        ),
        (
            {"rope_scaling": LLAMA3_OF_4, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"rope_scaling": {**LLAMA3_OF_4, "type": "linear"}}, "rope_type='llama3' and type='linear' contradict"),
        ({"rope_scaling": LLAMA3_OF_4, "original_max_position_embeddings": 64}, "contradict each other"),
        ({"rope_scaling": {**LLAMA3_OF_4, "beta_fast": 32}}, "beta_fast=32 is not supported for rope_type llama3"),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
            "factor=8.0 is not supported for rope_type default",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear' is not supported"),
        (
            {"rope_scaling": {**LLAMA3_OF_4, "factor": "8x"}},
            "config.json, rope_scaling: factor='8x' must be a number above 0",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is missing"),
        (
            {"rope_scaling": {**LLAMA3_OF_4, "high_freq_factor": 1.0}},
            "low_freq_factor=1.0 must be below high_freq_factor=1.0",
        ),
        ({"rope_parameters": [1]}, "rope_parameters=a list must be a mapping"),
        ({"rope_theta": "1e4x"}, "rope_theta='1e4x' must be a number above 0"),
        ({"rope_theta": True}, "rope_theta=True must be a number above 0"),
    ],
)
def test_contradictions_about_rotary_embeddings_are_refused(change, says):
    with pytest.raises(UserError, match=says) as refused:
        shape_from_hf(config_of(**change), "config.json")
    assert "\n" not in str(refused.value)


_thetas = st.sampled_from([None, 10000.0, 500000.0])
_kinds = st.sampled_from([{}, {"rope_type": "default"}, {"type": "default"}, LLAMA3_OF_4])


def _rope(kind: dict, theta: float | None) -> dict:
    return {**kind, **({} if theta is None else {"rope_theta": theta})}


@given(_thetas, *[st.none() | st.builds(_rope, _kinds, _thetas)] * 2, st.sampled_from([None, 32, 64]))
def test_rotary_embeddings_are_those_of_transformers_or_refused(top, scaling, parameters, length):
    from transformers import AutoConfig

    config = config_of(rope_scaling=scaling, rope_parameters=parameters, rope_theta=top)
    config |= {} if length is None else {"original_max_position_embeddings": length}
    config = {key: value for key, value in config.items() if value is not None}
    try:
        shape = shape_from_hf(json.loads(json.dumps(config)), "config.json")
    except UserError as error:
        assert "\n" not in str(error)
        return
    rope = AutoConfig.for_model(**config).rope_parameters
    assert rope["rope_theta"] == shape.rope_theta
    assert (rope["rope_type"] == "llama3") == (shape.rope_scaling is not None)
    for name, value in vars(shape.rope_scaling).items() if shape.rope_scaling else ():
        assert rope[name] == value, name


# Numbers have bounds before they are used

_SIZES = [key for key in SIZES if key not in ("rms_norm_eps", "tie_word_embeddings")]
ODD = [0, -1, 1.5, "64", True, [], {}, 10**12, float("nan"), float("inf"), 30_000_000_000]


@pytest.mark.parametrize("key", [*_SIZES, "rope_theta", "rms_norm_eps"])
def test_a_number_that_is_none_is_refused_by_its_name(key):
    real = ODD if key in _SIZES else [v for v in ODD if not (type(v) in (int, float) and 0 < v < float("inf"))]
    for value in real:
        with pytest.raises(UserError, match=f"config.json: {key}=") as refused:
            shape_from_hf(config_of(**{key: value}), "config.json")
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    if key in _SIZES and key not in ("head_dim", "num_key_value_heads"):
        with pytest.raises(UserError, match=f"config.json: {key} is missing"):
            shape_from_hf({k: v for k, v in config_of().items() if k != key}, "config.json")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
_keys = sorted(
    {*config_of("nemotron"), *REAL["llama"], *REAL["qwen2"], *REAL["nemotron"], "rope_parameters", "auto_map"}
)


@given(st.sampled_from(FAMILY_NAMES), st.dictionaries(st.sampled_from(_keys), _json, max_size=3))
def test_whatever_is_in_a_config_it_is_read_or_refused_in_a_line(name, values):
    try:
        shape = shape_from_hf(config_of(name, **values), "config.json")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert shape_from_hf(hf_config(shape, {}), "again") == shape


def test_thirty_million_layers_end_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(num_hidden_layers=30_000_000)))
    with pytest.raises(UserError, match="num_hidden_layers=30000000 must be a whole number from 1 to"):
        HfFolder(tmp_path)


# NeMo's


def nemo2(name: str = "qwen3", **values) -> tuple:
    shape = shape_from_hf(config_of(name), "x")
    config = model_yaml(shape, "x", None)
    return shape, {**config, "config": {**config["config"], **values}}


def of_nemo2(config: dict, ignored=()):
    return shape_from_nemo(fields_of_nemo2(config, "model.yaml", ignored), SIZES["vocab_size"], "bfloat16", None)


@pytest.mark.parametrize("name", CLASSES)
def test_nemos_own_fields_are_known(name):
    """All of megatron.core's config, which NeMo 2 writes out with its defaults."""
    from dataclasses import MISSING, fields

    from megatron.core.transformer import TransformerConfig

    defaults = {f.name: f.default for f in fields(TransformerConfig) if f.default is not MISSING and f.name[0] != "_"}
    plain = {k: v for k, v in defaults.items() if isinstance(v, str | int | float | bool | None)}
    shape, config = nemo2(name)
    assert of_nemo2({**config, "config": {**plain, **config["config"]}}) == shape


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"attention_output_gate": True}, "attention_output_gate=True is not supported for Qwen3Model"),
        ({"linear_attention_freq": 4}, "linear_attention_freq=4 is not supported"),
        ({"use_mup": True}, "use_mup=True is not supported"),
        ({"logits_scale": 2.0}, "logits_scale=2.0 is not known for Qwen3Model"),
        (
            {"transformer_layer_spec": {"_target_": "mine.my_spec"}},
            "transformer_layer_spec='mine.my_spec' is not supported",
        ),
        ({"num_query_groups": 0}, "num_query_groups=0 must be a whole number"),
        ({"kv_channels": "8"}, "kv_channels='8' is not a number"),
        ({"seq_length": 0}, "seq_length=0 must be a whole number"),
        ({"rotary_base": True}, "rotary_base=True must be a number"),
        ({"num_layers": 30_000_000}, "num_layers=30000000 must be a whole number"),
        (
            {"share_embeddings_and_output_weights": "no"},
            "share_embeddings_and_output_weights='no' must be true or false",
        ),
        ({"gated_linear_unit": "false"}, "gated_linear_unit='false' must be true or false"),
        ({"window_size": [64, 0], "seq_length": "x"}, "window_size=a list is not supported"),
    ],
)
def test_what_nemo_2_says_otherwise_is_refused_by_name(values, says):
    with pytest.raises(UserError, match=says) as refused:
        of_nemo2(nemo2(**values)[1])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"headscale": True}, "headscale=True is not supported"),
        ({"transformer_block_type": "normformer"}, "transformer_block_type='normformer' is not supported"),
        ({"position_embedding_type": None}, "position_embedding_type=None is not supported"),
        ({"embedding_scale": 3.0}, "embedding_scale=3.0 is not known for a model of NeMo 1"),
        ({"bias": True}, "bias=True is not supported"),
        ({"window_size": [64, 0]}, "window_size=a list is not supported"),
        ({"name": "megatron_falcon_gpt"}, "name='megatron_falcon_gpt' is not supported"),
        ({"scale_positional_embedding": "x"}, "scale_positional_embedding='x' must be true or false"),
        ({"max_position_embeddings": 0}, "seq_length=0 must be a whole number"),
    ],
)
def test_what_nemo_1_says_otherwise_is_refused_by_name(values, says):
    with pytest.raises(UserError, match=says):
        shape_from_nemo(
            fields_of_nemo1({**NEMO1, **NEMO1_OF["llama"], **values}, "model_config.yaml"), 300, "bfloat16", None
        )


def test_nemos_keys_can_be_passed_over_too():
    shape, config = nemo2(team="ours")
    with pytest.raises(UserError, match="team='ours' is not known"):
        of_nemo2(config)
    assert of_nemo2(config, ["team"]) == shape


_nemo_keys = sorted({*nemo2()[1]["config"], *NEMO1, *NEMO1_OF["llama"], "window_size", "scale_factor"})


@given(st.dictionaries(st.sampled_from(_nemo_keys), _json, max_size=3))
def test_whatever_nemo_says_it_is_read_or_refused_in_a_line(values):
    for read in (
        lambda: of_nemo2(nemo2(**values)[1]),
        lambda: shape_from_nemo(
            fields_of_nemo1({**NEMO1, **NEMO1_OF["nemotron"], **values}, "y"), 300, "float32", None
        ),
    ):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", FAMILIES)
def test_which_families_want_whole_heads_is_what_transformers_refuses(name):
    """A hidden size that the heads do not divide: where it is taken, an export needs no other class."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 36, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    try:
        AutoConfig.for_model(FAMILIES[name].model_type, **sizes)
        taken = True
    except Exception as error:  # its own class of validation errors
        assert "36" in str(error)
        taken = False
    assert FAMILIES[name].whole_heads is not taken
