"""What comes of a chain: the order of its stages, what is said of its plan, its results and its summary."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minitron_megatron import compress
from minitron_megatron.checkpoints.folder import SHAPE_FILE, WEIGHTS, output_folder
from minitron_megatron.chosen import Choices, Text
from minitron_megatron.compress_plan import Checked, Plan
from minitron_megatron.compress_rounds import Round
from minitron_megatron.compress_source import Source
from minitron_megatron.config import CompressConfig
from minitron_megatron.models.axes import count_parameters
from tests.test_bounds import SMALL_SHAPE
from tests.test_rounds import STUDENT, a_round, stage

N, M = count_parameters(SMALL_SHAPE), count_parameters(STUDENT)


def made(path: Path, files: dict[str, str], **results) -> None:
    with output_folder(path, command="evaluate", config={}, inputs={}, resume=True) as out:
        for name, text in files.items():
            (out.path / name).parent.mkdir(exist_ok=True)
            (out.path / name).write_text(text)
        out.results = results


def finish(one: Round, loss: float, *, judged: bool = True) -> None:
    """What a round's stages would leave."""
    shape = yaml.safe_dump(STUDENT.to_dict())
    model = {SHAPE_FILE: shape, f"{WEIGHTS}/.metadata": one.name}
    made(one.stages["distill"].output / "model", model, loss=loss)
    if judged:
        values = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "kl": 0.5,
            "teacher_loss": 1.0,
            "windows": 1500,
            "tokens": 24000,
        }
        made(one.stages["evaluate"].output, {"results.json": json.dumps(values)})


class Recorded:
    """Stands for Stages: keeps what is run, each in so many seconds."""

    def __init__(self) -> None:
        self.ran, self.seconds = [], {}

    def command(self, name, output, command, *words, processes=1) -> None:
        self.ran.append((name, output, command, words, processes))
        self.seconds[name] = 60.0 * len(self.ran)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("chosen", [True, False])
def test_stages_run_in_order_and_the_plan_is_made_again_when_more_is_known(
    tmp_path, monkeypatch, wide, capsys, ready, chosen
):
    """Once the text is counted, and once a search has found its shape."""
    choices = Choices({}, [("batch", "8", "why")], {"distill": 600.0}) if chosen else None
    first, second = (
        a_round(tmp_path, "one", "importance search prune distill evaluate"),
        a_round(tmp_path, "two", "distill"),
    )
    before = [stage("import_hf", tmp_path / "teacher"), stage("prepare_data", tmp_path / "data")]
    last = [stage("export_hf", tmp_path / "hf"), stage("report", tmp_path / "report")]
    source = Source("the model", SMALL_SHAPE, Text(800, 200, True), ready, tuple(before), {})
    plan = Plan(source, [first, second], last, choices)
    finish(first, 2.0)
    finish(second, 3.0, judged=False)
    planned, kept = [], []

    def again(*given):
        planned.append(given)
        other = replace(first, stages={**first.stages, "prune": replace(first.stages["prune"], words=("found",))})
        return replace(plan, source=replace(source, ready=True), rounds=[other, second])

    monkeypatch.setattr(compress, "make_plan", again)
    monkeypatch.setattr(compress, "remember_choices", lambda *given: kept.append(given[0]))
    cfg, checked, stages = CompressConfig(output=str(tmp_path)), Checked(source), Recorded()
    found = compress._run(cfg, checked, plan, "cpu", stages)
    assert [name for name, *_ in stages.ran] == [
        "import_hf", "prepare_data", *(f"round one, {one}" for one in ("importance", "search", "prune", "distill", "evaluate")),
        "round two, distill", "export_hf", "report",
    ]  # fmt: skip
    by_name = {name: rest for name, *rest in stages.ran}
    assert by_name["round one, prune"] == [tmp_path / "one" / "prune", "prune", ("found",), 1]
    assert by_name["round one, distill"] == [tmp_path / "one" / "distill", "distill", ("a=distill",), 2]
    assert planned == [(cfg, "cpu", checked)] * (1 if ready else 2) and kept == [tmp_path] * chosen
    assert ("now that the text is counted" in capsys.readouterr().out) is (chosen and not ready)
    one, two = found.pop("rounds")
    assert found == {
        "model": "the model", "parameters": N, "loss": 1.0, "perplexity": math.e,
        "hf": f"{tmp_path}/hf", "report": f"{tmp_path}/report/report.html", "seconds": stages.seconds,
        **({"planned_seconds": {"distill": 600.0}} if chosen else {}),
    }  # fmt: skip
    assert one == {
        "name": "one", "model": f"{tmp_path}/one/distill/model", "digest": one["digest"], "parameters": M,
        "share_of_source": M / N, "tokens": 3 * 4 * 8, "distillation_loss": 2.0, "loss": 2.0, "perplexity": math.exp(2.0),
        "kl": 0.5, "source_loss": 1.0, "windows": 1500, "judged_tokens": 24000, "split": "validation",
        "seconds": dict(zip(first.stages, (180.0, 240.0, 300.0, 360.0, 420.0), strict=True)),
    }  # fmt: skip
    unknown = ("loss", "perplexity", "kl", "source_loss", "windows", "judged_tokens", "split")
    assert {two[name] for name in unknown} == {None} and two["seconds"] == {"distill": 480.0}


