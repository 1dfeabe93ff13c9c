"""Sizes of a model and what follows from them, worked out by hand: shapes, layouts, arguments of other programs, their keys."""

import math
from dataclasses import fields

import pytest

from minitron_megatron.errors import UserError
from minitron_megatron.models import limits
from minitron_megatron.models.config_keys import KeyTable, mapping, number, shown, truth, whole_number, words
from minitron_megatron.models.families import class_of_export, hf_config, shape_from_hf
from minitron_megatron.models.hf_keys import FAMILIES
from minitron_megatron.models.hf_rope import THETA
from minitron_megatron.models.limits import (
    check_fp8,
    check_layout,
    check_sequence,
    computing_dtype,
    layers_of_stages,
    pipeline_layout,
    stages_of_notation,
    tensor_sizes,
)
from minitron_megatron.models.shape import ModelShape, RopeScaling
from minitron_megatron.parallel.layout import Layout
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_hf_configs import config_of
from tests.tiny import LLAMA3

SCALED = RopeScaling(8.0, 1.0, 4.0, 8192)

# Shapes


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({"num_query_groups": 8}, True),
        ({"num_query_groups": 3}, False),
        ({"num_query_groups": 16}, False),
        ({"head_dim": 6}, True),
        ({"head_dim": 7}, False),
        ({"head_dim": 8, "rotary_percent": 0.5}, True),
        ({"head_dim": 8, "rotary_percent": 0.4}, False),
        ({"head_dim": 8, "rotary_percent": 0.1}, False),
        ({"rotary_percent": 1.5}, False),
        ({"rotary_percent": 1}, True),
        ({"family": "gpt"}, False),
        ({"dtype": "float16"}, False),
        ({"tied_embeddings": 1}, False),
        ({"rope_theta": 0}, False),
        ({"rope_theta": 0.5}, True),
        ({"rope_theta": math.inf}, False),
        ({"norm_eps": "1e-5"}, False),
        ({"norm_eps": True}, False),
        ({"ffn_hidden_size": (8, 8, 8)}, False),
        ({"ffn_hidden_size": (8, 8, 0, 8)}, False),
        ({"ffn_hidden_size": [8, 16, 8, 1]}, True),
    ],
)
def test_shapes_that_are_taken(changed, taken):
    assert refused(SMALL_SHAPE.resized, **changed) is not taken


def test_a_ramp_has_two_ends():
    for low, high, taken in ((1.0, 4.0, True), (4.0, 4.0, False), (5.0, 4.0, False), (0.0, 4.0, False)):
        assert refused(RopeScaling, 8.0, low, high, 8192) is not taken


def test_layers_of_one_size_are_uniform_however_they_are_given():
    uniform, uneven = SMALL_SHAPE.resized(ffn_hidden_size=[16] * 4), SMALL_SHAPE.resized(ffn_hidden_size=[8, 32, 16, 8])
    assert uniform.uniform and uniform.ffn_hidden_size == 16 and uniform.ffn_of_layers == (16,) * 4
    assert not uneven.uniform and uneven.ffn_of_layers == (8, 32, 16, 8)
    lengths = {"layers": 4, "hidden": 32, "kv_groups": 4, "q_heads": 2, "head_dim": 4, "vocab": 129024}
    assert uneven.lengths() == {**lengths, "ffn": 32} and uneven.lengths(2) == {**lengths, "ffn": 16}
    assert uniform.lengths(0) == uniform.lengths() == {**lengths, "ffn": 16}


@pytest.mark.parametrize(
    "changed", [{}, {"rotary_percent": 0.5}, {"rope_scaling": SCALED}, {"ffn_hidden_size": (8, 8, 8, 9)}]
)
def test_a_shape_survives_its_file(changed):
    """Older folders' digests do not know of the rotated share: where it is whole it is not written."""
    shape = SMALL_SHAPE.resized(**changed)
    values = shape.to_dict()
    assert ("rotary_percent" in values) is ("rotary_percent" in changed)
    assert ModelShape.from_dict(values, "x") == ModelShape.from_dict(
        {**values, "rotary_percent": values.get("rotary_percent")}, "x"
    )
    assert ModelShape.from_dict(values, "x") == shape
    assert set(values) | {"rotary_percent"} == {field.name for field in fields(ModelShape)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"b": 1, "a": 2}, "x: unknown a, b in the model's shape"),
        ({"dtype": None, "family": None}, "x: missing dtype, family in the model's shape"),
        ({"b": 1, "dtype": None}, "x: unknown b in the model's shape"),
        ({"rope_scaling": {"factor": 8.0}}, "x: rope_scaling is malformed"),
        ({"rope_scaling": 3}, "x: rope_scaling is malformed"),
        ({"head_dim": 7}, "x: head_dim=7 is odd"),
    ],
)
def test_what_is_no_shape_is_said_by_its_source(changed, says):
    with pytest.raises(UserError, match=f"^{says}"):
        ModelShape.from_dict({**SMALL_SHAPE.to_dict(), **changed}, "x")


