"""Two spellings of one path are one value, wherever an output or a run is compared with options."""

import contextlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from minitron_megatron.asked import STARTED_IN, Asked, as_spelt_now
from minitron_megatron.changing import free_options
from minitron_megatron.checkpoints.folder import MANIFEST, check_output, output_folder
from minitron_megatron.checkpoints.unfinished import partial_folder
from minitron_megatron.config import DistillConfig, PrepareDataConfig, SubmitConfig
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.search.found import read_search
from minitron_megatron.stages import Stages
from minitron_megatron.train import saved
from minitron_megatron.train.begin import write_beginning
from minitron_megatron.train.checks import check_run_folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder, with another one in it."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spellings(here: Path, name: str) -> list[tuple[Path, str]]:
    """A working folder and a word for one and the same path."""
    return [
        (here, f"{here}/{name}"), (here, f"./{name}"), (here, f"{name}/"), (here, f"below/../{name}"),
        (here / "below", f"../{name}"),
    ]  # fmt: skip


OPTIONS = {
    "model.path": lambda word: {"model": {"path": word}},
    "data.path": lambda word: {"data": {"path": [0.5, word, 0.5, "b"]}},
    "models": lambda word: {"models": {"teacher": word}},
    "distill.data.path of a chain": lambda word: {"distill": {"data.path": word}},
    "output": lambda word: {"output": word},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_output_is_found_by_every_spelling(here, monkeypatch, option):
    config = OPTIONS[option]
    place = str(here / "out")
    with output_folder(place, command="x", config=config("m"), inputs={"file t.txt": "1"}, resume=True):
        pass
    assert yaml.safe_load((here / "out" / MANIFEST).read_text())[STARTED_IN] == str(here)
    for folder, word in spellings(here, "m"):
        if option == "data.path" and folder != here:
            continue  # its other folder is another one there
        monkeypatch.chdir(folder)
        asked = {"config": config(word), "inputs": {f"file {here}/t.txt": "1"}, "resume": True}
        check_output(place, **asked)
        with output_folder(place, command="x", **asked) as out:
            assert out.done
    monkeypatch.chdir(here)
    for word in (f"{here}/n", "below/m"):
        with pytest.raises(UserError, match="made with other options or inputs"):
            check_output(place, config=config(word), inputs={}, resume=True)
    other = {f"file {here}/t.txt": "2"}
    with pytest.raises(UserError, match=r"changed since"):
        check_output(place, config=config("m"), inputs=other, resume=True)


def test_the_same_words_in_a_folder_that_was_moved_are_the_same(here, monkeypatch):
    with output_folder("out", command="x", config={"model": {"path": "m"}}, inputs={}, resume=True):
        pass
    moved = here.rename(here.with_name("moved"))
    monkeypatch.chdir(moved)
    check_output("out", config={"model": {"path": "m"}}, inputs={}, resume=True)


def test_what_is_no_path_is_compared_as_it_is(here):
    options = {"text_key": "a/./b", "special_tokens": f"{here}/x", "samples": 1}
    now = {"text_key": "a/b", "special_tokens": "x", "samples": 1}
    assert as_spelt_now(options, str(here), now) == options


@pytest.mark.parametrize("where", [None, 3, ["a"]])
def test_a_record_that_does_not_say_where_is_read_all_the_same(where):
    record = {STARTED_IN: where, "config": {"model": {"path": "./m"}}, "inputs": None}
    now = Asked.now({"model": {"path": "m"}}, {}, frozenset())
    assert Asked.read(record, frozenset()).as_spelt_in(now).fingerprint() == now.fingerprint()


@pytest.mark.parametrize("mark", ["{", "[]", "0" * 64, None])
def test_what_a_killed_run_left_is_continued_by_every_spelling_and_by_nothing_else(here, mark):
    place, free = here / "out", free_options(PrepareDataConfig)

    def start(word: str) -> bool:
        """Whether there is something to continue; then killed again."""
        config = resolved_config(PrepareDataConfig(output=str(place), input=[word]))
        with (
            contextlib.suppress(KeyboardInterrupt),
            output_folder(
                place, command="x", config=config, inputs={word: "1"}, resume=True, free=free, continues=True
            ) as out,
        ):
            there = (out.path / "part").exists()
            (out.path / "part").touch()
            out.keep = True
            raise KeyboardInterrupt
        return there

    assert [start("t.txt"), start(f"{here}/t.txt"), start("./t.txt")] == [False, True, True]
    if mark is not None:
        (partial_folder(place) / ".made-of").write_text(mark)
    with pytest.raises(UserError, match="is unfinished, and was begun with"):
        start("u.txt" if mark is None else "t.txt")
    assert (partial_folder(place) / "part").exists()


def test_a_run_goes_on_by_every_spelling(here, monkeypatch):
    def config(teacher: str, data: str) -> DistillConfig:
        cfg = DistillConfig(output=str(here / "run"))
        cfg.teacher.path, cfg.data.path, cfg.trainer.steps = teacher, data, 6
        return cfg

    (here / "run").mkdir()
    write_beginning(config("t", "d"), here / "run", None)
    for folder, word in spellings(here, "t"):
        monkeypatch.chdir(folder)
        assert check_run_folder(here / "run", config(word, f"{here}/d"))["teacher.path"] == word
    with pytest.raises(UserError, match=r"holds a run with data.path=d, not e"):
        check_run_folder(here / "run", config(f"{here}/t", "e"))


def test_a_jobs_output_is_one_place_however_it_is_spelt(here):
    """Of submit nothing is free, its output= neither."""
    for word in ("job", f"{here}/job", "./job"):
        with output_folder(word, command="x", config=asdict(SubmitConfig(output=word)), inputs={}, resume=True) as out:
            pass
    assert out.done


def test_records_are_plain_values(here):
    asked = Asked.now({"data": {"path": (0.5, "a")}}, {"model": "1"}, frozenset())
    read = Asked.read(json.loads(json.dumps(asked.record())), frozenset())
    assert read.fingerprint() == asked.fingerprint() and read.started_in == os.getcwd()


def test_what_was_asked_is_the_same_in_any_order():
    one = Asked({"a": 1, "b": [2]}, {"x": "1", "y": "2"}, None)
    other = Asked({"b": [2], "a": 1}, {"y": "2", "x": "1"}, "elsewhere")
    assert one.fingerprint() == other.fingerprint() and one.same_options(other)
    for odd in (replace(one, options={"a": 2, "b": [2]}), replace(one, inputs={"x": "1", "y": "3"})):
        assert odd.fingerprint() != one.fingerprint()


# Copies


MODEL = {"model": "1"}
TEXTS = {"tokenizer": "t", "texts/a.txt": "1", "texts/b.txt": "2"}
COPIED = {"tokenizer": "t", "other/a.txt": "1", "other/b.txt": "2"}
# What an output was made of, what is asked for now, and whether that is the same.
COPIES = {
    "a folder": (({"model": {"path": "m"}}, MODEL), ({"model": {"path": "other"}}, MODEL), True),
    "another folder": (({"model": {"path": "m"}}, MODEL), ({"model": {"path": "other"}}, {"model": "2"}), False),
    "nothing": (({"model": {"path": "m"}}, MODEL), ({"model": {"path": "gone"}}, MODEL), False),
    "not noted": (({"model": {"path": "m"}}, {}), ({"model": {"path": "other"}}, {}), False),
    "a blend": (({"data": {"path": [1, "m", 2, "n"]}}, MODEL), ({"data": {"path": [1, "other", 2, "m"]}}, MODEL), True),
    "weights": (({"data": {"path": [1, "m", 2, "n"]}}, MODEL), ({"data": {"path": [2, "other", 2, "m"]}}, MODEL), False),
    "texts": (({"input": "texts/*.txt"}, TEXTS), ({"input": "other/*.txt"}, COPIED), True),
    "texts, changed": (({"input": "texts/*.txt"}, TEXTS), ({"input": "other/*.txt"}, {**COPIED, "other/b.txt": "3"}), False),
    "in another order": (
        ({"input": ["texts/a.txt", "texts/b.txt"]}, TEXTS),
        ({"input": ["other/b.txt", "other/a.txt"]}, {"tokenizer": "t", "other/b.txt": "2", "other/a.txt": "1"}),
        False,
    ),
    "one of them": (
        ({"input": ["texts/a.txt", "texts/b.txt"]}, TEXTS),
        ({"input": ["texts/b.txt", "other/a.txt"]}, {"tokenizer": "t", "texts/b.txt": "2", "other/a.txt": "1"}),
        False,
    ),
    "one more": (({"input": ["texts"]}, TEXTS), ({"input": ["other"]}, {**COPIED, "other": "3"}), False),
    "a task": (({"tasks": ["a"]}, MODEL), ({"tasks": ["b"]}, MODEL), False),
    "a task file": (({"tasks": ["t.yaml"]}, {"file t.yaml": "1"}), ({"tasks": ["m"]}, {"file m": "1"}), True),
    "prefixes": (({"train": "x/a"}, {"train": "1"}), ({"train": "prefix"}, {"train": "1"}), True),
    "an output": (({"output": "m"}, MODEL), ({"output": "other"}, MODEL), False),
    "no path": (({"text_key": "m"}, MODEL), ({"text_key": "other"}, MODEL), False),
}  # fmt: skip


@pytest.mark.parametrize("case", COPIES)
def test_a_copy_is_the_same_input_under_any_name(here, case):
    """What is read is told by its contents and their order, whether it is known before the work begins or in its course."""
    (config, inputs), (other, now), same = COPIES[case]
    for name in ("m", "other", "texts"):
        (here / name).mkdir()
    for name in ("a.txt", "b.txt"):
        (here / "texts" / name).touch()
        (here / "other" / name).touch()
    (here / "prefix.bin").touch()
    with output_folder("out", command="x", config=config, inputs=inputs, resume=True):
        pass
    outcome = contextlib.nullcontext() if same else pytest.raises(UserError, match=r"made (with other|from other)")
    with outcome:
        check_output("out", config=other, inputs=now, resume=True)
    with outcome, output_folder("out", command="x", config=other, inputs=now, resume=True) as out:
        assert out.done
    if same:
        # Nothing of the inputs is known yet; and some of them.
        for known in ({}, dict(list(now.items())[:1])):
            check_output("out", config=other, inputs=known, resume=True)


def test_a_copied_run_goes_on_with_copies(here):
    """Teacher, student and data under other names; another student is named, as is data of which nothing was noted."""
    for name in ("t", "s", "d", "t2", "s2", "d2"):
        (here / name).mkdir()

    def config(teacher: str, student: str, data: str) -> DistillConfig:
        cfg = DistillConfig(output="run")
        cfg.teacher.path, cfg.student.path, cfg.data.path, cfg.trainer.steps = teacher, student, data, 6
        return cfg

    run, read = here / "run", {"teacher": "1", "student": "2", "data": "3"}
    run.mkdir()
    cfg = config("t", "s", "d")
    write_beginning(cfg, run, None)
    own = json.loads((run / "run.json").read_text())["id"]
    first = run / "checkpoints" / "step_00000002"
    first.mkdir()
    taken = {STARTED_IN: str(here), **{"teacher.path": "t", "student.path": "s", "data.path": "d", "trainer.steps": 6}}
    saved.Written("fully_reshardable", False, saved.places(Layout()), 2, read, {}, run=own, options=taken).write(first)
    for note in (True, False):
        if not note:
            (run / "run.json").unlink()
        before = check_run_folder(run, config("t2", "s2", "d2"), read)
        assert [before[f"{name}.path"] for name in ("teacher", "student", "data")] == ["t2", "s2", "d2"]
    with pytest.raises(UserError, match=r"with student\.path=s, not s2"):
        check_run_folder(run, config("t2", "s2", "d2"), {**read, "student": "4"})
    with pytest.raises(UserError, match=r"with data\.path=d, not d2"):
        check_run_folder(run, config("t", "s", "d2"))


def test_a_search_that_was_copied_with_its_model_finds_it(here):
    """At its place where that is still the same one, else as far away as it was; named as it was where neither is."""

    def made(path: str, files: dict[str, str], **how) -> str:
        with output_folder(path, command="x", resume=True, **{"config": {}, "inputs": {}, **how}) as out:
            for name, text in files.items():
                (out.path / name).parent.mkdir(exist_ok=True)
                (out.path / name).write_text(text)
        return yaml.safe_load((Path(path) / MANIFEST).read_text())["digest"]

    sizes = dict.fromkeys("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups".split(), 4)
    ranked = yaml.safe_dump({"candidates": [{"rank": 1, "predicted_loss": 0.1, **sizes}]})
    inputs = {name: made(f"all/{name}", {"x": name}) for name in ("model", "scores")}
    config = {"model": {"path": "all/model"}, "scores": f"{here}/all/scores", "layers": None, "prune": {}}
    files = {"candidates.yaml": ranked, "targets/rank_01.yaml": "{}"}
    made("all/found", files, config={**config, "output": "all/found"}, inputs=inputs)
    assert read_search("all/found").source.model == "all/model"
    (here / "all").rename(here / "moved")
    source = read_search("moved/found").source
    assert (source.model, source.scores) == ("moved/model", "moved/scores")
    (here / "moved" / "model" / MANIFEST).unlink()
    assert read_search("moved/found").source.model == "all/model"


def test_a_copied_whole_has_its_stages_done(here):
    """A stage's words are compared from the folder of the whole on; what lies elsewhere is where it was."""
    made: list[str] = []

    def run(root: str, elsewhere: str = "m") -> None:
        stages = Stages(Path(root) / "stages.json", inputs={"model": "1"})
        words = {
            "command": ["prune", f"model={elsewhere}", f"data.path=[{root}/a,{root}/b]", f"folders={root}"],
            "inputs": {},
        }
        (Path(root) / "out").touch()
        stages.run("cut", Path(root) / "out", lambda: made.append(root), stages._placed(words))

    for root in ("x", "y/z"):
        (here / root).mkdir(parents=True)
    run("x")
    run("x")
    (here / "y" / "z" / "stages.json").write_bytes((here / "x" / "stages.json").read_bytes())
    run("y/z")
    run(f"{here}/y/z")
    assert made == ["x"]
    run("x", "other")
    assert made == ["x", "x"]
