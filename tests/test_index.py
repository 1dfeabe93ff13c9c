"""Checkpoints of strangers: no pickle in them runs, changes a class or takes for ever; an index without all chunks is refused."""

import collections
import io
import math
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from minitron_megatron.checkpoints import index as module
from minitron_megatron.checkpoints.index import (
    Piece,
    StoredTensor,
    check_files,
    check_weights,
    read_index,
    short,
    stored_tensors,
    total_bytes,
)
from minitron_megatron.checkpoints.reading import WeightReader, read_metadata, safe_reading
from minitron_megatron.checkpoints.unpickling import Made, Name, plain_data
from minitron_megatron.errors import UserError
from tests.test_bounds import SMALL_SHAPE

PICKLE = pickle.PROTO + b"\x02"
DOUBLED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 30


@pytest.fixture
def written(tmp_path):
    """A checkpoint by torch itself: two tensors and an object."""
    folder = tmp_path / "written"
    state = {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "o": {"step": 3, "at": [1.5, None]},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def put(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)
    return folder


def test_what_torch_writes_is_read_as_it_is(written):
    index = read_index(written)
    assert index.tensors["a"] == StoredTensor((3, 4), "float32", (((0, 0), (3, 4)),))
    assert index.tensors["b"].dtype == "bfloat16" and "a" in index.tensors and "o.step" in index.objects
    own, found = dcp.FileSystemReader(written).read_metadata(), read_metadata(written)
    assert own.storage_data == found.storage_data
    assert {
        k: (v.size, v.chunks) for k, v in own.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)
    } == {k: (v.size, v.chunks) for k, v in found.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    assert torch.equal(WeightReader(written).read("a", (1, 1), (2, 2)), torch.arange(12.0).reshape(3, 4)[1:, 1:3])


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_an_object_that_runs_a_program_does_not(written, tmp_path):
    """What is no tensor stands in a .distcp file, which torch's planner reads by any pickle."""
    piece = read_index(written).pieces["o.step", None]
    data = io.BytesIO()
    torch.save(Payload(tmp_path / "executed"), data)
    file = written / "payload.distcp"
    file.write_bytes(data.getvalue())
    metadata = dcp.FileSystemReader(written).read_metadata()
    for index, info in metadata.storage_data.items():
        if info.relative_path == piece.file and info.offset == piece.offset:
            metadata.storage_data[index] = replace(info, relative_path=file.name, offset=0, length=file.stat().st_size)
    (written / ".metadata").write_bytes(pickle.dumps(metadata))
    wanted = {"o": {"step": 0, "at": [0.0, None]}}
    with safe_reading(), pytest.raises(CheckpointException, match="step is damaged, or more than data"):
        dcp.load(wanted, checkpoint_id=written, no_dist=True)
    assert not (tmp_path / "executed").exists()
    # The same by torch itself: the payload is a real one.
    dcp.load(wanted, checkpoint_id=written, no_dist=True)
    assert (tmp_path / "executed").exists()


def test_objects_without_programs_are_read(written):
    wanted = {"o": {"step": 0, "at": [0.0, 1]}}
    with safe_reading():
        dcp.load(wanted, checkpoint_id=written, no_dist=True)
    assert wanted == {"o": {"step": 3, "at": [1.5, None]}}


@pytest.mark.parametrize(
    "name", [b"pathlib\nPosixPath", b"torch.distributed.checkpoint.metadata\nMetadata", b"collections\nOrderedDict"]
)
def test_no_class_is_given_a_state(tmp_path, name):
    # A state of two parts is set by setattr, on whatever lies there.
    state = b"(N}U\x04evilK\x01st".replace(b"U\x04", b"X\x04\x00\x00\x00")
    folder = put(tmp_path / "x", PICKLE + b"c" + name + b"\n" + state + b"b.")
    with pytest.raises(UserError, match=r"damaged or unsafe \(it gives a state to what is no object\)"):
        read_index(folder)
    assert not any(hasattr(kind, "evil") for kind in (PosixPath, Metadata))


@pytest.mark.parametrize(
    "steps",
    {
        # Each in the next one twice: to hash or to print it takes 2 to the power of 30 steps.
        "a key": b"}q\x01" + DOUBLED + b"h\x01h\x00K\x01s.",
        "keys": b"}q\x01" + DOUBLED + b"h\x01(h\x00K\x01u.",
        "a size": DOUBLED + b"h\x00.",
        "a set": b"\x8f" + DOUBLED + b"(h\x00\x90.",
        "more than there is": b"\x8d" + b"\xff" * 7 + b"\x00" + b"x.",
        "a long frame": b"\x95" + b"\xff" * 7 + b"\x00.",
        "a place far away": b"r\xff\xff\xff\xff.",
        "nothing": b"",
        "deep": b"(" * 10**6 + b"t" * 10**6 + b".",
    }.items(),
    ids=lambda item: item[0],
)
def test_pickles_that_would_take_for_ever(tmp_path, steps):
    began = time.process_time()
    with pytest.raises(UserError, match="damaged or unsafe"):
        read_index(put(tmp_path / "x", PICKLE + steps[1]))
    assert time.process_time() - began < 5


def chunks(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in parts]


QUARTERS = [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (QUARTERS, None),
        ([((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4))], None),
        (QUARTERS[:3], "its chunks are not all of it"),
        ([*QUARTERS, QUARTERS[0]], "its chunks are not all of it"),
        ([*QUARTERS[:3], QUARTERS[0]], "two chunks of the same numbers"),
        ([*QUARTERS[:3], ((1, 3), (2, 3))], "two chunks of the same numbers"),
        ([*QUARTERS[:3], ((3, 3), (2, 3))], "its chunks are not all of it"),
        ([], "its chunks are not all of it"),
    ],
)  # fmt: skip
def test_an_index_has_every_chunk_once(tmp_path, parts, says):
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((4, 6)), chunks(*parts))
    places = {MetadataIndex("k", at): _StorageInfo("__0_0.distcp", 0, 10) for at, _ in parts}
    folder = put(tmp_path / "x", pickle.dumps(Metadata({"k": tensor}, storage_data=places)))
    if says is None:
        assert len(read_index(folder).pieces) == len(parts)
        places.popitem()
        put(folder, pickle.dumps(Metadata({"k": tensor}, storage_data=places)))
        says = "k has no place in a file"
    with pytest.raises(UserError, match=says):
        read_index(folder)


