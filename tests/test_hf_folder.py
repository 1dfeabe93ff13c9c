"""Hugging Face folders, in small: which files are read and named, what two tensors have in common, and what an export writes."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints import hf, hf_folder, safetensors_stream
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf import _Exporter, _generation_config, export_hf, import_hf
from minitron_megatron.checkpoints.hf_folder import (
    HfFolder,
    check_loaded,
    companion_stamps,
    copy_companions,
    copy_files,
    has_tokenizer,
    plan_shards,
    print_shape,
    write_shape,
)
from minitron_megatron.checkpoints.safetensors_stream import write_safetensors
from minitron_megatron.config import ExportHfConfig, ImportHfConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import RopeScaling
from tests.test_bounds import SMALL_SHAPE
from tests.tiny import hf_model, model_option, save_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Hugging Face folder, model folder, export in several files)."""
    root = tmp_path_factory.mktemp("made")
    save_hf(hf_model(num_hidden_layers=1), root / "hf")
    import_hf(ImportHfConfig(hf=str(root / "hf"), output=str(root / "model")))
    export_hf(ExportHfConfig(model=model_option(root / "model"), output=str(root / "back"), max_shard_gb=2e-5))
    return root


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made / "hf", tmp_path / "hf"))


# What is read


@pytest.mark.parametrize("count", [0, 1, 12, 13])
def test_what_is_not_imported_is_named_up_to_twelve(folder, caplog, count):
    """Folders with a slash; nothing that is hidden, and no manifest of ours."""
    for name in (".cache", "manifest.yaml"):
        (folder / name).touch()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").touch()
    names = [f"n{i:02d}" for i in range(count)]
    for name in names:
        (folder / name).mkdir()
    with caplog.at_level(logging.INFO):
        HfFolder(folder).say_others()
    said = ", ".join(f"{name}/" for name in names[:12]) + ", …" * (count > 12)
    assert caplog.messages == ([f"{folder}: not imported: {said}"] if count else [])


def test_an_export_of_ours_is_a_source_and_a_model_folder_is_none(made):
    HfFolder(made / "back").check()
    with pytest.raises(UserError, match="imported already: give it as model="):
        HfFolder(made / "model")
    for path in (made / "none", made / "hf" / "config.json"):
        with pytest.raises(UserError, match="does not exist or is not a folder"):
            HfFolder(path)


def test_a_tensor_that_no_index_names_is_told(made, tmp_path):
    back = Path(shutil.copytree(made / "back", tmp_path / "back"))
    file = sorted(back.glob("*.safetensors"))[0]
    save_file({**load_file(file), "b.spare": torch.zeros(1), "a.rotary_emb.inv_freq": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"has b\.spare, and model\.safetensors\.index\.json does not name it: leave"):
        HfFolder(back).check()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float32), True),
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), True),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), False),
        (np.zeros(3, np.float32), np.zeros(3, np.int32), False),
        (np.zeros(3, np.float32), np.zeros(4, np.float32), False),
        *((np.zeros(6, np.float32), np.eye(6, dtype=np.float32)[i], False) for i in (0, 2, 5)),
    ],
)
def test_two_tensors_are_equal_in_dtype_shape_and_every_byte(tmp_path, monkeypatch, one, other, equal):
    monkeypatch.setattr(hf_folder, "_COMPARED", 8)
    file = tmp_path / "x.safetensors"
    save_file({"before": torch.ones(3), "one": torch.from_numpy(one), "other": torch.from_numpy(other)}, file)
    this = object.__new__(HfFolder)
    this.files = dict.fromkeys(("one", "other"), file)
    assert this._equal("one", "other") is equal
    np.testing.assert_array_equal(this._bytes("one")[1], np.frombuffer(one.tobytes(), np.uint8))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"missing": [], "unexpected": [], "mismatched": []}, None),
        (
            {"missing": ["b", "a"], "unexpected": ["x"], "mismatched": []},
            "m: a and 1 more are missing: give a whole folder",
        ),
        ({"missing": [], "unexpected": ["x"], "mismatched": []}, "m: x is not of this model: give a whole folder"),
        (
            {"missing": [], "unexpected": [], "mismatched": [("b", 1, 2), ("a", 3, 4), "c"]},
            "m: a and 2 more are of another shape: give a whole folder",
        ),
    ],
)
def test_what_transformers_could_not_load_is_told(found, says):
    given = {f"{kind}_keys": keys for kind, keys in found.items()}
    if says is None:
        check_loaded(given, "m")
        return
    with pytest.raises(UserError) as error:
        check_loaded(given, "m")
    assert str(error.value) == says


# What goes along


