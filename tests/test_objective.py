"""What is compared between runs is the same whatever they train with, and what informs is of the plain distributions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.config import DistillOptions
from minitron_megatron.distill.cache import CachedTeacher
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.losses import DistillationLoss, top_k
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.head import Head
from tests import reference
from tests.test_distill import VOCABULARY, random_logits
from tests.through_head import identity_of_this_rank

OPTIONS = [
    DistillOptions(),
    DistillOptions(temperature=3.0),
    DistillOptions(loss="reverse_kl", temperature=0.5),
    DistillOptions(loss="jsd", jsd_beta=0.2),
    DistillOptions(loss="topk_kl", top_k=5),
    DistillOptions(loss="topk_kl", top_k=5, top_k_rest="renormalize", temperature=2.0),
    DistillOptions(cross_entropy=3.0),
]
LABELS = torch.randint(0, VOCABULARY, (5, 3), generator=torch.Generator().manual_seed(5))


def batch():
    """Of 3 samples of 5 tokens, two of which do not count."""
    mask = torch.ones(3, 5)
    mask[1, 2] = mask[2, 4] = 0
    return {"labels": LABELS.t().contiguous(), "loss_mask": mask}


class Beside:
    """A teacher beside the student, with these logits."""

    ahead, pipelined = None, False

    def __init__(self, logits, group):
        self.head, self.asked = Head(logits, identity_of_this_rank(logits, group)), []

    def targets(self, batch, split):
        self.asked.append(split)
        return self.head


def of_options(student, teacher, options):
    """(validation's terms, training's total and terms, the splits that the teacher was asked for) with each of the options."""
    from minitron_megatron.parallel import collectives

    group, found = collectives.tensor_parallel_group(), []
    matrix = identity_of_this_rank(student, group)
    layer = SimpleNamespace(_forward_pre_hooks={}, sequence_parallel=False, weight=matrix)
    for one in options:
        objective = Distillation(Beside(teacher, group), one, VOCABULARY)
        validated = objective.validation(student, layer, None, batch())
        total, terms = objective(student, layer, None, batch(), measure=True)
        assert set(terms) >= set(objective.names(True)) and set(objective.names(False)) <= set(objective.names(True))
        found.append((validated, total.detach(), terms, objective.teacher.asked))
    return found


@pytest.fixture(scope="module")
def found(gloo):
    """Logits of student and teacher, and what each of OPTIONS makes of them."""
    student, teacher = random_logits(0), random_logits(1)
    student[:2] = teacher[:2] + 0.01 * student[:2]
    return student, teacher, gloo(1, of_options, student, teacher, OPTIONS, layout={})[0]


def test_validation_is_forward_kl_at_temperature_1_whatever_is_trained_with(found):
    student, teacher, of_each = found
    wanted = reference.kl(student, teacher, VOCABULARY, 1.0)
    nll = torch.nn.functional.cross_entropy(student[..., :VOCABULARY].transpose(1, 2), LABELS, reduction="none")
    for validated, _, _, asked in of_each:
        assert set(validated) == {"loss", "nll"} and asked == ["validation", "train"]
        torch.testing.assert_close(validated["loss"], wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(validated["nll"], nll, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_training_minimises_what_the_options_say(found, number):
    """The weighted cross entropy is part of the loss; only tokens that count are summed; the rest informs."""
    student, teacher, of_each = found
    options, (_, total, terms, _) = OPTIONS[number], of_each[number]
    how = Divergence.from_options(options, VOCABULARY)
    wanted = reference.distillation_terms(student, teacher, VOCABULARY, how, LABELS, options.cross_entropy)
    loss = wanted["divergence"] + options.cross_entropy * wanted["cross_entropy"]
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total, (loss * batch()["loss_mask"].t()).sum(), rtol=1e-9, atol=1e-12)
    for name in ("divergence", "agreement", "teacher_entropy", *(["cross_entropy"] if options.cross_entropy else [])):
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-9, atol=1e-12)
    assert 0 < terms["agreement"].mean() < 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agreement_with_a_cache_is_that_of_the_most_probable_tokens(alone, temperature):
    """Whichever of the K the student says, and none of them: the best of the teacher's counts alone."""
    teacher = random_logits(1)
    student = random_logits(0)
    best = torch.sort(teacher[..., :VOCABULARY], dim=-1, descending=True, stable=True).indices
    for rank, (row, column) in {0: (0, 0), 1: (1, 1), 3: (2, 2), 200: (3, 0)}.items():
        student[row, column, best[row, column, rank]] = 15.0
    of = {"vocab_size": VOCABULARY, "group": alone}
    kept = top_k(teacher, 4, temperature=temperature, **of)
    how = Divergence("topk_kl", temperature, top_k=4)
    loss = DistillationLoss(kept, how, measure=True, labels=LABELS, **of)
    terms = loss(student.flatten(0, 1), slice(0, 15), None)
    agreed = (student[..., :VOCABULARY].argmax(-1) == best[..., 0]).float().flatten()
    assert agreed[0] == 1 and agreed[4] == 0 and torch.equal(terms["agreement"], agreed)
    assert "teacher_entropy" not in terms
    wanted = reference.divergence(student, teacher, VOCABULARY, replace(how, rest="bucket"))
    torch.testing.assert_close(terms["divergence"], wanted.flatten(), rtol=1e-6, atol=1e-6)


def test_logits_of_both_models_share_their_room():
    """Beside the student's stand those of a teacher that runs; a cache has none."""
    options = DistillOptions(logits_mib=10)
    cached = object.__new__(CachedTeacher)
    assert Distillation(SimpleNamespace(), options, VOCABULARY).logits_bytes == 5 * 2**20
    of_cache = Distillation(cached, replace(options, loss="topk_kl", top_k=3), VOCABULARY)
    assert of_cache.logits_bytes == 10 * 2**20 and of_cache.validated == of_cache.how
    assert "teacher_entropy" not in of_cache.names(True) and "agreement" in of_cache.names(True)


def test_a_teacher_is_frozen_and_forgets_the_round_before():
    """With a pipeline it keeps the states of one round; without one nothing runs ahead."""
    layer = torch.nn.Linear(2, 2)
    for pipelined, kept in ((True, [3]), (False, [])):
        teacher = Teacher([layer.train().requires_grad_(True)], pipelined=pipelined, ahead=5)
        assert not layer.training and not any(parameter.requires_grad for parameter in layer.parameters())
        teacher._forward = list
        for batches in ([1, 2], [3]):
            teacher.run_ahead(batches)
        assert list(teacher.states) == kept and teacher.ahead == (5 if pipelined else None)
