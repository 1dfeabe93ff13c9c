"""What a cache of teacher answers is of, and whether it is one for a distillation: by its manifest, without torch (cache.py)."""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.data.folder import Data
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.errors import UserError
from minitron_megatron.models.config_keys import shown
from minitron_megatron.models.shape import LARGEST

SPLITS = ("train", "validation")


_ENDING = ".safetensors"


# Bytes that safetensors' header takes, at most.
_HEADER = 512


@dataclass(frozen=True)
class Contents:
    """What a cache is of, and how it is laid out; the fields of `results` in its manifest.

    Attributes:
        model, data: digests of the teacher and of the data (or blend).
        seed, sequence_length, reset_attention_mask: what else the samples follow from.
        vocab_size: of the teacher, without padding.
        temperature, top_k: of the softmax, and how many tokens of it.
        train, validation: how many samples of each split.
        chunk_samples: samples of a file.
    """

    model: str
    data: str
    seed: int
    sequence_length: int
    reset_attention_mask: bool
    vocab_size: int
    temperature: float
    top_k: int
    train: int
    validation: int
    chunk_samples: int

    def odd(self) -> str | None:
        """A field that is of another kind than it can be, or out of its bounds."""
        whole = ("sequence_length", "vocab_size", "top_k", "train", "validation", "chunk_samples")
        lowest = {"train": 0, "validation": 0}
        for name in whole:
            value = getattr(self, name)
            if type(value) is not int or not lowest.get(name, 1) <= value < 2**62:
                return name
        if type(self.temperature) not in (int, float) or not 0 < self.temperature <= LARGEST:
            return "temperature"
        kinds = {"model": str, "data": str, "seed": int, "reset_attention_mask": bool}
        return next((name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)), None)

    @property
    def id_bytes(self) -> int:
        """Bytes of a token id."""
        return max(1, ((self.vocab_size - 1).bit_length() + 7) // 8)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, give or take their headers."""
        of_token = self.top_k * (self.id_bytes + 2) + 4
        return (self.train + self.validation) * (self.sequence_length * of_token + 8) + self.files * _HEADER

    @property
    def files(self) -> int:
        """How many."""
        return sum(math.ceil(getattr(self, split) / self.chunk_samples) for split in SPLITS)

    def chunks(self) -> Iterator["Chunk"]:
        """Every file, in order."""
        for split in SPLITS:
            for first in range(0, getattr(self, split), self.chunk_samples):
                yield self.chunk_of(split, first)

    def chunk_of(self, split: str, sample: int) -> "Chunk":
        """The file that a sample is in."""
        first = sample // self.chunk_samples * self.chunk_samples
        return Chunk(split, first, min(first + self.chunk_samples, getattr(self, split)))

    def checksum(self, split: str, sample: int, *parts: np.ndarray) -> int:
        """CRC-32 of a sample's bytes, begun with what it is a sample of."""
        value = zlib.crc32(f"{json.dumps(asdict(self), sort_keys=True)} {split} {sample}".encode())
        for part in parts:
            value = zlib.crc32(np.ascontiguousarray(part), value)
        return value


@dataclass(frozen=True)
class Chunk:
    """A file with the samples first … last - 1 of a split."""

    split: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """Its file."""
        return f"{self.split}-{self.first:09d}{_ENDING}"

    @property
    def samples(self) -> range:
        """Numbers of its samples."""
        return range(self.first, self.last)


class CacheFolder:
    """A whole cache: what it is of, and whether it is one for a distillation. `Cache` (cache.py) reads it."""

    def __init__(self, path: Path, contents: Contents, digest: str) -> None:
        self.path, self.contents, self.digest = path, contents, digest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Check that a folder is a cache and that its files are there in their sizes. Raises UserError."""
        manifest = read_manifest(path)
        results, names = manifest.get("results"), [f.name for f in fields(Contents)]
        if not isinstance(results, dict) or not set(names) <= results.keys():
            made = manifest.get("command", "another command")
            raise UserError(f"{path} is not a teacher cache (it was made by {made}): give the output of cache_teacher")
        contents = Contents(**{name: results[name] for name in names})
        odd = contents.odd()
        if odd or contents.files > len(manifest["files"]):
            what = f"{odd}={shown(getattr(contents, odd))}" if odd else "its number of samples"
            raise UserError(f"{path} is damaged ({what} in its manifest cannot be): make the cache again")
        missing = next((c.name for c in contents.chunks() if c.name not in manifest["files"]), None)
        if missing:
            raise UserError(f"{path}/{missing} is missing: the cache is damaged; make it again")
        return cls(Path(path), contents, manifest["digest"])

    def check(
        self,
        *,
        data: Data,
        seed: int,
        sequence_length: int,
        vocab_size: int,
        how: Divergence,
        train: int,
        validation: int,
        teacher: str | None = None,
    ) -> None:
        """Raise UserError unless this is a cache for a distillation, before anything heavy starts.

        Args:
            data, seed, sequence_length: of the distillation; what its samples follow from.
            vocab_size: of the student.
            how: its loss.
            train, validation: how many samples of each split it takes.
            teacher: digest of the teacher, where one is given.
        """
        name, has = f"distill.cache={self.path}", self.contents
        if how.kind != "topk_kl":
            raise UserError(f"{name} holds the top {has.top_k} log probabilities: give distill.loss=topk_kl")
        if has.data != data.digest:
            raise UserError(f"{name} was made of other data than data.path=: make the cache of the same")
        if teacher is not None and has.model != teacher:
            raise UserError(
                f"{name} was made with another teacher than teacher=: leave it out, or make the cache again"
            )
        options = {
            "seed": (has.seed, seed),
            "data.sequence_length": (has.sequence_length, sequence_length),
            "data.reset_attention_mask": (has.reset_attention_mask, data.masks.reset_attention),
            "a vocabulary": (has.vocab_size, vocab_size),
            "distill.temperature": (has.temperature, how.temperature),
            "distill.top_k": (has.top_k, how.top_k),
        }
        for option, (theirs, ours) in options.items():
            if theirs != ours:
                raise UserError(f"{name} was made with {option}={theirs}, this run has {ours}: they must be the same")
        for split, needed in (("train", train), ("validation", validation)):
            if needed > getattr(has, split):
                raise UserError(
                    f"{name} has {getattr(has, split)} {split} samples, this run takes {needed}: make a longer cache"
                )
