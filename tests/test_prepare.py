"""Text on its way to tokens, piece by piece: which files count, where a text is cut, what is kept, how much there is of it."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.data import adopt, estimate, indexed, prepare
from minitron_megatron.data.indexed import INDEX_HEADER, SplitWriter, open_split
from minitron_megatron.data.prepare import (
    Done,
    Encoded,
    Piece,
    _between_paragraphs,
    _chunks,
    _with_validation,
    split_of,
)
from minitron_megatron.data.text import PACKED, ROWS, _kind, documents, find_files
from minitron_megatron.data.tokenizer import check_vocabulary, vocabulary_size
from minitron_megatron.errors import UserError
from tests.test_bounds import refused

# Files of text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.MD", ".md"),
        ("a.rst.gz", ".rst"),
        ("a.jsonl", ".jsonl"),
        ("a.ndjson.ZST", ".ndjson"),
        ("a.jsonl.bz2", ".jsonl"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.json", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.txt.gz.xz", None),
    ],
)
def test_a_file_is_text_by_its_ending_and_that_of_its_compression(name, kind):
    assert _kind(name) == kind


@pytest.mark.parametrize(
    ("names", "key", "said"),
    [
        (["a.md"], "body", True),
        (["a.md", "b.jsonl.gz"], "body", False),
        (["a.parquet"], "body", False),
        (["a.md"], "text", False),
    ],
)
def test_a_key_of_rows_is_said_where_no_file_has_rows(tmp_path, monkeypatch, caplog, names, key, said):
    for name in names:
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(prepare, "check_tokenizer", lambda folder: folder)
    monkeypatch.setattr(prepare, "tokenizer_digest", lambda _: "t")
    monkeypatch.setattr(prepare, "check_command_output", lambda *_: None)
    cfg = PrepareDataConfig(input=[str(tmp_path / name) for name in names], output="o", text_key=key)
    cfg.model.path = "m"
    with caplog.at_level("INFO"):
        prepare.check_prepare(cfg)
    assert any("text_key=body has no effect: it is for rows" in line for line in caplog.messages) is said


def test_many_other_kinds_are_counted_and_the_most_frequent_named(tmp_path, caplog):
    for name in ("a.txt", "b.c", "d.c", "e.f", "g.h", "i.j", "k.l", "m.n", "README"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(str(tmp_path))] == ["a.txt"]
    assert (
        "1 files taken, left out: 8 of other kinds (" in caplog.text
        and ".c 2, " in caplog.text
        and ", …)" in caplog.text
    )
    (tmp_path / "a.txt").unlink()
    (tmp_path / ".b").touch()
    with pytest.raises(UserError, match=r"has no file that ends in .* but 8 of other kinds \(.*\) and 1 hidden$"):
        find_files(str(tmp_path))


MADE = {
    "whole": {"manifest.yaml": "command: prune\nfingerprint: x\nfiles: {}\n", "README.md": "a card"},
    "a chain": {"starts.jsonl": '{"command": "compress"}\n', "report/report.md": "a report"},
    "a run": {"run/starts.jsonl": '{"command": "distill"}\n', "run/metrics.jsonl": "{}"},
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("spelt", ["{0}", "{0}/*", "{0}/**/*.txt {0}/**/*.jsonl {0}/**/*.md", "."])
def test_what_commands_have_made_is_no_text(tmp_path, monkeypatch, caplog, kind, spelt):
    """A command that is started again reads the same text, wherever in it its output is; given by its own name it is text."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "c.md", "deep/b.txt", "deep/manifest.yaml", "other/starts.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some words")
    given = spelt.format(tmp_path).split()
    before = find_files(given)
    for name, text in MADE[kind].items():
        (tmp_path / "deep" / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / "out" / name).write_text(text)
    assert find_files(given) == before
    assert "what commands of this software have made (" in caplog.text and "/out" in caplog.text
    assert {file.name for file in before} == {"a.txt", "b.txt", "c.md", "starts.jsonl"}
    inside = tmp_path / "deep" / "out" / ("run" if kind == "a run" else "")
    assert find_files(str(inside))


