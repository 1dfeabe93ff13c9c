"""The distillation loss against float64, and the same loss, gradients and steps in every layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.config import DistillOptions, check
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.errors import UserError
from tests import jobs, reference
from tests.test_models import LAYOUTS, names
from tests.tiny import hf_model, imported

VOCABULARY = 300  # of 1024 rows: with four ranks, two hold nothing but padding


def columns_of_this_rank(logits):
    from megatron.core import parallel_state as ps

    return logits.chunk(ps.get_tensor_model_parallel_world_size(), -1)[ps.get_tensor_model_parallel_rank()]


def divergences_on_ranks(student, teacher, kinds, weights, logits_bytes=2**14):
    """(loss, this rank's columns' gradient) of each kind."""
    from megatron.core import parallel_state as ps

    from tests.through_head import distance

    over = {"vocab_size": VOCABULARY, "group": ps.get_tensor_model_parallel_group(), "logits_bytes": logits_bytes}
    found = [distance(student, teacher, how, weights, **over) for how in kinds]
    return [(terms["loss"], gradient) for terms, gradient in found]


def mixed_on_ranks(student, teacher, kinds, labels, cross_entropy, weights):
    """(terms, this rank's columns' gradient) of each kind: the labels' cross entropy in the loss, and all that is measured."""
    from megatron.core import parallel_state as ps

    from tests.through_head import distance

    more = {"labels": labels, "cross_entropy": cross_entropy, "measure": True}
    more |= {"vocab_size": VOCABULARY, "group": ps.get_tensor_model_parallel_group()}
    return [distance(student, teacher, how, weights, **more) for how in kinds]


def cross_entropy_on_ranks(student, labels, weights):
    from megatron.core import parallel_state as ps

    from tests.through_head import label_loss

    group = ps.get_tensor_model_parallel_group()
    terms, gradient = label_loss(student, labels, weights, vocab_size=VOCABULARY, group=group)
    return terms["loss"], gradient


def top_k_on_ranks(teacher, k):
    from megatron.core import parallel_state as ps

    from minitron_megatron.distill.losses import top_k

    group = ps.get_tensor_model_parallel_group()
    return tuple(top_k(columns_of_this_rank(teacher), k, vocab_size=VOCABULARY, group=group))


def nll_on_ranks(logits, labels):
    from megatron.core import parallel_state as ps

    from minitron_megatron.models.vocab_parallel import vocab_parallel_nll

    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    mine = logits.chunk(size, -1)[rank].clone()
    return vocab_parallel_nll(mine, labels, vocab_size=VOCABULARY, group=ps.get_tensor_model_parallel_group())


def random_logits(seed, rows=(5, 3)):
    return torch.randn(*rows, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


KINDS = [
    Divergence(),
    Divergence("reverse_kl"),
    Divergence("jsd", beta=0.3),
    Divergence("topk_kl", top_k=7),
    Divergence("topk_kl", top_k=7, rest="renormalize"),
]


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_distance_equals_torch_in_float64(gloo, ranks):
    """Forward and backward, at two temperatures; padded columns have values, and must not matter or get a gradient."""
    student, teacher = random_logits(0), random_logits(1)
    teacher[..., VOCABULARY:] += 20
    weights = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    temperatures = (1.0, 2.5)
    kinds = [replace(how, temperature=t) for t in temperatures for how in KINDS]
    # The top K of everything is everything.
    asked = [*kinds, *(Divergence("topk_kl", t, top_k=VOCABULARY) for t in temperatures)]
    wholes = [Divergence(temperature=t) for t in temperatures]
    parts = gloo(ranks, divergences_on_ranks, student, teacher, asked, weights, layout={"tensor": ranks})
    for how, *found in zip([*kinds, *wholes], *parts, strict=True):
        plain = student.clone().requires_grad_()
        wanted = reference.divergence(plain, teacher, VOCABULARY, how)
        (wanted * weights).sum().backward()
        check_loss_and_gradient(found, wanted, plain.grad)


@pytest.mark.parametrize("ranks", [1, 4])
def test_labels_mix_in_and_terms_inform(gloo, ranks):
    """The labels' cross entropy at temperature 1, whatever the distance's; entropy and agreement are of the plain softmaxes."""
    student, teacher = random_logits(0), random_logits(1)
    # A third of the tokens agree.
    student[:2] = teacher[:2] + 0.01 * student[:2]
    weights = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, VOCABULARY, (5, 3), generator=torch.Generator().manual_seed(5))
    kinds = [*KINDS, Divergence(temperature=2.0)]
    parts = gloo(ranks, mixed_on_ranks, student, teacher, kinds, labels, 0.25, weights, layout={"tensor": ranks})
    for how, *found in zip(kinds, *parts, strict=True):
        plain = student.clone().requires_grad_()
        wanted = reference.distillation_terms(plain, teacher, VOCABULARY, how, labels, 0.25)
        (wanted["loss"] * weights).sum().backward()
        for terms, _ in found:
            assert terms.keys() == wanted.keys()
            for name, values in terms.items():
                torch.testing.assert_close(values, wanted[name].detach(), rtol=1e-9, atol=1e-12)
        assert 0 < wanted["agreement"].mean() < 1
        torch.testing.assert_close(torch.cat([part for _, part in found], -1), plain.grad, rtol=1e-9, atol=1e-14)


