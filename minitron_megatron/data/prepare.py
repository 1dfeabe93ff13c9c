"""Text to Megatron's indexed datasets (.bin tokens, .idx lengths), split by document into train and validation.

    files ──read, one process──▶ documents ──chunks──▶ workers tokenise ──in order──▶ train.bin, validation.bin
                                                                                 └──▶ journal.json, every few seconds

A document's split is decided by a hash of its text and the seed, and documents are written in the order of the input: the
same bytes for any number of workers. The journal says how far input and output are: a run that was killed goes on from there
when it is started again. Memory holds a few documents for each worker.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitron_megatron.automatic import tokenising_processes
from minitron_megatron.checkpoints.folder import TOKENIZER, Output
from minitron_megatron.checkpoints.stamps import stamp
from minitron_megatron.checkpoints.tokenizer import copy_tokenizer, tokenizer_digest
from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.console import print_table, progress, speaks
from minitron_megatron.data.coverage import Losses
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.indexed import SplitWriter, token_dtype
from minitron_megatron.data.text import documents, find_files, has_rows
from minitron_megatron.data.tokenizer import (
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
    tokenizer_path,
    vocabulary_size,
)
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.first_moments import STATUS_OF_SIGNAL
from minitron_megatron.machine import usable_cores
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.plain_files import read_json

log = logging.getLogger(__name__)
SPLITS = ("train", "validation")
# A worker's task, and how many per worker wait at once: memory is bounded by these, whatever the corpus.
CHUNK_CHARACTERS, CHUNKS_AHEAD = 200_000, 3
JOURNAL = "journal.json"
# A killed run loses at most this much work.
SECONDS_BETWEEN_COMMITS = 15.0


class Piece(NamedTuple):
    """A document: its text, its file's number, and how many of that file's documents are done once it is."""

    text: str
    file: int
    number: int


class Encoded(NamedTuple):
    """A document's ids [tokens], end-of-document last, in the dtype on disk; `size` are the bytes of its text.

    `named`: a special token's string is in the text, which has so many `characters`; so many of them are `lost`, the first of
    which is an `example` (coverage.py).
    """

    split: str
    ids: np.ndarray
    size: int
    file: int
    number: int
    named: bool
    characters: int = 0
    lost: int = 0
    example: str = ""


@dataclass
class Done:
    """How far a run is: `documents` (`bytes` of text) of input file number `file` and all before it are written.

    In `named` documents a special token's string is in the text. Of its `characters` so many are `lost`, first `example`, in file
    number `lost_in`.
    """

    counts: dict[str, dict[str, int]] = field(
        default_factory=lambda: {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    )
    file: int = 0
    documents: int = 0
    bytes: int = 0
    named: int = 0
    seconds: float = 0.0
    characters: int = 0
    lost: int = 0
    example: str = ""
    lost_in: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Done":
        """What a killed run left in its folder; nothing where there was none."""
        journal = folder / JOURNAL
        try:
            return cls(**read_json(journal)) if journal.is_file() else cls()
        except (ValueError, TypeError) as error:
            raise UserError(f"{journal} cannot be read ({in_one_line(error, 200)}): remove {folder}") from None

    def write(self, folder: Path) -> None:
        """Replace the journal, whole or not at all."""
        with open(folder / f"{JOURNAL}.new", "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{JOURNAL}.new", folder / JOURNAL)

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return sum(count["tokens"] for count in self.counts.values())

    def losses(self, files: Sequence[Path]) -> Losses:
        """What the tokenizer could not write of the text in these files."""
        return Losses(self.characters, self.lost, self.example, str(files[self.lost_in]) if self.lost else "")

    def add(self, one: Encoded) -> None:
        """A document was written."""
        self.bytes = one.size + (self.bytes if one.file == self.file else 0)
        self.file, self.documents = one.file, one.number
        self.named += one.named
        if one.lost and not self.lost:
            self.example, self.lost_in = one.example, one.file
        self.characters, self.lost = self.characters + one.characters, self.lost + one.lost
        for name, more in (("documents", 1), ("tokens", len(one.ids)), ("bytes", one.size)):
            self.counts[one.split][name] += more


@dataclass(frozen=True)
class Preparing:
    """Text files that are there, and digests for the manifest."""

    files: list[Path]
    inputs: dict[str, str]


def check_prepare(cfg: PrepareDataConfig) -> Preparing:
    """Text files, tokenizer and output, before transformers is there. Raises UserError."""
    check_fraction(cfg.validation_fraction)
    files = find_inputs(cfg.input)
    if cfg.text_key != PrepareDataConfig.text_key and not any(has_rows(file) for file in files):
        log.info("text_key=%s has no effect: it is for rows, and %s has none", cfg.text_key, files[0])
    path = check_tokenizer(cfg.model.folder("model"))
    inputs = {"tokenizer": tokenizer_digest(path), **{str(f): stamp(f) for f in files}}
    check_command_output(cfg, inputs)
    return Preparing(files, inputs)


def check_fraction(fraction: float) -> None:
    """Raise UserError where a share of the text is none."""
    if not 0 < fraction < 1:
        raise UserError(f"validation_fraction={fraction} must be between 0 and 1")


def check_documents(files: list[Path], cfg: PrepareDataConfig) -> None:
    """Raise UserError where the text has no documents, or a single one that cannot be split; the first two are read."""
    first = islice(_read(files, cfg.text_key, Done()), 2)
    for _ in _with_validation(first, cfg.validation_fraction, cfg.seed):
        pass


def prepare_data(cfg: PrepareDataConfig, checked: Preparing | None = None) -> None:
    """`launch/prepare_data.py`: text files into a data folder. One process works; others of a torchrun job return."""
    if not speaks():
        return
    checked = checked or check_prepare(cfg)
    files, digests = checked.files, checked.inputs
    if cfg.workers is None:
        size = sum(file.stat().st_size for file in files)
        cfg = replace(cfg, workers=tokenising_processes(size, usable_cores()))
    tokenizer_folder = Path(cfg.model.folder("model"))
    tokenizer = load_tokenizer(tokenizer_folder)
    check_vocabulary(tokenizer_folder, tokenizer)
    encoder = Encoder.of(tokenizer, cfg)
    log.info("%s", encoder)
    if cfg.dry_run:
        _dry_run(files, cfg)
        return
    with command_output(cfg, digests, continues=True) as out:
        if out.done:
            return
        copy_tokenizer(tokenizer_path(tokenizer_folder), out.path / TOKENIZER)
        _write(cfg, files, out, encoder)
        out.results["tokenizer"] = digests["tokenizer"]
    if named := out.results["documents_with_special_tokens"]:
        became = "stays text" if encoder.spell else "became the token"
        log.info("%d documents have a special token's string in their text, which %s (special_tokens=)", named, became)
    _say_share({split: out.results[split]["tokens"] for split in SPLITS}, cfg.validation_fraction)
    rows = [[split, *out.results[split].values()] for split in SPLITS]
    title = f"{cfg.output}: {out.results['tokens_per_second']:,} tokens/s"
    print_table(title, ["split", "documents", "tokens", "bytes"], rows)


def _say_share(tokens: dict[str, int], wanted: float) -> None:
    """Warn where whole documents make validation another share of the tokens than was asked for."""
    share = tokens[SPLITS[1]] / max(1, sum(tokens.values()))
    if share > max(2 * wanted, wanted + 0.05) or share < wanted / 4:
        log.warning(
            "validation has %.1f %% of the tokens, and validation_fraction=%g asks for %.1f %%: documents go into a split as a "
            "whole, and there are few, or some are large; give them in smaller ones, or another seed=",
            100 * share,
            wanted,
            100 * wanted,
        )


def find_inputs(value: Any) -> list[Path]:
    """The files that `input=` names. Raises UserError."""
    return find_files(_inputs(value))


def _inputs(value: Any) -> Any:
    """`input=` with a path, several with commas between them as a list; what is neither is for `find_files` to refuse."""
    return value.split(",") if isinstance(value, str) and "," in value and not Path(value).exists() else value


def _dry_run(files: list[Path], cfg: PrepareDataConfig) -> None:
    """Read and split every document as the real run would, without tokenising. Raises its errors."""
    counts = dict.fromkeys(SPLITS, 0)
    for split, _ in _with_validation(_read(files, cfg.text_key, Done()), cfg.validation_fraction, cfg.seed):
        counts[split] += 1
    rows = [["files", len(files)], *([f"{split} documents", count] for split, count in counts.items())]
    print_table("would be tokenised", ["", "count"], rows)


def _write(cfg: PrepareDataConfig, files: list[Path], out: Output, encoder: Encoder) -> None:
    vocabulary = vocabulary_size(encoder.tokenizer)
    dtype, done = token_dtype(vocabulary), Done.read(out.path)
    if done.tokens:
        out.keep = True
        log.info("continuing after %s tokens of an earlier run", f"{done.tokens:,}")
    with ExitStack() as opened:
        writers = {
            split: opened.enter_context(
                SplitWriter(out.path / split, dtype, documents=count["documents"], tokens=count["tokens"])
            )
            for split, count in done.counts.items()
        }
        _tokenise_all(cfg, files, out, writers, done, dtype)
        _say_lost(done.losses(files), out)
        for writer in writers.values():
            writer.finish()
    # The journal first: without it nothing is taken for the start of something.
    (out.path / JOURNAL).unlink(missing_ok=True)
    for writer in writers.values():
        writer.forget()
    out.results = {
        **done.counts,
        "vocab_size": vocabulary,
        "token_dtype": dtype.name,
        **encoder.results(),
        "documents_with_special_tokens": done.named,
        "characters": done.characters,
        "characters_lost": done.lost,
        **({"first_lost": {"text": done.example, "file": str(files[done.lost_in])}} if done.lost else {}),
        "seconds": round(done.seconds, 2),
        "tokens_per_second": round(done.tokens / max(done.seconds, 1e-9)),
    }


def _say_lost(losses: Losses, out: Output) -> None:
    """Warn of what the tokenizer could not write. Raises UserError, and leaves nothing to go on from, where it is most of it."""
    out.keep = out.keep and not losses.most
    losses.say()


def _tokenise_all(
    cfg: PrepareDataConfig,
    files: list[Path],
    out: Output,
    writers: dict[str, SplitWriter],
    done: Done,
    dtype: np.dtype,
) -> None:
    """Write every document after what is done, which is kept up to date."""
    sizes = [file.stat().st_size for file in files]

    def position() -> int:
        """Bytes of the files that are done; compressed ones hold fewer than their text."""
        return sum(sizes[: done.file]) + min(sizes[done.file], done.bytes)

    began = committed = time.monotonic()
    before, shown = done.seconds, position()
    found = {split for split, count in done.counts.items() if count["documents"]}
    already = sum(count["bytes"] for count in done.counts.values())
    pieces = _with_validation(_read(files, cfg.text_key, done), cfg.validation_fraction, cfg.seed, found, already)
    with progress("tokenise", sum(sizes), unit="B", made="tokens", done=shown) as advance:
        for one in _tokenise(pieces, cfg, dtype):
            writers[one.split].add(one.ids)
            done.add(one)
            advance(position() - shown, len(one.ids))
            shown = position()
            # A document that is cut in two has its first half counted as none.
            if one.number and time.monotonic() - committed >= SECONDS_BETWEEN_COMMITS:
                for writer in writers.values():
                    writer.commit()
                committed = time.monotonic()
                done.seconds = before + committed - began
                done.write(out.path)
                out.keep = True
        advance(sum(sizes) - shown)
    done.seconds = before + time.monotonic() - began


def _read(files: list[Path], key: str, done: Done) -> Iterator[Piece]:
    """Every document after what is done."""
    first, skipped = done.file, done.documents
    for number, file in enumerate(files[first:], first):
        for count, text in enumerate(documents(file, key), 1):
            if number > first or count > skipped:
                yield Piece(text, number, count)


def _with_validation(
    pieces: Iterable[Piece], fraction: float, seed: int, found: Iterable[str] = (), before: int = 0
) -> Iterator[tuple[str, Piece]]:
    """Pairs of split and document, in order. A split that the hash leaves empty gets the last document, or the end of it.

    A single document, or a last one that is far more than `fraction` of all, is cut at the paragraph that leaves about so much
    to validation: a few books are a few documents. `found` are the splits that an earlier run has put documents into, `before` is
    how many bytes of text. Raises UserError when there is nothing to split.
    """
    held, found = None, set(found)
    for piece in pieces:
        if held is not None:
            split = split_of(held.text, fraction, seed)
            found.add(split)
            before += len(held.text.encode())
            yield split, held
        held = piece
    if held is None:
        if found:
            return  # the earlier run had got to the end
        raise UserError("input= has text with no usable document: every one is empty")
    size = len(held.text.encode())
    share = fraction * (before + size) / size
    places = _between_paragraphs(held.text)
    if not found and not places:
        raise UserError(
            "input= has a single document of one paragraph: a validation split needs at least two documents or paragraphs"
        )
    if not found or (found == {SPLITS[0]} and places and share < 0.5):
        at = min(places, key=lambda place: abs(place - (1 - share) * len(held.text)))
        yield SPLITS[0], held._replace(text=held.text[:at], number=0)
        yield SPLITS[1], held._replace(text=held.text[at:])
    elif len(found) == 1:
        yield next(split for split in SPLITS if split not in found), held
    else:
        yield split_of(held.text, fraction, seed), held


def _between_paragraphs(text: str) -> list[int]:
    """Where a document can be cut: behind blank lines that have text on both sides."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return [m.end() for m in re.finditer(r"\n[^\S\n]*\n", text) if start < m.end() < end]


