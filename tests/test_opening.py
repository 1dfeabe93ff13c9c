"""What a page says first of its model, what all of it cost, and what makes a page."""

from pathlib import Path

import pytest

from minitron_megatron.config import ReportConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.report import opening, training
from minitron_megatron.report.folders import UnfinishedRun
from minitron_megatron.report.page import MARK
from minitron_megatron.report.report import Reporting, _as_file, _check_file, _title, check_report, report, sections_of
from minitron_megatron.report.training import cost_section, process_seconds, seconds_by_device
from tests.report_folders import folder, traced
from tests.test_bounds import SMALL_SHAPE

RESULTS = "results.json"
LARGE, SMALL = SMALL_SHAPE, SMALL_SHAPE.resized(num_layers=2, ffn_hidden_size=(16, 24))
N, M = count_parameters(LARGE), count_parameters(SMALL)


STEP = {"tokens": 40, "step_seconds": 2.0}


def judged(name: str, values: dict, model: str, made: str = "z", config: dict | None = None, **inputs: str):
    return folder(name, answers={RESULTS: values}, inputs={"model": model, **inputs}, config=config or {}, made=made)


def run_of(name: str, metrics=(), **more):
    own = {"results": {"steps": 20, "tokens": 800, "loss": 1.25, "skipped": 0}, "starts": 1, **more}
    return folder(name, shape=LARGE, metrics=metrics, **own)


# Cost


def test_time_of_a_folder_is_its_manifests_or_its_steps():
    line = {**STEP, "tokens_per_second": 8.0, "tokens_per_second_per_gpu": 4.0}
    assert process_seconds(folder("x", seconds=7.0, processes=3)) == 21
    assert process_seconds(folder("x", seconds=7.0, processes=None)) is None
    old = folder("x", results={"seconds": 5.0}, processes=2)
    del old.manifest["seconds"]
    assert process_seconds(old) == 10
    # Two lines of 2 s on 2 processes that had 80 tokens, of 160 in all.
    run = folder("x", metrics=[line, line], results={"tokens": 160}, seconds=3.0, processes=4)
    assert process_seconds(run) == 16
    # All lines say how long their start ran: what was before the last start, and the last by its manifest.
    timed = [{**line, "run_seconds": seconds} for seconds in (5.0, 9.0, 2.0, 4.0, 4.0)]
    assert process_seconds(folder("x", metrics=timed, results={"tokens": 160}, seconds=3.0, processes=4)) == 18 + 12
    some = folder("x", metrics=[*timed, line], results={"tokens": 240}, seconds=3.0, processes=4)
    assert process_seconds(some) == 24
    unknown = folder("x", metrics=timed, results={"tokens": 200}, seconds=3.0, processes=None)
    assert process_seconds(unknown) == 20
    assert process_seconds(folder("x", metrics=timed, results={"tokens": 200}, seconds=None)) == 20


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "–"), (0.0, "0.0000"), (36.0, "0.0100"), (3599.0, "0.9997"), (3600.0, "1.0"), (4e6, "1,111.1")]
)  # fmt: skip
def test_hours_are_exact_where_they_are_few(seconds, said):
    assert training._hours(seconds) == said


def test_costs_are_added_up_by_device():
    run = run_of("run", seconds=7200.0, processes=2, device="H200", command="minitron distill", made="b")
    import_ = folder("model", seconds=36.0, processes=1, device="cpu", command="minitron import_hf", made="a")
    odd = folder("odd", seconds=36.0, processes=None, device="cpu", command="x", results={"tokens": 5}, made="c")
    none = folder("none", seconds=72.0, processes=1, device=None, made="d")
    lineage = traced(import_, run, odd, none)
    assert seconds_by_device(lineage.folders) == {"cpu": 36.0, "H200": 14400.0}
    section = cost_section(lineage)
    assert section.tables[0].rows == [
        ["model", "import_hf", "1 × cpu", "0.0100", "–"],
        ["run", "distill", "2 × H200", "4.0", "800"],
        ["odd", "–", "? × cpu", "–", "5"],
        ["none", "x", "–", "0.0200", "–"],
        ["all on cpu", "", "", "0.0100", "800"],
        ["all on H200", "", "", "4.0", ""],
    ]
    assert section.card and cost_section(traced(import_)).tables[0].rows[-1][-1] == ""


# The opening sentence


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 seconds"), (119.0, "119 seconds"), (120.0, "2.0 minutes"), (7199.0, "120.0 minutes"), (7200.0, "2.0 hours"),
     (7.2e6, "2,000.0 hours")],
)  # fmt: skip
def test_times_are_in_the_largest_unit_of_which_there_are_two(seconds, said):
    assert opening._time(seconds) == said


