"""Text to tokens and back, splits, and an order of samples that depends on the seed alone."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import AdoptDataConfig, PrepareDataConfig
from minitron_megatron.data import prepare as preparing
from minitron_megatron.data.adopt import adopt_data
from minitron_megatron.data.datasets import MicroBatches, Windows, training_samples
from minitron_megatron.data.folder import DocumentMasks, data_digest, open_data, verify_data
from minitron_megatron.data.indexed import SplitWriter
from minitron_megatron.data.prepare import Piece, _with_validation, prepare_data, split_of
from minitron_megatron.data.text import documents, find_files
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from tests.tiny import data_folder, hf_model, imported, model_option, save_hf

LAUNCH = str(Path(__file__).parent.parent / "launch" / "prepare_data.py")
DOCUMENTS = [f"Document {i}: {'words and more words ' * (i % 7 + 1)}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return imported(hf_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, model):
    return data_folder(tmp_path_factory.mktemp("data"), model)


def jsonl(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


def prepare(model, source, output, **options):
    options = {"validation_fraction": 0.25, **options}
    prepare_data(PrepareDataConfig(input=str(source), model=model_option(model), output=str(output), **options))
    return output


def read_documents(path, split):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(path / split))
    return [np.array(dataset[i]) for i in range(len(dataset))]


def test_reading_back_is_tokenising_each_document(model, tmp_path):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    out = prepare(model, tmp_path / "in.jsonl", tmp_path / "out")
    tokenizer = load_tokenizer(model)
    for split in ("train", "validation"):
        wanted = [text for text in DOCUMENTS if split_of(text, 0.25, 1234) == split]
        found = read_documents(out, split)
        assert len(found) == len(wanted) > 0
        for ids, text in zip(found, wanted, strict=True):
            assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_bytes_for_any_number_of_workers(model, tmp_path, workers, monkeypatch):
    # Chunks of a few documents, so that every worker has several and the queue is full at times.
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 100)
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    one = prepare(model, tmp_path / "in.jsonl", tmp_path / "one")
    many = prepare(model, tmp_path / "in.jsonl", tmp_path / "many", workers=workers)
    for file in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (one / file).read_bytes() == (many / file).read_bytes()


def zstd(text):
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


def as_parquet(columns):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_after(documents, monkeypatch):
    """Let the next run die once so many documents have been written."""
    added = SplitWriter.add
    count = 0

    def add(writer, ids):
        nonlocal count
        if count == documents:
            raise Killed
        count += 1
        added(writer, ids)

    monkeypatch.setattr(SplitWriter, "add", add)


@pytest.mark.parametrize("kills", [(0,), (1,), (25,), (39,), (3, 20), (39, 0)])
def test_a_killed_run_continues_to_the_same_bytes(model, tmp_path, monkeypatch, kills):
    (tmp_path / "in").mkdir()
    for name, part in (("a.jsonl", DOCUMENTS[:15]), ("b.jsonl", [""]), ("c.jsonl", DOCUMENTS[15:])):
        (tmp_path / "in" / name).write_text(jsonl(part))
    whole = prepare(model, tmp_path / "in", tmp_path / "whole")
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_COMMITS", 0.0)
    for done in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(done, patch)
            prepare(model, tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    tokenised = []
    encode = preparing._encode
    monkeypatch.setattr(preparing, "_encode", lambda chunk, dtype: tokenised.extend(chunk) or encode(chunk, dtype))
    prepare(model, tmp_path / "in", tmp_path / "out")
    assert len(tokenised) == len(DOCUMENTS) - sum(kills)
    assert read_manifest(whole)["digest"] == read_manifest(tmp_path / "out")["digest"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in whole.iterdir()}


def test_a_killed_run_with_one_document_begins_again(model, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i} of some words." for i in range(20)))
    whole = prepare(model, tmp_path / "book.txt", tmp_path / "whole")
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_COMMITS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(1, patch)
        prepare(model, tmp_path / "book.txt", tmp_path / "out")
    out = prepare(model, tmp_path / "book.txt", tmp_path / "out")
    assert read_manifest(whole)["digest"] == read_manifest(out)["digest"]


def test_what_was_killed_with_other_options_is_neither_continued_nor_emptied(model, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    whole = prepare(model, tmp_path / "in.jsonl", tmp_path / "whole", seed=1)
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_COMMITS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(20, patch)
        prepare(model, tmp_path / "in.jsonl", tmp_path / "out", seed=1)
    left = {path.name: path.read_bytes() for path in (tmp_path / ".out.partial").glob("*.*")}
    with pytest.raises(UserError, match=r"out is unfinished, and was begun with seed=1, not 2: give the same to go on"):
        prepare(model, tmp_path / "in.jsonl", tmp_path / "out", seed=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / ".out.partial").glob("*.*")} == left
    out = prepare(model, tmp_path / "in.jsonl", tmp_path / "out", seed=1)
    assert read_manifest(whole)["digest"] == read_manifest(out)["digest"]


@pytest.mark.slow
def test_a_run_that_is_killed_from_outside_continues_with_more_workers(model, tmp_path):
    (tmp_path / "in.jsonl").write_text(jsonl([f"{i} " + "some words " * 60 for i in range(6000)]))
    out = tmp_path / "out"
    words = [f"input={tmp_path / 'in.jsonl'}", f"model={model}", f"output={out}", "validation_fraction=0.25"]
    often = "import minitron_megatron.data.prepare as p; p.SECONDS_BETWEEN_COMMITS = 0.05"
    run = f"{often}\nimport runpy, sys; sys.argv[0] = {LAUNCH!r}; runpy.run_path({LAUNCH!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", run, *words], stdout=subprocess.DEVNULL)
    journal = tmp_path / ".out.partial" / preparing.JOURNAL
    while not journal.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < json.loads(journal.read_text())["documents"] < 6000
    whole = prepare(model, tmp_path / "in.jsonl", tmp_path / "whole")
    assert (
        read_manifest(prepare(model, tmp_path / "in.jsonl", out, workers=2))["digest"] == read_manifest(whole)["digest"]
    )


def test_every_format_gives_the_same_tokens(model, tmp_path):
    text = jsonl(DOCUMENTS)
    (tmp_path / "plain").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "plain" / f"{i:02d}.txt").write_text(document)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    # Two frames one after the other, as parallel compressors write.
    half = text.index("\n", len(text) // 2) + 1
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstd(part) for part in (text[:half], text[half:])))
    parquet.write_table(pyarrow.table({"id": range(40), "text": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=7)
    sources = ("plain", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet")
    outs = [prepare(model, tmp_path / name, tmp_path / f"{name}-out") for name in sources]
    assert len({(out / "train.bin").read_bytes() for out in outs}) == 1


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_no_split_is_empty_and_no_document_is_lost(count, fraction):
    for seed in range(8):
        pieces = [Piece(text, 0, i) for i, text in enumerate(DOCUMENTS[:count], 1)]
        pairs = list(_with_validation(pieces, fraction, seed))
        assert [piece for _, piece in pairs] == pieces
        assert {split for split, _ in pairs} == {"train", "validation"}


def test_a_single_document_is_cut_between_paragraphs(model, tmp_path):
    text = "\n\n".join(f"Paragraph {i} of some words." for i in range(20))
    (tmp_path / "book.txt").write_text(text)
    out = prepare(model, tmp_path / "book.txt", tmp_path / "out")
    tokenizer = load_tokenizer(model)
    pieces = [tokenizer.decode(read_documents(out, split)[0][:-1]) for split in ("train", "validation")]
    assert "".join(pieces) == text and pieces[1].startswith("Paragraph")
    assert 0.2 < len(pieces[1]) / len(text) < 0.3


def test_a_last_document_that_is_large_is_cut_where_no_other_is_for_validation():
    book = "\n\n".join(f"Paragraph {i} of some words, éà." for i in range(400))
    for others in (1, 3):
        pieces = [Piece(f"{i} {book}", 0, i) for i in range(1, others + 2)]
        seed = next(s for s in range(999) if all(split_of(p.text, 0.05, s) == "train" for p in pieces[:-1]))
        pairs = list(_with_validation(pieces, 0.05, seed))
        assert [split for split, _ in pairs] == ["train"] * (others + 1) + ["validation"]
        assert "".join(piece.text for _, piece in pairs) == "".join(piece.text for piece in pieces)
        sizes = [len(piece.text.encode()) for _, piece in pairs]
        assert sizes[-1] / sum(sizes) == pytest.approx(0.05, abs=0.005)
        # The same after a stop behind the first document.
        again = list(_with_validation(pieces[1:], 0.05, seed, {"train"}, len(pieces[0].text.encode())))
        assert again == pairs[1:]


def test_a_share_that_few_documents_miss_is_said(model, tmp_path, caplog):
    (tmp_path / "two.jsonl").write_text(jsonl(["one paragraph of words " * 50, "and another one here " * 50]))
    prepare(model, tmp_path / "two.jsonl", tmp_path / "out")
    assert "validation_fraction=" in caplog.text and "% of the tokens" in caplog.text


def test_inputs_by_comma_and_by_list_are_the_same(model, tmp_path):
    names = [str(tmp_path / f"{i}.jsonl") for i in range(2)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(jsonl(DOCUMENTS[i::2]))
    by_list = tmp_path / "list"
    prepare_data(PrepareDataConfig(input=names, model=model_option(model), output=str(by_list)))
    prepare_data(PrepareDataConfig(input=",".join(names), model=model_option(model), output=str(tmp_path / "comma")))
    assert (by_list / "train.bin").read_bytes() == (tmp_path / "comma" / "train.bin").read_bytes()


def test_a_pattern_is_what_it_matches_in_sorted_order(model, tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("b.jsonl", "a.jsonl", "c.json", "more/d.jsonl", "odd[1].jsonl")):
        (folder / name).write_text(jsonl(DOCUMENTS[i::5]))

    def found(pattern):
        return [path.relative_to(folder).as_posix() for path in find_files(str(folder / pattern))]

    assert found("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("*.jsonl") == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    assert found("**/d.jsonl") == found("mor?") == ["more/d.jsonl"]
    # A file of that very name is meant first.
    assert found("odd[1].jsonl") == ["odd[1].jsonl"]
    listed = prepare(model, folder / "a.jsonl", tmp_path / "listed")
    assert (prepare(model, folder / "a*.jsonl", tmp_path / "by") / "train.bin").read_bytes() == (
        listed / "train.bin"
    ).read_bytes()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("texts/*.jsnol", r"input=texts/\*\.jsnol matches no file: look at what is in texts$"),
        ("tex?s/nowhere/a.jsonl", r"matches no file: look at what is in \.$"),
        ("texts/*", r"input=texts/b\.csv does not end in one of"),
        (["texts/a.jsonl", "texts/*.jsonl"], r"names texts/a\.jsonl twice"),
    ],
)
def test_patterns_that_match_nothing_or_twice_are_refused(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / "texts" / name).write_text("")
    with pytest.raises(UserError, match=says):
        find_files(given)


def test_a_folders_text_is_taken_by_rule_and_the_rest_is_counted(tmp_path, caplog):
    """Suffixes in capitals, other names of JSON lines, every compression; hidden copies of an editor are no text."""
    folder, line = tmp_path / "texts", b'{"text": "some words"}\n'
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".ZST": lambda b: zstd(b.decode()),
    }
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    taken = [name + packed for name in ("a.jsonl", "b.JSONL", "c.ndjson", "d.txt", "e.MD") for packed in pack]
    for name in (*taken, "c.json", "d.json.gz", "h.csv", "p.parquet.gz", ".hidden.txt", ".ipynb_checkpoints/a.txt"):
        packed = next(ending for ending in reversed(pack) if name.endswith(ending))
        (folder / name).write_bytes(pack[packed](line))
    found = find_files(str(folder))
    assert sorted(file.name for file in found) == sorted(taken)
    assert {text.strip() for file in found for text in documents(file, "text")} == {"some words", line.decode().strip()}
    said = "25 files taken, left out: 4 of other kinds (.json 1, .json.gz 1, .csv 1, .parquet.gz 1), 2 hidden"
    assert [one.message.endswith(said) for one in caplog.records] == [True]


def test_the_column_of_a_parquet_file_is_the_one_of_that_name(tmp_path):
    """Arrow selects a field `text` of a column `a` along with a column `a.text`."""
    (tmp_path / "p.parquet").write_bytes(as_parquet({"a": [{"text": "wrong"}], "a.text": ["right"]}))
    assert list(documents(tmp_path / "p.parquet", "a.text")) == ["right"]


def test_text_behind_links_counts_and_what_cannot_be_read_is_refused(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere <b>"
    for at in (folder / "a", elsewhere / "deeper"):
        at.mkdir(parents=True)
        (at / "one.jsonl").write_text("{}")
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "deeper" / "up").symlink_to(elsewhere)  # round and round
    found = [path.relative_to(folder).as_posix() for path in find_files(str(folder))]
    assert found == ["a/one.jsonl", "more/deeper/one.jsonl"]
    (folder / "again.jsonl").symlink_to(elsewhere / "deeper" / "one.jsonl")
    with pytest.raises(UserError, match=r"again.jsonl.*twice|twice.*again.jsonl"):
        find_files(str(folder))
    (folder / "again.jsonl").unlink()
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone.jsonl does not exist"):
        find_files(str(folder))


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "one.txt").write_text("text")
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)  # root may list everything
    with pytest.raises(UserError, match=r"locked cannot be read \(Permission denied\)"):
        find_files(str(tmp_path))


def test_results_count_what_is_there(model, tmp_path):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    results = read_manifest(prepare(model, tmp_path / "in.jsonl", tmp_path / "out"))["results"]
    both = [results[split] for split in ("train", "validation")]
    assert sum(r["documents"] for r in both) == len(DOCUMENTS)
    assert sum(r["bytes"] for r in both) == sum(len(text.encode()) for text in DOCUMENTS)
    assert results["tokenizer"].startswith("sha256:") and results["token_dtype"] == "uint16"


def test_a_dry_run_writes_nothing(model, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    prepare(model, tmp_path / "in.jsonl", tmp_path / "out", dry_run=True)
    assert "28" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    save_hf(hf_model(vocab_size=200), tmp_path / "hf")
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    with pytest.raises(UserError, match="vocabulary of 300, the model of 200"):
        prepare(tmp_path / "hf", tmp_path / "in.jsonl", tmp_path / "out")


def test_one_process_of_a_job_prepares(model, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    monkeypatch.setenv("RANK", "1")
    assert not prepare(model, tmp_path / "in.jsonl", tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_fraction_out_of_range_is_refused(model, tmp_path, fraction):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    with pytest.raises(UserError, match="validation_fraction"):
        prepare(model, tmp_path / "in.jsonl", tmp_path / "out", validation_fraction=fraction)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "no usable document"),
        ("a.txt", b"  \n", "no usable document"),
        ("a.txt", b"only one", "at least two"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1 has no text under 'text'"),
        ("a.txt", b"x\ncaf\xe9", r"a.txt:2 is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "x"}\n' * 9 + b'{"text": "caf\xe9"}\n', r"a.jsonl:10 is not UTF-8 \(byte 0xe9\)"),
        # Without the time, which would be another in each of pytest-xdist's workers, and with it the test's name.
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n\xff', mtime=0), r"a.jsonl.gz:2 is not UTF-8"),
        ("a.csv", b"x", "does not end in one of"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.jsonl.zst", zstd("{}\n" * 9)[:-3], "cannot be read"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
        ("a.parquet", as_parquet({"body": ["x"]}), "no column 'text' but body: set text_key="),
        ("a.parquet", as_parquet({"text": [1]}), "column 'text' holds int64, not text"),
        ("a.parquet", as_parquet({"text": ["x", None]}), "row 2 has no text in column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', "a.jsonl:2 has half a character"),
    ],
)
def test_useless_text_is_refused(model, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        prepare(model, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit_is_refused(model, data, tmp_path):
    shape = open_model_folder(model).shape
    with pytest.raises(UserError, match="above the model's 128 positions"):
        open_data(str(data), "train", shape, 256)
    with pytest.raises(UserError, match="no split 'test'"):
        open_data(str(data), "test", shape, 16)
    with pytest.raises(UserError, match="vocabulary of 300, the model has 200"):
        open_data(str(data), "train", shape.resized(vocab_size=200), 16)
    with pytest.raises(UserError, match="fewer than one sample"):
        open_data(str(data), "validation", shape.resized(max_position_embeddings=10**6), 10**5)
    with pytest.raises(UserError, match="no manifest"):
        open_data(str(tmp_path), "train", shape, 16)


def test_windows_are_every_token_once(model, data):
    folder = open_data(str(data), "validation", open_model_folder(model).shape, 32)
    windows = Windows(folder, "validation", 32)
    samples = [windows[i] for i in range(len(windows))]
    tokens = np.concatenate(read_documents(data, "validation"))
    real = [sample["labels"][sample["loss_mask"] > 0] for sample in samples]
    assert torch.cat(real).tolist() == tokens[1:].tolist()
    assert int(sum(sample["loss_mask"].sum() for sample in samples)) == len(tokens) - 1
    assert read_manifest(data)["results"]["validation"]["tokens"] == len(tokens)


def batches(samples, numbers, size, ranks, **options):
    return [list(MicroBatches(samples, numbers, size, rank, ranks, **options)) for rank in range(ranks)]


def rows(batches_of_ranks):
    """Every valid sample's tokens, as a sorted list."""
    found = []
    for rank in batches_of_ranks:
        for batch in rank:
            found += [tuple(row.tolist()) for row, valid in zip(batch["tokens"], batch["valid"], strict=True) if valid]
    return sorted(found)


