"""Imports and exports before and around their work: what is refused at once, what is said, and in which order things happen."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minitron_megatron.checkpoints import exporting, gguf
from minitron_megatron.checkpoints.export_checks import (
    Exporting,
    check_companions,
    check_export_hf,
    check_export_megatron,
    check_export_nemo,
    check_import_hf,
    check_random_model,
)
from minitron_megatron.checkpoints.exporting import export_for
from minitron_megatron.checkpoints.folder import open_model_folder, output_folder, read_manifest
from minitron_megatron.checkpoints.gguf import check_smollm2, find_smollm2, unpack_smollm2
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.config import (
    ExportHfConfig,
    ExportMegatronConfig,
    ExportNemoConfig,
    ImportHfConfig,
    ModelConfig,
    RandomModelConfig,
    Smollm2Config,
)
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from tests.test_checkpoints import random_sizes
from tests.tiny import hf_model, model_option, save_hf

EXPORTS = {
    "hf": (ExportHfConfig, check_export_hf),
    "megatron": (ExportMegatronConfig, check_export_megatron),
    "nemo": (ExportNemoConfig, check_export_nemo),
}


def random_model(path: Path, **sizes) -> Path:
    make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes() | sizes), output=str(path)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "m")


def checked(kind: str, model: Path, output: Path, **options) -> Exporting:
    config, check = EXPORTS[kind]
    return check(config(model=model_option(model), output=str(output), **options))


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_of_a_model_and_of_the_files_beside_it(model, tmp_path, caplog, kind):
    found = checked(kind, model, tmp_path / "o")
    folder = open_model_folder(model)
    assert found == Exporting(folder, {"model": folder.digest}, found.results) and not found.results
    assert [record.message for record in caplog.records] == [
        f"{model} has no tokenizer, so the export has none: copy the files of the one that its data were prepared with"
    ]
    caplog.clear()
    shutil.copytree(model, copy := tmp_path / "copy")
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert set(checked(kind, copy, tmp_path / "o").inputs) == {"model", "file tokenizer/tokenizer.json"}
    assert not caplog.records


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_refused_before_it_begins(model, tmp_path, kind):
    """Where its output is somebody's, and where the index of the weights is damaged."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").touch()
    with pytest.raises(UserError, match="is not one of our folders"):
        checked(kind, model, tmp_path / "theirs")
    shutil.copytree(model, copy := tmp_path / "copy")
    index = copy / "weights" / ".metadata"
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(UserError, match="damaged or unsafe"):
        checked(kind, copy, tmp_path / "o")


