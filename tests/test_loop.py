"""A training's loop and what is around it: optimizers, buffers, signals, one step, and what is said of a run."""

import math
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.automatic import Built
from minitron_megatron.config import (
    ClusterConfig,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.first_moments import STATUS_OF_SIGNAL
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checkpoint, loop, optimizer, overlap, run, saved
from minitron_megatron.train.rounds import Rounds
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_run_checks import LENGTH, config

# Optimizers


@pytest.mark.parametrize(
    ("fused", "device", "says"),
    [
        (False, "cpu", None),
        (True, "cuda", None),
        (True, "cpu", "training on CPUs needs"),
        (False, "cuda", "training on GPUs needs"),
    ],
)
def test_an_adam_goes_with_its_device(monkeypatch, fused, device, says):
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused)
    if says is None:
        optimizer.check_optimizer(torch.device(device))
        return
    with pytest.raises(UserError, match=says):
        optimizer.check_optimizer(torch.device(device))


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "taken"),
    [
        ("fp32", torch.float32, "cpu", True),
        ("bf16", torch.bfloat16, "cuda", True),
        ("bf16", torch.float32, "cuda", False),
        ("bf16", torch.bfloat16, "cpu", False),
    ],
)
def test_half_of_the_moments_is_for_bfloat16_on_gpus(precision, dtype, device, taken):
    options = OptimConfig(state_precision=precision)
    assert refused(optimizer.check_state_precision, options, dtype, torch.device(device)) != taken


def test_groups_get_the_steps_rate_and_their_share_of_decay():
    held = SimpleNamespace(param_groups=[{"wd_mult": 0.0}, {"wd_mult": 0.5}, {}])
    optimizer.set_learning_rate(held, 1e-3, 0.2)
    assert [(group["lr"], group["weight_decay"]) for group in held.param_groups] == [
        (1e-3, 0.0),
        (1e-3, 0.1),
        (1e-3, 0.2),
    ]
    optimizer.set_adam(held, OptimConfig(adam_beta1=0.1, adam_beta2=0.2, adam_eps=0.3))
    assert all((group["betas"], group["eps"]) == ((0.1, 0.2), 0.3) for group in held.param_groups)


def test_linears_that_can_add_their_gradients_do():
    chunk = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    chunk[1].fuse_wgrad_accumulation = False
    optimizer._fuse_gradient_sums(chunk)
    assert chunk[1].fuse_wgrad_accumulation and not hasattr(chunk[0], "fuse_wgrad_accumulation")


# Transfers beside products


class Mode:
    """Transformer Engine's names of what its buffers hold."""

    FP8, NONE = "fp8", "none"