def divergences_in_pieces(student, teacher, kinds, weights, sizes):
    return [divergences_on_ranks(student, teacher, kinds, weights, size) for size in sizes]


def test_pieces_do_not_matter(gloo):
    """From a row at a time to all at once."""
    given = random_logits(0), random_logits(1), KINDS, torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
    wanted, *others = gloo(1, divergences_in_pieces, *given, [2**14, 1, 2**13, 2**16, 2**20], layout={})[0]
    for found in others:
        for (loss, gradient), (loss_wanted, gradient_wanted) in zip(found, wanted, strict=True):
            torch.testing.assert_close(loss, loss_wanted, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(gradient, gradient_wanted, rtol=1e-10, atol=1e-14)


def check_loss_and_gradient(found, loss, gradient):
    """Of every rank, in float64."""
    for mine, _ in found:
        torch.testing.assert_close(mine, loss.detach(), rtol=1e-11, atol=1e-12)
    whole = torch.cat([part for _, part in found], -1)
    torch.testing.assert_close(whole, gradient, rtol=1e-9, atol=1e-14)
    assert (whole[..., VOCABULARY:] == 0).all()


@pytest.mark.parametrize("ranks", [1, 4])
def test_cross_entropy_equals_torch_in_float64(gloo, ranks):
    student, weights = random_logits(0), torch.rand(5, 3, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (5, 3), generator=torch.Generator().manual_seed(5))
    plain = student.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(plain[..., :VOCABULARY].transpose(1, 2), labels, reduction="none")
    (wanted * weights).sum().backward()
    found = gloo(ranks, cross_entropy_on_ranks, student, labels, weights, layout={"tensor": ranks})
    check_loss_and_gradient(found, wanted, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.bf16)])
def test_low_precision_is_as_exact_as_its_inputs(gloo, dtype):
    student, teacher = random_logits(0).to(dtype), random_logits(1).to(dtype)
    found = gloo(1, divergences_on_ranks, student, teacher, KINDS, torch.ones(5, 3), layout={})[0]
    for how, (loss, gradient) in zip(KINDS, found, strict=True):
        plain = student.double().requires_grad_()
        wanted = reference.divergence(plain, teacher.double(), VOCABULARY, how)
        wanted.sum().backward()
        assert loss.dtype is torch.float32 and gradient.dtype is dtype
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), plain.grad, rtol=4 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("ranks", [1, 4])
def test_equal_logits_have_no_loss_and_no_gradient(gloo, ranks):
    logits, kinds = random_logits(3).float(), KINDS[:-1]
    for parts in gloo(
        ranks, divergences_on_ranks, logits, logits.clone(), kinds, torch.ones(5, 3), layout={"tensor": ranks}
    ):
        assert all((loss == 0).all() and (gradient == 0).all() for loss, gradient in parts)