def test_the_line_that_is_not_utf8_is_named_wherever_it_is(tmp_path):
    """Behind the decoder's first buffer, too."""
    for line in (1, 2, 5000):
        (tmp_path / "a.txt").write_bytes(b"words and words\n" * (line - 1) + b"caf\xe9\n" + b"more\n" * 3)
        with pytest.raises(UserError, match=rf"a\.txt:{line} is not UTF-8 \(byte 0xe9\)"):
            list(documents(tmp_path / "a.txt", "text"))


def test_a_column_that_is_there_twice_or_is_no_text_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    for kind, taken in ((pyarrow.string(), True), (pyarrow.large_string(), True), (pyarrow.binary(), False)):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", " ", "two"]).cast(kind)}), file)
        if taken:
            assert list(documents(file, "text")) == ["one", "two"]
        else:
            with pytest.raises(UserError, match="holds binary, not text"):
                list(documents(file, "text"))
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), file)
    with pytest.raises(UserError, match="has no column 'text' but text, text: set text_key="):
        list(documents(file, "text"))


def test_empty_lines_are_no_documents_and_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n{"text": " "}\n{"text": "two"}\n[1]\n')
    found = documents(tmp_path / "a.jsonl", "text")
    assert [next(found), next(found)] == ["one", "two"]
    with pytest.raises(UserError, match=r"a\.jsonl:6 has no text under 'text'"):
        next(found)


# Splits


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("a\n\nb", [3]),
        ("a\n \t\nb\n\n\nc", [5, 8]),
        ("a\nb", []),
        ("\n\na\n\n", []),
        (" \n\n a\n\nb \n\n", [7]),
        ("", []),
    ],
)
def test_a_document_can_be_cut_behind_blank_lines_with_text_on_both_sides(text, cuts):
    assert _between_paragraphs(text) == cuts


PARAGRAPHS = "\n\n".join(f"{n} some words" for n in range(10))
ONE = "one paragraph"


def test_a_split_that_is_empty_gets_the_last_document_or_its_end():
    """Where the last document is not far more than validation is to have, or has one paragraph, it goes there whole."""
    train = next(seed for seed in range(99) if split_of("first", 0.2, seed) == split_of("again", 0.2, seed) == "train")
    other = next(seed for seed in range(99) if split_of("first", 0.2, seed) == "validation")

    def splits(*texts, seed=train, fraction=0.2, **more):
        pieces = [Piece(text, 0, n) for n, text in enumerate(texts, 1)]
        return [(split, piece.text, piece.number) for split, piece in _with_validation(pieces, fraction, seed, **more)]

    assert splits("first", ONE) == [("train", "first", 1), ("validation", ONE, 2)]
    found = splits("first", PARAGRAPHS)
    assert [(split, number) for split, _, number in found] == [("train", 1), ("train", 0), ("validation", 2)]
    assert found[1][1] + found[2][1] == PARAGRAPHS and found[2][1] == "\n\n".join(PARAGRAPHS.split("\n\n")[8:])
    # The last document is a fifth of the text: all of it is what validation is to have.
    assert splits("first", PARAGRAPHS, before=4 * len(PARAGRAPHS))[1:] == [("validation", PARAGRAPHS, 2)]
    assert splits("first", ONE, seed=other) == [("validation", "first", 1), ("train", ONE, 2)]
    assert splits("first", PARAGRAPHS, seed=other)[1:] == [("train", PARAGRAPHS, 2)]
    # An earlier run has put documents into both.
    both = {"found": {"train", "validation"}}
    assert splits("first", **both) == [("train", "first", 1)] and splits(**both) == []
    assert splits("again", found={"validation"}) == [("train", "again", 1)]
    with pytest.raises(UserError, match="every one is empty"):
        splits()
    with pytest.raises(UserError, match="has a single document of one paragraph"):
        splits(ONE)
    assert len(splits("a\n\nb")) == 2


def test_the_first_two_documents_tell_whether_text_can_be_split(tmp_path):
    cfg = PrepareDataConfig(output="o", validation_fraction=0.5)
    for texts, taken in (([ONE], False), ([PARAGRAPHS], True), ([ONE, ONE], True), ([ONE, ONE, 5], True)):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert refused(prepare.check_documents, [tmp_path / "a.jsonl"], cfg) != taken