# Layouts


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [
        ({}, [1, 2, 4]),
        ({"ffn_hidden_size": 6}, [1, 2]),
        ({"ffn_hidden_size": (48, 46, 48, 48)}, [1, 2]),
        ({"num_attention_heads": 128, "num_query_groups": 128, "ffn_hidden_size": 256}, [1, 2, 4, 8, 16, 32, 64]),
        ({"num_attention_heads": 64, "num_query_groups": 64, "ffn_hidden_size": 192}, [1, 2, 4, 8, 16, 32, 64]),
        ({"num_attention_heads": 7, "num_query_groups": 7}, [1]),
    ],
)
def test_tensor_parallel_sizes_divide_everything_that_is_sharded(changed, sizes):
    """Up to 64."""
    assert tensor_sizes(SMALL_SHAPE.resized(**changed)) == sizes


@pytest.mark.parametrize(
    ("layout", "resizing", "says"),
    [
        ({"tensor": 8}, None, "parallel.tensor=8 does not divide num_query_groups=4 of the model: use one of 1, 2, 4"),
        (
            {"tensor": 3},
            "target",
            "parallel.tensor=3 does not divide num_query_groups=4 of the model: use one of 1, 2, 4, or "
            "target.num_query_groups=6",
        ),
        (
            {"pipeline": 5},
            None,
            "parallel.pipeline=5 is more than num_layers=4 of the model: every stage needs a layer",
        ),
        (
            {"pipeline": 3, "virtual_pipeline": 2},
            None,
            "parallel.pipeline × parallel.virtual_pipeline=6 is more than num_layers=4 of the model: every stage needs a layer",
        ),
    ],
)
def test_sizes_that_a_layout_does_not_divide(layout, resizing, says):
    size = math.prod(layout.get(name, 1) for name in ("tensor", "pipeline"))
    with pytest.raises(UserError) as error:
        check_layout(SMALL_SHAPE, Layout(**layout, world_size=size), resizing=resizing)
    assert str(error.value) == says
    with pytest.raises(UserError, match=r"use 1$"):
        check_layout(SMALL_SHAPE.resized(num_query_groups=1), Layout(tensor=2, world_size=2))


@pytest.mark.parametrize(
    ("layers", "stages", "embedding", "loss", "found"),
    [
        (5, 2, False, False, [3, 2]),
        (4, 4, False, False, [1, 1, 1, 1]),
        (5, 3, True, False, [1, 2, 2]),
        (5, 3, False, True, [2, 2, 1]),
        (7, 3, True, True, [2, 3, 2]),
        (3, 3, True, True, [1, 2, 0]),
    ],
)
def test_layers_go_to_stages_with_the_ends_as_layers(layers, stages, embedding, loss, found):
    layout = Layout(pipeline=stages, world_size=stages, account_for_embedding=embedding, account_for_loss=loss)
    assert layers_of_stages(layers, layout) == found
    wanted = [["decoder"] * count for count in found]
    wanted[0], wanted[-1] = ["embedding", *wanted[0]], [*wanted[-1], "loss"]
    assert pipeline_layout(layers, layout) == (None if len(set(found)) == 1 else wanted)
    assert refused(check_layout, SMALL_SHAPE.resized(num_layers=layers), layout) is (min(found) < 1)


