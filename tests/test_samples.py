"""Samples and micro-batches number by number: who has which, what a cache knows of them, and what a folder must be."""

import hashlib
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.data import datasets, folder, sample_index
from minitron_megatron.data.datasets import MicroBatches, document_numbers, token_checksum
from minitron_megatron.data.folder import Data, DataFolder, DocumentMasks, check_enough, data_digest, open_data
from minitron_megatron.data.windows import taken
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import SIZES
from tests.test_bounds import SMALL_SHAPE, refused

# Samples


class Numbers:
    """Samples of four tokens that say which they are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        tokens = torch.arange(4) + 10 * index
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(4), "position_ids": torch.arange(4)}


def numbers_of(batches) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("numbers", "multiple", "wanted"),
    [
        (range(8, 16), 1, [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]),  # the drawing of data/datasets.py, with k = 1
        (range(8, 13), 1, [[[8, 9], [12, -1]], [[10, 11], [-1, -1]]]),
        (range(8, 12), 1, [[[8, 9]], [[10, 11]]]),
        (range(8, 12), 2, [[[8, 9], [-1, -1]], [[10, 11], [-1, -1]]]),
        (range(0), 1, [[], []]),
    ],
)
def test_micro_batches_go_round_the_ranks(numbers, multiple, wanted):
    """What does not fill the last round is sample 0 without a loss, and without a number."""
    for rank in range(2):
        found = list(MicroBatches(Numbers(16), numbers, 2, rank, 2, multiple_of=multiple))
        assert numbers_of(found) == wanted[rank]
        for batch in found:
            valid = batch["number"] >= 0
            assert torch.equal(batch["valid"], valid.float())
            assert torch.equal(batch["loss_mask"], valid.float()[:, None].expand(2, 4))
            assert torch.equal(batch["tokens"][:, 0], batch["number"].clamp_min(0) * 10)
            assert batch["checksum"].tolist() == [token_checksum(row) for row in batch["tokens"]]
            assert "documents" not in batch


def test_a_checksum_is_of_the_tokens_as_64_bit_numbers():
    tokens = torch.tensor([1, 2, 300])
    wanted = zlib.crc32(b"".join(int(one).to_bytes(8, "little") for one in tokens))
    assert token_checksum(tokens) == wanted == token_checksum(tokens.to(torch.int32))
    assert token_checksum(torch.stack([tokens, tokens + 1], 1)[:, 0]) == wanted != token_checksum(tokens.flip(0))


def test_the_token_that_ends_a_document_is_its_last():
    tokens = torch.tensor([9, 5, 9, 9, 5, 5])
    assert document_numbers(tokens, 9).tolist() == [0, 1, 1, 2, 3, 3]
    found = datasets.Documents(Numbers(3), 11)[1]
    assert found["documents"].tolist() == [0, 0, 1, 1] and found["tokens"].tolist() == [10, 11, 12, 13]
    assert len(datasets.Documents(Numbers(3), 11)) == 3


@pytest.mark.parametrize(
    ("asked", "there", "wanted", "said"), [(None, 5, 5, 0), (3, 5, 3, 0), (5, 5, 5, 0), (6, 5, 5, 1)]
)
def test_as_many_windows_as_are_asked_for_or_all(caplog, asked, there, wanted, said):
    caplog.set_level("INFO", "minitron_megatron")
    assert taken("samples", asked, there, "test") == wanted and len(caplog.records) == said
    if said:
        assert caplog.messages == ["samples=6, and the test split has 5 windows: all of them are taken"]


def test_an_index_has_a_name_of_its_own_for_all_that_it_follows_from(tmp_path, monkeypatch):
    """Place, content, tokenizer, length, seed and split; and the version of Megatron that has made it."""

    def name(where="d", split="train", length=16, seed=1, **changed):
        results = {"digest": "1", "vocab_size": 300, "end_of_document": 1, **changed}
        made = DataFolder(tmp_path / where, {"digest": results.pop("digest"), "results": results})
        prefix, cache = datasets._index_of(made, split, length, seed)
        assert prefix == str(tmp_path / where / split) and cache.parent == tmp_path / where / "cache"
        return cache.name

    others = [
        name("e"), name(split="test"), name(length=17), name(seed=2), name(digest="2"), name(vocab_size=301),
        name(end_of_document=2),
    ]  # fmt: skip
    assert name() == name() and len({name(), *others}) == 1 + len(others) and name().startswith("train-16-1-")
    before = name()
    monkeypatch.setattr(datasets, "_MEGATRON", "another")
    assert name() != before


# Folders


def data(weights=(1.0,), **tokens: int) -> Data:
    folders = [
        DataFolder(name, {"digest": f"of {name}", "results": {"train": {"tokens": n}, "end_of_document": n}})
        for name, n in tokens.items()
    ]
    return Data(tuple(folders), tuple(weights))


@pytest.mark.parametrize(
    ("tokens", "epochs", "says"),
    [
        (3000, 3.0, None),
        (3001, 3.0, r"takes 3,001 tokens, and a has 1,000 to train on \(3\.00 epochs\): .*data\.max_epochs=4$"),
        (2500, 1.0, r"\(2\.50 epochs\): .*data\.max_epochs=3$"),
        (3000, 2.0, r"data\.max_epochs=3$"),
        (1, 0.001, None),
        (2, 0.001, r"\(0\.00 epochs\): .*=1$"),
    ],
)
def test_how_often_data_are_read_is_said_and_what_would_allow_it(tokens, epochs, says):
    if says is None:
        check_enough(data(a=1000), tokens, epochs)
        return
    with pytest.raises(UserError, match=says):
        check_enough(data(a=1000), tokens, epochs)


def test_a_blend_has_tokens_until_one_of_its_folders_begins_again():
    assert data((0.25, 0.75), a=100, b=900).tokens("train") == 400
    assert data((0.25, 0.75), a=900, b=100).tokens("train") == 133
    with pytest.raises(UserError, match=r"and a, b has 400 to train on \(2\.00 epochs\)"):
        check_enough(data((0.25, 0.75), a=100, b=900), 800, 1.0)
    refused_without = data(a=0)
    assert refused(check_enough, refused_without, 2, 1.0) and not refused(check_enough, refused_without, 1, 1.0)
    assert data(a=7, b=8, weights=(0.5, 0.5)).end_of_document == 7


def test_a_digest_is_of_contents_and_weights(monkeypatch):
    assert data(a=1).digest == "of a"
    both = data((0.5, 0.5), a=1, b=1)
    assert both.digest == "sha256:" + hashlib.sha256(b"[0.5, 0.5] ['of a', 'of b']").hexdigest()
    found = {
        data(w, **{name: 1 for name in names}).digest for w in ((0.5, 0.5), (0.4, 0.6)) for names in ("ab", "ba", "ac")
    }
    assert len(found) == 6
    monkeypatch.setattr(folder, "read_manifest", lambda path: {"digest": f"of {path}"})
    assert data_digest("a") == "of a" and data_digest([0.5, "a", 0.5, "b"]) == both.digest


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"vocab_size": 1, "end_of_document": 0}, None),
        ({"vocab_size": SIZES["vocab_size"]}, None),
        ({"vocab_size": SIZES["vocab_size"] + 1}, "vocab_size="),
        ({"vocab_size": 0}, "vocab_size=0 in its manifest is damaged"),
        ({"vocab_size": True}, "vocab_size="),
        ({"vocab_size": None}, "vocab_size="),
        ({"end_of_document": 9}, None),
        ({"end_of_document": 10}, "end_of_document=10"),
        ({"end_of_document": -1}, "end_of_document=-1"),
        ({"end_of_document": 1.0}, "end_of_document="),
        ({"train": {"tokens": 0}}, None),
        ({"train": {"tokens": -1}}, "train in its manifest has -1 tokens"),
        ({"validation": {"tokens": "5"}}, "validation in its manifest has '5' tokens"),
        ({"validation": 5}, "validation in its manifest has"),
        ({"train": {}}, "train in its manifest has"),
    ],
)
def test_numbers_of_a_manifest_can_be(changed, says):
    results = {"vocab_size": 10, "end_of_document": 3, "train": {"tokens": 5}, **changed}
    if says is None:
        folder._check_results(results, "d")
        return
    with pytest.raises(UserError) as error:
        folder._check_results(results, "d")
    assert str(error.value).startswith(f"d: {says}")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_folders_of_a_blend_agree_and_weigh_what_they_have_to_train_on(monkeypatch, split):
    """Whichever split is opened; each is opened with the model's sizes."""
    opened, results = [], {}

    def open_folder(path, *how):
        opened.append((path, *how))
        of = {
            "train": {"tokens": 100 * (1 + len(path))},
            "validation": {"tokens": 1},
            "tokenizer": "t",
            "vocab_size": 9,
        }
        return DataFolder(path, {"digest": path, "results": {**of, "end_of_document": 3, **results.get(path, {})}})

    monkeypatch.setattr(folder, "_open_folder", open_folder)
    masks = DocumentMasks(True, False)
    found = open_data(["a", "bbb"], split, SMALL_SHAPE, 8, masks)
    assert found.weights == pytest.approx((1 / 3, 2 / 3)) and found.masks is masks
    assert opened == [(path, split, SMALL_SHAPE, 8) for path in ("a", "bbb")]
    assert open_data([3, "a", 1, "bbb"], split, SMALL_SHAPE, 8).weights == (0.75, 0.25)
    for key, how in (
        ("tokenizer", "with different tokenizers"), ("vocab_size", "with different tokenizers"),
        ("end_of_document", "with what opens or ends a document"), ("begin_of_document", "with what opens or ends a document"),
    ):  # fmt: skip
        results["bbb"] = {key: 5}
        with pytest.raises(UserError, match=rf"a and bbb were made {how} \(their {key} differ\)"):
            open_data(["a", "bbb"], split, SMALL_SHAPE, 8)


