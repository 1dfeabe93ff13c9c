"""Numbers and names in our own files have bounds too: what a manifest cannot say is one line that names the key."""

import json
from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.checkpoints.folder import open_model_folder, output_folder, read_manifest
from minitron_megatron.config import MergeScoresConfig
from minitron_megatron.data.folder import _check_results
from minitron_megatron.distill.contents import CacheFolder, Contents
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import load_layer_analysis
from minitron_megatron.importance.merge import check_merge

CONTENTS = Contents("blake3:a", "sha256:b", 1, 32, False, 300, 1.5, 20, 40, 8, 16)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def made(path, results: dict, files: dict[str, str] | None = None, inputs: dict | None = None):
    with output_folder(path, command="launch/x.py", config={}, inputs=inputs or {}, resume=True) as out:
        for name, text in (files or {}).items():
            (out.path / name).write_text(text)
        out.results = results
    return path


def changed(path, **values):
    file = path / "manifest.yaml"
    manifest = yaml.safe_load(file.read_text())
    file.write_text(
        yaml.safe_dump({key: value for key, value in {**manifest, **values}.items() if value != "leave out"})
    )
    return path


@pytest.mark.parametrize(
    "key", ["files", "digest", "inputs", "results", "config", "command", "made", "fingerprint", "digests"]
)
def test_a_manifest_of_another_kind_is_refused_by_its_key(tmp_path, key):
    path = made(tmp_path / "o", {})
    for value in (3, [1], None):
        with pytest.raises(UserError, match=f"manifest.yaml is damaged \\({key} is missing or odd\\)"):
            read_manifest(changed(path, **{key: value}))
    if key in ("files", "digest"):
        with pytest.raises(UserError, match=f"{key} is missing or odd"):
            read_manifest(changed(path, **{key: "leave out"}))


@given(st.sampled_from(["files", "digest", "digests", "inputs", "results", "config", "made", "seconds"]), _json)
def test_whatever_a_manifest_says_it_is_read_or_refused_in_a_line(tmp_path_factory, key, value):
    path = made(tmp_path_factory.mktemp("m") / "o", {}, {"model.yaml": "a: 1"})
    changed(path, **{key: value})
    with pytest.raises(UserError) as refused:
        open_model_folder(path)
    assert "\n" not in str(refused.value)


DATA = {
    "train": {"tokens": 9},
    "validation": {"tokens": 0},
    "vocab_size": 300,
    "end_of_document": 1,
    "token_dtype": "uint16",
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": "300"}, "vocab_size='300'"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776"),
        ({"end_of_document": 300}, "end_of_document=300"),
        ({"end_of_document": None}, "end_of_document=None"),
        ({"train": 3}, "train in its manifest has None tokens"),
        ({"validation": {"tokens": -1}}, "validation in its manifest has -1 tokens"),
        ({"train": {"tokens": 1.5}}, "train in its manifest has 1.5 tokens"),
    ],
)
def test_data_that_cannot_be_are_refused(change, says):
    _check_results(DATA, "data.path=x")
    with pytest.raises(UserError, match=f"data.path=x: {says}"):
        _check_results({**DATA, **change}, "data.path=x")


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_samples": 0},
        {"train": 10**15},
        {"train": "40"},
        {"vocab_size": -1},
        {"temperature": float("nan")},
        {"top_k": True},
        {"model": 3},
        {"reset_attention_mask": "no"},
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_is_refused_at_once(tmp_path, change):
    whole = asdict(CONTENTS)
    files = {chunk.name: "" for chunk in CONTENTS.chunks()}
    assert CacheFolder.open(made(tmp_path / "whole", whole, files)).contents == CONTENTS
    with pytest.raises(UserError, match=r"is damaged .* make the cache again"):
        CacheFolder.open(made(tmp_path / "odd", {**whole, **change}, files))
    assert CONTENTS.odd() is None and replace(CONTENTS, top_k=0).odd() == "top_k"


@given(st.sampled_from([f for f in asdict(CONTENTS) if f != "train"]), _json)
def test_no_field_of_a_cache_is_used_before_it_is_checked(name, value):
    found = replace(CONTENTS, **{name: value})
    if found.odd() is None:
        assert found.files >= 1 and found.total_bytes > 0 and isinstance(found.checksum("train", 0), int)


JUDGED = {"loss": 1.0, "perplexity": 2.7}
LAYERS = {
    "num_layers": 2,
    "base": JUDGED,
    "blocks": [{"length": 1, "start": 0, "bi": 0.1, **JUDGED}, {"length": 1, "start": 1, "bi": 0.2, **JUDGED}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": "2"},
        {"num_layers": 1},
        {"base": {"loss": "x"}},
        {"blocks": [{"length": 0, "start": 0, **JUDGED}]},
        {"blocks": [{"length": 1, "start": 0, "loss": [1]}] * 2},
    ],
    ids=str,
)
def test_a_layer_analysis_that_cannot_be_is_refused(tmp_path, change):
    digest = {"model": "blake3:a"}
    assert load_layer_analysis(made(tmp_path / "o", {}, {"layers.json": json.dumps(LAYERS)}, digest)).num_layers == 2
    with pytest.raises(UserError, match=r"layers\.json is damaged"):
        load_layer_analysis(made(tmp_path / "x", {}, {"layers.json": json.dumps({**LAYERS, **change})}, digest))


@pytest.mark.parametrize("parts", [3, [3], [{"data": "a", "seed": 1, "first_sample": 0}], [{"data": 1, "seed": 1}]])
def test_parts_of_scores_that_cannot_be_are_refused(tmp_path, parts):
    from minitron_megatron.importance.merge import _SHARED, FILE

    results = {**dict.fromkeys(_SHARED, 1), "parts": parts}
    folders = [str(made(tmp_path / name, results, {FILE: ""}, {"model": "m"})) for name in "ab"]
    with pytest.raises(UserError, match=r"is not a scores folder|are damaged"):
        check_merge(MergeScoresConfig(scores=folders, output=str(tmp_path / "o")))