@pytest.mark.parametrize(
    ("validation", "wanted", "said"),
    [
        (30, 0.2, True), (400, 0.2, False), (401, 0.2, True), (50, 0.2, False), (49, 0.2, True),
        (60, 0.01, False), (61, 0.01, True), (0, 0.2, True), (3, 0.01, False),
    ],
)  # fmt: skip
def test_a_share_far_from_the_one_that_was_asked_for_is_said(caplog, validation, wanted, said):
    """Above twice and 5 % more, or below a quarter of it; of 1,000 tokens."""
    prepare._say_share({"train": 1000 - validation, "validation": validation}, wanted)
    assert (len(caplog.records) == 1) == said
    if said:
        assert f"has {validation / 10:.1f} % of the tokens" in caplog.messages[0]
        assert f"validation_fraction={wanted:g} asks for {100 * wanted:.1f} %" in caplog.messages[0]


def test_chunks_are_full_at_so_many_characters(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 10)
    pairs = [("train", Piece("x" * size, 0, n)) for n, size in enumerate((5, 4, 1, 11, 9, 2, 3))]
    assert [[pair[1].number for pair in chunk] for chunk in _chunks(pairs)] == [[0, 1, 2], [3], [4, 5], [6]]
    assert list(_chunks([])) == [] and len(list(_chunks(pairs[:3]))) == 1


def test_what_is_done_is_counted_by_split_and_by_file():
    done = Done()
    for split, tokens, size, file, number, named in (
        ("train", 3, 10, 0, 1, False), ("validation", 5, 20, 0, 2, True), ("train", 7, 40, 2, 1, True)
    ):  # fmt: skip
        done.add(Encoded(split, np.zeros(tokens), size, file, number, named))
        if file == 0 and number == 2:
            assert (done.file, done.documents, done.bytes) == (0, 2, 30)
    assert done.counts == {
        "train": {"documents": 2, "tokens": 10, "bytes": 50},
        "validation": {"documents": 1, "tokens": 5, "bytes": 20},
    }
    assert (done.file, done.documents, done.bytes, done.named, done.tokens) == (2, 1, 40, 2, 15)


def test_reading_goes_on_after_what_is_done(tmp_path):
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text("".join(json.dumps({"t": f"{n}{k}"}) + "\n" for k in range(3)))

    def read(**done):
        return [(one.text, one.file, one.number) for one in prepare._read(files, "t", Done(**done))]

    everything = [(f"{n}{k}", n, k + 1) for n in range(3) for k in range(3)]
    assert read() == everything
    assert read(file=1, documents=2) == everything[5:] and read(file=2, documents=3) == []
    assert read(file=1, documents=0) == everything[3:]


