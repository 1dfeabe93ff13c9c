"""A shape in NeMo's and Megatron-LM's words, each word by itself, and back."""

import pytest

from minitron_megatron.errors import UserError
from minitron_megatron.models.megatron_lm import ROPE_SCALING, check_expressible, model_arguments, words
from minitron_megatron.models.nemo import (
    CLASSES,
    check_nemo_class,
    config_fields,
    fields_of_nemo1,
    fields_of_nemo2,
    io_json,
    model_yaml,
    shape_from_nemo,
)
from minitron_megatron.models.shape import RopeScaling
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_nemo import NEMO1, NEMO1_OF

SHAPE = SMALL_SHAPE.resized(vocab_size=300, max_position_embeddings=128, rope_theta=10000.0)
# Activation, gate, norm, zero-centred gain, biases of queries, norms of heads
TRAITS = {
    "llama": ("silu", True, "RMSNorm", False, False, False),
    "mistral": ("silu", True, "RMSNorm", False, False, False),
    "qwen2": ("silu", True, "RMSNorm", False, True, False),
    "qwen3": ("silu", True, "RMSNorm", False, False, True),
    "nemotron": ("squared_relu", False, "LayerNorm", True, False, False),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TRAITS)
def test_every_field_of_nemos_config(family, dtype, tied):
    _, gated, norm, centred, bias, heads = TRAITS[family]
    shape = SHAPE.resized(family=family, dtype=dtype, tied_embeddings=tied)
    assert config_fields(shape) == {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 4,
        "vocab_size": 300,
        "seq_length": 128,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
        "normalization": norm,
        "layernorm_zero_centered_gamma": centred,
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": gated,
        "add_bias_linear": False,
        "add_qkv_bias": bias,
        "qk_layernorm": heads,
        "share_embeddings_and_output_weights": tied,
        "fp16": False,
        "bf16": dtype == "bfloat16",
        **({"window_size": None, "cp_comm_type": None} if family == "mistral" else {}),
    }
    back = fields_of_nemo2(model_yaml(shape, "x", "t"), "x")
    assert back.family == family and shape_from_nemo(back, 300, dtype, None) == shape
    assert (CLASSES[family].seq_length, check_nemo_class(shape, "x")) == (
        32768 if family == "mistral" else None,
        CLASSES[family],
    )


