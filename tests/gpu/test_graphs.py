"""CUDA graphs and overlapped tensor-parallel transfers: the losses are those of steps without, in every layout."""

import shutil

import pytest
import torch
import yaml

from minitron_megatron.automatic import GRAPHS as OPTION
from tests.gpu.test_fp8 import SIZES, distilled, losses
from tests.tiny import data_folder, hf_model, imported

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRAPHS = {
    "trainer.cuda_graphs": True,
    "trainer.validation_samples": 4,
    "trainer.validation_interval": 3,
    "data.sequence_length": 512,
}
TENSOR = {"parallel.tensor": 2, "parallel.sequence": True}
OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 100000}
# NVLink's multicast is for whole hosts: a program that shares one leaves it alone.
BUFFERS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "UB_SKIPMC": "1"}
DEVICES = torch.cuda.device_count()


def measured(metrics):
    """Losses of steps and of validations, in order."""
    return [line[name] for line in metrics for name in ("loss", "validation_loss") if name in line]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(teacher folder, student folder, data folder), for sequences that fused attention can be captured with."""
    folder, sizes = tmp_path_factory.mktemp("graphs"), {**SIZES, "max_position_embeddings": 512, "spread": 0.03}
    teacher = imported(hf_model(**sizes), folder / "teacher")
    student = imported(hf_model(1, **{**sizes, "intermediate_size": 256}), folder / "student")
    return teacher, student, data_folder(folder, teacher)


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


def test_auto_is_on_where_graphs_can_be_and_is_kept_when_a_run_continues(folders, tmp_path):
    """The run by default is the run with graphs, bit for bit; one that began without goes on without."""
    options = {**GRAPHS, "trainer.cuda_graphs": "auto"}
    found = measured(distilled(folders, tmp_path / "auto", **options))
    assert found == measured(distilled(folders, tmp_path / "true", **GRAPHS))
    manifest = yaml.safe_load((tmp_path / "auto" / "model" / "manifest.yaml").read_text())
    assert manifest["config"]["trainer"]["cuda_graphs"] is True and "is on" in manifest["automatic"][OPTION]
    run = tmp_path / "began_without"
    wanted = measured(distilled(folders, run, **{**options, "trainer.cuda_graphs": False}))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    assert measured(distilled(folders, run, **options)) == wanted
    manifest = yaml.safe_load((run / "model" / "manifest.yaml").read_text())
    assert manifest["config"]["trainer"]["cuda_graphs"] is False and "began without" in manifest["automatic"][OPTION]


@pytest.mark.parametrize("scaling", ["delayed", "tensorwise", "blockwise"])
def test_fp8_in_graphs_is_fp8_without_and_resumes(folders, tmp_path, scaling):
    """Kernels are chosen anew for a graph, and FP8 makes more of their rounding: to 1 %, gradient norms too."""
    options = {"trainer.fp8": scaling, "distill.teacher_fp8": "tensorwise", "distill.teacher_head_fp8": True}
    options |= {"data.sequence_length": 512}
    wanted = distilled(folders, tmp_path / "without", **options)
    run = tmp_path / "run"
    options |= {"trainer.cuda_graphs": True}
    found = distilled(folders, run, **options)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=1e-2)
    whole = losses(found)
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
    wanted = losses(distilled(folders, tmp_path / "without", gpus=2, env=BUFFERS, **options))
    found = losses(
        distilled(folders, tmp_path / "run", gpus=2, env=BUFFERS, **options, **{"trainer.tp_comm_overlap": True})
    )
    assert found == pytest.approx(wanted, rel=5e-3)
