"""Reports: a page that validates and asks for nothing, lineage by digests, cost by processes, and what is refused."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import html5lib
import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron import launcher
from minitron_megatron.checkpoints.folder import SHAPE_FILE, output_folder, read_manifest
from minitron_megatron.cli import spelling
from minitron_megatron.config import (
    BudgetConfig,
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    LayersConfig,
    LoggerConfig,
    OptimConfig,
    PruneConfig,
    ReportConfig,
    SearchConfig,
    SpaceConfig,
    TargetConfig,
    TrainerConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.report import folders
from minitron_megatron.report.folders import find
from minitron_megatron.report.lineage import trace
from minitron_megatron.report.models import _caption, results_section, student, throughput_section
from minitron_megatron.report.page import Figure, Section, Table, write_page
from minitron_megatron.report.report import report
from minitron_megatron.report.training import process_seconds, recipe_section, unfinished_section
from minitron_megatron.report.trials import find_trials, trial_section
from tests.tiny import data_folder, data_option, hf_model, imported, model_option


def distilled(words: list[str], cfg: DistillConfig) -> None:
    """In a process of the pool, as if typed."""
    from minitron_megatron.train.distill import distill

    spelling.TYPED[:] = words
    distill(cfg)


@pytest.fixture(scope="module")
def chain(gloo, tmp_path_factory):
    """The folder of a whole chain: model, data, scores, layers, found, pruned, run, and an evaluation of each model."""
    from minitron_megatron.evaluate.evaluate import evaluate
    from minitron_megatron.importance.measure import measure_importance
    from minitron_megatron.layer_analysis import analyse_layers
    from minitron_megatron.prune.prune import prune_model
    from minitron_megatron.search.search import search_shapes

    root = tmp_path_factory.mktemp("chain")
    model = imported(hf_model(0), root)
    data = data_folder(root, model)
    teacher, text = model_option(model), data_option(data)

    def done(command, config_class, name: str, **options) -> None:
        config = config_class(output=str(root / name), **options)
        words = [f"{key}={value}" for key, value in options.items() if isinstance(value, str)]
        typed = [f"/anywhere/launch/{command.__name__}.py", *words, f"output={root / name}"]
        if command is distilled:
            assert gloo(1, distilled, typed, config) == [None]
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spelling, "TYPED", typed)
            command(config)

    scores = str(root / "scores")
    done(measure_importance, ImportanceConfig, "scores", model=teacher, data=text, samples=4)
    done(analyse_layers, LayersConfig, "layers", model=teacher, data=text, samples=2)
    space = SpaceConfig(multiple=4, tensor=1)
    budget = BudgetConfig(parameters=30e3)
    done(search_shapes, SearchConfig, "found", model=teacher, scores=scores, budget=budget, space=space)
    best = yaml.safe_load((root / "found/targets/rank_01.yaml").read_text())
    done(prune_model, PruneConfig, "pruned", model=teacher, scores=scores, target=TargetConfig(**best))
    done(
        distilled,
        DistillConfig,
        "run",
        teacher=teacher,
        student=model_option(root / "pruned"),
        data=text,
        trainer=TrainerConfig(steps=4, global_batch_size=4, validation_samples=4),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
        logger=LoggerConfig(wandb="disabled"),
    )
    for name in ("model", "pruned", "run"):
        done(evaluate, EvaluateConfig, f"evaluated/{name}", model=model_option(root / name), data=text, samples=4)
    return root


@pytest.fixture(scope="module")
def written(chain, tmp_path_factory):
    """Folder with the report of the chain."""
    output = tmp_path_factory.mktemp("report") / "out"
    report(ReportConfig(folders=str(chain), output=str(output)))
    return output


def test_the_page_validates_and_asks_for_nothing(written):
    page = (written / "report.html").read_text()
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse(page)
    elements = [one for one in tree.iter() if isinstance(one.tag, str)]
    ids = [one.get("id") for one in elements if one.get("id")]
    assert len(ids) == len(set(ids))
    for one in elements:
        assert one.tag not in ("script", "link", "iframe", "object", "base"), one.tag
        for name, value in one.attrib.items():
            if str(name).rpartition("}")[2] in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("#") or value.startswith("data:image/png;base64,"), value
            assert all(target in ids for target in re.findall(r"url\(#(.*?)\)", value)), value
    assert not re.search(r"@import|url\((?!#)", page)
    drawings = [one for one in elements if one.tag.endswith("svg")]
    assert len(drawings) > 12 and all(one[0].tag.endswith("title") and one[0].text for one in drawings)
    tables = [one for one in elements if one.tag == "table"]
    assert all(
        one.findall("./thead/tr/th[@scope='col']") and one.findall("./tbody/tr/th[@scope='row']") for one in tables
    )


def test_the_report_says_what_the_folders_say(chain, written):
    page, card = ((written / name).read_text() for name in ("report.html", "report.md"))
    folders = find([str(chain)])[0]
    assert {one.name for one in folders} >= {"model", "data", "scores", "layers", "found", "pruned", "run"}
    for text in (page, card):
        assert all(one.digest in text for one in folders)
        for name in ("model", "pruned", "run"):
            figures = json.loads((chain / "evaluated" / name / "results.json").read_text())
            assert f"{figures['perplexity']:,.4g}" in text and f"{figures['loss']:,.4g}" in text
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        *("Models", "Results", "Recipe", "Training of run", "Candidates: found", "What was cut: pruned"),
        *("Importance: scores", "layers: Single layers", "Cost", "Lineage", "Commands"),
    ]
    assert re.findall(r"^## (.*)$", card, re.M) == ["Models", "Results", "Recipe", "Cost", "Lineage", "Commands"]
    commands = re.search(r"```\n(.*?)```", card, re.S)[1]
    assert commands.index("launch/search_shapes.py") < commands.index("launch/prune_model.py")
    assert commands.index("launch/prune_model.py") < commands.index("launch/distilled.py")
    assert "/anywhere" not in commands


def test_lineage_is_by_digest_wherever_folders_are(chain):
    lineage = trace(find([str(chain)])[0])
    made_from = {name: {o: one.name for o, one in found.items()} for name, found in lineage.made_from.items()}
    assert made_from["run"] == {"teacher": "model", "student": "pruned", "data": "data"}
    assert made_from["evaluated/run"] == {"model": "run", "data": "data"}
    assert made_from["found"] == {"model": "model", "scores": "scores"}
    assert made_from["pruned"] == {"model": "model", "scores": "scores"} and not lineage.by_path["pruned"]
    order = [one.name for one in lineage.folders]
    for name, sources in made_from.items():
        assert all(order.index(source) < order.index(name) for source in sources.values())
    run = next(one for one in lineage.folders if one.name == "run")
    assert lineage.origin(run).name == "model"


def made(path: Path, files: dict[str, str], *, inputs=None, config=None, results=None, command="launch/x.py") -> Path:
    """An output folder by the writer of all of them."""
    with output_folder(path, command=command, config=config or {}, inputs=inputs or {}, resume=True) as out:
        for name, text in files.items():
            (out.path / name).write_text(text)
        out.results = results or {}
    return path


def test_time_is_that_of_all_processes(tmp_path):
    """A run logged every second step, continued on twice as many: 2 · 2 · 10 s on 2 processes, then 2 · 5 s on 4."""
    of_all = {"loss": 1.0, "tokens": 8, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second_per_gpu": 0.4}
    lines = [
        {**of_all, "step": step, "step_seconds": seconds, "tokens_per_second": 8 / seconds}
        for step, seconds in ((2, 10.0), (4, 10.0), (6, 5.0))
    ]
    made(tmp_path / "run" / "model", {"x": ""}, results={"tokens": 48})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made(tmp_path / "other", {"x": ""})
    run, other = sorted(find([str(tmp_path)])[0], key=lambda one: one.name, reverse=True)
    assert run.name == "run" and process_seconds(run) == pytest.approx(120)
    manifest = read_manifest(tmp_path / "other")
    assert process_seconds(other) == manifest["seconds"] * manifest["processes"] and other.device == "cpu"
    of_three = replace(other, manifest={**manifest, "processes": 3, "seconds": 7.0})
    assert (
        process_seconds(of_three) == 21
        and process_seconds(replace(other, manifest={"seconds": 7.0, "results": {}})) is None
    )


def test_published_figures_stand_beside_models_of_those_sizes(tmp_path):
    for name in ("llama3_1_8b", "llama3_1_minitron_4b_width"):
        made(tmp_path / name, {SHAPE_FILE: (CONF / "model" / f"{name}.yaml").read_text()})
        tasks = {
            "winogrande": {"acc": 0.701, "acc_stderr": 0.012, "fewshot": 0, "questions": 9},
            "hellaswag": {"acc_norm": 0.5, "fewshot": 10},
        }
        digest = read_manifest(tmp_path / name)["digest"]
        made(tmp_path / f"of_{name}", {"results.json": json.dumps({"tasks": tasks})}, inputs={"model": digest})
    measured, published = results_section(trace(find([str(tmp_path)])[0])).tables
    assert ["winogrande, acc (0)", "0.701 ± 0.012", "0.701 ± 0.012"] in [row[:3] for row in measured.rows]
    by_task = {row[0]: dict(zip(published.columns, row, strict=True)) for row in published.rows}
    assert (
        by_task["winogrande (5)"]["llama3_1_8b"] == "70.1 with 0" and by_task["hellaswag (10)"]["llama3_1_8b"] == "50.0"
    )
    assert by_task["winogrande (5)"]["Llama-3.1-Minitron 4B width, published"] == "73.5"
    assert (
        "Llama-3.1-Minitron 4B depth, published" in published.columns
        and "Minitron 4B, published" not in published.columns
    )


def test_candidates_that_were_tried_and_throughput_are_shown_as_their_commands_write_them(tmp_path):
    shape = (CONF / "model" / "smollm2_135m.yaml").read_text()
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
    kl = {1: {"10": 0.5, "20": 0.4}, 3: {"10": 0.3, "20": 0.2}, 2: {"10": 0.9}}
    candidates = [
        {
            "place": place,
            "rank": rank,
            **sizes,
            "parameters": 100 + rank,
            "predicted_loss": rank / 10,
            "validation_kl": kl[rank],
        }
        for place, rank in enumerate((3, 1, 2), start=1)
    ]
    found = {
        "rungs": [10, 20],
        "steps_run": 50,
        "steps_of_all": 60,
        "saving": 10 / 60,
        "rank_correlation_with_prediction": {"10": -0.5, "20": None},
    }
    tried = tmp_path / "tried"
    for rank in (1, 2, 3):
        made(
            tried / "candidates" / f"rank_{rank:02d}" / "distilled" / "model",
            {SHAPE_FILE: shape},
            inputs={"student": str(rank)},
        )
    (tried / "settings.json").write_text("{}")
    (tried / "results.json").write_text(json.dumps({**found, "winner": {"rank": 3}, "candidates": candidates}))
    rows = [
        {"model": "a", "engine": "vllm", "batch": 8, "tokens_per_second": 1234.5, "ratio": 1.0},
        {
            "model": "b",
            "engine": "vllm",
            "batch": 8,
            "tokens_per_second": None,
            "ratio": None,
            "error": "out of memory",
        },
    ]
    made(tmp_path / "rates", {"results.json": json.dumps(rows)})
    given = [str(tmp_path)]
    lineage, trials = trace(find(given)[0]), find_trials(given)
    assert student(lineage, trials).name == "tried/candidates/rank_03/distilled/model"
    (table,) = trial_section(trials[0]).tables
    assert [row[:2] + row[-2:] for row in table.rows] == [
        ["1", "3", "0.3000", "0.2000"],
        ["2", "1", "0.5000", "0.4000"],
        ["3", "2", "0.9000", "–"],
    ]
    assert "after step 10: -0.50" in trial_section(trials[0]).text
    section = throughput_section(lineage)
    assert [
        dict(zip(section.tables[0].columns, row, strict=True))["tokens per second"] for row in section.tables[0].rows
    ] == [
        "1234.5",
        "–",
    ]
    (tried / "results.json").write_text('{"candidates": []}')
    with pytest.raises(UserError, match=r"results.json is damaged"):
        find_trials(given)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, caplog):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)  # root may list everything
    assert [where for where, _, _ in folders.walk(tmp_path)] == [tmp_path]
    assert "locked is left out: it cannot be listed (Permission denied)" in caplog.text


def test_a_file_is_written_again_but_nobody_elses(chain, tmp_path):
    page = tmp_path / "page.html"
    for _ in range(2):
        report(ReportConfig(folders=[str(chain / "data"), str(chain / "pruned")], output=str(page)))
    assert "What was cut: pruned" in page.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    page.write_text("<p>mine</p>")
    with pytest.raises(UserError, match=r"page.html exists and is not a report"):
        report(ReportConfig(folders=str(chain), output=str(page)))
    assert page.read_text() == "<p>mine</p>"


def test_what_cannot_be_reported_is_refused(chain, written, tmp_path):
    def refused(*folders: Path, says: str) -> None:
        with pytest.raises(UserError, match=says) as error:
            report(ReportConfig(folders=[str(one) for one in folders], output=str(tmp_path / "out")))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", says="does not exist")
    refused(chain, tmp_path / "empty", says="no folder in it has a manifest")
    refused(written, says="only reports")
    for damage, says in (("command: [", "cannot be read"), ("digest: sha256:0\nfiles: {}\n", "command is missing")):
        folder = made(tmp_path / f"damaged{len(says)}", {"x": ""})
        (folder / "manifest.yaml").write_text(damage)
        refused(chain, folder, says=says)
    folder = made(tmp_path / "found", {"candidates.yaml": "candidates: 3\n"})
    refused(folder, says=r"candidates.yaml is damaged")
    made(tmp_path / "run" / "model", {"x": ""})
    for line in ('{"st', '{"step": 2, "loss": 1.0}', "3"):
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n' + line)
        refused(tmp_path / "run", says=r"metrics.jsonl, line 2 is damaged")
    folder = made(tmp_path / "judged", {"results.json": '{"loss": 1.0, "tasks": {"a": 1}}'}, inputs={"model": "x"})
    refused(folder, says=r"results.json is damaged")


SMALL = yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text())


def model_of(root: Path, name: str, layers: int, **inputs: str) -> str:
    """A model folder of so many layers; gives its digest."""
    folder = made(root / name, {SHAPE_FILE: yaml.safe_dump({**SMALL, "num_layers": layers})}, inputs=inputs)
    return read_manifest(folder)["digest"]


@pytest.fixture
def rounds(tmp_path):
    """Two rounds: 30 layers to 24 and on to 18, each round's student taught by its source."""
    first = model_of(tmp_path, "teacher", 30)
    pruned = model_of(tmp_path, "one/pruned", 24, model=first, plan="sha256:1")
    second = model_of(tmp_path, "one/distilled", 23, teacher=first, student=pruned)
    again = model_of(tmp_path, "two/pruned", 18, model=second, plan="sha256:2")
    last = model_of(tmp_path, "two/distilled", 17, teacher=second, student=again)
    return tmp_path, {"first": first, "second": second, "last": last}


