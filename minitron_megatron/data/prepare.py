"""Text to Megatron's indexed datasets (.bin tokens, .idx lengths), split by document into train and validation.

A document's split is decided by a hash of its text and the seed: the same for any number of workers. Memory holds a few
documents for each worker, and the length of every document.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import SHAPE_FILE, TOKENIZER, Output, check_output, load_yaml, output_folder
from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.console import print_table, progress, speaks
from minitron_megatron.data.text import documents, find_files
from minitron_megatron.data.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import command_line, resolved_config
from minitron_megatron.models.shape import ModelShape

SPLITS = ("train", "validation")
# Token ids fit 16 bits below this; Megatron's readers apply the same rule to the vocabulary's size.
UINT16_VOCABULARY = 65500
# A worker's task, and how many per worker wait at once: memory is bounded by these, whatever the corpus.
CHUNK_CHARACTERS, CHUNKS_AHEAD = 200_000, 3


def prepare_data(cfg: PrepareDataConfig) -> None:
    """`launch/prepare_data.py`: text files into a data folder. One process works; others of a torchrun job return."""
    if not speaks():
        return
    if not 0 < cfg.validation_fraction < 1:
        raise UserError(f"validation_fraction={cfg.validation_fraction} must be between 0 and 1")
    files = find_files(_inputs(cfg.input))
    tokenizer_folder = Path(cfg.model.folder("model"))
    tokenizer = load_tokenizer(tokenizer_folder)
    _check_vocabulary(tokenizer_folder, vocabulary_size(tokenizer))
    digests = {"tokenizer": tokenizer_digest(_tokenizer_path(tokenizer_folder)), **{str(f): _stamp(f) for f in files}}
    if cfg.dry_run:
        check_output(cfg.output, config=resolved_config(cfg), inputs=digests, resume=cfg.resume)
        _dry_run(files, cfg)
        return
    with output_folder(
        cfg.output, command=command_line(), config=resolved_config(cfg), inputs=digests, resume=cfg.resume
    ) as out:
        if out.done:
            return
        shutil.copytree(_tokenizer_path(tokenizer_folder), out.path / TOKENIZER)
        _write(cfg, files, out, tokenizer)
        out.results["tokenizer"] = digests["tokenizer"]
    rows = [[split, *out.results[split].values()] for split in SPLITS]
    title = f"{cfg.output}: {out.results['tokens_per_second']:,} tokens/s"
    print_table(title, ["split", "documents", "tokens", "bytes"], rows)


def _inputs(value: Any) -> Any:
    """`input=` with a path, several with commas between them as a list; what is neither is for `find_files` to refuse."""
    return value.split(",") if isinstance(value, str) and "," in value and not Path(value).exists() else value


def _check_vocabulary(folder: Path, size: int) -> None:
    """Raise UserError when the tokenizer has ids that the model beside it does not; a tokenizer alone is fine."""
    if (folder / SHAPE_FILE).is_file():
        known = ModelShape.from_dict(load_yaml(folder / SHAPE_FILE), str(folder / SHAPE_FILE)).vocab_size
    elif (folder / "config.json").is_file():
        try:
            known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{folder / 'config.json'} cannot be read ({error})") from None
    else:
        return
    if isinstance(known, int) and size > known:
        raise UserError(f"model={folder}: its tokenizer has a vocabulary of {size}, the model of {known}")


def _dry_run(files: list[Path], cfg: PrepareDataConfig) -> None:
    """Read and split every document as the real run would, without tokenising. Raises its errors."""
    counts = dict.fromkeys(SPLITS, 0)
    for split, _ in _with_validation(documents(files, cfg.text_key), cfg.validation_fraction, cfg.seed):
        counts[split] += 1
    rows = [["files", len(files)], *([f"{split} documents", count] for split, count in counts.items())]
    print_table("would be tokenised", ["", "count"], rows)


def _tokenizer_path(folder: Path) -> Path:
    return folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder


def _stamp(file: Path) -> str:
    """What tells that an input file has changed, without reading it all."""
    stat = file.stat()
    return f"{stat.st_size} bytes, modified {stat.st_mtime_ns}"


def _write(cfg: PrepareDataConfig, files: list[Path], out: Output, tokenizer: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    began = time.monotonic()
    vocabulary = vocabulary_size(tokenizer)
    dtype = np.uint16 if vocabulary < UINT16_VOCABULARY else np.int32
    builders = {split: IndexedDatasetBuilder(str(out.path / f"{split}.bin"), dtype=dtype) for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    total = sum(f.stat().st_size for f in files)
    with progress("tokenise", total, unit="B") as advance:
        texts = _with_validation(_read(files, cfg.text_key, advance), cfg.validation_fraction, cfg.seed)
        for split, size, ids in _tokenise(texts, cfg):
            builders[split].add_document(ids, [len(ids)])
            for name, more in (("documents", 1), ("tokens", len(ids)), ("bytes", size)):
                counts[split][name] += more
    for split in SPLITS:
        builders[split].finalize(str(out.path / f"{split}.idx"))
    tokens = sum(c["tokens"] for c in counts.values())
    seconds = time.monotonic() - began
    out.results = {
        **counts,
        "vocab_size": vocabulary,
        "token_dtype": np.dtype(dtype).name,
        "end_of_document": tokenizer.eos_token_id,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def _read(files: list[Path], key: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Every document; `advance` is told the bytes of the files, of which compressed ones hold fewer than their text."""
    for file in files:
        left = file.stat().st_size
        for text in documents([file], key):
            step = min(left, len(text.encode()))
            advance(step)
            left -= step
            yield text
        advance(left)


