"""Losses on intermediate states: against float64, in every layout, and through a run that stops and goes on."""

import itertools
import signal

import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.reading import read_metadata
from minitron_megatron.config import DistillOptions, check
from minitron_megatron.distill.choices import EMBEDDINGS, Pair, chosen_pairs
from minitron_megatron.errors import UserError
from minitron_megatron.train import saved
from minitron_megatron.train.distill_checks import check_pair
from minitron_megatron.train.optimizer import gather_weights
from minitron_megatron.train.schedule import Schedule
from tests import jobs, reference
from tests.test_bounds import refused
from tests.test_distill import VOCABULARY, merged
from tests.test_models import names
from tests.test_train import STEPS, checkpoints, exit_code, options, signalled, sources, untimed  # noqa: F401
from tests.tiny import hf_model, imported

# Of 6 layers and 4: with two stages the first pair goes back a stage, and the second goes on to the next one.
PAIRS = [[-3, -3], [3, 1]]
ASKED = {"intermediate": 0.7, "intermediate_layers": PAIRS, "cross_entropy": 0.5}
LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
]


class Masked(jobs.Tokens):
    """Samples whose tokens do not all count."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "loss_mask": (sample["tokens"] % 5 > 0).float()}


def states_and_gradients(teacher, student, tokens, layout, micro_batch_size, asked, how):
    """(terms of a step, gradients by name with their indices, the projection's weights and gradients on this rank)."""
    folder, trained = jobs.trainer(teacher, student, layout, micro_batch_size, distill=asked, **how)
    for chunk in trained.chunks:
        chunk.train()
    batches = [dict(batch) for batch in trained.micro_batches(Masked(tokens), range(len(tokens)))]
    for _ in range(2):
        # The first pass is for α.
        for chunk in trained.chunks:
            chunk.zero_grad_buffer()
        terms, counted, _ = trained.forward_backward(batches)
    modules = [chunk.module for chunk in trained.chunks]
    placed = jobs._placed(folder.shape, modules, lambda parameter: parameter.main_grad.float() / counted)
    weights = [projection.weight for projection in trained.objective.intermediate.projections]
    return terms, placed, [(w.detach(), w.main_grad / counted) for w in weights]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(teacher folder, narrower and shallower student's, tokens of a step, both models of transformers)."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = hf_model(0, num_hidden_layers=6)
    student = hf_model(1, hidden_size=24, intermediate_size=24)
    tokens = torch.randint(0, VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(7))
    paths = str(imported(teacher, folder / "teacher")), str(imported(student, folder / "student"))
    return *paths, tokens, teacher.double(), student.double()


def wanted_terms(teacher, student, tokens, weight):
    """(terms, gradients of student and of the weight) of the first step, by autograd in float64."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    mask = (inputs % 5 > 0).double()
    with torch.no_grad():
        targets, theirs = reference.states(teacher, inputs)
    logits, ours = reference.states(student, inputs)
    weight = weight.double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    pairs = [(-1, -1), (1, 3), (3, 1)]
    distance = sum(reference.state_distance(ours[s], theirs[t], weight) for s, t in pairs)
    per_token = {"divergence": reference.kl(logits, targets, VOCABULARY, 1.0), "cross_entropy": nll}
    means = {name: (x * mask).sum() / mask.sum() for name, x in {**per_token, "intermediate": distance}.items()}
    alpha = (means["divergence"] / means["intermediate"]).detach()
    loss = means["divergence"] + 0.5 * means["cross_entropy"] + 0.7 * alpha * means["intermediate"]
    student.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return {**means, "alpha": alpha, "loss": loss}, gradients, weight.grad


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_losses_and_gradients_are_those_of_float64(gloo, pair, ranks, layout):
    """Terms to 1e-5, gradients of student and projection to 1e-4 of their largest; every copy of the projection has all of it."""
    teacher, student, tokens, *models = pair
    parts = gloo(ranks, states_and_gradients, teacher, student, tokens, layout, 2, ASKED, {}, layout=layout)
    copies = [copy for _, _, held in parts for copy in held]
    terms, gradients, of_weight = wanted_terms(*models, tokens, copies[0][0])
    for found, _, _ in parts:
        assert found == {name: pytest.approx(value.item(), rel=1e-5) for name, value in terms.items()}
    for weight, gradient in copies:
        assert torch.equal(weight, copies[0][0])
        assert float((gradient - of_weight).abs().max() / of_weight.abs().max()) <= 1e-4
    found = merged(open_model_folder(student).shape, [placed for _, placed, _ in parts])
    for name, wanted in gradients.items():
        assert float((found[name] - wanted).abs().max() / wanted.abs().max()) <= 1e-4, name


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pipeline": 2})], ids=names)
def test_layers_that_are_recomputed_have_the_same_gradients(gloo, pair, ranks, layout):
    teacher, student, tokens, *_ = pair
    full = {"recompute": "full"}
    plain, again = (
        gloo(ranks, states_and_gradients, teacher, student, tokens, layout, 2, ASKED, how, layout=layout)
        for how in ({}, full)
    )
    for (terms, placed, copies), (terms_again, placed_again, copies_again) in zip(plain, again, strict=True):
        assert terms == terms_again
        for name, (_, values) in placed.items():
            torch.testing.assert_close(placed_again[name][1], values, rtol=1e-5, atol=1e-7)
        for (_, gradient), (_, gradient_again) in zip(copies, copies_again, strict=True):
            torch.testing.assert_close(gradient_again, gradient, rtol=1e-5, atol=1e-7)


def training_terms(teacher, student, tokens, layout, micro_batch_size, steps, how):
    """(terms and gradient norm of each of some optimizer steps, this rank's copies of the projection after them)."""
    _, trained = jobs.trainer(teacher, student, layout, micro_batch_size, optimizer=True, distill=ASKED, **how)
    schedule = Schedule.of_run(trained.cfg.optim, steps, 8 * 32)
    results = [trained.train_step(step, schedule, Masked(tokens)) for step in range(steps)]
    gather_weights(trained.chunks)
    weights = [projection.weight.detach() for projection in trained.objective.intermediate.projections]
    return [{**r.terms, "norm": r.grad_norm} for r in results], weights


@pytest.fixture(scope="module")
def steps_of_one(gloo, pair):
    """(terms of four steps of one process, its projection after them)."""
    teacher, student, tokens, *_ = pair
    samples = tokens.repeat(4, 1).roll(1, dims=1)
    ((wanted, (weight,)),) = gloo(1, training_terms, teacher, student, samples, {}, 4, 4, {}, layout={})
    return wanted, weight


OVERLAPPED = {
    "recompute": "full",
    "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000},
}


@pytest.mark.parametrize(
    ("ranks", "layout", "how"),
    [
        *((*layout, {}) for layout in LAYOUTS[1:4]),
        *(pytest.param(*layout, {}, marks=pytest.mark.slow) for layout in LAYOUTS[4:]),
        pytest.param(2, {}, OVERLAPPED, marks=pytest.mark.slow),
        (4, {"pipeline": 2}, OVERLAPPED),
    ],
    ids=names,
)
def test_optimizer_steps_are_the_same_in_every_layout(gloo, pair, steps_of_one, ranks, layout, how):
    """With the distributed optimizer and clipping, over four steps; copies of the projection stay one."""
    teacher, student, tokens, *_ = pair
    samples, (wanted, weight) = tokens.repeat(4, 1).roll(1, dims=1), steps_of_one
    for found, weights in gloo(ranks, training_terms, teacher, student, samples, layout, 2, 4, how, layout=layout):
        for there, here in zip(found, wanted, strict=True):
            assert there == {name: pytest.approx(value, rel=1e-3) for name, value in here.items()}
            assert there["loss"] == pytest.approx(here["loss"], rel=1e-4)
        for copy in weights:
            torch.testing.assert_close(copy, weight, rtol=1e-3, atol=1e-4)
    assert wanted[-1]["intermediate"] < wanted[0]["intermediate"]
    # Each step's α is of the means of the step before.
    for before, after in itertools.pairwise(wanted):
        assert after["alpha"] == pytest.approx(before["divergence"] / before["intermediate"], rel=1e-9)


def test_equal_states_have_no_loss(gloo, pair):
    teacher, _, tokens, *_ = pair
    asked = {"intermediate": 1.0, "intermediate_layers": [[-3, -3], [0, 0]]}
    for layout in ({}, {"pipeline": 2}):
        ranks = layout.get("pipeline", 1)
        for terms, placed, copies in gloo(
            ranks, states_and_gradients, teacher, teacher, tokens, layout, 4, asked, {}, layout=layout
        ):
            assert terms["loss"] == 0 and terms["alpha"] == 0 and abs(terms["intermediate"]) < 1e-6
            assert all((values == 0).all() for _, values in placed.values())
            assert all(torch.equal(weight, torch.eye(32)) for weight, _ in copies)


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), pytest.param(4, {"pipeline": 2}, marks=pytest.mark.slow)], ids=names
)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(gloo, sources, tmp_path, ranks, layout):  # noqa: F811
    """Every figure, α among them, and every bit of the student, which is published without the projection."""
    whole, stopped = (options(sources, tmp_path / name, layout) for name in ("whole", "stopped"))
    for cfg in (whole, stopped):
        cfg.distill = DistillOptions(intermediate=1.0, intermediate_layers=[[-3, -2]])
    gloo(ranks, exit_code, whole)
    assert gloo(ranks, signalled, stopped, signal.SIGTERM, 2) == [75] * ranks
    gloo(ranks, exit_code, stopped)
    found = untimed(tmp_path / "stopped")
    assert found == untimed(tmp_path / "whole")
    # The first step has its own ratio, and so has the second the first one's.
    assert len({line["alpha"] for line in found if "loss" in line}) == STEPS - 1
    assert len({open_model_folder(tmp_path / name / "model").digest for name in ("whole", "stopped")}) == 1
    saved = tmp_path / "stopped" / "checkpoints" / checkpoints(tmp_path / "stopped")[-1]
    in_run, published = (
        read_metadata(path).state_dict_metadata for path in (saved, tmp_path / "stopped" / "model" / "weights")
    )
    assert in_run["intermediate_projection.weight"].size == (32, 24)
    assert not any("projection" in key for key in published)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(gloo, sources, tmp_path):  # noqa: F811
    """The projection, its optimizer state and α move from one process to copies on two stages and back."""
    moved, whole = (options(sources, tmp_path / name) for name in ("moved", "whole"))
    there = options(sources, tmp_path / "moved", {"pipeline": 2})
    for cfg in (moved, whole, there):
        cfg.distill = DistillOptions(intermediate=1.0, intermediate_layers=[[-1, -1]])
    gloo(1, exit_code, whole)
    gloo(1, signalled, moved, signal.SIGUSR1, 1)
    gloo(4, signalled, there, signal.SIGUSR1, 3)
    gloo(1, exit_code, moved)
    assert [path.name for _, path in saved.find_checkpoints(tmp_path / "moved" / "checkpoints")][-1:] == [
        "step_00000006"
    ]
    for found, wanted in zip(untimed(tmp_path / "moved"), untimed(tmp_path / "whole"), strict=True):
        assert found.keys() == wanted.keys()
        for key in found.keys() & {"loss", "intermediate", "alpha", "grad_norm", "validation_loss"}:
            assert found[key] == pytest.approx(wanted[key], rel=1e-3)