@pytest.mark.parametrize(
    ("notation", "found"),
    [
        ("Et|tL", [["embedding", "decoder"], ["decoder", "loss"]]),
        ("E,(t|)*2,L", [["embedding", "decoder"], ["decoder"], ["loss"]]),
        ("t*0m", [["mtp"]]),
        ("E||L", [["embedding"], [], ["loss"]]),
        ("Ex", None),
        ("t*000000003", [["decoder"] * 3]),
        ("t*0000000003", None),
        ("t*999999999", None),
        ("(tt)*3000000", None),
        ("t*1,t*2000000,t*3000000", None),
    ],
)
def test_notations_are_written_out_where_they_have_an_end(notation, found):
    """Nine digits, and four million signs."""
    assert stages_of_notation(notation) == found


@pytest.mark.parametrize(("notation", "length"), [("t*10", 14), ("t*5,t*5", 16), ("(tt)*5", 16)])
def test_a_notation_of_the_largest_length_is_taken(monkeypatch, notation, length):
    """What stands there and what it stands for, counted before it is written out."""
    monkeypatch.setattr(limits, "_LONGEST_NOTATION", length)
    assert stages_of_notation(notation) == [["decoder"] * 10]
    monkeypatch.setattr(limits, "_LONGEST_NOTATION", length - 1)
    assert stages_of_notation(notation) is None


@pytest.mark.parametrize(("length", "says"), [(33, 32), (34, 32), (3, 4), (30, 28)])
def test_the_length_that_fits_is_named(length, says):
    layout = Layout(tensor=4, sequence=True, world_size=4)
    with pytest.raises(UserError, match=rf"of the 4 parts .* use data\.sequence_length={says}$"):
        check_sequence(length, layout)
    check_sequence(says, layout)


def test_dtypes_by_precision():
    for stored in ("float32", "bfloat16"):
        shape = SMALL_SHAPE.resized(dtype=stored)
        assert [computing_dtype(shape, how) for how in ("bf16", "fp32", "auto")] == ["bfloat16", "float32", stored]


FP8_SHAPE = SMALL_SHAPE.resized(
    hidden_size=256, ffn_hidden_size=512, head_dim=64, num_attention_heads=8, num_query_groups=4
)


@pytest.mark.parametrize(
    ("changed", "layout", "tokens", "says"),
    [
        ({}, {}, 256, None),
        ({"hidden_size": 264}, {}, 256, "hidden_size is 264"),
        ({"ffn_hidden_size": 520}, {}, 256, "ffn_hidden_size=520 / tensor is 520"),
        ({"ffn_hidden_size": (512, 520, 512, 512)}, {}, 256, "ffn_hidden_size=520 / tensor is 520"),
        ({"ffn_hidden_size": 32}, {"tensor": 4}, 256, "ffn_hidden_size=32 / tensor is 8"),
        ({"head_dim": 2, "num_attention_heads": 4}, {}, 256, "num_attention_heads × head_dim / tensor is 8"),
        ({"head_dim": 2}, {"tensor": 2}, 256, "num_attention_heads × head_dim / tensor is 8"),
        ({"head_dim": 2, "num_query_groups": 2}, {}, 256, "query, key and value channels / tensor is 24"),
        ({}, {}, 24, "tokens of a micro-batch on a rank is 24"),
        ({}, {"tensor": 2}, 16, None),
        ({}, {"tensor": 2, "sequence": True}, 16, "tokens of a micro-batch on a rank is 8"),
    ],
)
def test_products_in_fp8_are_of_multiples_of_sixteen(changed, layout, tokens, says):
    """Of what a rank has; of 128 where blocks are scaled."""
    given = FP8_SHAPE.resized(**changed), Layout(**layout, world_size=layout.get("tensor", 1))
    if says is None:
        check_fp8("o", "tensorwise", *given, tokens)
    else:
        with pytest.raises(UserError) as error:
            check_fp8("o", "tensorwise", *given, tokens)
        assert str(error.value) == f"o=tensorwise needs multiples of 16: {says}"


@pytest.mark.parametrize("tokens", [128, 192])
def test_blocks_in_fp8_are_of_128(tokens):
    assert refused(check_fp8, "o", "blockwise", FP8_SHAPE, Layout(), tokens) is (tokens == 192)
    assert not refused(check_fp8, "o", "delayed", FP8_SHAPE, Layout(), tokens)
    assert refused(check_fp8, "o", "delayed", FP8_SHAPE, Layout(), tokens, 1)
    assert not refused(check_fp8, "o", "none", FP8_SHAPE, Layout(), 1) and refused(
        check_fp8, "o", "none", FP8_SHAPE, Layout(), 1, 1
    )