@pytest.mark.parametrize(
    ("given", "wanted"), [("a", "a"), ("a,b", ["a", "b"]), (["a,b"], ["a,b"]), ("x,y", "x,y"), (None, None)]
)
def test_commas_are_between_paths_unless_a_file_is_called_so(tmp_path, monkeypatch, given, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").touch()
    assert prepare._inputs(given) == wanted


# How much there is


class Letters:
    """An encoder of a token a letter, and one that ends a document."""

    coverage = SimpleNamespace(lost=lambda text, ids: (0, ""))

    def __call__(self, text):
        return [0] * (len(text) + 1)


@pytest.fixture
def small(monkeypatch):
    """20 characters of each file are looked at, of 4 files."""
    monkeypatch.setattr(estimate, "_CHARACTERS", 20)
    monkeypatch.setattr(estimate, "_FILES", 4)


def text_files(folder: Path, count: int, size: int, ending: str = ".txt") -> list[Path]:
    files = [folder / f"{n:02d}{ending}" for n in range(count)]
    for file in files:
        file.write_text("x" * size)
    return files


def test_small_texts_are_counted_to_the_token(small, tmp_path):
    """Up to as many characters of a file, and as many files, as are looked at."""
    for count, size, counted in ((1, 20, True), (4, 20, True), (1, 21, False), (7, 20, True), (8, 20, False)):
        files = text_files(tmp_path, count, size)
        tokens, found = estimate.estimate_tokens(files, "text", Letters())
        assert found is counted
        looked_at = files[:: max(1, count // 4)]
        seen = len(looked_at) * 21
        assert tokens == (seen if counted else round(seen * max(1.0, count * size / (len(looked_at) * 20))))


def test_large_texts_are_estimated_by_what_was_seen(small, tmp_path):
    """Of JSON lines what they take in the file; of compressed ones a guess of what they hold."""
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"t": "abcd"}) + "\n" for _ in range(100)))
    size = len(json.dumps({"t": "abcd"}))
    # Five documents are 20 characters, the sixth is more.
    assert estimate.estimate_tokens([lines], "t", Letters()) == (round(6 * 5 * 100 * (size + 1) / (6 * size)), False)
    text = "x" * 300
    for ending, times in ((".gz", 3.0), (".xz", 4.0)):
        import lzma

        packed = tmp_path / f"a.txt{ending}"
        packed.write_bytes(gzip.compress(text.encode()) if ending == ".gz" else lzma.compress(text.encode()))
        seen = json.dumps({"text": text})[:20]
        wanted = round(21 * max(1.0, packed.stat().st_size * times / len(seen)))
        assert estimate.estimate_tokens([packed], "text", Letters()) == (wanted, False)


# Tokenizers and ids


def tokenizer(length: int, **vocab: int):
    return type("T", (), {"__len__": lambda self: length, "get_vocab": lambda self: vocab})()


@pytest.mark.parametrize(
    ("length", "vocab", "size"), [(3, {"a": 0, "b": 2}, 3), (2, {"a": 0, "b": 9}, 10), (9, {"a": 0}, 9)]
)
def test_a_vocabulary_may_have_holes(length, vocab, size):
    assert vocabulary_size(tokenizer(length, **vocab)) == size


@pytest.mark.parametrize(("known", "taken"), [(10, True), (9, False), (11, True), (None, True)])
def test_a_tokenizer_has_no_more_ids_than_its_model(tmp_path, known, taken):
    (tmp_path / "config.json").write_text(json.dumps({} if known is None else {"vocab_size": known}))
    assert refused(check_vocabulary, tmp_path, tokenizer(2, a=9)) != taken
    assert taken is False or check_vocabulary(tmp_path, tokenizer(2, a=9)) == 10
    (tmp_path / "config.json").unlink()
    assert check_vocabulary(tmp_path, tokenizer(2, a=9)) == 10
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_vocabulary(tmp_path, tokenizer(2, a=9))


def split(folder: Path, *sequences: list[int], dtype=np.uint16, name: str = "train") -> Path:
    with SplitWriter(folder / name, np.dtype(dtype)) as writer:
        for ids in sequences:
            writer.add(np.array(ids, dtype))
        writer.finish()
        writer.forget()
    return folder / name


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sequences", [[], [[5]], [[1, 2, 3], [], [4, 5]], [[7] * 9, [8]]])
def test_an_index_says_where_each_document_begins(tmp_path, dtype, sequences):
    """As Megatron reads it, byte by byte: lengths, first bytes, and the documents' ends."""
    prefix = split(tmp_path, *sequences, dtype=dtype)
    found, lengths = open_split(prefix, "x"), [len(ids) for ids in sequences]
    assert (found.sequences, found.documents, found.tokens) == (len(lengths), len(lengths), sum(lengths))
    assert found.dtype == dtype and (not lengths or found.ids.tolist() == [one for ids in sequences for one in ids])
    raw, item, count = prefix.with_suffix(".idx").read_bytes(), np.dtype(dtype).itemsize, len(lengths)
    head = len(INDEX_HEADER) + 25
    assert raw[len(INDEX_HEADER) : head] == (
        (1).to_bytes(8, "little")
        + bytes([{2: 8, 4: 4}[item]])
        + count.to_bytes(8, "little")
        + (count + 1).to_bytes(8, "little")
    )
    assert np.frombuffer(raw[head : head + 4 * count], "<i4").tolist() == lengths
    starts = [item * sum(lengths[:n]) for n in range(count)]
    assert np.frombuffer(raw[head + 4 * count : head + 12 * count], "<i8").tolist() == starts
    assert np.frombuffer(raw[head + 12 * count :], "<i8").tolist() == list(range(count + 1))
    assert not prefix.with_suffix(".lengths").exists()