@pytest.mark.parametrize(
    ("fp8", "bf16_layers", "modes"),
    [("none", 0, ["none"]), ("tensorwise", 0, ["fp8"]), ("tensorwise", 1, ["fp8", "none"])],
)
def test_buffers_have_a_micro_batchs_tokens_in_what_its_layers_compute_in(monkeypatch, fp8, bf16_layers, modes):
    calls = []
    base = SimpleNamespace(
        UserBufferQuantizationMode=Mode,
        initialize_ub=lambda **given: calls.append(given),
        destroy_ub=lambda: calls.append("gone"),
    )
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", SimpleNamespace(base=base))
    monkeypatch.delenv("UB_SKIPMC", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    trainer = TrainerConfig(tp_comm_overlap=True, micro_batch_size=3, fp8=fp8, fp8_bf16_layers=bf16_layers)
    layout = Layout(tensor=2, sequence=True, context=2, world_size=4)
    with pytest.raises(KeyError), overlap.user_buffers(trainer, SMALL_SHAPE, layout, LENGTH):
        assert calls == [
            {
                "shape": [3 * LENGTH // 2, 32],
                "tp_size": 2,
                "quantization_modes": modes,
                "ub_cfgs": {},
                "bootstrap_backend": "nccl",
            }
        ]
        assert "UB_SKIPMC" not in os.environ
        raise KeyError
    assert calls[1:] == ["gone"]
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    with overlap.user_buffers(trainer, SMALL_SHAPE, layout, LENGTH):
        assert os.environ.pop("UB_SKIPMC") == "1"
    calls.clear()
    with overlap.user_buffers(replace(trainer, tp_comm_overlap=False), SMALL_SHAPE, layout, LENGTH):
        assert not calls
    assert (
        not calls and overlap.overlap_fields(False) == {} and overlap.overlap_fields(True) == {"tp_comm_overlap": True}
    )


# Signals, and graphs


@pytest.fixture
def handlers():
    """Handlers of the signals are as they were when a test is over."""
    before = {number: signal.getsignal(number) for number in STATUS_OF_SIGNAL}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STATUS_OF_SIGNAL)
def test_a_signal_asks_for_a_stop_and_a_second_interrupt_ends_at_once(handlers, monkeypatch, number):
    """Handlers come back where nobody asked, and stay where somebody did."""
    asked = []
    signal.signal(signal.SIGINT, lambda *given: asked.append(given[0]))
    mine = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if number == signal.SIGUSR1:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    said = []
    monkeypatch.setattr(loop, "say_from_rank_zero", said.append)
    trainer = SimpleNamespace(stop_asked=False, interrupted=False)
    with loop.stop_on_signal(trainer):
        assert signal.getsignal(signal.SIGINT) is not mine
        # What is ignored stays ignored.
        assert (signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN) == (number != signal.SIGUSR1)
    assert signal.getsignal(signal.SIGINT) is mine and not trainer.stop_asked
    with loop.stop_on_signal(trainer):
        os.kill(os.getpid(), number)
        assert trainer.stop_asked and trainer.interrupted == (number == signal.SIGINT) and asked == []
        words = "Ctrl-C: this step is finished and saved first; a second Ctrl-C ends at once"
        assert said == ([words] if number == signal.SIGINT else [])
        os.kill(os.getpid(), number)
        assert asked == ([signal.SIGINT] if number == signal.SIGINT else [])
    assert signal.getsignal(signal.SIGINT) is not mine


def test_layers_are_captured_once_before_the_first_pass(monkeypatch):
    """As many micro-batches as run at once."""
    calls = []
    monkeypatch.setattr(loop, "capture_layers", lambda *given, **more: calls.append((given, more)))
    cfg = config(micro_batch_size=2)
    this = SimpleNamespace(to_capture=True, chunks=["c"], optimizer="o", layout=Layout(), cfg=cfg)
    for _ in range(2):
        loop.Trainer._capture_once(this, 3)
    assert calls == [((["c"], "o", Layout()), {"micro_batches": 3, "micro_batch_size": 2, "sequence_length": LENGTH})]
    this.to_capture = False
    loop.Trainer._capture_once(this, 3)
    assert len(calls) == 1


def test_gradients_are_dropped_from_buffers_and_optimizer():
    did = []
    chunks = [SimpleNamespace(zero_grad_buffer=lambda n=n: did.append(n)) for n in range(2)]
    held = SimpleNamespace(zero_grad=lambda: did.append("optimizer"))
    loop.Trainer._drop_gradients(SimpleNamespace(chunks=chunks, optimizer=held))
    assert did == [0, 1, "optimizer"]


def test_a_step_has_its_samples_on_its_device(monkeypatch):
    monkeypatch.setattr(loop, "on_device", lambda batch: ("on device", batch))
    this = SimpleNamespace(cfg=config(global_batch_size=8), micro_batches=lambda samples, numbers: [samples, numbers])
    assert loop.Trainer.batches_of_step(this, 3, "s") == [("on device", "s"), ("on device", range(24, 32))]


@pytest.mark.parametrize(("fp8", "scales"), [("delayed", True), ("none", False), ("tensorwise", False)])
def test_a_trainer_begins_without_having_been_asked_for_anything(monkeypatch, fp8, scales):
    monkeypatch.setattr(loop, "ScalesBefore", lambda chunks: ("scales", chunks))
    for graphs in (True, False, "auto"):
        made = loop.Trainer(["c"], "o", "objective", Layout(), config(fp8=fp8, cuda_graphs=graphs))
        assert made.scales == (("scales", ["c"]) if scales else None) and made.to_capture is (graphs is True)
        assert (made.stop_asked, made.interrupted, made.any_interrupted) == (False, False, False)


@pytest.mark.parametrize(
    ("at_once", "parts"),
    [(2, [[0, 1], [2, 3], [4]]), (None, [[0, 1, 2, 3, 4]]), (9, [[0, 1, 2, 3, 4]]), (5, [[0, 1, 2, 3, 4]])],
)
@pytest.mark.parametrize("last_stage", [True, False])
def test_a_step_runs_in_rounds_whose_sums_are_divided_once(monkeypatch, at_once, parts, last_stage):
    """By the tokens of all ranks; a stage without a loss has zeros. What a rank was asked for is told with the sums."""
    did = []

    class Rounds:
        def __init__(self, chunks):
            did.append(chunks)

        def running(self, *, last):
            did.append(last)
            return nullcontext()

    def summed(sums, more):
        did.append((sums, more))
        return [30.0, 60.0, 10.0, *more[:1], 1.0, *more[2:]]

    objective = SimpleNamespace(
        names=lambda measure: ("loss", "measured") if measure else (), at_once=at_once, sums_of_stages=lambda: [40.0],
        prepare=lambda part: did.append(("prepare", part)), finish=lambda means, stages: {**means, "stages": stages},
    )  # fmt: skip
    this = object.__new__(loop.Trainer)
    vars(this).update(
        objective=objective, chunks="chunks", stop_asked=False, interrupted=True,
        _capture_once=lambda count: did.append(("capture", count)),
        _run_schedule=lambda part, names, measure: [torch.tensor([1.0, 2.0, 3.0]) * one for one in part if last_stage],
    )  # fmt: skip
    monkeypatch.setattr(loop, "Rounds", Rounds)
    monkeypatch.setattr(loop.collectives, "sum_from_last_stage", summed)
    means, tokens, stop = this.forward_backward(list(range(5)), measure=True)
    assert (means, tokens, stop) == (
        {"loss": 3.0, "measured": 6.0, "stages": [4.0]},
        10,
        False,
    ) and this.any_interrupted
    rounds = [one for n, part in enumerate(parts, 1) for one in (("prepare", part), n == len(parts))]
    sums = [10.0, 20.0, 30.0] if last_stage else [0.0] * 3
    assert did == [("capture", len(parts[0])), "chunks", *rounds, (sums, [0.0, 1.0, 40.0])]


def test_gradients_are_reduced_in_the_last_round_alone_and_parameters_gathered_for_the_first():
    """What a schedule is given is put back after each round, and what it has counted divides nothing."""
    did = []
    config_ = SimpleNamespace(
        no_sync_func="no sync", grad_sync_func="reduce", param_sync_func="gather",
        finalize_model_grads_func=lambda model, tokens, **groups: did.append((model, tokens, groups)),
    )  # fmt: skip
    before = dict(vars(config_))

    @contextmanager
    def no_sync(n):
        did.append(f"off {n}")
        yield
        did.append(f"on {n}")

    chunks = [SimpleNamespace(config=config_, no_sync=lambda n=n: no_sync(n)) for n in range(2)]
    rounds = Rounds(chunks)
    for number, last in enumerate((False, False, True)):
        with pytest.raises(KeyError), rounds.running(last=last):
            assert config_.param_sync_func == ("gather" if number == 0 else None)
            assert config_.grad_sync_func == ("reduce" if last else None)
            assert config_.no_sync_func == ("no sync" if last else nullcontext)
            assert did == ([] if last else ["off 0", "off 1"])
            config_.finalize_model_grads_func(["model"], 640, pg="groups")
            assert did == ([(["model"], None, {"pg": "groups"})] if last else ["off 0", "off 1"])
            raise KeyError
        assert vars(config_) == before
        did.clear()
    alone = Rounds(chunks)
    with alone.running(last=True):
        assert config_.param_sync_func == "gather"


@pytest.mark.parametrize("taken", [True, False])
def test_a_step_is_judged_by_its_loss_and_changes_nothing_where_it_is_refused(monkeypatch, taken):
    """Its data are loaded first, which is a part of its seconds; a first pass has its gradients dropped."""
    now, did, terms, grad_norm = iter([10.0, 12.0, 17.0]), [], {"loss": 2.0, "divergence": 1.0}, 3.0

    class Objective:
        needs_first_pass = True

        def state_dict(self):
            return {"alpha": 1.0}

        def load_state_dict(self, state):
            did.append(("objective", state))

    def passes(batches, measure=False):
        did.append(("pass", batches, measure))
        return terms, 640, False

    def judged(step, loss, norm):
        did.append(("judged", step, loss, norm))
        return taken

    cfg = config()
    chunk = SimpleNamespace(train=lambda: did.append("train"))
    scales = SimpleNamespace(remember=lambda: did.append("remember"), restore=lambda: did.append("restore"))
    this = object.__new__(loop.Trainer)
    vars(this).update(
        cfg=cfg, chunks=[chunk], objective=Objective(), scales=scales, optimizer="o", stop_asked=False,
        guard=SimpleNamespace(takes=judged), batches_of_step=lambda step, samples: [step, samples],
        forward_backward=passes, _drop_gradients=lambda: did.append("drop"),
    )  # fmt: skip
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(loop, "gradient_norm", lambda held, tokens: did.append(("norm", tokens)) or grad_norm)
    monkeypatch.setattr(loop, "set_learning_rate", lambda *given: did.append(("rate", *given[1:])))
    monkeypatch.setattr(loop, "apply_gradients", lambda *given: did.append(("apply", *given[1:])))
    schedule = SimpleNamespace(steps=2, learning_rate=lambda step: step / 10)
    found = this.train_step(1, schedule, "samples")
    first, second = ("pass", [1, "samples"], False), ("pass", [1, "samples"], True)
    before = ["train", "remember", "drop", first, "drop", second, ("norm", 640), ("judged", 1, 2.0, grad_norm)]
    update = [("rate", 0.1, cfg.optim.weight_decay), ("apply", 640, grad_norm)]
    assert did == [*before, *(update if taken else [("objective", {"alpha": 1.0}), "restore"])]
    assert (found.terms, found.loss, found.grad_norm, found.lr, found.tokens) == (terms, 2.0, grad_norm, 0.1, 640)
    assert (found.seconds, found.data_seconds, found.taken, found.stop) == (7.0, 2.0, taken, False)


# What is said of a run, and what it has taken


@pytest.mark.parametrize(("step", "measured"), [(25, {"loss": 1.0, "validation_loss": 0.5}), (20, {"loss": 9.0})])
def test_results_are_the_figures_of_the_step_that_is_published(tmp_path, monkeypatch, step, measured):
    monkeypatch.setattr(run.time, "monotonic", lambda: 107.26)
    monkeypatch.setattr(run, "tokens_of_run", lambda cfg: 640)
    loop_ = SimpleNamespace(
        objective=SimpleNamespace(results=lambda: {"teacher_loss": 2.0}), guard=SimpleNamespace(skipped=3)
    )
    this = SimpleNamespace(
        measured={"loss": 1.0, "validation_loss": 0.5}, end=25, loop=loop_, schedule=SimpleNamespace(steps=30), cfg=None,
        began=100.0, shapes={"student": SMALL_SHAPE}, recipe=SimpleNamespace(trained="student"),
    )  # fmt: skip
    written = saved.Written("x", False, {}, step, {}, {}, {"loss": 9.0})
    found = run._Run.results(this, saved.Checkpoint(step, tmp_path, written))
    assert found == {
        **measured,
        "published_step": step,
        "teacher_loss": 2.0,
        "steps": 30,
        "skipped": 3,
        "tokens": 640,
        "seconds_since_start": 7.3,
        "parameters": run.count_parameters(SMALL_SHAPE),
    }


def test_what_a_run_has_saved_when_it_is_ended(tmp_path):
    assert run._what_is_saved(tmp_path) == "no step is saved yet; the same command starts the run again"
    for step in (3, 12):
        (tmp_path / f"step_{step:08d}").mkdir()
    assert run._what_is_saved(tmp_path) == "step 12 is the last that is saved; the same command continues from there"


@pytest.mark.parametrize(("loss", "said"), [(1.0, 0), (math.inf, 1), (math.nan, 1)])
def test_a_validation_loss_that_is_no_number_is_said(caplog, loss, said):
    asked = []
    trainer = SimpleNamespace(validate=lambda *given: asked.append(given) or {"validation_loss": loss})
    found = run._Run._validate(SimpleNamespace(loop=trainer, validated=7), "windows")
    assert set(found) == {"validation_loss"} and asked == [("windows", 7)] and len(caplog.records) == said


@pytest.mark.parametrize(("given", "planned"), [(None, 80.0), (40.0, 40.0), (100.0, 80.0)])
def test_memory_is_foreseen_for_the_gpu_that_is_here(monkeypatch, given, planned):
    """And for less where less is said."""
    gpu, asked = SimpleNamespace(total_memory=80 * 2**30), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(
        run, "forecast", lambda cfg, *more: asked.append((cfg, more)) or SimpleNamespace(graphs="graphs")
    )
    monkeypatch.setattr(run, "choose_graphs", lambda cfg, layout, built, before, foreseen: foreseen())
    monkeypatch.setattr(run, "choose_overlaps", lambda cfg, layout, kind, before: [kind, before])
    cfg = replace(config(), cluster=ClusterConfig(memory_gib=given))
    found = run.decide(cfg, Layout(), "models", "built", torch.device("cuda"), {"a": 1})
    assert found == ["graphs", "cuda", {"a": 1}]
    ((one, more),) = asked
    assert one.cluster.memory_gib == planned and more == (Layout(), "models", {"a": 1})


def test_every_model_is_asked_of_its_device(monkeypatch):
    """Each in its own layout; transfers and moments are those of the one that is trained."""
    asked = []
    monkeypatch.setattr(run, "model_dtype", lambda shape, precision: {"t": torch.bfloat16, "s": torch.float32}[shape])
    monkeypatch.setattr(
        run, "pick_engine", lambda engine, layout, dtype, device, name: asked.append((name, layout)) or engine
    )
    for name in ("check_document_masks", "check_fp8_device", "check_overlap_device", "check_state_precision"):
        monkeypatch.setattr(run, name, lambda *given, name=name: asked.append((name, *given)))
    recipe = SimpleNamespace(
        models={"teacher": ModelConfig(engine="te"), "student": ModelConfig(engine="local")}, trained="student",
        layout_of=lambda name, layout: f"{layout} of {name}", fp8_of=lambda name: (f"option of {name}", "scaling"),
    )  # fmt: skip
    cfg = config(tp_comm_overlap=True)
    found = run._check_device(cfg, recipe, {"teacher": "t", "student": "s"}, "layout", "device")
    assert found == [Built("teacher", "te", True), Built("student", "local", False)]
    assert asked == [
        ("teacher", "layout of teacher"),
        ("check_document_masks", False, "te", "teacher"),
        ("check_fp8_device", "option of teacher", "scaling", "te", torch.bfloat16, "device"),
        ("student", "layout of student"),
        ("check_document_masks", False, "local", "student"),
        ("check_fp8_device", "option of student", "scaling", "local", torch.float32, "device"),
        ("check_overlap_device", True, "local", torch.float32),
        ("check_state_precision", cfg.optim, torch.float32, "device"),
    ]


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(8, "3", 2), (8, "8", 1), (2, "4", 1), (8, None, 8), (8, "0", 8), (6, "2", 3)]
)
def test_processes_of_a_node_share_its_cores_to_digest(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(checkpoint, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert checkpoint._threads() == threads


def test_inputs_that_are_others_are_named_in_order_with_what_they_were(tmp_path):
    """An option by its name, a file by its own; a long digest by its first 20 letters."""
    before = {"data": "b" * 23, "file a": "1", "student": "s"}
    saved.check_inputs(tmp_path, before, dict(before))
    for now, says in (
        ({**before, "data": "d" * 24}, rf"data\.path= is another one .*\({'b' * 23}, now {'d' * 20}…\): give the same"),
        (
            {**before, "file a": "2", "student": "t"},
            r"^output=\S+: file a is another one than the run has had so far \(1, now 2\)",
        ),
        ({**before, "cache": "c"}, r"distill\.cache= is another one .*\(none, now c\)"),
        ({"data": "b" * 23, "file a": "1"}, r"student= is another one .*\(s, now none\)"),
    ):
        with pytest.raises(UserError, match=says):
            saved.check_inputs(tmp_path, before, now)