@pytest.mark.parametrize("file", ["../a.distcp", "/etc/passwd", "..", "", "a/b"])
def test_files_are_the_folders_own(tmp_path, file):
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    metadata = Metadata({"o": BytesStorageMetadata()}, storage_data={MetadataIndex("o"): _StorageInfo(file, 0, 1)})
    with pytest.raises(UserError, match="a file that is not one of the folder's own"):
        read_index(put(tmp_path / "x", pickle.dumps(metadata)))
    metadata.storage_data[MetadataIndex("o")].relative_path = "a.distcp"
    assert read_index(put(tmp_path / "x", pickle.dumps(metadata))).pieces == {("o", None): Piece("a.distcp", 0, 1)}
    shutil.rmtree(tmp_path / "x")


# Parts of an index, one by one

DTYPE = Name("torch", "float32")


def of(name: str, **state) -> Made:
    """An object of an index."""
    modules = {"_StorageInfo": "torch.distributed.checkpoint.filesystem"}
    return Made(Name(modules.get(name, "torch.distributed.checkpoint.metadata"), name), (), state or None)


def taken(function, *given) -> bool:
    try:
        function(*given)
    except pickle.UnpicklingError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "whole"),
    [(0, True), (2**63 - 1, True), (-1, False), (2**63, False), (True, False), (1.0, False), ("1", False)],
)
def test_sizes_are_whole_numbers_of_63_bits(value, whole):
    assert taken(module._number, value) is whole and taken(module._sizes, (value,)) is whole


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ((), ()),
        ([2, 3], (2, 3)),
        (Made(Name("torch", "Size"), ((2, 3),)), (2, 3)),
        (Made(Name("torch", "Size"), ()), None),
        (Made(Name("torch", "Size"), ((2,), (3,))), None),
        (Made(Name("torch", "load"), ((2, 3),)), None),
        ((1,) * 64, (1,) * 64),
        ((1,) * 65, None),
        ({1: 2}, None),
        (3, None),
    ],
)
def test_sizes_are_torchs_or_plain(value, sizes):
    assert taken(module._sizes, value) is (sizes is not None)
    assert sizes is None or module._sizes(value) == sizes


PROPERTIES = of("TensorProperties", dtype=DTYPE)
AS_TUPLE = Made(Name("m", "TensorProperties"), (), (Name("torch", "int8"), "layout"))
CHUNK = of("ChunkStorageMetadata", offsets=(0,), sizes=(3,))