def test_a_scaled_rope_has_a_class_of_its_own():
    scaled = SHAPE.resized(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    found = config_fields(scaled)
    assert [found[name] for name in names] == [8.0, 1.0, 4.0, 8192]
    of = model_yaml(scaled, "x", None)
    assert of["config"]["_target_"].endswith(".llama.Llama31Config") and "tokenizer" not in of
    assert model_yaml(SHAPE, "x", None)["config"]["_target_"].endswith(".llama.LlamaConfig")
    for family in CLASSES:
        one = scaled.resized(family=family)
        assert refused(check_nemo_class, one, "x") is (family != "llama")
        assert not refused(check_nemo_class, one.resized(rope_scaling=None), "x")
        assert refused(check_nemo_class, SHAPE.resized(family=family, ffn_hidden_size=(8, 8, 8, 9)), "x")


def test_the_context_is_a_graph_of_calls():
    """One process on the CPU, weights alone; every object is referred to once, by its name."""
    graph = io_json(SHAPE, "x", "tokens")
    objects, leaves = graph["objects"], {}

    def follow(node, path):
        if node["type"] == "leaf":
            leaves[path] = node["value"]
            assert node["paths"] == [path]
        elif node["type"] == "pyref":
            leaves[path] = f"{node['module']}.{node['name']}"
        else:
            there = objects[node["key"]]
            assert there["paths"] == [path]
            about = dict(objects[there["metadata"]["key"]]["items"])
            names = [name for _, name in objects[about["Attr(name='argument_names')"]["key"]]["items"]]
            assert [key for key, _ in there["items"]] == [f"Attr(name={name!r})" for name in names]
            for name, (_, inner) in zip(names, there["items"], strict=True):
                follow(inner, f"{path}.{name}")

    follow(graph["root"], "<root>")
    assert leaves.pop("<root>.trainer.accelerator") == "cpu" and leaves.pop("<root>.trainer.devices") == 1
    assert leaves.pop("<root>.trainer.strategy.ckpt_save_optimizer") is False
    assert leaves.pop("<root>.model.tokenizer.pretrained_model_name") == "tokens"
    config = {path.removeprefix("<root>.model.config."): value for path, value in leaves.items()}
    activation = config.pop("activation_func"), config.pop("params_dtype")
    assert activation == ("torch.nn.functional.silu", "torch.bfloat16") and config == config_fields(SHAPE)
    assert set(graph["refcounts"]) == set(objects) and set(graph["refcounts"].values()) == {1}
    assert list(objects) == [f"{key.rpartition('_')[0]}_{i}" for i, key in enumerate(objects, 1)]
    assert graph["version"] == "0.0.1"


def nemo2(**changed) -> dict:
    config = model_yaml(SHAPE.resized(family="mistral"), "x", None)
    return {**config, "config": {**config["config"], **changed}}


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({"window_size": [128, 0]}, True),
        ({"window_size": [127, 0]}, False),
        ({"window_size": []}, False),
        ({"window_size": ["128", 0]}, False),
        ({"window_size": 128}, False),
        ({"window_size": [32768, 0], "seq_length": None}, True),
        ({"window_size": [32767, 0], "seq_length": None}, False),
        ({"transformer_layer_spec": {"_target_": "a.b.default_layer_spec"}}, True),
        ({"transformer_layer_spec": {"_target_": "a.b.my_layer_spec"}}, False),
        ({"transformer_layer_spec": {"_target_": 3}}, False),
        ({"transformer_layer_spec": None}, True),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, False),
        ({"activation_func": None}, False),
        ({"normalization": None}, False),
        ({"share_embeddings_and_output_weights": None}, False),
        ({"scale_factor": 8.0}, False),
    ],
)
def test_fields_of_nemo_2_that_are_taken(changed, taken):
    def read():
        return shape_from_nemo(fields_of_nemo2(nemo2(**changed), "x"), 300, "float32", None)

    assert refused(read) is not taken
    if taken and changed.get("seq_length", 1) is None:
        assert read().max_position_embeddings == 32768


@pytest.mark.parametrize("read", [fields_of_nemo1, fields_of_nemo2])
@pytest.mark.parametrize(
    ("changed", "groups", "channels"),
    [
        ({"num_query_groups": None}, 8, 4),
        ({"kv_channels": None, "num_query_groups": 2}, 2, 4),
        ({"num_query_groups": None, "kv_channels": None}, 8, 4),
        ({"kv_channels": 6}, 4, 6),
        ({"num_attention_heads": 0, "kv_channels": None}, None, None),
        ({"num_attention_heads": "8", "kv_channels": None}, None, None),
        ({"hidden_size": 32.0, "kv_channels": None}, None, None),
    ],
)
def test_sizes_of_heads_follow_from_others(read, changed, groups, channels):
    config = (
        {**NEMO1, **NEMO1_OF["llama"], "kv_channels": 4, **changed} if read is fields_of_nemo1 else nemo2(**changed)
    )
    given = read(config, "x"), 300, "float32", None
    if groups is None:
        assert refused(shape_from_nemo, *given)
    else:
        found = shape_from_nemo(*given)
        assert (found.num_query_groups, found.head_dim) == (groups, channels)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_target_": "a.GemmaModel"}, r"class GemmaModel is not supported: use one of LlamaModel"),
        ({}, r"class \(none\) is not supported"),
        ({"_target_": "a.LlamaModel"}, "config is missing"),
        ({"_target_": "a.LlamaModel", "config": []}, "config is missing"),
        ({"_target_": "a.LlamaModel", "config": {}, "odd": 1}, "odd=1 is not known for LlamaModel"),
        ({"_target_": "a.LlamaModel", "config": {"odd": 1}}, "odd=1 is not known for LlamaModel"),
    ],
)
def test_configs_of_nemo_2_that_are_refused(config, says):
    with pytest.raises(UserError, match=rf"^x: .*{says}"):
        fields_of_nemo2(config, "x")


