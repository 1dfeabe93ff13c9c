"""The same code on CUDA: logits, importance, distillation and resuming on one GPU, against the CPU and transformers."""

import json
import shutil

import numpy as np
import pytest
import torch

from minitron_megatron.config import ImportanceConfig, LayersConfig
from minitron_megatron.importance.layers import load_layer_analysis
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.importance.scores import load_scores
from minitron_megatron.layer_analysis import analyse_layers
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.gpu.command import command
from tests.tiny import LLAMA3, data_folder, data_option, hf_model, imported, model_option

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Large enough that the fused optimizer's blocks are not all remainder.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(transformers model, model folder, data folder)."""
    folder = tmp_path_factory.mktemp("gpu")
    model = hf_model(rope_parameters=LLAMA3, **SIZES)
    path = imported(model, folder)
    return model, path, data_folder(folder, path)


def test_logits_equal_transformers(folders):
    model, path, _ = folders
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
    with parallel_job(Layout(), seed=1, device="cuda"):
        found = jobs.logits(str(path), tokens, {}).cpu()
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_scores_are_those_of_the_cpu(folders, tmp_path):
    _, path, data = folders
    for device in ("cpu", "cuda"):
        cfg = ImportanceConfig(
            model=model_option(path), data=data_option(data), samples=6, device=device, output=str(tmp_path / device)
        )
        measure_importance(cfg)
    wanted, found = load_scores(tmp_path / "cpu").tensors, load_scores(tmp_path / "cuda").tensors
    for name, score in wanted.items():
        assert np.abs(found[name] - score).max() / np.abs(score).max() <= 1e-5, name


def test_a_layer_analysis_is_that_of_the_cpu(folders, tmp_path):
    _, path, data = folders
    line = {"context": "The quick brown", "choices": [" fox", " five jugs"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    found = {}
    for device in ("cpu", "cuda"):
        cfg = LayersConfig(
            model=model_option(path),
            data=data_option(data),
            block=[1, 2],
            samples=6,
            questions=str(tmp_path / "questions.jsonl"),
            device=device,
            output=str(tmp_path / device),
        )
        analyse_layers(cfg)
        analysis = load_layer_analysis(tmp_path / device)
        judged = [analysis.base, *(j for blocks in analysis.blocks.values() for j in blocks)]
        found[device] = np.array([(j.loss, j.bi, j.margin) for j in judged])
    assert np.abs(found["cuda"] / found["cpu"] - 1)[:, ::2].max() <= 1e-5
    assert np.abs(found["cuda"] - found["cpu"])[:, 1].max() <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_learns_and_resumes(folders, tmp_path, precision):
    """Eight steps in one go, and four, a stop and four: the same losses, bit for bit."""
    _, path, data = folders
    student = imported(hf_model(1, **{**SIZES, "hidden_size": 128}), tmp_path)

    def run(steps: int) -> dict[int, float]:
        words = [
            f"teacher={path}",
            f"student={student}",
            f"data.path={data}",
            "data.sequence_length=32",
            f"trainer.steps={steps}",
            "trainer.global_batch_size=4",
            "trainer.save_interval=4",
            "trainer.validation_samples=0",
            "optim.lr=1e-3",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "logger.wandb=disabled",
            f"precision={precision}",
            f"output={tmp_path / 'whole'}",
        ]
        command("distill", *words)
        lines = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines}

    whole = run(8)
    assert whole[8] < whole[1]
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == ["step_00000004", "step_00000008"]
    # What a run killed after its first checkpoint leaves behind.
    shutil.rmtree(tmp_path / "whole" / "model")
    shutil.rmtree(checkpoints[1])
    assert run(8) == whole