@pytest.mark.parametrize(
    ("changed", "dtype"),
    [
        ({}, "float32"),
        ({"properties": AS_TUPLE}, "int8"),
        ({"properties": "float32"}, None),
        ({"properties": of("TensorProperties", dtype="float32")}, None),
        ({"properties": of("TensorProperties", dtype=Name("torch", "load"))}, None),
        ({"chunks": (CHUNK,)}, None),
        ({"chunks": [of("MetadataIndex", offsets=(0,), sizes=(3,))]}, None),
        ({"chunks": [Made(CHUNK.by, (), None)]}, None),
        ({"chunks": ["chunk"]}, None),
    ],
)
def test_a_tensor_has_properties_and_chunks_of_their_kinds(changed, dtype):
    state = {"properties": PROPERTIES, "chunks": [CHUNK], "size": (3,), **changed}
    assert taken(module._tensor, state) is (dtype is not None)
    assert dtype is None or module._tensor(state) == StoredTensor((3,), dtype, (((0,), (3,)),))


@pytest.mark.parametrize(
    ("where", "place", "piece"),
    [
        ({}, {}, (("k", (1,)), Piece("a", 5, 7))),
        ({"offset": None}, {}, (("k", None), Piece("a", 5, 7))),
        ({"offset": ...}, {"transform_descriptors": ("zstd",)}, (("k", None), Piece("a", 5, 7, True))),
        ({}, {"transform_descriptors": None}, (("k", (1,)), Piece("a", 5, 7))),
        ({"fqn": 3}, {}, None),
        ({}, {"relative_path": 3}, None),
        ({}, {"relative_path": "."}, None),
        ({}, {"offset": -1}, None),
        ({}, {"length": None}, None),
    ],
)
def test_a_place_is_so_many_bytes_of_a_file(where, place, piece):
    where = {"fqn": "k", "offset": (1,), **where}
    where = {name: value for name, value in where.items() if value is not ...}
    info = of("_StorageInfo", **{"relative_path": "a", "offset": 5, "length": 7, **place})
    given = of("MetadataIndex", **where), info
    assert taken(module._piece, *given) is (piece is not None)
    assert piece is None or module._piece(*given) == piece


@pytest.mark.parametrize(
    "changed",
    [
        {"state_dict_metadata": [1]},
        {"state_dict_metadata": {"o": of("BytesStorageMetadata"), 3: of("BytesStorageMetadata")}},
        {"state_dict_metadata": {"o": of("StorageMeta")}},
        {"storage_data": [1]},
        {"storage_data": None},
    ],
)
def test_an_index_is_of_tensors_objects_and_places(changed):
    place = of("_StorageInfo", relative_path="a", offset=0, length=1)
    state = {
        "state_dict_metadata": {"o": of("BytesStorageMetadata")},
        "storage_data": {of("MetadataIndex", fqn="o"): place},
    }
    assert module._index(of("Metadata", **state)).objects == {"o"}
    assert not taken(module._index, of("Metadata", **state | changed)) and not taken(
        module._index, of("StorageMeta", **state)
    )


def columns(rows: int, wide: int) -> StoredTensor:
    """A large chunk, rows to its right and columns below it: a grid of single cells, of which the large chunk has most."""
    parts = [((0, 0), (rows, wide)), ((rows, wide), (1, 1))]
    parts += [((row, wide), (1, 1)) for row in range(rows)] + [((rows, column), (1, 1)) for column in range(wide)]
    return StoredTensor((rows + 1, wide + 1), "float32", tuple(parts))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (StoredTensor((4,), "float32", (((0,), (2,)), ((2,), (2,)))), None),
        (StoredTensor((), "float32", (((), ()),)), None),
        (StoredTensor((4,), "float32", (((0,), (2,)), ((1,), (2,)))), "two chunks of the same numbers"),
        (StoredTensor((4,), "float32", (((0,), (2,)), ((3,), (2,)))), "not all of it"),
        (StoredTensor((4,), "float32", (((0, 0), (2, 2)),)), "not all of it"),
        (StoredTensor((4,), "float32", (((0,), (2, 2)),)), "not all of it"),
        # 64 cells a chunk are as many as are looked at.
        (columns(128, 130), None),
        (columns(129, 129), "lie in no grid"),
    ],
)
def test_chunks_are_all_of_a_tensor_in_a_grid(tensor, says):
    if says is None:
        module._check_chunks("k", tensor)
    else:
        with pytest.raises(pickle.UnpicklingError, match=f"k .*{says}"):
            module._check_chunks("k", tensor)


def test_an_index_has_a_largest_size(written, tmp_path, monkeypatch):
    size = (written / ".metadata").stat().st_size
    monkeypatch.setattr(module, "MOST_BYTES", size)
    assert stored_tensors(written)["a"] == ((3, 4), "float32") and stored_tensors(written)["o.step"] is None
    monkeypatch.setattr(module, "MOST_BYTES", size - 1)
    with pytest.raises(UserError, match="damaged or unsafe \\(larger than any index\\)"):
        read_index(written)
    with pytest.raises(UserError, match=rf"^{tmp_path}/none has no \.metadata"):
        read_index(tmp_path / "none")


