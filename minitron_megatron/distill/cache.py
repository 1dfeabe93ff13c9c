"""A cache of teacher answers on disk: of every token of every sample the K most probable next tokens, read by sample number.

    output/train-000000000.safetensors        samples 0 … 63 of the training order (data/datasets.py)
           train-000000064.safetensors        samples 64 … 127
           validation-000000000.safetensors   the first windows of the validation split
           manifest.yaml                      results: what it is a cache of (`Contents`)

    a file of n samples of s tokens:
        ids        uint8    [n, s, K, B]   token ids, little-endian, in the fewest bytes that hold the vocabulary
        log_probs  float16  [n, s, K]      of the full softmax, best first
        rest       float32  [n, s]         probability of all other tokens together
        tokens     uint32   [n]            CRC-32 of each sample's tokens
        crc32      uint32   [n]            of each sample's bytes, and of what and which it is

Nothing in it depends on the layout that wrote it or on the one that reads it. The checksum is compared whenever a sample is
read, so a flipped bit, and a file in another one's place or of another cache, end the run rather than teach nonsense; so do
samples of other tokens than those that the teacher saw under their numbers.

float16 keeps log p to 2⁻¹¹ of itself, bfloat16 to 2⁻⁸. `rest` has its own float32: 1 − Σ p of rounded values has nothing right
where the mass outside K is small. A reader scales the K so that all is 1 again (`Cache.of_samples`).
"""

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save

from minitron_megatron.checkpoints.copies import verify_copies
from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.distill.contents import CacheFolder, Chunk, Contents
from minitron_megatron.distill.losses import TopK
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.models.forward import Batch


def write_chunk(folder: Path, contents: Contents, chunk: Chunk, answers: TopK, tokens: Sequence[int]) -> bytes:
    """Write a chunk whole or not at all; gives the SHA-256 of its file.

    Args:
        folder: of the cache that is being written.
        contents: what it is a cache of.
        chunk: which of its files.
        answers: of the chunk's samples on the CPU: ids and log_probs [n, s, K], rest [n, s].
        tokens: checksum of each sample's tokens (data/datasets.py), [n].
    """
    wide = answers.ids.numpy().astype("<u4")[..., None].view(np.uint8)
    ids = np.ascontiguousarray(wide[..., : contents.id_bytes])
    log_probs, rest = answers.log_probs.half().numpy(), answers.rest.float().numpy()
    of_tokens = np.array(tokens, np.uint32)
    parts = zip(chunk.samples, ids, log_probs, rest, of_tokens, strict=True)
    sums = np.array([contents.checksum(chunk.split, n, *of) for n, *of in parts], np.uint32)
    data = save({"ids": ids, "log_probs": log_probs, "rest": rest, "tokens": of_tokens, "crc32": sums})
    partial = folder / f".{chunk.name}.partial"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / chunk.name)
    return hashlib.sha256(data).digest()


