"""How a model came about: what a manifest shows its command to be, which folder counts as an ancestor, and in what order."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minitron_megatron.checkpoints import lineage as module
from minitron_megatron.checkpoints.folder import MANIFEST, ModelFolder, output_folder, read_manifest
from minitron_megatron.checkpoints.hf_folder import write_shape
from minitron_megatron.checkpoints.lineage import Step, beginning_in_words, find_step, lineage, teachers
from minitron_megatron.checkpoints.stamps import file_stamps
from tests.test_bounds import SMALL_SHAPE

KINDS = {
    "distilled": ({"teacher": {"path": "t"}, "student": {"path": "s"}, "distill": {}}, "s"),
    "corrected": ({"model": {"path": "m"}, "trainer": {}, "optim": {}}, "m"),
    "pruned": ({"model": {"path": "m"}, "target": {}, "drop_layers": []}, "m"),
    "exported": ({"model": {"path": "m"}, "max_shard_gb": 5.0}, "m"),
    "imported": ({"hf": "h"}, "h"),
    "imported from NeMo": ({"nemo": "n"}, "n"),
}


def made(config: dict, digest: str = "d", **manifest) -> Step:
    return Step(Path("x"), digest, {"config": config, **manifest})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"seed": 1, "output": "o"}])
def test_options_show_what_was_done_and_to_what(kind, more):
    config, source = KINDS[kind]
    step = made({**config, **more})
    assert step.kind == kind and step.source().path == Path(source)
    for name in config:
        fewer = made({key: value for key, value in {**config, **more}.items() if key != name})
        assert fewer.kind != kind


def test_what_is_known_of_a_step():
    step = made({"data": {"path": "p"}}, results={"loss": 1.0}, inputs={"model": "m"}, command="c")
    assert (step.kind, step.of("data.path"), step.of("data"), step.of("x.y")) == ("made", "p", None, None)
    assert (step.results, step.inputs, step.command) == ({"loss": 1.0}, {"model": "m"}, "c")
    assert step.source() is None and step.shape is None and step.beginning == ""
    gone = Step(Path("x"), "d")
    assert (gone.kind, gone.config, gone.results, gone.inputs, gone.command) == ("source", {}, {}, {}, "")
    assert made({"teacher": {"path": "t"}}, inputs={"teacher": "T"}).input("teacher.path") == Step(Path("t"), "T")


def test_a_beginning_has_its_differences_in_words():
    began = {"takes": "weights", "checkpoint": "run/step", "stamp": "s", "options": {}}
    assert beginning_in_words({}) == "" and beginning_in_words({"started_from": began}) == "weights of run/step (s)"
    began["options"] = {"optim.lr": [1, 2], "seed": [3, 4]}
    assert beginning_in_words({"started_from": began}) == (
        "weights of run/step (s), which had optim.lr=1, not 2; seed=3, not 4"
    )
    others = {"teacher": ["blake3:" + 40 * "1", None]}
    assert beginning_in_words({"started_from": {**began, "options": {}, "others": others}}) == (
        "weights of run/step (s), which had another teacher (blake3:1111111111111…, now none)"
    )


def folder(path: Path, inputs: dict | None = None, shape: bool = False, **config) -> str:
    """A whole folder's digest."""
    with output_folder(path, command="", config=config, inputs=inputs or {}, resume=True) as out:
        (out.path / "file").write_text(str(path))
        if shape:
            write_shape(out.path, SMALL_SHAPE)
    return read_manifest(path)["digest"]


def test_a_folder_counts_where_it_is_whole_and_the_one_that_is_meant(tmp_path):
    """A run stands for its model; what is not there has its digest alone."""
    digest = folder(tmp_path / "a", shape=True)
    whole = find_step(tmp_path / "a", digest)
    assert whole == Step(tmp_path / "a", digest, read_manifest(tmp_path / "a"))
    assert whole.shape == SMALL_SHAPE and Step(tmp_path / "a", digest).shape is None
    assert find_step(tmp_path / "a", "another") == Step(tmp_path / "a", "another")
    of_run = folder(tmp_path / "run" / "model")
    assert find_step(tmp_path / "run", of_run).path == tmp_path / "run" / "model"
    # No output is made inside of another, but a folder may be put there.
    of_both = folder(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a" / "model")
    assert find_step(tmp_path / "a", digest).path == tmp_path / "a"
    assert find_step(tmp_path / "a", of_both).path == tmp_path / "a" / "model"
    (tmp_path / "run" / "model" / "file").write_text("")
    assert find_step(tmp_path / "run", of_run) == Step(tmp_path / "run", of_run)
    (tmp_path / "a" / MANIFEST).write_text(yaml.safe_dump({"files": 3}))
    assert find_step(tmp_path / "a", of_both).path == tmp_path / "a" / "model"


def test_a_line_goes_from_the_newest_to_what_is_no_longer_there(tmp_path):
    hf = {"hf": str(tmp_path / "gone")}
    first = folder(tmp_path / "imported", {"file config.json": "x"}, **hf)
    second = folder(
        tmp_path / "pruned",
        {"model": first},
        model={"path": str(tmp_path / "imported")},
        target={},
        drop_layers=[1],
    )
    steps = lineage(ModelFolder(tmp_path / "pruned", SMALL_SHAPE, second))
    assert [(step.kind, step.path.name, step.digest) for step in steps] == [
        ("pruned", "pruned", second),
        ("imported", "imported", first),
        ("source", "gone", None),
    ]


def test_what_was_imported_counts_where_its_files_are_those_that_were_read(tmp_path):
    """An export that another one has replaced is no ancestor."""
    digest = folder(tmp_path / "export", model={"path": "m"}, max_shard_gb=5.0)
    stamps = file_stamps(tmp_path / "export", [tmp_path / "export" / "file"])
    config = {"hf": str(tmp_path / "export")}
    of_import = made(config, inputs=stamps)
    assert of_import.source() == find_step(tmp_path / "export", digest) and of_import.source().kind == "exported"
    source = Step(tmp_path / "export", None)
    assert made(config).source() == made(config, inputs={"file file": "sha256:other"}).source() == source
    assert made(config, inputs={**stamps, "file gone": "sha256:x"}).source() == source


def test_teachers_stand_once_each_with_ancestors_that_are_not_the_models_own(monkeypatch):
    """Up to the first that is known already."""
    steps = {
        name: made({"model": {"path": source}, "target": {}, "drop_layers": []}, name, inputs={"model": source})
        for name, source in {"t1": "base", "t2": "t1", "t3": "own"}.items()
    }
    steps = {name: replace(step, path=Path(name)) for name, step in steps.items()}
    monkeypatch.setattr(module, "find_step", lambda path, digest: steps.get(path.name, Step(path, digest)))

    def distilled(teacher: str) -> Step:
        config = {"teacher": {"path": teacher}, "student": {"path": "s"}, "distill": {}}
        return made(config, f"of {teacher}", inputs={"teacher": teacher})

    own = Step(Path("own"), "own", {"config": {"hf": "h"}})

    def found(*names: str) -> list[str]:
        return [step.digest for step in teachers([*map(distilled, names), own])]

    assert found("t1") == ["t1", "base"] and found("t2") == ["t2", "t1", "base"]
    assert found("t2", "t1") == ["t2", "t1", "base"] and found("t1", "t2") == ["t1", "base", "t2"]
    assert found("t3") == ["t3"] and found("own") == [] and found("t3", "t1") == ["t3", "t1", "base"]
    assert teachers([own, made({"teacher": {"path": "t1"}})]) == []
