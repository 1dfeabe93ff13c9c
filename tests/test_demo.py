"""The demo's plan: within the time on every machine, and kept by a demo that is continued."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

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


class Recorded:
    """Stands for the demo's Stages: keeps what is run; each stage takes so many seconds."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.ran, self.took, self.seconds, self.starting = {}, seconds or {}, {}, {}

    def command(self, name, output, command, *words, processes=1) -> None:
        self.ran[name] = (output, command, list(words), processes)
        self.seconds[name] = self.took.get(name, 1.0)
        self.starting[name] = 0.25

    def run(self, name, there, work) -> None:
        self.ran[name] = there
        self.seconds[name] = self.took.get(name, 1.0)
        work()


@pytest.fixture
def searched(monkeypatch):
    best = SimpleNamespace(options={"target.num_layers": 20})
    monkeypatch.setattr(demo, "read_search", lambda _: SimpleNamespace(ranked=[best, None]))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_demos_models_are_made_stage_by_stage(searched, tmp_path, processes):
    """Each of what the one before made, with the sizes of the plan's level."""
    plan = make_plan(replace(FAST, processes=processes), 15)
    at = {
        name: tmp_path / name
        for name in ("smollm2", "teacher", "text", "data", "scores", "found", "pruned", "distilled")
    }
    stages = Recorded(dict(plan.seconds))
    assert demo._make_models(stages, at, plan, 15) == plan
    known = {
        name: (output.name, command, words, started) for name, (output, command, words, started) in stages.ran.items()
    }
    model, data, scores = f"model={at['teacher']}", f"data.path={at['data']}", f"scores={at['scores']}"
    text = [f"input={at['text']}", model, "validation_fraction=0.1"]
    calibration = [model, data, "data.sequence_length=256", "samples=64", "trainer.micro_batch_size=4"]
    assert list(known.items())[:6] == [
        ("source", ("smollm2", "smollm2", [], 1)),
        ("import", ("teacher", "import_hf", [f"hf={at['smollm2']}"], 1)),
        ("data", ("data", "prepare_data", text, 1)),
        ("importance", ("scores", "importance", [*calibration, f"parallel.pipeline={processes}"], processes)),
        ("search", ("found", "search", [model, scores, *FULL.search], 1)),
        ("prune", ("pruned", "prune", [model, scores, "target.num_layers=20"], processes)),
    ]
    output, command, words, started = known["distill"]
    assert (output, command, started) == ("distilled", "distill", processes) and len(known) == 7
    assert words == [f"teacher={at['teacher']}", f"student={at['pruned']}", data, *demo.options_of_distillation(plan)]
    lines = [json.loads(line) for line in (at["text"] / "python_topics.jsonl").read_text().splitlines()]
    assert len(lines) > 50 and [one["source"] for one in lines] == sorted(one["source"] for one in lines)
    assert all(one["text"] == one["text"].strip() != "" for one in lines)
    before = (at["text"] / "python_topics.jsonl").stat().st_mtime_ns
    demo.write_text(at["text"])
    assert (at["text"] / "python_topics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("level", "steps", "processes", "expected"),
    [
        (
            FULL,
            60,
            2,
            {"micro_batch_size": 4, "save_interval": 15, "validation_samples": 16, "warmup_steps": 7, "length": 256},
        ),
        (
            FULL,
            24,
            4,
            {"micro_batch_size": 2, "save_interval": 10, "validation_samples": 16, "warmup_steps": 3, "length": 256},
        ),
        (
            LEAN,
            8,
            2,
            {"micro_batch_size": 2, "save_interval": 10, "validation_samples": 4, "warmup_steps": 1, "length": 256},
        ),
        (
            SHORT,
            6,
            1,
            {"micro_batch_size": 4, "save_interval": 10, "validation_samples": 2, "warmup_steps": 1, "length": 128},
        ),
    ],
)
def test_options_of_the_demos_distillation_follow_the_plan(level, steps, processes, expected):
    given = dict(word.split("=") for word in demo.options_of_distillation(Plan(level.name, steps, processes)))
    assert given == {
        "trainer.steps": str(steps), "data.sequence_length": str(expected["length"]), "data.max_epochs": "2",
        "trainer.global_batch_size": str(level.batch), "trainer.checkpoint_format": "dp_reshardable", "distill.logits_mib": "256",
        "optim.lr": "6e-4", "optim.min_lr": "6e-5", "optim.warmup_steps": str(expected["warmup_steps"]),
        **{f"trainer.{name}": str(expected[name]) for name in ("micro_batch_size", "save_interval", "validation_samples")},
    }  # fmt: skip


