"""Weights in chunks: where each lies, what is read of it at once, and what a live model takes from a checkpoint."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import get_crc32_options

from minitron_megatron.checkpoints import random_model, reading, weights
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.index import Index, Piece, StoredTensor
from minitron_megatron.checkpoints.random_model import fill_at_random, make_random_model
from minitron_megatron.checkpoints.reading import WeightReader, as_bits, read_metadata, safe_reading
from minitron_megatron.checkpoints.weights import (
    chunks,
    load_weights,
    rounding_error,
    sharded_weights,
    without_crc32,
    write_weights,
)
from minitron_megatron.config import ModelConfig, RandomModelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, slots
from tests.test_bounds import SMALL_SHAPE
from tests.test_checkpoints import random_sizes

SHAPE = SMALL_SHAPE.resized(num_layers=2, vocab_size=1030)
UNEVEN = SHAPE.resized(ffn_hidden_size=(48, 24))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model, and the same shape with layers of several sizes."""
    made = []
    for sizes in ({}, {"ffn_hidden_size": [8, 16, 24]}):
        path = tmp_path_factory.mktemp("random") / "m"
        make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes() | sizes), output=str(path)))
        made.append(open_model_folder(path))
    return made


# Chunks


def test_chunks_are_blocks_of_rows_at_their_place(monkeypatch):
    """In the order of the data; of stacked layers each has its place among them, of others a key of its own."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 900 * 32 * 2)
    found = list(chunks(SHAPE))
    embedding = [(c.key, c.start, c.stop, c.offsets, c.sizes, c.whole) for c in found[:3]]
    key = "embedding.word_embeddings.weight"
    assert embedding == [
        (key, 0, 900, (0, 0), (900, 32), (2048, 32)),
        (key, 900, 1800, (900, 0), (900, 32), (2048, 32)),
        (key, 1800, 2048, (1800, 0), (248, 32), (2048, 32)),
    ]
    assert len(found) == 2 * 3 + 2 * 6 + 1 and found[-1].key == "output_layer.weight"
    second = next(c for c in found if c.slot.row.name == "fc2" and c.slot.layer == 1)
    assert (second.key, second.lead, second.whole) == ("decoder.layers.mlp.linear_fc2.weight", (1,), (2, 32, 48))
    assert (second.offsets, second.sizes, second.shape) == ((1, 0, 0), (1, 32, 48), (32, 48))
    (uneven,) = [c for c in chunks(UNEVEN) if c.slot.row.name == "fc2" and c.slot.layer == 1]
    assert (uneven.key, uneven.lead, uneven.whole) == ("decoder.layers.1.mlp.linear_fc2.weight", (), (32, 24))
    plain = [c for c in chunks(SHAPE, "module.", padded=False) if "vocab" in c.slot.row.axes]
    assert [(c.start, c.stop, c.whole) for c in plain] == [(0, 900, (1030, 32)), (900, 1030, (1030, 32))] * 2
    assert {c.key.split(".")[0] for c in chunks(SHAPE, "module.")} == {"module"}
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1)
    assert {c.stop - c.start for c in chunks(SHAPE)} == {1}


@pytest.mark.parametrize(
    ("row", "place", "name"),
    [
        ("qkv", 0, "model.layers.1.self_attn.q_proj.weight, row 0,"),
        ("qkv", 8, "model.layers.1.self_attn.k_proj.weight, row 0,"),
        ("qkv", 15, "model.layers.1.self_attn.v_proj.weight, row 3,"),
        ("qkv", 16, "model.layers.1.self_attn.q_proj.weight, row 8,"),
        ("qkv", 63, "model.layers.1.self_attn.v_proj.weight, row 15,"),
        ("fc1", 48, "model.layers.1.mlp.up_proj.weight, row 0,"),
        ("embedding", 1029, "model.embed_tokens.weight, row 1029,"),
        ("embedding", 1030, "embedding.word_embeddings.weight, row 1030,"),
        ("embedding", 2047, "embedding.word_embeddings.weight, row 2047,"),
    ],
)
def test_a_row_is_named_as_users_know_it(row, place, name):
    """What is no token's has the checkpoint's name."""
    slot = next(s for s in slots(SHAPE) if s.row.name == row and s.layer in (None, 1))
    assert weights._name_of_row(slot, SHAPE, place) == name


def test_random_values_are_seeded_by_seed_name_and_place(monkeypatch):
    """Around the row's mean; what is no token's is zero, in the chunk where tokens end and in those after it."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 600 * 32 * 2)
    for chunk in chunks(SHAPE):
        out = torch.full(chunk.shape, torch.nan)
        fill_at_random(SHAPE, 7, chunk, out)
        name = f"7:{chunk.slot.row.name}:{chunk.offsets}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        wanted = torch.empty(chunk.shape).normal_(
            1.0 if "norm" in name else 0.0, 0.02, generator=torch.Generator().manual_seed(seed)
        )
        if "vocab" in chunk.slot.row.axes:
            wanted[max(0, 1030 - chunk.start) :] = 0
        assert torch.equal(out, wanted), name


