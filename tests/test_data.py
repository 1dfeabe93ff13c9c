"""Text to tokens and back, splits, and an order of samples that depends on the seed alone."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.data.datasets import MicroBatches, Windows, open_data, training_samples
from minitron_megatron.data.prepare import prepare_data, split_of
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from tests.tiny import data_folder, hf_model, imported, model_option

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


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_for_any_number_of_workers(model, tmp_path, workers):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS))
    one = prepare(model, tmp_path / "in.jsonl", tmp_path / "one")
    many = prepare(model, tmp_path / "in.jsonl", tmp_path / "many", workers=workers)
    for file in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (one / file).read_bytes() == (many / file).read_bytes()


def test_every_format_gives_the_same_tokens(model, tmp_path):
    text = jsonl(DOCUMENTS)
    (tmp_path / "plain").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "plain" / f"{i:02d}.txt").write_text(document)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    sources = ("plain", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz")
    outs = [prepare(model, tmp_path / name, tmp_path / f"{name}-out") for name in sources]
    assert len({(out / "train.bin").read_bytes() for out in outs}) == 1


def test_two_documents_are_enough_for_two_splits(model, tmp_path):
    (tmp_path / "in.jsonl").write_text(jsonl(DOCUMENTS[:2]))
    out = prepare(model, tmp_path / "in.jsonl", tmp_path / "out", validation_fraction=1e-9)
    assert [len(read_documents(out, split)) for split in ("train", "validation")] == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "no usable document"),
        ("a.txt", b"  \n", "no usable document"),
        ("a.txt", b"only one", "at least two"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1 has no text under 'text'"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        ("a.csv", b"x", "does not end in one of"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
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


def test_labels_are_the_next_tokens(model, data):
    folder = open_data(str(data), "train", open_model_folder(model).shape, 16)
    sample = training_samples(folder, "train", sequence_length=16, seed=1, count=4)[0]
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
