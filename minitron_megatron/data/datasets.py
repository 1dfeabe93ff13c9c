"""Samples out of a data folder, and micro-batches of them whose order depends on the seed alone.

    step k, global batch G = 8, micro-batch 2, data-parallel size 2 (r0, r1):
    samples  8k+0 8k+1 | 8k+2 8k+3 | 8k+4 8k+5 | 8k+6 8k+7
             r0, first   r1, first   r0, second  r1, second

The same samples make up step k for any data-parallel size, micro-batch size and length of the run.
"""

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minitron_megatron.checkpoints.folder import read_manifest, verify_files
from minitron_megatron.data.indexed import open_split
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
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
class DataFolder:
    """A checked data folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """Digest of its content."""
        return str(self.manifest["digest"])

    @property
    def results(self) -> dict[str, Any]:
        """Of each split its documents, tokens and bytes; vocab_size, token_dtype, end_of_document, tokenizer."""
        return self.manifest["results"]

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return int(self.results[split]["tokens"])


@dataclass(frozen=True)
class DocumentMasks:
    """How training sees the documents that share a sample (Megatron's reset_attention_mask and eod_mask_loss)."""

    reset_attention: bool = False
    end_of_document: bool = False


@dataclass(frozen=True)
class Data:
    """What `data.path=` names: a folder, or several with the weights (their sum is 1) by which samples come of each."""

    folders: tuple[DataFolder, ...]
    weights: tuple[float, ...]
    masks: DocumentMasks = DocumentMasks()

    @property
    def digest(self) -> str:
        """Digest of the content, and of the weights of a blend."""
        return _joint_digest(self.weights, [folder.digest for folder in self.folders])

    @property
    def end_of_document(self) -> int:
        """The token id that ends each document."""
        return int(self.folders[0].results["end_of_document"])

    def tokens(self, split: str) -> int:
        """Tokens of a split; of a blend, those that come before a folder of it begins again."""
        return int(min(folder.tokens(split) / weight for weight, folder in self._parts()))

    def _parts(self) -> Iterator[tuple[float, DataFolder]]:
        return zip(self.weights, self.folders, strict=True)


def _joint_digest(weights: Sequence[float], digests: list[str]) -> str:
    if len(digests) == 1:
        return digests[0]
    return "sha256:" + hashlib.sha256(f"{list(weights)} {digests}".encode()).hexdigest()


def data_digest(path: Any) -> str:
    """Digest of what `data.path=` names, where there is no model to check it with. Raises UserError."""
    weights, paths = parse_blend(path)
    return _joint_digest(weights, [str(read_manifest(one)["digest"]) for one in paths])


def open_data(
    path: Any, split: str, shape: ModelShape, sequence_length: int, masks: DocumentMasks = DocumentMasks()
) -> Data:
    """Check that data can feed a model. Raises UserError before anything heavy starts.

    Args:
        path: `data.path=`: a folder, or a list `weight, folder, weight, folder, …` as of Megatron's `--data-path`; folders
            without weights weigh what their train split has of tokens.
        split: train or validation.
        shape: of the model.
        sequence_length: tokens of a sample.
        masks: how documents that share a sample see each other.
    """
    if sequence_length > shape.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={sequence_length} is above the model's {shape.max_position_embeddings} positions"
        )
    weights, paths = parse_blend(path)
    folders = tuple(_open_folder(one, split, shape, sequence_length) for one in paths)
    for key in ("tokenizer", "vocab_size", "end_of_document"):
        odd = next((f for f in folders if f.results.get(key) != folders[0].results.get(key)), None)
        if odd is not None:
            raise UserError(
                f"data.path: {folders[0].path} and {odd.path} were made with different tokenizers (their {key} differ): "
                "a blend needs one"
            )
    weights = weights or [folder.tokens("train") for folder in folders]
    return Data(folders, tuple(weight / sum(weights) for weight in weights), masks)


def parse_blend(path: Any) -> tuple[list[float], list[str]]:
    """Weights (none where none are given) and folders of `data.path=`. Raises UserError."""
    if isinstance(path, str):
        return [1.0], [path]
    entries = list(path) if isinstance(path, list | tuple) else []
    if entries and all(isinstance(entry, str) for entry in entries):
        weights, paths = [], entries
    else:
        weights, paths = entries[::2], entries[1::2]
        numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
        if not entries or len(weights) != len(paths) or not numbers or not all(isinstance(p, str) for p in paths):
            raise UserError(
                f"data.path={path} must be a folder, or a list [weight,folder,weight,folder,…] or [folder,folder,…]"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"data.path={path}: weights must be above 0")
    twice = next((one for one in paths if paths.count(one) > 1), None)
    if twice:
        raise UserError(f"data.path names {twice} twice: give it once, with the sum of its weights")
    return [float(weight) for weight in weights], paths


