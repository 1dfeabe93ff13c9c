"""Teacher correction: cross entropy over the sharded vocabulary against float64, and the command that trains with it."""

import json

import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import (
    CorrectTeacherConfig,
    LoggerConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.train.correct_teacher import correct_teacher
from tests import jobs
from tests.test_distill import VOCABULARY, merged
from tests.test_models import names
from tests.tiny import data_folder, data_option, hf_model, imported, model_option


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with a model and data, and transformers' own model."""
    folder = tmp_path_factory.mktemp("correction")
    model = hf_model(0)
    data_folder(folder, imported(model, folder))
    return folder, model


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (4, {"tensor": 2, "pipeline": 2, "sequence": True}), (2, {})], ids=names
)
def test_next_token_gradients_are_those_of_transformers(gloo, source, ranks, layout):
    """In float64; loss to 1e-5 and gradients to 1e-4 of their largest."""
    folder, model = source
    tokens = torch.randint(0, VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(7))
    model = model.double()
    model.zero_grad()
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    path = str(folder / "model")
    parts = gloo(ranks, jobs.loss_and_gradients, None, path, tokens, layout, 2, layout=layout)
    assert all(found == pytest.approx(loss.item(), rel=1e-5) for found, _ in parts)
    found = merged(open_model_folder(path).shape, [placed for _, placed in parts])
    for name, parameter in model.named_parameters():
        assert float((found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()) <= 1e-4, name


def options(folder, output, layout=None, **trainer) -> CorrectTeacherConfig:
    given = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "save_interval": 2}
    return CorrectTeacherConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        model=model_option(folder / "model"),
        data=data_option(folder / "data"),
        trainer=TrainerConfig(**{**given, "validation_interval": 2, "validation_samples": 9, **trainer}),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        logger=LoggerConfig(wandb="disabled"),
    )


def test_a_corrected_teacher_is_published_and_better_on_its_data(gloo, source, tmp_path):
    """Perplexity on the validation split falls, and is the loss's exponential: nothing but the next token is learned."""
    folder, _ = source
    assert gloo(1, correct_teacher, options(folder, tmp_path / "run")) == [None]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [2, 4]
    for line in measured:
        assert line["validation_perplexity"] == pytest.approx(torch.tensor(line["validation_loss"]).exp().item(), 1e-5)
    assert measured[1]["validation_loss"] < measured[0]["validation_loss"]
    manifest = read_manifest(tmp_path / "run" / "model")
    assert {"model", "data"} < set(manifest["inputs"]) and manifest["results"]["steps"] == 4
    assert open_model_folder(tmp_path / "run").shape == open_model_folder(folder / "model").shape


def test_impossible_corrections_are_refused(source, tmp_path):
    folder, _ = source
    with pytest.raises(UserError, match=r"data.sequence_length=256 is above the model's 128 positions"):
        cfg = options(folder, tmp_path / "run")
        cfg.data.sequence_length = 256
        correct_teacher(cfg)
    assert not (tmp_path / "run").exists()