def test_the_cost_is_that_of_the_model_and_of_what_it_was_made_from():
    teacher, data = folder("teacher", shape=LARGE, made="a"), folder("data", made="b", seconds=20.0)
    pruned = folder("pruned", shape=SMALL, made="c", inputs={"model": "of teacher"}, seconds=100.0)
    inputs = {"teacher": "of teacher", "student": "of pruned", "data": "of data"}
    run = run_of("run", inputs=inputs, made="d", seconds=7200.0, processes=2, device="H200")
    again = run_of("again", inputs={"student": "of run", "data": "of data"}, made="e", device="H200", processes=1,
                   results={"steps": 1, "tokens": 200})  # fmt: skip
    aside = run_of("aside", made="f", seconds=240.0)
    lineage = traced(teacher, data, pruned, run, again, aside)
    took = "making it and what it was made from took"
    assert opening._cost(lineage, again) == (
        f"{took} 4.0 hours of H200 processes and 2.2 minutes of cpu processes, training on 1,000 tokens "
        "(all folders of this page: 2.2 minutes of cpu processes and 4.0 hours of H200 processes)"
    ).replace("2.2 minutes of cpu processes and 4.0", "6.2 minutes of cpu processes and 4.0")
    whole = traced(teacher, data, pruned)
    assert opening._cost(whole, whole.folders[-1]) == f"{took} 110 seconds of cpu processes (all folders of this page: 2.2 " \
        "minutes of cpu processes)"  # fmt: skip
    assert opening._cost(traced(teacher), teacher) == f"{took} 10 seconds of cpu processes"
    assert opening._cost(traced(none := folder("x", shape=LARGE, device=None)), none) == ""


def test_quality_is_from_the_evaluation_that_has_most_to_say():
    teacher, data = folder("teacher", shape=LARGE, made="a"), folder("data", made="b")
    model = folder("model", shape=SMALL, made="c", inputs={"model": "of teacher"})
    export = folder("hf", made="d", inputs={"model": "of model"}, config={"max_shard_gb": 5.0})
    no_export = folder("no", made="d", inputs={"model": "of model"})
    base = [teacher, data, model, export, no_export]

    def said(*there) -> str:
        lineage = traced(*base, *there)
        return opening._quality(lineage, model, teacher)

    alone = judged("j1", {"perplexity": 20.0}, "of model", "p", data="of data")
    beside = judged(
        "j2", {"perplexity": 21.0, "teacher_perplexity": 12.0}, "of model", "q", teacher="of teacher", data="x"
    )
    teachers = judged("j3", {"perplexity": 13.0}, "of teacher", "r", data="of data")
    other = judged("j4", {"perplexity": 14.0}, "of teacher", "s", data="y")
    tasks = judged("j5", {"tasks": {"a": {"acc": 1.0}}}, "of model", "t", data="of data")
    of_hf = folder("j6", answers={RESULTS: {"perplexity": 22.0}}, inputs={"hf": "of hf", "data": "of data"}, made="u")
    of_no = folder("j7", answers={RESULTS: {"perplexity": 22.0}}, inputs={"hf": "of no", "data": "of data"}, made="u")
    assert said() == said(tasks) == said(of_no) == said(teachers) == "its quality was not measured (evaluate does it)"
    assert said(alone) == said(alone, other) == said(alone, tasks) == "perplexity 20 on data"
    assert said(alone, beside) == "perplexity 21, where teacher has 12"
    assert said(alone, teachers) == "perplexity 20 on data, where teacher has 13"
    assert said(of_hf) == "perplexity 22 on data" and said(alone, of_hf) == "perplexity 22 on data"
    lineage = traced(teacher, teachers, data)
    assert opening._quality(lineage, teacher, teacher) == "perplexity 13 on data"


def test_speed_is_that_of_the_engine_in_which_the_model_is_fastest():
    teacher, model = (
        folder("teacher", shape=LARGE),
        folder("model", shape=SMALL, inputs={"model": "of teacher"}, made="z"),
    )

    def rates(name: str, inputs: dict[str, str], *rows: tuple[str, str, float | None]):
        found = [{"model": m, "engine": e, "tokens_per_second": r} for m, e, r in rows]
        return folder(name, answers={RESULTS: found}, inputs=inputs, made=name)

    def said(*there) -> str:
        return opening._speed(traced(teacher, model, *there), model, teacher)

    both = {"0 the t": "of teacher", "1 s": "of model", "2 x": "other"}
    slow = [("the t", "hf", 50.0), ("the t", "hf", 100.0), ("s", "hf", 90.0), ("s", "hf", 150.0), ("x", "hf", 900.0)]
    fast = [("the t", "vllm", 400.0), ("s", "vllm", 500.0), ("s", "vllm", None)]
    alone = [("s", "trt", 9000.0)]
    assert said() == said(rates("r", both, *alone)) == "its speed was not measured (throughput does it)"
    assert said(rates("r", both, *slow)) == "1.50 times as many tokens a second (hf)"
    for given in ([*slow, *fast], [*fast, *slow]):
        assert said(rates("r", both, *given, *alone)) == "1.25 times as many tokens a second (vllm)"
    assert said(rates("r", both, *fast), rates("s", both, *slow)) == "1.25 times as many tokens a second (vllm)"
    assert opening._speed(traced(teacher), teacher, teacher) == ""


