"""Hugging Face folders as people have them: the weights that transformers takes, contradictions named, exports that load."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints.export_checks import check_export_hf, check_import_hf
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.hf_folder import HfFolder, copy_companions
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.cli import next_command
from minitron_megatron.config import (
    DistillConfig,
    ExportHfConfig,
    ImportHfConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    PruneConfig,
    RandomModelConfig,
    TargetConfig,
    TrainerConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.prune.checks import check_prune
from minitron_megatron.train.distill import distill
from tests.test_checkpoints import random_sizes
from tests.tiny import FAMILIES, data_folder, data_option, hf_model, model_option, save_hf

TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
TWO_LAYERS = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_hf(hf_model(**TWO_LAYERS), tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def hf(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "hf"))


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def there_and_back(hf: Path, to: Path, **options) -> Path:
    import_hf(ImportHfConfig(hf=str(hf), output=str(to / "model"), **options))
    export_hf(ExportHfConfig(model=model_option(to / "model"), output=str(to / "back")))
    return to / "back"


def shard(hf: Path, change=lambda tensor: tensor, files: int = 2) -> dict[str, str]:
    """An index with shards of the folder's tensors beside its single file; gives the map."""
    tensors = load_file(hf / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: change(tensors[name]) for name in names if where[name] == file}, hf / file)
    write_index(hf, where)
    return where


def write_index(hf: Path, where: dict[str, str]) -> None:
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# Two sources of weights


def test_of_two_sources_the_one_of_transformers_is_taken_and_the_other_named(hf, tmp_path, caplog):
    """As saving over an older, sharded model leaves a folder."""
    shard(hf, lambda tensor: 2 * tensor)
    back = there_and_back(hf, tmp_path)
    said = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert any("taken from model.safetensors, as transformers does" in line for line in said)
    assert torch.equal(logits_of(hf), logits_of(back))
    assert all(torch.equal(tensor, single(back)[name]) for name, tensor in single(hf).items())


def single(hf: Path) -> dict[str, torch.Tensor]:
    return load_file(hf / "model.safetensors")


def test_an_index_of_the_single_file_is_no_other_source(hf, caplog):
    write_index(hf, dict.fromkeys(single(hf), "model.safetensors"))
    HfFolder(hf).check()
    assert not caplog.records


@pytest.mark.parametrize("odd", [{"x": ["a"]}, {"x": "../model.safetensors"}, {"x": None}, 3])
def test_an_odd_index_beside_the_single_file_is_named_and_left_alone(hf, caplog, odd):
    """One odd name among those of the single file; it is not read for anything."""
    write_index(hf, dict.fromkeys(single(hf), "model.safetensors") | odd if isinstance(odd, dict) else odd)
    HfFolder(hf).check()
    assert "names other files: remove one" in caplog.text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda where: where | {"model.norm.weight": other(where)}, r"has (no )?model\.norm\.weight, (which|and) "),
        (lambda where: {k: v for k, v in where.items() if k != "lm_head.weight"}, "lm_head.weight is missing"),
        (lambda where: where | {"x": "../../etc/passwd"}, "weight_map does not name files of the folder"),
        (lambda where: where | {"x": "/etc/passwd"}, "weight_map does not name files of the folder"),
        (lambda where: where | {"x": 3}, "weight_map does not name files of the folder"),
        (lambda where: {}, "weight_map does not name files of the folder"),
        (lambda where: where | {"model.norm.weight": "gone.safetensors"}, "gone.safetensors is missing"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_found_with_the_headers(hf, tmp_path, damage, says):
    """Dry runs see it too: both are checked by the one function."""
    where = shard(hf)
    (hf / "model.safetensors").unlink()
    write_index(hf, damage(where))
    with pytest.raises(UserError, match=says) as refused:
        check_import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "x"), dry_run=True))
    assert "\n" not in str(refused.value)


def other(where: dict[str, str]) -> str:
    return next(file for file in where.values() if file != where["model.norm.weight"])


def test_a_tensor_in_two_shards_is_a_contradiction(hf):
    """transformers reads every tensor of every file that the index names, and keeps the last one."""
    where = shard(hf)
    (hf / "model.safetensors").unlink()
    file = hf / other(where)
    save_file({**load_file(file), "model.norm.weight": torch.zeros(32)}, file)
    with pytest.raises(UserError, match=r"has model\.norm\.weight, and .* says it is in model-"):
        HfFolder(hf).check()
    save_file(
        {**load_file(file), "model.layers.9.mlp.up_proj.weight": torch.zeros(32)}, hf / where["model.norm.weight"]
    )
    with pytest.raises(UserError):
        HfFolder(hf).check()


def test_adapters_are_refused(hf):
    (hf / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        HfFolder(hf)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "added_tokens.json"])
def test_damaged_companions_are_found_before_the_import(hf, file):
    (hf / file).write_text("{")
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        HfFolder(hf).check()


# One matrix at both ends, or two


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_head_beside_a_tied_embedding_is_taken_as_transformers_takes_it(tmp_path, caplog, differs, sharded):
    hf = save_hf(hf_model(**TWO_LAYERS, tie_word_embeddings=True), tmp_path / "hf")
    tensors = single(hf)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0.5 * differs
    save_file({**tensors, "lm_head.weight": head}, hf / "model.safetensors", {"format": "pt"})
    if sharded:
        shard(hf)
        (hf / "model.safetensors").unlink()
    back = there_and_back(hf, tmp_path)
    assert torch.equal(logits_of(hf), logits_of(back))
    assert open_model_folder(tmp_path / "model").shape.tied_embeddings is not differs
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is not differs
    assert any("lm_head.weight differs from" in one.message for one in caplog.records) is differs


