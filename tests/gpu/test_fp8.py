"""FP8 and bf16 moments on a GPU that has them, against bf16: what is exact, what is close, what is refused."""

import json
import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor

from minitron_megatron.checkpoints import weights
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.fp8 import Fp8Matrix, fp8_fields
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.gpu.command import command
from tests.test_models import relative
from tests.tiny import data_folder, hf_model, imported

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Multiples of 128 for blockwise scaling.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(1))
# Numbers of e4m3 have four bits.
FP8 = 0.15


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(teacher folder, student folder, data folder)."""
    folder = tmp_path_factory.mktemp("fp8")
    teacher = imported(hf_model(spread=0.03, **SIZES), folder / "teacher")
    student = imported(hf_model(1, spread=0.03, **{**SIZES, "intermediate_size": 256}), folder / "student")
    return teacher, student, data_folder(folder, teacher)


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    """Folder of a model whose matrices, and parts of these, are of many sizes, in files of many chunks, as large models are."""
    model = hf_model(spread=0.03, **SIZES)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                half = len(parameter) // 2
                for part in (parameter[:half], parameter[half:]):
                    part.mul_(0.2 + 2 * torch.rand((), generator=draw))
    monkeypatch.setattr(weights, "BLOCK_BYTES", 2**14)
    return imported(model, tmp_path / "uneven")


@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise"])
def test_weights_in_fp8_are_rounded_as_whole_matrices(uneven, scaling):
    """Every one is its own to what e4m3 rounds off; by a scale for each piece that is read, most would be off by half."""
    folder = open_model_folder(uneven)
    with parallel_job(Layout(), seed=1, device="cuda"), torch.no_grad():
        (exact,), (rounded,) = (
            build_model_chunks(folder.shape, Layout(), torch.bfloat16, "te", fp8_fields(kind, frozen=True))
            for kind in ("none", scaling)
        )
        for chunk in (exact, rounded):
            load_model([chunk], folder)
        wanted = dict(exact.named_parameters())
        for name, found in rounded.named_parameters():
            assert relative(found.dequantize().float() if is_float8tensor(found) else found, wanted[name]) <= 1 / 16, (
                name
            )


@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise"])
def test_a_teacher_in_fp8_is_close_and_holds_no_other_weights(uneven, scaling):
    path = str(uneven)
    with parallel_job(Layout(), seed=1, device="cuda"):
        wanted = jobs.logits(path, TOKENS, {}, "te", torch.bfloat16).float().cpu()
        folder = open_model_folder(path)
        with torch.no_grad():
            (chunk,) = build_model_chunks(
                folder.shape, Layout(), torch.bfloat16, "te", fp8_fields(scaling, frozen=True)
            )
            load_model([chunk], folder)
            chunk.eval()
            place = torch.arange(64, device="cuda").expand(2, 64)
            found = chunk(TOKENS.cuda(), place, None).float().cpu()[..., :300]
        matrices = [p for p in chunk.decoder.layers.parameters() if p.ndim == 2]
        kept = [
            name
            for p in matrices
            for name, t in vars(p).items()
            if isinstance(t, torch.Tensor) and t.dtype is torch.bfloat16
        ]
    assert matrices and not kept
    assert all(type(p) is not torch.nn.Parameter for p in matrices)
    assert 0 < relative(found, wanted) <= FP8


def test_an_fp8_matrix_is_what_it_is_on_the_cpu():
    weight, rows = torch.randn(256, 128).bfloat16(), torch.randn(48, 128).bfloat16()
    wanted = Fp8Matrix.of(weight).product(rows)
    found = Fp8Matrix.of(weight.cuda()).product(rows.cuda()).cpu()
    assert relative(found.float(), wanted.float()) <= 2e-2
    assert relative(wanted.float(), rows.float() @ weight.float().t()) <= 0.05


def distilled(folders, output, steps=8, *, gpus=1, env=None, **options):
    """Metrics by step of `launch/distill.py` in bf16, begun or continued in `output`."""
    teacher, student, data = folders
    given = {
        "teacher": teacher,
        "student": student,
        "data.path": data,
        "data.sequence_length": 64,
        "trainer.steps": steps,
        "trainer.global_batch_size": 4,
        "trainer.micro_batch_size": 2,
        "trainer.save_interval": 4,
        "trainer.validation_samples": 0,
        "optim.lr": 1e-3,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "data.max_epochs": 100,
        "logger.wandb": "disabled",
        "precision": "bf16",
        "output": output,
        **options,
    }
    command("distill", *(f"{name}={value}" for name, value in given.items()), gpus=gpus, env=env)
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(metrics):
    return [line["loss"] for line in metrics]


@pytest.fixture(scope="module")
def in_bf16(folders, tmp_path_factory):
    return losses(distilled(folders, tmp_path_factory.mktemp("bf16") / "run"))


@pytest.mark.parametrize("scaling", ["delayed", "tensorwise", "blockwise"])
def test_a_student_learns_in_fp8_and_resumes_to_the_same_losses(folders, in_bf16, tmp_path, scaling):
    run, options = tmp_path / "run", {"trainer.fp8": scaling}
    if scaling == "tensorwise":
        options |= {"distill.teacher_fp8": "tensorwise", "distill.teacher_head_fp8": True, "trainer.fp8_bf16_layers": 1}
    whole = losses(distilled(folders, run, **options))
    assert whole[-1] < whole[0] and whole != in_bf16
    assert whole == pytest.approx(in_bf16, rel=0.1)
    # What a run killed after its first checkpoint leaves behind.
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    assert losses(distilled(folders, run, **options)) == whole


def test_moments_in_bf16_are_close_and_resume_to_the_same_losses(folders, in_bf16, tmp_path):
    run, kind = tmp_path / "run", "bf16"
    whole = losses(distilled(folders, run, **{"optim.state_precision": kind}))
    assert whole != in_bf16 and whole == pytest.approx(in_bf16, rel=2e-2)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    assert losses(distilled(folders, run, **{"optim.state_precision": kind})) == whole


needs_smollm2 = pytest.mark.skipif(
    "MINITRON_SMOLLM2" not in os.environ, reason="MINITRON_SMOLLM2= a folder with teacher/, student/ and data/"
)
REAL = {
    "data.sequence_length": 512,
    "data.max_epochs": 100,
    "trainer.steps": 300,
    "trainer.global_batch_size": 16,
    "trainer.micro_batch_size": 16,
    "trainer.save_interval": 1000,
    "trainer.validation_samples": 0,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 40,
    "logger.wandb": "disabled",
    "precision": "bf16",
}


def real_runs(name, output, kinds, **options):
    """{kind: (mean loss of the last 100 of 300 steps, median gradient norm)} of a command with each kind's options, at once."""

    def one(kind):
        given = {**REAL, **options, **kinds[kind], "output": output / kind}
        command(name, *(f"{option}={value}" for option, value in given.items()))
        lines = [json.loads(line) for line in (output / kind / "metrics.jsonl").read_text().splitlines()]
        return statistics.mean(line["loss"] for line in lines[-100:]), statistics.median(
            line["grad_norm"] for line in lines
        )

    with ThreadPoolExecutor(len(kinds)) as pool:
        found = dict(zip(kinds, pool.map(one, kinds), strict=True))
    for kind, (loss, norm) in found.items():
        print(f"{name}, {kind}: loss {loss:.5f}, gradient norm {norm:.4f}")
    return found


