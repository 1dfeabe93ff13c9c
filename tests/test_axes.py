"""The axis table: index maps, counting, and that pruning and sharding are one act on it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.models.axes import AXES, TENSOR_PARALLEL_AXES, Dim, axis_table, count_parameters, slots
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
    from minitron_megatron.models.axes import flops_per_token

    model = shape()
    matrices = count_parameters(model) - model.vocab_size * 4096 - 65 * 4096
    padding = (model.padded_vocab_size - model.vocab_size) * 4096
    attention = 2 * 32 * 32 * 128 * 8192
    assert flops_per_token(model, 8192) == 2 * (matrices + padding) + attention