@pytest.mark.parametrize(
    ("sizes", "refuse"),
    [
        ({"rope_theta": 1e4 + 0.5}, {"megatron": "rope_theta=10000.5"}),
        ({"ffn_hidden_size": [8, 16, 8]}, dict.fromkeys(EXPORTS, "layers of different ffn_hidden_size")),
        (
            {
                "family": "mistral",
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            {"nemo": "MistralConfig7B has none"},
        ),
    ],
)
def test_what_the_other_program_cannot_say_is_refused(tmp_path, sizes, refuse):
    made = random_model(tmp_path / "m", **sizes)
    for kind in EXPORTS:
        if kind in refuse:
            with pytest.raises(UserError, match=refuse[kind]):
                checked(kind, made, tmp_path / "o")
        else:
            checked(kind, made, tmp_path / "o")


def test_evaluations_of_a_card_are_inputs_of_its_export(model, tmp_path):
    with output_folder(
        tmp_path / "e", command="", config={}, inputs={"model": open_model_folder(model).digest}, resume=True
    ) as out:
        (out.path / "results.json").write_text('{"loss": 2.0}')
    found = checked("hf", model, tmp_path / "o", results=[str(tmp_path / "e")])
    assert found.inputs[f"results {tmp_path / 'e'}"] == read_manifest(tmp_path / "e")["digest"]
    assert [one.values for one in found.results] == [{"loss": 2.0}]


def test_configs_beside_the_weights_can_be_read(model, tmp_path):
    shutil.copytree(model, copy := tmp_path / "copy")
    (copy / "huggingface").mkdir()
    check_companions(open_model_folder(copy))
    (copy / "huggingface" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        checked("hf", copy, tmp_path / "o")
    checked("nemo", copy, tmp_path / "o")


@pytest.mark.parametrize(("heads", "said"), [(4, False), (6, True)])
def test_another_class_is_said(model, caplog, heads, said):
    folder = open_model_folder(model)
    sizes = {"num_attention_heads": heads, "num_query_groups": 2}
    folder = SimpleNamespace(path=folder.path, shape=folder.shape.resized(**sizes))
    check_companions(folder)
    assert [record.message for record in caplog.records] == [
        "hidden_size=16 is not a multiple of num_attention_heads=6, which transformers 5 refuses of a Llama: exported as "
        "MistralForCausalLM, which computes the same"
    ] * said


def test_an_import_is_refused_before_it_begins(tmp_path):
    hf = save_hf(hf_model(num_hidden_layers=1), tmp_path / "hf")
    cfg = ImportHfConfig(hf=str(hf), output=str(tmp_path / "o"))
    assert check_import_hf(cfg).path == hf
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").touch()
    with pytest.raises(UserError, match="is not one of our folders"):
        check_import_hf(cfg)
    with pytest.raises(UserError, match="is not one of our folders"):
        check_random_model(RandomModelConfig(model=ModelConfig(**random_sizes()), output=str(tmp_path / "o")))
    (tmp_path / "o" / "precious").unlink()
    (hf / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        check_import_hf(cfg)


# Around the work


@pytest.fixture
def said(monkeypatch):
    seen = []
    for name in ("check_copies", "verify_digest", "print_shape"):
        monkeypatch.setattr(exporting, name, lambda *given, name=name: seen.append((name, *given)))
    return seen


@pytest.mark.parametrize("verify", [False, True])
def test_an_export_looks_reads_writes_and_says_so_once(model, tmp_path, said, verify):
    cfg = ExportMegatronConfig(model=model_option(model), output=str(tmp_path / "o"), verify=verify)
    found, written = checked("megatron", model, tmp_path / "o"), []

    def write(target: Path, folder) -> None:
        written.append(folder)
        (target / "file").write_text("x")

    for _ in range(2):
        export_for("It", cfg, found, write)
    assert written == [found.folder]
    results = read_manifest(tmp_path / "o")["results"]
    assert results["parameters"] == count_parameters(found.folder.shape) and 0 <= results["seconds"] < 100
    looks = [("check_copies", model), *([("verify_digest", found.folder)] * verify)]
    title = f"{tmp_path / 'o'}: exported from {model} for It"
    assert said == [*looks, ("print_shape", title, found.folder.shape, results), *looks]


def test_a_dry_run_of_an_export_writes_nothing(model, tmp_path, said):
    cfg = ExportMegatronConfig(model=model_option(model), output=str(tmp_path / "o"), dry_run=True)
    found = checked("megatron", model, tmp_path / "o")
    export_for("It", cfg, found, lambda *_: pytest.fail("it writes"))
    assert said[1:] == [("print_shape", f"{model} would be exported for It", found.folder.shape)]
    assert not list(tmp_path.iterdir())


# The packaged model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a tiny model, which transformers reads; (file, what transformers is asked, what it says of its keys)."""
    model, asked = hf_model(num_hidden_layers=2, tie_word_embeddings=True).to(torch.bfloat16), []
    keys = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}

    def load(folder, **how):
        asked.append((folder, how))
        return model, keys

    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    def tokenizer(folder, **how):
        asked.append((folder, how))
        return Tokenizer()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    names = ["a.py", "tiny.gguf"]
    monkeypatch.setattr(
        gguf,
        "files",
        lambda package: [
            SimpleNamespace(suffix=Path(name).suffix, locate=lambda name=name: tmp_path / name) for name in names
        ],
    )
    return SimpleNamespace(model=model, asked=asked, keys=keys, names=names)


def test_the_package_becomes_a_folder_that_can_be_imported(package, tmp_path, caplog):
    cfg = Smollm2Config(output=str(tmp_path / "o"))
    caplog.set_level("INFO")
    for _ in range(2):
        unpack_smollm2(cfg)
    (folder, how), of_tokenizer = package.asked
    assert folder == tmp_path and how.pop("quantization_config").dequantize is True
    assert how == {"gguf_file": "tiny.gguf", "dtype": torch.bfloat16, "output_loading_info": True}
    assert of_tokenizer == (tmp_path, {"gguf_file": "tiny.gguf"})
    hf = HfFolder(tmp_path / "o")
    hf.check()
    assert {file.name for file in (tmp_path / "o").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "manifest.yaml",
    }
    found, state = load_file(tmp_path / "o" / "model.safetensors"), package.model.state_dict()
    assert found.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    text = (tmp_path / "o" / "config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2) + "\n"
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (0, 1, "bfloat16")
    assert read_manifest(tmp_path / "o")["config"]["gguf"] == "tiny.gguf"
    assert f"{tmp_path / 'o'}: SmolLM2-135M-Instruct as a Hugging Face folder" in caplog.messages


def test_a_package_that_lacks_a_weight_is_refused_and_a_dry_run_reads_none(package, tmp_path, caplog):
    caplog.set_level("INFO")
    unpack_smollm2(Smollm2Config(output=str(tmp_path / "o"), dry_run=True))
    assert f"tiny.gguf would be unpacked into {tmp_path / 'o'}" in caplog.messages
    assert not package.asked and not list(tmp_path.iterdir())
    package.keys["missing_keys"] = {"model.norm.weight"}
    with pytest.raises(UserError, match=r"tiny\.gguf: model\.norm\.weight is missing"):
        unpack_smollm2(Smollm2Config(output=str(tmp_path / "o")))
    assert not list(tmp_path.iterdir())


def test_one_file_of_the_package_is_meant(package, tmp_path):
    assert find_smollm2() == check_smollm2(Smollm2Config(output=str(tmp_path / "o"))) == tmp_path / "tiny.gguf"
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").touch()
    with pytest.raises(UserError, match="is not one of our folders"):
        check_smollm2(Smollm2Config(output=str(tmp_path / "o")))
    package.names.append("other.gguf")
    with pytest.raises(UserError, match="has 2 GGUF files"):
        find_smollm2()