def test_pairs_are_counted_from_either_end():
    asked = DistillOptions(intermediate=1.0, intermediate_layers=[[-3, 3], [0, -6]])
    wanted = (Pair(EMBEDDINGS, EMBEDDINGS), Pair(1, 3), Pair(0, 0))
    assert chosen_pairs(asked, 4, 6) == wanted
    asked.intermediate_embeddings = False
    assert chosen_pairs(asked, 4, 6) == wanted[1:]
    asked.intermediate = 0.0
    assert chosen_pairs(asked, 4, 6) == ()


def test_what_cannot_be_compared_is_refused(sources, tmp_path):  # noqa: F811
    for given, says in (
        ({"intermediate_layers": [[-5, 0]]}, r"intermediate_layers has layer -5 of the student: use -4 to 3"),
        ({"intermediate_layers": [[0, 6]]}, r"intermediate_layers has layer 6 of the teacher: use -6 to 5"),
        ({"intermediate_layers": [-3, -3]}, r"intermediate_layers=\[-3, -3\] must be pairs of layer numbers"),
        ({"intermediate_layers": [[1, 2.5]]}, r"must be pairs of layer numbers"),
        (
            {"intermediate_layers": [], "intermediate_embeddings": False},
            r"distill\.intermediate=1 has nothing to compare",
        ),
    ):
        with pytest.raises(UserError, match=says):
            chosen_pairs(DistillOptions(intermediate=1.0, **given), 4, 6)
    with pytest.raises(UserError, match=r"distill\.intermediate=-1.0 must not be negative"):
        check(DistillOptions(intermediate=-1.0), "distill.")
    cfg = options(sources, tmp_path / "run")
    cfg.distill = DistillOptions(loss="topk_kl", top_k=8, cache="somewhere", intermediate=1.0)
    student = open_model_folder(cfg.student.path).shape
    with pytest.raises(
        UserError, match=r"distill\.intermediate compares states of the teacher, which distill\.cache does not"
    ):
        check_pair(None, student, cfg, None)


def test_layers_that_are_compared_are_of_the_models():
    for pair, taken in (
        ([-4, 5], True), ([3, -6], True), ([4, 0], False), ([-5, 0], False), ([0, 6], False), ([0, -7], False)
    ):  # fmt: skip
        options = DistillOptions(intermediate=1.0, intermediate_layers=[pair])
        assert refused(chosen_pairs, options, 4, 6) != taken