def test_a_random_model_says_what_it_is(tmp_path, capsys, monkeypatch):
    sizes = ModelConfig(**random_sizes())
    make_random_model(RandomModelConfig(model=sizes, output=str(tmp_path / "o"), dry_run=True))
    assert capsys.readouterr().out.startswith("would be made") and not (tmp_path / "o").exists()
    make_random_model(RandomModelConfig(model=sizes, output=str(tmp_path / "o")))
    assert f"{tmp_path / 'o'}: random weights" in " ".join(capsys.readouterr().out.split())
    results = read_manifest(tmp_path / "o")["results"]
    assert results["parameters"] == count_parameters(open_model_folder(tmp_path / "o").shape)
    assert 0 <= results["seconds"] < 60
    monkeypatch.setattr(random_model, "write_weights", lambda *_: pytest.fail("it is there"))
    make_random_model(RandomModelConfig(model=sizes, output=str(tmp_path / "o")))


@pytest.mark.parametrize("there", [False, True])
def test_weights_are_written_chunk_by_chunk_and_counted(tmp_path, monkeypatch, there):
    moved, began, folder = [], [], tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    progress = weights.progress

    def counted(what, total, **how):
        moved.append((what, total))
        made = progress(what, total, **how)
        return made

    monkeypatch.setattr(weights, "progress", counted)
    monkeypatch.setattr(weights, "at_work", lambda: began.append(1))
    crc32 = []

    def fill(chunk, out):
        crc32.append(get_crc32_options())
        out.fill_(1)

    write_weights(folder, SHAPE, fill, "writing", {"other": {"x": 1}})
    bytes_of_all = sum(np.prod(chunk.shape) for chunk in chunks(SHAPE)) * 2
    assert moved == [("writing", bytes_of_all)] and began == [1] and set(crc32) == {False} and get_crc32_options()
    assert set(read_metadata(folder).state_dict_metadata) == {*(c.key for c in chunks(SHAPE)), "other"}


def test_checksums_are_back_whatever_happens():
    assert get_crc32_options() is True
    with pytest.raises(ZeroDivisionError), without_crc32():
        assert get_crc32_options() is False
        raise ZeroDivisionError
    assert get_crc32_options() is True