@pytest.mark.parametrize(
    ("size", "ranks", "multiple"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (3, 2, 2), (4, 4, 3)]
)
def test_a_step_has_the_same_samples_however_it_is_split(model, data, size, ranks, multiple):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 16)
    samples = training_samples(folder, "train", sequence_length=16, seed=5, count=40)
    numbers = range(8, 19)
    found = batches(samples, numbers, size, ranks, multiple_of=multiple)
    assert len({len(rank) for rank in found}) == 1 and len(found[0]) % multiple == 0
    assert rows(found) == sorted(tuple(samples[i]["tokens"].tolist()) for i in numbers)
    masked = sum(float(batch["loss_mask"].sum()) for rank in found for batch in rank)
    assert masked == len(numbers) * 16


def test_the_seed_decides_the_order(model, data):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 16)

    def order(seed):
        samples = training_samples(folder, "train", sequence_length=16, seed=seed, count=12)
        return [samples[i]["tokens"].tolist() for i in range(12)]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_longer_run_begins_with_the_samples_of_a_shorter_one(model, data, epochs):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 64)

    def order(count):
        samples = training_samples(folder, "train", sequence_length=64, seed=7, count=count)
        assert len(samples) == count
        return [tuple(samples[i]["tokens"].tolist()) for i in range(count)]

    an_epoch = (folder.tokens("train") - 1) // 64
    short, long = order(epochs * an_epoch), order(epochs * an_epoch + 9)
    assert long[: len(short)] == short
    each = [short[i * an_epoch : (i + 1) * an_epoch] for i in range(epochs)]
    assert all(sorted(epoch) == sorted(each[0]) for epoch in each)
    assert len({tuple(epoch) for epoch in each}) == epochs


