"""The index of a distributed checkpoint (`.metadata`), which is a pickle: what is stored in which file, read without torch.

torch reads it with bare pickle.load, which runs whatever a stranger put in. Here it becomes plain data (unpickling.py), is held
against itself (every tensor has all of its chunks, once, and each of them a place in a file of the same folder), and only then
is it used: by checks as it is, by reading.py as torch's data classes.
"""

import itertools
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.unpickling import Made, Name, plain_data
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import distinct_slots
from minitron_megatron.models.limits import ITEMSIZES
from minitron_megatron.models.shape import ModelShape

Sizes = tuple[int, ...]
# Global shape, and torch's name of the dtype.
Stored = tuple[Sizes, str]

# Of 50,000 chunks an index has 7 MB: this is for 150 times as many.
MOST_BYTES = 2**30
_METADATA = "torch.distributed.checkpoint.metadata"
# Indices of megatron.core 0.15: torch's, with fields more about optimizer states and the plans by which it was written.
_MEGATRON, _PLANNER = "megatron.core.dist_checkpointing.strategies.torch", "torch.distributed.checkpoint.planner"
_INDEX = ((_METADATA, "Metadata"), (_MEGATRON, "MCoreMetadata"))
# All that an index may be made of.
_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("builtins", "dict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        (_MEGATRON, "MCoreSavePlan"),
        *_INDEX,
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    }
)
# torch's names of its dtypes: a name of a class or a function is none of them.
_DTYPES = frozenset(
    """float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
    float4_e2m1fn_x2 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex32 complex64 complex128""".split()
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint: its global shape, torch's name of its dtype, and (offsets, sizes) of each chunk."""

    shape: Sizes
    dtype: str
    chunks: tuple[tuple[Sizes, Sizes], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where something is stored: bytes `offset` to `offset + length` of a file of the folder.

    transformed: it is not as torch_dist writes it (compressed, say).
    """

    file: str
    offset: int
    length: int
    transformed: bool = False


@dataclass(frozen=True, slots=True)
class Index:
    """What is in a distributed checkpoint.

    tensors: by key. objects: keys of what is no tensor. pieces: by key and, of a tensor, the offsets of a chunk.
    """

    tensors: dict[str, StoredTensor]
    objects: frozenset[str]
    pieces: dict[tuple[str, Sizes | None], Piece]


def read_index(folder: Path) -> Index:
    """A distributed checkpoint's index. Raises UserError where it is missing, damaged, incomplete or has more in it than data."""
    file = folder / ".metadata"
    try:
        if file.stat().st_size > MOST_BYTES:
            raise pickle.UnpicklingError("larger than any index")
        return _index(plain_data(file.read_bytes(), _allowed))
    except FileNotFoundError:
        raise UserError(f"{folder} has no .metadata: it is not a whole distributed checkpoint") from None
    except Exception as error:  # arbitrary bytes can fail in any way in an unpickler
        pass_on_unless_damage(error)
        raise UserError(f"{file} is damaged or unsafe ({short(error)}): make the folder again") from None


def _allowed(module: str, name: str) -> bool:
    return (module, name) in _NAMES or (module == "torch" and name in _DTYPES)


def _state(of: Any, *names: tuple[str, str]) -> dict[str, Any]:
    """The state of an object that one of these names makes."""
    if not isinstance(of, Made) or (of.by.module, of.by.name) not in names or not isinstance(of.state, dict):
        raise pickle.UnpicklingError(f"no {names[0][1]} where one belongs")
    return of.state


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise pickle.UnpicklingError("no size where one belongs")
    return value


def _sizes(value: Any) -> Sizes:
    """Of torch.Size, or a plain tuple."""
    if isinstance(value, Made) and value.by.name == "Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > 64:
        raise pickle.UnpicklingError("no sizes where some belong")
    return tuple(map(_number, value))


def _index(top: Any) -> Index:
    found = _state(top, *_INDEX)
    stored, places = found.get("state_dict_metadata"), found.get("storage_data")
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise pickle.UnpicklingError("not a checkpoint's metadata")
    if not isinstance(places, dict):
        raise pickle.UnpicklingError("no places of tensors in it")
    tensors, objects = {}, set()
    for key, value in stored.items():
        if isinstance(value, Made) and value.by.name == "BytesStorageMetadata":
            objects.add(key)
        else:
            tensors[key] = _tensor(_state(value, (_METADATA, "TensorStorageMetadata")))
    pieces = dict(_piece(where, place) for where, place in places.items())
    for key, tensor in tensors.items():
        _check_chunks(key, tensor)
    for where in itertools.chain(
        ((key, None) for key in objects), ((key, at) for key, t in tensors.items() for at, _ in t.chunks)
    ):
        if where not in pieces:
            raise pickle.UnpicklingError(f"{where[0]} has no place in a file")
    return Index(tensors, frozenset(objects), pieces)


def _tensor(state: dict[str, Any]) -> StoredTensor:
    properties, chunks = state["properties"], state["chunks"]
    if not isinstance(properties, Made) or not isinstance(chunks, list):
        raise pickle.UnpicklingError("a tensor without chunks")
    of = properties.state
    dtype = of["dtype"] if isinstance(of, dict) else of[0]
    if not isinstance(dtype, Name) or dtype.name not in _DTYPES:
        raise pickle.UnpicklingError("a tensor without a dtype")
    parts = (_state(chunk, (_METADATA, "ChunkStorageMetadata")) for chunk in chunks)
    return StoredTensor(
        _sizes(state["size"]), dtype.name, tuple((_sizes(part["offsets"]), _sizes(part["sizes"])) for part in parts)
    )


def _piece(where: Any, place: Any) -> tuple[tuple[str, Sizes | None], Piece]:
    at = _state(where, (_METADATA, "MetadataIndex"))
    info = _state(place, ("torch.distributed.checkpoint.filesystem", "_StorageInfo"))
    key, offset, file = at["fqn"], at.get("offset"), info["relative_path"]
    if not isinstance(key, str) or not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
        raise pickle.UnpicklingError("a file that is not one of the folder's own")
    piece = Piece(file, _number(info["offset"]), _number(info["length"]), bool(info.get("transform_descriptors")))
    return (key, None if offset is None else _sizes(offset)), piece


def _check_chunks(key: str, tensor: StoredTensor) -> None:
    """Check that the chunks of a tensor are all of it, and none of it twice: else a loader leaves numbers as memory had them.

    Edges of chunks divide the tensor into cells; each is in one chunk, and their volumes add up.
    """
    shape, chunks = tensor.shape, tensor.chunks
    inside = all(
        len(at) == len(size) == len(shape) and all(a + n <= whole for a, n, whole in zip(at, size, shape, strict=True))
        for at, size in chunks
    )
    if not inside or sum(math.prod(size) for _, size in chunks) != math.prod(shape):
        raise pickle.UnpicklingError(f"{key} is incomplete: its chunks are not all of it")
    if len(chunks) < 2:
        return
    edges = [sorted({e for at, n in chunks for e in (at[dim], at[dim] + n[dim])}) for dim in range(len(shape))]
    numbers = [{edge: i for i, edge in enumerate(of)} for of in edges]
    seen: set[Sizes] = set()
    for at, size in chunks:
        cells = [range(n[a], n[a + s]) for n, a, s in zip(numbers, at, size, strict=True)]
        if math.prod(map(len, cells)) > 64 * len(chunks):
            raise pickle.UnpicklingError(f"{key} has chunks that lie in no grid")
        for cell in itertools.product(*cells):
            if cell in seen:
                raise pickle.UnpicklingError(f"{key} has two chunks of the same numbers")
            seen.add(cell)


def stored_tensors(folder: Path) -> dict[str, Stored | None]:
    """Global shape and dtype of every tensor of a distributed checkpoint, by key; None for what is none. Raises UserError."""
    index = read_index(folder)
    return {key: (t.shape, t.dtype) for key, t in index.tensors.items()} | dict.fromkeys(index.objects)


def check_files(folder: Path) -> None:
    """Raise UserError where a distributed checkpoint's index names a file that is not there, or bytes beyond its end."""
    ends: dict[str, int] = {}
    for piece in read_index(folder).pieces.values():
        ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {folder}/.metadata names it")
        if file.stat().st_size < end:
            raise UserError(f"{file} ends too soon: {folder}/.metadata names {end} bytes of it")


def short(error: BaseException) -> str:
    """The first line of an error, at most 160 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def stored_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every key of a model's checkpoint with its global shape."""
    return {slot.key(shape): slot.stored_shape(shape) for slot, _ in distinct_slots(shape)}


def total_bytes(shape: ModelShape) -> int:
    """Bytes of a model's weights on disk, vocabulary padding included."""
    return sum(map(math.prod, stored_shapes(shape).values())) * ITEMSIZES[shape.dtype]


def check_weights(folder: ModelFolder) -> None:
    """Check that the index of a folder's weights has every key of its shape, in full. Raises UserError."""
    stored = stored_tensors(folder.weights)
    for key, wanted in stored_shapes(folder.shape).items():
        found = stored.get(key)
        if found is None or found[0] != wanted:
            raise UserError(f"{folder.weights}: {key} is {found and found[0]}, model.yaml says {wanted}; make it again")
