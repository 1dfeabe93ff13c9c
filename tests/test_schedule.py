"""Learning rates against closed forms, weight decay's groups, and the loss spike guard."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_megatron.config import DdpConfig, GuardConfig, OptimConfig
from minitron_megatron.errors import UserError
from minitron_megatron.train.guard import SpikeGuard
from minitron_megatron.train.schedule import Schedule, reached
from tests import jobs
from tests.tiny import hf_model, imported


def rates(steps, **optim):
    schedule = Schedule.of_run(OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **optim}), steps, 100)
    return [schedule.learning_rate(step) for step in range(steps)]


def test_schedules_follow_their_closed_forms():
    cosine = rates(21)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and cosine[-1] == pytest.approx(0.1)
    # All of the way: half-way, all shapes are alike.
    way = np.arange(17) / 16
    assert cosine[4:] == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi * way)) / 2)
    assert rates(21, schedule="linear")[4:] == pytest.approx(1 - 0.9 * way)
    assert rates(21, schedule="constant", warmup_steps=0) == [1.0] * 21
    wsd = rates(20, schedule="wsd", decay_steps=5)
    assert wsd[3:15] == [1.0] * 12
    assert wsd[15:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(k / 5)) for k in range(1, 6)])
    straight = rates(20, schedule="wsd", decay_steps=5, decay_shape="linear")
    assert straight[15:] == pytest.approx([0.1 + 0.9 * (1 - k / 5) for k in range(1, 6)])


def test_tokens_and_shares_become_steps():
    """A step has 100 tokens here; what does not divide is rounded up."""
    assert rates(20, warmup_tokens=350.0) == rates(20)
    wanted = rates(20, schedule="wsd", decay_steps=4)
    assert rates(20, schedule="wsd", decay_tokens=400.0) == wanted
    assert rates(20, schedule="wsd", decay_share=0.2) == wanted


def test_ends_of_schedules():
    """Where nothing is left to decay over, the rate stays at its peak; the last step of a decay has the minimum."""
    for kind in ("cosine", "linear"):
        assert rates(5, schedule=kind) == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates(6, schedule=kind)[4:] == pytest.approx([1.0, 0.1])
        assert rates(3, schedule=kind) == [0.25, 0.5, 0.75]
        assert rates(2, schedule=kind, warmup_steps=0) == pytest.approx([1.0, 0.1])
    assert rates(6, schedule="wsd", decay_steps=0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(6, schedule="wsd", decay_steps=1) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.1])
    assert rates(6, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_what_is_not_known_of_a_manifest_is_not_said():
    given = {f"optim.{name}": value for name, value in vars(OptimConfig(lr=1.0, min_lr=0.5, warmup_steps=2)).items()}
    assert reached(given, 1, 10) == {"optim.lr": 0.5, "optim.min_lr": 0.5, "optim.warmup_steps": 1}
    assert reached(given, 4, 10) == {"optim.lr": 1.0, "optim.min_lr": 0.5, "optim.warmup_steps": 2}
    of_tokens = given | {"optim.warmup_steps": 0, "optim.warmup_tokens": 25.0, "other": 1}
    assert reached(of_tokens, 4, 10)["optim.warmup_steps"] == 3
    for name in ("lr", "min_lr", "schedule"):
        assert reached({key: value for key, value in given.items() if key != f"optim.{name}"}, 4, 10) == {}
    assert reached(given, 0, 10) == {} == reached(given | {"optim.min_lr": 2.0}, 4, 10)
    wsd = given | {"optim.schedule": "wsd", "optim.decay_steps": 2}
    assert reached(wsd, 4, 10) == {"optim.lr": 1.0, "optim.min_lr": 0.5, "optim.warmup_steps": 2}
    assert reached(wsd, 3, 10) == {}


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="warm-up of 4 and decay of 17 steps are more than the run's 20"):
        rates(20, schedule="wsd", decay_steps=17)
    with pytest.raises(UserError, match=r"optim\.decay_steps= and optim\.decay_tokens= are both given"):
        rates(20, decay_steps=1, decay_tokens=1.0)
    with pytest.raises(UserError, match=r"min_lr=2\.0 is above optim\.lr=1\.0"):
        rates(20, min_lr=2.0)


def decayed(path, decay_embeddings):
    """{name: weight decay} of every parameter of the model."""
    from minitron_megatron.train.optimizer import set_learning_rate, wrap_and_optimize

    _, chunks = jobs.build(path, {})
    names = {id(p): name for name, p in chunks[0].named_parameters()}
    optim = OptimConfig(weight_decay=0.1, decay_embeddings=decay_embeddings)
    _, optimizer = wrap_and_optimize(chunks, optim, DdpConfig())
    set_learning_rate(optimizer, 1e-3, optim.weight_decay)
    (inner,) = optimizer.chained_optimizers
    groups = zip(inner.optimizer.param_groups, inner.model_fp32_groups, strict=True)
    return {names[id(p)]: group["weight_decay"] for group, parameters in groups for p in parameters}


@pytest.mark.parametrize("tied", [False, True])
def test_norms_biases_and_if_wished_embeddings_have_no_weight_decay(gloo, tmp_path, tied):
    """By their dimensions and places, of a model that has biases."""
    path = str(imported(hf_model(0, family="qwen2", tie_word_embeddings=tied), tmp_path))
    for decay_embeddings in (True, False):
        ((found),) = gloo(1, decayed, path, decay_embeddings, layout={})
        assert len(found) == 4 * 7 + 2 + (not tied)
        for name, decay in found.items():
            vocabulary = name.startswith(("embedding.", "output_layer."))
            vector = name.endswith(".bias") or "norm" in name
            assert decay == (0.0 if vector or (vocabulary and not decay_embeddings) else 0.1), name


class TestGuard:
    def test_it_starts_with_a_full_window_and_forgets_spikes(self):
        guard = SpikeGuard(GuardConfig(window=4, loss_factor=2.0, grad_norm_factor=0.0))
        assert all(guard.takes(step, loss, 1.0) for step, loss in enumerate((1.0, 9.0, 1.0, 2.0)))
        assert guard.takes(4, 3.0, 1e9)  # the median of 1, 9, 1 and 2 is 1.5
        assert not guard.takes(5, 5.1, 1.0)  # that of 9, 1, 2, 3 is 2.5
        assert not guard.takes(6, math.nan, 1.0) and not guard.takes(7, 1.0, math.inf)
        assert guard.takes(8, 5.0, 1.0)
        assert (guard.skipped, guard.in_a_row, guard.losses) == (3, 0, [1.0, 2.0, 3.0, 5.0])

    def test_too_many_in_a_row_end_the_run(self):
        guard = SpikeGuard(GuardConfig(stop_after=2))
        assert not guard.takes(6, math.nan, 1.0)
        with pytest.raises(UserError, match=r"^step 8: the loss is nan, the 2th step in a row that cannot be taken$"):
            guard.takes(7, math.nan, 1.0)

    def test_without_it_only_what_is_not_finite_ends_the_run(self):
        guard = SpikeGuard(GuardConfig(enabled=False, window=1))
        assert guard.takes(0, 1.0, 1.0) and guard.takes(1, 1e9, 1e9)
        with pytest.raises(UserError, match=r"step 3: the gradient norm is inf$"):
            guard.takes(2, 1.0, math.inf)

    def test_it_goes_on_from_its_state(self):
        guards = [SpikeGuard(GuardConfig(window=2, loss_factor=2.0)) for _ in range(2)]
        for step, loss in enumerate((1.0, 1.5, 9.0)):
            guards[0].takes(step, loss, 1.0)
        guards[1].load_state_dict(guards[0].state_dict())
        assert [guard.takes(3, 2.6, 1.0) for guard in guards] == [False, False]
        assert guards[0].state_dict() == guards[1].state_dict()


def with_a_spike(teacher, student, tokens, layout, at):
    """Steps of which one has losses a thousand times as large: (losses, which were taken, what its step changed)."""
    _, trained = jobs.trainer(teacher, student, layout, 2, optimizer=True)
    trained.guard = SpikeGuard(GuardConfig(window=2))
    plain, spiking = trained.objective, [False]

    class Spiking(type(plain)):
        def __call__(self, *given, **options):
            factor = 1000.0 if spiking[0] else 1.0
            found = super().__call__(*given, **options)
            return found._replace(terms={name: term * factor for name, term in found.terms.items()})

    trained.objective.__class__ = Spiking
    schedule, results, changed = Schedule.of_run(trained.cfg.optim, 5, 256), [], []
    for step in range(5):
        spiking[0] = step == at
        before = state_of(trained)
        results.append(trained.train_step(step, schedule, jobs.Tokens(tokens)))
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, state_of(trained), strict=True)))
    return [r.loss for r in results], [r.taken for r in results], changed


def state_of(trained):
    """Copies of every parameter, and of every tensor of the optimizer once there is some."""
    parameters = [p.detach().clone() for chunk in trained.chunks for p in chunk.parameters()]
    states = trained.optimizer.chained_optimizers[0].optimizer.state.values()
    return parameters + [v.clone() for state in states for v in state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pipeline": 2})], ids=["one", "pipeline"])
def test_a_spike_changes_nothing_on_any_rank(gloo, tmp_path, ranks, layout):
    small = {"hidden_size": 24, "intermediate_size": 24}
    teacher = str(imported(hf_model(0), tmp_path / "teacher"))
    student = str(imported(hf_model(1, **small), tmp_path / "student"))
    tokens = torch.randint(0, 300, (40, 33), generator=torch.Generator().manual_seed(3))
    for losses, taken, changed in gloo(ranks, with_a_spike, teacher, student, tokens, layout, 3, layout=layout):
        assert taken == [True, True, True, False, True]
        assert losses[3] > 100 * losses[2] and losses[4] < 2 * losses[2]
        # The first step makes the optimizer's state, so there the two cannot be compared.
        assert changed[1:] == [True, True, False, True]


@settings(max_examples=80, deadline=None)
@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    kind=st.sampled_from(("cosine", "linear", "constant")),
    in_tokens=st.booleans(),
)
def test_what_is_said_to_be_reached_is_what_the_steps_have(steps, warmup, kind, in_tokens):
    given_as = {"warmup_tokens": warmup * 10.0} if in_tokens else {"warmup_steps": warmup}
    optim = OptimConfig(lr=1e-2, min_lr=1e-4, schedule=kind, **given_as)
    schedule = Schedule.of_run(optim, steps, 10)
    of_steps = [schedule.learning_rate(step) for step in range(steps)]
    found = reached({f"optim.{name}": value for name, value in vars(optim).items()}, steps, 10)
    assert found["optim.lr"] == max(of_steps) and found["optim.min_lr"] == of_steps[-1]
    assert found["optim.warmup_steps"] == min(warmup, steps)