def test_a_split_is_what_its_manifest_says(tmp_path, monkeypatch):
    (tmp_path / "train.idx").touch()
    results = {"vocab_size": 20, "end_of_document": 1, "token_dtype": "uint16", "train": {"tokens": 9}}
    asked = []
    there = SimpleNamespace(tokens=9, dtype=np.dtype(np.uint16), check_ids=lambda *given: asked.append(given))
    monkeypatch.setattr(folder, "open_split", lambda prefix, name: there)
    monkeypatch.setattr(folder, "read_manifest", lambda path: {"results": results})

    def opened(length=8, vocabulary=20):
        return folder._open_folder(str(tmp_path), "train", SMALL_SHAPE.resized(vocab_size=vocabulary), length)

    assert opened().tokens("train") == 9 and asked == [(20, f"data.path={tmp_path}, train")]
    with pytest.raises(UserError, match=r"has 9 tokens, fewer than one sample .*=9: .*use data\.sequence_length=8$"):
        opened(length=9)
    with pytest.raises(UserError, match="vocabulary of 20, the model has 19"):
        opened(vocabulary=19)
    for other in ({"tokens": 8}, {"dtype": np.dtype(np.int32)}):
        vars(there).update({"tokens": 9, "dtype": np.dtype(np.uint16), **other})
        with pytest.raises(UserError, match="the train split is not what its manifest says"):
            opened()