def test_jsd_is_forward_and_reverse_kl_at_its_ends(gloo):
    kinds = [Divergence(), Divergence("reverse_kl"), *(Divergence("jsd", beta=beta) for beta in (1e-9, 1 - 1e-9))]
    # Smaller logits: the ends are reached where β p / q is small for every token.
    student, teacher = random_logits(0) / 3, random_logits(1) / 3
    found = gloo(1, divergences_on_ranks, student, teacher, kinds, torch.ones(5, 3), layout={})[0]
    for wanted, nearly in zip(found[:2], found[2:], strict=True):
        for exact, small in zip(wanted, nearly, strict=True):
            torch.testing.assert_close(small / 1e-9, exact, rtol=1e-4, atol=1e-5)


def test_what_lies_outside_k_is_all_that_top_k_misses(gloo):
    """KL(p ‖ q) − the loss with a bucket = p_R KL(p|R ‖ q|R), and so never below 0."""
    student, teacher, ones = random_logits(0), random_logits(1), torch.ones(5, 3)
    kinds = Divergence(), Divergence("topk_kl", top_k=20)
    (whole, _), (found, _) = gloo(1, divergences_on_ranks, student, teacher, kinds, ones, layout={})[0]
    log_q, log_p = (torch.log_softmax(logits[..., :VOCABULARY], -1) for logits in (student, teacher))
    outside = torch.sort(log_p, descending=True).indices[..., 20:]
    log_q, log_p = log_q.gather(-1, outside), log_p.gather(-1, outside)
    rest_q, rest_p = log_q.logsumexp(-1, keepdim=True), log_p.logsumexp(-1, keepdim=True)
    missed = (log_p.exp() * (log_p - rest_p - log_q + rest_q)).sum(-1)
    torch.testing.assert_close(whole - found, missed, rtol=1e-9, atol=1e-12)
    assert (missed > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.bf16)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_logits_are_chosen_by_their_number_in_every_layout(gloo, ranks, dtype):
    """Few different values, both zeros among them, so that most of the K and what ends them are tied."""
    logits = random_logits(6).round().to(dtype)
    assert (torch.signbit(logits) & (logits == 0)).any()
    wanted = torch.sort(logits[..., :VOCABULARY], dim=-1, descending=True, stable=True).indices[..., :40]
    log_p = torch.log_softmax(logits[..., :VOCABULARY].double(), -1)
    rest = 1 - log_p.gather(-1, wanted).exp().sum(-1)
    for ids, log_probs, left in gloo(ranks, top_k_on_ranks, logits, 40, layout={"tensor": ranks}):
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(log_probs.double(), log_p.gather(-1, wanted), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(left.double(), rest, rtol=1e-6, atol=1e-6)


def test_settings_of_losses_that_cannot_be_are_refused():
    for options, says in (
        (DistillOptions(loss="kl"), "distill.loss=kl is not one of forward_kl, reverse_kl"),
        (DistillOptions(jsd_beta=1.0), "distill.jsd_beta=1.0 must be above 0 and below 1"),
        (DistillOptions(temperature=0.0), "distill.temperature=0.0 must be above 0"),
        (DistillOptions(top_k=0), "distill.top_k=0 must be above 0"),
        (DistillOptions(top_k_rest="drop"), "distill.top_k_rest=drop is not one of bucket, renormalize"),
        (DistillOptions(cross_entropy=-1.0), "distill.cross_entropy=-1.0 must not be negative"),
    ):
        with pytest.raises(UserError) as error:
            check(options, "distill.")
        assert str(error.value).startswith(says)
    with pytest.raises(UserError, match=r"distill\.top_k=301 is above the vocabulary of 300"):
        Divergence.from_options(DistillOptions(loss="topk_kl", top_k=301), VOCABULARY)


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


UNTIED = pytest.mark.parametrize("pair", [False], ids=["untied"], indirect=True)
ALL_TIED = pytest.mark.parametrize("pair", [True], ids=["tied"], indirect=True)
# Tied, what differs is the gradient of a matrix that stages share.
TIED = [layout for layout in LAYOUTS if "pipeline" in layout[1] and layout[0] == 2] + [LAYOUTS[0], LAYOUTS[5]]


@UNTIED
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_loss_and_gradients_are_the_same_in_every_layout(gloo, pair, ranks, layout):
    """Against transformers in float64: loss to 1e-5 and gradients to 1e-4 of their largest, in float32."""
    check_against_transformers(gloo, pair, ranks, layout)


@ALL_TIED
@pytest.mark.parametrize(("ranks", "layout"), TIED, ids=names)
def test_loss_and_gradients_are_the_same_with_one_matrix_at_both_ends(gloo, pair, ranks, layout):
    check_against_transformers(gloo, pair, ranks, layout)


def check_against_transformers(gloo, pair, ranks, layout):
    from minitron_megatron.checkpoints.folder import open_model_folder

    teacher, student, tokens, loss, gradients = pair
    parts = gloo(ranks, jobs.loss_and_gradients, teacher, student, tokens, layout, 2, layout=layout)
    assert all(found == pytest.approx(loss, rel=1e-5) for found, _ in parts)
    found = merged(open_model_folder(student).shape, [placed for _, placed in parts])
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert float((found[name] - wanted).abs().max() / wanted.abs().max()) <= 1e-4, name


@UNTIED
@pytest.mark.parametrize("micro_batch_size", [1, 8])
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


@pytest.fixture(scope="module")
def training(request, gloo, pair):
    """(losses and gradient norms on one process, teacher, student, samples)."""
    teacher, student, tokens, _, _ = pair
    samples = tokens.repeat(request.param, 1).roll(1, dims=1)
    found = gloo(1, jobs.training_losses, teacher, student, samples, {}, 2, request.param, layout={})
    return found[0], teacher, student, samples


# What spreads the optimizer's work in ways of its own: gradients are those of every layout by the test above.
SPREAD = [
    (2, {"tensor": 2, "sequence": True}),
    (3, {"pipeline": 3}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
]
# Stages that hold copies of one embedding.
SHARED = [(2, {"pipeline": 2, "virtual_pipeline": 2}), (4, {"pipeline": 2})]


@UNTIED
@pytest.mark.parametrize("training", [4, pytest.param(20, marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(("ranks", "layout"), SPREAD + SHARED, ids=names)
def test_optimizer_steps_are_the_same_in_every_layout(gloo, training, ranks, layout):
    """The distributed optimizer with clipping, over four and twenty steps: losses to 1e-4, gradient norms to 1e-3."""
    check_steps(gloo, training, ranks, layout)


@ALL_TIED
@pytest.mark.parametrize("training", [4], indirect=True)
@pytest.mark.parametrize(("ranks", "layout"), SHARED, ids=names)
def test_optimizer_steps_are_the_same_where_stages_share_a_matrix(gloo, training, ranks, layout):
    check_steps(gloo, training, ranks, layout)


def check_steps(gloo, training, ranks, layout):
    wanted, *run = training
    for found in gloo(ranks, jobs.training_losses, *run, layout, 2, len(wanted), layout=layout):
        for (loss, norm), (loss_wanted, norm_wanted) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(loss_wanted, rel=1e-4)
            assert norm == pytest.approx(norm_wanted, rel=1e-3)
    assert wanted[-1][0] < wanted[0][0]


@UNTIED
@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {}), (4, {"tensor": 2, "pipeline": 2})], ids=names)
def test_gradients_are_divided_and_clipped_as_megatron_does(gloo, pair, ranks, layout):
    """In one pass, over four steps: losses and gradient norms to 1e-5; a clip of 0.05 is below every norm, 0 is none."""
    teacher, student, tokens, _, _ = pair
    samples = tokens.repeat(4, 1).roll(1, dims=1)
    # Whether a clip is above, below or none does not depend on the layout.
    clips = [0.05] if ranks < 4 else [0.0, 0.05, 1.0]
    for ours, theirs in gloo(ranks, in_both_ways, teacher, student, samples, layout, clips, layout=layout)[0]:
        for mine, wanted in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(wanted, rel=1e-5)
            assert mine[1] > 0.05


def in_both_ways(teacher, student, samples, layout, clips):
    """Four steps divided and clipped by our optimizer, and by Megatron's own, for each clip."""
    run = teacher, student, samples, layout, 2, 4
    return [
        [jobs.training_losses(*run, {"optim": {"clip_grad": clip}}, kind) for kind in (False, True)] for clip in clips
    ]