@pytest.mark.parametrize(
    ("names", "there"), [((), False), (("tokenizer.json",), True), (("tokenizer_config.json",), True)]
)
def test_a_tokenizer_is_either_of_its_files(tmp_path, names, there):
    for name in (*names, "vocab.json"):
        (tmp_path / name).touch()
    assert has_tokenizer(tmp_path) is there


def test_files_that_are_there_are_copied(tmp_path):
    (tmp_path / "b").write_text("x")
    copy_files(tmp_path, tmp_path / "none", ("a",))
    copy_files(tmp_path, tmp_path / "some", ("a", "b"))
    assert not (tmp_path / "none").exists() and (tmp_path / "some" / "b").read_text() == "x"


@pytest.mark.parametrize("own", [True, False])
def test_a_models_companions_go_where_it_goes(tmp_path, caplog, own):
    """Its own tokenizer before that of the data; each file is an input by name."""
    caplog.set_level(logging.INFO)
    source, data = SimpleNamespace(path=tmp_path / "m"), tmp_path / "d"
    for place in ([source.path] if own else []) + [data]:
        (place / "tokenizer").mkdir(parents=True)
        (place / "tokenizer" / "tokenizer.json").write_text(str(place))
    (source.path / "huggingface").mkdir(parents=True)
    (source.path / "huggingface" / "config.json").write_text("{}")
    (tmp_path / "o").mkdir()
    copy_companions(source, tmp_path / "o", data)
    assert (tmp_path / "o" / "tokenizer" / "tokenizer.json").read_text() == str(source.path if own else data)
    assert (tmp_path / "o" / "huggingface" / "config.json").is_file()
    assert caplog.messages == [f"the tokenizer is that of {data}: {source.path} has none"] * (not own)
    names = ["file huggingface/config.json", *(["file tokenizer/tokenizer.json"] * own)]
    assert list(companion_stamps(source)) == names