# Indices


def test_an_index_is_built_once_and_waited_for_on_every_rank(tmp_path, monkeypatch):
    """Whole, with the digests of its files, in a folder that may not be there yet."""
    waited, built = [], []
    monkeypatch.setattr(sample_index, "wait_until_seen", lambda *paths: waited.append(paths))

    def build(folder):
        folder.mkdir()
        built.append(folder)
        for name in ("b.npy", "a.npy"):
            (folder / name).write_text(name)

    cache = tmp_path / "cache" / "train-1"
    files = [cache / name for name in ("a.npy", "b.npy", sample_index.DIGESTS)]
    for _ in range(2):
        assert sample_index.keep_index(cache, build) == files
    assert waited == [tuple(files)] * 2 and len(built) == 1 and list(cache.parent.iterdir()) == [cache]
    assert sample_index.what_is_odd(cache) is None
    for change, says in (
        (lambda: (cache / "c.npy").touch(), "c.npy is missing, or was added"),
        (lambda: (cache / "a.npy").unlink(), "a.npy is missing, or was added"),
        (lambda: (cache / "b.npy").write_text("c.npy"), "b.npy has other bytes"),
        (lambda: (cache / sample_index.DIGESTS).write_text("[]"), "digests.json: AttributeError"),
    ):
        change()
        assert sample_index.what_is_odd(cache) == says
        assert sample_index.keep_index(cache, build) == files and sample_index.what_is_odd(cache) is None
    assert len(built) == 5


def test_an_index_that_another_job_has_made_meanwhile_is_taken(tmp_path, monkeypatch):
    cache, rename = tmp_path / "cache" / "train-1", os.rename

    def later(source, target):
        if target == cache:
            cache.mkdir()
            (cache / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", later)
    assert sample_index.keep_index(cache, Path.mkdir) == [cache / "theirs"]
    with pytest.raises(UserError, match=r"^data\.path=\S+: the sample index cannot be written to \S+theirs \("):
        sample_index.keep_index(cache / "theirs" / "x", Path.mkdir)
