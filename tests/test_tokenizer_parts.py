"""What tells two tokenizers apart, and what is copied of one, with tokenizers of a few words."""

import json
import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints import tokenizer
from minitron_megatron.checkpoints.tokenizer import (
    carry_tokenizer,
    class_config,
    copy_tokenizer,
    difference,
    export_tokenizer,
    probes,
    tokenizer_digest,
    tokenizer_files,
)
from minitron_megatron.errors import UserError


class Words:
    """A tokenizer of single characters; `cut` is what it makes of a text, by default the same for all that are equal."""

    def __init__(self, vocab, added=(), cut=None, **special):
        self.vocab, self.added, self.cut, self.asked = (
            dict(vocab),
            list(added),
            cut or (lambda text, how: [len(text)]),
            [],
        )
        self.added_tokens_decoder = {self.vocab[token]: token for token in added}
        for name in COMPARED:
            setattr(self, name, special.get(name))

    def get_vocab(self):
        return self.vocab

    def get_added_vocab(self):
        return self.added

    def decode(self, ids):
        return next(token for token, number in self.vocab.items() if number == ids[0])

    def __call__(self, text, *, verbose, **how):
        self.asked.append((text, how))
        assert verbose is False
        return {"input_ids": self.cut(text, how)}


AB = {"a": 0, "b": 1}
COMPARED = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Words(AB), None),
        (Words({"b": 1, "a": 0}), None),
        (Words({"a": 1, "b": 0}), "token 'a' is 0 and 1"),
        (Words({"a": 0, "b": 2}), "token 'b' is 1 and 2"),
        (Words({"a": 0}), "token 'b' is 1 and none"),
        (Words({**AB, "Z": 2}), "token 'Z' is none and 2"),
        *((Words(AB, **{name: "x"}), f"another {name}") for name in COMPARED),
        (Words(AB, cut=lambda text, how: [len(text) + (how == AS_TEXT)]), "from its token 0 on"),
        (Words(AB, cut=lambda text, how: [len(text) + (how == {})]), "from its token 0 on"),
        (Words(AB, cut=lambda text, how: [len(text), 7]), "is [] and [7] from its token 1 on"),
    ],
)  # fmt: skip
def test_two_tokenizers_are_told_apart_by_all_that_decides_ids(other, says):
    """Pieces, special tokens, templates; texts as they are, and with special tokens."""
    one = Words(AB)
    for pair in ((one, other), (other, one)):
        found = difference(*pair)
        assert (found is None) is (says is None)
    assert says is None or says in difference(one, other)


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ([1, 2, 3, 4, 5], [1, 9, 3, 4, 5], "'text' is [2, 3, 4] and [9, 3, 4] from its token 1 on"),
        ([1, 2], [1, 2, 3], "'text' is [] and [3] from its token 2 on"),
        ([1], [], "'text' is [1] and [] from its token 0 on"),
        ([1, 2], [1, 2], None),
    ],
)
def test_the_first_token_that_is_another_one_is_named(one, other, says):
    made = (Words(AB, cut=lambda text, how, ids=ids: ids if text == "text" else []) for ids in (one, other))
    assert tokenizer._other_ids(*made, ["same", "text", "last"]) == says


def test_added_tokens_are_tried_between_others():
    vocab = {**AB, "<x>": 2}
    one, other = Words(vocab, ["<x>"]), Words(vocab, ["<x>"], cut=lambda text, how: [text == "a<x> b" or len(text)])
    assert difference(one, other).startswith("'a<x> b' is [6] and [True]")
    assert ("a<x> b", {}) in one.asked


@pytest.mark.parametrize(("size", "step"), [(5, 1), (17, 1), (400, 1), (799, 1), (800, 2), (1300, 3)])
def test_words_of_the_vocabulary_are_tried_together_and_in_pairs(size, step):
    """Some four hundred, and none that was added."""
    made = Words({**{f"w{i}": i for i in range(size)}, "<x>": size}, ["<x>"])
    words = [f"w{i}" for i in range(0, size, step)]
    eighths = words[::8]
    pairs = [a + b for a, b in pairwise(eighths)]
    assert probes(made) == [*tokenizer._PROBES, " ".join(words), *pairs]


