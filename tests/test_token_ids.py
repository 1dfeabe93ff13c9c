"""Every token id, in every file beside a model, follows a cut of its vocabulary, or goes."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.checkpoints.digests import digests_of
from minitron_megatron.checkpoints.export_checks import check_export_hf
from minitron_megatron.checkpoints.folder import _beside, open_model_folder
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.config import ExportHfConfig, PruneConfig, TargetConfig
from minitron_megatron.data.token_ids import renumber
from minitron_megatron.data.vocabulary import (
    BytePairs,
    _renumbered,
    check_cut,
    cut_tokenizer,
    numbered,
    write_tokenizer,
)
from minitron_megatron.errors import UserError
from minitron_megatron.prune.checks import check_prune
from minitron_megatron.prune.prune import prune_model
from tests.test_prune import random_scores, write_scores
from tests.tiny import hf_model, imported, model_option

# Tokens 0, 5, 7 and 9 stay.
NEW = {0: 0, 5: 1, 7: 2, 9: 3}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 2}),
        ({"eos_token_id": [9, 8, 5]}, {"eos_token_id": [3, 1]}),
        ({"pad_token_id": 8, "bos_token_id": None}, {"pad_token_id": None, "bos_token_id": None}),
        (
            {"forced_bos_token_id": 5, "decoder_start_token_id": 0},
            {"forced_bos_token_id": 1, "decoder_start_token_id": 0},
        ),
        ({"bad_words_ids": [[7, 9], [7, 8], [5]]}, {"bad_words_ids": [[2, 3], [1]]}),
        ({"bad_words_ids": [[8]]}, {"bad_words_ids": None}),
        ({"force_words_ids": [[[5], [8]], [[7, 9]]]}, {"force_words_ids": [[[1]], [[2, 3]]]}),
        (
            {"suppress_tokens": [1, 9], "begin_suppress_tokens": [0]},
            {"suppress_tokens": [3], "begin_suppress_tokens": [0]},
        ),
        ({"suppress_tokens": []}, {"suppress_tokens": []}),
        ({"forced_decoder_ids": [[1, 7], [2, 8]]}, {"forced_decoder_ids": [[1, 2]]}),
        ({"sequence_bias": [[[7], 2.0], [[8], -1.0]]}, {"sequence_bias": [[[2], 2.0]]}),
        ({"lang_to_id": {"<|en|>": 9, "<|de|>": 4}}, {"lang_to_id": {"<|en|>": 3}}),
        ({"added_tokens_decoder": {"7": {"content": "x"}, "8": {}}}, {"added_tokens_decoder": {"2": {"content": "x"}}}),
        (
            {"task_specific_params": {"chat": {"eos_token_id": 9}}},
            {"task_specific_params": {"chat": {"eos_token_id": 3}}},
        ),
        ({"stages": [{"stop_token_ids": [7, 1]}]}, {"stages": [{"stop_token_ids": [2]}]}),
        ({"image_token_index": 9}, {"image_token_index": 3}),
        ({"watermark_ids": [7]}, {"watermark_ids": None}),
        ({"x_id": 7, "id": True, "width": 7}, {"x_id": None, "id": True, "width": 7}),
        ({"lang_to_id": 5, "ids": [], "to_ids": None}, {"lang_to_id": None, "ids": None, "to_ids": None}),
        ({"force_words_ids": [[[8]], [8]], "bad_words_ids": []}, {"force_words_ids": None, "bad_words_ids": None}),
        ({"forced_decoder_ids": [[1, 7, 2]]}, {"forced_decoder_ids": None}),
        ({"sequence_bias": {"7": 1.0}}, {"sequence_bias": None}),
        ({"sequence_bias": [[[7, 8], 1.0]]}, {"sequence_bias": None}),
        ({"added_tokens_encoder": {"a": 9, "b": 1}}, {"added_tokens_encoder": {"a": 3}}),
        ({"names": ["a", {"pad_token_id": 5}]}, {"names": ["a", {"pad_token_id": 1}]}),
        (
            {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_8": 8}},
            {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_8": 8}},
        ),
        (
            {"max_length": 7, "top_k": 5, "torch_dtype": "bfloat16"},
            {"max_length": 7, "top_k": 5, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_ids_are_renumbered_wherever_they_stand(values, wanted):
    assert renumber(values, NEW, "generation_config.json") == wanted


@pytest.mark.parametrize(
    "value", [{"eos_token_id": "7"}, {"bad_words_ids": 3}, {"bad_words_ids": [7]}, {"pad_token_id": 1.5}]
)
def test_what_is_no_id_is_refused_by_its_key(value):
    with pytest.raises(UserError, match=f"generation_config.json: {next(iter(value))}"):
        renumber(value, NEW, "generation_config.json")


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 400) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
_keys = """eos_token_id bad_words_ids forced_decoder_ids sequence_bias suppress_tokens lang_to_id added_tokens_decoder
    x_ids""".split()


@given(st.dictionaries(st.sampled_from(_keys), _json, max_size=3))
def test_whatever_stands_there_no_old_id_stays(values):
    """Cut to one token, nothing but 0 can be an id any more."""
    try:
        cut = renumber(values, {300: 0}, "x.json")
    except UserError as error:
        assert "\n" not in str(error)
        return
    for key, value in cut.items():
        if key in ("eos_token_id", "bad_words_ids", "suppress_tokens"):
            assert all(one == 0 for one in _numbers(value)), (key, value)


def _numbers(value) -> list[int]:
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [value] if type(value) is int else []


# A tokenizer


def pairs_of(tmp_path, **model) -> BytePairs:
    vocab = {"a": 0, "b": 1, "<0x0A>": 2, "ab": 3, "abb": 4, "<0xZZ>": 5, "[?]": 6}
    values = {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "b"], "b a"], **model}
    added = [{"content": "<e>", "id": 7}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": values, "added_tokens": added}))
    return BytePairs(tmp_path)


@pytest.mark.parametrize(
    ("model", "stay"),
    [
        ({}, {0, 1, 2, 5, 6, 7}),  # letters: what no merge makes; and added tokens
        ({"byte_fallback": True}, {2, 7}),  # bytes alone
        ({"byte_fallback": True, "unk_token": "[?]"}, {2, 6, 7}),
        ({"unk_token": "none"}, {0, 1, 2, 5, 6, 7}),
    ],
)
def test_letters_or_bytes_stay_whatever_their_frequency(tmp_path, model, stay):
    assert pairs_of(tmp_path, **model).always() == stay


def test_a_token_has_all_that_it_is_made_of(tmp_path):
    pairs = pairs_of(tmp_path)
    assert (
        pairs.with_parts("abb") == {0, 1, 3, 4} and pairs.with_parts("ab") == {0, 1, 3} and pairs.with_parts("a") == {0}
    )
    # In the first of the ways that there are.
    two = pairs_of(tmp_path, merges=["ab b", "a bb", "a b"], vocab={"a": 0, "b": 1, "ab": 3, "abb": 4, "bb": 5})
    assert two.with_parts("abb") == {0, 1, 3, 4}


def test_merges_stay_with_their_parts_and_what_they_make(tmp_path):
    pairs = pairs_of(tmp_path)
    pairs.file["padding"] = {"pad_id": 7, "pad_token": "<e>", "direction": "Right"}
    cut = cut_tokenizer(pairs, numbered(np.array([0, 1, 3, 7])), tmp_path)
    assert cut["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2} and cut["model"]["merges"] == [["a", "b"]]
    assert cut["added_tokens"] == [{"content": "<e>", "id": 3}] and cut["model"]["type"] == "BPE"
    assert cut["padding"] == {"pad_id": 3, "pad_token": "<e>", "direction": "Right"} and "post_processor" not in cut
    whole = cut_tokenizer(pairs, {n: n for n in range(8)}, tmp_path)
    assert whole["model"]["merges"] == [["a", "b"], ["ab", "b"]]  # "ba" is no token


# A whole model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose every file has ids: of tokens that stay (0, 1), and of one that goes (299)."""
    path = imported(hf_model(num_hidden_layers=2), tmp_path_factory.mktemp("model"))
    generation = {
        "eos_token_id": [1, 299],
        "bos_token_id": 0,
        "bad_words_ids": [[299], [1, 0]],
        "suppress_tokens": [299, 256],
        "forced_eos_token_id": 1,
    }
    (path / "huggingface" / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = path / "tokenizer"
    file = json.loads((tokenizer / "tokenizer.json").read_text())
    file["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(file))
    (tokenizer / "added_tokens.json").write_text(json.dumps({"<s>": 0, "</s>": 1}))
    (tokenizer / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token_id": 299})
    )
    (tokenizer / "vocab.json").write_text(json.dumps(file["model"]["vocab"]))
    (tokenizer / "merges.txt").write_text("")
    (tokenizer / "chat_template.jinja").write_text("{{ bos_token }}")
    (tokenizer / "of_another_program.json").write_text(json.dumps({"ids": [299]}))
    resized(path)
    return path


def resized(path) -> None:
    """Write the manifest's sizes and digests anew, as after a change by hand."""
    import yaml

    manifest = yaml.safe_load((path / "manifest.yaml").read_text())
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.name != "manifest.yaml")
    manifest["files"] = {str(f.relative_to(path)): f.stat().st_size for f in found}
    manifest["digests"] = digests_of(path, _beside(manifest["files"]))
    (path / "manifest.yaml").write_text(yaml.safe_dump(manifest))


def test_generate_works_with_every_file_of_a_cut_model(model, tmp_path, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scores = random_scores(model)
    # The highest ids are the least frequent.
    scores.tensors["vocab"] = np.arange(300, 0, -1).astype(np.float32)
    where = write_scores(scores, tmp_path / "scores")
    cfg = PruneConfig(
        model=model_option(model), scores=str(where), target=TargetConfig(vocab_size=280), output=str(tmp_path / "cut")
    )
    prune_model(cfg)
    export_hf(ExportHfConfig(model=model_option(tmp_path / "cut"), output=str(tmp_path / "hf")))
    hf = tmp_path / "hf"
    generation = json.loads((hf / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1] and generation["bad_words_ids"] == [[1, 0]]
    assert generation["suppress_tokens"] == [256] and generation["forced_eos_token_id"] == 1
    assert json.loads((hf / "added_tokens.json").read_text()) == {"<s>": 0, "</s>": 1}
    assert json.loads((hf / "special_tokens_map.json").read_text())["pad_token_id"] is None
    assert json.loads((hf / "tokenizer.json").read_text())["padding"]["pad_id"] == 1
    assert (hf / "chat_template.jinja").read_text() == "{{ bos_token }}"
    assert not any((hf / name).exists() for name in ("vocab.json", "merges.txt", "of_another_program.json"))
    assert any("of_another_program.json left out" in one.message for one in caplog.records)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert max(tokenizer.get_vocab().values()) == 279
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    out = AutoModelForCausalLM.from_pretrained(hf).generate(ids, max_new_tokens=6, do_sample=False)
    assert out.max() < 280 and out.shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("huggingface/generation_config.json", "{", "generation_config.json cannot be read"),
        ("huggingface/generation_config.json", "[1]", "generation_config.json is not a JSON object"),
        (
            "huggingface/generation_config.json",
            '{"bad_words_ids": "x"}',
            "bad_words_ids='x' must be lists of token ids",
        ),
        ("huggingface/config.json", '{"eos_token_id": {"a": 1}}', "eos_token_id has a mapping, which is no token id"),
        ("tokenizer/added_tokens.json", '{"a": "b"}', "a token has 'b', which is no token id"),
        ("tokenizer/tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder has 'x'"),
        ("tokenizer/tokenizer.json", '{"model": {"type": "BPE"}}', "tokenizer.json cannot be read"),
        (
            "tokenizer/tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}',
            "the id of 'a' is none",
        ),
        ("tokenizer/tokenizer.json", "[]", "tokenizer.json cannot be read"),
        ("tokenizer/tokenizer.json", '{"model": {"type": "Unigram"}}', "is a Unigram tokenizer"),
    ],
)
def test_damage_is_found_before_anything_is_measured(model, tmp_path, file, text, says):
    shutil.copytree(model, path := tmp_path / "m")
    (path / file).write_text(text)
    resized(path)
    target = TargetConfig(vocab_size=280)
    cfg = PruneConfig(model=model_option(path), target=target, output=str(tmp_path / "x"), dry_run=True)
    with pytest.raises(UserError, match=says) as refused:
        check_prune(cfg)
    assert "\n" not in str(refused.value)
    if file.startswith("huggingface") and "cannot be read" in says:
        with pytest.raises(UserError, match=says):
            check_export_hf(ExportHfConfig(model=model_option(path), output=str(tmp_path / "y")))


def test_a_post_processor_that_names_a_token_of_nobody_is_damage(model, tmp_path):
    shutil.copytree(model, path := tmp_path / "m")
    file = json.loads((path / "tokenizer" / "tokenizer.json").read_text())
    file["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["<s>", 0]}
    (path / "tokenizer" / "tokenizer.json").write_text(json.dumps(file))
    resized(path)
    with pytest.raises(UserError, match="a token that it names is none of its own"):
        check_cut(open_model_folder(path))


def test_a_post_processors_ids_follow(model, tmp_path):
    shutil.copytree(model / "tokenizer", source := tmp_path / "tokenizer")
    file = json.loads((source / "tokenizer.json").read_text())
    tokens = {i: token for token, i in file["model"]["vocab"].items()}
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(file))
    # Without token 260, which no merge that stays needs.
    kept = np.array([i for i in range(300) if tokens[260] not in tokens[i] or i < 258])
    write_tokenizer(source, tmp_path / "cut", kept)
    cut = json.loads((tmp_path / "cut" / "tokenizer.json").read_text())
    assert cut["post_processor"]["special_tokens"]["</s>"]["ids"] == [1]
    assert sorted(cut["model"]["vocab"].values()) == list(range(len(kept)))
    assert torch.equal(torch.tensor([cut["model"]["vocab"][tokens[i]] for i in kept]), torch.arange(len(kept)))


def test_special_tokens_keep_their_names_and_have_their_new_numbers():
    ids = {"<s>": 7, "</s>": 9}
    before = {"sep": ["</s>", 2], "cls": ["<s>", 1], "special": [{"ids": [1, 2], "tokens": ["<s>", "</s>"]}, "more", 4]}
    assert _renumbered(before, ids) == {
        "sep": ["</s>", 9],
        "cls": ["<s>", 7],
        "special": [{"ids": [7, 9], "tokens": ["<s>", "</s>"]}, "more", 4],
    }