def nemo1(**changed):
    config = {**NEMO1, **NEMO1_OF["llama"], **changed}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"rotary_base": ..., "scale_positional_embedding": False}, {"rope_theta": 10000.0, "rope_scaling": None}),
        ({}, {"rope_theta": 500000.0, "rope_scaling": ROPE_SCALING, "norm_eps": 1e-5}),
        ({"rotary_percentage": ...}, {"rotary_percent": 1.0}),
        ({"layernorm_epsilon": ...}, {"norm_eps": 1e-5}),
        ({"layernorm_epsilon": 0.5}, {"norm_eps": 0.5}),
        ({"share_embeddings_and_output_weights": ...}, {"tied_embeddings": True}),
        ({"max_position_embeddings": None}, {"max_position_embeddings": 128}),
        ({"max_position_embeddings": 64}, {"max_position_embeddings": 64}),
        ({"activation": "swiglu"}, {"family": "llama"}),
        ({"qkv_bias": True}, {"family": "qwen2"}),
        ({"qkv_bias": None, "add_qkv_bias": True}, {"family": "qwen2"}),
        ({"qk_layernorm": True}, {"family": "qwen3"}),
        ({"normalization": "layernorm1p", "activation": "squared-relu"}, {"family": "nemotron"}),
        ({"normalization": "layernorm", "activation": "squared-relu"}, None),
        ({"normalization": ...}, None),
        ({"activation": ...}, None),
        ({"activation": 3}, None),
        ({"bias": ...}, None),
        ({"mcore_gpt": ...}, None),
        ({"position_embedding_type": ...}, None),
        ({"scale_positional_embedding": ...}, {"rope_scaling": None}),
    ],
)
def test_what_nemo_1_says_and_what_it_leaves_out(changed, found):
    """An ellipsis stands for a key that is not there."""

    def read():
        return shape_from_nemo(fields_of_nemo1(nemo1(**changed), "x"), 300, "float32", None)

    if found is None:
        assert refused(read)
    else:
        shape = read()
        assert {name: getattr(shape, name) for name in found} == found


@pytest.mark.parametrize(("vocab", "size"), [(None, 300), (300, 300), (1, 1), (301, None)])
def test_rows_of_the_embedding_are_tokens_as_far_as_the_user_says(vocab, size):
    fields = fields_of_nemo1(nemo1(), "x")
    if size is None:
        with pytest.raises(UserError, match="vocab_size=301: the embedding of x has 300 rows: give at most that"):
            shape_from_nemo(fields, 300, "float32", vocab)
    else:
        assert shape_from_nemo(fields, 300, "float32", vocab).vocab_size == size
    assert refused(shape_from_nemo, fields, 300, "float16", None)


# Megatron-LM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [None, ROPE_SCALING])
@pytest.mark.parametrize("family", TRAITS)
def test_every_argument_of_megatron_lm(family, scaled, tied):
    activation, _, norm, centred, bias, heads = TRAITS[family]
    shape = SHAPE.resized(
        family=family, tied_embeddings=tied, rope_scaling=scaled, dtype="float32" if tied else "bfloat16"
    )
    flags = {
        "--group-query-attention": True,
        "--use-rope-scaling": scaled,
        "--apply-layernorm-1p": centred,
        "--qk-layernorm": heads,
        "--add-qkv-bias": bias,
        "--disable-bias-linear": True,
        "--swiglu": activation == "silu",
        "--squared-relu": activation != "silu",
        "--untie-embeddings-and-output-weights": not tied,
        "--bf16": not tied,
    }
    values = {
        "--num-layers": "4",
        "--hidden-size": "32",
        "--ffn-hidden-size": "48",
        "--num-attention-heads": "8",
        "--num-query-groups": "4",
        "--kv-channels": "4",
        "--max-position-embeddings": "128",
        "--vocab-size": "300",
        "--padded-vocab-size": "1024",
        "--make-vocab-size-divisible-by": "1024",
        "--position-embedding-type": "rope",
        "--rotary-base": "10000",
        "--rotary-percent": "1.0",
        "--normalization": norm,
        "--norm-epsilon": "1e-05",
        "--attention-dropout": "0.0",
        "--hidden-dropout": "0.0",
        **({"--rope-scaling-factor": "8.0"} if scaled else {}),
    }
    found = model_arguments(shape)
    assert found == values | {name: None for name, wanted in flags.items() if wanted}
    assert words({"--a": "1", "--b": None, "--c": ""}) == ["--a", "1", "--b", "--c", ""]
    assert not refused(check_expressible, shape, "x")
    assert RopeScaling(8.0, 1.0, 4.0, 8192) == ROPE_SCALING
