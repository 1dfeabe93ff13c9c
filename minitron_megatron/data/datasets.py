"""Samples out of a data folder, and micro-batches of them whose order depends on the seed alone.

    step k, global batch G = 8, micro-batch 2, data-parallel size 2 (r0, r1):
    samples  8k+0 8k+1 | 8k+2 8k+3 | 8k+4 8k+5 | 8k+6 8k+7
             r0, first   r1, first   r0, second  r1, second

The same samples make up step k for any data-parallel size and micro-batch size.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape

Sample = dict[str, torch.Tensor]


class Samples(Protocol):
    """Anything with samples by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """`tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, each [sequence_length]."""
        ...


@dataclass(frozen=True)
class DataFolder:
    """A checked data folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """Digest of its content."""
        return str(self.manifest["digest"])

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return int(self.manifest["results"][split]["tokens"])


def open_data(path: str, split: str, shape: ModelShape, sequence_length: int) -> DataFolder:
    """Check that a data folder can feed a model. Raises UserError before anything heavy starts."""
    folder = DataFolder(Path(path), read_manifest(path))
    results = folder.manifest.get("results", {})
    if split not in results or not (folder.path / f"{split}.idx").is_file():
        raise UserError(f"data.path={path} has no split {split!r}: give the output of launch/prepare_data.py")
    if results["vocab_size"] > shape.vocab_size:
        raise UserError(
            f"data.path={path} was made with a vocabulary of {results['vocab_size']}, the model has {shape.vocab_size}: "
            "prepare the data with this model's tokenizer"
        )
    if sequence_length > shape.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={sequence_length} is above the model's {shape.max_position_embeddings} positions"
        )
    if folder.tokens(split) < sequence_length + 1:
        raise UserError(
            f"data.path={path}: the {split} split has {folder.tokens(split)} tokens, fewer than one sample of "
            f"data.sequence_length={sequence_length}"
        )
    return folder


@dataclass(frozen=True)
class _TokenIds:
    """What Megatron's datasets ask of a tokenizer: ids only, the text is tokenised already."""

    vocab_size: int
    eod: int
    # No id is padding: samples are always full.
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Names the cached index."""
        return {"class": "ids", "vocab_size": self.vocab_size, "eod": self.eod}


def training_samples(folder: DataFolder, split: str, *, sequence_length: int, seed: int, count: int) -> Samples:
    """Megatron's GPTDataset: `count` samples in an order shuffled by the seed, over as many epochs as that takes.

    The index is built once on rank 0, next to the data; the other ranks read it.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    cache = folder.path / "cache"
    if not os.access(folder.path, os.W_OK):
        raise UserError(f"data.path={folder.path} is not writable: Megatron keeps the sample index in {cache}")
    results = folder.manifest["results"]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([str(folder.path / split)], None), None, None],
        path_to_cache=str(cache),
        tokenizer=_TokenIds(results["vocab_size"], results["end_of_document"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [count, None, None], lambda: True, config).build()
    return train


class Windows:
    """Every token of a split once, in consecutive windows; the last is padded and its padding masked."""

    def __init__(self, folder: DataFolder, split: str, sequence_length: int) -> None:
        dtype = np.dtype(folder.manifest["results"]["token_dtype"])
        self.tokens = np.memmap(folder.path / f"{split}.bin", dtype=dtype, mode="r")
        self.length = sequence_length

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.length)

    def __getitem__(self, index: int) -> Sample:
        start = index * self.length
        piece = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
        missing = self.length + 1 - len(piece)
        mask = torch.ones(self.length)
        if missing:
            mask[-missing:] = 0
            piece = torch.cat((piece, piece.new_zeros(missing)))
        return {
            "tokens": piece[:-1],
            "labels": piece[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.length),
        }


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches that one data-parallel rank runs of a range of samples; every rank has as many.

    Where the samples do not fill the last round, sample 0 fills up with `valid` 0 and no loss. `multiple_of` rounds the
    number of micro-batches up (the interleaved pipeline wants multiples of its stages).
    """

    samples: Samples
    numbers: range
    micro_batch_size: int
    data_rank: int
    data_size: int
    multiple_of: int = 1

    def __len__(self) -> int:
        rounds = math.ceil(len(self.numbers) / (self.micro_batch_size * self.data_size))
        return math.ceil(rounds / self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[Sample]:
        for m in range(len(self)):
            first = (m * self.data_size + self.data_rank) * self.micro_batch_size
            places = range(first, first + self.micro_batch_size)
            yield self._batch([self.numbers[p] if p < len(self.numbers) else None for p in places])

    def _batch(self, numbers: list[int | None]) -> Sample:
        rows = [self.samples[0 if n is None else n] for n in numbers]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
        batch["valid"] = torch.tensor([0.0 if n is None else 1.0 for n in numbers])
        batch["loss_mask"] = batch["loss_mask"] * batch["valid"][:, None]
        return batch