@pytest.mark.parametrize("consumed", [0, 3, 17])
def test_a_run_continues_at_any_step(model, data, consumed):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 64)
    size, steps = 8, 20

    def step_rows(begin, end):
        samples = training_samples(folder, "train", sequence_length=64, seed=3, count=steps * size)
        return [rows(batches(samples, range(k * size, (k + 1) * size), 2, 2)) for k in range(begin, end)]

    assert step_rows(0, steps)[consumed:] == step_rows(consumed, steps)


def first_samples(path, shape, seed):
    """What one rank of a job reads."""
    folder = open_data(path, "train", shape, 16)
    samples = training_samples(folder, "train", sequence_length=16, seed=seed, count=30)
    return [samples[i]["tokens"].tolist() for i in range(30)]


def test_ranks_of_a_job_read_one_index(model, tmp_path, gloo):
    data = data_folder(tmp_path, model)
    shape = open_model_folder(model).shape
    one, other = gloo(2, first_samples, str(data), shape, 11)
    assert one == other == first_samples(str(data), shape, 11)
    found = sorted(path.name for path in (data / "cache").iterdir())
    assert [name[:11] for name in found] == ["train-16-11"], found


def test_an_index_that_was_not_finished_is_built_again(model, tmp_path):
    data = data_folder(tmp_path, model)
    shape = open_model_folder(model).shape
    (data / "cache" / ".partial-killed" / "index").mkdir(parents=True)
    assert len(first_samples(str(data), shape, 1)) == 30


