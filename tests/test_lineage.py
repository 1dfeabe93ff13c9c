"""Who was made from whom, and which folders a report is about: by digests, by paths, in order, and as they are drawn."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minitron_megatron.errors import UserError
from minitron_megatron.report import folders, trials
from minitron_megatron.report.folders import _checked, _names, _unfinished, find, read_metrics, walk
from minitron_megatron.report.lineage import _command, _drawing, commands_section, lineage_section, short
from tests.report_folders import folder, traced
from tests.test_bounds import SMALL_SHAPE


def sources(lineage) -> dict[str, dict[str, str]]:
    return {name: {o: one.name for o, one in found.items()} for name, found in lineage.made_from.items() if found}


def at(name: str, where: str, command: str = "", **more):
    """A folder with its output as its command called it."""
    made = f"python launch/x.py {command}".strip()
    return folder(name, command=made, **{"config": {"output": where, **more.pop("config", {})}, **more})


def test_what_no_digest_says_a_path_of_the_command_does():
    hf, model, data = (
        at("hf", "o/hf"),
        at("model", "o/model", "hf=o/hf/sub", inputs={"hf": "sha256:1"}),
        at("data", "o/data"),
    )
    other = at("other", "o/hf2")
    begun = at("begun", "o/begun", "model.path=o/model data.path=[0.5,o/data,0.5,o/other/x] trainer.start_from=o/other/y",
               inputs={"model": "sha256:not here", "start_from": "z"})  # fmt: skip
    more = at("more", "o/more", "model=nothing output=o/data/x scores=o/scores -x=o/model teacher=o/hf2")
    there = traced(hf, model, data, at("two", "o/other"), other, begun, more)
    assert sources(there) == {
        "model": {"hf": "hf"},
        "begun": {"data 2": "data", "data 4": "two", "start_from": "two"},
        "more": {"teacher": "other"},
    }
    assert there.by_path == {
        **{name: set() for name in ("hf", "data", "two", "other")},
        "model": {"hf"}, "begun": {"data 2", "data 4", "start_from"}, "more": {"teacher"},
    }  # fmt: skip
    # A path that is two folders', or one's own, says nothing; a digest goes over a path.
    twice = traced(at("a", "o/a"), at("b", "o/a", digest="x"), at("c", "o/c", "model=o/a plan=o/c/x"))
    assert sources(twice) == {}
    both = traced(at("a", "o/a"), at("b", "o/b"), at("c", "o/c", "hf=o/a", inputs={"hf": "of b"}))
    assert sources(both) == {"c": {"hf": "b"}} and both.by_path["c"] == set()


def test_of_equal_folders_the_nearest_that_was_named_counts_and_else_the_oldest():
    equal = [
        folder(name, digest="same", made=made, config={"output": "teacher"})
        for name, made in (("b/teacher", "2"), ("a/teacher", "1"))
    ]
    a, b = (
        folder(f"{place}/judged", inputs={"model": "same"}, config={"model": {"path": "teacher"}}, made="3")
        for place in "ab"
    )
    assert sources(traced(*equal, a, b)) == {"a/judged": {"model": "a/teacher"}, "b/judged": {"model": "b/teacher"}}
    for given in (None, "elsewhere", {"path": "elsewhere"}, {"path": None}, 3):
        one = folder("b/judged", inputs={"model": "same"}, config={"model": given}, made="3")
        assert sources(traced(*equal, one)) == {"b/judged": {"model": "a/teacher"}}
    same = folder("b/judged", inputs={"model": "same"}, config={"model": "teacher"}, made="3")
    assert sources(traced(*equal, same)) == {"b/judged": {"model": "b/teacher"}}
    # What is made of itself is made of nothing.
    assert sources(traced(folder("x", digest="d", inputs={"model": "d"}))) == {}


def test_folders_are_after_what_they_were_made_from_and_else_in_the_order_they_were_made():
    names = [
        ("late", "9", {}),
        ("c", "3", {"model": "of late"}),
        ("a", "1", {}),
        ("b", "1", {}),
        ("d", "2", {"x": "of a"}),
    ]
    made = [folder(name, made=when, inputs=inputs) for name, when, inputs in names]
    for given in (made, made[::-1]):
        assert [one.name for one in traced(*given).folders] == ["a", "b", "d", "late", "c"]
    # Paths that were used again for something else lead in a circle.
    circle = [at("a", "o/a", "x=o/b", made="2"), at("b", "o/b", "x=o/a", made="1"), at("c", "o/c", made="0")]
    assert [one.name for one in traced(*circle).folders] == ["c", "b", "a"]


def test_sources_origins_and_models():
    teacher, other = folder("teacher", shape=SMALL_SHAPE, made="1"), folder("other", made="2")
    pruned = folder("pruned", shape=SMALL_SHAPE, made="3", inputs={"model": "of teacher", "scores": "of other"})
    run = folder("run", shape=SMALL_SHAPE, made="4", inputs={"student": "of pruned", "model": "of other"})
    hf = folder("hf", made="5", inputs={"model": "of run"})
    imported = folder("imported", shape=SMALL_SHAPE, made="6", inputs={"model": "of other"})
    lineage = traced(teacher, other, pruned, run, hf, imported)
    assert lineage.source(pruned, "scores", "model") is other and lineage.source(pruned, "model", "scores") is teacher
    assert lineage.source(pruned, "student") is None and lineage.source(run, "plan", "student") is pruned
    assert [lineage.origin(one).name for one in (teacher, pruned, run, hf, imported)] == [
        "teacher", "teacher", "teacher", "teacher", "imported",
    ]  # fmt: skip
    assert [one.name for one in lineage.models()] == ["teacher", "pruned", "run", "imported"]


def test_the_table_and_the_drawing_say_where_each_folder_is_from(monkeypatch):
    hf = at("hf", "o/hf", made="1", digest="blake3:" + 20 * "a")
    inputs = {"hf": "sha256:" + 20 * "b", "note": "text", "tokenizer": "blake3:" + 20 * "c"}
    model = at("model", "o/m", "hf=o/hf", made="2", inputs=inputs, digest="d2")
    pruned = at("pruned", "o/p", made="3", inputs={"model": "d2"}, digest="d3")
    run = at("run", "o/r", "z=o/hf", made="4", inputs={"student": "d3", "teacher": "d2"}, digest="d4")
    lineage = traced(hf, model, pruned, run)
    section = lineage_section(lineage)
    assert short("sha256:" + 20 * "b") == "sha256:" + 12 * "b"
    assert section.tables[0].rows == [
        ["hf", "x", "–", "blake3:" + 20 * "a"],
        ["model", "x", f"hf=hf (by path), tokenizer=blake3:{12 * 'c'}", "d2"],
        ["pruned", "x", "model=model", "d3"],
        ["run", "x", "student=pruned, teacher=model, z=hf (by path)", "d4"],
    ]
    # What follows from other arrows is left out; dotted is what a path alone says.
    rows, arrows = _drawing(lineage)
    assert rows == [(name, "x") for name in ("hf", "model", "pruned", "run")]
    assert arrows == [(0, 1, True), (1, 2, False), (2, 3, False)]
    (figure,) = section.figures
    assert section.card and figure.natural and figure.svg.startswith("<svg")
    assert lineage_section(traced(hf)).figures == []
    both = traced(at("a", "o/a", made="1"), at("b", "o/b", "x=o/a", made="2", inputs={"model": "of a"}))
    assert _drawing(both)[1] == [(0, 1, False)]


@pytest.mark.parametrize(
    ("command", "processes", "typed"),
    [
        ("python /a/launch/prune.py model=x output='a b'", 1, "python launch/prune.py model=x 'output=a b'"),
        ("python launch/prune.py", None, "python launch/prune.py"),
        ("minitron prune model=x", 1, "minitron prune model=x"),
        ("minitron prune model=x", 2, "minitron --nproc-per-node 2 prune model=x"),
        ("python launch/prune.py a=prune", 4, "minitron --nproc-per-node 4 prune a=prune"),
        ("other program --x", 4, "other program --x"),
    ],
)
def test_a_command_is_as_a_user_types_it(command, processes, typed):
    one = folder("x", command=command, processes=processes)
    assert _command(one) == typed
    assert (commands_section(traced(one)).commands, commands_section(traced(one)).card) == ([typed], True)


# Folders


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("python /a/launch/prune.py a=1 --b=2 c -d=3 e='f g'", "prune", ["a=1", "e=f g"]),
        ("minitron distill x=1", "distill", ["x=1"]),
        ("minitron", "", []),
        ("python launch/prune.pyc a=1", "", ["a=1"]),
        ("launch/prune.py a=1", "prune", ["a=1"]),
        ("xlaunch/prune.py", "", []),
        ("python launch/prune.py a='b", "prune", ["a='b"]),
    ],
)
def test_a_commands_name_and_words(command, name, words):
    one = folder("x", command=command)
    assert (one.command, one.words) == (name, words)


def test_processes_and_device_are_the_manifests_or_what_metrics_give_away():
    line = {"tokens_per_second": 30.0, "tokens_per_second_per_gpu": 10.0, "step_seconds": 1.0}
    last = {"tokens_per_second": 20.0, "tokens_per_second_per_gpu": 9.9, "step_seconds": 1.0}
    older = folder("x", metrics=[line, last, {"validation_loss": 1.0}])
    assert (older.processes, older.device) == (1, "cpu")
    for key in ("processes", "device"):
        del older.manifest[key]
    for key in ("processes", "device"):
        vars(older).pop(key)
    assert (older.processes, older.device) == (2, "GPU")
    for metrics, processes, device in (
        ([], None, None), ([{**line, "resident_gib": 1.0}], 3, "cpu"), ([line, {**line, "resident_gib": 1.0}], 3, None),
    ):  # fmt: skip
        one = folder("x", metrics=metrics)
        del one.manifest["processes"], one.manifest["device"]
        assert (one.processes, one.device) == (processes, device)


def manifest(path: Path, **more) -> None:
    path.mkdir(parents=True, exist_ok=True)
    own = {"command": "c", "made": "m", "digest": path.name, "files": {}}
    own |= {name: {} for name in ("inputs", "results", "config", "versions")}
    for file in more.get("files", ()):
        (path / file).write_text("x")
    (path / "manifest.yaml").write_text(yaml.safe_dump(own | more))


def test_folders_are_called_by_what_they_do_not_share(tmp_path):
    manifest(tmp_path / "a" / "scores")
    manifest(tmp_path / "a" / "run" / "model")
    (tmp_path / "a" / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    manifest(tmp_path / "a" / "model")
    manifest(tmp_path / "a" / "report", files={"report.html": 1, "report.md": 1})
    manifest(tmp_path / "a" / "page", files={"report.html": 1, "other.md": 1})
    for hidden in ("weights", "checkpoints", "wandb", "tokenizer", "huggingface", ".hidden"):
        manifest(tmp_path / "a" / hidden / "x")
    whole, unfinished = find([str(tmp_path / "a"), str(tmp_path / "a" / "scores")])
    assert [one.name for one in whole] == ["model", "page", "run", "scores"] and unfinished == []
    (run,) = (one for one in whole if one.name == "run")
    assert run.path == (tmp_path / "a" / "run" / "model") and run.metrics == [{"step": 1}]
    (other,) = (one for one in whole if one.name == "scores")
    assert (other.metrics, other.starts, other.shape) == ([], None, None)
    assert _names([tmp_path / "x" / "y"]) == {tmp_path / "x" / "y": "y"}
    assert [where.name for where, _, _ in walk(tmp_path / "a")] == [
        "a",
        "model",
        "page",
        "report",
        "run",
        "model",
        "scores",
    ]


def test_runs_without_a_model_have_begun(tmp_path):
    for name, files in {
        "begun": ("config.yaml", "checkpoints/x"), "no_config": ("checkpoints/x",), "no_checkpoints": ("config.yaml",),
        "whole": ("config.yaml", "checkpoints/x", "model/manifest.yaml"), "part": ("config.yaml", "checkpoints/x", "model/x"),
        "other": ("checkpoints/x",),
    }.items():  # fmt: skip
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("trainer: {steps: 3}\n")
    (tmp_path / "other" / "config.yaml").write_text("trainer: 3\n")
    assert {path.name: config for path, config in _unfinished(tmp_path).items()} == {
        "begun": {"trainer": {"steps": 3}}, "part": {"trainer": {"steps": 3}},
    }  # fmt: skip
    (tmp_path / "begun" / "diverged.txt").write_text("why\nmore\n")
    (tmp_path / "whole" / "model" / "manifest.yaml").unlink()
    runs = find([str(tmp_path)])[1]
    assert [(one.name, one.diverged, list(one.metrics)) for one in runs] == [
        ("begun", "why", []), ("part", None, []), ("whole", None, []),
    ]  # fmt: skip


def test_a_manifest_has_all_that_a_report_reads():
    whole = {"command": "c", "made": "m", "inputs": {}, "results": {}, "config": {}, "versions": {}, "processes": 1}
    assert _checked({**whole, "seconds": 1, "device": None}, Path("p")) and _checked(
        {**whole, "seconds": 1.5}, Path("p")
    )
    for key in ("command", "made", "inputs", "results", "config", "versions"):
        for odd in ({k: v for k, v in whole.items() if k != key}, {**whole, key: 3}):
            with pytest.raises(UserError, match=f"damaged \\({key} is missing or odd\\)"):
                _checked(odd, Path("p"))
    for key, odd in (("processes", "2"), ("processes", 1.5), ("seconds", "1"), ("device", 3)):
        with pytest.raises(UserError, match=f"damaged \\({key} is odd\\)"):
            _checked({**whole, key: odd}, Path("p"))


def test_steps_of_metrics_have_all_their_figures(tmp_path):
    step = {"step": 1, "loss": 1.0, "lr": 1, "grad_norm": 1.0, "tokens": 2, "step_seconds": 1.0}
    file = tmp_path / "metrics.jsonl"
    for lines, fine in (
        ([step, {"step": 1, "validation_loss": 2.0}], True), ([{"validation_loss": 2.0}], False),
        *(([{k: v for k, v in step.items() if k != key}], key == "loss") for key in step),
        *(([{**step, key: "1"}], False) for key in step), *(([{**step, key: None}], False) for key in step),
    ):  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if fine:
            assert read_metrics(file) == lines
        else:
            with pytest.raises(UserError, match="line 1 is damaged"):
                read_metrics(file)


def test_starts_of_a_run_are_those_that_trained(tmp_path):
    starts = (
        {"step": 0, "command": "c"},
        {"step": None, "command": "c"},
        {"command": "c"},
        {"step": 5, "command": "c"},
        {"step": 6},
    )
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in starts))
    assert folders.number_of_starts(tmp_path) == 2 and folders.number_of_starts(tmp_path / "none") is None


# Trials


def test_a_trial_has_the_folders_of_its_candidates(tmp_path):
    trial = trials.Trial(tmp_path / "t", {"winner": {"rank": 3}})
    for path, has, won in (
        ("t/candidates/rank_03/distilled/model", True, True), ("t/candidates/rank_03/pruned", True, True),
        ("t/candidates/rank_13/pruned", True, False), ("t", True, False), ("u/rank_03", False, False),
        ("t2/rank_03", False, False),
    ):  # fmt: skip
        one = SimpleNamespace(path=tmp_path / path)
        assert (trial.has(one), trial.won(one)) == (has, won), path


FOUND = {
    "winner": {"rank": 2}, "rungs": [10, 2000], "steps_run": 5000, "steps_of_all": 6000, "saving": 1 / 6,
    "rank_correlation_with_prediction": {"10": -0.5, "2000": None, "x": 0.123},
    "candidates": [
        {"rank": rank, "place": place, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96 + rank,
         "num_attention_heads": 4, "num_query_groups": 2, "parameters": 1000 + rank, "predicted_loss": rank / 3,
         "validation_kl": kl}
        for place, rank, kl in (
            (1, 2, {"10": 0.5, "2000": 0.25}), (2, 1, {"10": 0.75, "2000": None}), (3, 3, {"10": 0.9})
        )
    ],
}  # fmt: skip


def test_candidates_are_told_with_what_was_saved_and_drawn_in_their_orders(monkeypatch):
    table = trials.trial_table(FOUND)
    assert table.rows == [
        ["1", "2", "2 × 64 × 98", "4/2", "1,002", "0.6667", "0.5000", "0.2500"],
        ["2", "1", "2 × 64 × 97", "4/2", "1,001", "0.3333", "0.7500", "diverged"],
        ["3", "3", "2 × 64 × 99", "4/2", "1,003", "1.0000", "0.9000", "–"],
    ]
    assert table.columns[-2:] == ["KL, step 10", "KL, step 2000"]
    assert trials.trial_sentences(FOUND) == [
        "5,000 steps rather than the 6,000 of all 3 candidates to the end: 17% less.",
        "Rank correlation of the predicted damage with the KL after step 10: -0.50.",
        "Rank correlation of the predicted damage with the KL after step x: 0.12.",
    ]
    for name in ("rankings", "curves_by_name"):
        monkeypatch.setattr(trials.plots, name, lambda *given: given)
    one, two, three = (f"2 × 64 × {96 + rank}, 4/2" for rank in (1, 2, 3))
    assert trials.trial_plots(FOUND) == {
        "rankings": ([one, two, three], [two, one, three]),
        "kl": ({two: {10: 0.5, 2000: 0.25}, one: {10: 0.75}, three: {10: 0.9}}, "validation KL (nats a token)"),
    }


def test_a_trial_is_finished_and_its_results_are_whole(tmp_path):
    def write(name: str, results: object, *more: str) -> Path:
        for file in ("settings.json", *more):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    write("whole", FOUND)
    write("a_folder_of_ours", FOUND, "manifest.yaml")
    (write("unfinished", FOUND) / "results.json").unlink()
    (write("no_settings", FOUND) / "settings.json").unlink()
    found = trials.find_trials([str(tmp_path), str(tmp_path / "whole")])
    assert [one.path.name for one in found] == ["whole"] and found[0].digest.startswith("sha256:")
    no_kl = [{**FOUND["candidates"][0], "validation_kl": {}}, *FOUND["candidates"][1:]]
    for odd in ({**FOUND, "winner": {"rank": 9}}, {**FOUND, "candidates": no_kl}, {**FOUND, "candidates": 3}, [], {}):
        write("whole", odd)
        with pytest.raises(
            UserError, match=r"results.json is damaged \(.*\): remove it and run distill_candidates again"
        ):
            trials.find_trials([str(tmp_path)])
    with pytest.raises(UserError, match="is damaged"):
        trials.trial_section(trials.Trial(tmp_path / "whole", {k: v for k, v in FOUND.items() if k != "saving"}))