def page_of(root: Path, **options) -> str:
    report(ReportConfig(folders=str(root), output=str(root / "page.html"), **options))
    return (root / "page.html").read_text()


def heading(page: str) -> tuple[str, str]:
    return re.search(r"<h1>(.*?)</h1>", page)[1], re.search(r'<p class="lead">(.*?)</p>', page, re.S)[1]


def test_a_page_is_about_the_last_student_beside_the_root_of_its_lineage(rounds):
    root, _ = rounds

    def share(student: int, teacher: int) -> str:
        count = [count_parameters(ModelShape.from_dict({**SMALL, "num_layers": n}, "")) for n in (student, teacher)]
        return f"{100 * count[0] / count[1]:.0f} %"

    assert heading(page_of(root))[0] == f"two/distilled: {share(17, 30)} of teacher"
    for given in ("one/distilled", str(root / "one" / "distilled")):
        assert heading(page_of(root, student=given))[0] == f"one/distilled: {share(23, 30)} of teacher"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"folders={root}", f"output={root / 'page.html'}", "student=one/distilled"]
        report(launcher.compose("report", words))
    assert heading((root / "page.html").read_text())[0].startswith("one/distilled: ")
    with pytest.raises(UserError, match=r"student=three is no model of folders=: give one of .*two/distilled"):
        page_of(root, student="three")


