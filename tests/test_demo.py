"""The demo's plan: within the time on every machine, and kept by a demo that is continued."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron import demo, demo_plan
from minitron_megatron.config import DemoConfig
from minitron_megatron.demo_plan import FULL, LEAN, LEVELS, SHORT, Machine, Plan, estimate, make_plan
from minitron_megatron.demo_speed import Speed
from minitron_megatron.errors import UserError

# From a tenth of a Zen 3 core in float32 to a whole socket.
RATES = st.floats(2, 20_000)
SPEEDS = st.builds(Speed, st.just("a processor"), st.just("float32"), RATES, RATES, st.floats(0.3, 60))
MACHINES = st.builds(Machine, st.integers(1, 256), st.floats(1, 1000), st.integers(1, 2), SPEEDS)
MINUTES = st.floats(1, 120)
# One process of two, 2 cores: with products in bfloat16, and without (docs/benchmarks.md).
FAST = Machine(2, 20, 2, Speed("fast", "bfloat16", 203.0, 230.0, 1.3))
SLOW = Machine(2, 20, 2, Speed("slow", "float32", 93.0, 230.0, 1.7))
VERY_SLOW = Machine(2, 20, 2, Speed("very slow", "float32", 28.0, 77.0, 6.0))


def planned(machine: Machine, minutes: float) -> Plan | None:
    """The plan; None where the machine is too slow for one."""
    try:
        return make_plan(machine, minutes)
    except UserError:
        return None


@given(MACHINES, MINUTES)
def test_a_plan_takes_no_longer_than_asked_and_does_enough(machine, minutes):
    plan = planned(machine, minutes)
    if plan is None:
        least = sum(estimate(machine, LEAN, LEAN.least).values())
        assert least > 60 * minutes * demo_plan.SHARE
        return
    assert plan.total <= 60 * minutes
    assert plan.of.least <= plan.steps <= plan.of.most
    assert plan.seconds == estimate(machine, plan.of, plan.steps)


@given(MACHINES, MINUTES, st.floats(1, 20), st.sampled_from(["gflops", "elements", "start"]))
def test_a_slower_machine_does_no_more(machine, minutes, times, what):
    """And where the faster one is too slow, so is the slower."""
    speed = machine.speed
    value = getattr(speed, what) * (times if what == "start" else 1 / times)
    faster, slower = (
        planned(machine, minutes),
        planned(replace(machine, speed=replace(speed, **{what: value})), minutes),
    )
    if slower is not None:
        assert faster is not None and slower.tokens <= faster.tokens


@given(MACHINES, MINUTES, st.floats(0, 2))
def test_more_time_is_used_and_less_is_kept_to(machine, minutes, more):
    shorter, longer = planned(machine, minutes), planned(machine, minutes * (1 + more))
    assert shorter is None or (longer is not None and longer.tokens >= shorter.tokens)


@given(MACHINES, MINUTES, st.floats(0.1, 20), st.floats(0, 3600))
def test_a_plan_made_again_has_no_more_steps_and_never_too_few(machine, minutes, slower, spent):
    plan = planned(machine, minutes)
    if plan is None:
        return
    again = plan.fewer(slower, spent, minutes)
    assert plan.of.least <= again.steps <= plan.steps
    assert slower > 1 or again == plan
    if again.steps > plan.of.least and slower > 1:
        late = (
            "distill",
            "evaluate pruned",
            "evaluate distilled",
            "export pruned",
            "export distilled",
            "completions",
            "report",
        )
        assert spent + sum(again.seconds[name] for name in late) <= 60 * minutes


def test_known_machines():
    fast, slow, very_slow = (make_plan(machine, 15) for machine in (FAST, SLOW, VERY_SLOW))
    assert fast.of is FULL and fast.steps == FULL.most
    assert slow.of is FULL and slow.tokens < fast.tokens
    assert very_slow.of is LEAN
    one_core = make_plan(replace(SLOW, cores=1, processes=1), 15)
    assert one_core.processes == 1 and one_core.tokens < slow.tokens
    with pytest.raises(UserError, match=r"about (\d+) minutes.*minutes=\1"):
        make_plan(replace(VERY_SLOW, speed=replace(VERY_SLOW.speed, gflops=2.0)), 15)


@given(MACHINES)
def test_what_is_said_to_be_needed_is_enough(machine):
    try:
        make_plan(machine, 1)
    except UserError as error:
        needed = int(str(error).split("about ")[1].split()[0])
        assert make_plan(machine, needed).total <= 60 * needed
        assert planned(machine, needed - 1) is None


def test_at_least_forty_percent_of_the_parameters_go():
    for level in LEVELS.values():
        budget = next(float(word.partition("=")[2]) for word in level.search if word.startswith("budget.parameters="))
        assert budget <= 0.6 * 134_515_008


def test_a_continued_demo_keeps_its_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "measure_machine", lambda: FAST)
    for name in ("_make_models", "_judge", "_show"):
        monkeypatch.setattr(demo, name, lambda *_: None)
    cfg, file = DemoConfig(output=str(tmp_path / "demo")), tmp_path / "demo" / "plan.json"
    assert demo.check_demo(cfg) is None
    demo.run_demo(replace(cfg, dry_run=True), None)
    assert not file.exists()
    demo.run_demo(cfg, None)
    began = demo.check_demo(cfg)
    assert began == make_plan(FAST, cfg.minutes)
    assert f"This takes about {round(began.total / 60)} minutes" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(demo, "measure_machine", lambda: pytest.fail("measured again"))
    demo.run_demo(replace(cfg, minutes=1), began)
    assert demo.check_demo(cfg) == began
    with pytest.raises(UserError, match="was begun with the whole demo"):
        demo.check_demo(replace(cfg, short=True))
    for damaged in ("{", "[]", '{"level": "whole"}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            demo.check_demo(cfg)


@pytest.mark.parametrize(("free", "processes"), [(99, 2), (7.5, 2), (7.3, 1), (3.8, 1), (3.6, None), (0, None)])
def test_as_many_processes_as_memory_holds_or_a_line(monkeypatch, free, processes):
    monkeypatch.setattr(demo_plan, "usable_cores", lambda: 2)
    monkeypatch.setattr(demo_plan, "free_gib", lambda: float(free))
    speed = json.dumps(asdict(FAST.speed))
    monkeypatch.setattr(demo_plan.sys, "executable", "echo")
    monkeypatch.setattr(demo_plan, "parse_json", lambda _: json.loads(speed))
    if processes is None:
        with pytest.raises(UserError, match=r"the demo needs 3.7 GiB of free memory, and \d.\d GiB are free here: "):
            demo_plan.measure_machine()
    else:
        assert demo_plan.measure_machine().processes == processes


def test_one_module_asks_for_cores_and_memory():
    """By what this process may use, not by what the machine has."""
    package = Path(__file__).resolve().parent.parent / "minitron_megatron"
    asking = re.compile(r"cpu_count|sched_getaffinity|SC_PHYS_PAGES|SC_NPROCESSORS|MemAvailable")
    assert [file.name for file in package.rglob("*.py") if asking.search(file.read_text("utf-8"))] == ["machine.py"]


def test_the_short_form_is_planned_on_any_machine():
    assert make_plan(replace(VERY_SLOW, speed=replace(VERY_SLOW.speed, gflops=0.1)), 15, short=True).of is SHORT


@pytest.mark.slow
def test_the_short_demo_keeps_its_promises(tmp_path):
    """All stages, and the estimate within a factor of four for all of them together, whatever runs beside it."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "launch/demo.py", "short=true", f"output={tmp_path / 'demo'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    parameters, perplexity = summary["parameters"], summary["perplexity"]
    assert parameters["distilled"] == parameters["pruned"] <= 0.6 * parameters["teacher"]
    assert perplexity["teacher"] < perplexity["distilled"] < perplexity["pruned"] / 1.4
    planned, took = summary["plan"]["seconds"], summary["seconds"]
    assert set(planned) == set(took)
    assert 1 / 4 < sum(took.values()) / sum(planned.values()) < 4
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "Continuing" in again.stdout and again.stdout.count("done before") == len(took)
