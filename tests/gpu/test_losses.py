"""Losses from final hidden states on CUDA, by their kernels, against float64: odd shapes, dtypes, temperatures, pieces."""

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.losses import DistillationLoss
from minitron_megatron.models.head import Head, fused_loss
from minitron_megatron.models.objective import CrossEntropy
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from tests import reference
from tests.through_head import distance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(1, 64, 64), (37, 320, 300), (5, 49280, 49152), (300, 128256, 128256)]


@pytest.fixture(scope="module", autouse=True)
def job():
    with parallel_job(Layout(), seed=1, device="cuda"):
        yield


def drawn(*size, dtype, spread=1.0, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*size, device="cuda", generator=generator).mul(spread).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 64, 64), (37, 320, 300), (5, 4096, 4000)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_logits_equal_float64(dtype, kind, rows, width, vocabulary, temperature):
    """Terms to 1e-5; a gradient to 1e-5, and half of that of its row's largest, in float32; to bfloat16's own rounding.

    Twice that in float32 for reverse KL, whose gradient has the loss itself in it.
    """
    student, teacher = (drawn(rows, 1, width, dtype=dtype, spread=3, seed=seed) for seed in (rows, rows + 1))
    student[0] = teacher[0]
    weights = torch.rand(rows, 1, device="cuda")
    labels = torch.randint(0, vocabulary, (rows, 1), device="cuda")
    how, more = Divergence(kind, temperature), {"labels": labels, "cross_entropy": 0.5, "measure": True}
    found, gradient = distance(student, teacher, how, weights, vocab_size=vocabulary, group=dist.group.WORLD, **more)
    plain = student.double().requires_grad_()
    wanted = reference.distillation_terms(plain, teacher.double(), vocabulary, how, labels, 0.5)
    (wanted["loss"] * weights).sum().backward()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), wanted[name].detach().double(), rtol=1e-5, atol=2e-6)
    single = 1e-5 if kind == "forward_kl" else 2e-5
    bound = single if dtype is torch.float32 else 2**-7
    error = (gradient.double() - plain.grad).abs()
    assert (error <= bound * plain.grad.abs() + single / 2 * plain.grad.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("logits_bytes", [2**22, 2**24, 2**30])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), SHAPES)
@pytest.mark.parametrize("loss", ["forward_kl", "labels"])
def test_gradients_of_states_and_matrix_equal_float64(loss, rows, width, vocabulary, logits_bytes, main_grad):
    """In bfloat16 from states to both gradients: what rounding logits and their gradient to bfloat16 leaves, and no more."""
    states, weight = (
        drawn(rows, 1, 96, dtype=torch.bfloat16, seed=1),
        drawn(width, 96, dtype=torch.bfloat16, spread=0.3, seed=2),
    )
    teacher = Head(
        drawn(rows, 1, 128, dtype=torch.bfloat16, seed=3), drawn(width, 128, dtype=torch.bfloat16, spread=0.2, seed=4)
    )
    mask = (torch.rand(rows, 1, device="cuda") > 0.2).float()
    mask[0] = 1
    labels = torch.randint(0, vocabulary, (rows, 1), device="cuda")
    over = {"vocab_size": vocabulary, "group": dist.group.WORLD}
    block = CrossEntropy(labels, **over) if loss == "labels" else DistillationLoss(teacher, Divergence(), **over)
    head = Head(states.requires_grad_(), weight.requires_grad_())
    if main_grad:
        weight.main_grad = torch.ones(width, 96, device="cuda")
    total, _ = fused_loss(head, block, mask, logits_bytes=logits_bytes)
    total.backward()
    mine = weight.main_grad - 1 if main_grad else weight.grad
    exact = [t.detach().double().requires_grad_() for t in (states, weight)]
    logits = (exact[0] @ exact[1].t())[..., :vocabulary]
    if loss == "labels":
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    else:
        wanted = reference.divergence(logits, (teacher.states @ teacher.weight.t()).double(), vocabulary, Divergence())
    (wanted.flatten() * mask.flatten()).sum().backward()
    for found, exactly in zip((states.grad, mine), exact, strict=True):
        off = (found.double() - exactly.grad).norm() / exactly.grad.norm()
        assert off < 2.5e-2, off
    assert (mine[vocabulary:] == 0).all()
    torch.testing.assert_close(total.double(), (wanted.flatten() * mask.flatten()).sum().detach(), rtol=3e-3, atol=1e-3)


def test_equal_logits_have_no_loss_and_no_gradient():
    states, weight = drawn(50, 2, 64, dtype=torch.bfloat16), drawn(1000, 64, dtype=torch.bfloat16)
    loss = DistillationLoss(Head(states, weight), Divergence(), vocab_size=999, group=dist.group.WORLD)
    head = Head(states.clone().requires_grad_(), weight.clone().requires_grad_())
    total, terms = fused_loss(head, loss, torch.ones(50, 2, device="cuda"))
    total.backward()
    assert (terms["loss"] == 0).all() and (head.states.grad == 0).all() and (head.weight.grad == 0).all()