@pytest.mark.parametrize("order", [1, -1])
def test_files_reach_to_the_end_of_what_the_index_names(tmp_path, monkeypatch, order):
    pieces = [Piece("a", 0, 5), Piece("a", 5, 10), Piece("a", 2, 3), Piece("b", 0, 1)][::order]
    monkeypatch.setattr(module, "read_index", lambda folder: SimpleNamespace(pieces=dict(enumerate(pieces))))
    for name, size in (("a", 15), ("b", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    check_files(tmp_path)
    (tmp_path / "a").write_bytes(bytes(14))
    with pytest.raises(UserError, match=rf"^{tmp_path}/a ends too soon: {tmp_path}/\.metadata names 15 bytes of it"):
        check_files(tmp_path)
    (tmp_path / "a").write_bytes(bytes(16))
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/b is missing"):
        check_files(tmp_path)


def test_an_error_is_its_first_line():
    assert short(ValueError("one\ntwo")) == "one" and short(ValueError()) == "ValueError"
    assert short(ValueError("x" * 999)) == "x" * 160


def test_bytes_of_a_model_are_those_of_all_its_tensors():
    """Of 4 layers with 9 tensors each, embedding, head and last norm, the vocabulary padded."""
    layer = 32 + 32 * (8 + 4 + 4) * 4 + 32 * 32 + 32 + 2 * 48 * 32 + 48 * 32
    vocab = math.ceil(SMALL_SHAPE.vocab_size / 1024) * 1024
    assert total_bytes(SMALL_SHAPE) == 2 * (4 * layer + 2 * vocab * 32 + 32)
    assert total_bytes(SMALL_SHAPE.resized(dtype="float32")) == 2 * total_bytes(SMALL_SHAPE)


@pytest.mark.parametrize("odd", [None, ((3,), "float32")])
def test_every_key_of_a_model_is_there_in_full(monkeypatch, odd):
    key, whole = "decoder.final_layernorm.weight", {k: (s, "x") for k, s in module.stored_shapes(SMALL_SHAPE).items()}
    folder = SimpleNamespace(weights="w", shape=SMALL_SHAPE)
    monkeypatch.setattr(module, "stored_tensors", lambda _: whole)
    check_weights(folder)
    for there in ({key: odd}, {}):
        monkeypatch.setattr(
            module, "stored_tensors", lambda _, t=there: {k: v for k, v in whole.items() if k != key} | t
        )
        with pytest.raises(
            UserError, match=rf"w: {key} is {'None' if not there.get(key) else r'.3,.'}, model.yaml says"
        ):
            check_weights(folder)


# Pickles


PLAIN = {"a": [1, 2.5, None, True, "x"], "b": {"c": (1, (2,), ())}, 3: [], "long": 2**40, "many": list(range(2000))}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_out_as_they_went_in(protocol):
    assert plain_data(pickle.dumps(PLAIN, protocol), lambda *_: False) == PLAIN


def test_objects_are_what_made_them_and_what_they_were_given():
    found = plain_data(pickle.dumps([collections.OrderedDict(a=1), SimpleNamespace(x=2)]), lambda *_: True)
    assert found[0] == {"a": 1} and (found[1].by.module, found[1].by.name) == ("types", "SimpleNamespace")
    assert found[1].arguments == () and found[1].state == {"x": 2}
    made = plain_data(
        b"ccollections\nOrderedDict\n(K\x01K\x02tR.".replace(b"(K\x01K\x02t", b"K\x01K\x02\x86"), lambda *_: True
    )
    assert isinstance(made, Made) and made.arguments == (1, 2)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (b"]K\x01a.", None),
        (b"}(K\x01K\x02u.", None),
        (b"}K\x01a.", "it appends to what is no list"),
        (b"}(K\x01e.", "it appends to what is no list"),
        (b"](K\x01K\x02u.", "it has a key"),
        (b"}(K\x01K\x02K\x03u.", "it has a key"),
        (b"}(K\x01K\x02)K\x03u.", "it has a key"),
        (b"}(NK\x03u.", "it has a key"),
        (b"K\x01)R.", "it calls what is no name"),
        (b"ca\nb\nK\x01R.", "it calls what is no name"),
        (b"K\x01}b.", "it gives a state to what is no object"),
        (b"\x8f.", "has a step"),
    ],
)
def test_steps_of_a_pickle_are_checked(steps, says):
    if says is None:
        assert plain_data(PICKLE + steps, lambda *_: True) in ([1], {1: 2})
    else:
        with pytest.raises(pickle.UnpicklingError, match=says):
            plain_data(PICKLE + steps, lambda *_: True)