def split_of(text: str, fraction: float, seed: int) -> str:
    """The split of a document: a uniform hash of seed and text below `fraction` is validation."""
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


_encoder: Encoder | None = None


def _start_worker(cfg: PrepareDataConfig) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if multiprocessing.parent_process() is not None:
        _leave_signals_to_parent()
    _encoder = Encoder.of(load_tokenizer(cfg.model.folder("model")), cfg)


def _leave_signals_to_parent() -> None:
    """A worker ends when the command does, however that ends, and says nothing of its own."""
    for number in STATUS_OF_SIGNAL:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _encode(chunk: Sequence[tuple[str, Piece]], dtype: np.dtype) -> list[Encoded]:
    encoded = []
    for split, piece in chunk:
        ids, named = _encoder(piece.text), _encoder.names_tokens(piece.text)
        about = len(piece.text.encode()), piece.file, piece.number, named, len(piece.text)
        encoded.append(Encoded(split, np.array(ids, dtype=dtype), *about, *_encoder.coverage.lost(piece.text, ids)))
    return encoded


def _tokenise(pieces: Iterable[tuple[str, Piece]], cfg: PrepareDataConfig, dtype: np.dtype) -> Iterator[Encoded]:
    """Encoded documents in the order of the texts, by `workers` processes; only so many chunks are on their way."""
    if cfg.workers == 1:
        _start_worker(cfg)
        for pair in pieces:
            yield from _encode([pair], dtype)
        return
    spawn, waiting = multiprocessing.get_context("spawn"), deque[Future]()
    pool = ProcessPoolExecutor(cfg.workers, spawn, _start_worker, (cfg,))
    try:
        for chunk in _chunks(pieces):
            waiting.append(pool.submit(_encode, chunk, dtype))
            if len(waiting) > CHUNKS_AHEAD * cfg.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"a process of workers={cfg.workers} was killed, perhaps for memory: use fewer") from None
    except BaseException:
        # What they are at is not wanted any more.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    chunk, size = [], 0
    for pair in pieces:
        chunk.append(pair)
        size += len(pair[1].text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
