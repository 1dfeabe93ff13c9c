"""The axis table: index maps, counting, and that pruning and sharding are one act on it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.models.axes import (
    AXES,
    TENSOR_PARALLEL_AXES,
    TRAITS,
    Dim,
    Place,
    Selection,
    axis_table,
    cached_values,
    count_parameters,
    distinct_slots,
    extra_state_keys,
    flops_per_token,
    output_slot,
    slots,
    tensor_parallel_keep,
)
from minitron_megatron.models.shape import ModelShape

QKV = "kv_groups * (q: q_heads * head_dim + k: head_dim + v: head_dim)"
DIMS = ["hidden", "gate: ffn + up: ffn", QKV, "kv_groups * q_heads * head_dim", "vocab"]
lengths = st.fixed_dictionaries({axis: st.integers(1, 5) for axis in AXES})


def shape(**sizes) -> ModelShape:
    base = {
        "family": "llama",
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "norm_eps": 1e-5,
        "tied_embeddings": False,
        "dtype": "bfloat16",
    }
    return ModelShape(**{**base, **sizes})


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({}, 8.03e9),
        ({"hidden_size": 3072, "ffn_hidden_size": 9216}, 4.51e9),
        ({"num_layers": 16}, 4.54e9),
        ({"num_layers": 40, "hidden_size": 5120, "vocab_size": 131072}, 12.2e9),
        ({"num_layers": 40, "ffn_hidden_size": 11520, "vocab_size": 131072}, 8.4e9),
    ],
)
def test_parameter_counts_are_the_published_ones(sizes, published):
    assert count_parameters(shape(**sizes)) == pytest.approx(published, rel=5e-3)


def test_qkv_interleaves_by_group():
    dim = Dim.parse(QKV)
    sizes = {"kv_groups": 2, "q_heads": 2, "head_dim": 2}
    assert dim.size(sizes) == 16
    assert dim.indices(sizes, {}, "q").tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert dim.indices(sizes, {}, "k").tolist() == [4, 5, 12, 13]
    assert dim.indices(sizes, {"kv_groups": np.array([1])}).tolist() == list(range(8, 16))
    each_its_own = {"q_heads": np.array([[0], [3]])}
    assert dim.indices(sizes, each_its_own).tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]


@given(st.sampled_from(DIMS), lengths)
def test_keeping_everything_is_the_identity(text, sizes):
    dim = Dim.parse(text)
    assert dim.indices(sizes, {}).tolist() == list(range(dim.size(sizes)))


@given(st.sampled_from(DIMS), lengths)
def test_parts_cover_the_dimension_once(text, sizes):
    dim = Dim.parse(text)
    found = np.concatenate([dim.indices(sizes, {}, part.name) for part in dim.parts])
    assert sorted(found.tolist()) == list(range(dim.size(sizes)))


@given(st.sampled_from(DIMS), lengths, st.integers(1, 4))
def test_shards_cover_the_dimension_once(text, sizes, ranks):
    dim = Dim.parse(text)
    axis = next((a for a in TENSOR_PARALLEL_AXES if a in dim.axes), None)
    if axis is None:
        return
    sizes = {**sizes, axis: sizes[axis] * ranks}
    per_rank = np.split(np.arange(sizes[axis]), ranks)
    shards = [dim.indices(sizes, {axis: mine}) for mine in per_rank]
    assert len({len(s) for s in shards}) == 1
    assert sorted(np.concatenate(shards).tolist()) == list(range(dim.size(sizes)))


@given(st.sampled_from(DIMS), lengths, st.data())
def test_pruning_leaves_the_length_of_the_pruned_shape(text, sizes, data):
    dim = Dim.parse(text)
    keep = {
        axis: np.array(sorted(data.draw(st.sets(st.integers(0, sizes[axis] - 1), min_size=1))))
        for axis in dim.axes
        if data.draw(st.booleans())
    }
    left = {**sizes, **{axis: len(kept) for axis, kept in keep.items()}}
    found = dim.indices(sizes, keep)
    assert len(found) == dim.size(left)
    assert (np.diff(found) > 0).all()


@given(lengths, st.data())
def test_pruning_composes(sizes, data):
    """Cutting twice is cutting once by the composed indices."""
    dim = Dim.parse("gate: ffn + up: ffn")
    first = np.array(sorted(data.draw(st.sets(st.integers(0, sizes["ffn"] - 1), min_size=1))))
    second = np.array(sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1))))
    twice = dim.indices(sizes, {"ffn": first})[dim.indices({**sizes, "ffn": len(first)}, {"ffn": second})]
    assert twice.tolist() == dim.indices(sizes, {"ffn": first[second]}).tolist()


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="experts"):
        Dim.parse("experts * ffn")


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_has_one_key_and_one_hugging_face_name(tied):
    model = shape(tied_embeddings=tied, num_layers=3)
    everything = list(slots(model))
    names = [name for slot in everything for name in slot.hf_names().values()]
    assert len(names) == len(set(names)) == 3 * 9 + (2 if tied else 3)
    assert ("lm_head.weight" in names) is not tied
    keys = [slot.key(model) for slot in everything]
    assert len(set(keys)) == len(axis_table(model))
    uneven = shape(tied_embeddings=tied, num_layers=3, ffn_hidden_size=(8, 8, 16))
    assert len({slot.key(uneven) for slot in slots(uneven)}) == len(everything)


def test_flops_are_twice_the_matrix_parameters_and_attention():
    model = shape()
    matrices = count_parameters(model) - model.vocab_size * 4096 - 65 * 4096
    padding = (model.padded_vocab_size - model.vocab_size) * 4096
    attention = 2 * 32 * 32 * 128 * 8192
    assert flops_per_token(model, 8192) == 2 * (matrices + padding) + attention
    # A head is a product, whosever matrix it is.
    assert flops_per_token(shape(tied_embeddings=True), 8192) == flops_per_token(model, 8192)


# Selections, by hand

HALVES = Selection(np.array([[0], [1]]), np.array([[0.5], [0.5]]))


@pytest.mark.parametrize(
    ("text", "keep", "part", "sources", "weights"),
    [
        # Two groups averaged: each row of the new one is half of a row of either.
        ("kv_groups * q_heads", {"kv_groups": HALVES}, None, [[0, 1], [2, 3]], [[0.5, 0.5]] * 2),
        (QKV, {"kv_groups": HALVES}, "q", [[0, 1], [4, 5]], [[0.5, 0.5]] * 2),
        (QKV, {"kv_groups": HALVES}, "k", [[2], [6]], [[0.5]] * 2),
        (QKV, {"kv_groups": HALVES}, None, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0.5] * 4] * 2),
        # A head of each group that takes another one in; keys and values stay as they are, in a first term alone.
        (
            QKV,
            {"q_heads": Selection(np.array([[[0], [3]], [[1], [2]]]), np.array([[[2.0], [3.0]], [[-1.0], [-2.0]]]))},
            None,
            [[0, 2, 3, 5, 6, 7], [1, 0, 0, 4, 0, 0]],
            [[2, 1, 1, 3, 1, 1], [-1, 0, 0, -2, 0, 0]],
        ),
        ("kv_groups * q_heads", {"q_heads": np.array([[1], [2]])}, None, [[1, 2]], [[1, 1]]),
        ("vocab", {"vocab": Selection(np.array([[2, 0]]), np.array([[1.0, 0.0]]))}, None, [[2, 0]], [[1, 0]]),
        ("ffn", {"hidden": np.array([0])}, None, [[0, 1, 2]], [[1, 1, 1]]),
        ("gate: ffn + up: ffn", {"ffn": np.array([0, 2])}, None, [[0, 2, 3, 5]], [[1] * 4]),
        ("gate: ffn + up: ffn", {"ffn": np.array([2])}, "up", [[5]], [[1]]),
    ],
)
def test_what_a_selection_makes_of_a_dimension(text, keep, part, sources, weights):
    sizes = {"kv_groups": 2, "q_heads": 2, "head_dim": 1, "ffn": 3, "vocab": 3, "hidden": 2}
    found = Dim.parse(text).select(sizes, keep, part)
    assert found.sources.tolist() == sources and found.weights.tolist() == weights
    assert found.plain is (len(sources) == 1 and all(weight == 1 for weight in weights[0]))
    assert found.unmerged.sources.tolist() == sources[:1] and found.unmerged.plain
    some = found.part(np.array([0]))
    assert (some.sources.tolist(), some.weights.tolist()) == ([[s[0]] for s in sources], [[w[0]] for w in weights])
    assert Selection.of(found) is found


def small(**sizes) -> ModelShape:
    given = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 6, "num_attention_heads": 4, "num_query_groups": 2}
    return shape(**given | {"head_dim": 2, "vocab_size": 1000} | sizes)


def rows_of(model: ModelShape) -> dict:
    return {row.name: row for row in axis_table(model)}


def test_merges_act_where_heads_are_made_and_inputs_follow_the_heads_that_stay():
    model, rows = small(), rows_of(small())
    keep = {"kv_groups": HALVES, "hidden": np.array([1, 3])}
    made, taken = rows["qkv"].select(model, keep)
    assert made.sources.shape == (2, 8) and made.weights.tolist() == [[0.5] * 8] * 2
    assert taken.sources.tolist() == [[1, 3]]
    rest, followed = rows["attention_output"].select(model, keep)
    assert rest.sources.tolist() == [[1, 3]] and followed.plain and followed.sources.tolist() == [[0, 1, 2, 3]]
    assert rows["fc2"].select(model, {"ffn": np.array([2])})[0] is None
    assert [None if found is None else found.tolist() for found in rows["fc2"].indices(model, {"ffn": [2]})] == [
        None,
        [2],
    ]
    uneven = small(ffn_hidden_size=(6, 4))
    assert rows["fc2"].indices(uneven, {"ffn": np.array([3])}, 1)[1].tolist() == [3]


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_a_rank_holds_a_range_of_every_axis_that_is_sharded(rank, size):
    found = tensor_parallel_keep(small(), rank, size)
    lengths = {"vocab": 1024, "kv_groups": 2, "ffn": 6}
    assert {axis: kept.tolist() for axis, kept in found.items()} == {
        axis: [*range(rank * n // size, (rank + 1) * n // size)] for axis, n in lengths.items()
    }
    assert len(tensor_parallel_keep(small(ffn_hidden_size=(6, 4)), rank, size, 1)["ffn"]) == 4 // size
    sharded = {row.name: row.tensor_parallel_axis for row in axis_table(small())}
    assert sharded == {
        **dict.fromkeys(("attention_norm", "mlp_norm", "final_norm")),
        **dict.fromkeys(("embedding", "output"), "vocab"),
        **dict.fromkeys(("qkv", "attention_output"), "kv_groups"),
        **dict.fromkeys(("fc1", "fc2"), "ffn"),
    }


# The table


@pytest.mark.parametrize("family", TRAITS)
def test_every_parameter_has_its_names_by_engine(family):
    """Transformer Engine holds norms in the linears after them; layers count inside a chunk."""
    rows = rows_of(small(family=family, tied_embeddings=True))
    layer = "decoder.layers.3."
    for row in rows.values():
        paths = [path.format(layer=3) for path in (row.path, row.te_path, row.tied_path) if path]
        assert len(paths) == len(set(paths)) and all(row.parameter({path: path}, 3) == path for path in paths)
        assert row.parameter({"other": 1}, 3) is None
        assert (row.place is Place.LAYER) is row.stacked is ("{layer}" in row.path)
        gain = "norm" in row.name and not row.name.endswith("bias")
        assert row.mean == (1.0 if gain and family != "nemotron" else 0.0)
    te = {name: row.te_path.format(layer=3) for name, row in rows.items() if row.te_path}
    weights = {
        "attention_norm": f"{layer}self_attention.linear_qkv.layer_norm_weight",
        "mlp_norm": f"{layer}mlp.linear_fc1.layer_norm_weight",
    }
    biases = {f"{name}_bias": path.replace("weight", "bias") for name, path in weights.items()}
    assert te == weights | (biases if family == "nemotron" else {})
    more = {"qwen2": {"qkv_bias"}, "qwen3": {"q_norm", "k_norm"}}.get(family, set())
    if family == "nemotron":
        more = {"attention_norm_bias", "mlp_norm_bias", "final_norm_bias"}
    plain = {"embedding", "attention_norm", "qkv", "attention_output", "mlp_norm", "fc1", "fc2", "final_norm"}
    assert set(rows) == plain | more and rows["embedding"].tied_path == "output_layer.weight"
    assert rows_of(small(family=family))["embedding"].tied_path is None


def test_slots_have_keys_and_places_of_their_own():
    stacked, apart = small(), small(ffn_hidden_size=(6, 4))
    order = [(slot.row.name, slot.layer) for slot in slots(stacked)]
    block = ["attention_norm", "qkv", "attention_output", "mlp_norm", "fc1", "fc2"]
    assert order == [
        ("embedding", None), *((name, n) for n in (0, 1) for name in block), ("final_norm", None), ("output", None)
    ]  # fmt: skip
    by_place = {(slot.row.name, slot.layer): slot for slot in slots(stacked)}
    fc2, last = by_place["fc2", 1], by_place["final_norm", None]
    assert (fc2.key(stacked), fc2.lead(stacked), fc2.stored_shape(stacked)) == (
        "decoder.layers.mlp.linear_fc2.weight", (1,), (2, 8, 6)
    )  # fmt: skip
    assert (fc2.key(apart), fc2.lead(apart), fc2.stored_shape(apart)) == (
        "decoder.layers.1.mlp.linear_fc2.weight", (), (8, 4)
    )  # fmt: skip
    assert by_place["mlp_norm", 1].numbered_key() == "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    for model in (stacked, apart):
        assert (last.key(model), last.lead(model), last.stored_shape(model)) == (
            "decoder.final_layernorm.weight",
            (),
            (8,),
        )
    assert (
        output_slot(stacked).row.name == "output" and output_slot(small(tied_embeddings=True)).row.name == "embedding"
    )
    for model in (stacked, apart, small(tied_embeddings=True)):
        counted = list(distinct_slots(model))
        assert sum(count for _, count in counted) == len(list(slots(model)))
        sizes = sum(np.prod(slot.shape(model)) * count for slot, count in counted)
        assert sizes == sum(np.prod(slot.shape(model)) for slot in slots(model))


LAYER = 8 + 16 * 8 + 8 * 8 + 8 + 2 * 6 * 8 + 6 * 8


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_with_and_without_the_vocabulary_and_of_many_shapes_at_once(tied):
    model = small(tied_embeddings=tied)
    ends = 1000 * 8 * (1 if tied else 2)
    assert count_parameters(model) == 2 * LAYER + ends + 8
    assert count_parameters(model, embedding=False) == 2 * LAYER + 8
    assert count_parameters(small(tied_embeddings=tied, ffn_hidden_size=(6, 4))) == 2 * LAYER - 3 * 2 * 8 + ends + 8
    layers, ffn = np.array([1, 2, 5]), np.array([6, 3, 4])
    shapes = [model.resized(num_layers=int(n), ffn_hidden_size=int(f)) for n, f in zip(layers, ffn, strict=True)]
    sizes = {"layers": layers, "ffn": ffn}
    assert count_parameters(model, sizes=sizes).tolist() == [count_parameters(one) for one in shapes]
    assert flops_per_token(model, 7, sizes).tolist() == [flops_per_token(one, 7) for one in shapes]
    assert cached_values(model, sizes).tolist() == [cached_values(one) for one in shapes] == [8, 16, 40]
    matrices = 2 * (LAYER - 16) + 1024 * 8
    assert flops_per_token(model, 7) == 2 * matrices + 2 * 7 * 2 * 8


def test_extra_state_is_of_these_modules():
    block = "decoder.layers."
    attention = [f"{block}self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj")]
    norms = [f"{block}self_attention.{part}_layernorm" for part in "qk"]
    wanted = {
        f"{name}._extra_state": True
        for name in (*attention, *norms, f"{block}mlp.linear_fc1", f"{block}mlp.linear_fc2")
    }
    assert extra_state_keys(small()) == wanted | {"decoder.final_layernorm._extra_state": False}
    with pytest.raises(ValueError, match="several sizes"):
        extra_state_keys(small(ffn_hidden_size=(6, 4)))
