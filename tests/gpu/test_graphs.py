"""CUDA graphs and overlapped tensor-parallel transfers: the losses are those of steps without, in every layout."""

import os
import shutil

import pytest
import torch

from tests.gpu.test_fp8 import distilled, folders, losses

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
__all__ = ["folders"]
GRAPHS = {"trainer.cuda_graphs": True, "trainer.validation_samples": 4, "trainer.validation_interval": 3}
TENSOR = {"parallel.tensor": 2, "parallel.sequence": True}
OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 100000}
# NVLink's multicast is for whole hosts: a program that shares one leaves it alone.
BUFFERS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "UB_SKIPMC": "1"}
DEVICES = torch.cuda.device_count()


def measured(metrics):
    """Losses of steps and of validations, in order."""
    return [line[name] for line in metrics for name in ("loss", "validation_loss") if name in line]


@pytest.fixture(scope="module")
def without(folders, tmp_path_factory):
    """A run on one GPU without graphs."""
    options = {**GRAPHS, "trainer.cuda_graphs": False}
    return measured(distilled(folders, tmp_path_factory.mktemp("without") / "run", **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        OVERLAP,
        {"trainer.recompute": "selective", "trainer.recompute_modules": "[core_attn,mlp]"},
        {"trainer.micro_batch_size": 4},
    ],
    ids=str,
)
def test_losses_are_those_without_graphs(folders, without, tmp_path, options):
    found = measured(distilled(folders, tmp_path / "run", **GRAPHS, **options))
    assert found == pytest.approx(without, rel=2e-3)


@pytest.mark.parametrize("scaling", ["delayed", "tensorwise", "blockwise"])
def test_fp8_in_graphs_is_fp8_without_and_resumes(folders, tmp_path, scaling):
    options = {"trainer.fp8": scaling, "distill.teacher_fp8": "tensorwise", "distill.teacher_head_fp8": True}
    wanted = losses(distilled(folders, tmp_path / "without", **options))
    run = tmp_path / "run"
    options |= {"trainer.cuda_graphs": True}
    whole = losses(distilled(folders, run, **options))
    assert whole == pytest.approx(wanted, rel=2e-3)
    # What a run killed after its first checkpoint leaves behind.
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    assert losses(distilled(folders, run, **options)) == whole


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "options",
    [
        TENSOR,
        {"parallel.context": 2},
        {"parallel.pipeline": 2, "trainer.micro_batch_size": 1},
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "trainer.micro_batch_size": 1},
        {"parallel.pipeline": 2, "trainer.micro_batch_size": 1, "distill.teacher_ahead": 3},
        OVERLAP,
        {**TENSOR, "distill.teacher_parallel.tensor": 1, "distill.teacher_parallel.sequence": False},
    ],
    ids=str,
)
def test_layouts_with_graphs(folders, without, tmp_path, options):
    found = measured(distilled(folders, tmp_path / "run", gpus=2, **GRAPHS, **options))
    assert found == pytest.approx(without, rel=2e-2)


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("fp8", ["none", "delayed"])
def test_overlapped_transfers(folders, tmp_path, fp8):
    options = {**TENSOR, "trainer.fp8": fp8}
    env = {**os.environ, **BUFFERS}
    wanted = losses(distilled(folders, tmp_path / "without", gpus=2, env=env, **options))
    found = losses(
        distilled(folders, tmp_path / "run", gpus=2, env=env, **options, **{"trainer.tp_comm_overlap": True})
    )
    assert found == pytest.approx(wanted, rel=5e-3)
