"""The work of prepare_data without a tokenizer: what the bar shows, when work is kept, and what the manifest says of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.data import prepare
from minitron_megatron.data.prepare import SPLITS, Done, Encoded

DTYPE = np.dtype(np.uint16)


class Writer:
    """A split that notes what is asked of it."""

    def __init__(self, name: str, did: list) -> None:
        self.name, self.did = name, did

    def add(self, ids):
        self.did.append((self.name, len(ids)))

    def commit(self):
        self.did.append((self.name, "commit"))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """`work(documents, done)`: what is done with documents of (split, tokens, bytes, file, number, second), bar and output."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, size in zip(files, (100, 60), strict=True):
        file.write_text("x" * size)
    now, bar, asked = [1000.0], [], []

    class Bar:
        def __init__(self, description, total, **more):
            bar.append((description, total, more))

        def __enter__(self):
            return lambda n, made=0: bar.append((n, made))

        def __exit__(self, *_):
            return None

    def start(documents, done):
        def encoded(pieces, cfg, dtype):
            for *one, second in documents:
                now[0] = 1000.0 + second
                yield Encoded(one[0], np.zeros(one[1]), *one[2:], False)

        monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(prepare, "progress", Bar)
        monkeypatch.setattr(prepare, "_tokenise", encoded)
        monkeypatch.setattr(prepare, "_with_validation", lambda *given: asked.append(given))
        did = []
        out = SimpleNamespace(path=tmp_path, keep=False)
        cfg = PrepareDataConfig(output="o", seed=5, validation_fraction=0.25)
        writers = {split: Writer(split, did) for split in SPLITS}
        prepare._tokenise_all(cfg, files, out, writers, done, DTYPE)
        return did, bar, out, asked

    return start


def test_the_bar_is_of_the_bytes_of_the_files_and_ends_at_all_of_them(work, tmp_path):
    """A document may be larger than its compressed file."""
    documents = [("train", 3, 40, 0, 1, 1), ("validation", 4, 500, 0, 2, 2), ("train", 5, 20, 1, 1, 3)]
    done = Done()
    did, (begun, *moved), out, asked = work(documents, done)
    assert begun == ("tokenise", 160, {"unit": "B", "made": "tokens", "done": 0})
    assert moved == [(40, 3), (60, 4), (20, 5), (40, 0)] and did == [("train", 3), ("validation", 4), ("train", 5)]
    assert not out.keep and not (tmp_path / prepare.JOURNAL).exists() and done.seconds == 3.0
    ((_, fraction, seed, found, before),) = asked
    assert (fraction, seed, found, before) == (0.25, 5, set(), 0)


def test_a_run_goes_on_with_the_bar_the_seconds_and_the_splits_of_before(work):
    counts = {
        "train": {"documents": 2, "tokens": 9, "bytes": 120},
        "validation": {"documents": 0, "tokens": 0, "bytes": 0},
    }
    done = Done(counts, file=1, documents=1, bytes=30, seconds=7.0)
    _, (begun, *moved), _, asked = work([("train", 3, 20, 1, 2, 4)], done)
    assert begun[2]["done"] == 130 and moved == [(20, 3), (10, 0)] and done.seconds == 11.0
    assert asked[0][3:] == ({"train"}, 120)


def test_work_is_kept_every_15_seconds_behind_whole_documents(work, tmp_path):
    """Of a document that is cut in two the first half is none."""
    documents = [
        ("train", 1, 1, 0, 1, 14.9), ("train", 1, 1, 0, 2, 15.0), ("train", 1, 1, 0, 3, 29.9),
        ("train", 1, 1, 0, 0, 30.0), ("validation", 1, 1, 0, 4, 31.0), ("train", 1, 1, 1, 1, 45.9),
    ]  # fmt: skip
    done = Done(seconds=2.0)
    did, _, out, _ = work(documents, done)
    kept = [("train", "commit"), ("validation", "commit")]
    one = ("train", 1)
    assert did == [one, one, *kept, one, one, ("validation", 1), *kept, one]
    journal = Done.read(tmp_path)
    assert out.keep and (journal.documents, journal.seconds, journal.tokens) == (4, 33.0, 5)
    assert done.seconds == pytest.approx(47.9)


def test_results_are_of_what_was_written_and_how_fast(tmp_path, monkeypatch):
    """Nothing but tokens and indices is left."""

    def tokenise(cfg, files, out, writers, done, dtype):
        for split, documents in (("train", 2), ("validation", 1)):
            for n in range(documents):
                writers[split].add(np.arange(5, dtype=dtype))
                done.add(Encoded(split, np.arange(5), 10, 0, n + 1, n == 1))
        done.seconds = 0.128
        done.write(out.path)

    monkeypatch.setattr(prepare, "_tokenise_all", tokenise)
    monkeypatch.setattr(prepare, "vocabulary_size", lambda tokenizer: 65500)
    encoder = SimpleNamespace(tokenizer=None, results=lambda: {"end_of_document": 3})
    out = SimpleNamespace(path=tmp_path, keep=False)
    prepare._write(PrepareDataConfig(output="o"), [], out, encoder)
    assert out.results == {
        "train": {"documents": 2, "tokens": 10, "bytes": 20},
        "validation": {"documents": 1, "tokens": 5, "bytes": 10},
        "vocab_size": 65500,
        "token_dtype": "int32",
        "end_of_document": 3,
        "documents_with_special_tokens": 1,
        "characters": 0,
        "characters_lost": 0,
        "seconds": 0.13,
        "tokens_per_second": round(15 / 0.128),
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"{s}.{end}" for s in SPLITS for end in ("bin", "idx")}
    assert not out.keep


def test_a_dry_run_counts_documents_by_their_split(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(prepare, "print_table", lambda title, columns, rows: shown.extend(rows))
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(40)))
    prepare._dry_run([file], PrepareDataConfig(output="o", validation_fraction=0.3, seed=5))
    splits = [prepare.split_of(str(n), 0.3, 5) for n in range(40)]
    wanted = [
        ["files", 1],
        ["train documents", splits.count("train")],
        ["validation documents", splits.count("validation")],
    ]
    assert shown == wanted


def test_text_that_is_small_is_tokenised_by_one_process(tmp_path, monkeypatch):
    """As many as the bytes of all files give work to, unless it is said how many."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, size in zip(files, (7, 5), strict=True):
        file.write_text("x" * size)
    asked, used = [], []
    monkeypatch.setattr(prepare, "tokenising_processes", lambda size, cores: asked.append((size, cores)) or 3)
    monkeypatch.setattr(prepare, "usable_cores", lambda: 8)
    monkeypatch.setattr(prepare, "load_tokenizer", lambda folder: "a tokenizer")
    monkeypatch.setattr(prepare, "check_vocabulary", lambda folder, tokenizer: used.append((folder, tokenizer)))
    monkeypatch.setattr(prepare.Encoder, "of", lambda tokenizer, cfg: used.append(cfg.workers))
    monkeypatch.setattr(prepare, "_dry_run", lambda files, cfg: used.append(files))
    cfg = PrepareDataConfig(output="o", dry_run=True)
    cfg.model.path = "m"
    for workers in (None, 2):
        cfg.workers = workers
        prepare.prepare_data(cfg, prepare.Preparing(files, {}))
    assert asked == [(12, 8)]
    assert used == [(Path("m"), "a tokenizer"), 3, files, (Path("m"), "a tokenizer"), 2, files]
