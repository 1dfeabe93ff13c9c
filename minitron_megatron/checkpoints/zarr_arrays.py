"""Reads the zarr form of Megatron's distributed checkpoints, which NeMo wrote before torch_dist, as plain bytes.

    module.decoder.layers.mlp.linear_fc1.weight/.zarray     JSON: shape, chunks, dtype ("bfloat16", "<f4"), no compressor
    module.decoder.layers.mlp.linear_fc1.weight/0.1.0       one chunk, C order, as large as the others also at the edge

Megatron wrote version 2, uncompressed: with anything else there the array is refused. No library is needed, and NumPy's memory
maps read no more than is asked for.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.index import Stored
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import parse_json

if TYPE_CHECKING:
    import torch

_DTYPES = {"<f4": "float32", "bfloat16": "bfloat16", "<f2": "float16"}
# Integers of a number's width.
_WIDTHS = {"float32": np.int32, "bfloat16": np.int16, "float16": np.int16}
HEADER = ".zarray"


class ZarrArrays:
    """The arrays of a folder: `tensors` has their shapes and dtypes by key, `read` gives any region of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks: dict[str, tuple[int, ...]] = {}
        self.separators: dict[str, str] = {}
        self.tensors: dict[str, Stored] = {}
        for header in sorted(folder.glob(f"*/{HEADER}")):
            self._open(header)

    def _open(self, header: Path) -> None:
        key = header.parent.name
        try:
            values = parse_json(header.read_bytes())
            shape, chunks = (tuple(map(int, values[name])) for name in ("shape", "chunks"))
            plain = values["zarr_format"] == 2 and values["compressor"] is None and not values["filters"]
            dtype = _DTYPES.get(values["dtype"]) if isinstance(values["dtype"], str) else None
            sane = len(shape) == len(chunks) and min((*shape, *chunks), default=1) >= 1 and values["order"] == "C"
            separator = values.get("dimension_separator", ".")
        except (ValueError, TypeError, KeyError, OSError) as error:
            pass_on_unless_damage(error)
            raise UserError(f"{header} is damaged ({error!r}): make the checkpoint again") from None
        if plain and sane and separator in (".", "/") and dtype is not None:
            self.tensors[key] = shape, dtype
            self.chunks[key], self.separators[key] = chunks, separator

    def check_files(self, key: str) -> None:
        """Raise UserError where a chunk of an array is missing, or has another size than the others."""
        shape, chunks = self.tensors[key][0], self.chunks[key]
        dtype = np.dtype(_WIDTHS[self.tensors[key][1]])
        for place in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))):
            self._chunk(key, place, dtype)

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> "torch.Tensor":
        """The region of `key` at `offsets` with extent `sizes`, in the dtype on disk. Raises UserError."""
        import torch

        from minitron_megatron.checkpoints.reading import as_bits

        if key not in self.tensors:
            raise UserError(f"{self.folder / key} is no uncompressed zarr array of version 2: convert it to torch_dist")
        chunks = self.chunks[key]
        out = torch.empty(tuple(sizes), dtype=getattr(torch, self.tensors[key][1]))
        bits = as_bits(out)
        stops = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        ranges = [range(o // c, -(-stop // c)) for o, stop, c in zip(offsets, stops, chunks, strict=True)]
        for place in itertools.product(*ranges):
            low = [max(i * c, o) for i, c, o in zip(place, chunks, offsets, strict=True)]
            high = [min((i + 1) * c, stop) for i, c, stop in zip(place, chunks, stops, strict=True)]
            chunk = self._chunk(key, place, bits.dtype)
            here = tuple(slice(a - i * c, b - i * c) for a, b, i, c in zip(low, high, place, chunks, strict=True))
            bits[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))] = chunk[here]
        return out

    def _chunk(self, key: str, place: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        file = self.folder / key / self.separators[key].join(map(str, place))
        try:
            if file.stat().st_size == int(np.prod(self.chunks[key])) * dtype.itemsize:
                return np.memmap(file, dtype, "r", shape=self.chunks[key])
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): make the checkpoint again") from None
        raise UserError(f"{file} is damaged (it has another size than the others): make the checkpoint again")
