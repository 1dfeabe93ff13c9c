"""Checkpoints of strangers: no pickle in them runs, changes a class or takes for ever; an index without all chunks is refused."""

import io
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path, PosixPath

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

from minitron_megatron.checkpoints.index import Piece, StoredTensor, read_index
from minitron_megatron.checkpoints.reading import WeightReader, read_metadata, safe_reading
from minitron_megatron.errors import UserError

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