def summary_of(**more) -> dict:
    one = {
        "name": "", "model": "o/distilled/model", "parameters": 500, "loss": 2.5, "perplexity": 12.18249, "kl": 0.25,
        "windows": 1500, "judged_tokens": 24000, "split": "train", "seconds": {"prune": 10.0, "distill": 200.0},
    }  # fmt: skip
    return {
        "model": "o/teacher", "parameters": 1000, "loss": 2.0, "perplexity": 7.389, "rounds": [one],
        "seconds": {"prune": 10.0, "distill": 200.0}, **more,
    }  # fmt: skip


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_results_are_the_models_beside_one_another_what_was_kept_and_where_all_is(wide, capsys):
    cfg = CompressConfig(output="o")
    more = {"hf": "o/hf", "report": "o/report/report.html", "planned_seconds": {"a": 300.0, "b": 120.0}}
    compress._show_results(cfg, summary_of(**more))
    printed = said(capsys)
    for line in (
        "What came of it",
        "│ source │ 1,000 │ │ 2 │ 7.389 │ │ │ o/teacher │",
        "│ student │ 500 │ 50.0% │ 2.5 │ 12.182 │ 0.25 │ 210 │ o/distilled/model │",
        "Kept: 50.0% of the parameters; perplexity 12.18 beside the source's 7.389, +0.5000 nats a token",
        "Judged on: 1,500 windows, 24,000 tokens of the train split",
        "Took: 3.5 min, 7.0 min planned, the start of each stage's program included: prune 10 s, distill 3.3 min",
        "Student: o/distilled/model Hugging Face folder: o/hf Report: o/report/report.html Written: o/chain.json",
    ):
        assert line in printed, line
    plain = summary_of(loss=None, perplexity=None)
    plain["rounds"][0] |= {"name": "one", "loss": None, "perplexity": None, "kl": None, "windows": None}
    compress._show_results(replace(cfg, rounds=[{"name": "one"}]), plain)
    printed = said(capsys)
    assert "The chain" in printed and "│ source │ 1,000 │ │ │ │ │ │ o/teacher │" in printed
    assert "│ one │ 500 │ 50.0% │ │ │ │ 210 │" in printed and "Took: 3.5 min, the start" in printed
    for line in ("Kept:", "Judged on:", "Hugging Face folder:", "Report:", "planned"):
        assert line not in printed
    lost = summary_of(loss=None)
    compress._show_results(cfg, lost)
    assert "Kept:" not in said(capsys)


@pytest.mark.parametrize(("loss", "perplexity"), [(None, None), (0.0, 1.0), (2.0, math.exp(2)), (1e9, math.exp(700))])
def test_perplexity_is_that_of_the_loss_as_far_as_there_are_numbers(loss, perplexity):
    assert compress._perplexity(loss) == perplexity


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("searched", [True, False])
def test_a_plan_has_a_row_a_round_and_the_line_of_every_stage(tmp_path, wide, capsys, dry_run, searched):
    one = a_round(Path("o"), "", f"importance {'search ' * searched}prune distill")
    before, last = [stage("import_hf", Path("o/teacher"))], [stage("report", Path("o/report"))]
    plan = Plan(Source("m", SMALL_SHAPE, None, True, tuple(before), {}), [one], last, None)
    compress._show_plan(CompressConfig(output="o", dry_run=dry_run), plan)
    printed = said(capsys)
    assert f"{'would be run' if dry_run else 'to be run'} in o" in printed
    about = f"at most {M:,}" if searched else f"{M:,}"
    stages = f"importance 1, {'search 1, ' * searched}prune 1, distill 2"
    assert f"│ student │ {N:,} │ {about} │ {M / N:.1%} │ 96 │ {stages} │" in printed
    lines = [part.split() for part in printed.split("$ ")[1:]]
    assert [words[-2:] for words in lines] == [
        [f"a={name}", f"output=o/{'report' if name == 'report' else 'teacher' if name == 'import_hf' else name}"]
        for name in ("import_hf", *one.stages, "report")
    ]  # fmt: skip
    assert "--nproc-per-node 2 distill a=distill" in printed and "what is chosen" not in printed
    compress._show_plan(CompressConfig(output="o"), replace(plan, chosen=Choices({}, [("batch", "8", "why")], {})))
    printed = said(capsys)
    assert (
        "what is chosen, unless it is given" in printed and "│ batch │ 8 │ why │" in printed and "│ text" not in printed
    )


@pytest.mark.parametrize(
    ("text", "ready", "row"),
    [
        (Text(800, 2000, True), True, "│ text │ 800 + 2,000 tokens │ to train and to validate on │"),
        (Text(800, 2000, True), False, "│ text │ about 800 + 2,000 tokens │ to train and to validate on │"),
        (Text(800, 2000, False), False,
         "│ text │ about 800 + 2,000 tokens │ to train and to validate on, by its size: counted once it is tokenised │"),
    ],
)  # fmt: skip
def test_how_exactly_the_text_is_known_is_said(wide, capsys, text, ready, row):
    compress._show_choices(Plan(Source("m", SMALL_SHAPE, text, ready, (), {}), [], [], Choices()))
    assert row in said(capsys)