def evaluated(root: Path, name: str, values: dict, *, data: str = "sha256:d", **inputs: str) -> None:
    made(root / name, {"results.json": json.dumps(values)}, inputs={**inputs, "data": data})


def test_the_opening_sentence_has_size_quality_speed_and_cost(rounds):
    root, digests = rounds
    said = heading(page_of(root))[1]
    assert "of the 134,515,008 of teacher" in said
    assert "its quality was not measured (evaluate does it)" in said
    assert "its speed was not measured (throughput does it)" in said and "of cpu processes" in said
    # An export stands for the model that it is of.
    export = made(root / "hf", {"config.json": "{}"}, inputs={"model": digests["last"]}, config={"max_shard_gb": 5.0})
    rates = [
        {"model": name, "engine": "vllm", "batch": batch, "tokens_per_second": rate}
        for name, batch, rate in (("t", 1, 50.0), ("t", 8, 100.0), ("s", 1, 90.0), ("s", 8, 150.0))
    ]
    inputs = {"0 t": digests["first"], "1 s": read_manifest(export)["digest"]}
    made(root / "rates", {"results.json": json.dumps(rates)}, inputs=inputs)
    beside = {"loss": 3.0, "perplexity": 20.1, "teacher_loss": 2.5, "teacher_perplexity": 12.2, "kl": 0.5}
    evaluated(root, "judged", beside, model=digests["last"], teacher=digests["first"])
    said = heading(page_of(root))[1]
    assert "perplexity 20.1, where teacher has 12.2" in said and "1.50 times as many tokens a second (vllm)" in said