def _with_validation(texts: Iterable[str], fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of split and text, in order. A split that the hash leaves empty gets the last document.

    A single document is cut at the paragraph that leaves about `fraction` of it to validation. Raises UserError when
    there is nothing to split.
    """
    held, found = None, set()
    for text in texts:
        if held is not None:
            split = split_of(held, fraction, seed)
            found.add(split)
            yield split, held
        held = text
    if held is None:
        raise UserError("input= has text with no usable document: every one is empty")
    if not found:
        yield from zip(SPLITS, _cut(held, fraction), strict=True)
    elif len(found) == 1:
        yield next(split for split in SPLITS if split not in found), held
    else:
        yield split_of(held, fraction, seed), held


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """A document in two at a blank line, with text on both sides."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    places = [m.end() for m in re.finditer(r"\n[^\S\n]*\n", text) if start < m.end() < end]
    if not places:
        raise UserError(
            "input= has a single document of one paragraph: a validation split needs at least two documents or paragraphs"
        )
    at = min(places, key=lambda place: abs(place - (1 - fraction) * len(text)))
    return text[:at], text[at:]


def split_of(text: str, fraction: float, seed: int) -> str:
    """The split of a document: a uniform hash of seed and text below `fraction` is validation."""
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


_tokenizer: Any = None


def _start_worker(folder: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(folder)


def _encode(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, int, np.ndarray]]:
    """(split, bytes of text, ids [tokens] int64 with the end-of-document id last) of some documents."""
    encoded = []
    for split, text in pairs:
        ids = _tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        encoded.append((split, len(text.encode()), np.array([*ids, _tokenizer.eos_token_id], dtype=np.int64)))
    return encoded


def _tokenise(texts: Iterable[tuple[str, str]], cfg: PrepareDataConfig) -> Iterator[tuple[str, int, np.ndarray]]:
    """Encoded documents in the order of the texts, by `workers` processes; only so many chunks are on their way."""
    folder = cfg.model.folder("model")
    if cfg.workers == 1:
        _start_worker(folder)
        for pair in texts:
            yield from _encode([pair])
        return
    spawn, waiting = multiprocessing.get_context("spawn"), deque[Future]()
    pool = ProcessPoolExecutor(cfg.workers, spawn, _start_worker, (folder,))
    try:
        for chunk in _chunks(texts):
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) > CHUNKS_AHEAD * cfg.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"a process of workers={cfg.workers} was killed, perhaps for memory: use fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk, size = [], 0
    for pair in texts:
        chunk.append(pair)
        size += len(pair[1])
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
