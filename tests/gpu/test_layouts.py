"""Layouts of several GPUs over NCCL: steps of distillation and a cache of a teacher are those of one GPU, in float32.

Every mode of the teacher, every lever and the losses on intermediate states run as users run them, under torchrun. Needs two
GPUs; those layouts that need four are skipped on two.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.importance.scores import load_scores
from minitron_megatron.models.axes import slots
from tests.gpu.command import command
from tests.tiny import data_folder, hf_model, imported

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
STEPS = 10
TRAINING = (
    f"trainer.steps={STEPS}",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=1",
    "trainer.validation_samples=9",
    "trainer.save_interval=5",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "data.sequence_length=32",
    "logger.wandb=disabled",
)
OVERLAP = ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "ddp.bucket_size=20000")
INTERMEDIATE = ("distill.intermediate=0.7", "distill.intermediate_layers=[[-3,-3],[3,1]]", "distill.cross_entropy=0.5")
TENSOR, SEQUENCE = ("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence=true")
PIPELINE, INTERLEAVED = ("parallel.pipeline=2",), ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
MODES = [
    (2, TENSOR),
    (2, SEQUENCE),
    (2, PIPELINE),
    (2, INTERLEAVED),
    (2, ()),
    (2, OVERLAP),
    (2, (*SEQUENCE, "trainer.recompute=selective")),
    (2, (*PIPELINE, "parallel.pipeline_layout='Et|t*3L;Et*4|t*2L'", "trainer.recompute=full")),
    (2, (*PIPELINE, "distill.teacher_ahead=2")),
    (2, (*PIPELINE, "distill.teacher_parallel.tensor=2", "distill.teacher_parallel.pipeline=1")),
    (
        2,
        (
            *TENSOR,
            "distill.teacher_parallel.tensor=1",
            "distill.teacher_parallel.pipeline=2",
            "distill.teacher_ahead=2",
        ),
    ),
    (4, (*SEQUENCE, *OVERLAP)),
    (4, (*SEQUENCE, *PIPELINE)),
    (4, (*INTERLEAVED, *OVERLAP, "distill.teacher_parallel.tensor=4", "distill.teacher_parallel.pipeline=1")),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with a teacher of 6 layers, a smaller student of 4, and data."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
    teacher = imported(hf_model(0, num_hidden_layers=6, **sizes), folder / "teacher")
    imported(hf_model(1, **{**sizes, "hidden_size": 128}), folder / "student")
    data_folder(folder, teacher)
    return folder


def run(name, gpus, *words):
    """A command on some GPUs."""
    command(name, *words, gpus=gpus)


def models(sources):
    return f"teacher={sources / 'teacher' / 'model'}", f"student={sources / 'student' / 'model'}"


def distilled(sources, output, gpus, *words):
    """What a run on some GPUs wrote down, by step."""
    run("distill", gpus, *models(sources), f"data.path={sources / 'data'}", *TRAINING, *words, f"output={output}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_figures(found, wanted):
    """Losses to 1e-4 and gradient norms to 1e-3 over all steps, as between layouts on CPUs."""
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert other.keys() & {"loss", "validation_loss"}
        for name in other.keys() & {"loss", "validation_loss", "kl", "intermediate", "cross_entropy"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), (line["step"], name)
        if "grad_norm" in other:
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), line["step"]


@pytest.fixture(scope="module")
def wanted(sources, tmp_path_factory):
    """A run on one GPU."""
    return distilled(sources, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.parametrize(("gpus", "words"), MODES, ids=str)
def test_ten_steps(sources, wanted, tmp_path, gpus, words):
    check_figures(distilled(sources, tmp_path / "run", gpus, *words), wanted)


@pytest.mark.parametrize("words", [SEQUENCE, PIPELINE], ids=str)
def test_intermediate_states(sources, tmp_path, words):
    one = distilled(sources, tmp_path / "one", 1, *INTERMEDIATE)
    check_figures(distilled(sources, tmp_path / "two", 2, *INTERMEDIATE, *words), one)


def test_a_run_goes_on_in_another_layout(sources, wanted, tmp_path):
    """Five steps under tensor parallelism, five under a pipeline."""
    distilled(sources, tmp_path / "run", 2, *TENSOR)
    # What a run that was killed after its first checkpoint leaves behind.
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    check_figures(distilled(sources, tmp_path / "run", 2, *PIPELINE), wanted)


def test_a_checkpoint_written_beside_later_steps(sources, wanted, tmp_path):
    """Forked off beside CUDA; what it holds of the fifth step is what goes on to the same figures, bit for bit."""
    words = ("trainer.async_save=true", "trainer.parallel_load=true", "logger.interval=1")
    found = distilled(sources, tmp_path / "run", 2, *words)
    check_figures(found, wanted)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    again = distilled(sources, tmp_path / "run", 2, *words)
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in found if "loss" in line]


def test_a_cached_teacher(sources, tmp_path):
    """Written on two GPUs and read on two, it gives the losses of the one that runs."""
    topk = ("distill.loss=topk_kl", "distill.top_k=40")
    teacher, student = models(sources)
    run(
        "cache_teacher",
        2,
        teacher,
        f"data.path={sources / 'data'}",
        "data.sequence_length=32",
        f"trainer.steps={STEPS}",
        "trainer.global_batch_size=8",
        "trainer.validation_samples=9",
        "distill.top_k=40",
        f"output={tmp_path / 'cache'}",
    )
    online = distilled(sources, tmp_path / "online", 1, *topk)
    run(
        "distill",
        2,
        student,
        f"data.path={sources / 'data'}",
        *TRAINING,
        *topk,
        f"distill.cache={tmp_path / 'cache'}",
        f"output={tmp_path / 'cached'}",
    )
    found = [json.loads(line) for line in (tmp_path / "cached" / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(found, online, strict=True):
        # A validation loss is over the whole vocabulary where a teacher runs.
        for name in other.keys() & {"loss", "validation_perplexity"}:
            assert line[name] == pytest.approx(other[name], rel=2e-3), (line["step"], name)


def test_scores_and_what_is_cut_by_them(sources, tmp_path):
    """Scores to 1e-5 of the largest; by the same scores, the same weights bit for bit."""
    model = f"model={sources / 'teacher' / 'model'}"
    for i, (gpus, words) in enumerate(((1, ()), (2, SEQUENCE), (2, PIPELINE), (2, ()))):
        output = tmp_path / f"scores{i}"
        data = (f"data.path={sources / 'data'}", "data.sequence_length=32", "samples=7")
        run("importance", gpus, model, *data, *words, f"output={output}")
        found = load_scores(output).tensors
        if gpus == 1:
            wanted = found
        for name, score in wanted.items():
            assert np.abs(found[name] - score).max() / np.abs(score).max() <= 1e-5, (words, name)
    smaller = {}
    for gpus in (1, 2):
        output = tmp_path / f"pruned{gpus}"
        target = ("target.hidden_size=128", "target.ffn_hidden_size=256")
        run("prune", gpus, model, f"scores={tmp_path / 'scores0'}", *target, f"output={output}")
        folder = open_model_folder(output)
        smaller[gpus] = (WeightReader(folder.weights), folder.shape)
    for slot in slots(smaller[1][1]):
        one, two = (reader.read_slot(slot, shape) for reader, shape in smaller.values())
        assert torch.equal(one, two), slot