def test_a_shape_is_printed_with_what_was_found(capsys, tmp_path):
    scaled = SMALL_SHAPE.resized(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    for shape, rope in ((SMALL_SHAPE, "none"), (scaled, "llama3")):
        print_shape("a title", shape, {"seconds": 1.5})
        shown = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
        values = {row[0].strip(): row[1].strip() for row in shown if len(row) == 2}
        assert shown[0] == ["a title"] and values["rope_scaling"] == rope and values["hidden_size"] == "32"
        assert values["parameters"] == f"{count_parameters(shape):,}" and values["seconds"] == "1.5"
    print_shape("a title", SMALL_SHAPE)
    assert "seconds" not in (out := capsys.readouterr().out) and "None" not in out
    write_shape(tmp_path, SMALL_SHAPE)
    assert [line.split(":")[0] for line in (tmp_path / "model.yaml").read_text().splitlines()] == list(
        SMALL_SHAPE.to_dict()
    )


# What an export writes


def test_files_of_an_export_are_numbered_from_one_to_all():
    files = list(plan_shards(SMALL_SHAPE, 1))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors" and len(files) == 4 * 9 + 3
    assert list(plan_shards(SMALL_SHAPE, 10**12)) == ["model.safetensors"]


def test_an_export_is_as_large_as_asked_for_and_says_what_is_in_it(made, tmp_path):
    back, shape = made / "back", open_model_folder(made / "model").shape
    sizes = [file.stat().st_size for file in back.glob("*.safetensors")]
    largest = max(t.numel() * 4 for t in load_file(made / "hf" / "model.safetensors").values())
    assert len(sizes) > 2 and max(sizes) < max(20_000, largest) + 4096
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * count_parameters(shape)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        text = (back / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2) + "\n" or name == "generation_config.json"
    for path in (back, made / "model"):
        results = read_manifest(path)["results"]
        assert results["parameters"] == count_parameters(shape) and 0 <= results["seconds"] < 100
    export_hf(ExportHfConfig(model=model_option(made / "model"), output=str(tmp_path / "one")))
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("rows", [1, 7, 300, 301])
def test_rows_of_an_export_come_as_many_at_once_as_a_block_holds(made, monkeypatch, rows):
    monkeypatch.setattr(hf, "BLOCK_BYTES", rows * 32 * 4)
    exporter = _Exporter(open_model_folder(made / "model"))
    blocks = list(exporter.blocks("model.embed_tokens.weight"))
    assert [len(block) for block in blocks] == [rows] * (300 // rows) + [300 % rows] * (300 % rows > 0)
    wanted = load_file(made / "hf" / "model.safetensors")
    assert torch.equal(torch.cat(blocks), wanted["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(torch.cat(list(exporter.blocks(name))), wanted[name])


def test_a_dry_run_of_an_export_tries_all_but_the_weights(made, tmp_path, monkeypatch, capsys):
    tried, write = [], hf._write_companions
    monkeypatch.setattr(hf, "_write_companions", lambda target, *rest: tried.append(target) or write(target, *rest))
    cfg = ExportHfConfig(
        model=model_option(made / "model"), output=str(tmp_path / "o"), max_shard_gb=2e-5, dry_run=True
    )
    export_hf(cfg)
    files = len(list((made / "back").glob("*.safetensors")))
    assert f"would be exported into {files} files" in " ".join(capsys.readouterr().out.split())
    assert len(tried) == 1 and not tried[0].exists() and not (tmp_path / "o").exists()
    import_hf(ImportHfConfig(hf=str(made / "hf"), output=str(tmp_path / "o"), dry_run=True))
    assert f"{made / 'hf'} would be imported" in capsys.readouterr().out and not (tmp_path / "o").exists()


@pytest.mark.parametrize("verify", [False, True])
def test_an_export_looks_at_its_model_and_reads_it_where_it_is_asked_to(made, tmp_path, monkeypatch, capsys, verify):
    said, moved = [], []
    for name in ("check_copies", "verify_digest"):
        monkeypatch.setattr(hf, name, lambda *given, name=name, **files: said.append((name, *given, *files.values())))
    progress = hf.progress
    monkeypatch.setattr(hf, "progress", lambda what, total, **how: moved.append(total) or progress(what, total, **how))
    export_hf(ExportHfConfig(model=model_option(made / "model"), output=str(tmp_path / "o"), verify=verify))
    folder = open_model_folder(made / "model")
    assert said == [("check_copies", folder.path), *([("verify_digest", folder)] * verify)]
    assert moved == [4 * count_parameters(folder.shape)]
    assert f"{tmp_path / 'o'}: exported from {folder.path}" in " ".join(capsys.readouterr().out.split())
    said.clear()
    import_hf(ImportHfConfig(hf=str(made / "hf"), output=str(tmp_path / "m")))
    assert said == [("check_copies", [made / "hf" / "model.safetensors"])]
    assert f"{tmp_path / 'm'}: imported from {made / 'hf'}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("config", [{}, {"bos_token_id": 3}, {"eos_token_id": [1, 2], "pad_token_id": 0}])
@pytest.mark.parametrize("tokenizer", [None, "unreadable", "read"])
def test_texts_end_as_the_config_says_or_else_the_tokenizer(tmp_path, monkeypatch, caplog, config, tokenizer):
    if tokenizer:
        (tmp_path / "t").mkdir()

    def read(path, rows):
        assert rows == 9
        if tokenizer == "unreadable":
            raise UserError("it cannot be read")
        return SimpleNamespace(bos_token_id=7, eos_token_id=8, pad_token_id=None)

    monkeypatch.setattr(hf, "read_tokenizer", read)
    found = _generation_config(
        {**config, "hidden_size": 3},
        SimpleNamespace(tokenizer_path=tmp_path / "t", shape=SimpleNamespace(vocab_size=9)),
    )
    asks = "eos_token_id" not in config
    assert found == ({"bos_token_id": 7, "eos_token_id": 8} if asks and tokenizer == "read" else config)
    said = ["generation_config.json names no end of text: it cannot be read"]
    assert caplog.messages == said * (asks and tokenizer == "unreadable")


@pytest.mark.parametrize("name", ["a", "ab", "abcdefgh"])
def test_the_header_of_a_safetensors_file_ends_at_a_multiple_of_eight(tmp_path, name):
    seen, tensor = [], torch.arange(6.0).view(2, 3)
    write_safetensors(
        tmp_path / "x",
        "float32",
        {name: (2, 3), "b": (1,)},
        lambda n: [tensor] if n == name else [tensor[0, :1]],
        seen.append,
    )
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and len(data) == 8 + length + 28 and seen == [24, 4]
    header = json.loads(data[8 : 8 + length])
    assert header == {
        "__metadata__": {"format": "pt"},
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]},
    }
    with pytest.raises(ValueError, match="float16 has no safetensors code"):
        write_safetensors(tmp_path / "y", "float16", {}, lambda n: [])


@pytest.mark.parametrize("place", [None, 0, 3, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_block_of_a_file_is_looked_at_for_what_is_not_finite(tmp_path, monkeypatch, place, dtype):
    monkeypatch.setattr(safetensors_stream, "BLOCK_BYTES", 8)
    tensor = torch.ones(10, dtype=getattr(torch, dtype))
    if place is not None:
        tensor[place] = float("nan")
        with pytest.raises(UserError, match="a has a NaN or an infinity"):
            write_safetensors(tmp_path / "x", dtype, {"a": (10,)}, lambda _: [tensor])
    else:
        write_safetensors(tmp_path / "x", dtype, {"a": (10,)}, lambda _: [tensor])