@pytest.mark.parametrize("measured", ["beside", "alone", "not"])
def test_the_teacher_stands_beside_the_student_in_every_table_of_quality(rounds, measured):
    root, digests = rounds
    beside = {"teacher_loss": 2.5, "teacher_perplexity": 12.18} if measured == "beside" else {}
    inputs = {"teacher": digests["first"]} if measured == "beside" else {}
    evaluated(root, "judged", {"loss": 3.0, "perplexity": 20.09, "kl": 0.5, **beside}, model=digests["last"], **inputs)
    if measured == "alone":
        evaluated(root, "judged_teacher", {"loss": 2.5, "perplexity": 12.18}, model=digests["first"])
    lineage = trace(find([str(root)])[0])
    (table,) = results_section(lineage, student(lineage)).tables
    assert table.columns == ["", "teacher", "two/distilled", "two/distilled over teacher"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["perplexity"] == (["–", "20.09", "–"] if measured == "not" else ["12.18", "20.09", "1.65×"])
    assert rows["KL from the teacher"] == ["–", "0.5", "–"] and not any("teacher_" in name for name in rows)


def test_a_report_is_made_anew_and_replaces_nothing_but_a_report(rounds):
    root, digests = rounds
    output = root / "report"
    report(ReportConfig(folders=str(root), output=str(output)))
    evaluated(root, "judged", {"loss": 3.0, "perplexity": 20.09}, model=digests["last"])
    for _ in range(2):
        report(ReportConfig(folders=str(root), output=str(output), title="Anew"))
        assert "20.09" in (output / "report.html").read_text() and "Anew" in (output / "report.md").read_text()
        assert not [one for one in root.iterdir() if one.name.startswith(".")]
    with pytest.raises(UserError, match="exists and resume=false"):
        report(ReportConfig(folders=str(root), output=str(output), resume=False))
    for other, says in ((root / "judged", "is not a report"), (root / "one", "is not one of our folders")):
        before = sorted(other.rglob("*"))
        with pytest.raises(UserError, match=says):
            report(ReportConfig(folders=str(root), output=str(other)))
        assert sorted(other.rglob("*")) == before


def unfinished(folder: Path, lines: str, **files: str) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    config = {"trainer": {"steps": None, "tokens": 1000, "global_batch_size": 4}, "data": {"sequence_length": 10}}
    for name, text in {"config.yaml": yaml.safe_dump(config), "metrics.jsonl": lines, **files}.items():
        (folder / name).write_text(text)


def test_runs_that_have_not_ended_are_shown_as_such(rounds):
    root, _ = rounds
    step = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 40, "step_seconds": 1.0, "skipped": 3}
    lines = "".join(json.dumps({**step, "step": n}) + "\n" for n in (1, 2))
    starts = {"starts.jsonl": "".join(f'{{"step": {step}, "command": "x"}}\n' for step in (0, 1, 1))}
    unfinished(root / "trains", lines + '{"step": 3, "lo', **starts)
    unfinished(root / "spiked", lines, **{"diverged.txt": "10 steps <in> a row\n"})
    page = page_of(root)
    assert "<h2>Runs that have not ended</h2>" in page and "10 steps &lt;in&gt; a row" in page
    (table,) = unfinished_section(find([str(root)])[1]).tables
    assert table.rows == [
        ["spiked", "2 of 25", "2", "3", "–", "10 steps <in> a row"],
        ["trains", "2 of 25", "2", "3", "2", "trains, or was stopped: the same command continues it"],
    ]
    # Alone they make a page, too.
    assert "Runs that have not ended" in page_of(root / "trains")