# Files


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_files_are_all_of_a_tokenizers_folder_and_the_known_ones_of_others(tmp_path):
    given = {
        "tokenizer_dot_json": "{}",
        "notes_dot_txt": "",
        "sub__x": "",
        "additional_chat_templates__a_dot_jinja": "A",
    }
    known = ["additional_chat_templates/a.jinja", "tokenizer.json"]
    alone, beside, other = (put(tmp_path / name, **given) for name in ("tokenizer", "m/tokenizer", "other"))
    put(beside, model_dot_safetensors="")
    found = {
        folder: [f.relative_to(folder).as_posix() for f in tokenizer_files(folder)] for folder in (alone, beside, other)
    }
    assert found == {alone: names(alone), beside: known, other: known} and tokenizer_files(tmp_path / "none") == []
    copy_tokenizer(other, tmp_path / "copy")
    copy_tokenizer(other, tmp_path / "copy")
    assert names(tmp_path / "copy") == known and (tmp_path / "copy" / known[0]).read_text() == "A"


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (None, None),
        ({"hidden_size": 3}, None),
        ({"model_type": 3}, None),
        (
            {"model_type": "llama", "hidden_size": 3, "transformers_version": "4"},
            {"model_type": "llama", "transformers_version": "4"},
        ),
    ],
)
def test_what_decides_the_class_goes_along_where_the_tokenizer_is_alone(tmp_path, config, kept):
    source = put(
        tmp_path / "hf", tokenizer_dot_json="{}", **({} if config is None else {"config_dot_json": json.dumps(config)})
    )
    text = None if kept is None else json.dumps(kept, indent=2) + "\n"
    assert class_config(source) == text
    for alone in (True, False):
        target = tmp_path / str(alone)
        copy_tokenizer(source, target, alone=alone)
        there = ["config.json"] * (alone and kept is not None)
        assert names(target) == [*there, "tokenizer.json"]
        assert not there or (target / "config.json").read_text() == text
    copy_tokenizer(tmp_path / "hf", tmp_path / "tokenizer")
    assert tokenizer_digest(tmp_path / "hf") == tokenizer_digest(tmp_path / "tokenizer")
    (source / "tokenizer.json").unlink()
    assert tokenizer_digest(source) == tokenizer_digest(tmp_path / "none")


def test_a_digest_follows_names_and_contents(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_text("c")
    contents = [{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "b"}, {}, {"b": "a", "a": "b"}]
    found = []
    for one in contents:
        monkeypatch.setattr(tokenizer, "_contents", lambda folder, one=one: one)
        found.append(tokenizer_digest(tmp_path))
    assert len(set(found)) == len(contents) and all(digest.startswith("sha256:") for digest in found)
    monkeypatch.setattr(tokenizer, "_contents", lambda folder: {"ab": file})
    assert tokenizer_digest(tmp_path) == found[1]
    monkeypatch.setattr(tokenizer, "_contents", lambda folder: {"a": "b", "b": "a"})
    assert tokenizer_digest(tmp_path) == found[5]


@pytest.fixture
def read(monkeypatch):
    """Tokenizers by the name of their folder; None for one that cannot be read."""
    made = {}

    def reading(path, _=None):
        if made[path.name] is None:
            raise UserError(f"{path.name} cannot be read")
        return made[path.name]

    monkeypatch.setattr(tokenizer, "read_tokenizer", reading)
    return made


@pytest.mark.parametrize("copy", [carry_tokenizer, export_tokenizer])
def test_a_copy_is_the_same_tokenizer_or_refused(tmp_path, read, caplog, copy):
    """One that cannot be read is copied as it is, and said."""
    source = put(tmp_path / "source", tokenizer_dot_json="{}")
    read |= {"source": Words(AB), "target": Words(AB)}
    copy(source, tmp_path / "target")
    assert names(tmp_path / "target") == ["tokenizer.json"] and not caplog.records
    read["target"] = Words({"a": 0})
    with pytest.raises(UserError, match=r"\(token 'b' is 1 and none\)"):
        copy(source, tmp_path / "target")
    read["source"] = None
    with caplog.at_level(logging.WARNING):
        copy(source, tmp_path / "target")
    assert caplog.messages == ["source cannot be read: it is copied as it is"]


def test_of_no_tokenizer_there_is_no_copy(tmp_path, read):
    (tmp_path / "source").mkdir()
    carry_tokenizer(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("config", [None, {"a": "é", "eos_token": "old"}])
def test_a_tokenizer_is_written_as_its_class_built_it_where_another_class_reads_it(tmp_path, monkeypatch, config):
    """Its pieces, and the special tokens that it takes by itself; nothing is written where it is the same."""
    files = {"tokenizer_dot_json": "old"} | ({"tokenizer_config_dot_json": json.dumps(config)} if config else {})
    source, saved = put(tmp_path / "source", **files), []
    own = Words(AB, eos_token="</s>")
    own.backend_tokenizer = SimpleNamespace(save=lambda file: saved.append(file) or Path(file).write_text("built"))
    others = [Words({"a": 0}, eos_token="</s>"), Words(AB, eos_token="</s>")]
    monkeypatch.setattr(tokenizer, "read_tokenizer", lambda path, _: own if path == source else others.pop(0))
    export_tokenizer(source, tmp_path / "target")
    assert saved == [str(tmp_path / "target" / "tokenizer.json")] and not others
    text = (tmp_path / "target" / "tokenizer_config.json").read_text()
    values = {**(config or {}), "eos_token": "</s>"}
    assert text == json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    others[:] = [Words(AB, eos_token="</s>")]
    export_tokenizer(source, tmp_path / "same")
    assert len(saved) == 1 and (tmp_path / "same" / "tokenizer.json").read_text() == "old"


def test_a_tokenizer_is_read_from_its_folder_and_runs_no_program(monkeypatch):
    import transformers

    asked = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *given, **how: asked.append((given, how)))
    tokenizer.read_tokenizer(Path("t"))
    assert asked == [((Path("t"),), {"local_files_only": True, "trust_remote_code": False})]