def test_a_head_that_an_index_names_and_no_file_has_is_told(tmp_path):
    hf = save_hf(hf_model(**TWO_LAYERS, tie_word_embeddings=True), tmp_path / "hf")
    where = shard(hf)
    (hf / "model.safetensors").unlink()
    write_index(hf, where | {"lm_head.weight": where["model.norm.weight"]})
    with pytest.raises(UserError, match=r"has no lm_head\.weight"):
        HfFolder(hf)


# Exports that load


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.slow) for f in FAMILIES])
def test_a_hidden_size_that_is_no_multiple_of_the_heads_is_exported_as_a_class_that_takes_it(tmp_path, caplog, family):
    """transformers 5 refuses it of a Llama alone; a Mistral computes the same."""
    odd = {"hidden_size": 36, **TWO_LAYERS}
    # LlamaConfig refuses to be made with such sizes: the weights are those of a Mistral.
    model = hf_model(family="mistral" if family == "llama" else family, **odd)
    hf = save_hf(model, tmp_path / "hf")
    if family == "llama":
        config = json.loads((hf / "config.json").read_text())
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sliding_window"}))
    with torch.no_grad():
        wanted = model(TOKENS).logits
    back = there_and_back(hf, tmp_path)
    assert open_model_folder(tmp_path / "model").shape.family == family
    assert torch.equal(logits_of(back), wanted)
    said = any("exported as MistralForCausalLM, which computes the same" in one.message for one in caplog.records)
    assert said is (family == "llama")
    card = (back / "README.md").read_text()
    assert ("MistralForCausalLM" in card) is (family in ("llama", "mistral"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pruning_warns_of_a_llama_alone(tmp_path, caplog, family):
    hf = save_hf(hf_model(family=family, **TWO_LAYERS), tmp_path / "hf")
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "model")))
    target = TargetConfig(hidden_size=28)
    cfg = PruneConfig(model=model_option(tmp_path / "model"), target=target, output=str(tmp_path / "x"), dry_run=True)
    check_prune(cfg)
    assert any("exported as MistralForCausalLM" in one.message for one in caplog.records) is (family == "llama")


def test_an_export_without_a_tokenizer_says_so(hf, tmp_path, caplog):
    for file in hf.glob("tokenizer*"):
        file.unlink()
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "model")))
    check_export_hf(ExportHfConfig(model=model_option(tmp_path / "model"), output=str(tmp_path / "back")))
    assert any("has no tokenizer, so the export has none" in one.message for one in caplog.records)


# A model without a tokenizer


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_import_without_a_tokenizer_says_what_will_need_it(hf, tmp_path, capsys, dry_run):
    cfg = ImportHfConfig(hf=str(hf), output=str(tmp_path / "model"), dry_run=dry_run)
    for there in (True, False):
        import_hf(replace(cfg, output=f"{cfg.output}_{there}"))
        shown = " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())
        assert ("none found, which prepare_data, adopt_data and" in shown) is not there
        if not dry_run:
            # Nor is a command the next that would stop for want of one.
            found = next_command.NEXT["import_hf"](replace(cfg, output=f"{cfg.output}_{there}"))
            assert (found is not None and found.command == "prepare_data") is there
        for file in hf.glob("tokenizer*"):
            file.unlink()


def random_model(path: Path, **sizes) -> Path:
    shape = random_sizes() | {"num_layers": 2, "hidden_size": 32, "dtype": "float32", **sizes}
    make_random_model(RandomModelConfig(model=ModelConfig(**shape), output=str(path)))
    return path


def test_the_tokenizer_of_the_data_is_taken_where_a_model_has_none(hf, tmp_path, caplog):
    made = open_model_folder(random_model(tmp_path / "random"))
    data = tmp_path / "data"
    shutil.copytree(hf, data / "tokenizer")
    for name, source, there in (("with", data, True), ("without", None, False), ("of_none", tmp_path / "other", False)):
        (tmp_path / name).mkdir()
        copy_companions(made, tmp_path / name, source)
        assert (tmp_path / name / "tokenizer" / "tokenizer.json").is_file() is there
        # Text files alone: a data folder may have been prepared with a whole model's folder.
        assert not (tmp_path / name / "tokenizer" / "model.safetensors").exists()
        assert any("has no tokenizer, so the new model has none" in one.message for one in caplog.records) is not there
        caplog.clear()


@pytest.mark.slow
def test_random_models_through_distillation_and_export_have_the_datas_tokenizer(gloo, hf, tmp_path):
    from transformers import AutoTokenizer

    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "imported")))
    data = data_folder(tmp_path / "text", tmp_path / "imported")
    teacher, student = random_model(tmp_path / "teacher"), random_model(tmp_path / "student", num_layers=1)
    run = DistillConfig(
        output=str(tmp_path / "run"),
        teacher=model_option(teacher),
        student=model_option(student),
        data=data_option(data),
        trainer=TrainerConfig(steps=1, global_batch_size=2, validation_samples=2),
        optim=OptimConfig(warmup_steps=0),
        logger=LoggerConfig(wandb="disabled"),
    )
    gloo(1, distill, run)
    export_hf(ExportHfConfig(model=model_option(tmp_path / "run"), output=str(tmp_path / "back")))
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("The quick")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(hf)("The quick")["input_ids"]
