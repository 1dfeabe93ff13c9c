"""Context parallelism on two GPUs: scores, loss and a distillation step are those of one GPU.

Fused attention takes bf16 only, and two ranks round other partial sums than one: 1e-2 of the largest score, 2e-3 of a loss.
"""

import json

import numpy as np
import pytest
import torch

from minitron_megatron.importance.scores import load_scores
from tests.gpu.command import command
from tests.tiny import data_folder, hf_model, imported

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3, "spread": 0.03}
LENGTH = 64


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folders(request, tmp_path_factory):
    """(model, student, data), in bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    models = [hf_model(seed, family=request.param, **SIZES) for seed in (0, 1)]
    path, student = (imported(m, folder / str(i), torch.bfloat16) for i, m in enumerate(models))
    return path, student, data_folder(folder, path)


def run(name, context, *words):
    """A command on `context` GPUs that share every sequence."""
    shared = [f"data.sequence_length={LENGTH}", f"parallel.context={context}"]
    command(name, *words, *shared, gpus=context)


def on_one_and_two(name, folder, *words):
    """The outputs of both."""
    for context in (1, 2):
        run(name, context, *words, f"output={folder / str(context)}")
    return folder / "1", folder / "2"


def test_scores(folders, tmp_path):
    path, _, data = folders
    words = (f"model={path}", "model.engine=te", f"data.path={data}", "samples=5", "trainer.micro_batch_size=2")
    wanted, found = (load_scores(output).tensors for output in on_one_and_two("importance", tmp_path, *words))
    assert wanted.keys() == found.keys()
    for name, score in wanted.items():
        assert np.abs(found[name] - score).max() / np.abs(score).max() <= 1e-2, name


def test_evaluation_loss(folders, tmp_path):
    path, _, data = folders
    words = (f"model={path}", "model.engine=te", f"data.path={data}", "samples=6", "trainer.micro_batch_size=2")
    outputs = on_one_and_two("evaluate", tmp_path, *words)
    wanted, found = (json.loads((output / "results.json").read_text()) for output in outputs)
    assert found["tokens"] == wanted["tokens"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-3)


def test_a_distillation_step(folders, tmp_path):
    path, student, data = folders
    words = (
        f"teacher={path}",
        f"student={student}",
        "teacher.engine=te",
        "student.engine=te",
        f"data.path={data}",
        "trainer.steps=2",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.validation_samples=4",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "logger.wandb=disabled",
    )
    outputs = on_one_and_two("distill", tmp_path, *words)
    wanted, found = ([json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()] for o in outputs)
    assert len(wanted) == len(found)
    for one, two in zip(wanted, found, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "validation_loss", "validation_perplexity"}:
            assert two[name] == pytest.approx(one[name], rel=2e-2), name
        if "grad_norm" in one:
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-2)
