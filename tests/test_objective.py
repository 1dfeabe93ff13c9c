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


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("cross_entropy", [0.0, 0.5])
@pytest.mark.parametrize("intermediate", [None, SimpleNamespace()])
def test_terms_of_a_step_are_those_that_there_are(cached, cross_entropy, intermediate):
    """The loss; its parts where there are several; the teacher's loss until it is known; what informs where it is measured."""
    teacher = object.__new__(CachedTeacher) if cached else SimpleNamespace(ahead=3)
    objective = Distillation(
        teacher, DistillOptions(loss="topk_kl", top_k=3, cross_entropy=cross_entropy), VOCABULARY, intermediate
    )
    parts = ["divergence"] * bool(cross_entropy or intermediate) + ["cross_entropy"] * bool(cross_entropy)
    informs = ["agreement"] if cached else ["teacher_entropy", "agreement"]
    assert objective.names(False) == ("loss", *parts, "teacher_loss")
    objective.teacher_loss = 2.0
    assert objective.names(False) == ("loss", *parts) and objective.names(True) == ("loss", *parts, *informs)
    assert objective.at_once == (None if cached else 3)


class States:
    """Stands for the losses on intermediate states, and notes what it is asked for."""

    def __init__(self):
        self.weight, self.alpha, self.did, self.watching = 0.5, None, [], None

    def attach(self, chunks):
        self.did.append(("attach", chunks))

    def deliver(self, batches):
        self.did.append(("deliver", batches))

    def take_sum(self):
        return 7.0

    def add_gradients_of_copies(self):
        self.did.append("add")

    def next_alpha(self, logits, intermediate):
        self.did.append((logits, intermediate))
        self.alpha, used = logits / intermediate, self.alpha or 0.0
        return used


def test_the_loss_of_a_step_has_the_weighted_loss_on_states_with_the_alpha_that_it_had():
    states = States()
    objective = Distillation(SimpleNamespace(), DistillOptions(), VOCABULARY, states)
    objective.attach("chunks")
    assert objective.needs_first_pass and objective.sums_of_stages() == [7.0]
    first = objective.finish({"loss": 3.0, "divergence": 2.0, "teacher_loss": 1.5}, [4.0])
    assert first == {"loss": 3.0, "divergence": 2.0, "intermediate": 4.0, "alpha": 0.0}
    assert not objective.needs_first_pass and objective.results() == {"teacher_loss": 1.5}
    second = objective.finish({"loss": 3.0, "divergence": 2.0}, [8.0])
    assert second == {"loss": 3.0 + 0.5 * 0.5 * 8.0, "divergence": 2.0, "intermediate": 8.0, "alpha": 0.5}
    assert states.did == [("attach", "chunks"), "add", (2.0, 4.0), "add", (2.0, 8.0)]
    assert objective.state_dict() == {"teacher_loss": 1.5, "alpha": 0.25}
    other = Distillation(SimpleNamespace(), DistillOptions(), VOCABULARY, States())
    other.load_state_dict(objective.state_dict())
    assert (other.teacher_loss, other.intermediate.alpha) == (1.5, 0.25)
    plain = Distillation(SimpleNamespace(), DistillOptions(), VOCABULARY)
    assert plain.state_dict() == {} == plain.results() and not plain.needs_first_pass and plain.sums_of_stages() == []
    plain.load_state_dict({"teacher_loss": 4.0})
    assert plain.state_dict() == {"teacher_loss": 4.0} and plain.finish({"loss": 1.0}, []) == {"loss": 1.0}


@pytest.mark.parametrize(("loss", "said"), [(2.0, False), (5.41, False), (5.42, True)])
@pytest.mark.parametrize(("cached", "name"), [(True, "the cached teacher"), (False, "the teacher")])
def test_a_teacher_that_guesses_is_named_in_the_first_step(caplog, loss, said, cached, name):
    """From 95 % of log 300 on, which is 5.704."""
    teacher = object.__new__(CachedTeacher) if cached else SimpleNamespace()
    objective = Distillation(teacher, DistillOptions(loss="topk_kl", top_k=3), VOCABULARY)
    for _ in range(2):
        objective.finish({"loss": 1.0, "teacher_loss": loss}, [])
        objective.finish({"loss": 1.0}, [])
        assert len(caplog.records) == said and (not said or caplog.messages[0].startswith(f"{name} predicts "))
        caplog.clear()
        objective.teacher_loss = None


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_states_of_a_teacher_are_there_before_the_students(pipelined, training):
    """With a pipeline those of a round; without one those of each micro-batch, which the teacher then runs first."""
    did, states = [], States()
    teacher = SimpleNamespace(
        pipelined=pipelined, run_ahead=lambda batches: did.append(("ahead", batches, states.watching)),
        run=lambda batch: did.append(("run", batch)),
    )  # fmt: skip
    states.did = did
    objective = Distillation(teacher, DistillOptions(), VOCABULARY, states)
    objective.prepare([1, 2], training=training)
    assert did == [("ahead", [1, 2], training), *([("deliver", [1, 2])] if pipelined and training else [])]
    did.clear()
    objective.begin(3)
    assert did == ([] if pipelined else [("run", 3), ("deliver", [3])])
    plain = Distillation(teacher, DistillOptions(), VOCABULARY)
    did.clear()
    plain.begin(3)
    plain.prepare([4])
    assert did == [("ahead", [4], training)]


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_a_student_without_a_rest_has_a_finite_loss(alone, rest):
    """All of its probability, to float32, is on the teacher's K."""
    teacher, student = random_logits(1).float() / 10, torch.full((5, 3, 1024), -200.0)
    of = {"vocab_size": VOCABULARY, "group": alone}
    kept = top_k(teacher, 4, **of)
    student.scatter_(-1, kept.ids, 200.0)
    loss = DistillationLoss(kept, Divergence("topk_kl", top_k=4, rest=rest), **of)
    logits = student.flatten(0, 1)
    terms = loss(logits, slice(0, 15), torch.ones(15))
    assert terms["loss"].isfinite().all() and logits.isfinite().all()
    assert (terms["loss"] > 50).all() == (rest == "bucket")
