"""The distillation loss's own kernels on CUDA against float64, over odd shapes, dtypes and temperatures."""

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.distill.losses import Divergence, divergence
from minitron_megatron.parallel.layout import Layout, parallel_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def job():
    with parallel_job(Layout(), seed=1, device="cuda"):
        yield


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 64, 64), (37, 320, 300), (5, 49280, 49152), (300, 128256, 128256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_kl_equals_float64(dtype, rows, width, vocabulary, temperature):
    """Loss to 1e-5; a gradient to 1e-5 of its row's largest in float32, and to bfloat16's own rounding of every entry."""
    draw = torch.Generator(device="cuda").manual_seed(rows)
    student, teacher = (torch.randn(rows, 1, width, device="cuda", generator=draw).mul(3).to(dtype) for _ in range(2))
    student.requires_grad_()
    weight = torch.rand(rows, 1, device="cuda", generator=draw)
    how = Divergence(temperature=temperature)
    loss = divergence(student, teacher, how, vocab_size=vocabulary, group=dist.group.WORLD)
    (loss * weight).sum().backward()
    log_q, log_p = ((z[..., :vocabulary].detach().double() / temperature).log_softmax(-1) for z in (student, teacher))
    wanted = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    gradient = temperature * (log_q.exp() - log_p.exp()) * weight[..., None]
    found = student.grad.double()
    assert (found[..., vocabulary:] == 0).all()
    bound = 1e-5 if dtype is torch.float32 else 2**-7
    error = (found[..., :vocabulary] - gradient).abs()
    assert (error <= bound * gradient.abs() + 1e-6 * gradient.abs().amax(-1, keepdim=True)).all()
    assert found[..., :vocabulary].sum(-1).abs().max() <= (1e-4 if dtype is torch.float32 else 1e-1)


def test_equal_logits_have_no_loss_and_no_gradient():
    student = torch.randn(3, 2, 1000, device="cuda", dtype=torch.bfloat16).requires_grad_()
    loss = divergence(student, student.detach().clone(), Divergence(), vocab_size=999, group=dist.group.WORLD)
    loss.sum().backward()
    assert (loss == 0).all() and (student.grad == 0).all()
