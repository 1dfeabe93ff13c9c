"""Arithmetic of the demo's plan, each term by itself, and the speeds that it is made of."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from minitron_megatron import demo_plan, demo_speed
from minitron_megatron.demo_plan import FULL, Machine, Plan, estimate
from minitron_megatron.demo_speed import Speed
from minitron_megatron.errors import UserError

ENDLESS = Speed("x", "float32", 1e30, 1e30, 0.0)


def test_starts_of_programs_are_in_times_of_torchs_import():
    for processes, several in ((1, 2.0), (2, 2.5)):
        found = estimate(Machine(2, 20, processes, replace(ENDLESS, start=10.0)), FULL, 24)
        assert found == {
            "source": 20.0 + 11 * 10, "import": 20.0, "data": 20.0, "importance": 10 * several, "search": 10.0,
            "prune": 10 * several, "distill": 10 * several + 20, "evaluate pruned": 10 * several,
            "evaluate distilled": 10 * several, "export pruned": 20.0, "export distilled": 20.0, "completions": 50.0,
            "report": 20.0,
        }  # fmt: skip


@pytest.mark.parametrize(("dtype", "reached"), [("float32", 0.6), ("bfloat16", 0.5)])
@pytest.mark.parametrize("processes", [1, 2])
def test_products_are_two_operations_a_parameter_and_token(dtype, reached, processes):
    speed = replace(ENDLESS, dtype=dtype, gflops=0.001)
    found = estimate(Machine(2, 20, processes, speed), FULL, 30)
    second = 1e6 * processes * reached / 2  # parameters · tokens of one
    judged, trained = 64 * 256, 30 * 8 * 256
    assert {name: value for name, value in found.items() if value} == {
        "importance": pytest.approx(judged * 134.5e6 / second, rel=1e-6),
        "distill": pytest.approx(
            (trained * (134.5e6 + 3 * 79.2e6) + judged / 4 * (134.5e6 + 79.2e6)) / second, rel=1e-6
        ),
        "evaluate pruned": pytest.approx(judged * 79.2e6 / second, rel=1e-6),
        "evaluate distilled": pytest.approx(judged * (134.5e6 + 79.2e6) / second, rel=1e-6),
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_are_in_elements_of_the_vocabulary_and_steps_in_parameters(processes):
    found = estimate(Machine(2, 20, processes, replace(ENDLESS, elements=0.01)), FULL, 30)
    second = 1e4 * processes
    judged, trained = 64 * 256 * 49152, 30 * 8 * 256 * 49152
    assert {name: value for name, value in found.items() if value} == {
        "importance": pytest.approx(judged / second, rel=1e-6),
        "distill": pytest.approx((4 * trained + judged + 30 * 79.2e6 * 3) / second, rel=1e-6),
        "evaluate pruned": pytest.approx(2.2 * judged / second, rel=1e-6),
        "evaluate distilled": pytest.approx(3 * 2.2 * judged / second, rel=1e-6),
    }


def test_a_late_plan_has_the_steps_that_still_fit():
    seconds = {"source": 7.0, "importance": 5.0, "distill": 64.0, "evaluate pruned": 10.0, "report": 3.0}
    plan = Plan("whole", 60, 1, seconds, "m")
    # Twice as slow: 2 s a step of 64, 26 s of others, 100 spent.
    for minutes, steps in ((100, 60), (5, 60), (4.6, 57), (4.5, 54), (1, 24)):
        again = plan.fewer(2.0, 100.0, minutes)
        assert again.steps == steps and again.machine == "m"
        assert again.seconds == {
            "source": 7.0, "importance": 5.0, "distill": 2.0 * (steps + 4), "evaluate pruned": 20.0, "report": 6.0,
        }  # fmt: skip
    short = Plan("short", 3, 1, seconds)
    assert short.fewer(9.0, 100.0, 1).steps == 3


def test_the_slowest_of_the_processes_counts(monkeypatch):
    speeds = iter([Speed("p", "float32", 5.0, 9.0, 1.0), Speed("q", "float32", 7.0, 8.0, 3.0)])
    monkeypatch.setattr(demo_plan, "usable_cores", lambda: 2)
    monkeypatch.setattr(demo_plan, "free_gib", lambda: 99.0)
    monkeypatch.setattr(demo_plan.sys, "executable", "echo")
    monkeypatch.setattr(demo_plan, "parse_json", lambda _: asdict(next(speeds)))
    assert demo_plan.measure_machine() == Machine(2, 99.0, 2, Speed("p", "float32", 5.0, 8.0, 3.0))
    monkeypatch.setattr(demo_plan.sys, "executable", "false")
    with pytest.raises(UserError, match="this machine's speed could not be measured"):
        demo_plan.measure_machine()


def test_a_processs_speed_is_in_operations_and_elements_of_a_second(monkeypatch):
    """Three products of 512 tokens between 576 and 1,536 channels; 8 rows of 49,152 words."""
    rates = iter([1000.0, 50.0])
    monkeypatch.setattr(demo_speed, "_times_a_second", lambda work: work() or next(rates))
    monkeypatch.setattr(
        "minitron_megatron.parallel.precision.of_this_machine", lambda: SimpleNamespace(value="float32")
    )
    monkeypatch.setattr("minitron_megatron.parallel.precision.processor", lambda: ("a processor", "more"))
    monkeypatch.setattr(demo_speed.time, "process_time", lambda: 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = demo_speed.measure()
    assert found == Speed("a processor", "float32", 3 * 2 * 512 * 576 * 1536 * 1000 / 1e9, 8 * 49152 * 50 / 1e6, 1.5)


def test_a_rate_is_by_the_median_of_as_many_as_fit_after_one_that_warms_up(monkeypatch):
    for seconds, rate, runs in (([9.0, 0.1, 0.5, 0.2, 9.0], 1 / 0.2, 4), ([9.0, 0.7], 1 / 0.7, 2)):
        now, left = [0.0], iter(seconds)
        monkeypatch.setattr(demo_speed, "time", SimpleNamespace(perf_counter=lambda now=now: now[0]))
        ran = []

        def work(now=now, left=left, ran=ran):
            ran.append(1)
            now[0] += next(left)

        assert demo_speed._times_a_second(work) == pytest.approx(rate) and len(ran) == runs