# Keys of configs


@pytest.mark.parametrize(
    ("value", "says"),
    [("x" * 99, "'" + "x" * 59), (1.5, "1.5"), (None, "None"), ([1], "a list"), ({}, "a mapping"), ((1,), "a tuple")],
)
def test_a_value_in_an_error_is_a_few_words(value, says):
    assert shown(value) == says


TABLE = KeyTable(
    frozenset({"size"}),
    {"act": ("a", "b"), "off": (False,)},
    frozenset({"note"}),
    ("_id",),
    ("my_",),
    {"bad": "it is bad"},
)


@pytest.mark.parametrize(
    ("config", "ignored", "says"),
    [
        ({"size": 1, "act": "b", "note": 1, "x_id": 1, "my_x": 1, "none": None, "off": None}, [], None),
        ({"odd": 1}, ["odd"], None),
        ({"act": "c"}, [], "w: act='c' is not supported for M (only 'a' or 'b')"),
        ({"act": None}, [], "w: act=None is not supported for M (only 'a' or 'b')"),
        ({"off": True}, [], "w: off=True is not supported for M (only False)"),
        ({"size": 1}, ["size"], "ignore_keys=size: the key is known, and has its own rules (w): leave it out"),
        ({}, ["odd"], "ignore_keys=odd: the key is not in it (w): leave it out"),
        ({"odd": 1, "bad": 2}, [], "w: bad=2 is not supported: it is bad"),
        (dict.fromkeys("abcd", 1), [], "w: a=1, b=1, c=1, d=1 are not known for M, and may"),
        (dict.fromkeys("abcde", 1), ["a"], "w: b=1, c=1, d=1, e=1 are not known for M, and may"),
        (dict.fromkeys("abcdef", 1), [], "w: a=1, b=1, c=1, d=1 and 2 more are not known for M, and may"),
        ({"a": 1}, [], "w: a=1 is not known for M, and may"),
    ],
)
def test_each_key_is_known_ignored_or_refused(config, ignored, says):
    if says is None:
        TABLE.check(config, "w", "M", ignored)
    else:
        with pytest.raises(UserError) as error:
            TABLE.check(config, "w", "M", ignored)
        assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (lambda c, k, w: whole_number(c, k, w, 5), [1, 5], [0, 6, True, 1.0, "1", None, ...]),
        (number, [1, 0.5, 1e300], [0, -1, 2e300, True, "1", None, ..., math.nan]),
        (truth, [True, False, None, ...], [0, "true", []]),
        (words, [["a"], [], None, ...], ["a", [1], ["a", 1], ("a",)]),
        (mapping, [{"a": 1}, {}, None, ...], [[], "a", 1]),
    ],
)
def test_values_are_of_their_kinds(read, good, bad):
    """An ellipsis stands for a key that is not there."""

    def config(value):
        return {} if value is ... else {"k": value}

    empty = {truth: False, words: [], mapping: {}}
    for value in good:
        found = read(config(value), "k", "w")
        assert found == (empty[read] if value in (None, ...) else value)
    for value in bad:
        with pytest.raises(UserError, match=r"^w: k"):
            read(config(value), "k", "w")


