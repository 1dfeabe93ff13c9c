"""Transformer Engine's layers against transformers and against Megatron's local ones: every family, one model folder.

Transformer Engine multiplies float32 matrices as TF32 (ten bits of mantissa, 5e-4 a product), so float32 is compared to 5e-3 of
the largest value. bf16 (eight bits, in every activation too) is compared to 5e-2 of float32's logits.
"""

import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.config import FAMILY_NAMES
from minitron_megatron.importance.hooks import Recorder
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.test_models import relative
from tests.tiny import LLAMA3, data_folder, hf_model, imported

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Fused attention and Hopper's matrix units like multiples of 16.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "spread": 0.03}
TOKENS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
TF32, BF16 = 5e-3, 5e-2


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request, tmp_path_factory):
    """(transformers model, model folder)."""
    rope = {"rope_parameters": LLAMA3} if request.param == "llama" else {}
    model = hf_model(family=request.param, tie_word_embeddings=request.param == "qwen2", **SIZES, **rope)
    return model, imported(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", autouse=True)
def job():
    """One for all tests: ending NCCL's groups takes longer than most of them."""
    with parallel_job(Layout(), seed=1, device="cuda"):
        yield


def on_gpu(job, *arguments):
    torch.manual_seed(1)
    return job(*arguments)


def logits(path, engine, dtype=torch.float32):
    return on_gpu(jobs.logits, str(path), TOKENS, {}, engine, dtype).float().cpu()


def test_logits_equal_transformers(family):
    model, path = family
    with torch.no_grad():
        wanted = model(TOKENS).logits
    assert relative(logits(path, "local"), wanted) <= 1e-5
    assert relative(logits(path, "te"), wanted) <= TF32
    assert relative(logits(path, "te", torch.bfloat16), wanted) <= BF16


def test_weights_are_the_same_in_both_engines(family, tmp_path):
    """Loaded into Transformer Engine's layers, saved by Megatron's own writer, published: the digest of the first import."""
    _, path = family
    words = (str(path), str(tmp_path / "ckpt"), str(tmp_path / "out"), {}, "te")
    assert on_gpu(jobs.save_in_layout, *words) == open_model_folder(path).digest


def test_scores_are_the_same_in_both_engines(family, tmp_path):
    _, path = family
    data = data_folder(tmp_path, path)
    words = (str(path), str(data), {}, 5, 2, ("mean", "l2"), 0)
    wanted, found = (on_gpu(jobs.scores, *words, engine) for engine in ("local", "te"))
    assert wanted.keys() == found.keys()
    for name, score in wanted.items():
        assert relative(found[name], score) <= TF32, name


def logits_around_a_measurement(path):
    """Logits before, while and after a recorder watches."""
    folder, chunks = jobs.build(path, {}, "te")
    batch = {name: tensor.cuda() for name, tensor in jobs.batch_of(TOKENS).items()}
    found = []
    for watches in (False, True, False):
        recorder = Recorder(
            chunks if watches else [],
            head_dim=folder.shape.head_dim,
            sequence="mean",
            heads="per_token",
            sequence_parallel=False,
        )
        recorder.begin(batch)
        with torch.no_grad():
            found.append(chunks[0](batch["tokens"], batch["position_ids"], None).cpu())
        recorder.close()
    return found


def test_measuring_changes_nothing(family):
    before, during, after = on_gpu(logits_around_a_measurement, str(family[1]))
    assert torch.equal(before, during) and torch.equal(before, after)


def test_distillation_is_the_same_in_both_engines(family, tmp_path):
    """Loss and every gradient of a student that learns from the model, in float32."""
    _, path = family
    student = str(imported(hf_model(1, family=open_model_folder(path).shape.family, **SIZES), tmp_path))
    tokens = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(7))
    (loss, gradients), (found, placed) = (
        on_gpu(jobs.loss_and_gradients, str(path), student, tokens, {}, 2, engine) for engine in ("local", "te")
    )
    assert found == pytest.approx(loss, rel=TF32)
    assert placed.keys() == gradients.keys()
    for name, (_, gradient) in gradients.items():
        assert relative(placed[name][1], gradient) <= 4 * TF32, name