def test_the_demo_judges_pruned_and_distilled_alike_and_exports_both(tmp_path):
    plan, stages = make_plan(FAST, 15), Recorded()
    at = {name: tmp_path / name for name in ("teacher", "data", "pruned", "distilled")}
    demo._judge(stages, tmp_path, at, plan)
    how = [
        f"data.path={at['data']}",
        "data.sequence_length=256",
        "samples=64",
        "split=validation",
        "trainer.micro_batch_size=4",
    ]
    assert stages.ran == {
        "evaluate pruned": (tmp_path / "evaluate_pruned", "evaluate", [f"model={at['pruned']}", *how], 2),
        "evaluate distilled": (
            tmp_path / "evaluate_distilled", "evaluate", [f"model={at['distilled']}", *how, f"teacher={at['teacher']}"], 2,
        ),
        "export pruned": (tmp_path / "pruned_hf", "export_hf", [f"model={at['pruned']}"], 1),
        "export distilled": (tmp_path / "distilled_hf", "export_hf", [f"model={at['distilled']}"], 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("slower", "minutes", "is_fewer", "is_late"),
    [(0.5, 15, False, False), (1.0, 3, False, True), (2.0, 15, True, False), (3.0, 15, True, True)],
)
def test_a_slower_demo_does_fewer_steps_and_says_so(monkeypatch, capsys, slower, minutes, is_fewer, is_late):
    monkeypatch.setenv("COLUMNS", "400")
    plan, stages = make_plan(FAST, 15), Recorded()
    before = ("source", "import", "data", "importance", "search", "prune")
    stages.seconds = {name: plan.seconds[name] * (slower if name == "importance" else 1.0) for name in before}
    again = demo._planned_again(stages, plan, minutes)
    spent = sum(stages.seconds.values())
    assert again == plan.fewer(slower, spent, minutes)
    said = " ".join(capsys.readouterr().out.split())
    fewer = f"Slower than planned (other work on this machine?): {again.steps} steps rather than {plan.steps}"
    assert (fewer in said) is (again.steps < plan.steps) is is_fewer
    whole = (spent + sum(seconds for name, seconds in again.seconds.items() if name not in before)) / 60
    late = f"This is going to take {whole:.0f} minutes, more than planned; fewer steps would show too little"
    assert (late in said) is (whole > minutes) is is_late
    # What comes after the cut, in a demo that is continued, changes nothing.
    assert demo._planned_again(replace_seconds(stages, distill=9e9), plan, minutes) == again


def replace_seconds(stages: Recorded, **seconds: float) -> Recorded:
    stages.seconds = {**stages.seconds, **seconds}
    return stages


@pytest.mark.parametrize(
    ("machine", "short", "more"),
    [(FAST, False, ""), (VERY_SLOW, False, "; a faster machine does more"), (FAST, True, "")],
)
def test_what_is_going_to_be_done_is_said(monkeypatch, capsys, machine, short, more):
    monkeypatch.setenv("COLUMNS", "400")
    plan = make_plan(machine, 15, short=short)
    demo._say(plan, "This takes")
    assert capsys.readouterr().out == (
        f"Machine: {machine}\nThis takes about {max(1, round(plan.total / 60))} minutes, {plan.seconds['distill'] / 60:.0f} of "
        f"them distillation over {plan.tokens:,} tokens{more}\n"
    )
    assert str(FAST) == "fast, 2 cores, 20 GiB free, 203 GFLOP/s a process in bfloat16"
    assert str(replace(FAST, cores=1)).startswith("fast, 1 core, 20 GiB")


def test_what_became_of_the_model_is_kept_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(
        "minitron_megatron.checkpoints.folder.open_model_folder", lambda path: SimpleNamespace(shape=path.name)
    )
    sizes = {"teacher": 1000, "pruned": 600, "distilled": 601}
    monkeypatch.setattr("minitron_megatron.models.axes.count_parameters", sizes.get)
    monkeypatch.setattr(demo, "complete", lambda folder: f"words of {folder.name}")
    judged = {
        "evaluate_pruned": {"perplexity": 90.04, "teacher_perplexity": 5.0, "agreement": 0.1},
        "evaluate_distilled": {"perplexity": 30.06, "teacher_perplexity": 10.02, "agreement": 0.5},
    }
    monkeypatch.setattr(
        demo, "load_results", lambda folder, command: judged[folder.name] if command == "evaluate" else None
    )
    plan, stages = make_plan(FAST, 15), Recorded({"distill": 100.0})
    stages.command("distill", tmp_path, "distill")
    at = {name: tmp_path / name for name in ("smollm2", *demo.MODELS)}
    demo._show(stages, tmp_path, at, plan)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "parameters": sizes, "perplexity": {"teacher": 10.02, "pruned": 90.04, "distilled": 30.06}, "agreement": 0.5,
        "seconds": {"distill": 100.0, "completions": 1.0, "report": 1.0}, "seconds_starting": {"distill": 0.25, "report": 0.25},
        "plan": json.loads(json.dumps(asdict(plan))),
    }  # fmt: skip
    assert stages.ran["report"][1:] == ("report", [f"folders={tmp_path}", f"title={demo.TITLE}"], 1)
    assert stages.ran["report"][0] == tmp_path / "report" and stages.ran["completions"] == tmp_path / "samples.json"
    printed = " ".join(capsys.readouterr().out.split())
    for row in (
        "│ teacher │ 1,000 │ 10 │ words of smollm2 │", "│ pruned │ 600 │ 90 │ words of pruned_hf │",
        "│ distilled │ 601 │ 30.1 │ words of distilled_hf │",
        f"│ distill │ {round(plan.seconds['distill'])} │ 100 │ 0.25 │", "│ completions │ 6 │ 1 │ │",
        f"│ all │ {round(plan.total)} │ 102 │ 0.5 │",
        f"Written: {tmp_path}/summary.json, {tmp_path}/report/report.html",
    ):  # fmt: skip
        assert row in printed, row


def test_a_demos_seed_is_its_stages_where_it_is_no_default(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "measure_machine", lambda: FAST)
    monkeypatch.setattr(demo, "Stages", lambda file, words: made.append(words) or Recorded())
    monkeypatch.setattr(demo, "_run", lambda *_: None)
    cfg = DemoConfig(output=str(tmp_path / "demo"))
    for config in (cfg, replace(cfg, seed=cfg.seed + 1)):
        demo.run_demo(config, None)
    assert made == [[], [f"seed={cfg.seed + 1}"]]