# What each family must not be asked for: the values of another model
OTHERS = {
    "quantization_config": {"bits": 4},
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
    "is_causal": False,
    "rope_interleaved": True,
    "use_mrope": True,
    "use_sliding_window": True,
    "alibi": True,
    "hidden_act": "gelu",
    "mlp_bias": True,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_computes_is_held_by_its_keys(name):
    for key, value in OTHERS.items():
        assert refused(shape_from_hf, config_of(name, **{key: value}), "x"), key
    biases = {True: name == "qwen2", False: name != "qwen2", None: True}
    for value, taken in biases.items():
        assert refused(shape_from_hf, config_of(name, attention_bias=value), "x") is not taken, value
    for value, taken in ((None, True), (4096, name.startswith("qwen"))):
        assert refused(shape_from_hf, config_of(name, sliding_window=value), "x") is not taken, value
    for value in (True, False):
        assert refused(shape_from_hf, config_of(name, qkv_bias=value), "x") is not (value and name == "qwen2")
    written = hf_config(shape_from_hf(config_of(name), "x"), {})
    fixed = {key: values[0] for key, values in FAMILIES[name].fixed.items()}
    assert {key: written[key] for key in fixed} == fixed and ("partial_rotary_factor" in written) is (
        name == "nemotron"
    )


LEFT_OUT = {
    "llama": (8, 8, 1e-6),
    "mistral": (8, 8, 1e-6),
    "qwen2": (32, 4, 1e-6),
    "qwen3": (32, 128, 1e-6),
    "nemotron": (32, 4, 1e-5),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_leaves_out_is_what_its_class_takes(name):
    heads = 8 if name in ("llama", "mistral") else 32
    sizes = {"num_attention_heads": heads, "hidden_size": 4 * heads if heads == 32 else 64}
    config = config_of(name, **sizes)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "torch_dtype", FAMILIES[name].norm_eps):
        del config[key]
    found = shape_from_hf(config, "x")
    assert (found.num_query_groups, found.head_dim, found.norm_eps) == LEFT_OUT[name]
    assert (found.rope_theta, found.dtype) == (THETA, "float32")
    assert found.rotary_percent == (0.5 if name == "nemotron" else 1.0)
    if name == "mistral":
        del config["sliding_window"]
        assert refused(shape_from_hf, config, "x")


@pytest.mark.parametrize(
    ("rope", "taken"),
    [
        ({"rope_type": "default", "factor": 1}, True),
        ({"rope_type": "default", "factor": 1.0}, True),
        ({"rope_type": "default", "factor": 2}, False),
        ({"rope_type": "default", "beta_fast": 1}, False),
        ({"rope_type": "default", "beta_fast": None}, True),
        ({"rope_type": "default", "low_freq_factor": 1.0}, False),
        ({"rope_type": "default", "original_max_position_embeddings": 5}, True),
        ({"rope_type": "default", "partial_rotary_factor": 1.0}, True),
        ({"rope_type": "default", "inside": {"rope_type": "default"}}, False),
    ],
)
def test_what_a_rope_says_beside_its_kind(rope, taken):
    assert refused(shape_from_hf, config_of(rope_scaling=rope), "x") is not taken


def test_a_scaled_rope_was_trained_with_the_models_length_where_it_says_none():
    rope = {
        name: value for name, value in LLAMA3.items() if name not in ("original_max_position_embeddings", "rope_theta")
    }
    assert shape_from_hf(config_of(rope_scaling=rope), "x").rope_scaling == RopeScaling(4.0, 1.0, 2.0, 128)
    length = {"original_max_position_embeddings": 7}
    for config in (config_of(rope_scaling=rope | length), config_of(rope_scaling=rope, **length)):
        assert shape_from_hf(config, "x").rope_scaling.original_max_position_embeddings == 7
    for name in ("rope_percent", "rotary_pct"):
        assert shape_from_hf(config_of("nemotron", **{name: 0.25}), "x").rotary_percent == 0.25
        assert refused(shape_from_hf, config_of(**{name: 0.25}), "x")


@pytest.mark.parametrize(("hidden", "exported"), [(32, "LlamaForCausalLM"), (36, "MistralForCausalLM")])
def test_only_a_llama_of_odd_heads_is_exported_as_another_class(hidden, exported):
    assert class_of_export(SMALL_SHAPE.resized(hidden_size=hidden)).architecture == exported
    for family in ("qwen3", "nemotron"):
        assert class_of_export(SMALL_SHAPE.resized(hidden_size=hidden, family=family)) is FAMILIES[family]


def test_an_export_keeps_what_is_known_and_says_what_is_not(caplog):
    shape = shape_from_hf(config_of(), "x")
    source = config_of(
        bos_token_id=3, _name_or_path="n", odd=1, none=None, tie_word_embeddings=True, initializer_range=0.5
    )
    written = hf_config(shape, source)
    assert (
        written["bos_token_id"] == 3
        and written["initializer_range"] == 0.5
        and not {"_name_or_path", "odd", "none"} & set(written)
    )
    assert caplog.messages == ["config.json: odd left out: not known for LlamaForCausalLM"]
    assert written["tie_word_embeddings"] is False and written["rope_scaling"] is None
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    scaled = hf_config(shape.resized(rope_scaling=SCALED), {})
    assert (
        scaled["rope_parameters"] == scaled["rope_scaling"] | {"rope_theta": 10000.0}
        and scaled["rope_scaling"]["factor"] == 8.0
    )