@pytest.mark.parametrize(
    ("place", "byte", "says"),
    [
        (9, 2, "is of version 2 and dtype code 8"),
        (17, 5, "is of version 1 and dtype code 5"),
        (18, 3, "its size is not that of 3"),
    ],
)
def test_an_index_that_is_another_is_refused(tmp_path, place, byte, says):
    prefix = split(tmp_path, [1, 2], [3])
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    raw[place] = byte
    prefix.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(UserError, match=says):
        open_split(prefix, "x")


def test_negative_ids_are_of_no_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", 2)
    for ids, wrong in (([3, 0, 9, 9], None), ([3, 0, 9, 10], 10), ([3, 0, -1, 9], -1), ([11, -1, 3, 3], 11)):
        found = open_split(split(tmp_path, ids, dtype=np.int32), "x")
        if wrong is None:
            found.check_ids(10, "x", whole=True)
            continue
        with pytest.raises(UserError, match=rf"^x: token id {wrong} is not of the vocabulary of 10:"):
            found.check_ids(10, "x", whole=True)


@pytest.mark.parametrize(
    ("looked_at", "blocks"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_a_look_at_ids_is_at_blocks_that_are_spread_evenly(tmp_path, monkeypatch, looked_at, blocks):
    monkeypatch.setattr(indexed, "_BLOCK", 2)
    monkeypatch.setattr(indexed, "_BLOCKS", looked_at)
    for block in range(5):
        ids = [0] * 10
        ids[2 * block + 1] = 100
        found = open_split(split(tmp_path, ids), "x")
        assert refused(found.check_ids, 100, "x") == (block in blocks)


# Datasets of others


class Special:
    """Tokens 0 to 2 are special; 1 opens a text, 2 ends a turn."""

    eos_token_id, bos_token_id = 2, 1


@pytest.mark.parametrize(
    ("train", "validation", "end", "begin", "warned"),
    [
        ([1, 5, 2], [1, 6, 2], 2, 1, 0),
        ([1, 5, 0], [1, 6, 0], 0, 1, 0),
        ([5, 5, 0], [1, 6, 0], 0, None, 0),
        ([5, 5, 2], [5, 6, 2], 2, None, 0),
        ([1, 5, 1], [1, 6, 1], 1, None, 0),  # what ends them opens them too
        ([1, 5, 0], [1, 6, 2], 2, 1, 1),
        ([1, 5, 5], [1, 6, 5], 2, 1, 2),
        ([1, 5, 5], [1, 6, 6], 2, 1, 2),
    ],
)
def test_documents_that_are_there_are_ended_and_opened_by_special_tokens(
    tmp_path, monkeypatch, caplog, train, validation, end, begin, warned
):
    """The same in both splits; where nothing ends them, that is said of each."""
    names = {"</t>": 0, "<s>": 1, "</s>": 2}
    monkeypatch.setattr(adopt, "special_ids", lambda _: names)
    splits = {
        name: open_split(split(tmp_path, ids, name=name), name)
        for name, ids in (("train", train), ("validation", validation))
    }
    tokens = {number: token for token, number in names.items()}
    assert adopt._borders(splits, Special()) == {
        "end_of_document": end,
        "begin_of_document": begin,
        "end_of_document_token": tokens[end],
        "begin_of_document_token": tokens.get(begin),
    }
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == warned


def test_a_dataset_without_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^train=\S+ has no tokens$"):
        adopt._open(str(split(tmp_path)), "train")
    assert adopt._open(str(split(tmp_path, [1])), "train").tokens == 1


def test_every_compression_is_foreseen_by_its_share():
    assert set(estimate._UNPACKED) == {*PACKED, *ROWS}
