"""The card and the generation config of an export say what the manifests say, and nothing else."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from minitron_megatron.checkpoints.card import counts
from minitron_megatron.checkpoints.folder import open_model_folder, output_folder
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.config import ExportHfConfig, ImportHfConfig, PruneConfig
from minitron_megatron.errors import UserError
from minitron_megatron.prune.prune import prune_model
from tests.test_token_ids import resized
from tests.tiny import hf_model, model_option, save_hf


@pytest.fixture
def pruned(tmp_path) -> Path:
    """A model imported from a download cache of Hugging Face's form, without its last layer but one."""
    hf = tmp_path / "models--some-org--Some-1.5B" / "snapshots" / "0123abc"
    save_hf(hf_model(), hf, torch.bfloat16)
    (hf / "generation_config.json").unlink()
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "source")))
    prune_model(PruneConfig(model=model_option(tmp_path / "source"), drop_layers=[2], output=str(tmp_path / "pruned")))
    return tmp_path / "pruned"


def exported(model: Path, **options) -> Path:
    output = model.parent / "small"
    export_hf(ExportHfConfig(model=model_option(model), output=str(output), **options))
    return output


def evaluation(folder: Path, model: Path, values: dict) -> str:
    """A folder as launch/evaluate.py leaves it."""
    inputs = {"model": open_model_folder(model).digest, "data": "sha256:0"}
    config = {"data": {"path": "outputs/data"}, "split": "validation"}
    with output_folder(folder, command="", config=config, inputs=inputs, resume=True) as out:
        (out.path / "results.json").write_text(json.dumps(values))
    return str(folder)


def test_a_card_has_shape_recipe_results_and_lineage(pruned, tmp_path):
    from huggingface_hub import ModelCard

    tasks = {"winogrande": {"acc": 0.7351, "acc_stderr": 0.0123, "fewshot": 5, "broken": float("nan")}}
    results = evaluation(tmp_path / "ppl", pruned, {"loss": 2.5, "perplexity": 12.182, "tasks": tasks})
    out = exported(pruned, results=[results], license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "some-org/Some-1.5B" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation" and {"llama", "pruned"} <= set(card.data.tags)
    lines = card.text.splitlines()
    assert "| num_layers | 3 | 4 |" in lines and "| kept of layers | 0-1 3 |" in lines
    assert "| winogrande, acc | 0.7351 ± 0.0123 | 5 | lm-evaluation-harness |" in lines
    assert "| perplexity | 12.18 |  | outputs/data, validation |" in lines and "broken" not in card.text
    for folder in (pruned, tmp_path / "source"):
        assert sum(f"| {folder} | {open_model_folder(folder).digest} |" in line for line in lines) == 1
    # Nothing was measured and nothing was distilled.
    assert "calibration" not in card.text and "Distillation" not in card.text


def test_a_card_has_the_teacher_beside_the_model(pruned, tmp_path):
    values = {"loss": 2.5, "perplexity": 12.18, "teacher_loss": 2.0, "teacher_perplexity": 7.389, "kl": 0.4}
    results = evaluation(tmp_path / "beside", pruned, {**values, "tasks": {"winogrande": {"acc": 0.5, "fewshot": 5}}})
    lines = (exported(pruned, results=[results]) / "README.md").read_text().splitlines()
    assert "|  | this model | teacher | shots | measured on |" in lines
    assert "| perplexity | 12.18 | 7.389 |  | outputs/data, validation |" in lines
    assert "| kl | 0.4 |  |  | outputs/data, validation |" in lines
    assert "| winogrande, acc | 0.5 |  | 5 | lm-evaluation-harness |" in lines


def test_what_is_not_known_is_left_out(pruned, tmp_path):
    """No license; and an ancestor that is another one now counts as gone."""
    from huggingface_hub import ModelCard

    digest = open_model_folder(tmp_path / "source").digest
    shutil.rmtree(tmp_path / "source")
    hf = save_hf(hf_model(1), tmp_path / "other")
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "source")))
    card = ModelCard.load(exported(pruned) / "README.md")
    assert card.data.license is None and card.data.base_model is None
    assert f"| source | {tmp_path / 'source'} | {digest} |  |  |" in card.text
    assert str(hf) not in card.text and "## Results" not in card.text