def test_restarts_and_skipped_steps_are_said_where_there_were_none_too(rounds):
    root, digests = rounds
    for name, starts, skipped in (("once", 1, 0), ("often", 3, 2)):
        folder = root / name / "model"
        results = {"steps": 20, "tokens": 800, "skipped": skipped}
        made(folder, {SHAPE_FILE: yaml.safe_dump(SMALL)}, inputs={"teacher": digests["first"]}, results=results)
        (root / name / "metrics.jsonl").write_text("")
        (root / name / "starts.jsonl").write_text('{"step": 0, "command": "x"}\n' * starts)
    (table,) = recipe_section(trace(find([str(root)])[0])).tables
    rows = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    assert rows["skipped steps"] == {"once": "0", "often": "2"} and rows["restarts"] == {"once": "0", "often": "2"}


def test_rates_are_shown_as_a_run_reached_them(rounds):
    root, digests = rounds
    optim = {"lr": 1e-3, "min_lr": 1e-5, "schedule": "cosine", "warmup_steps": 40}
    config = {"optim": optim, "trainer": {"global_batch_size": 4}, "data": {"sequence_length": 10}}
    for name, steps in (("short", 20), ("long", 400)):
        results = {"steps": steps, "tokens": 40 * steps, "skipped": 0}
        files = {SHAPE_FILE: yaml.safe_dump(SMALL)}
        made(root / name / "model", files, inputs={"teacher": digests["first"]}, results=results, config=config)
        (root / name / "metrics.jsonl").write_text("")
    (table,) = recipe_section(trace(find([str(root)])[0])).tables
    rows = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    assert rows["warm-up steps"] == {"short": "20 (asked: 40)", "long": "40"}
    assert rows["peak learning rate"] == {"short": "0.0005 (asked: 0.001)", "long": "0.001"}
    assert rows["learning rate at the end"] == {"short": "0.0005 (asked: 1e-05)", "long": "1e-05"}


