"""NeMo checkpoints: in and out bit for bit, archives from elsewhere read safely, and nothing in them executed."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from minitron_megatron.checkpoints import stamps, weights
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.nemo import export_nemo, import_nemo
from minitron_megatron.checkpoints.reading import WeightReader, as_bits
from minitron_megatron.checkpoints.weights import chunks, write_weights
from minitron_megatron.checkpoints.zarr_arrays import ZarrArrays
from minitron_megatron.config import ExportHfConfig, ExportNemoConfig, ImportNemoConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.nemo import check_nemo_class, fields_of_nemo1, fields_of_nemo2, shape_from_nemo
from minitron_megatron.models.shape import RopeScaling
from minitron_megatron.parallel import collectives
from tests.jobs import LiveBytes
from tests.test_commands import ROOT, error_of, run
from tests.test_export_megatron import MEGATRON_ROPE, TOKENS, load_plain
from tests.test_models import relative
from tests.tiny import FAMILIES, hf_model, imported, model_option, save_hf

# What makes NeMo's own configs differ: rope scaling, and one matrix for both ends.
SIZES = {"llama": {"rope_parameters": MEGATRON_ROPE}, "qwen3": {"tie_word_embeddings": True}}


def export(model: Path, output: Path) -> Path:
    export_nemo(ExportNemoConfig(model=model_option(model), output=str(output)))
    return output


def import_(nemo: Path, output: Path, **options) -> Path:
    import_nemo(ImportNemoConfig(nemo=str(nemo), output=str(output), **options))
    return output


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: (model folder, NeMo 2 checkpoint of it), made when first asked for."""
    made = {}

    def of(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            dtype = torch.float32 if family == "qwen2" else torch.bfloat16
            path = imported(hf_model(family=family, **SIZES.get(family, {})), folder, dtype)
            made[family] = path, export(path, folder / "nemo")
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_import_of_export_is_the_same_bits(models, tmp_path, family):
    """The digest is that of shape and content; the vocabulary is 300, whatever padding a folder has."""
    path, nemo = models(family)
    model, back = open_model_folder(path), open_model_folder(import_(nemo, tmp_path / "back"))
    assert (back.shape, back.digest) == (model.shape, model.digest)
    assert (back.tokenizer_path / "tokenizer.json").read_bytes() == (path / "tokenizer" / "tokenizer.json").read_bytes()


def test_by_several_ranks_and_a_chunk_at_a_time(gloo, models, tmp_path, monkeypatch):
    path, nemo = models("llama")
    gloo(3, export_nemo, ExportNemoConfig(model=model_option(path), output=str(tmp_path / "nemo")))
    gloo(2, import_nemo, ImportNemoConfig(nemo=str(tmp_path / "nemo"), output=str(tmp_path / "back")))
    assert open_model_folder(tmp_path / "back").digest == open_model_folder(path).digest
    monkeypatch.setattr(weights, "BLOCK_BYTES", 4096)
    with LiveBytes() as counter:
        import_(nemo, tmp_path / "bounded")
    assert counter.peak <= 8 * 4096 < weights.total_bytes(open_model_folder(path).shape) / 6


def test_its_keys_are_nemos(gloo, models):
    """Plain dist_checkpointing reads our tensors under `module.`, without the padding of the vocabulary."""
    path, nemo = models("nemotron")
    found, wanted = (gloo(1, load_plain, str(folder / "weights"))[0] for folder in (nemo, path))
    assert found.keys() == {f"module.{key}" for key in wanted}
    for key, tensor in wanted.items():
        rows = slice(300) if tensor.shape[0] == 1024 else slice(None)
        assert torch.equal(found[f"module.{key}"], tensor[rows]), key


def test_the_context_names_nemos_classes(models):
    _, nemo = models("llama")
    objects = json.loads((nemo / "context" / "io.json").read_text())["objects"]
    by_path = {value["paths"][0]: value for value in objects.values() if "paths" in value}
    made = {}
    for path, value in by_path.items():
        about = dict(objects[value["metadata"]["key"]]["items"])
        made[path] = about["Attr(name='fn_or_cls')"]["name"]
    assert made == {
        "<root>": "TrainerContext",
        "<root>.model": "LlamaModel",
        "<root>.model.config": "Llama31Config",
        "<root>.model.tokenizer": "AutoTokenizer",
        "<root>.trainer": "Trainer",
        "<root>.trainer.strategy": "MegatronStrategy",
    }
    config = yaml.safe_load((nemo / "context" / "model.yaml").read_text())["config"]
    assert (config["scale_factor"], config["vocab_size"], config["bf16"]) == (8.0, 300, True)


# .nemo archives: model_config.yaml as NeMo 1 has it, model_weights/ with the prefix model.

NEMO1 = {
    "mcore_gpt": True,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "encoder_seq_length": 128,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "bias": False,
    "share_embeddings_and_output_weights": False,
    "transformer_block_type": "pre_ln",
    "tokenizer": {"library": "huggingface", "type": "/somewhere"},
    "optim": {"name": "distributed_fused_adam"},
}
NEMO1_OF = {
    "llama": {
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "layernorm_epsilon": 1e-5,
        "rotary_percentage": 1.0,
        "rotary_base": 500000.0,
        "scale_positional_embedding": True,
    },
    "nemotron": {
        "normalization": "layernorm1p",
        "activation": "squared-relu",
        "layernorm_epsilon": 1e-3,
        "rotary_percentage": 0.5,
        "rotary_base": 10000.0,
    },
}


def zarr_array(folder: Path, tensor: torch.Tensor, grid: list[int]) -> None:
    """An array as Megatron's zarr writer makes it: uncompressed chunks, all of one size."""
    folder.mkdir(parents=True)
    name = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}[tensor.dtype]
    header = {"zarr_format": 2, "shape": list(tensor.shape), "chunks": grid, "dtype": name, "order": "C"}
    header |= {"compressor": None, "fill_value": None, "filters": None, "dimension_separator": "."}
    (folder / ".zarray").write_text(json.dumps(header))
    bits = as_bits(tensor.contiguous())
    for place in np.ndindex(*(-(-n // c) for n, c in zip(bits.shape, grid, strict=True))):
        whole = np.zeros(grid, bits.dtype)
        part = bits[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, grid, strict=True))]
        whole[tuple(map(slice, part.shape))] = part
        (folder / ".".join(map(str, place))).write_bytes(whole.tobytes())


def unpacked(model: Path, target: Path, form: str, **config) -> Path:
    """What is in a .nemo archive of a model, as a folder."""
    folder = open_model_folder(model)
    reader, shape, into = WeightReader(folder.weights), folder.shape, target / "model_weights"
    pieces = list(chunks(shape, "model.", padded=False))
    if form == "torch_dist":
        write_weights(into, shape, lambda c, out: reader.read_into(out, c.slot, shape, c.start), "", None, pieces)
    else:
        for key, whole in {piece.key: piece.whole for piece in pieces}.items():
            tensor = reader.read(key.removeprefix("model."), (0,) * len(whole), whole)
            # As tensor parallelism over two would have it; 7 does not divide, so that the last chunk is larger than its part.
            grid = [*whole[:-2], -(-whole[-2] // 2), whole[-1]] if len(whole) > 1 else [7]
            zarr_array(into / key, tensor, grid)
        state = into / "model.decoder.layers.mlp.linear_fc1._extra_state"
        state.mkdir()
        (state / "shard_0_4.pt").write_bytes(b"a pickle")
        zarr_array(into / "optimizer.state.exp_avg.model.output_layer.weight", torch.zeros(4, 4), [4, 4])
    (into / "metadata.json").write_text(json.dumps({"sharded_backend": form, "sharded_backend_version": 1}))
    (into / "common.pt").write_bytes(pickle.dumps(Bomb(target.parent / "executed")))
    (target / "model_config.yaml").write_text(yaml.safe_dump({**NEMO1, **NEMO1_OF[folder.shape.family], **config}))
    return target


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def packed(folder: Path, archive: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=".")
    return archive


@pytest.mark.parametrize(("family", "form", "mode"), [("llama", "torch_dist", "w:gz"), ("nemotron", "zarr", "w")])
def test_archives_and_what_is_in_them(models, tmp_path, family, form, mode):
    """Both as an archive and unpacked; nothing of the unpacking stays, and the pickle in it was not read."""
    path, _ = models(family)
    folder = unpacked(path, tmp_path / "unpacked", form)
    archive = packed(folder, tmp_path / "model.nemo", mode)
    wanted = open_model_folder(path)
    for name, nemo in {"from_folder": folder, "from_archive": archive}.items():
        back = open_model_folder(import_(nemo, tmp_path / name, tokenizer=str(path / "tokenizer")))
        assert (back.shape, back.digest) == (wanted.shape, wanted.digest)
        assert {p.name for p in back.path.iterdir()} == {"manifest.yaml", "model.yaml", "weights", "tokenizer"}
    assert {p.name for p in tmp_path.iterdir()} == {"unpacked", "model.nemo", "from_folder", "from_archive"}


def test_layers_that_are_not_stacked_and_a_padded_vocabulary(models, tmp_path):
    path, _ = models("llama")
    folder = unpacked(path, tmp_path / "unpacked", "zarr")
    stored = ZarrArrays(folder / "model_weights")
    for name in [name for name in stored.tensors if name.startswith("model.decoder.layers.")]:
        shape = stored.tensors[name][0]
        tensor = stored.read(name, (0,) * len(shape), shape)
        shutil.rmtree(stored.folder / name)
        for layer, part in enumerate(tensor):
            zarr_array(stored.folder / name.replace("layers.", f"layers.{layer}."), part, list(part.shape))
    back = open_model_folder(import_(folder, tmp_path / "back"))
    assert back.digest == open_model_folder(path).digest
    fewer = open_model_folder(import_(folder, tmp_path / "fewer", vocab_size=290))
    assert fewer.shape == back.shape.resized(vocab_size=290)
    embedding = load_all(fewer, "embedding.word_embeddings.weight")
    assert torch.equal(embedding[:290], load_all(back, "embedding.word_embeddings.weight")[:290])
    assert not embedding[290:].any()


def load_all(folder, key: str) -> torch.Tensor:
    reader = WeightReader(folder.weights)
    size = reader.tensors[key][0]
    return reader.read(key, (0,) * len(size), size)


# Hostile and damaged archives


def member(name: str, data: bytes = b"x", **about) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data) if about.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
    for key, value in about.items():
        setattr(info, key, value)
    return info, data


HOSTILE = {
    "traversal": (member("model_weights/../../evil"), "leads out of the folder"),
    "absolute": (member("/tmp/evil"), "leads out of the folder"),
    "symbolic link": (member("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a symbolic link"),
    "hard link": (member("a", type=tarfile.LNKTYPE, linkname="model_config.yaml"), "is a hard link"),
    "device": (member("a", type=tarfile.CHRTYPE), "is a device"),
    "pipe": (member("a", type=tarfile.FIFOTYPE), "is a device"),
    "sparse": (member("a", type=tarfile.GNUTYPE_SPARSE), "no plain file|damaged"),
    "twice": (member("./model_config.yaml"), "is in it twice"),
    "file as folder": (member("model_config.yaml/below"), "is a file and a folder"),
    "bomb": (member("a", size=2**50), "larger than what the disk has left"),
    "long name": (member("a", type=tarfile.GNUTYPE_LONGNAME, size=2**40), "damaged"),
    "unfinished": (member("a", size=65536), "damaged"),
}


def forged(archive: Path, mode: str, extra: tuple[tarfile.TarInfo, bytes]) -> Path:
    """An archive with one more member, whose header says what it likes."""
    info, data = extra
    config = yaml.safe_dump({**NEMO1, **NEMO1_OF["llama"]}).encode()
    first, _ = member("model_config.yaml", config)
    with tarfile.open(archive, mode) as tar:
        tar.addfile(first, io.BytesIO(config))
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + data.ljust(512, b"\0"))
        tar.offset += 1024
    return archive


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, kind, mode):
    extra, says = HOSTILE[kind]
    archive = forged(tmp_path / "bad.nemo", mode, extra)
    with pytest.raises(UserError, match=says) as error:
        import_(archive, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.nemo"]


def imported_from_copies(roots: list[str], nemo: str, output: str) -> str:
    """What an import says where each rank is a node with a copy of its own; files are large, and told by size and time."""
    where, read = os.getcwd(), stamps.LARGEST_READ
    os.chdir(roots[collectives.rank()])
    stamps.LARGEST_READ = 0
    try:
        import_nemo(ImportNemoConfig(nemo=nemo, output=output))
        return ""
    except UserError as error:
        return str(error)
    finally:
        stamps.LARGEST_READ = read
        os.chdir(where)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_node_with_another_copy_of_a_checkpoint_is_named(gloo, models, tmp_path, form):
    """As of Hugging Face folders: the same size, and the same time."""
    roots = [tmp_path / "one", tmp_path / "two"]
    shutil.copytree(models("llama")[1], roots[0] / "nemo")
    if form == "archive":
        shutil.move(roots[0] / "nemo", tmp_path / "unpacked")
        packed(unpacked(models("llama")[0], tmp_path / "other", "torch_dist"), roots[0] / "nemo")
    shutil.copytree(roots[0], roots[1])
    assert gloo(2, imported_from_copies, list(map(str, roots)), "nemo", str(tmp_path / "whole")) == ["", ""]
    there = roots[1] / "nemo"
    odd = there if form == "archive" else next((there / "weights").glob("*.distcp"))
    stat, content = odd.stat(), bytearray(odd.read_bytes())
    content[-1] ^= 1
    odd.write_bytes(content)
    os.utime(odd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one, two = gloo(2, imported_from_copies, list(map(str, roots)), "nemo", str(tmp_path / "not"))
    name = odd.relative_to(roots[1])
    assert one == two and re.search(rf"have different files: {re.escape(str(name))} is .* on rank 0 .* on rank 1", one)
    assert not (tmp_path / "not").exists()


def test_other_bytes_are_refused(models, tmp_path):
    archive = packed(unpacked(models("llama")[0], tmp_path / "in", "torch_dist"), tmp_path / "whole.nemo", "w:gz")
    data = archive.read_bytes()
    for name, damaged in {"cut": data[: len(data) // 2], "noise": bytes(range(256)) * 40, "empty": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
            import_(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_the_command(models, tmp_path):
    """A refusal is one line and status 2; a dry run writes nothing; two processes; the same again."""
    archive = forged(tmp_path / "bad.nemo", "w", HOSTILE["traversal"][0])
    assert "leads out" in error_of(run("import_nemo", f"nemo={archive}", f"output={tmp_path / 'x'}"))
    archive.unlink()
    path, nemo = models("qwen2")
    words = ("import_nemo", f"nemo={nemo}", f"output={tmp_path / 'back'}")
    dry = run(*words, "dry_run=true")
    assert dry.returncode == 0 and not (tmp_path / "back").exists(), dry.stderr
    done = run(*words, processes=2)
    assert done.returncode == 0, done.stderr
    assert "complete already" in run(*words).stdout
    assert open_model_folder(tmp_path / "back").digest == open_model_folder(path).digest


# What is refused


def test_nothing_of_a_context_is_executed(models, tmp_path):
    """io.json, common.pt and extra state are not looked at; a model.yaml with tags is refused."""
    nemo = shutil.copytree(models("llama")[1], tmp_path / "nemo")
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    (nemo / "weights" / "common.pt").write_bytes(bomb)
    (nemo / "context" / "io.json").write_bytes(b'{"root": {"type": "pyref", "module": "os", "name": "abort"}}')
    assert open_model_folder(import_(nemo, tmp_path / "back")).digest == open_model_folder(models("llama")[0]).digest
    file = nemo / "context" / "model.yaml"
    file.write_text(file.read_text() + f"optim: !!python/object/apply:os.mkdir [{tmp_path / 'executed'}]\n")
    with pytest.raises(UserError, match=r"model\.yaml cannot be read"):
        import_(nemo, tmp_path / "again")
    (nemo / "weights" / ".metadata").write_bytes(bomb)
    shutil.copy(models("llama")[1] / "context" / "model.yaml", file)
    with pytest.raises(UserError, match="damaged or unsafe"):
        import_(nemo, tmp_path / "again")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "again").exists()


def test_models_that_compute_something_else_are_refused(models):
    source = yaml.safe_load((models("mistral")[1] / "context" / "model.yaml").read_text())
    config = source["config"]
    cases = {
        "num_moe_experts=8": {"num_moe_experts": 8},
        "add_bias_linear=True": {"add_bias_linear": True},
        "window_size=a list": {"window_size": [64, 0]},
        "position_embedding_type='learned_absolute'": {"position_embedding_type": "learned_absolute"},
        "no family that is supported": {"activation_func": {"_target_": "torch.nn.functional.gelu"}},
        "num_layers is missing": {"num_layers": None},
        "num_layers=a mapping is not a number": {"num_layers": {}},
        "num_attention_heads=3 is not a multiple": {"num_attention_heads": 3},
    }
    for says, values in cases.items():
        with pytest.raises(UserError, match=says) as error:
            fields = fields_of_nemo2({**source, "config": {**config, **values}}, "here")
            shape_from_nemo(fields, 300, "bfloat16", None)
        assert "\n" not in str(error.value) and str(error.value).startswith("here: ")
    for says, changed in {
        "class GemmaModel is not supported": {**source, "_target_": "nemo.collections.llm.GemmaModel"},
        "an adapter": {**source, "model_transform": {"_target_": "nemo.collections.llm.peft.LoRA"}},
    }.items():
        with pytest.raises(UserError, match=says):
            fields_of_nemo2(changed, "here")
    for says, values in {"mcore_gpt": {"mcore_gpt": False}, "activation='geglu'": {"activation": "geglu"}}.items():
        with pytest.raises(UserError, match=says):
            fields_of_nemo1({**NEMO1, **NEMO1_OF["llama"], **values}, "here")


def test_of_several_that_fit_none_is_taken(models, tmp_path):
    """Checkpoints, configs or weights: by letters step_1000 would come before step_200."""
    run = tmp_path / "run"
    for step in ("step_200", "step_1000"):
        shutil.copytree(models("llama")[1], run / step)

    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says) as error:
            import_(run, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused(r"run has 2 checkpoints \(step_1000, step_200\): give one of them")
    shutil.rmtree(run / "step_1000")
    config = run / "step_200" / "model_config.yaml"
    config.write_text("a: 1")
    refused(r"2 configs in step_200 \(model.yaml, model_config.yaml\)")
    config.unlink()
    shutil.copytree(run / "step_200" / "weights", run / "step_200" / "model_weights")
    refused(r"2 folders of weights \(weights, model_weights\)")
    shutil.rmtree(run / "step_200" / "model_weights")
    assert open_model_folder(import_(run, tmp_path / "out")).digest == open_model_folder(models("llama")[0]).digest


def test_weights_that_do_not_fit_are_refused(models, tmp_path):
    folder = unpacked(models("llama")[0], tmp_path / "unpacked", "zarr")
    stored = folder / "model_weights"

    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says) as error:
            import_(folder, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    extra = stored / "model.decoder.layers.mlp.router.weight"
    zarr_array(extra, torch.zeros(2, 2), [2, 2])
    refused("router.weight is not a tensor of llama")
    shutil.rmtree(extra)
    norm = stored / "model.decoder.final_layernorm.weight"
    shutil.move(norm, tmp_path / "norm")
    refused("final_layernorm.weight is missing")
    zarr_array(norm, torch.zeros(32), [32])
    refused("is float32, others are bfloat16")
    shutil.rmtree(norm)
    zarr_array(norm, torch.zeros(31, dtype=torch.bfloat16), [31])
    refused(r"is \(31,\), its config makes it \(32,\)")
    shutil.rmtree(norm)
    shutil.move(tmp_path / "norm", norm)
    (norm / "0").write_bytes(b"short")
    refused("damaged")
    shutil.rmtree(stored)
    (folder / "model_weights.ckpt").write_bytes(b"a pickle")
    refused("older than distributed checkpoints")
    folder = packed(folder, tmp_path / "old.nemo")
    refused("older than distributed checkpoints")


@pytest.mark.parametrize("form", ["torch_dist", "zarr"])
def test_an_index_that_names_what_is_not_there_is_found_without_reading(models, tmp_path, form):
    """By the dry run, as by the run."""
    folder = unpacked(models("nemotron")[0], tmp_path / "unpacked", form)
    stored = folder / "model_weights"
    file = next(stored.glob("*.distcp")) if form == "torch_dist" else stored / "model.output_layer.weight" / "1.0"
    os.truncate(file, file.stat().st_size - 1)
    dry = ImportNemoConfig(nemo=str(folder), output=str(tmp_path / "x"), dry_run=True)
    with pytest.raises(UserError, match=r"ends too soon|is damaged"):
        import_nemo(dry)
    file.unlink()
    with pytest.raises(UserError, match=r"is missing|cannot be read"):
        import_nemo(dry)


def test_what_nemo_cannot_say_is_refused(models):
    shape = open_model_folder(models("mistral")[0]).shape
    cases = {
        "different ffn_hidden_size": {"ffn_hidden_size": (48, 32, 48, 48)},
        "MistralConfig7B has none": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
    }
    for says, sizes in cases.items():
        with pytest.raises(UserError, match=says):
            check_nemo_class(shape.resized(**sizes), "here")


# nemo-toolkit itself, where an environment with it is named (docs/formats.md)

NEMO_PYTHON = os.environ.get("NEMO_PYTHON")
# megatron.core 0.15 compiles for a GPU when it is imported where there is nvcc; torch.compile would take minutes for one pass.
NEMO_ENVIRONMENT = {"TORCH_CUDA_ARCH_LIST": "9.0", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.skipif(NEMO_PYTHON is None, reason="NEMO_PYTHON names no Python with nemo-toolkit")
def test_nemo_toolkit_loads_what_is_exported_and_its_own_is_read(tmp_path):
    """Its loader fills a model that was NaN and computes transformers' logits; its importer's checkpoint has our digest."""
    jobs, wanted = [], {}
    for family in FAMILIES:
        folder = tmp_path / family
        model = hf_model(family=family, **SIZES.get(family, {}))
        path = imported(model, folder)
        with torch.no_grad():
            wanted[family] = path, model(TOKENS).logits
        torch.save({"tokens": TOKENS}, folder / "logits.pt")
        jobs.append(["load", family, str(export(path, folder / "nemo")), str(folder / "logits.pt")])
    # transformers 4, which NeMo uses, has rope_theta beside the others.
    hf = save_hf(hf_model(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), tmp_path / "hf")
    jobs.append(["import", "llama", str(hf), str(tmp_path / "theirs")])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [NEMO_PYTHON, "-m", "tests.nemo_toolkit", str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **NEMO_ENVIRONMENT},
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for family, (_, logits) in wanted.items():
        found = torch.load(tmp_path / family / "logits.pt", weights_only=True)
        assert found["logits"].shape == logits.shape and found["tokenizer"] == 300
        assert relative(found["logits"], logits) <= 1e-6, family
    # Its importer looks for norms by Transformer Engine's names, and leaves those of local layers as they were made.
    back = open_model_folder(import_(tmp_path / "theirs", tmp_path / "back"))
    export_hf(ExportHfConfig(model=model_option(back.path), output=str(tmp_path / "again")))
    assert back.shape == HfFolder(hf).shape
    found, sent = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", hf))
    assert found.keys() == sent.keys()
    assert all("norm" in name or torch.equal(found[name], sent[name]) for name in sent)