def test_an_export_says_how_it_generates_and_comes_back_as_it_was(pruned, tmp_path):
    """The source has no generation config: its tokens are those of the config."""
    from transformers import GenerationConfig

    out = exported(pruned)
    found = GenerationConfig.from_pretrained(out)
    assert (found.bos_token_id, found.eos_token_id) == (0, 1)
    import_hf(ImportHfConfig(hf=str(out), output=str(tmp_path / "back")))
    back, before = open_model_folder(tmp_path / "back"), open_model_folder(pruned)
    assert (back.digest, back.shape) == (before.digest, before.shape)
    shutil.rmtree(out)
    again = exported(tmp_path / "back")
    assert json.loads((again / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}


def test_the_tokenizer_says_it_where_the_config_does_not(pruned):
    config = pruned / "huggingface" / "config.json"
    assert '"eos_token_id"' in config.read_text()
    config.write_text(config.read_text().replace('"eos_token_id"', '"eos_token_xx"'))
    resized(pruned)
    written = json.loads((exported(pruned) / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": 1}


def test_results_must_be_evaluations_of_this_model(pruned, tmp_path):
    of_source = evaluation(tmp_path / "ppl", tmp_path / "source", {"loss": 2.5})
    for results, why in ((of_source, "is of another model"), (str(tmp_path / "source"), "give the output of evaluate")):
        with pytest.raises(UserError, match=why):
            exported(pruned, results=[results])
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("option", "values", "shown"),
    [
        ("distill.top_k", {"distill.top_k": 5, "distill.loss": "topk_kl"}, True),
        ("distill.top_k", {"distill.top_k": 5, "distill.loss": "forward_kl"}, False),
        ("distill.cross_entropy", {"distill.cross_entropy": 0.0}, False),
        ("distill.cross_entropy", {"distill.cross_entropy": 0.5}, True),
        ("optim.weight_decay", {"optim.weight_decay": 0.0}, True),
        ("trainer.fp8", {"trainer.fp8": "none"}, False),
        ("seed", {}, False),
    ],
)
def test_only_options_that_did_something_are_a_recipe(option, values, shown):
    assert counts(option, values.get) is shown


def test_the_commands_of_a_card_are_in_their_order(pruned):
    """As they are typed again: the import before the pruning, whatever they are called."""
    for folder, command in ((pruned.parent / "source", "z first"), (pruned, "a second")):
        manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
        (folder / "manifest.yaml").write_text(yaml.safe_dump({**manifest, "command": command}))
    text = (exported(pruned) / "README.md").read_text()
    assert text.index("z first") < text.index("a second")


@pytest.mark.parametrize("license", [None, "mit"])
def test_a_card_says_which_parts_are_missing(pruned, license):
    text = (exported(pruned, license=license) / "README.md").read_text()
    assert ("such as the license, intended use" in text) == (license is None) and "intended use" in text


def test_what_a_card_shows_to_type_can_be_typed(pruned):
    """Each command in a line of its own; Python that loads the tokenizer where there is one, and only there."""
    for folder, command in ((pruned.parent / "source", "first x=1"), (pruned, "second")):
        manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
        (folder / "manifest.yaml").write_text(yaml.safe_dump({**manifest, "command": command}))
    for has_tokenizer in (True, False):
        out = exported(pruned)
        card = (out / "README.md").read_text()
        if has_tokenizer:
            commands = re.search(r"~~~~\n(.*?)\n~~~~", card, re.DOTALL)[1].splitlines()
            assert commands == ["first x=1", "second"]
            shutil.rmtree(pruned / "tokenizer")
            manifest = yaml.safe_load((pruned / "manifest.yaml").read_text())
            manifest["files"] = {k: v for k, v in manifest["files"].items() if not k.startswith("tokenizer/")}
            (pruned / "manifest.yaml").write_text(yaml.safe_dump(manifest))
        code = ast.parse(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
        names = [node.id for node in ast.walk(code) if isinstance(node, ast.Name)]
        imported_names = [
            alias.name for node in ast.walk(code) if isinstance(node, ast.ImportFrom) for alias in node.names
        ]
        assert ("AutoTokenizer" in imported_names) == ("AutoTokenizer" in names) == has_tokenizer
        shutil.rmtree(out)
