"""Text to Megatron's indexed datasets (.bin tokens, .idx lengths), split by document into train and validation.

A document's split is decided by a hash of its text and the seed: the same for any number of workers and any file order.
"""

import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import TOKENIZER, Output, output_folder
from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.console import print_table, progress, speaks
from minitron_megatron.data.text import documents, find_files
from minitron_megatron.data.tokenizer import load_tokenizer, tokenizer_digest
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import command_line, resolved_config

SPLITS = ("train", "validation")
# Token ids fit 16 bits below this; Megatron's readers apply the same rule to the vocabulary's size.
UINT16_VOCABULARY = 65500


def prepare_data(cfg: PrepareDataConfig) -> None:
    """`launch/prepare_data.py`: text files into a data folder. One process works; others of a torchrun job return."""
    if not speaks():
        return
    if not 0 < cfg.validation_fraction < 1:
        raise UserError(f"validation_fraction={cfg.validation_fraction} must be between 0 and 1")
    inputs = [cfg.input] if isinstance(cfg.input, str) else list(cfg.input)
    files = find_files(inputs)
    tokenizer_folder = Path(cfg.model.folder("model"))
    tokenizer = load_tokenizer(tokenizer_folder)
    if cfg.dry_run:
        _dry_run(files, cfg.text_key)
        return
    digests = {"tokenizer": tokenizer_digest(_tokenizer_path(tokenizer_folder)), **{str(f): _stamp(f) for f in files}}
    with output_folder(
        cfg.output, command=command_line(), config=resolved_config(cfg), inputs=digests, resume=cfg.resume
    ) as out:
        if out.done:
            return
        shutil.copytree(_tokenizer_path(tokenizer_folder), out.path / TOKENIZER)
        _write(cfg, files, out, tokenizer)
    rows = [[split, out.results[split]["documents"], out.results[split]["tokens"]] for split in SPLITS]
    print_table(f"{cfg.output}: {out.results['tokens_per_second']:,} tokens/s", ["split", "documents", "tokens"], rows)


def _dry_run(files: list[Path], key: str) -> None:
    count = sum(1 for _ in documents(files, key))
    if not count:
        raise UserError("input= has text with no usable document: every one is empty")
    print_table("would be tokenised", ["", "count"], [["files", len(files)], ["documents", count]])


def _tokenizer_path(folder: Path) -> Path:
    return folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder


def _stamp(file: Path) -> str:
    """What tells that an input file has changed, without reading it all."""
    stat = file.stat()
    return f"{stat.st_size} bytes, modified {stat.st_mtime_ns}"


def _write(cfg: PrepareDataConfig, files: list[Path], out: Output, tokenizer: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    began = time.monotonic()
    dtype = np.uint16 if len(tokenizer) < UINT16_VOCABULARY else np.int32
    builders = {split: IndexedDatasetBuilder(str(out.path / f"{split}.bin"), dtype=dtype) for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    total = sum(f.stat().st_size for f in files)
    with progress("tokenise", total, unit="B") as advance:
        texts = _with_validation(documents(files, cfg.text_key), cfg.validation_fraction, cfg.seed)
        for split, size, ids in _tokenise(texts, cfg, len(files)):
            builders[split].add_document(ids, [len(ids)])
            counts[split]["documents"] += 1
            counts[split]["tokens"] += len(ids)
            advance(size)
    if not counts["train"]["documents"]:
        raise UserError(
            "input= has no usable document, or a single one: a validation split needs at least two with text in them"
        )
    for split in SPLITS:
        builders[split].finalize(str(out.path / f"{split}.idx"))
    tokens = sum(c["tokens"] for c in counts.values())
    seconds = time.monotonic() - began
    out.results = {
        **counts,
        "vocab_size": len(tokenizer),
        "token_dtype": np.dtype(dtype).name,
        "end_of_document": tokenizer.eos_token_id,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def _with_validation(texts: Iterable[str], fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of split and text, in order. Where the hash gives none to validation, the last document goes there."""
    held: tuple[str, str] | None = None
    found = False
    for text in texts:
        if held is not None:
            yield held
        held = split_of(text, fraction, seed), text
        found = found or held[0] == "validation"
    if held is not None:
        yield held if found else ("validation", held[1])


def split_of(text: str, fraction: float, seed: int) -> str:
    """The split of a document: a uniform hash of seed and text below `fraction` is validation."""
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode("utf-8", "surrogatepass")).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


_tokenizer: Any = None


def _start_worker(folder: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(folder)


def _encode(pair: tuple[str, str]) -> tuple[str, int, np.ndarray]:
    split, text = pair
    ids = _tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return split, len(text.encode("utf-8", "surrogatepass")), np.array([*ids, _tokenizer.eos_token_id], dtype=np.int64)


def _tokenise(
    texts: Iterator[tuple[str, str]], cfg: PrepareDataConfig, files: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    folder = cfg.model.folder("model")
    if cfg.workers == 1:
        _start_worker(folder)
        yield from map(_encode, texts)
        return
    with multiprocessing.get_context("spawn").Pool(cfg.workers, _start_worker, (folder,)) as pool:
        yield from pool.imap(_encode, texts, chunksize=16)
