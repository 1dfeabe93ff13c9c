"""Samples out of a data folder, and micro-batches of them whose order depends on the seed alone.

    step k, global batch G = 8, micro-batch 2, data-parallel size 2 (r0, r1):
    samples  8k+0 8k+1 | 8k+2 8k+3 | 8k+4 8k+5 | 8k+6 8k+7
             r0, first   r1, first   r0, second  r1, second

The same samples make up step k for any data-parallel size, micro-batch size and length of the run.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

Sample = dict[str, torch.Tensor]
# What Megatron's .idx files begin with.
INDEX_HEADER = b"MMIDIDX\x00\x00"


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
    with open(folder.path / f"{split}.idx", "rb") as index:
        whole = index.read(len(INDEX_HEADER)) == INDEX_HEADER and results.get("token_dtype") in ("uint16", "int32")
    size = (folder.path / f"{split}.bin").stat().st_size
    if not whole or size != results[split].get("tokens", 0) * np.dtype(results["token_dtype"]).itemsize:
        raise UserError(f"data.path={path}: the {split} split is damaged; prepare the data again")
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


class Epochs:
    """Samples over as many epochs as are asked for; which one has number n depends on the seed and on n alone.

        n       0 … E-1                   E … 2E-1                 2E … 3E-1
        sample  order of `epoch` itself   permuted by (seed, 1)    permuted by (seed, 2)

    So a longer run begins with the samples of a shorter one. Megatron's own epochs are shuffled together, in an order
    that changes with their number.
    """

    def __init__(self, epoch: Samples, *, seed: int, count: int) -> None:
        self.epoch, self.seed, self.count = epoch, seed, count
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number, place = divmod(index, len(self.epoch))
        return self.epoch[place if number == 0 else int(self._order(number)[place])]

    def _order(self, number: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != number:
            # RandomState's stream is frozen over releases of numpy: a run resumed after an upgrade keeps its order.
            self._shuffled = number, np.random.RandomState([self.seed, number]).permutation(len(self.epoch))
        return self._shuffled[1]


def training_samples(folder: DataFolder, split: str, *, sequence_length: int, seed: int, count: int) -> Epochs:
    """Megatron's GPTDataset: `count` samples in an order shuffled by the seed, over as many epochs as that takes.

    The index is built once on rank 0, next to the data; the other ranks read it. Every rank must call this. Raises
    UserError on every rank when the index cannot be written.
    """
    from megatron.core import __version__ as megatron_version

    # Megatron names its cached files after the path and the tokenizer, so these belong to the folder's name.
    prefix, results = str((folder.path / split).resolve()), folder.manifest["results"]
    made_of = f"{prefix} {results['vocab_size']} {results['end_of_document']} {megatron_version}"
    name = f"{split}-{sequence_length}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    cache = folder.path / "cache" / name
    problem = None
    if collectives.is_rank_zero() and not cache.is_dir():
        problem = _build_index(folder, prefix, sequence_length, seed, cache)
    problem = collectives.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)
    return Epochs(_one_epoch(folder, prefix, sequence_length, seed, cache), seed=seed, count=count)


def _build_index(folder: DataFolder, prefix: str, sequence_length: int, seed: int, cache: Path) -> str | None:
    """Build the sample index in a folder that is renamed when whole: a killed or a second job cannot spoil it."""
    try:
        cache.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".partial-") as partial:
            _one_epoch(folder, prefix, sequence_length, seed, Path(partial) / "index")
            try:
                os.rename(Path(partial) / "index", cache)
            except OSError:
                # Another job was quicker; its index is the same.
                if not cache.is_dir():
                    raise
    except OSError as error:
        return (
            f"data.path={folder.path}: the sample index cannot be written to {cache.parent} ({error.strerror or error})"
        )
    return None


def _one_epoch(folder: DataFolder, prefix: str, sequence_length: int, seed: int, cache: Path) -> Samples:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    results = folder.manifest["results"]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(cache),
        tokenizer=_TokenIds(results["vocab_size"], results["end_of_document"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(tokens), dtype=np.int32)
    return GPTDataset(tokens, prefix, documents, None, Split.train, config)


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

    Where the samples do not fill the last round, sample 0 fills up with `valid` 0, `number` -1 and no loss. `multiple_of`
    rounds the number of micro-batches up (the interleaved pipeline wants multiples of its stages). With a context-parallel
    group each batch holds this rank's share of every sequence (`on_this_context_rank`).
    """

    samples: Samples
    numbers: range
    micro_batch_size: int
    data_rank: int
    data_size: int
    multiple_of: int = 1
    context_group: Any = None

    @classmethod
    def of_this_rank(cls, samples: Samples, numbers: range, micro_batch_size: int, layout: Layout) -> "MicroBatches":
        """This rank's share in a live layout."""
        from megatron.core import parallel_state as ps

        return cls(
            samples,
            numbers,
            micro_batch_size,
            ps.get_data_parallel_rank(),
            ps.get_data_parallel_world_size(),
            multiple_of=layout.pipeline if layout.virtual_pipeline else 1,
            context_group=ps.get_context_parallel_group() if layout.context > 1 else None,
        )

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
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in _OF_TOKENS}
        batch["valid"] = torch.tensor([0.0 if n is None else 1.0 for n in numbers])
        batch["number"] = torch.tensor([-1 if n is None else n for n in numbers])
        batch["loss_mask"] = batch["loss_mask"] * batch["valid"][:, None]
        return on_this_context_rank(batch, self.context_group)


# What a batch has for every token, [b, s].
_OF_TOKENS = ("tokens", "labels", "loss_mask", "position_ids")


def on_this_context_rank(batch: Sample, group: Any) -> Sample:
    """A context-parallel rank's share of every sequence: chunks r and 2c - 1 - r of 2c, so that causal work is even.

        2 ranks:   | 0 | 1 | 2 | 3 |      rank 0: 0 and 3      rank 1: 1 and 2

    Without a group the batch as it is.
    """
    if group is None:
        return batch
    from megatron.core.utils import get_batch_on_this_cp_rank

    shares = {name: batch[name] for name in _OF_TOKENS}
    return {**batch, **get_batch_on_this_cp_rank(shares, is_hybrid_cp=False, cp_group=group)}
