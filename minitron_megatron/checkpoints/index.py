"""The index of a distributed checkpoint (`.metadata`), which is a pickle: which tensors there are, read without torch.

torch reads it with bare pickle.load. Here an unpickler builds nothing but the plain stand-ins below; where tensors are read,
reading.py builds torch's own data classes, of the same names and no others.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import distinct_slots
from minitron_megatron.models.limits import ITEMSIZES
from minitron_megatron.models.shape import ModelShape

# Global shape, and torch's name of the dtype.
Stored = tuple[tuple[int, ...], str]


class Ignored:
    """What stands for parts of an index that a reader has no need of."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Index:
    """Stands for the whole: state_dict_metadata and storage_data, by the keys of what is stored."""


class _Tensor:
    """Stands for what is known of a tensor: properties, size and chunks."""


class _Properties:
    """Stands for what a tensor is made of: its dtype, by name."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class _Stored:
    """Stands for where a piece is stored: relative_path, offset, length."""


_METADATA = "torch.distributed.checkpoint.metadata"
# Indices of megatron.core 0.15: torch's, with fields more about optimizer states and the plans by which it was written.
MEGATRON, PLANNER = "megatron.core.dist_checkpointing.strategies.torch", "torch.distributed.checkpoint.planner"
# All that an index may be made of, and what stands for it here.
STAND_INS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "dict"): dict,
    ("pathlib", "PosixPath"): Ignored,
    ("pathlib", "Path"): Ignored,
    ("torch.serialization", "_get_layout"): Ignored,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Stored,
    (_METADATA, "Metadata"): _Index,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "TensorProperties"): _Properties,
    **{
        (_METADATA, name): Ignored
        for name in (
            "MetadataIndex",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (MEGATRON, "MCoreMetadata"): _Index,
    (MEGATRON, "MCoreSavePlan"): Ignored,
    **{(PLANNER, name): Ignored for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")},
}
# torch's names of its dtypes: a name of a class or a function is none of them.
_DTYPES = frozenset(
    """float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
    float4_e2m1fn_x2 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex32 complex64 complex128""".split()
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")


def read_with[T](folder: Path, read: Callable[[IO[bytes]], T]) -> T:
    """What `read` makes of a distributed checkpoint's index. Raises UserError where it is missing or damaged."""
    try:
        with open(folder / ".metadata", "rb") as file:
            return read(file)
    except FileNotFoundError:
        raise UserError(f"{folder} has no .metadata: it is not a whole distributed checkpoint") from None
    except Exception as error:  # arbitrary bytes can fail in any way in an unpickler
        pass_on_unless_damage(error)
        raise UserError(f"{folder}/.metadata is damaged or unsafe ({short(error)}): make the folder again") from None


def _tensors(file: IO[bytes]) -> dict[str, Stored | None]:
    index = _Unpickler(file).load()
    if not isinstance(index, _Index) or not isinstance(index.state_dict_metadata, dict):
        raise pickle.UnpicklingError("not a checkpoint's metadata")
    stored = index.state_dict_metadata.items()
    return {key: (tuple(t.size), t.properties.dtype) if isinstance(t, _Tensor) else None for key, t in stored}


def stored_tensors(folder: Path) -> dict[str, Stored | None]:
    """Global shape and dtype of every tensor of a distributed checkpoint, by key; None for what is none. Raises UserError."""
    return read_with(folder, _tensors)


def _ends(file: IO[bytes]) -> dict[str, int]:
    index = _Unpickler(file).load()
    if not isinstance(index, _Index) or not isinstance(index.storage_data, dict):
        raise pickle.UnpicklingError("no places of tensors in it")
    ends: dict[str, int] = {}
    for piece in index.storage_data.values():
        ends[str(piece.relative_path)] = max(ends.get(str(piece.relative_path), 0), piece.offset + piece.length)
    return ends


def check_files(folder: Path) -> None:
    """Raise UserError where a distributed checkpoint's index names a file that is not there, or bytes beyond its end."""
    for name, end in read_with(folder, _ends).items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{file} is missing, or of another folder: {folder}/.metadata names it")
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
