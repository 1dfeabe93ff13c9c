"""JSON and YAML of any kind: a value of plain parts, or one kind of error; nothing that ends a command in a traceback."""

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron import status
from minitron_megatron.checkpoints.folder import load_json, load_yaml
from minitron_megatron.claims import read_claim
from minitron_megatron.errors import UserError, in_one_line, of_folders
from minitron_megatron.lengths import _mapping
from minitron_megatron.parallel import precision
from minitron_megatron.plain_files import Unreadable, parse_json, parse_yaml
from minitron_megatron.preset_files import words_of_file
from minitron_megatron.stages import read_stages
from minitron_megatron.starts import tail_of
from minitron_megatron.train.saved import Written, figures_of

DEEP = 100_000
JSONS = {
    "deep lists": "[" * DEEP,
    "deep objects": '{"a":' * DEEP,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "a large number": f'{{"seconds": {10**400}}}',
    "cut off": '{"a": [1,',
    "another kind": "[1, 2]",
    "null": "null",
}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    **JSONS,
    "loop": "rounds: &a {x: *a}",
    "loop of lists": "a: &a [*a]",
    "bomb": BOMB,
    "merged bomb": BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}"),
    "deep blocks": "\n".join("  " * n + "a:" for n in range(2000)),
    "tags": "a: !!int ''",
    "objects": "a: !!python/object/apply:os.system [ls]",
    "no day": "a: 2026-13-45",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
def test_every_reader_says_that_it_cannot_read(tmp_path, text):
    began = time.process_time()
    for name in ("model.yaml", "config.json", "stages.json", "starts.jsonl", "config.yaml", "best.json"):
        (tmp_path / name).write_text(text)
    for load, name in ((load_yaml, "model.yaml"), (load_json, "config.json")):
        try:
            assert isinstance(load(tmp_path / name), dict)
        except UserError as error:
            assert str(tmp_path / name) in str(error)
    assert isinstance(read_stages(tmp_path / "stages.json"), dict)
    assert isinstance(tail_of(tmp_path / "starts.jsonl"), list)
    assert read_claim(tmp_path / "config.json") is None
    assert not figures_of(tmp_path / "step_00000001", Written("fully_reshardable", False, {}))
    assert precision._read(tmp_path / "config.json", "key") is None
    with pytest.raises(UserError, match="cannot be read"):
        precision._read_kept(tmp_path / "config.json")
    assert isinstance(_mapping(tmp_path / "model.yaml"), dict) and isinstance(_mapping(tmp_path / "config.json"), dict)
    assert status._status_of(tmp_path).state in ("damaged", "failed", "stopped", "running")
    try:
        assert words_of_file("chain", str(tmp_path / "model.yaml"), [], [])
    except UserError as error:
        assert str(tmp_path / "model.yaml") in str(error)
    assert time.process_time() - began < 20


def test_rates_that_are_no_numbers_are_measured_again(tmp_path):
    file = tmp_path / "products.json"
    rates = {dtype: dict.fromkeys(precision.PRODUCTS, 1.0) for dtype in precision.DTYPES}
    found = {"of": "key", "machine": "m", "gflops": rates}
    file.write_text(json.dumps(found))
    assert precision._read(file, "key") is not None
    for odd in (10**400, 10**299, "x", None, [], float("inf"), float("nan")):
        rates[precision.DTYPES[0]][precision.PRODUCTS[0]] = odd
        file.write_text(json.dumps(found))
        assert precision._read(file, "key") is None


@pytest.mark.parametrize("value", [".inf", "1e400", "x", "[]", "{}", "null", str(10**290), "-1"])
def test_status_of_a_run_with_any_numbers(tmp_path, value):
    (tmp_path / "config.yaml").write_text(
        f"trainer: {{steps: {value}, tokens: {value}}}\ndata: {{sequence_length: {value}}}"
    )
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.0, "step_seconds": 1{"0" * 290}}}\n')
    assert status._status_of(tmp_path) is not None


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**200), 10**200) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(plain)
def test_what_is_plain_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value)) == value
    text = yaml.safe_dump([value, value])
    assert parse_yaml(text) == yaml.safe_load(text)


@given(st.text("[]{}:,&*a!- \n\"'0123456789.e<", max_size=40))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_json, parse_yaml):
        try:
            parse(text)
        except Unreadable as error:
            assert str(error)


@pytest.mark.parametrize("text", ["hydra: {mode: MULTIRUN}", "hydra: {job: {chdir: true}}", "hydra.mode: MULTIRUN"])
def test_a_file_cannot_set_hydras_own_options(tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match="of Hydra itself"):
        words_of_file("chain", str(tmp_path / "my.yaml"), [], [])


def test_a_mistake_in_a_folder_may_be_this_machines_alone():
    with pytest.raises(UserError) as told, of_folders():
        raise UserError("x")
    assert told.value.of_folders and not UserError("y").of_folders and not UserError.of_folders
    with pytest.raises(ValueError, match="x"), of_folders():
        raise ValueError("x")


@pytest.mark.parametrize(
    ("text", "most", "line"), [("a\n  b\tc", None, "a b c"), ("abcdef", 3, "abc"), ("a\x1b[1m", None, "a\\x1b[1m")]
)
def test_what_another_program_says_is_one_line(text, most, line):
    assert in_one_line(ValueError(text), most) == line