def check_chunk(folder: Path, contents: Contents, chunk: Chunk) -> bytes | None:
    """SHA-256 of a chunk that a killed run has written; None where there is none, or a damaged one."""
    if not (folder / chunk.name).is_file():
        return None
    try:
        _read(folder, contents, chunk, chunk.samples)
    except UserError:
        return None
    with open(folder / chunk.name, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class Cache(CacheFolder):
    """A whole cache, read by sample number."""

    def of_samples(self, numbers: Sequence[int], split: str = "train", tokens: Sequence[int] | None = None) -> TopK:
        """What the teacher answers to some samples, at the cache's temperature.

        Of what is stored log_probs are rounded. They are scaled so that Σ_K p + rest = 1 again: a loss to them is 0 for some
        student, and never below.

        Args:
            numbers: of the samples, of the training order or of the validation windows, in any order.
            split: train or validation.
            tokens: checksums of the samples' tokens, to be compared where given.

        Returns:
            ids int64 and log_probs float32 [b, s, K], rest float32 [b, s], on the CPU.

        Raises:
            UserError: a file is missing or damaged, there is no such sample, or it has other tokens.
        """
        outside = next((n for n in numbers if not 0 <= n < getattr(self.contents, split)), None)
        if outside is not None:
            raise UserError(
                f"{self.path} has {getattr(self.contents, split)} {split} samples, none of number {outside}"
            )
        runs = groupby(numbers, key=lambda number: self.contents.chunk_of(split, number))
        parts = [_read(self.path, self.contents, chunk, list(run)) for chunk, run in runs]
        ids, log_probs, rest, seen = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        odd = [
            n for n, one, other in zip(numbers, seen, seen if tokens is None else tokens, strict=True) if one != other
        ]
        if odd:
            raise UserError(
                f"distill.cache={self.path}: {split} sample {odd[0]} of this run has other tokens than the teacher saw: make the "
                "cache again"
            )
        ids, log_probs, rest = map(torch.from_numpy, (ids, log_probs, rest))
        scale = torch.log1p(-rest) - log_probs.logsumexp(-1)
        return TopK(ids, log_probs + scale[..., None], rest)

    def verify(self) -> None:
        """Read every file on every node and compare with the digest. Raises UserError on every rank."""
        verify_copies(self.path, self.digest)


class CachedTeacher:
    """A teacher that has answered before: in a `Teacher`'s place, with the top K for logits and nothing to run.

    The next micro-batch is read and checked while the model is busy with this one.
    """

    # Answers are on disk: nothing bounds how many micro-batches are announced.
    ahead: int | None = None

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._thread = ThreadPoolExecutor(1)
        # Numbers of a micro-batch's samples, and checksums of their tokens.
        self._coming: deque[tuple[list[int], list[int]]] = deque()
        self._next: Future[TopK] | None = None

    def run_ahead(self, batches: Sequence[Batch]) -> None:
        """Note which samples come, in order; samples that only fill a round up are read as sample 0."""
        coming = ((batch["number"].clamp_min(0).tolist(), batch["checksum"].tolist()) for batch in batches)
        self._coming, self._next = deque(coming), None

    def targets(self, batch: Batch, split: str) -> TopK:
        """The top K of the next micro-batch in order, [s, b, K] on its device; `batch` is that micro-batch.

        With context parallelism of this rank's share of each sequence, which its position ids name.
        """
        this = self._coming.popleft()
        answers = self._read(split, *this) if self._next is None else self._next.result()
        self._next = self._thread.submit(self._read, split, *self._coming[0]) if self._coming else None
        places = batch["position_ids"][0].cpu()
        device = batch["tokens"].device
        return TopK(*(part[:, places].transpose(0, 1).to(device) for part in answers))

    def _read(self, split: str, numbers: list[int], tokens: list[int]) -> TopK:
        return self.cache.of_samples(numbers, split, tokens)


def _read(folder: Path, contents: Contents, chunk: Chunk, numbers: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Ids int64, log_probs float32, rest and tokens of some samples of a chunk. Raises UserError where it is damaged."""
    file = folder / chunk.name
    size, length, k = len(chunk.samples), contents.sequence_length, contents.top_k
    shapes = {
        "ids": [size, length, k, contents.id_bytes],
        "log_probs": [size, length, k],
        "rest": [size, length],
        "tokens": [size],
        "crc32": [size],
    }
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            slices: dict[str, Any] = {name: opened.get_slice(name) for name in shapes}
            odd = next((name for name, shape in shapes.items() if slices[name].get_shape() != shape), None)
            if odd:
                raise UserError(f"{file} is damaged: its {odd} are {slices[odd].get_shape()}, not {shapes[odd]}")
            rows = [[slices[name][n - chunk.first : n - chunk.first + 1] for name in shapes] for n in numbers]
    except (OSError, safetensors.SafetensorError) as error:
        pass_on_unless_damage(error)
        raise UserError(f"{file} is damaged ({in_one_line(error)}): make the cache again") from None
    for number, (*of_sample, wanted) in zip(numbers, rows, strict=True):
        if contents.checksum(chunk.split, number, *of_sample) != wanted[0]:
            raise UserError(
                f"{file} is damaged: {chunk.split} sample {number} is not what its checksum says; make the cache again"
            )
    ids, log_probs, rest, tokens, _ = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    wide = np.zeros((*ids.shape[:-1], 4), np.uint8)
    wide[..., : contents.id_bytes] = ids
    return wide.view("<u4")[..., 0].astype(np.int64), log_probs.astype(np.float32), rest, tokens
