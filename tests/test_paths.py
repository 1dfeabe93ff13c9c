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