def test_columns_of_numbers_stand_to_the_right():
    rows = [["a", "1,024", "12.5 %", "0.7 ± 0.1", "9/3"], ["b", "–", "1.2×", "−3e-05", "30 × 2"]]
    assert Table(["", "x", "y", "z", "w"], rows).classes == ["short", "number", "number", "number", "short"]


def test_of_equal_folders_the_one_that_was_named_is_the_source(tmp_path):
    for place in ("a", "b"):
        teacher = made(
            tmp_path / place / "teacher", {"x": "same"}, config={"output": str(tmp_path / place / "teacher")}
        )
        inputs = {"teacher": read_manifest(teacher)["digest"]}
        made(tmp_path / place / "judged", {"y": place}, inputs=inputs, config={"teacher": {"path": str(teacher)}})
    lineage = trace(find([str(tmp_path)])[0])
    assert {n: s["teacher"].name for n, s in lineage.made_from.items() if s} == {
        "a/judged": "a/teacher",
        "b/judged": "b/teacher",
    }


def test_what_was_measured_is_said_and_not_what_was_asked_for(rounds):
    root, digests = rounds
    evaluated(root, "few", {"loss": 3.0, "tokens": 8500, "windows": 17}, model=digests["last"], data="d")
    found = next(one for one in find([str(root)])[0] if one.name == "few")
    asked = {"data": {"path": "d", "sequence_length": 512}, "samples": 64}
    folder = replace(found, manifest={**found.manifest, "config": asked})
    assert "8,500 tokens in 17 windows of at most 512" in _caption(trace([folder]), folder)