def test_an_index_that_cannot_be_written_is_one_line(model, tmp_path):
    data = data_folder(tmp_path, model)
    (data / "cache").write_text("in the way")
    with pytest.raises(UserError, match="the sample index cannot be written"):
        first_samples(str(data), open_model_folder(model).shape, 1)


def test_a_damaged_data_folder_is_refused(model, tmp_path):
    data = data_folder(tmp_path, model)
    with open(data / "train.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match=r"train.bin has \d+ bytes instead of"):
        open_data(str(data), "train", open_model_folder(model).shape, 16)


def test_labels_are_the_next_tokens(model, data):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 16)
    sample = training_samples(folder, "train", sequence_length=16, seed=1, count=4)[0]
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()


class Counting:
    """Samples whose tokens are their positions."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        positions = torch.arange(16)
        return {"tokens": positions, "labels": positions + 1, "loss_mask": torch.ones(16), "position_ids": positions}


def shares_of_this_rank(layout):
    return list(MicroBatches.of_this_rank(Counting(), range(3), 2, Layout(**layout, world_size=2)))


def test_context_parallel_ranks_share_every_sequence(gloo):
    """The first and the last quarter, and the two between them: causal attention is as much work for both."""
    layout = {"context": 2}
    first, second = gloo(2, shares_of_this_rank, layout, layout=layout)
    outer, inner = [*range(4), *range(12, 16)], [*range(4, 12)]
    for batches, positions in ((first, outer), (second, inner)):
        assert [b["valid"].tolist() for b in batches] == [[1, 1], [1, 0]]
        for batch in batches:
            assert batch["tokens"].tolist() == batch["position_ids"].tolist() == [positions, positions]
            assert (batch["labels"] == batch["tokens"] + 1).all() and batch["loss_mask"].shape == (2, 8)


@pytest.fixture(scope="module")
def blend(tmp_path_factory, model):
    """Three data folders of one tokenizer."""
    return [
        str(data_folder(tmp_path_factory.mktemp("blend") / name, model, n))
        for name, n in zip("abc", (60, 30, 20), strict=True)
    ]


def opened(path, model, length=16, **options):
    return open_data(path, "train", open_model_folder(model).shape, length, **options)


def blended(path, model, count, seed=7):
    samples = training_samples(opened(path, model), "train", sequence_length=16, seed=seed, count=count)
    return samples, [tuple(samples[i]["tokens"].tolist()) for i in range(count)]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (0.5, 0.3, 0.2), (97, 2, 1), (1 / 3, 1 / 3, 1 / 3)])
def test_any_first_samples_of_a_blend_are_in_proportion(model, blend, weights):
    path = [entry for pair in zip(weights, blend, strict=False) for entry in pair]
    samples, _ = blended(path, model, 200)
    for n in (1, 2, 3, 7, 50, 101, 200):
        taken = np.bincount(samples.dataset_index[:n], minlength=len(weights))
        assert np.abs(taken - n * np.array(weights) / sum(weights)).max() <= 1


def test_a_longer_run_of_a_blend_begins_with_the_samples_of_a_shorter_one(model, blend):
    path = [0.6, blend[0], 0.4, blend[1]]
    _, short = blended(path, model, 90)
    _, long = blended(path, model, 400)
    assert long[:90] == short and blended(path, model, 90)[1] == short != blended(path, model, 90, seed=8)[1]


def test_a_blend_has_the_samples_of_its_folders_in_their_own_order(model, blend):
    samples, found = blended([0.6, blend[0], 0.4, blend[1]], model, 90)
    for number, folder in enumerate(blend[:2]):
        mine = [tokens for tokens, part in zip(found, samples.dataset_index, strict=True) if part == number]
        assert mine == blended(folder, model, len(mine))[1]


def test_folders_without_weights_weigh_their_tokens(model, blend):
    data = opened(blend, model)
    tokens = [read_manifest(folder)["results"]["train"]["tokens"] for folder in blend]
    assert data.weights == pytest.approx([n / sum(tokens) for n in tokens])
    assert data.tokens("train") == pytest.approx(sum(tokens), abs=1)


def test_validation_of_a_blend_has_its_proportions_and_no_window_twice(model, blend):
    windows = Windows(opened([3, blend[0], 1, blend[1]], model), "validation", 16)
    alone = [Windows(opened(folder, model), "validation", 16) for folder in blend[:2]]
    found = [(int(part), int(window)) for part, window in zip(*windows.order, strict=True)][: len(windows)]
    assert len(set(found)) == len(found)
    for n in (1, 2, 9, len(found)):
        assert abs(sum(part == 0 for part, _ in found[:n]) - 0.75 * n) <= 1
    for i, (part, window) in enumerate(found):
        assert windows[i]["tokens"].tolist() == alone[part][window]["tokens"].tolist()
        assert windows[i]["loss_mask"].all()
    assert len(found) >= min(alone[0].whole / 0.75, alone[1].whole / 0.25) - 4


def test_more_samples_than_there_are_is_told(model, blend, caplog):
    blended(blend[2], model, 10)
    assert not caplog.records
    blended([0.9, blend[0], 0.1, blend[2]], model, 2000)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [blend[0], blend[2]]
    assert re.search(r"1800 samples are \d+\.\d epochs of its \d+", caplog.records[0].getMessage())


def blend_of_a_rank(path, model):
    return blended(path, model, 60)[1]


def test_ranks_of_a_job_read_one_index_of_a_blend(model, tmp_path, gloo):
    path = [2, str(data_folder(tmp_path / "a", model)), 1, str(data_folder(tmp_path / "b", model, 30))]
    one, other = gloo(2, blend_of_a_rank, path, model)
    assert one == other == blend_of_a_rank(path, model)
    caches = sorted(file.name.split("-")[0] for file in (tmp_path / "a" / "data" / "cache").iterdir())
    assert caches == ["blend", "train"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ([], "must be a folder, or a list"),
        ([0.5, "{a}", 0.5], "must be a folder, or a list"),
        (["{a}", 0.5], "must be a folder, or a list"),
        ([0, "{a}", 1, "{b}"], "weights must be above 0"),
        ([1, "{a}", 2, "{a}"], "twice: give it once"),
        ([1, "{a}", 1, "{b}x"], "does not exist"),
        ([1, "{a}", 1, "{other}"], "different tokenizers"),
    ],
)
def test_impossible_blends_are_refused(model, blend, tmp_path, path, says):
    names = {"a": blend[0], "b": blend[1]}
    other = tmp_path / "other"
    shutil.copytree(blend[1], other)
    manifest = (other / "manifest.yaml").read_text()
    (other / "manifest.yaml").write_text(re.sub("tokenizer: sha256:.", "tokenizer: sha256:x", manifest))
    names["other"] = str(other)
    path = [entry.format(**names) if isinstance(entry, str) else entry for entry in path]
    with pytest.raises(UserError, match=says):
        opened(path, model)


def test_the_same_data_by_another_spelling_are_no_blend(model, blend, tmp_path):
    """A link, a copy, or a path through another folder: one epoch of it would be two."""
    (tmp_path / "link").symlink_to(blend[0])
    shutil.copytree(blend[0], tmp_path / "copy")
    for again in (f"{blend[0]}/.", f"{blend[0]}/../data", tmp_path / "link", tmp_path / "copy"):
        path = [1, blend[1], 1, blend[0], 2, str(again)]
        says = (
            f"the same data twice, as {re.escape(blend[0])} and as {re.escape(str(again))}: give it once, with the sum"
        )
        with pytest.raises(UserError, match=says):
            opened(path, model)
        with pytest.raises(UserError, match=says):
            data_digest(path)


def rewritten(data, tmp_path, change):
    """A copy of a data folder whose files `change` has touched, with sizes in its manifest as they are now."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))
    change(copy)
    manifest = read_manifest_as_it_is(copy)
    manifest["files"] = {name: (copy / name).stat().st_size for name in manifest["files"]}
    (copy / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return copy


def read_manifest_as_it_is(folder):
    return yaml.safe_load((folder / "manifest.yaml").read_text())


def cut(name, size):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - size)


