"""The distillation loss against float64, and the same loss, gradients and steps in every layout."""

import numpy as np
import pytest
import torch

from tests import jobs, reference
from tests.test_models import LAYOUTS, names
from tests.tiny import hf_model, imported

VOCABULARY = 300  # of 1024 rows: with four ranks, two hold nothing but padding


def kl_on_ranks(student, teacher, temperature, weights):
    """This rank's columns of the logits through the vocabulary-parallel loss: (loss, its columns' gradient)."""
    from megatron.core import parallel_state as ps

    from minitron_megatron.distill.losses import vocab_parallel_kl

    group = ps.get_tensor_model_parallel_group()
    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    mine = student.chunk(size, -1)[rank].clone().requires_grad_()
    loss = vocab_parallel_kl(
        mine, teacher.chunk(size, -1)[rank], vocab_size=VOCABULARY, temperature=temperature, group=group
    )
    (loss * weights).sum().backward()
    return loss.detach(), mine.grad


def nll_on_ranks(logits, labels):
    from megatron.core import parallel_state as ps

    from minitron_megatron.models.vocab_parallel import vocab_parallel_nll

    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    mine = logits.chunk(size, -1)[rank].clone()
    return vocab_parallel_nll(mine, labels, vocab_size=VOCABULARY, group=ps.get_tensor_model_parallel_group())


def random_logits(seed, rows=(5, 3)):
    return torch.randn(*rows, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_kl_equals_torch_in_float64(gloo, ranks, temperature):
    """Forward and backward; padded columns have values, and must not matter or get a gradient."""
    student, teacher = random_logits(0), random_logits(1)
    weights = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = student.clone().requires_grad_()
    wanted = reference.kl(plain, teacher, VOCABULARY, temperature)
    (wanted * weights).sum().backward()
    found = gloo(ranks, kl_on_ranks, student, teacher, temperature, weights, layout={"tensor": ranks})
    for loss, _ in found:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.cat([part for _, part in found], -1)
    torch.testing.assert_close(gradient, plain.grad, rtol=1e-10, atol=1e-14)
    assert (gradient[..., VOCABULARY:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_in_low_precision_is_as_exact_as_its_inputs(gloo, dtype):
    student, teacher = random_logits(0).to(dtype), random_logits(1).to(dtype)
    wanted = reference.kl(student.double(), teacher.double(), VOCABULARY, 1.0)
    loss, gradient = gloo(1, kl_on_ranks, student, teacher, 1.0, torch.ones(5, 3), layout={})[0]
    assert loss.dtype is torch.float32 and gradient.dtype is dtype
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 4])
def test_equal_logits_have_no_loss_and_no_gradient(gloo, ranks):
    logits = random_logits(3).float()
    for loss, gradient in gloo(
        ranks, kl_on_ranks, logits, logits.clone(), 1.0, torch.ones(5, 3), layout={"tensor": ranks}
    ):
        assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_nll_equals_torch_in_float64(gloo, ranks):
    logits = random_logits(4)
    labels = torch.randint(0, VOCABULARY, (5, 3), generator=torch.Generator().manual_seed(5))
    log_q = torch.log_softmax(logits[..., :VOCABULARY], -1)
    wanted = -log_q.gather(-1, labels[..., None])[..., 0]
    for found in gloo(ranks, nll_on_ranks, logits, labels, layout={"tensor": ranks}):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """(teacher folder, smaller student folder, tokens of a step, loss and gradients by transformers' modules)."""
    folder = tmp_path_factory.mktemp("pair")
    tied = {"tie_word_embeddings": request.param}
    teacher = hf_model(0, **tied)
    student = hf_model(1, hidden_size=24, intermediate_size=24, **tied)
    tokens = torch.randint(0, VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(7))
    paths = str(imported(teacher, folder / "teacher")), str(imported(student, folder / "student"))
    with torch.no_grad():
        wanted = teacher.double()(tokens[:, :-1]).logits
    loss = reference.kl(student.double()(tokens[:, :-1]).logits, wanted, VOCABULARY, 1.0).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return *paths, tokens, loss.item(), gradients


def merged(shape, parts):
    """Global gradients out of every rank's shards, by Hugging Face name; replicas must agree."""
    from minitron_megatron.models.axes import slots

    whole = {}
    for held in parts:
        for name, (indices, values) in held.items():
            whole.setdefault(name, []).append((indices, values))
    found = {}
    for slot in slots(shape):
        name = slot.row.name if slot.layer is None else f"{slot.row.name}.{slot.layer}"
        out = torch.full(slot.row.shape(shape), torch.nan)
        for indices, values in whole[name]:
            where = np.ix_(*(np.arange(n) if i is None else i for i, n in zip(indices, out.shape, strict=True)))
            before = out[where]
            assert torch.isnan(before).all() or torch.allclose(before, values, rtol=1e-4, atol=1e-7), name
            out[where] = values
        for part, hf in slot.hf_names().items():
            positions = slot.row.dims[0].indices(shape.lengths(), {}, part)
            found[hf] = out[positions][: shape.vocab_size] if "vocab" in slot.row.axes else out[positions]
    return found


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_loss_and_gradients_are_the_same_in_every_layout(gloo, pair, ranks, layout):
    """Against transformers in float64: loss to 1e-5 and gradients to 1e-4 of their largest, in float32."""
    from minitron_megatron.checkpoints.folder import open_model_folder

    teacher, student, tokens, loss, gradients = pair
    parts = gloo(ranks, jobs.loss_and_gradients, teacher, student, tokens, layout, 2, layout=layout)
    assert all(found == pytest.approx(loss, rel=1e-5) for found, _ in parts)
    found = merged(open_model_folder(student).shape, [placed for _, placed in parts])
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert float((found[name] - wanted).abs().max() / wanted.abs().max()) <= 1e-4, name


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_split_into_micro_batches_does_not_matter(gloo, pair, micro_batch_size):
    teacher, student, tokens, loss, _ = pair
    ((found, _),) = gloo(1, jobs.loss_and_gradients, teacher, student, tokens, {}, micro_batch_size, layout={})
    assert found == pytest.approx(loss, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(gloo, pair):
    teacher, _, tokens, _, _ = pair
    for layout in ({}, {"tensor": 2}):
        for loss, gradients in gloo(
            layout.get("tensor", 1), jobs.loss_and_gradients, teacher, teacher, tokens, layout, 4, layout=layout
        ):
            assert loss == 0
            assert all((values == 0).all() for _, values in gradients.values())


@pytest.mark.parametrize(("ranks", "layout"), [*LAYOUTS[1:], (4, {"pipeline": 2})], ids=names)
def test_optimizer_steps_are_the_same_in_every_layout(gloo, pair, ranks, layout):
    """The distributed optimizer with clipping, over four steps: losses to 1e-4, gradient norms to 1e-3."""
    teacher, student, tokens, _, _ = pair
    samples = tokens.repeat(4, 1).roll(1, dims=1)
    wanted = gloo(1, jobs.training_losses, teacher, student, samples, {}, 2, 4, layout={})[0]
    for found in gloo(ranks, jobs.training_losses, teacher, student, samples, layout, 2, 4, layout=layout):
        for (loss, norm), (loss_wanted, norm_wanted) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(loss_wanted, rel=1e-4)
            assert norm == pytest.approx(norm_wanted, rel=1e-3)
    assert wanted[-1][0] < wanted[0][0]
