"""Sections of a report: every row, word and figure of them, from folders whose files were read."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.report import models, training
from minitron_megatron.report.folders import UnfinishedRun
from minitron_megatron.report.models import evaluations, models_section, results_section, rows_of, student
from minitron_megatron.report.training import recipe_section
from tests.report_folders import folder, traced
from tests.test_bounds import SMALL_SHAPE

RESULTS = "results.json"
LARGE, SMALL = SMALL_SHAPE, SMALL_SHAPE.resized(num_layers=2, ffn_hidden_size=(16, 24))
N, M = count_parameters(LARGE), count_parameters(SMALL)


# Which model a page is about


def names(*given: tuple[str, dict[str, str]]) -> list:
    return [folder(name, shape=LARGE, inputs=inputs) for name, inputs in given]


A, B, C, D, E = names(
    ("a", {}), ("b", {"plan": "x"}), ("c", {"student": "x"}), ("d", {"student": "y"}), ("e", {"plan": "y"})
)


@pytest.mark.parametrize(
    ("there", "of_trials", "won", "about"),
    [
        ([A, B, C, D, E], "", "", "d"),
        ([A, B, E], "", "", "e"),
        ([A], "", "", "a"),
        ([], "", "", None),
        ([A, B, C, D, E], "cd", "c", "c"),  # of a trial's the winner, and before what was only pruned
        ([A, B, C, D, E], "d", "d", "c"),  # nobody's of a trial where there is another
        ([A, B, E], "be", "b", "b"),
        ([A, folder("data")], "", "", "a"),
    ],
)
def test_a_page_is_about_the_last_distilled_then_the_last_pruned_then_the_last(there, of_trials, won, about):
    trial = SimpleNamespace(has=lambda one: one.name in of_trials, won=lambda one: one.name in won)
    found = student(traced(*there), [trial] if of_trials else [])
    assert (found and found.name) == about


def test_a_models_row_has_its_sizes_its_share_and_what_it_is_out_of():
    first = folder("teacher", shape=LARGE, command="python /x/launch/import_hf.py hf=a")
    pruned = folder("pruned", shape=SMALL, inputs={"model": "of teacher"}, command="minitron prune", made="u")
    lone = folder("lone", shape=SMALL, inputs={"teacher": "of teacher"}, command="elsewhere", made="v")
    (table,) = models_section(traced(first, pruned, lone)).tables
    rows = {row[0]: row[1:] for row in table.rows}
    share = f"{100 * M / N:.1f} %"
    assert list(rows) == ["teacher", "pruned", "lone"] and models_section(traced(folder("data"))) is None
    assert rows["teacher"] == ["import_hf", f"{N:,}", "100.0 %", "4 × 32 × 48", "8/4", "128,256", "–"]
    assert rows["pruned"] == ["prune", f"{M:,}", share, "2 × 32 × 16 to 24", "8/4", "128,256", "teacher"]
    assert rows["lone"] == ["–", f"{M:,}", share, "2 × 32 × 16 to 24", "8/4", "128,256", "teacher"]
    assert table.columns[:4] == ["model", "made by", "parameters", "of the largest"] and table.columns[-1] == "out of"


# Evaluations


def judged(name: str, values: dict, model: str, made: str = "z", config: dict | None = None, **inputs: str):
    return folder(name, answers={RESULTS: values}, inputs={"model": model, **inputs}, config=config or {}, made=made)


def test_scores_are_numbers_of_a_measure_with_their_errors():
    values = {
        "loss": 2.0, "perplexity": 7, "tokens": 100, "windows": 3, "seconds": 4.0, "split": "validation",
        "tasks": {
            "arc": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 1, "fewshot": 25, "questions": 9, "alias": "arc"},
            "gsm": {"em": 0.25},
        },
    }  # fmt: skip
    assert models._scores(judged("j", values, "m")) == {
        "loss": (2.0, None), "perplexity": (7, None), "arc, acc (25)": (0.5, 0.1), "arc, acc_norm (25)": (1, None),
        "gsm, em": (0.25, None),
    }  # fmt: skip
    assert models._scores(judged("j", ["rows"], "m")) == {} and models._scores(judged("j", {"tasks": None}, "m")) == {}
    for odd in ([1], {"arc": 1}, {"arc": {"acc": 1.0}, "b": None}):
        with pytest.raises(UserError, match="tasks are odd"):
            models._scores(judged("j", {"tasks": odd}, "m"))
    there = [judged("j", values, "m"), judged("none", {"tokens": 1}, "m"), folder("data", inputs={"model": "m"})]
    rates = folder("rates", answers={RESULTS: {"loss": 1.0}}, inputs={"0 a": "m"})
    assert [one.name for one in evaluations(traced(*there, rates))] == ["j"]
    hf = folder("of hf", answers={RESULTS: {"loss": 1.0}}, inputs={"hf": "sha256:" + 20 * "1"})
    assert evaluations(traced(hf)) == [hf] and models._name_of_evaluated(traced(hf), hf) == f"sha256:{12 * '1'}"


def test_models_stand_beside_their_teacher_in_a_table_of_each_measure():
    teacher = folder("teacher", shape=LARGE, made="a")
    one, two = (folder(name, shape=SMALL, inputs={"model": "of teacher"}, made=name) for name in ("one", "two"))
    there = [
        judged("j1", {"loss": 3.0, "kl": 0.5, "teacher_loss": 2.5}, "of one", "p", teacher="of teacher", data="d"),
        judged("j2", {"loss": 3.5, "agreement": 0.0}, "of two", "q", data="d"),
        judged("j3", {"loss": 2.0}, "of teacher", "r", data="d"),
        judged("j4", {"loss": 4.0}, "of two", "s", data="other"),
    ]
    lineage = traced(teacher, one, two, *there)
    first, second = results_section(lineage, one).tables
    assert first.columns == ["", "teacher", "one", "two", "one over teacher"]
    assert first.rows == [
        ["loss, nats a token", "2", "3", "3.5", "1.5×"],
        ["KL from the teacher", "–", "0.5", "–", "–"],
        ["agreement with the teacher", "–", "–", "0", "–"],
    ]
    # The page's model is not in it: the last that is.
    assert second.columns == ["", "teacher", "two", "two over teacher"] and second.rows == [
        ["loss, nats a token", "–", "4", "–"]
    ]
    (alone,) = results_section(traced(teacher, there[2]), teacher).tables
    assert (alone.columns, alone.rows) == (["", "teacher"], [["loss, nats a token", "2"]])
    assert results_section(traced(teacher)) is None
    # A teacher that is not here is called by its digest.
    beside = judged("j", {"loss": 3.0, "teacher_loss": 2.5}, "of one", teacher="blake3:" + 20 * "2")
    (far,) = results_section(traced(one, beside)).tables
    assert far.columns == ["", "one", f"blake3:{12 * '2'}"]


@pytest.mark.parametrize(
    ("values", "config", "says"),
    [
        ({"loss": 1.0, "tokens": 8500, "windows": 1700}, {"data.path": "d", "data.sequence_length": 512},
         "8,500 tokens in 1,700 windows of at most 512; validation split of d"),
        ({"loss": 1.0, "tokens": 8500}, {"data.path": "d", "data.sequence_length": 5, "split": "train"},
         "8,500 tokens in windows of at most 5; train split of d"),
        ({"loss": 1.0}, {"data.path": "d", "data.sequence_length": 5},
         "tokens in windows of at most 5; validation split of d"),
        ({"tasks": {"a": {"acc": 1.0}}}, {}, "tasks: examples before each question in brackets, ± standard error"),
        ({"tasks": {"a": {"acc": 1.0}}}, {"limit": 7},
         "tasks: examples before each question in brackets, ± standard error; the first 7 questions of each at most"),
        ({"loss": 1.0, "tasks": {}}, {"limit": 7}, ""),
    ],
)  # fmt: skip
def test_what_was_measured_is_in_the_caption(values, config, says):
    one = judged("j", values, "m", config=config)
    assert models._caption(traced(one), one) == says
    if "data.path" in config:
        data = folder("text", made="a")
        one = judged("j", values, "m", config=config, data="of text")
        assert models._caption(traced(data, one), one) == says.replace("split of d", "split of text")


def test_cells_and_percents():
    assert [models._cell(one) for one in (None, (1234.56, None), (0.5, 0.01234), (0.5, 0))] == [
        "–", "1,235", "0.5 ± 0.012", "0.5 ± 0",
    ]  # fmt: skip
    how = {"metric": "acc", "fewshot": 5}
    for metrics, says in (
        (None, "–"), ({}, "–"), ({"f1": 0.5}, "–"), ({"acc": 0.5}, "50.0"), ({"acc,none": 0.7349, "fewshot": 5}, "73.5"),
        ({"acc": 0.5, "fewshot": 0}, "50.0 with 0"), ({"acc_norm": 0.5}, "–"), ({"acc": 0.0}, "0.0"),
    ):  # fmt: skip
        assert models._in_percent(metrics, how) == says


# Rates and other measurements


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ([{"a": 1}], [{"a": 1}]), ({"rows": [{"a": 1}]}, [{"a": 1}]), ({"rows": 3}, []), ({"a": 1}, []), ("x", []),
        ([{"a": 1}, 2], []), (None, []),
    ],
)  # fmt: skip
def test_rows_of_measurements(values, rows):
    assert rows_of(folder("r", answers={RESULTS: values})) == rows
    assert rows_of(folder("r")) == []


def test_rates_have_the_columns_that_are_in_any_row_and_a_bar_each(monkeypatch):
    shown = []
    monkeypatch.setattr(models.plots, "rates", lambda *given: shown.append(given) or "<svg>")
    rows = [
        {
            "model": "x/a",
            "engine": "vllm",
            "batch": 8,
            "input": 5,
            "output": 7,
            "tokens_per_second": 1234.5,
            "odd": [1],
        },
        {"model": "b", "tokens_per_second": None, "error": "out of memory", "odd": None},
        {"model": "c", "engine": "hf", "tokens_per_second": 2000000.0},
        {"model": "no rate"},
    ]
    section = models.throughput_section(traced(folder("rates", answers={RESULTS: rows}), folder("other")))
    (table,) = section.tables
    assert table.columns == ["model", "engine", "batch", "input", "output", "tokens per second", "error"]
    assert table.rows == [
        ["x/a", "vllm", "8", "5", "7", "1234.5", "–"],
        ["b", "–", "–", "–", "–", "–", "out of memory"],
        ["c", "hf", "–", "–", "–", "2,000,000", "–"],
    ]
    assert shown == [({"a vllm batch 8 input 5 output 7": 1234.5, "c hf": 2000000.0}, "tokens a second")]
    assert (section.title, table.caption, section.card) == ("Throughput", "rates", True)
    assert [one.caption for one in section.figures] == ["rates: tokens a second"]
    without = models.throughput_section(traced(folder("r", answers={RESULTS: rows[1:2]})))
    assert len(without.tables) == 1 and without.figures == []
    assert models.throughput_section(traced(folder("r", answers={RESULTS: rows[3:]}))) is None


def test_measurements_are_of_benchmark_alone():
    values = {"a": {"b": 1500, "c": [1]}, "d": "text", "e": None}
    own = folder("b", answers={RESULTS: values}, command="minitron benchmark", config={"measure": "step"})
    (table,) = models.measurements_section(traced(own, folder("x", answers={RESULTS: values}))).tables
    assert (table.rows, table.caption) == ([["a.b", "1,500"], ["d", "text"]], "b: step")
    assert models.measurements_section(traced(folder("x", answers={RESULTS: values}))) is None


# Training

STEP = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.5, "tokens": 40, "step_seconds": 2.0}


def run_of(name: str, metrics=(), **more):
    own = {"results": {"steps": 20, "tokens": 800, "loss": 1.25, "skipped": 0}, "starts": 1, **more}
    return folder(name, shape=LARGE, metrics=metrics, **own)


def test_a_recipe_has_what_did_something_in_any_run():
    one = run_of("one", config={"seed": 5, "trainer": {"fp8": "none"}, "optim": {"clip_grad": 0, "weight_decay": 0.1}})
    two = run_of("two", config={"trainer": {"global_batch_size": 1024.0}}, starts=None, made="y",
                 results={"steps": 3, "tokens": 9, "published_step": 2})  # fmt: skip
    other = folder("not trained", shape=LARGE, results={"steps": 0}, made="x")
    section = recipe_section(traced(one, two, other, run_of("no tokens", results={"steps": 3, "tokens": 0})))
    (table,) = section.tables
    assert table.columns == ["", "one", "two"] and section.card and section.title == "Recipe"
    assert table.rows == [
        ["samples of a step", "–", "1,024"],
        ["weight decay", "0.1", "–"],
        ["seed", "5", "–"],
        ["steps", "20", "3"],
        ["tokens", "800", "9"],
        ["step that is published", "–", "2"],
        ["loss of its last step", "1.25", "–"],
        ["skipped steps", "0", "–"],
        ["restarts", "0", "–"],
    ]
    assert recipe_section(traced(other)) is None


def test_a_run_is_told_in_a_sentence():
    teacher, before = folder("teacher", shape=LARGE, made="a"), folder("pruned", shape=LARGE, made="b")
    inputs = {"teacher": "of teacher", "student": "of pruned"}
    whole = run_of("run", inputs=inputs, starts=3, results={"steps": 2000, "tokens": 8000, "skipped": 1000})
    alone = run_of("alone", starts=1)
    lineage = traced(teacher, before, whole, alone)
    assert training._summary(lineage, whole) == (
        "pruned taught by teacher, 8,000 tokens in 2,000 steps, of which 1,000 were skipped, started 3 times."
    )
    assert training._summary(lineage, alone) == "800 tokens in 20 steps."
    began = {"takes": "weights", "checkpoint": "c", "stamp": "s", "options": {}}
    assert training._summary(lineage, run_of("alone", started_from=began)) == (
        "800 tokens in 20 steps; it began with weights of c (s)."
    )


def figures_of(monkeypatch, run) -> dict[str, tuple]:
    drawn = []
    monkeypatch.setattr(training.plots, "curves", lambda *given, **how: drawn.append((*given, how)) or "<svg>")
    return dict(zip([one.caption for one in training._curves(run)], drawn, strict=True))


def test_curves_of_a_run_are_what_its_steps_say(monkeypatch):
    lines = [
        {**STEP, "step": 1, "agreement": 0.5, "kl_term": 3.0, "some": 1.0},
        {"step": 1, "validation_loss": 4.0},
        {**STEP, "step": 3, "loss": 1.0, "lr": 0.2, "grad_norm": 0.5, "agreement": 0.75, "kl_term": 2.0},
    ]
    found = figures_of(monkeypatch, run_of("run", lines, inputs={"teacher": "t"}, config={"distill": {"loss": "jsd"}}))
    assert found == {
        "Loss over steps": ({"training": ([1, 3], [2.0, 1.0]), "validation": ([1], [4.0])}, "step", "loss", {"log": True}),
        "Share of tokens whose most probable next token is the teacher's": (
            {"agreement": ([1, 3], [0.5, 0.75])}, "step", "agreement", {},
        ),
        "What else was watched: kl term": ({"kl term": ([1, 3], [3.0, 2.0])}, "step", "nats a token", {}),
        "Gradient norm before clipping": ({"gradient norm": ([1, 3], [1.5, 0.5])}, "step", "gradient norm", {"log": True}),
        "Learning rate": ({"learning rate": ([1, 3], [0.1, 0.2])}, "step", "learning rate", {}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "loss", "axis"),
    [({"teacher": "t"}, "forward_kl", "KL to the teacher, nats a token"), ({"teacher": "t"}, "topk_kl", "loss"),
     ({}, "forward_kl", "loss")],
)  # fmt: skip
def test_a_loss_is_called_what_it_is_and_is_logarithmic_where_it_can_be(monkeypatch, inputs, loss, axis):
    lines = [{**STEP, "step": 1}, {**STEP, "step": 2, "loss": 0.0, "agreement": 1.0}]
    found = figures_of(monkeypatch, run_of("run", lines, inputs=inputs, config={"distill": {"loss": loss}}))
    assert list(found) == ["Loss over steps", "Gradient norm before clipping", "Learning rate"]
    assert found["Loss over steps"][2:] == (axis, {"log": False})
    assert training.training_sections(traced(run_of("run", [{"step": 1}]))) == []


def test_runs_that_have_not_ended_have_a_curve_from_two_steps_on(monkeypatch):
    monkeypatch.setattr(training.plots, "curves", lambda *given: given)
    config = {"trainer": {"steps": 2000}}
    runs = []
    for count in (0, 1, 2):
        metrics = [{**STEP, "step": n + 1} for n in range(count)] + [{"step": count, "validation_loss": 1.0}]
        runs.append(UnfinishedRun(Path("/nowhere"), f"r{count}", config, metrics))
    section = training.unfinished_section(runs)
    assert [row[:4] for row in section.tables[0].rows] == [
        ["r0", "0 of 2,000", "–", "–"], ["r1", "1 of 2,000", "2", "–"], ["r2", "2 of 2,000", "2", "–"],
    ]  # fmt: skip
    (figure,) = section.figures
    assert figure.caption == "r2: loss so far" and figure.svg[0] == {"training": ([1, 2], [2.0, 2.0])}
    assert training.unfinished_section([]) is None


@pytest.mark.parametrize(
    ("trainer", "data", "said"),
    [
        ({"steps": 1500}, None, "1,500"),
        ({"tokens": 1000, "global_batch_size": 4}, {"sequence_length": 10}, "25"),
        ({"tokens": 1001, "global_batch_size": 4}, {"sequence_length": 10}, "26"),
        ({"steps": 3, "tokens": 1000, "global_batch_size": 4}, {"sequence_length": 10}, "3"),
        ({"tokens": 1000, "global_batch_size": 4}, {}, "?"),
        ({"tokens": 1000}, {"sequence_length": 10}, "?"),
        ({}, {}, "?"),
    ],
)
def test_steps_of_a_run_are_given_or_follow_from_tokens(trainer, data, said):
    assert training._steps(SimpleNamespace(config={"trainer": trainer, "data": data})) == said