def test_a_run_takes_what_its_starts_took(tmp_path):
    """A start of 30 s on 2 processes, and the last one as its manifest says."""
    of_all = {"loss": 1.0, "tokens": 8, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second_per_gpu": 1.0}
    lines = [
        {**of_all, "step": step, "step_seconds": 1.0, "tokens_per_second": 2.0, "run_seconds": seconds}
        for step, seconds in ((1, 10.0), (2, 30.0), (3, 5.0))
    ]
    made(tmp_path / "run" / "model", {"x": ""}, results={"tokens": 24})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((run,), _) = find([str(tmp_path)])
    assert process_seconds(run) == pytest.approx(60 + run.manifest["seconds"])


def test_the_page_allows_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.split("; ")[0] == "default-src 'none'" and "http" not in policy and "*" not in policy


def test_a_page_has_all_of_its_sections_and_no_empty_parts(tmp_path):
    """Text, tables, plots and commands, each where it is given; links to sections where there are more than two."""
    table = Table(["row", "n"], [["a", "1"], ["b", "2"]], "counts")
    full = Section("Full", "a text", [table], [Figure("a plot", "<svg><g/></svg>")], ["one", "two --x"])
    seen = []
    for sections in ([full, Section("Empty")], [full, Section("Empty"), Section("Text", "alone")]):
        write_page(tmp_path / "page.html", "T", "S", sections)
        seen.append((tmp_path / "page.html").read_text())
    for page, links in zip(seen, (0, 3), strict=True):
        assert page.count("<li><a href=") == links and page.count("<nav") == (links > 0)
        assert page.count("<p>a text</p>") == 1 and page.count("<p>alone</p>") == (links > 0)
        assert "<p></p>" not in page and page.count('<div class="plots">') == 1 == page.count("<figure")
        assert "<pre>one\ntwo --x\n</pre>" in page and page.count("<pre>") == 1
        assert page.count("<caption>counts</caption>") == 1 and page.count('<th scope="col"') == 2
        rows = re.findall(r"<tr>(<t[hd].*?)</tr>", page)[1:]
        assert [re.findall(r">([^<]+)</(t[hd])>", row) for row in rows] == [
            [("a", "th"), ("1", "td")], [("b", "th"), ("2", "td")],
        ]  # fmt: skip