def put(name, place, value):
    def change(folder):
        with open(folder / name, "r+b") as file:
            file.seek(place)
            file.write(value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut("train.idx", 8), "its size is not that of"),
        (cut("train.bin", 2), r"train.bin has \d+ bytes, not the \d+ of its index"),
        (lambda folder: os.truncate(folder / "train.idx", 20), "is damaged, or no index of Megatron's"),
        (put("train.idx", 0, b"nonsense"), "is damaged, or no index of Megatron's"),
        (put("train.idx", 17, b"\x07"), "dtype code 7"),
        (put("train.bin", 40, b"\xff\xff"), "token id 65535 is not of the vocabulary of 300"),
    ],
)
def test_damage_that_keeps_the_sizes_is_refused(model, data, tmp_path, change, says):
    copy = rewritten(data, tmp_path, change)
    with pytest.raises(UserError, match=says):
        opened(str(copy), model)


def test_verify_reads_everything(model, data, tmp_path):
    verify_data(opened(str(data), model))
    copy = rewritten(data, tmp_path, put("train.bin", 40, b"\x01\x00"))
    with pytest.raises(UserError, match="files differ from the digest"):
        verify_data(opened(str(copy), model))


def test_a_full_disk_is_told_and_what_is_done_is_kept(model, tmp_path, monkeypatch):
    """The real error of the real device that is always full."""
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    whole = prepare(model, tmp_path / "in.jsonl", tmp_path / "whole")
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_COMMITS", 0.0)
    commits = 0
    commit = SplitWriter.commit

    def fill(writer):
        nonlocal commits
        commits += 1
        if commits == 40:
            writer._tokens = open("/dev/full", "wb")  # noqa: SIM115
            writer._tokens.write(b"x")
        commit(writer)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left while writing"):
        patch.setattr(SplitWriter, "commit", fill)
        prepare(model, tmp_path / "in.jsonl", tmp_path / "out")
    assert (tmp_path / ".out.partial" / preparing.JOURNAL).is_file()
    out = prepare(model, tmp_path / "in.jsonl", tmp_path / "out")
    assert read_manifest(whole)["digest"] == read_manifest(out)["digest"]