def test_the_opening_begins_with_the_size():
    teacher, model = (
        folder("teacher", shape=LARGE),
        folder("model", shape=SMALL, inputs={"model": "of teacher"}, made="z"),
    )
    assert opening._size(model, teacher) == f"model has {M:,} parameters, {100 * M / N:.0f} % of the {N:,} of teacher"
    assert opening._size(teacher, teacher) == f"teacher has {N:,} parameters"
    said = opening.opening(traced(teacher), teacher)
    assert said.startswith(f"teacher has {N:,} parameters; its quality was not measured") and said.endswith(
        "processes."
    )
    assert "; ;" not in said


# The whole page


def test_a_dry_run_lists_every_folder_and_every_run_that_has_not_ended(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    there = [
        folder("a", made="1"),
        folder("b", made="2", inputs={"data": "of a", "more": "of a"}, command="minitron prune"),
    ]
    open_runs = [UnfinishedRun(Path("/nowhere"), name, {"trainer": {}}, []) for name in ("u", "v")]
    output = tmp_path / "o"
    report(ReportConfig(folders="x", output=str(output), dry_run=True), Reporting(there, open_runs, [], {}))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("would be reported ") and not output.exists()
    rows = ("│ a │ x │ │", "│ b │ prune │ a, a │", "│ u │ has not ended │ │", "│ v │ has not ended │ │")
    assert [printed.index(row) for row in rows] == sorted(printed.index(row) for row in rows)
    monkeypatch.setenv("RANK", "1")
    report(ReportConfig(folders="x", output=str(output), dry_run=True), Reporting(there, open_runs, [], {}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", [None, "A title"])
def test_a_page_is_titled_as_given_or_by_its_model_and_what_is_left_of_its_teacher(given):
    teacher = folder("teacher", shape=LARGE, made="a")
    model = folder("model", shape=SMALL, made="b", inputs={"model": "of teacher"})
    lineage = traced(teacher, model)
    title, subtitle = _title(lineage, model, given)
    assert title == (given or f"model: {100 * M / N:.0f} % of teacher")
    assert subtitle == f"{opening.opening(lineage, model)} From the manifests of 2 folders."
    assert _title(lineage, teacher, given)[0] == (given or "teacher")
    assert _title(traced(folder("x")), None, given) == (
        given or "Report of 1 folders",
        "From the manifests of 1 folders.",
    )


def test_what_names_one_file_and_what_may_be_written_over(tmp_path):
    (tmp_path / "a.html").mkdir()
    names = {"a.html": False, "b.html": True, "b.md": True, "b": False, "b.txt": False}
    assert {name: _as_file(tmp_path / name) for name in names} == names
    page = tmp_path / "b.html"
    _check_file(page, resume=False)
    page.write_text(f"{990 * ' '}{MARK}")
    with pytest.raises(UserError, match="is not a report"):
        _check_file(page, resume=True)
    page.write_text(f"x{MARK}x")
    _check_file(page, resume=True)
    with pytest.raises(UserError, match="exists and resume=false: remove it or choose another output="):
        _check_file(page, resume=False)


@pytest.mark.parametrize("folders", [[], 3, [3], ["a", None], {}])
def test_folders_of_a_page_are_one_or_a_list(folders):
    with pytest.raises(UserError, match=r"must be a folder, or a list of them"):
        check_report(ReportConfig(folders=folders, output="o"))


def test_sections_go_from_what_came_out_to_how_it_was_made():
    teacher, model = folder("teacher", shape=LARGE, made="a"), run_of("model", made="b", inputs={"model": "of teacher"})
    data = folder("data", made="c")
    evaluation = judged("j", {"loss": 2.0, "tokens_per_second": 1.0}, "of model", made="d")
    rates = folder("rates", answers={RESULTS: [{"model": "m", "tokens_per_second": 3.0}]}, made="e")
    bench = folder("bench", answers={RESULTS: {"a": 1}}, command="minitron benchmark", made="f")
    open_run = UnfinishedRun(Path("/nowhere"), "u", {"trainer": {}}, [])
    found = sections_of(traced(teacher, model, data, evaluation, rates, bench), [], model, [open_run])
    assert [one.title for one in found] == [
        "Models", "Results", "Throughput", "Recipe", "Runs that have not ended", "Measurements", "Cost", "Lineage", "Commands",
    ]  # fmt: skip
    assert [one.title for one in sections_of(traced(data))] == ["Cost", "Lineage", "Commands"]
