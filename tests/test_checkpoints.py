"""Folders and weights: round trips bit for bit, whole or not there, and nothing on disk executes code."""

import contextlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints import folder as folders
from minitron_megatron.checkpoints import reading
from minitron_megatron.checkpoints.folder import check_output, open_model_folder, output_folder, read_manifest
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.checkpoints.reading import WeightReader, read_metadata, safe_reading
from minitron_megatron.checkpoints.weights import _check_rounding, chunks, verify_digest
from minitron_megatron.config import ExportHfConfig, ImportHfConfig, ModelConfig, RandomModelConfig
from minitron_megatron.errors import UserError
from tests import jobs
from tests.pool import WorkerError
from tests.test_models import LAYOUTS, names
from tests.tiny import hf_model, imported, model_option, save_hf


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(found: Path, wanted: Path) -> None:
    found, wanted = tensors_of(found), tensors_of(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return imported(hf_model(), folder, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_export_of_import_is_the_same_bits(gloo, tmp_path, ranks, tied, dtype):
    """By any number of ranks, and with the weights over several files."""
    hf = save_hf(hf_model(tie_word_embeddings=tied), tmp_path / "hf", dtype)
    gloo(ranks, jobs.import_and_export, str(hf), str(tmp_path / "model"), str(tmp_path / "back"), 1e-5)
    assert_same_tensors(tmp_path / "back", hf)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(hf))


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_weights_survive_every_layout(gloo, source, tmp_path, ranks, layout):
    """Loaded into a live model, saved by Megatron's own writer, published: the digest is that of the first import."""
    digests = gloo(
        ranks, jobs.save_in_layout, str(source), str(tmp_path / "ckpt"), str(tmp_path / "out"), layout, layout=layout
    )
    folder = open_model_folder(source)
    # The live models of these jobs are float32, which holds every bfloat16 exactly.
    assert set(digests) == {folder.digest}


@pytest.mark.bf16
def test_transformers_loads_the_export_and_computes_the_same(source, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_hf(ExportHfConfig(model=model_option(source), output=str(tmp_path / "back"), max_shard_gb=1e-5))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("The quick", return_tensors="pt")["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(source.parent / "hf")
    with torch.no_grad():
        assert torch.equal(back(ids).logits, original(ids).logits)
        assert back.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


def test_a_random_model_is_the_same_for_any_number_of_ranks(gloo, tmp_path):
    sizes = random_sizes()
    digests = []
    for ranks in (1, 3):
        output = str(tmp_path / str(ranks))
        gloo(ranks, make_random_model, RandomModelConfig(model=ModelConfig(**sizes), output=output))
        digests.append(open_model_folder(output).digest)
    assert digests[0] == digests[1]
    verify_digest(open_model_folder(tmp_path / "1"))
    # Each chunk is written once, and ranks share them out.
    whole, *shares = (
        [file.stat().st_size for file in sorted((tmp_path / ranks / "weights").glob("*.distcp"))] for ranks in "13"
    )
    assert len(shares[0]) == 3 and max(shares[0]) < 0.6 * whole[0] and sum(shares[0]) < 1.2 * whole[0]


def random_sizes():
    return {
        "family": "llama",
        "num_layers": 3,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 4,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "norm_eps": 1e-5,
        "tied_embeddings": False,
        "dtype": "bfloat16",
    }


# Damage


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_folder_without_its_manifest_is_refused(source, tmp_path):
    path = copy(source, tmp_path / "m")
    (path / "manifest.yaml").unlink()
    with pytest.raises(UserError, match="half-written"):
        open_model_folder(path)


def test_truncated_weights_are_refused_at_once(source, tmp_path):
    path = copy(source, tmp_path / "m")
    file = next((path / "weights").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match="bytes instead of"):
        open_model_folder(path)


def test_flipped_bits_are_found_when_asked_for(source, tmp_path):
    path = copy(source, tmp_path / "m")
    file = next((path / "weights").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    target = WeightReader(path / "weights").read_slot(
        next(chunks(open_model_folder(path).shape)).slot, open_model_folder(path).shape
    )
    start = data.find(target.view(torch.uint8).numpy().tobytes()[:64])
    data[start + 10] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="differ from the digest"):
        verify_digest(open_model_folder(path))


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_checkpoint_executes(gloo, source, tmp_path):
    path = copy(source, tmp_path / "m")
    size = (path / "weights" / ".metadata").stat().st_size
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    (path / "weights" / ".metadata").write_bytes(payload.ljust(size, b"."))
    with pytest.raises(UserError, match="mkdir is not allowed"):
        read_metadata(path / "weights")
    with pytest.raises(UserError, match="mkdir is not allowed"):
        check_weights(open_model_folder(path))
    # Megatron's own loader, which commands reach only after that check.
    with pytest.raises(WorkerError, match="metadata is None"):
        gloo(1, jobs.logits, str(path), torch.zeros(1, 4, dtype=torch.int64), {}, layout={})
    assert not (tmp_path / "executed").exists()


def test_safe_reading_puts_torchs_reader_back():
    from torch.distributed.checkpoint import FileSystemReader

    before = FileSystemReader.read_metadata
    with pytest.raises(RuntimeError), safe_reading():
        assert FileSystemReader.read_metadata is not before
        raise RuntimeError
    assert FileSystemReader.read_metadata is before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda hf: (hf / "config.json").unlink(), "config.json cannot be read"),
        (lambda hf: (hf / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda hf: (hf / "model.safetensors").rename(hf / "pytorch_model.bin"), "can execute code"),
        (lambda hf: os.truncate(hf / "model.safetensors", 100), "is damaged"),
        (lambda hf: change(hf, lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
        (lambda hf: change(hf, lambda t: t.update(spare=torch.zeros(1))), "spare is not a tensor of llama"),
        (
            lambda hf: change(hf, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
            r"is \(3,\), config.json makes it",
        ),
        (lambda hf: change(hf, lambda t: t.update({"model.norm.weight": torch.zeros(32).half()})), "store one dtype"),
    ],
)
def test_damaged_hugging_face_folders_are_refused(tmp_path, damage, says):
    hf = save_hf(hf_model(), tmp_path / "hf")
    damage(hf)
    with pytest.raises(UserError, match=says):
        HfFolder(hf).check()


def change(hf: Path, how) -> None:
    tensors = load_file(hf / "model.safetensors")
    how(tensors)
    save_file(tensors, hf / "model.safetensors")


# Outputs


def write(path, config, text="x", **options):
    with output_folder(path, command="test", config=config, inputs={}, **{"resume": True, **options}) as out:
        if not out.done:
            (out.path / "file").write_text(text)
        return out.done


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    with (
        pytest.raises(RuntimeError),
        output_folder(tmp_path / "o", command="", config={}, inputs={}, resume=True) as out,
    ):
        (out.path / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "o", {"a": 1})
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["file", "manifest.yaml"]
    assert read_manifest(tmp_path / "o")["config"] == {"a": 1}


def test_the_same_command_again_finds_its_output(tmp_path):
    free = frozenset({"parallel.tensor"})
    assert write(tmp_path / "o", {"a": 1, "parallel": {"tensor": 1}}, free=free) is False
    assert write(tmp_path / "o", {"a": 1, "parallel": {"tensor": 2}}, free=free) is True
    with pytest.raises(UserError, match="made with other options"):
        write(tmp_path / "o", {"a": 2})
    with pytest.raises(UserError, match="resume=false"):
        write(tmp_path / "o", {"a": 1}, resume=False)


def test_what_others_made_is_left_alone(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").write_text("x")
    with pytest.raises(UserError, match="not one of our folders"):
        write(tmp_path / "o", {})
    assert (tmp_path / "o" / "precious").read_text() == "x"


def test_no_output_is_made_inside_of_a_whole_one(tmp_path, monkeypatch):
    """In a run's folder, or somebody else's with a file of that name, it can be; one that is there is left alone."""
    for name in ("free", "run/model", "m"):
        write(tmp_path / name, {})
    monkeypatch.chdir(tmp_path / "run")
    for inside in (tmp_path / "m" / "sub", tmp_path / "m" / "a" / "b", Path("model/sub"), Path("../m/.sub")):
        with pytest.raises(
            UserError, match=r"output=\S+ is inside of \S+(m|model), a whole output, with which it would be"
        ):
            write(inside, {})
        with pytest.raises(UserError, match="is inside of"):
            check_output(inside, config={}, inputs={}, resume=True)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["file", "manifest.yaml"]
    write(tmp_path / "run" / "judged", {})
    (tmp_path / "mine").mkdir()
    for number, text in enumerate(("kind: Deployment", "{", "[digest, files]")):
        (tmp_path / "mine" / "manifest.yaml").write_text(text)
        write(tmp_path / "mine" / f"o{number}", {})
    before = tmp_path / "m" / "earlier"
    (tmp_path / "free").rename(before)
    assert write(before, {}) is True


def test_a_second_run_waits_outside(tmp_path):
    with output_folder(tmp_path / "o", command="", config={}, inputs={}, resume=True) as out:
        (out.path / "file").write_text("first")
        with pytest.raises(UserError, match="another run is writing"):
            write(tmp_path / "o", {})
    assert (tmp_path / "o" / "file").read_text() == "first"


def test_what_a_killed_run_left_is_swept(tmp_path):
    (tmp_path / ".o.partial").mkdir()
    (tmp_path / ".o.partial" / "junk").write_text("x")
    write(tmp_path / "o", {})
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["file", "manifest.yaml"]


def work(path, *, continues=True, killed=False, **what):
    """A command that writes an output, or begins to and is killed."""
    config, inputs = what.pop("config", {"a": 1}), what.pop("inputs", {"data": "d1"})
    how = {"config": config, "inputs": inputs, "resume": True, **what}
    check_output(path, **how)
    with (
        contextlib.suppress(SystemExit),
        output_folder(path, command="", **how, continues=continues) as out,
    ):
        kept = (out.path / "hours").is_file()
        (out.path / "hours").touch()
        out.keep = True
        if killed:
            raise SystemExit
        return kept


@pytest.mark.parametrize(("other", "says"), [
    ({"config": {"a": 2}}, "was begun with a=1, not 2"),
    ({"config": {"b": 1}}, "was begun with other options"),
    ({"inputs": {"data": "d2"}}, "was begun from other inputs: data changed since"),
    ({"resume": False}, "is unfinished and resume=false"),
    ({"continues": False}, "resume=false"),
    ({"continues": False, "config": {"c": 1}}, "was begun with other options"),
])  # fmt: skip
def test_what_a_killed_run_left_is_not_emptied_by_one_that_is_asked_otherwise(tmp_path, other, says):
    """Before the work begins, too; the lock is free after that."""
    work(tmp_path / "o", killed=True)
    with pytest.raises(UserError, match=says) as refused:
        work(tmp_path / "o", **other)
    assert str(tmp_path / ".o.partial") in str(refused.value) and "\n" not in str(refused.value)
    assert (tmp_path / ".o.partial" / "hours").is_file()
    assert work(tmp_path / "o") is True and not (tmp_path / ".o.partial").exists()


def test_what_a_killed_run_left_without_work_is_swept(tmp_path):
    work(tmp_path / "o", killed=True)
    (tmp_path / ".o.partial" / "hours").unlink()
    assert work(tmp_path / "o", config={"a": 2}) is False


def test_who_writes_an_output_is_not_called_unfinished(tmp_path):
    how = {"config": {"a": 1}, "inputs": {}, "resume": True}
    with output_folder(tmp_path / "o", command="", **how, continues=True) as out:
        (out.path / "hours").touch()
        check_output(tmp_path / "o", **{**how, "config": {"a": 2}})
        with pytest.raises(UserError, match="another run is writing"):
            work(tmp_path / "o", config={"a": 2})


def test_a_full_disk_is_told_before_and_while_writing(source, tmp_path, monkeypatch):
    few = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    with pytest.raises(UserError, match=r"no space left for .* are needed"):
        import_hf(ImportHfConfig(hf=str(source.parent / "hf"), output=str(tmp_path / "m")))
    monkeypatch.undo()
    with (
        pytest.raises(UserError, match="no space left while writing"),
        output_folder(tmp_path / "o", command="", config={}, inputs={}, resume=True),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_manifests_name_versions_and_files(source):
    manifest = read_manifest(source)
    assert set(manifest["versions"]) == {"minitron-megatron", "torch", "megatron-core", "transformers"}
    assert folders.SHAPE_FILE in manifest["files"] and "weights/.metadata" in manifest["files"]


WHOLE = torch.arange(3 * 24 * 10, dtype=torch.int32).view(3, 24, 10)


def save_quarters(path):
    """Rank r stores a quarter of every layer of WHOLE: half of its rows and of its columns, as tensor parallelism would."""
    from megatron.core import dist_checkpointing as megatron
    from torch.distributed import get_rank

    down, right = divmod(get_rank(), 2)
    state = {
        f"layer{layer}": megatron.ShardedTensor.from_rank_offsets(
            "layers.w",
            WHOLE[layer, down * 12 : down * 12 + 12, right * 5 : right * 5 + 5].contiguous(),
            (0, layer, 3),
            (1, down, 2),
            (2, right, 2),
            prepend_axis_num=1,
        )
        for layer in range(3)
    }
    megatron.save(state, path)


@pytest.fixture(scope="module")
def quarters(gloo, tmp_path_factory):
    path = tmp_path_factory.mktemp("quarters")
    gloo(4, save_quarters, str(path), layout={})
    return path


@pytest.mark.parametrize("span", [1, 100, 2**20])
def test_any_region_of_a_checkpoint_can_be_read(quarters, monkeypatch, span):
    """Whatever chunks it is stored in, and however few of its bytes are read at once."""
    monkeypatch.setattr(reading, "SPAN_BYTES", span)
    reader, draw = WeightReader(quarters), np.random.default_rng(0)
    for _ in range(50):
        start = [int(draw.integers(n)) for n in WHOLE.shape]
        sizes = [int(draw.integers(1, n - first + 1)) for n, first in zip(WHOLE.shape, start, strict=True)]
        wanted = WHOLE[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))]
        assert torch.equal(reader.read("layers.w", start, sizes), wanted), (start, sizes)


def test_a_checkpoint_that_lacks_bytes_or_chunks_is_told(quarters, tmp_path):
    shutil.copytree(quarters, path := tmp_path / "damaged")
    for file in path.glob("*.distcp"):
        os.truncate(file, 700)
    with pytest.raises(UserError, match=r"layers\.w is damaged"):
        WeightReader(path).read("layers.w", (0, 0, 0), WHOLE.shape)
    reader = WeightReader(quarters)
    reader.read("layers.w", (0, 0, 0), WHOLE.shape)
    reader.places = {index: replace(place, offset=10**9) for index, place in reader.places.items()}
    with pytest.raises(UserError, match="ends too soon"):
        reader.read("layers.w", (0, 0, 0), WHOLE.shape)
    with pytest.raises(UserError, match="incomplete"):
        WeightReader(quarters).read("layers.w", (0, 0, 0), (3, 25, 10))


class InFp8(torch.nn.Parameter):
    """A parameter with the one method of Transformer Engine's FP8 tensors that loading asks for."""

    def dequantize(self):
        return self.data


def test_a_matrix_in_fp8_that_is_not_the_one_that_was_read_is_told(monkeypatch):
    """As where every piece of it is rounded by a scale of its own; what e4m3 rounds off is not."""
    monkeypatch.setattr("megatron.core.fp8_utils.is_float8tensor", lambda tensor: isinstance(tensor, InFp8))
    exact, chunk = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), torch.nn.Linear(32, 64, bias=False)
    chunk.weight = InFp8(exact.to(torch.float8_e4m3fn).float())
    _check_rounding(chunk, {"weight": exact}, Path("weights"))
    chunk.weight.data[:32] *= 2
    with pytest.raises(UserError, match=r"weights: weight in FP8 is 7\d% off, where e4m3 rounds off 2.7%"):
        _check_rounding(chunk, {"weight": exact}, Path("weights"))