# Reading


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_bits_of_any_width_are_the_memory(dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    bits = as_bits(tensor)
    assert bits.itemsize == tensor.itemsize and bits.shape == (2, 2)
    assert bits.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("uneven", [0, 1])
@pytest.mark.parametrize("span", [1, 3, 10**6])
def test_rows_of_a_slot_are_read_as_they_are_asked_for(model, monkeypatch, uneven, span):
    """Some, from one on, or chosen ones, of which no more is read at once than a span holds."""
    folder, draw = model[uneven], np.random.default_rng(span)
    reader, shape = WeightReader(folder.weights), folder.shape
    for slot in [slot for slot in slots(shape) if slot.layer in (None, 1)]:
        whole = reader.read_slot(slot, shape)
        assert whole.shape == slot.shape(shape) and torch.equal(reader.read_slot(slot, shape, 3), whole[3:])
        assert torch.equal(reader.read_slot(slot, shape, 2, 5), whole[2:5])
        out = torch.empty(4, *whole.shape[1:], dtype=whole.dtype)
        reader.read_into(out, slot, shape, 1)
        assert torch.equal(out, whole[1:5])
        width = whole[0].numel() * whole.itemsize
        monkeypatch.setattr(reading, "SPAN_BYTES", span * width + 1)
        for rows in (np.arange(len(whole)), np.sort(draw.choice(len(whole), len(whole) // 2 + 1, False)), np.arange(0)):
            found, at = np.empty((len(rows), *whole.shape[1:]), np.int16), 0
            for first, stop, bits in reader.spans(slot, shape, rows):
                assert first == at and rows[stop - 1] - rows[first] < span and len(bits) == stop - first
                assert stop == len(rows) or rows[stop] - rows[first] >= span
                found[first:stop], at = bits, stop
            assert at == len(rows) and (found == as_bits(whole)[rows]).all()


def test_one_file_is_open_at_a_time(model):
    folder = model[0]
    reader, other = WeightReader(folder.weights), WeightReader(model[1].weights)
    slot = next(slots(folder.shape))
    reader.read_slot(slot, folder.shape)
    place = next(iter(reader.places.values()))
    copies = []
    for number in range(3):
        copies.append(folder.path.parent / f"copy-{number}")
        copies[-1].write_bytes(place.path.read_bytes())
        reader._read(copies[-1], place.offset, np.empty(1, np.int16))
    there = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    ]
    assert [name for name in there if "copy-" in name] == [str(copies[-1])]
    assert other.file is None


def of_another_dtype(tensor, info):
    return replace(tensor, properties=replace(tensor.properties, dtype=torch.float16)), info


def of_another_size(tensor, info):
    (chunk,) = tensor.chunks
    return replace(tensor, chunks=[replace(chunk, sizes=torch.Size((chunk.sizes[0] - 1, *chunk.sizes[1:])))]), info


def shorter(tensor, info):
    return tensor, replace(info, length=info.length - 2000)


def elsewhere(tensor, info):
    return tensor, replace(info, offset=info.offset + 64)


@pytest.mark.parametrize("change", [of_another_dtype, of_another_size, shorter, elsewhere])
def test_a_chunk_that_is_not_what_the_index_says_is_damage(model, change):
    folder = model[0]
    reader, slot = WeightReader(folder.weights), next(slots(folder.shape))
    key = slot.key(folder.shape)
    (index,) = [index for index in reader.metadata.storage_data if index.fqn == key]
    tensor, info = change(reader.metadata.state_dict_metadata[key], reader.metadata.storage_data[index])
    reader.metadata.state_dict_metadata[key], reader.metadata.storage_data[index] = tensor, info
    with pytest.raises(UserError, match=f"{key} is damaged"):
        reader.read(key, (0, 0), (2, 16))
    with pytest.raises(UserError, match="has no tensor none: make the folder again"):
        reader.read("none", (0,), (1,))


@pytest.mark.parametrize("transformed", [False, True])
def test_what_is_compressed_is_not_read_as_it_is(monkeypatch, transformed):
    tensor = StoredTensor((2,), "float32", (((0,), (2,)),))
    index = Index({"k": tensor}, frozenset({"o"}), {("k", (0,)): Piece("a", 0, 9, transformed)})
    monkeypatch.setattr(reading, "read_index", lambda folder: index)
    reader = WeightReader(Path("w"))
    assert reader.tensors == {"k": ((2,), torch.float32)} and "o" in reader.metadata.state_dict_metadata
    says = "is not stored as torch_dist does" if transformed else "is damaged"
    with pytest.raises(UserError, match=f"k {says}"):
        reader.read("k", (0,), (2,))


def test_an_index_is_read_once_though_megatron_asks_again(model, monkeypatch):
    from torch.distributed.checkpoint import FileSystemReader

    asked, read = [], reading.read_metadata
    monkeypatch.setattr(reading, "read_metadata", lambda folder: asked.append(folder) or read(folder))
    with safe_reading():
        for folder in (model[0].weights, model[1].weights, model[0].weights):
            FileSystemReader(folder).read_metadata()
    assert asked == [model[0].weights, model[1].weights]


# Into a live model


class Chunk:
    """A live model's chunk that loads what it is given, and says what it lacks."""

    def __init__(self, missing=(), unexpected=()):
        self.lacks, self.asked = SimpleNamespace(missing_keys=list(missing), unexpected_keys=list(unexpected)), []

    def sharded_state_dict(self, metadata):
        self.asked.append(metadata)
        return {"w": SimpleNamespace(data=torch.ones(2)), "w._extra_state": 1}

    def load_state_dict(self, state, strict):
        self.asked.append((state, strict))
        return self.lacks

    def named_parameters(self):
        return []


@pytest.mark.parametrize(
    ("missing", "unexpected", "says"),
    [
        ([], [], None),
        (["a._extra_state"], [], None),
        (["a._extra_state", "b"], [], "w does not fit the model: b"),
        ([], ["c"], "w does not fit the model: c"),
        (["b"], ["c"], "w does not fit the model: b"),
    ],
)
def test_a_model_has_every_weight_of_its_checkpoint_and_no_other(monkeypatch, missing, unexpected, says):
    from megatron.core import dist_checkpointing

    one, two, asked, began = Chunk(), Chunk(missing, unexpected), [], []
    monkeypatch.setattr(dist_checkpointing, "load", lambda *given: asked.append(given) or {"chunk0": 0, "chunk1": 1})
    monkeypatch.setattr(weights, "at_work", lambda: began.append(1))
    rounded, checked = [], []
    monkeypatch.setattr(weights, "_round_whole", rounded.append)
    monkeypatch.setattr(weights, "_check_rounding", lambda *given: checked.append(given))
    if says:
        with pytest.raises(UserError, match=says):
            load_weights([one, two], Path("w"))
        return
    load_weights([one, two], Path("w"), SimpleNamespace(dp_cp="group"))
    ((wanted, folder),) = asked
    assert {name: set(state) for name, state in wanted.items()} == {"chunk0": {"w"}, "chunk1": {"w"}} and folder == "w"
    assert one.asked == [{"dp_cp_group": "group"}, (0, False)] and two.asked[1] == (1, False) and began == [1]
    assert rounded == [wanted] and checked == [(one, 0, Path("w")), (two, 1, Path("w"))]
    load_weights([one], Path("w"))
    assert one.asked[2] is None and set(sharded_weights(one)) == {"w"}


@pytest.mark.parametrize(
    ("error", "kind"), [(EOFError("ends"), UserError), (MemoryError(), MemoryError), (UserError("as it is"), UserError)]
)
def test_what_ended_the_reading_is_told(monkeypatch, error, kind):
    from megatron.core import dist_checkpointing

    def load(*_):
        raise CheckpointException("read", {0: (error, None)})

    monkeypatch.setattr(dist_checkpointing, "load", load)
    with pytest.raises(kind) as raised:
        load_weights([], Path("w"))
    wanted = "w is damaged (ends): make the folder again" if isinstance(error, EOFError) else str(error)
    assert str(raised.value) == wanted


class InFp8(torch.Tensor):
    pass


def test_a_matrix_in_fp8_is_read_whole_into_the_cpus_memory(monkeypatch):
    monkeypatch.setattr("megatron.core.fp8_utils.is_float8tensor", lambda tensor: isinstance(tensor, InFp8))
    plain, matrix = torch.ones(2), torch.ones(3, 2, dtype=torch.bfloat16).as_subclass(InFp8)
    wanted = {"chunk0": {"a": SimpleNamespace(data=plain), "b": SimpleNamespace(data=matrix)}}
    weights._round_whole(wanted)
    found = wanted["chunk0"]["b"].data
    assert wanted["chunk0"]["a"].data is plain and type(found) is torch.Tensor
    assert (found.shape, found.dtype, found.device.type) == ((3, 2), torch.bfloat16, "cpu")


@pytest.mark.parametrize(("factor", "taken"), [(1.0, True), (1.1, True), (1.125, False), (float("nan"), False)])
def test_rounding_has_a_bound(monkeypatch, factor, taken):
    """Of the whole matrix, and at the bound; what is no number is above it."""
    exact = torch.tensor([[3.0, 4.0]])
    assert rounding_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)
    assert rounding_error(torch.tensor([[1.0]]), torch.tensor([[0.0]])) > 1e29
    found = exact * factor
    monkeypatch.setattr(weights, "LARGEST_ROUNDING", rounding_error(exact * 1.1, exact))
    monkeypatch.setattr("megatron.core.fp8_utils.is_float8tensor", lambda tensor: True)
    chunk = SimpleNamespace(named_parameters=lambda: [("w", SimpleNamespace(dequantize=lambda: found))])
    if taken:
        weights._check_rounding(chunk, {"w": exact}, Path("w"))
    else:
        with pytest.raises(UserError, match="w: w in FP8 is"):
            weights._check_rounding(chunk, {"w": exact}, Path("w"))