def with_megatron(prefix, documents, dtype=np.uint16):
    """What Megatron-LM's preprocess_data.py writes: documents of one or more sequences each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def adopt(model, tmp_path, train, validation, **options):
    cfg = AdoptDataConfig(
        str(tmp_path / "out"), train=train, validation=validation, model=model_option(model), **options
    )
    adopt_data(cfg)
    return tmp_path / "out"


def test_what_megatron_wrote_is_adopted_and_read(model, tmp_path):
    end = load_tokenizer(model).eos_token_id
    documents = [[np.arange(5, 20 + i) % 250, np.array([7, 8, end])] for i in range(30)]
    train, validation = (with_megatron(tmp_path / name, documents) for name in ("all.train", "all.validation"))
    out = adopt(model, tmp_path, train, validation)
    results = read_manifest(out)["results"]
    tokens = np.concatenate([np.concatenate(sequences) for sequences in documents])
    assert results["train"] == {"documents": 30, "tokens": len(tokens), "bytes": None}
    assert os.path.samefile(f"{train}.bin", out / "train.bin")
    windows = Windows(opened(str(out), model), "train", 16)
    found = np.concatenate([windows[i]["tokens"].numpy() for i in range(windows.whole)])
    assert (found == tokens[: len(found)]).all()
    assert len(blended(str(out), model, 20)[1]) == 20


def test_what_cannot_be_adopted_is_refused(model, tmp_path):
    good = with_megatron(tmp_path / "good", [[np.arange(9)]])
    with pytest.raises(UserError, match="token id 300 is not of the vocabulary of 300"):
        adopt(model, tmp_path, good, with_megatron(tmp_path / "large", [[np.array([1, 300])]]))
    with pytest.raises(UserError, match=r"nowhere.idx is missing"):
        adopt(model, tmp_path, good, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="different types"):
        adopt(model, tmp_path, good, with_megatron(tmp_path / "wide", [[np.arange(9)]], np.int32))
    with pytest.raises(UserError, match="dtype code 3"):
        adopt(model, tmp_path, good, with_megatron(tmp_path / "short", [[np.arange(9)]], np.int16))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_of_a_sample_are_told_apart(model, data, split):
    masks = DocumentMasks(reset_attention=True, end_of_document=True)
    folder = opened(str(data), model, 64, masks=masks)
    plain = opened(str(data), model, 64)
    if split == "train":
        masked, free = (training_samples(f, split, sequence_length=64, seed=1, count=9) for f in (folder, plain))
    else:
        masked, free = (Windows(f, split, 64) for f in (folder, plain))
    ends = 0
    for i in range(5):
        tokens = masked[i]["tokens"].tolist()
        assert tokens == free[i]["tokens"].tolist() and free[i]["loss_mask"].all() and "documents" not in free[i]
        expected, number = [], 0
        for token in tokens:
            expected.append(number)
            number += token == folder.end_of_document
        ends += number
        assert masked[i]["documents"].tolist() == expected
        assert masked[i]["loss_mask"].tolist() == [float(token != folder.end_of_document) for token in tokens]
    assert ends > 0
    (batch,) = MicroBatches(masked, range(2), 2, 0, 1)
    assert batch["documents"].shape == (2, 64)
