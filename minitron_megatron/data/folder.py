"""Data folders, opened and checked: what `data.path=` names, whether it can feed a model, and how much there is.

Samples of them are made in datasets.py. Torch is not imported here.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minitron_megatron.checkpoints.copies import verify_copies
from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.data.indexed import open_split
from minitron_megatron.errors import UserError
from minitron_megatron.lengths import check_positions
from minitron_megatron.models.config_keys import shown
from minitron_megatron.models.shape import SIZES


class DataSizes(Protocol):
    """What data must fit of a model, whatever its architecture: a ModelShape has it."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Its longest sequence."""
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
        """Of each split its documents, tokens and bytes; vocab_size, token_dtype, tokenizer, and what is between documents."""
        return self.manifest["results"]

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return int(self.results[split]["tokens"])


@dataclass(frozen=True)
class DocumentMasks:
    """How training sees the documents that share a sample (Megatron's reset_attention_mask and eod_mask_loss)."""

    reset_attention: bool = False
    end_of_document: bool = False


# Documents of a sample see each other.
AS_THEY_ARE = DocumentMasks()


@dataclass(frozen=True)
class Data:
    """What `data.path=` names: a folder, or several with the weights (their sum is 1) by which samples come of each."""

    folders: tuple[DataFolder, ...]
    weights: tuple[float, ...]
    masks: DocumentMasks = AS_THEY_ARE

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
    digests = [str(read_manifest(one)["digest"]) for one in paths]
    _check_once(paths, digests)
    return _joint_digest(weights, digests)


def open_data(
    path: Any, split: str, shape: DataSizes, sequence_length: int, masks: DocumentMasks = AS_THEY_ARE
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
    check_positions(sequence_length, shape.max_position_embeddings, "the model")
    weights, paths = parse_blend(path)
    folders = tuple(_open_folder(one, split, shape, sequence_length) for one in paths)
    _check_once(paths, [folder.digest for folder in folders])
    for key in ("tokenizer", "vocab_size", "end_of_document", "begin_of_document"):
        odd = next((f for f in folders if f.results.get(key) != folders[0].results.get(key)), None)
        if odd is not None:
            how = "with what opens or ends a document" if key.endswith("_of_document") else "with different tokenizers"
            raise UserError(
                f"data.path: {folders[0].path} and {odd.path} were made {how} (their {key} differ): a blend needs one"
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
    _check_once(paths, paths)
    return [float(weight) for weight in weights], paths


def _check_once(paths: Sequence[str], told_by: Sequence[str]) -> None:
    """Raise UserError where a folder is twice in a blend, `told_by` its path or, of links and copies, its digest."""
    twice = next((i for i, one in enumerate(told_by) if one in told_by[:i]), None)
    if twice is not None:
        first, second = paths[told_by.index(told_by[twice])], paths[twice]
        what = f"{first} twice" if first == second else f"the same data twice, as {first} and as {second}"
        raise UserError(f"data.path names {what}: give it once, with the sum of its weights")


def _open_folder(path: str, split: str, shape: DataSizes, sequence_length: int) -> DataFolder:
    folder = DataFolder(Path(path), read_manifest(path))
    results = folder.manifest.get("results", {})
    if split not in results or not (folder.path / f"{split}.idx").is_file():
        raise UserError(f"data.path={path} has no split {split!r}: give the output of prepare_data")
    _check_results(results, f"data.path={path}")
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
            f"data.sequence_length={sequence_length}: prepare more text, or use data.sequence_length={max(1, found.tokens - 1)}"
        )
    found.check_ids(results["vocab_size"], f"data.path={path}, {split}")
    return folder


def _check_results(results: Mapping[str, Any], where: str) -> None:
    """Raise UserError, which names the key, for numbers of a manifest that cannot be."""
    vocabulary = results.get("vocab_size")
    if type(vocabulary) is not int or not 0 < vocabulary <= SIZES["vocab_size"]:
        raise UserError(f"{where}: vocab_size={shown(vocabulary)} in its manifest is damaged: prepare the data again")
    end = results.get("end_of_document")
    if type(end) is not int or not 0 <= end < vocabulary:
        raise UserError(f"{where}: end_of_document={shown(end)} in its manifest is damaged: prepare the data again")
    for split in ("train", "validation"):
        found = results.get(split, {"tokens": 0})
        tokens = found.get("tokens") if isinstance(found, Mapping) else None
        if type(tokens) is not int or tokens < 0:
            raise UserError(f"{where}: {split} in its manifest has {shown(tokens)} tokens: prepare the data again")


def verify_data(data: Data) -> None:
    """Read all of the data on every node, and compare with digests and vocabulary. Raises UserError on every rank."""
    for folder in data.folders:

        def check_ids(file: str, folder: DataFolder = folder) -> None:
            split = file.removesuffix(".bin")
            if split in ("train", "validation"):
                name = f"data.path={folder.path}, {split}"
                open_split(folder.path / split, name).check_ids(folder.results["vocab_size"], name, whole=True)

        verify_copies(folder.path, folder.digest, check_ids)


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
