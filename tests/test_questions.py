"""Questions and their figures, worked out by hand; which tokenizers say the same of an id."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.data import same_tokenizer
from minitron_megatron.data.questions import QuestionFile, Request, buckets, encode, encode_all, lengths, margin
from minitron_megatron.data.same_tokenizer import _first_difference, _parts, _special
from minitron_megatron.errors import UserError


def question(**changed) -> dict:
    return {"context": "c", "choices": ["a", "b"], "answer": 0, **changed}


def written(tmp_path, *questions):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    return str(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("normalization", "wanted"), [("none", [1, 1, 1]), ("characters", [1, 3, 2]), ("bytes", [1, 3, 4])]
)
def test_log_likelihoods_are_divided_by_nothing_by_characters_or_by_bytes(normalization, wanted):
    assert lengths(["a", "abc", "éü"], normalization).tolist() == wanted


def test_a_margin_is_to_the_best_of_the_others():
    scores = np.array([-3.0, -1.0, -2.0])
    assert [margin(scores, answer) for answer in range(3)] == [-2.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("normalization", "right", "margins"),
    [
        ("none", 1, (-4 + 8) + (-6 + 2) + (-1 + 1)),
        ("characters", 2, (-4 / 2 + 8 / 1) + (-6 / 6 + 2 / 1) + (-1 / 2 + 1 / 4)),
    ],
)
def test_figures_are_over_all_questions(tmp_path, normalization, right, margins):
    """Of equal scores the first choice is the answer that is given."""
    of = [
        question(choices=["xx", "x"], answer=0), question(choices=["x", "xxxxxx", "x"], answer=1),
        question(choices=["xxxx", "xx"], answer=1),
    ]  # fmt: skip
    file = QuestionFile(written(tmp_path, *of), None)
    found = file.figures(np.array([-4.0, -8.0, -2.0, -6.0, -3.0, -1.0, -1.0]), normalization)
    assert found == {"questions": 3, "accuracy": right / 3, "margin": pytest.approx(margins / 3)}
    assert file.name == "q" and file.digest.startswith("sha256:")


@pytest.mark.parametrize(("limit", "taken", "said"), [(None, 3, 0), (2, 2, 0), (3, 3, 0), (4, 3, 1)])
def test_as_many_questions_as_asked_for(tmp_path, caplog, limit, taken, said):
    """With the lines that they are in, empty ones counted."""
    caplog.set_level("INFO", "minitron_megatron")
    path = written(tmp_path, question(context="1"), question(context=["2", "3"]), question(context="4"))
    (tmp_path / "q.jsonl").write_text("\n" + (tmp_path / "q.jsonl").read_text())
    found = QuestionFile(path, limit)
    texts = [("1", "a", 2), ("1", "b", 2), ("2", "a", 3), ("3", "b", 3), ("4", "a", 4), ("4", "b", 4)]
    assert found.texts() == [(context, choice, f"{path}:{line}") for context, choice, line in texts][: 2 * taken]
    assert len(caplog.records) == said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"choices": ["a"]}, "two texts or more"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": ["a", 3]}, "two texts or more"),
        ({"choices": "ab"}, "two texts or more"),
        ({"context": ["1"]}, "as many texts as there are choices"),
        ({"context": ["1", "2", "3"]}, "as many texts as there are choices"),
        ({"context": None}, "context must be a text"),
        ({"answer": 2}, "answer=2 must be the number of a choice, 0 to 1"),
        ({"answer": -1}, "answer=-1"),
        ({"answer": True}, "answer=True"),
        ({"answer": "0"}, "answer='0'"),
    ],
)
def test_questions_that_are_none_are_refused_by_their_line(tmp_path, changed, says):
    with pytest.raises(UserError) as error:
        QuestionFile(written(tmp_path, question(answer=1), question(**changed)), None)
    assert "q.jsonl:2" in str(error.value) and says in str(error.value)


def test_files_without_questions_are_refused(tmp_path):
    for text, says in (("\n \n", "has no question"), ("[1]\n", r"q\.jsonl:1 is not an object"), ("{\n", "is not JSON")):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(UserError, match=says):
            QuestionFile(str(tmp_path / "q.jsonl"), None)


class Letters:
    """A token a letter, after a BOS, which is the letter 1."""

    bos_token, bos_token_id, eos_token_id = "1", ord("1"), ord("2")

    def encode(self, text, add_special_tokens=True):
        return [*([self.bos_token_id] if add_special_tokens and self.bos_token else []), *map(ord, text)]


class Plain(Letters):
    """Without a BOS."""

    bos_token = bos_token_id = None


@pytest.mark.parametrize(
    ("context", "continuation", "of", "tokens", "scored"),
    [
        ("ab", " c", Letters, "1ab c", 2),
        ("ab ", "c", Letters, "1ab c", 2),  # the space goes to the choice
        ("1ab", "c", Letters, "1ab" + "c", 1),  # a BOS that is there is not put there again
        ("ab", "c", Plain, "abc", 1),
        ("", "cd", Letters, "1cd", 2),
        ("", "1cd", Letters, "1cd", 2),
        ("", "cd", Plain, "2cd", 2),
    ],
)
def test_text_becomes_tokens_as_in_the_harness(context, continuation, of, tokens, scored):
    found = encode(of(), context, continuation)
    assert "".join(map(chr, found.tokens)) == tokens and found.scored == scored


@pytest.mark.parametrize(("positions", "taken"), [(4, True), (3, False)])
def test_the_last_token_of_a_choice_needs_no_position(positions, taken):
    source = SimpleNamespace(texts=lambda: [("ab", "cd", "here")])
    if taken:
        assert [(len(one.tokens), one.scored) for one in encode_all(Letters(), source, positions)] == [(5, 2)]
        return
    with pytest.raises(UserError, match=r"^here: context and choice are 5 tokens, more than the model's 3 positions"):
        encode_all(Letters(), source, positions)


def test_a_choice_that_adds_nothing_is_refused():
    with pytest.raises(UserError, match=r"^here: the choice '' adds no tokens to its context"):
        encode_all(Letters(), SimpleNamespace(texts=lambda: [("ab", "", "here")]), 99)


@pytest.mark.parametrize(
    ("tokens", "multiple", "padded"), [(33, 1, 32), (34, 1, 64), (2, 1, 32), (33, 48, 96), (98, 48, 192)]
)
def test_requests_are_padded_to_the_next_multiple(tokens, multiple, padded):
    """The last token is a label alone."""
    requests = [Request([0] * 200, 1), Request([0] * tokens, 1)]
    found = buckets(requests, multiple)
    assert found[padded] == [1] and list(found) == sorted(found) and len(found) == 2


# Which tokenizers say the same


def parts(**changed) -> dict:
    found = {"vocabulary": {"a": 0, "b": 1, "<e>": 2}, "merges": ["a b"], "added": {2: "<e>"}, **changed}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (parts(), None),
        (parts(merges=["b a"]), "their merges differ"),
        (parts(merges=None), None),
        (parts(vocabulary={"a": 0, "b": 1, "c": 5}), None),  # the model's may have more
        (parts(vocabulary={"a": 1, "b": 0}), "token 0 is 'a' in the data, 'b' in the model's"),
        (parts(vocabulary={"a": 0}), "token 1 is 'b' in the data, None in the model's"),
        (parts(vocabulary={"a": 0}, added={1: "b", 2: "<e>"}), None),
        (
            parts(vocabulary={"a": 0, "b": 1}, added={2: "<f>"}),
            "documents end in token 2, '<e>' in the data, '<f>' in the model's",
        ),
        (parts(vocabulary={"a": 0, "b": 1}, added={}), None),
        ({"tokenizer.model": b"1"}, None),
        (parts(merges=["b a"], vocabulary={"a": 1}), "token 0 is 'a'"),  # what an id is comes first
    ],
)
def test_what_changes_the_meaning_of_ids_is_a_difference(here, says):
    """Special tokens are compared by what ends a document alone."""
    found = _first_difference(parts(), here, 2)
    assert found is None if says is None else found.startswith(says)


def test_files_that_are_not_understood_are_compared_byte_by_byte():
    one, other = {"tokenizer.model": b"1"}, {"tokenizer.model": b"2"}
    assert _first_difference(one, dict(one), 2) is None
    assert _first_difference(one, other, 2) == "their tokenizer.model differ"


def test_a_token_is_an_added_or_an_ordinary_one():
    assert [_special(parts(), token) for token in (0, 2, 9, None)] == ["a", "<e>", None, None]
    assert _special({"vocabulary": {"a": 0}, "added": {0: "x"}}, 0) == "x" and _special({}, 0) is None


def test_parts_are_what_the_files_have(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sp")
    assert _parts(tmp_path) == {"tokenizer.model": b"sp"}
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1.5}))
    assert _parts(tmp_path) == {"vocabulary": {"a": 0}}
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\nab c\n")
    assert _parts(tmp_path) == {"vocabulary": {"a": 0}, "merges": ["a b", "ab c"]}
    model = {"vocab": {"a": 0}, "merges": [["a", "b"], "ab c"]}
    added = [{"id": 7, "content": "<x>"}, {"id": "8", "content": "y"}, 5]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    assert _parts(tmp_path) == {"vocabulary": {"a": 0}, "merges": ["a b", "ab c"], "added": {7: "<x>"}}
    unigrams = {"vocab": [["a", -1.0], ["b", -2.0], []]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": unigrams}))
    assert _parts(tmp_path) == {"vocabulary": {"a": 0, "b": 1}, "added": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": True}}, "added_tokens": None}))
    assert _parts(tmp_path) == {"added": {}}


def test_other_kinds_and_other_names_of_special_tokens_are_said(tmp_path, monkeypatch, caplog):
    there, here = tmp_path / "data", tmp_path / "model"
    monkeypatch.setattr(same_tokenizer, "tokenizer_digest", lambda path: str(path))
    monkeypatch.setattr(same_tokenizer, "tokenizer_path", lambda path: path)
    monkeypatch.setattr(same_tokenizer, "_other_text", lambda *_: None)
    known = {}
    monkeypatch.setattr(same_tokenizer, "_parts", lambda path: known["data" if "data" in str(path) else "model"])
    folder = SimpleNamespace(path=there, results={"end_of_document": 2})
    for data, model, said in (
        (parts(), parts(), []),
        (parts(), {"tokenizer.model": b""}, ["have tokenizers of different kinds, which are not compared"]),
        (
            parts(added={2: "<e>", 3: "x", 4: "y"}),
            parts(added={2: "<e>", 3: "x", 4: "z"}),
            ["call special token 4 differently: 'y' and 'z'"],
        ),
        (parts(added={3: "x", 2: "<e>"}), parts(), []),
    ):
        caplog.clear()
        known.update(data=data, model=model)
        same_tokenizer._check(folder, "teacher", here)
        assert [one.partition(f"teacher={here} ")[2] for one in caplog.messages] == said
    known.update(data=parts(), model=parts(merges=["b a"]))
    with pytest.raises(UserError, match=r"another tokenizer than that of teacher=\S+ \(their merges differ\): prepare"):
        same_tokenizer._check(folder, "teacher", here)
