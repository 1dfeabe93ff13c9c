"""What is found in a checkpoint of NeMo or of zarr, and what is written for NeMo and Megatron-LM beside the weights."""

import itertools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from minitron_megatron.checkpoints import nemo, nemo_folder
from minitron_megatron.checkpoints.archive import Archive
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.megatron_lm import (
    CONTENT,
    all_arguments,
    arguments_script,
    common_state,
    no_extra_state,
)
from minitron_megatron.checkpoints.nemo import export_nemo, import_nemo
from minitron_megatron.checkpoints.nemo_folder import NemoFolder, check_import_nemo, only
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.checkpoints.reading import as_bits
from minitron_megatron.checkpoints.zarr_arrays import ZarrArrays
from minitron_megatron.config import ExportNemoConfig, ImportNemoConfig, ModelConfig, RandomModelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from tests.test_archive import written
from tests.test_bounds import SMALL_SHAPE
from tests.test_checkpoints import random_sizes
from tests.test_nemo import NEMO1, NEMO1_OF, zarr_array
from tests.tiny import model_option


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(model folder, NeMo 2 checkpoint of it)."""
    root = tmp_path_factory.mktemp("model")
    make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes()), output=str(root / "m")))
    export_nemo(ExportNemoConfig(model=model_option(root / "m"), output=str(root / "nemo")))
    return open_model_folder(root / "m"), root / "nemo"


# What is found


@pytest.mark.parametrize(
    ("fitting", "says"),
    [
        ([], None),
        (["a"], "a"),
        (["a", "b"], "x has 2 things ('a', 'b'): give one of them"),
        (list("abcde"), "x has 5 things ('a', 'b', 'c', 'd', 'e'): give one of them"),
        (list("abcdefg"), "x has 7 things ('a', 'b', 'c', 'd', 'e' and 2 more): give one of them"),
        ([Path("a/b"), Path(".")], "x has 2 things (b, .): give one of them"),
    ],
)
def test_of_several_none_is_taken(fitting, says):
    if len(fitting) < 2:
        assert only(fitting, "x", "things") == says
    else:
        with pytest.raises(UserError) as error:
            only(fitting, "x", "things")
        assert str(error.value) == says


def test_names_in_an_archive_are_indices_or_wanted():
    indices = {"a/model_config.yaml", "model.yaml", "weights/.metadata", "weights/key/.zarray"}
    others = {"a/model.yaml.bak", "weights/__0_0.distcp", "model_weights.ckpt"}
    assert {name for name in indices | others if nemo_folder._is_index(name)} == indices
    unwanted = {"optimizer.state/0.0", "weights/optimizer.exp_avg/.zarray"}
    assert {name for name in indices | others | unwanted if nemo_folder._is_wanted(name)} == indices | others


@pytest.mark.parametrize(
    ("config", "files", "found"),
    [
        ({"tokenizer": {"pretrained_model_name": "t"}}, ["merges.txt"], True),
        ({"tokenizer": {"pretrained_model_name": "t"}}, ["other"], False),
        ({"tokenizer": {"pretrained_model_name": "../context/t"}}, ["merges.txt"], False),
        ({"tokenizer": {"pretrained_model_name": 3}}, ["merges.txt"], False),
        ({"tokenizer": "t"}, ["merges.txt"], False),
        ({}, ["merges.txt"], False),
    ],
)
def test_a_tokenizer_lies_in_the_context(tmp_path, config, files, found):
    folder = tmp_path / "context" / "t"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    this = object.__new__(NemoFolder)
    this.config, this.root = config, tmp_path
    assert this.tokenizer() == (folder if found else None)
    this.config = {"tokenizer": {"pretrained_model_name": str(folder)}}
    assert this.tokenizer() is None


def test_configs_and_indices_have_largest_sizes(model, tmp_path, monkeypatch):
    _, checkpoint = model
    size = (checkpoint / "context" / "model.yaml").stat().st_size
    monkeypatch.setattr(nemo_folder, "_LARGEST_CONFIG", size)
    NemoFolder(checkpoint, "here")
    monkeypatch.setattr(nemo_folder, "_LARGEST_CONFIG", size - 1)
    with pytest.raises(UserError, match=rf"here: model\.yaml has {size} bytes: that is no model's config"):
        NemoFolder(checkpoint, "here")
    path = written(tmp_path / "x.nemo", ("model_config.yaml", b"a: 1"), ("big", b"x" * 99), ("deep/er/a.ckpt", b"y"))
    (tmp_path / "s").mkdir()
    monkeypatch.setattr(nemo_folder, "_LARGEST_INDEX", 4 + 4096)
    assert isinstance(nemo_folder._open_archive(path, tmp_path / "s"), Archive)
    there = {file.relative_to(tmp_path / "s").as_posix() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    assert there == {"model_config.yaml", "deep/er/a.ckpt"} and (tmp_path / "s" / "deep/er/a.ckpt").stat().st_size == 0
    monkeypatch.setattr(nemo_folder, "_LARGEST_INDEX", 4 + 4096 - 1)
    with pytest.raises(UserError, match="its configs and indices take more than"):
        nemo_folder._open_archive(path, tmp_path / "s")


def stored(target: Path, prefix: str, extra: tuple[str, ...] = (), family: str = "llama", **config) -> Path:
    """A checkpoint of zeros as NeMo 1 unpacks it, with these keys too."""
    shape = nemo_folder.shape_from_nemo(
        nemo_folder.fields_of_nemo1({**NEMO1, **NEMO1_OF[family], **config}, "x"), 300, "float32", None
    )
    keys = {slot.key(shape): slot.stored_shape(shape) for slot in nemo_folder.slots(shape)}
    for key, size in keys.items():
        size = tuple(300 if n == 1024 else n for n in size)
        zarr_array(target / "model_weights" / f"{prefix}{key}", torch.zeros(size), list(size))
    for key in extra:
        zarr_array(target / "model_weights" / key, torch.zeros(1), [1])
    (target / "model_config.yaml").write_text(yaml.safe_dump({**NEMO1, **NEMO1_OF[family], **config}))
    return target


@pytest.mark.parametrize(
    ("prefix", "extra", "config", "odd"),
    [
        ("model.", (), {}, None),
        ("module.module.", ("module.module.decoder.final_layernorm._extra_state", "other.weight"), {}, None),
        ("", ("optimizer.state.exp_avg", "decoder.rotary_pos_emb.inv_freq"), {}, None),
        ("", ("router.weight",), {}, "router.weight"),
        ("model.", ("model.optimizer.state",), {}, "model.optimizer.state"),
        ("model.", ("model.output_layer.weight",), {"share_embeddings_and_output_weights": True}, None),
    ],
)
def test_keys_that_are_no_tensors_of_the_model(tmp_path, prefix, extra, config, odd):
    """Buffers, a tied model's copy, and what lies beside the model are passed over."""
    folder = NemoFolder(stored(tmp_path / "n", prefix, extra, **config), "here")
    assert folder.prefix == prefix
    if odd:
        with pytest.raises(UserError, match=rf"here: {odd} is not a tensor of llama"):
            folder.check()
    else:
        folder.check()


