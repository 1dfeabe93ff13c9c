"""Samples out of a data folder, and micro-batches of them whose order depends on the seed alone.

    step k, global batch G = 8, micro-batch 2, data-parallel size 2 (r0, r1):
    samples  8k+0 8k+1 | 8k+2 8k+3 | 8k+4 8k+5 | 8k+6 8k+7
             r0, first   r1, first   r0, second  r1, second

The same samples make up step k for any data-parallel size, micro-batch size and length of the run.
"""

import hashlib
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.data.folder import AS_THEY_ARE, Data, DataFolder, DocumentMasks
from minitron_megatron.data.questions import Request
from minitron_megatron.data.sample_index import keep_index
from minitron_megatron.data.windows import WindowPlan
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

Sample = dict[str, torch.Tensor]
log = logging.getLogger(__name__)
# Not megatron.core.__version__: that ends in the commit of whatever repository is around, which may change during a job.
_MEGATRON = version("megatron-core")


class Samples(Protocol):
    """Anything with samples by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """`tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, each [sequence_length]."""
        ...


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

    @property
    def index_split(self) -> Any:
        """For Megatron's blends: all they mix is of one split."""
        from megatron.core.datasets.utils import Split

        return Split.train

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Names the cached index of a blend."""
        return {"class": "Epochs", "seed": self.seed, "samples": len(self.epoch)}

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


class Documents:
    """Samples with `documents` [sequence_length] int64: the number of each token's document, from 0, in its sample."""

    def __init__(self, samples: Samples, end_of_document: int) -> None:
        self.samples, self.end_of_document = samples, end_of_document

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return {**sample, "documents": document_numbers(sample["tokens"], self.end_of_document)}


def token_checksum(tokens: torch.Tensor) -> int:
    """CRC-32 of a sample's tokens [s]: what is kept of a sample elsewhere, by its number, belongs to these."""
    return zlib.crc32(np.ascontiguousarray(tokens, "<i8"))


def document_numbers(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """How many documents end before each token, which ends its own at most: int64 as tokens [s]."""
    ends = (tokens == end_of_document).long()
    return ends.cumsum(0) - ends


def training_samples(data: Data, split: str, *, sequence_length: int, seed: int, count: int) -> Samples:
    """`count` samples in an order shuffled by the seed, over as many epochs as that takes; n depends on seed and n alone.

    A folder is Megatron's GPTDataset. A blend is Megatron's BlendedDataset: each sample comes of the folder that is furthest
    behind its weight, so any first n samples have w·n of a folder, give or take one or so, however long the run is.

    Indices are built once on rank 0, next to the data; the other ranks wait and read them. Every rank must call this. Raises
    UserError on every rank when an index cannot be written.
    """
    parts = [(folder, *_index_of(folder, split, sequence_length, seed)) for folder in data.folders]
    for folder, prefix, cache in parts:
        build = partial(_one_epoch, folder, prefix, sequence_length, seed, data.masks)
        check_copies(files=keep_index(cache, build))
    epochs = [
        Epochs(_one_epoch(folder, prefix, sequence_length, seed, data.masks, cache), seed=seed, count=count)
        for folder, prefix, cache in parts
    ]
    samples: Samples = epochs[0] if len(epochs) == 1 else _blended(data, epochs, parts[0][2].parent, count)
    taken = [count] if len(epochs) == 1 else np.bincount(samples.dataset_index, minlength=len(epochs)).tolist()
    for folder, epoch, number in zip(data.folders, epochs, taken, strict=True):
        if number > len(epoch.epoch) and collectives.is_rank_zero():
            rounds = number / len(epoch.epoch)
            log.warning("%s: %d samples are %.1f epochs of its %d", folder.path, number, rounds, len(epoch.epoch))
    return Documents(samples, data.end_of_document) if data.masks.reset_attention else samples


def _blended(data: Data, epochs: list[Epochs], caches: Path, count: int) -> Samples:
    """Megatron's BlendedDataset of the folders' epochs."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    def build(cache: Path) -> Samples:
        return BlendedDataset(epochs, list(data.weights), count, _dataset_config(data.folders[0], "", 1, 0, cache))

    made_of = f"{[epoch.unique_identifiers for epoch in epochs]} {data.weights} {_MEGATRON}"
    cache = caches / f"blend-{count}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    check_copies(files=keep_index(cache, build))
    return build(cache)


def _index_of(folder: DataFolder, split: str, sequence_length: int, seed: int) -> tuple[str, Path]:
    """A split's prefix and the folder of its sample index."""
    # Megatron names its cached files after the path and the tokenizer, so these belong to the folder's name; by the digest an
    # index is not taken for that of other data, which were copied over these.
    prefix, results = str((folder.path / split).resolve()), folder.results
    made_of = f"{prefix} {folder.digest} {results['vocab_size']} {results['end_of_document']} {_MEGATRON}"
    name = f"{split}-{sequence_length}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    return prefix, folder.path / "cache" / name


def _dataset_config(
    folder: DataFolder,
    prefix: str,
    sequence_length: int,
    seed: int,
    cache: Path,
    masks: DocumentMasks = AS_THEY_ARE,
) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    results = folder.results
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(cache),
        tokenizer=_TokenIds(results["vocab_size"], results["end_of_document"]),
        # Rotary positions are relative: where attention is reset, a document's own are right as they are.
        reset_position_ids=False,
        # The mask is made on the device (models/forward.py): here it would be sequence² values a sample.
        reset_attention_mask=False,
        eod_mask_loss=masks.end_of_document,
        create_attention_mask=False,
    )


def _one_epoch(
    folder: DataFolder, prefix: str, sequence_length: int, seed: int, masks: DocumentMasks, cache: Path
) -> Samples:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    config = _dataset_config(folder, prefix, sequence_length, seed, cache, masks)
    tokens = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(tokens), dtype=np.int32)
    return GPTDataset(tokens, prefix, documents, None, Split.train, config)


class Windows(WindowPlan):
    """The windows of a split as samples; padding has no loss."""

    def __getitem__(self, index: int) -> Sample:
        part, window = (int(order[index]) for order in self.order) if self.order else (0, index)
        start = window * self.length
        piece = torch.from_numpy(self.parts[part][start : start + self.length + 1].astype(np.int64))
        missing = self.length + 1 - len(piece)
        mask = torch.ones(self.length)
        if missing:
            mask[-missing:] = 0
            piece = torch.cat((piece, piece.new_zeros(missing)))
        tokens = piece[:-1]
        if self.masks.end_of_document:
            mask[tokens == self.end_of_document] = 0
        sample = {
            "tokens": tokens,
            "labels": piece[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.length),
        }
        if self.masks.reset_attention:
            sample["documents"] = document_numbers(tokens, self.end_of_document)
        return sample


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches that one data-parallel rank runs of a range of samples; every rank has as many.

    Where the samples do not fill the last round, sample 0 fills up with `valid` 0, `number` -1 and no loss. `checksum` is that
    of each whole sample's tokens. `multiple_of`
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
        names = [name for name in (*_OF_TOKENS, "documents") if name in rows[0]]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
        batch["valid"] = torch.tensor([0.0 if n is None else 1.0 for n in numbers])
        batch["number"] = torch.tensor([-1 if n is None else n for n in numbers])
        batch["checksum"] = torch.tensor([token_checksum(row["tokens"]) for row in rows])
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


class RequestSamples:
    """Requests as samples of one length: labels are the next tokens, and the loss counts on the scored ones only."""

    def __init__(self, requests: Sequence[Request], length: int) -> None:
        self.requests, self.length = requests, length

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> Sample:
        request = self.requests[index]
        tokens = torch.zeros(self.length + 1, dtype=torch.int64)
        last = len(request.tokens) - 1
        tokens[: last + 1] = torch.tensor(request.tokens)
        mask = torch.zeros(self.length)
        mask[last - request.scored : last] = 1
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.length),
        }
