"""What a chain chooses and foresees by sizes alone: time of its stages, room, and options that stand beside given ones."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minitron_megatron import choosing, compress_plan, pace
from minitron_megatron.chosen import Choices, Pair, Text
from minitron_megatron.config import BudgetConfig, CompressConfig, ParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.parallel.layout import Layout
from tests.test_bounds import SMALL_SHAPE

STUDENT = SMALL_SHAPE.resized(num_layers=3)


def test_stages_take_their_operations_their_micro_batches_and_their_start():
    pair = Pair(SMALL_SHAPE, STUDENT)
    asked = pace.Work(length=8, calibration=5, windows=9, steps=3, batch=6, micro=2, data=2, validated=5)
    big, small = (8 * flops_per_token(shape, 8) for shape in (SMALL_SHAPE, STUDENT))
    arithmetic = pace.seconds_of_stages(pair, asked, pace.Pace(flops=2e6, operation=0.0, start=0.0), 1)
    assert arithmetic == pytest.approx(
        {
            "importance": 5 * big / 1e6,
            "distill": ((18 + 5) * big + (3 * 18 + 5) * small) / 1e6,
            "evaluate": 9 * (big + small) / 1e6,
        }
    )
    # 5, 9, 18 and 23 samples are 2, 3, 5 and 6 micro-batches of 2 on 2 ranks.
    small_ones = pace.seconds_of_stages(pair, asked, pace.Pace(flops=math.inf, operation=1.0, start=0.0), 1)
    layer, trained = pace._LAYER, pace._LAYER_TRAINED
    assert small_ones == {
        "importance": 2 * 4 * layer,
        "distill": 6 * 4 * layer + 5 * 3 * trained + 2 * 3 * layer + 3 * pace._STEP,
        "evaluate": 3 * 4 * layer + 3 * 3 * layer,
    }
    idle = pace.Pace(flops=math.inf, operation=0.0, start=2.0)
    for processes, start in ((1, 2 * pace.START), (2, 2 * pace.START_OF_SEVERAL)):
        assert set(pace.seconds_of_stages(pair, asked, idle, processes).values()) == {start}


def test_room_is_for_models_and_checkpoints_of_every_round(monkeypatch):
    """A student twice, before and after its training, and each checkpoint with 12 bytes of optimizer a weight."""
    asked = []
    monkeypatch.setattr(compress_plan, "check_space", lambda place, need, *_, **__: asked.append(need))
    n, m = count_parameters(SMALL_SHAPE), count_parameters(STUDENT)
    config = SimpleNamespace(trainer=SimpleNamespace(keep_last=2))
    one = SimpleNamespace(target=STUDENT, stages={"distill": SimpleNamespace(config=config)})
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        source = SimpleNamespace(shape=replace(SMALL_SHAPE, dtype=dtype))
        for hf, export, extra in ((None, False, 0), ("h", False, n * item), (None, True, m * item)):
            cfg = SimpleNamespace(hf=hf, export=export, output="x")
            compress_plan._check_room(cfg, source, [one, one])
            assert asked.pop() == 2 * m * (2 * item + 3 * (item + 12)) + extra


def test_what_was_given_stands_and_its_other_unit_does_not():
    chosen = {"trainer.steps": 5, "optim.warmup_steps": 2, "optim.lr": 1.0}
    choices = Choices({"distill": chosen})
    assert choices.of("distill", {}) == chosen and choices.of("prune", {"a": 1}) == {"a": 1}
    assert choices.of("distill", {"optim.lr": 2.0}) == chosen | {"optim.lr": 2.0}
    assert choices.of("distill", {"optim.warmup_tokens": 3}) == {
        "trainer.steps": 5,
        "optim.lr": 1.0,
        "optim.warmup_tokens": 3,
    }


# Lengths, batches, layouts


@pytest.mark.parametrize(
    ("given", "positions", "text", "device", "length"),
    [
        (500, 64, None, "cpu", 500),
        (None, 2048, None, "cpu", 512),
        (None, 512, None, "cpu", 512),
        (None, 500, None, "cpu", 496),
        (None, 8192, None, "cuda", 4096),
        (None, 4096, None, "cuda", 4096),
        (None, 2048, (64 * 512, 513), "cpu", 512),
        (None, 2048, (64 * 512 - 1, 10**6), "cpu", 256),
        (None, 2048, (10**6, 512), "cpu", 256),
        (None, 2048, (64 * 256 - 1, 10**6), "cpu", 128),
        (None, 2048, (1, 1), "cpu", 32),
        (None, 40, (1, 1), "cpu", 16),
        (None, 33, None, "cpu", 32),
        (None, 17, None, "cpu", 16),
        (None, 16, None, "cpu", 16),
        (None, 15, None, "cpu", 15),
        (None, 1, None, "cpu", 1),
    ],
)
def test_a_sample_is_as_long_as_model_machine_and_text_allow(given, positions, text, device, length):
    cfg = CompressConfig(output="x")
    cfg = replace(cfg, data=replace(cfg.data, sequence_length=given))
    text = text and Text(*text, True)
    assert (
        choosing.choose_length(cfg, replace(SMALL_SHAPE, max_position_embeddings=positions), text, device)[0] == length
    )


def test_why_a_sample_is_so_long():
    cfg, shape = CompressConfig(output="x"), replace(SMALL_SHAPE, max_position_embeddings=512)
    why = [
        choosing.choose_length(cfg, replace(shape, max_position_embeddings=n), text and Text(*text, True), device)[1]
        for n, text, device in ((512, None, "cpu"), (513, None, "cpu"), (9999, None, "cuda"), (512, (9, 9), "cpu"))
    ]
    assert why == [
        "as many as the model takes",
        "at most, on CPUs",
        "at most, on GPUs",
        "so that the text has 64 samples",
    ]
    given = replace(cfg, data=replace(cfg.data, sequence_length=5))
    assert choosing.choose_length(given, shape, None, "cpu") == (5, "as given")


@pytest.mark.parametrize(
    ("own", "batch", "data", "device", "sizes"),
    [
        ({}, 8, 1, "cuda", [8, 4, 2, 1]), ({}, 8, 1, "cpu", [4, 2, 1]), ({}, 8, 2, "cuda", [4, 2, 1]), ({}, 7, 2, "cuda", [2, 1]),
        ({}, 8, 16, "cuda", [1]), ({"trainer.micro_batch_size": 3}, 8, 1, "cpu", [3]),
        ({"trainer.micro_batch_size": 3}, 2, 1, "cpu", [3]),
        ({"trainer.global_batch_size": 12}, 12, 1, "cuda", [4, 2, 1]), ({"trainer.global_batch_size": 12}, 12, 6, "cuda", [2, 1]),
        ({"trainer.global_batch_size": 12}, 12, 5, "cuda", []),
        ({"trainer.global_batch_size": 12, "trainer.micro_batch_size": 3}, 12, 4, "cuda", [3]),
        ({"trainer.global_batch_size": 12, "trainer.micro_batch_size": 3}, 12, 3, "cuda", []),
    ],
)  # fmt: skip
def test_samples_at_once_divide_a_given_batch_and_fit_into_a_chosen_one(own, batch, data, device, sizes):
    assert list(choosing._micro_batches(own, batch, data, device)) == sizes


@pytest.mark.parametrize(
    ("own", "epochs", "there", "found"),
    [
        # 400 steps of 8 samples of 10 tokens are 32,000.
        ({}, None, 8000, (400, 8, 32000)), ({}, 1.0, 32000, (400, 8, 32000)), ({}, None, 10, (1, 8, 40)),
        ({}, None, 1, (1, 8, 4)),
        ({}, None, 9000, (400, 9, 36000)), ({}, None, 10**12, (8680555, 1152, 100 * 10**9)),
        ({"trainer.global_batch_size": 4}, None, 8000, (800, 4, 32000)),
        ({"trainer.steps": 7}, None, 8000, (7, 8, 560)), ({"trainer.steps": 7}, None, 10**12, (7, 1152, 80640)),
        ({"trainer.steps": 7, "trainer.global_batch_size": 3}, None, 8000, (7, 3, 210)),
        ({"trainer.tokens": "4.1e4"}, None, 10, (410, 10, 41000)), ({"trainer.tokens": 81}, None, 10**6, (2, 8, 81)),
        ({"trainer.tokens": 81, "trainer.global_batch_size": 2}, None, 10**6, (5, 2, 81)),
    ],
)  # fmt: skip
def test_steps_batch_and_tokens_follow_from_what_was_given_and_from_the_text(own, epochs, there, found):
    cfg = CompressConfig(output="x")
    cfg = replace(cfg, data=replace(cfg.data, max_epochs=epochs))
    assert choosing._steps(cfg, own, 10, there) == found


@pytest.fixture
def pair():
    return Pair(SMALL_SHAPE, STUDENT)


def settled(**options) -> CompressConfig:
    cfg = CompressConfig(output="x", **{"processes": 4, **options})
    return replace(cfg, data=replace(cfg.data, sequence_length=10))


def test_on_gpus_the_fastest_layout_that_fits_is_taken_and_layers_are_computed_again_only_where_none_does(
    pair, monkeypatch
):
    asked, rates = [], {}

    def foreseen(cfg, pair, layout, length, batch, micro, recompute):
        asked.append((layout.tensor, layout.sequence, micro, recompute))
        fits, rate, gib = rates.get((layout.tensor, micro, recompute), (False, 0.0, 90.0))
        if rate is None:
            return None
        how = SimpleNamespace(layout=layout, batch=SimpleNamespace(samples=micro))
        return SimpleNamespace(
            fits=fits, tokens_per_second=rate, gib=gib, plan=how, gpu=SimpleNamespace(gpu="G", memory_gib=80)
        )

    monkeypatch.setattr(choosing, "_foreseen", foreseen)
    cfg, every = settled(), [(1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 8), (4, 4), (4, 2), (4, 1)]
    rates |= {(2, 2, "none"): (True, 5.0, 70.0), (4, 8, "none"): (True, 7.0, 60.0), (1, 1, "none"): (False, 9.0, 81.0)}
    layout, micro, best = choosing.choose_layout(cfg, pair, 10, 8, "cuda", {})
    assert (layout.tensor, layout.data, micro, best.tokens_per_second) == (4, 1, 8, 7.0)
    # Sequences of 10 do not divide by 4.
    assert asked == [(n, n == 2, micro, "none") for n, micro in every]
    rates.clear()
    rates |= {(1, 1, "full"): (True, 3.0, 70.0), (2, 1, "full"): (True, 2.0, 70.0)}
    layout, micro, best = choosing.choose_layout(cfg, pair, 10, 8, "cuda", {})
    assert (layout.tensor, layout.data, micro) == (1, 4, 1)
    rates.clear()
    rates[4, 1, "full"] = (False, 1.0, 82.4)
    with pytest.raises(
        UserError, match=r"do not fit on processes=4 of G: 82.4 GiB a GPU in the best layout, of 80: use more"
    ):
        choosing.choose_layout(cfg, pair, 10, 8, "cuda", {})
    rates |= {(n, micro, recompute): (False, None, 0.0) for n, micro in every for recompute in ("none", "full")}
    with pytest.raises(UserError, match="no layout of processes=4 divides teacher and student"):
        choosing.choose_layout(cfg, pair, 10, 8, "cuda", {})
    del asked[:]
    rates.clear()
    rates[2, 2, "none"] = (True, 5.0, 70.0)
    given = settled(parallel=ParallelConfig(tensor=2))
    assert choosing.choose_layout(given, pair, 10, 8, "cuda", {})[1] == 2
    assert {n for n, *_ in asked} == {2}


def test_a_job_that_is_foreseen_has_whole_micro_batches(pair):
    layout = Layout(world_size=2)
    for batch, micro, whole in ((8, 2, 8), (9, 2, 8), (10, 2, 8), (11, 2, 12), (1, 4, 8)):
        job = choosing._job(settled(precision="fp32"), layout, 10, batch, micro, "full")
        assert (job.trainer.global_batch_size, job.trainer.micro_batch_size, job.trainer.recompute) == (
            whole,
            micro,
            "full",
        )
        assert (job.data.sequence_length, job.precision) == (10, "fp32")


def choices_of(monkeypatch, cfg, text, device="cpu", own=None, layout=None, micro=2, foreseen=None):
    """All that is chosen, where the layout is given; with the work whose time is asked for."""
    works = []
    monkeypatch.setattr(choosing, "choose_layout", lambda *given: (layout or Layout(world_size=2), micro, foreseen))
    time = {"x": 1.0}, ("time", "", "")
    monkeypatch.setattr(choosing, "_line_of_time", lambda cfg, pair, work, *_: works.append(work) or time)
    monkeypatch.setattr(choosing, "_line_of_memory", lambda *given: ("memory", given[-2], given[-1]))
    given = {"distill": own or {}}
    found = choosing.choose(cfg, Pair(SMALL_SHAPE, STUDENT), text, device, given)
    return found, works[0], {name: (value, why) for name, value, why in found.lines}


def test_all_that_is_chosen_of_a_small_text(monkeypatch):
    """10 tokens a sample: 40,960 to train on are 4,096 samples, read four times in 400 steps of 40."""
    found, work, lines = choices_of(monkeypatch, settled(), Text(40960, 500, True))
    rate = choosing._rate(STUDENT)
    at_once = {"trainer.micro_batch_size": 2}
    assert found.options == {
        "importance": {**at_once, "samples": 128},
        "prune": {},
        "distill": {
            **at_once, "trainer.steps": 409, "trainer.global_batch_size": 40, "trainer.save_interval": 81,
            "trainer.validation_interval": 81, "data.max_epochs": 4, "optim.lr": rate, "optim.min_lr": rate / 10,
            "optim.warmup_steps": 20,
        },
        "evaluate": {**at_once, "samples": 64},
    }  # fmt: skip
    # Six validations on 50 windows.
    assert work == pace.Work(10, 128, 50, 409, 40, 2, 2, 6 * 50) and found.seconds == {"x": 1.0}
    assert lines["calibration"] == ("128 samples", "of 10 tokens, for the importance scores")
    assert lines["epochs"] == ("4", "times that the text is read to train on, of 4 (data.max_epochs=)")
    assert lines["distillation"] == ("409 steps", "of 40 samples, 163,600 tokens") and lines["memory"] == (40, 2)
    assert lines["learning rate"] == (f"{rate:g}", "to a tenth of it, after 20 steps of warm-up")
    assert lines["layout"] == (str(Layout(world_size=2)), "2 processes, micro-batches of 2")


def test_all_that_is_chosen_of_much_text_and_of_what_was_given(monkeypatch):
    layout = Layout(tensor=2, sequence=True, world_size=6)
    fits = SimpleNamespace(
        plan=SimpleNamespace(how=SimpleNamespace(recompute="full")),
        gib=70.0,
        gpu=SimpleNamespace(memory_gib=80, gpu="h100"),
    )
    found, work, lines = choices_of(monkeypatch, settled(), None, "cuda", layout=layout, foreseen=fits)
    distill = found.options["distill"]
    # 1,152 samples are no multiple of 2 on 3 ranks but the nearest one.
    assert (distill["trainer.global_batch_size"], distill["trainer.steps"]) == (1152, 100 * 10**9 // 11520)
    assert (
        distill["trainer.recompute"] == "full"
        and distill["parallel.tensor"] == 2
        and distill["parallel.sequence"] is True
    )
    assert (distill["trainer.save_interval"], distill["optim.warmup_steps"]) == (100, 40) and "memory" not in lines
    assert (
        found.options["importance"]["samples"] == found.options["evaluate"]["samples"] == 1024 and "epochs" not in lines
    )
    assert lines["layout"][1] == "6 processes, micro-batches of 2, 70.0 GiB of 80 GiB of a h100"
    own = {"optim.lr": 0.5, "trainer.steps": 3, "trainer.global_batch_size": 7, "trainer.validation_samples": 5}
    found, work, lines = choices_of(
        monkeypatch, settled(), Text(1000, 9000, True), own=own, layout=Layout(world_size=1)
    )
    distill = found.options["distill"]
    assert (distill["trainer.steps"], distill["trainer.global_batch_size"], distill["optim.min_lr"]) == (3, 7, 0.05)
    assert (distill["trainer.save_interval"], distill["optim.warmup_steps"], work.validated) == (1, 1, 3 * 5)
    assert found.options["importance"]["samples"] == 100 and lines["learning rate"][0] == "0.5"
    assert lines["epochs"][0] == "0.21" and lines["layout"][1] == "one process, micro-batches of 2"
    near = choices_of(monkeypatch, settled(), Text(40960, 500, True), layout=Layout(world_size=3), micro=8)[0].options[
        "distill"
    ]
    assert (near["trainer.global_batch_size"], near["trainer.steps"]) == (48, 163840 // 480)


# Times


@pytest.mark.parametrize("foreseen", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_time_is_that_of_all_stages_that_run(pair, monkeypatch, foreseen, given):
    monkeypatch.setattr(choosing, "seconds_to_import_torch", lambda: 3.0)
    monkeypatch.setattr(choosing, "measure", lambda shape, dtype, processes, start: ("pace", shape, processes, start))
    stages = {"importance": 10.04, "distill": 1000.0, "evaluate": 20.0}
    monkeypatch.setattr(
        choosing, "seconds_of_stages", lambda pair, work, pace, processes: {**stages, "pace": 0.0 * len(pace)}
    )
    monkeypatch.setattr(choosing, "_seconds_on_gpus", lambda *_: stages)
    more = (
        {"hf": "h", "input": "t", "budget": BudgetConfig(parameters=1)}
        if given
        else {"export": False, "perplexity": False}
    )
    work = pace.Work(10, 1, 1, 100, 8, 1, 1, 0)
    forecast = SimpleNamespace(tokens_per_second=1234.5) if foreseen else None
    seconds, (name, whole, how) = choosing._line_of_time(settled(**more), pair, work, "cpu", forecast)
    if given:
        expected = {"import_hf": 6.0, "prepare_data": 6.0, "search": 3.0, "prune": 6.0, "export_hf": 6.0, "report": 6.0,
                    "importance": 10.0, "distill": 1000.0, "evaluate": 20.0}  # fmt: skip
    else:
        expected = {"prune": 6.0, "importance": 10.0, "distill": 1000.0}
    assert seconds == expected and (name, whole) == ("time", choosing.words_of(sum(expected.values())))
    rate = (
        "1,234 tokens/s, by"
        if foreseen
        else f"{8000 / (1000 - 3 * pace.START_OF_SEVERAL):,.0f} tokens/s once it has started"
    )
    assert how.startswith(f"about 17 minutes of it distillation: {rate}")


def test_times_on_gpus_go_by_the_rate_that_is_foreseen(pair):
    big, small = (flops_per_token(shape, 10) for shape in (SMALL_SHAPE, STUDENT))
    work = pace.Work(length=10, calibration=7, windows=9, steps=100, batch=8, micro=1, data=1, validated=0)
    found = choosing._seconds_on_gpus(settled(), pair, work, 3.0, SimpleNamespace(tokens_per_second=50.0))
    rate, start = 50.0 * (3 * small + big), 3.0 * pace.START_OF_SEVERAL
    assert found == {
        "importance": pytest.approx(start + 70 * big / rate), "distill": pytest.approx(start + 8000 / 50),
        "evaluate": pytest.approx(start + 90 * (big + small) / rate),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (119.4, "119 s"), (120, "2 minutes"), (7199, "120 minutes"), (7200, "2 hours"), (172799, "48 hours"),
     (172800, "2 days")],
)  # fmt: skip
def test_rough_times_are_in_the_largest_unit_of_which_there_are_two(seconds, said):
    assert choosing.words_of(seconds) == f"about {said}"


def test_what_models_compute_in_is_given_the_machines_or_the_models(monkeypatch):
    monkeypatch.setattr(choosing, "of_this_machine", lambda: SimpleNamespace(value="a dtype", reason="a reason"))
    shape = replace(SMALL_SHAPE, dtype="bfloat16")
    assert choosing.precision_of(settled(precision="fp32"), shape, "cpu") == ("float32", "as given")
    assert choosing.precision_of(settled(precision="bf16"), replace(shape, dtype="float32"), "cuda") == (
        "bfloat16",
        "as given",
    )
    assert choosing.precision_of(settled(), shape, "cuda") == ("bfloat16", "as the model is stored")
    assert choosing.precision_of(settled(), shape, "cpu") == ("a dtype", "a reason")
    assert choosing.precision_of(settled(), replace(shape, dtype="float32"), "cpu") == (
        "float32",
        "as the model is stored",
    )


def test_memory_on_cpus_is_that_of_all_processes_and_their_programs(pair, monkeypatch):
    jobs = []
    monkeypatch.setattr(choosing, "precision_of", lambda *_: ("bfloat16", ""))
    monkeypatch.setattr(choosing, "check_pair", lambda *_: None)
    monkeypatch.setattr(
        choosing, "gib_on_cpus", lambda job, layout, models, micro: jobs.append(job) or [1.0 * m for m in micro]
    )
    found = choosing._gib_on_cpus(settled(), pair, Layout(world_size=3), 10, 8, [4, 2])
    assert found == [pytest.approx(3 * 4.8), pytest.approx(3 * 2.8)] and jobs[0].precision == "bf16"
    monkeypatch.setattr(choosing, "precision_of", lambda *_: ("float32", ""))
    choosing._gib_on_cpus(settled(), pair, Layout(world_size=3), 10, 8, [4])
    assert jobs[1].precision == "fp32"


def test_least_times_are_of_three_runs_or_more(monkeypatch):
    """Each of so many seconds, until a quarter of a second is over."""
    for times, least, runs in (([0.5, 0.1, 0.3, 9.0], 0.1, 3), ([0.05, 0.06, 0.07, 0.08, 0.01], 0.05, 4)):
        now, left = [0.0], iter(times)
        clock = SimpleNamespace(perf_counter=lambda now=now: now[0], monotonic=lambda now=now: now[0])
        monkeypatch.setattr(pace, "time", clock)
        ran = []

        def work(now=now, left=left, ran=ran):
            ran.append(1)
            now[0] += next(left)

        assert pace._least(work) == pytest.approx(least) and len(ran) == runs


def test_a_small_operation_is_one_of_a_chain_forward_and_backward(monkeypatch):
    monkeypatch.setattr(pace, "_least", lambda work: work() or 6.4)
    assert pace._operation() == pytest.approx(0.1) and pace._operation(32) == pytest.approx(0.2)
    assert pace.seconds_to_start(3.0, 1) == 6.0 and pace.seconds_to_start(3.0, 2) == 7.5