def test_a_checkpoint_is_looked_for_one_folder_down_and_not_where_it_is_hidden(model, tmp_path):
    stored(tmp_path / ".hidden", "model.")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"has neither context/model\.yaml \(NeMo 2\) nor model_config\.yaml"):
        NemoFolder(tmp_path, "here")
    assert NemoFolder(stored(tmp_path / "seen", "model.").parent, "here").root == tmp_path / "seen"
    assert NemoFolder(model[1], "here").root == model[1]


def test_what_an_import_is_refused_for_leaves_nothing_behind(model, tmp_path, monkeypatch):
    """Before the checkpoint is read, where that can be; what an archive is unpacked for goes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cfg = ImportNemoConfig(nemo=str(model[1]), output=str(tmp_path / "o"))
    for name, value, says in (
        ("nemo", tmp_path / "none", "does not exist: give a NeMo 2"),
        ("tokenizer", tmp_path, r"has none of tokenizer\.json, "),
        ("vocab_size", 999, "vocab_size=999: the embedding of .* has 300 rows"),
    ):
        odd = ImportNemoConfig(**{**vars(cfg), name: value if name == "vocab_size" else str(value)})
        with pytest.raises(UserError, match=says):
            check_import_nemo(odd)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "theirs").touch()
    monkeypatch.setattr(nemo_folder, "NemoFolder", lambda *_: pytest.fail("it is read"))
    with pytest.raises(UserError, match="is not one of our folders"):
        check_import_nemo(cfg)
    monkeypatch.undo()
    assert not list((tmp_path / "temporary").iterdir())


def test_an_import_is_of_these_files(model, tmp_path):
    """Config, weights without optimizer states, and the tokenizer with what decides its class; of an archive itself."""
    checkpoint = stored(tmp_path / "n", "model.", ("optimizer.x",))
    tokenizer = tmp_path / "t"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "config.json", "other"):
        (tokenizer / name).write_text("{}")

    def inputs(path, **how) -> dict:
        opened = check_import_nemo(ImportNemoConfig(nemo=str(path), output=str(tmp_path / "o"), **how))
        with opened.scratch:
            return opened.inputs

    before = inputs(checkpoint)
    assert set(before) == {"file model_config.yaml", "file weights"}
    of_tokenizer = {"file tokenizer.json", "file config.json"}
    assert set(inputs(checkpoint, tokenizer=str(tokenizer))) == set(before) | of_tokenizer
    (checkpoint / "model_weights" / "optimizer.x" / "0").write_bytes(b"1234")
    assert inputs(checkpoint) == before
    (checkpoint / "model_weights" / "model.output_layer.weight" / "0.0").write_bytes(b"\1" * 300 * 32 * 4)
    assert inputs(checkpoint)["file weights"] != before["file weights"]
    (checkpoint / "model_config.yaml").write_text((checkpoint / "model_config.yaml").read_text() + "seed: 3\n")
    assert inputs(checkpoint)["file model_config.yaml"] != before["file model_config.yaml"]
    names = [file for file in checkpoint.rglob("*") if file.is_file()]
    archive = written(tmp_path / "a.nemo", *((str(f.relative_to(checkpoint)), f.read_bytes()) for f in names))
    assert set(inputs(archive)) == {"file a.nemo"}
    assert set(inputs(archive, tokenizer=str(tokenizer))) == {"file a.nemo"} | of_tokenizer
    assert set(inputs(model[1])) == {"file context/model.yaml", "file weights"}


def test_an_archive_is_unpacked_where_there_is_room_for_both(tmp_path, monkeypatch, caplog, capsys):
    checkpoint, asked, seen, moved = stored(tmp_path / "n", "model."), [], [], []
    names = [file for file in checkpoint.rglob("*") if file.is_file()]
    archive = written(
        tmp_path / "a.nemo", *((str(f.relative_to(checkpoint)), f.read_bytes()) for f in names), ("optimizer.x", b"x")
    )
    check, wait, progress = nemo.check_space, nemo.wait_until_seen, nemo.progress
    monkeypatch.setattr(nemo, "check_space", lambda *given, **how: asked.append(given[1]) or check(*given, **how))
    monkeypatch.setattr(nemo, "wait_until_seen", lambda *paths: seen.extend(paths) or wait(*paths))
    monkeypatch.setattr(
        nemo, "progress", lambda what, total, **how: moved.append(total) or progress(what, total, **how)
    )
    cfg = ImportNemoConfig(nemo=str(archive), output=str(tmp_path / "o"))
    import_nemo(cfg)
    folder = open_model_folder(tmp_path / "o")
    need = sum(file.stat().st_size + 4096 for file in names)
    of_weights = sum(file.stat().st_size for file in (tmp_path / "o" / "weights").glob("*.distcp"))
    assert asked[0] - need == pytest.approx(of_weights, rel=0.2)
    assert moved == [sum(file.stat().st_size for file in names)]
    assert {path.name for path in seen} >= {"model_config.yaml", "model_weights", "model.output_layer.weight"}
    assert (
        f"{archive} has no Hugging Face tokenizer: give one with tokenizer= to use the model on text" in caplog.messages
    )
    assert f"{tmp_path / 'o'}: imported from {archive}" in " ".join(capsys.readouterr().out.split())
    results = read_manifest(tmp_path / "o")["results"]
    assert results["parameters"] == count_parameters(folder.shape) and 0 <= results["seconds"] < 100
    import_nemo(ImportNemoConfig(nemo=str(archive), output=str(tmp_path / "p"), dry_run=True))
    assert f"{archive} would be imported" in capsys.readouterr().out and not (tmp_path / "p").exists()


# Zarr


@pytest.mark.parametrize(
    ("changed", "listed"),
    [
        ({}, True),
        ({"dimension_separator": "/"}, True),
        ({"dimension_separator": "-"}, False),
        ({"zarr_format": 3}, False),
        ({"compressor": {"id": "zlib"}}, False),
        ({"filters": [{"id": "delta"}]}, False),
        ({"filters": []}, True),
        ({"order": "F"}, False),
        ({"dtype": "<f2"}, True),
        ({"dtype": "<f8"}, False),
        ({"dtype": [["a", "<f4"]]}, False),
        ({"chunks": [2]}, False),
        ({"chunks": [0, 2]}, False),
        ({"shape": [3, 0]}, False),
        ({"shape": [], "chunks": []}, True),
        ({"shape": [1, 1], "chunks": [1, 1]}, True),
    ],
)
def test_arrays_that_are_plain_are_listed_and_others_refused_when_they_are_read(tmp_path, changed, listed):
    zarr_array(tmp_path / "k", torch.zeros(3, 4), [2, 2])
    header = tmp_path / "k" / ".zarray"
    header.write_text(json.dumps({**json.loads(header.read_text()), **changed}))
    arrays = ZarrArrays(tmp_path)
    assert ("k" in arrays.tensors) is listed
    if not listed:
        with pytest.raises(UserError, match="is no uncompressed zarr array of version 2"):
            arrays.read("k", (0, 0), (1, 1))
    header.write_text("{}")
    with pytest.raises(UserError, match=r"\.zarray is damaged"):
        ZarrArrays(tmp_path)


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("grid", [[3, 5, 4], [2, 2, 3], [1, 1, 1], [4, 7, 5]])
def test_any_region_of_an_array_is_read_from_its_chunks(tmp_path, separator, grid):
    """Chunks at the edge are as large as the others."""
    whole = torch.arange(60, dtype=torch.float32).view(3, 5, 4)
    zarr_array(tmp_path / "k", whole, grid)
    header = tmp_path / "k" / ".zarray"
    header.write_text(header.read_text().replace('"dimension_separator": "."', f'"dimension_separator": "{separator}"'))
    if separator == "/":
        for file in [file for file in (tmp_path / "k").iterdir() if file != header]:
            data, target = file.read_bytes(), tmp_path / "k" / file.name.replace(".", "/")
            file.unlink()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    arrays = ZarrArrays(tmp_path)
    arrays.check_files("k")
    for start in itertools.product(range(3), range(0, 5, 2), range(0, 4, 3)):
        for sizes in itertools.product(*([1, n - a] for a, n in zip(start, whole.shape, strict=True))):
            wanted = whole[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))]
            assert torch.equal(arrays.read("k", start, sizes), wanted)
    last = tmp_path / "k" / separator.join(str(-(-n // c) - 1) for n, c in zip(whole.shape, grid, strict=True))
    data = last.read_bytes()
    for damaged in (data[:-1], data + b"x"):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match="has another size than the others"):
            arrays.check_files("k")
    last.unlink()
    with pytest.raises(UserError, match=rf"{last} cannot be read"):
        arrays.check_files("k")


def test_halves_are_halves(tmp_path):
    tensor = torch.arange(6).to(torch.bfloat16)
    zarr_array(tmp_path / "k", tensor, [4])
    assert torch.equal(ZarrArrays(tmp_path).read("k", (1,), (4,)), tensor[1:5])
    header = tmp_path / "k" / ".zarray"
    header.write_text(header.read_text().replace("bfloat16", "<f2"))
    found = ZarrArrays(tmp_path).read("k", (1,), (4,))
    assert found.dtype is torch.float16 and np.array_equal(as_bits(found), as_bits(tensor[1:5]))


# What is written beside the weights


def test_a_nemo_checkpoint_has_weights_alone(model):
    """Nothing of a run that goes on; the keys of its layers are stacked."""
    found = torch.load(model[1] / "weights" / "common.pt", weights_only=True)
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    assert found == {"epoch": 0, "global_step": 0, "content_metadata": content} and content == CONTENT
    assert {file.name for file in (model[1] / "context").iterdir()} == {"io.json", "model.yaml"}


def test_extra_state_is_empty_for_every_layer_of_every_module_that_may_have_some():
    linears = [f"self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj")]
    modules = [*linears, "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"]
    keys = {f"p.decoder.layers.{m}._extra_state/shard_{layer}_2" for m in modules for layer in (0, 1)}
    found = no_extra_state(SMALL_SHAPE.resized(num_layers=2), "p.")
    assert set(found) == keys | {"p.decoder.final_layernorm._extra_state/shard_0_1"}
    assert set(found.values()) == {None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_common_state_is_of_training_that_has_not_begun(dtype):
    shape = SMALL_SHAPE.resized(dtype=dtype, vocab_size=300)
    folder = SimpleNamespace(shape=shape, tokenizer_path=Path("none"))
    state = common_state(shape, all_arguments(folder, Path("/o")))
    args = vars(state.pop("args"))
    assert state == {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": CONTENT,
    }
    samples = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    wanted = {"rank": 0, "world_size": 1, "data_parallel_size": 1, **dict.fromkeys(samples, 0)}
    wanted |= {"no_save_optim": True, "no_save_rng": True, "params_dtype": getattr(torch, dtype)}
    assert {name: args[name] for name in wanted} == wanted and type(args["exit_signal"]) is int
    assert args["tokenizer_type"] == "NullTokenizer" and args["num_layers"] == 4


def test_arguments_are_a_line_each_and_the_tokenizer_lies_beside_the_script(tmp_path):
    (tmp_path / "t").mkdir()
    folder = SimpleNamespace(shape=SMALL_SHAPE, tokenizer_path=tmp_path / "t")
    arguments = all_arguments(folder, Path("/o"))
    assert arguments["--tokenizer-model"] == "/o/tokenizer" and arguments["--num-layers"] == "4"
    script = arguments_script(SMALL_SHAPE, {"--flag": None, "--name": "a b", "--tokenizer-model": "/o/tokenizer"})
    assert script.splitlines() == [
        f"# A llama model of {count_parameters(SMALL_SHAPE):,} parameters, for Megatron-LM 0.19:",
        "#   source THIS_FOLDER/arguments.sh",
        '#   torchrun … pretrain_gpt.py "${MODEL_ARGS[@]}" --load THIS_FOLDER --save ANOTHER_FOLDER --seq-length … …',
        "MODEL_ARGS=(",
        "    --flag",
        "    --name 'a b'",
        '    --tokenizer-model "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/tokenizer"',
        ")",
    ]