def _open_folder(path: str, split: str, shape: ModelShape, sequence_length: int) -> DataFolder:
    folder = DataFolder(Path(path), read_manifest(path))
    results = folder.manifest.get("results", {})
    if split not in results or not (folder.path / f"{split}.idx").is_file():
        raise UserError(f"data.path={path} has no split {split!r}: give the output of launch/prepare_data.py")
    found = open_split(folder.path / split, f"data.path={path}")
    if found.tokens != results[split].get("tokens") or found.dtype.name != results.get("token_dtype"):
        raise UserError(f"data.path={path}: the {split} split is not what its manifest says; prepare the data again")
    if results["vocab_size"] > shape.vocab_size:
        raise UserError(
            f"data.path={path} was made with a vocabulary of {results['vocab_size']}, the model has {shape.vocab_size}: "
            "prepare the data with this model's tokenizer"
        )
    if found.tokens < sequence_length + 1:
        raise UserError(
            f"data.path={path}: the {split} split has {found.tokens} tokens, fewer than one sample of "
            f"data.sequence_length={sequence_length}"
        )
    found.check_ids(results["vocab_size"], f"data.path={path}, {split}")
    return folder


def verify_data(data: Data) -> None:
    """Read all of the data on rank 0, and compare with digests and vocabulary. Raises UserError on every rank."""
    problem = None
    if collectives.is_rank_zero():
        try:
            for folder in data.folders:
                verify_files(folder.path, folder.digest)
                for split in ("train", "validation"):
                    name = f"data.path={folder.path}, {split}"
                    open_split(folder.path / split, name).check_ids(folder.results["vocab_size"], name, whole=True)
        except UserError as error:
            problem = str(error)
    problem = collectives.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)


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


def document_numbers(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """How many documents end before each token, which ends its own at most: int64 as tokens [s]."""
    ends = (tokens == end_of_document).long()
    return ends.cumsum(0) - ends


def check_enough(data: Data, tokens: int, max_epochs: float) -> None:
    """Raise UserError when training on so many tokens would read the data, or a folder of a blend, more often than allowed."""
    there = data.tokens("train")
    epochs = tokens / max(1, there)
    if epochs > max_epochs:
        paths = ", ".join(str(folder.path) for folder in data.folders)
        raise UserError(
            f"the run takes {tokens:,} tokens, and {paths} has {there:,} to train on ({epochs:.2f} epochs): prepare "
            f"more text, train less, or allow it by data.max_epochs={math.ceil(epochs)}"
        )


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
        _once_on_rank_zero(cache, build)
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
    _once_on_rank_zero(cache, build)
    return build(cache)


def _index_of(folder: DataFolder, split: str, sequence_length: int, seed: int) -> tuple[str, Path]:
    """A split's prefix and the folder of its sample index."""
    # Megatron names its cached files after the path and the tokenizer, so these belong to the folder's name.
    prefix, results = str((folder.path / split).resolve()), folder.results
    made_of = f"{prefix} {results['vocab_size']} {results['end_of_document']} {_MEGATRON}"
    name = f"{split}-{sequence_length}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    return prefix, folder.path / "cache" / name


def _once_on_rank_zero(cache: Path, build: Callable[[Path], object]) -> None:
    """Build an index in a folder that is renamed when whole: a killed or a second job cannot spoil it."""
    problem = None
    if collectives.is_rank_zero() and not cache.is_dir():
        try:
            cache.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".partial-") as unfinished:
                build(Path(unfinished) / "index")
                try:
                    os.rename(Path(unfinished) / "index", cache)
                except OSError:
                    # Another job was quicker; its index is the same.
                    if not cache.is_dir():
                        raise
        except OSError as error:
            why = error.strerror or error
            problem = f"data.path={cache.parent.parent}: the sample index cannot be written to {cache.parent} ({why})"
    problem = collectives.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)


def _dataset_config(
    folder: DataFolder,
    prefix: str,
    sequence_length: int,
    seed: int,
    cache: Path,
    masks: DocumentMasks = DocumentMasks(),
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


class Windows:
    """Every token of a split once, in consecutive windows; the last is padded and its padding masked.

    Of a blend: whole windows of each folder in the proportion of the weights, until one has no more. To measure a folder of a
    blend by itself, or every token of it, name it alone.
    """

    def __init__(self, data: Data, split: str, sequence_length: int) -> None:
        self.length, self.masks, self.end_of_document = sequence_length, data.masks, data.end_of_document
        self.parts = [open_split(folder.path / split, f"data.path={folder.path}").ids for folder in data.folders]
        whole = [(len(part) - 1) // sequence_length for part in self.parts]
        # How many windows have no padding.
        self.whole = whole[0]
        self.order: tuple[np.ndarray, np.ndarray] | None = None
        if len(self.parts) > 1:
            part, window = _blend_order(data.weights, sum(whole))
            exhausted = np.flatnonzero(window >= np.array(whole)[part])
            self.whole = int(exhausted[0]) if len(exhausted) else len(part)
            self.order = part, window

    def __len__(self) -> int:
        return self.whole if self.order else math.ceil((len(self.parts[0]) - 1) / self.length)

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


def _blend_order(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `size` samples of a blend its folder and its number in that folder, as Megatron mixes them."""
    from megatron.core.datasets import helpers

    part, number = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(part, number, np.array(weights), len(weights), size, False)
    return part, number


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
        names = [name for name in (*_OF_TOKENS, "documents") if name in rows[0]]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
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
