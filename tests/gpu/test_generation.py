"""Generation with a key-value cache on a GPU: local layers give the tokens of transformers, fused ones those of whole passes."""

import pytest
import torch

from minitron_megatron.models.generation import Sampling, generate
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.gpu.test_engine import BF16, SIZES
from tests.tiny import LLAMA3, hf_model, imported

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NEW, LENGTHS = 24, (5, 33, 3, 33, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(transformers' model, its folder, prompts of several lengths)."""
    made = hf_model(**SIZES, rope_parameters=LLAMA3, max_position_embeddings=64)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in LENGTHS]
    return made, imported(made, tmp_path_factory.mktemp("model")), prompts


@pytest.fixture(scope="module", autouse=True)
def job():
    """One for all tests."""
    with parallel_job(Layout(), seed=1, device="cuda"):
        yield


def answers(path, prompts, *how):
    """Greedy ones, three prompts at a time."""
    folder, chunks = jobs.build(str(path), {}, *how)
    return generate(chunks, Layout(), folder.shape, prompts, Sampling(NEW), batch_size=3)


def test_local_layers_answer_as_transformers(model):
    made, path, prompts = model
    greedy = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    wanted = [made.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in prompts]
    assert answers(path, prompts, "local") == wanted


def test_fused_layers_answer_as_whole_passes(model):
    """In bf16 near ties may fall either way: each token is as probable as the best to the precision of logits."""
    pytest.importorskip("transformer_engine", exc_type=ImportError)
    _, path, prompts = model
    for prompt, answer in zip(prompts, answers(path, prompts, "te", torch.bfloat16), strict=True):
        tokens = torch.tensor([[*prompt, *answer]])
        logits = jobs.logits(str(path), tokens, {}, "te", torch.bfloat16)[0].float().cpu()[len(prompt) - 1 : -1]
        picked = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert len(answer) == NEW and (logits.max(-1).values - picked).max() <= BF16 * logits.abs().max()
