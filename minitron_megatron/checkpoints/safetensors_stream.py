"""Writes a safetensors file tensor by tensor: the library's own writer needs every tensor of the file in memory.

The format: 8 bytes with the header's length, a JSON header with dtype, shape and byte range of each tensor, the bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from minitron_megatron.checkpoints.finite import BLOCK_BYTES, has_odd
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import DTYPES

# Integers as which numbers of so many bytes are seen.
_SEEN_AS = {2: np.uint16, 4: np.uint32}
_CODES = {"float32": "F32", "bfloat16": "BF16"}


def write_safetensors(
    file: Path,
    dtype: str,
    tensors: Mapping[str, tuple[int, ...]],
    produce: Callable[[str], Iterable[torch.Tensor]],
    on_bytes: Callable[[int], None] = lambda n: None,
) -> None:
    """Write `tensors` (name to shape, in file order); `produce` yields each as consecutive blocks of its rows.

    Raises UserError where one has a NaN or an infinity.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} has no safetensors code here")
    itemsize = getattr(torch, dtype).itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for block in produce(name):
                data = block.contiguous().view(-1).view(torch.uint8).numpy()
                _check_finite(name, data.view(_SEEN_AS[itemsize]))
                out.write(data)
                on_bytes(data.nbytes)
        if out.tell() != 8 + len(text) + end:
            raise ValueError(f"{file}: {out.tell() - 8 - len(text)} bytes written, {end} announced")
        out.flush()
        os.fsync(out.fileno())


def _check_finite(name: str, numbers: np.ndarray) -> None:
    step = BLOCK_BYTES // numbers.itemsize
    if any(has_odd(numbers[start : start + step]) for start in range(0, len(numbers), step)):
        raise UserError(
            f"{name} has a NaN or an infinity: its source is damaged, or of a run that diverged; take another"
        )
