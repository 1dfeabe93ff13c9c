"""Whose a checkpoint is: another run's is refused by name, wherever it lies in the folder."""

import json
import shutil
from pathlib import Path

import pytest

from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import identity, saved

FIXED, LENGTH = {"seed": 1234, "optim.lr": 0.01, "optim.betas": (0.9, 0.95)}, {"trainer.steps": 8}


def written(run: Path, step: int, own: str | None = "ours", **options) -> Path:
    """A checkpoint of a run of these options (`__` for dots)."""
    path = run / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    options = {**FIXED, **LENGTH, **{name.replace("__", "."): value for name, value in options.items()}}
    of_run = {} if own is None else {"run": own, "options": options}
    saved.Written("fully_reshardable", False, saved.places(Layout()), step, {}, {}, **of_run).write(path)
    return path


def refused(run: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        identity.check_own(run, FIXED, LENGTH)
    assert "\n" not in str(error.value)


def test_a_run_has_one_id_from_its_beginning(tmp_path):
    own = identity.identify(tmp_path)
    assert len(own) == 16 and identity.identify(tmp_path) == own
    (tmp_path / "another").mkdir()
    assert identity.identify(tmp_path / "another") != own
    written(tmp_path, 2, own)
    (tmp_path / identity.FILE).unlink()
    identity.check_own(tmp_path, FIXED, LENGTH)
    assert identity.identify(tmp_path) == own == json.loads((tmp_path / identity.FILE).read_text())["id"]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 7, "optim__lr": 0.1}, r"with seed=7, not 1234, optim\.lr=0\.1, not 0\.01"),
        ({"trainer__steps": 400}, r"with trainer\.steps=400, not 8"),
        ({"trainer__steps": 9, "optim__lr": 0.1, "seed": 7}, r"with seed=7, not 1234, optim\.lr=0\.1, not 0\.01"),
        ({}, "with the same options"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, step, options, words):
    """The newest and an older one, which might be published as the best; with run.json, cut off or whole."""
    written(tmp_path, 2)
    (tmp_path / identity.FILE).write_text('{"id": "ours"}')
    identity.check_own(tmp_path, FIXED, LENGTH)
    other = written(tmp_path, step, "theirs", **options)
    refused(tmp_path, rf"step_0000000{step} is of another run \({words}\): .*trainer\.start_from={other} ")
    shutil.rmtree(other)
    identity.check_own(tmp_path, FIXED, LENGTH)


@pytest.mark.parametrize("note", [None, '{"id', "[1]", '{"id": 3}'])
def test_without_its_note_a_run_is_that_of_the_checkpoints_with_its_options(tmp_path, note):
    if note is not None:
        (tmp_path / identity.FILE).write_text(note)
    written(tmp_path, 2, trainer__steps=4)  # it has grown since
    written(tmp_path, 4)
    identity.check_own(tmp_path, FIXED, LENGTH)
    other = written(tmp_path, 6, "theirs", seed=7)
    refused(tmp_path, r"step_00000006 is of another run \(with seed=7, not 1234\)")
    shutil.rmtree(other)
    written(tmp_path, 6, "theirs")
    refused(tmp_path, "has checkpoints of 2 runs with the same options, and .*run.json")


def test_a_run_of_anothers_checkpoints_alone_is_refused(tmp_path):
    written(tmp_path, 2, "theirs", optim__lr=0.1)
    refused(tmp_path, r"step_00000002 is of another run \(with optim\.lr=0\.1, not 0\.01\)")


def test_checkpoints_of_an_earlier_version_are_taken(tmp_path):
    written(tmp_path, 2, None)
    identity.check_own(tmp_path, FIXED, LENGTH)
    written(tmp_path, 4, identity.identify(tmp_path))
    identity.check_own(tmp_path, FIXED, LENGTH)


def test_a_path_that_is_spelt_otherwise_is_no_other_option(tmp_path, monkeypatch):
    """Typed in another folder; without run.json the options say whose the checkpoints are."""
    written(tmp_path, 2, data__path="data", started_in=str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    identity.check_own(tmp_path, {**FIXED, "data.path": str(tmp_path / "data")}, LENGTH)
    with pytest.raises(UserError, match=r"with data\.path=data, not elsewhere"):
        identity.check_own(tmp_path, {**FIXED, "data.path": "elsewhere"}, LENGTH)