def judged_in_bf16(model, folder):
    """(next tokens' loss, KL) of a student beside its teacher, whatever it was trained in."""
    output = model.parent / "judged"
    models = {"model": model, "teacher": folder / "teacher", "data.path": folder / "data"}
    how = {"data.sequence_length": 512, "samples": 200, "precision": "bf16", "output": output}
    command("evaluate", *(f"{option}={value}" for option, value in {**models, **how}.items()))
    found = json.loads((output / "results.json").read_text())
    print(f"{model.parent.name}, judged in bf16: next token {found['loss']:.4f}, KL {found['kl']:.4f}")
    return found["loss"], found["kl"]


@needs_smollm2
def test_three_hundred_steps_of_distillation_are_those_of_bf16(tmp_path):
    """SmolLM2-135M and a student cut out of it: mean KL of the last 100 steps within 3 %, with ends in bf16 within 2 %.

    The aim is 0.5 % (docs/benchmarks.md): of a KL of 0.55 nats, beside 3 of the labels' NLL, that is 0.003 nats. Judged as they
    are exported, in bf16 against the teacher in bf16, students predict next tokens within 0.6 % of it, their KL is within 3.5 %.
    """
    folder = Path(os.environ["MINITRON_SMOLLM2"])
    ends = {"trainer.fp8_bf16_layers": 3}
    kinds = {kind: {"trainer.fp8": kind} for kind in ("none", "delayed", "tensorwise", "blockwise")}
    kinds |= {f"{kind}_ends": {**kinds[kind], **ends} for kind in ("tensorwise", "blockwise")}
    teacher_fp8 = {"distill.teacher_fp8": "tensorwise"}
    kinds |= {"teacher": teacher_fp8, "teacher_and_head": {**teacher_fp8, "distill.teacher_head_fp8": True}}
    models = {"teacher": folder / "teacher", "student": folder / "student", "data.path": folder / "data"}
    found = real_runs("distill", tmp_path, kinds, **models, **{"optim.lr": 3e-4})
    judged = {kind: judged_in_bf16(tmp_path / kind / "model", folder) for kind in found}
    for kind, (nll, kl) in judged.items():
        assert nll == pytest.approx(judged["none"][0], rel=6e-3), kind
        assert kl == pytest.approx(judged["none"][1], rel=3.5e-2), kind
    loss, norm = found.pop("none")
    for kind, (mine, of_mine) in found.items():
        with_ends = kind.endswith("_ends")
        assert mine == pytest.approx(loss, rel=2e-2 if with_ends else 3e-2), kind
        assert of_mine == pytest.approx(norm, rel=5e-2 if with_ends else 8e-2), kind


@needs_smollm2
def test_three_hundred_steps_of_training_are_those_of_bf16(tmp_path):
    """SmolLM2-135M learns next tokens: mean loss of the last 100 steps within 0.6 %, median gradient norm within 5 %."""
    folder = Path(os.environ["MINITRON_SMOLLM2"])
    kinds = {kind: {"trainer.fp8": kind} for kind in ("none", "delayed", "tensorwise")}
    options = {"model": folder / "teacher", "data.path": folder / "data", "optim.lr": 1e-4}
    found = real_runs("correct_teacher", tmp_path, kinds, **options)
    loss, norm = found.pop("none")
    for kind, (mine, of_mine) in found.items():
        assert mine == pytest.approx(loss, rel=6e-3), kind
        assert of_mine == pytest.approx(norm, rel=5e-2), kind
