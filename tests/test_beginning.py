"""A run that begins with another's checkpoint: what is advised, what stays comparable, and that it is not its own."""

import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from minitron_megatron.checkpoints.folder import DIVERGED
from minitron_megatron.config import OptimConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import begin, checkpoint, identity, run, saved
from minitron_megatron.train.begin import Beginning, advice_after_divergence
from minitron_megatron.train.checks import check_run_folder
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_run_checks import config


@pytest.mark.parametrize(
    ("step", "start", "bf16", "min_lr", "says"),
    [
        (None, None, False, 1e-5, "no step is saved: begin again with the same words but optim.lr=0.0005 output=o-2"),
        (
            None,
            "other",
            True,
            5e-4,
            "go on from where it began, with the same words but trainer.start_from=other optim.lr=0.0005 (or precision=fp32) "
            "output=o-2",
        ),
        (
            7,
            "other",
            False,
            6e-4,
            "go on from step 7, the last that is saved, with the same words but trainer.start_from=o/ optim.lr=0.0005 "
            "optim.min_lr=5e-05 output=o-2",
        ),
    ],
)
def test_after_a_divergence_half_the_rate_is_advised(tmp_path, monkeypatch, step, start, bf16, min_lr, says):
    """And a minimum below it, where it would be above."""
    monkeypatch.chdir(tmp_path)
    if step:
        (tmp_path / "o" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    cfg = replace(config(start_from=start), output="o/", optim=OptimConfig(lr=1e-3, min_lr=min_lr))
    assert advice_after_divergence(cfg, in_bf16=bf16) == says


@pytest.mark.parametrize(
    ("option", "keeps"),
    [("optim.lr", True), ("precision", True), ("distill.loss", False), ("data.path", False), ("teacher.path", False)],
)
def test_medians_of_another_run_count_where_losses_are_comparable(option, keeps):
    found = Beginning("c", 3, "everything", "s", {"seed": [1, 2], option: [1, 2]})
    assert found.keeps_judging is keeps and found.inputs == {"start_from": "s"}
    assert Beginning("c", 3, "everything", "s").keeps_judging


@pytest.mark.parametrize(
    ("name", "keeps"),
    [("data", False), ("teacher", False), ("cache", False), ("student", True), ("file tokenizer/x", True)],
)
def test_medians_count_no_more_where_what_a_loss_is_of_was_replaced(name, keeps):
    """Though its path is the same."""
    assert Beginning("c", 3, "everything", "s", others={name: ["1", "2"]}).keeps_judging is keeps


@pytest.mark.parametrize(
    ("before", "now", "others"),
    [
        (None, {"data": "1"}, {}),
        ({"data": "1", "teacher": "2"}, {"data": "1", "teacher": "2"}, {}),
        ({"data": "1", "teacher": "2", "start_from": "3"}, {"data": "1", "teacher": "4"}, {"teacher": ["2", "4"]}),
        # A model by another name is what its option says.
        ({"data": "1", "model": "2"}, {"data": "3", "teacher": "2", "student": "4"}, {"data": ["1", "3"]}),
        ({"file t": "1", "file u": "2"}, {"file u": "2", "file v": "3"}, {"file t": ["1", None], "file v": [None, "3"]}),
    ],
)  # fmt: skip
def test_inputs_are_others_by_their_contents(before, now, others):
    assert begin._other_inputs(before, now) == others


@pytest.mark.parametrize(
    ("start", "taken"), [(None, True), ("run", False), ("run/checkpoints/step_00000002", False), ("run2", True), (".", True)]
)  # fmt: skip
def test_a_run_does_not_begin_with_itself(tmp_path, monkeypatch, start, taken):
    monkeypatch.chdir(tmp_path)
    assert refused(begin.check_another, config(start_from=start), tmp_path / "run") != taken


class Loaded:
    """What a run that begins asks of its parts, in order."""

    def __init__(self, monkeypatch) -> None:
        self.did = []
        for name in ("load_weights", "set_adam"):
            monkeypatch.setattr(run, name, lambda *given, name=name: self.did.append((name, given[1])))
        for name, value in {
            "model_dtype": "a dtype", "build_model_chunks": "chunks", "training_fields": "fields",
            "wrap_and_optimize": ("wrapped", "optimizer"),
        }.items():  # fmt: skip
            monkeypatch.setattr(run, name, lambda *_, value=value: value)
        guard = self.part("guard")
        monkeypatch.setattr(run, "Trainer", lambda *given: SimpleNamespace(guard=guard, given=given))
        monkeypatch.setattr(checkpoint, "check_whole", lambda path, verify: self.did.append(("whole", path)))
        monkeypatch.setattr(saved, "check_readable", lambda there, layout: self.did.append(("readable", there.step)))

        def load(path, chunks, optimizer, trainer):
            self.did.append(("load", path))
            return 4, {"losses": [1.0], "in_a_row": 2}, {"alpha": 0.5}

        monkeypatch.setattr(checkpoint, "load", load)

    def part(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            load_state_dict=lambda state: self.did.append((name, state)),
            attach=lambda chunks: self.did.append(("attach", chunks)),
        )


OWN, OTHER = Path("own"), Path("other")
STATES = [("guard", {"losses": [1.0], "in_a_row": 2}), ("objective", {"alpha": 0.5})]


@pytest.mark.parametrize(
    ("there", "takes", "options", "weights", "more", "start", "says"),
    [
        (False, None, {}, "folder", [], 0, None),
        (True, None, {}, "folder", [("load", OWN), *STATES], 4, "continuing from step 4 (own)"),
        (False, "weights", {}, OTHER, [], 0, "beginning with weights of other, at step 0"),
        (
            False,
            "everything",
            {"optim.lr": [1, 2]},
            "folder",
            # A spike that was going on there is none here.
            [("load", OTHER), ("set_adam", "optim"), ("guard", {"losses": [1.0], "in_a_row": 0}), STATES[1]],
            4,
            "beginning with everything of other, at step 4",
        ),
        (
            False,
            "everything",
            {"distill.loss": [1, 2]},
            "folder",
            [("load", OTHER), ("set_adam", "optim")],
            4,
            "beginning with everything of other, at step 4",
        ),
        # Once it has a checkpoint of its own, the other is not read.
        (True, "weights", {}, "folder", [("load", OWN), *STATES], 4, "continuing from step 4 (own)"),
        (True, "everything", {}, "folder", [("load", OWN), *STATES], 4, "continuing from step 4 (own)"),
    ],
)
def test_what_a_run_begins_with(monkeypatch, caplog, there, takes, options, weights, more, start, says):
    caplog.set_level(logging.INFO)
    parts = Loaded(monkeypatch)
    monkeypatch.setattr(checkpoint, "newest", lambda _, verify: saved.Checkpoint(4, OWN, None) if there else None)
    objective = parts.part("objective")
    recipe = SimpleNamespace(
        trained="student", models={"student": SimpleNamespace(engine="te")}, objective=lambda *_: objective
    )
    first = Beginning("other", 4, takes, "stamp", options) if takes else None
    cfg = SimpleNamespace(verify=False, precision="fp32", trainer="trainer", optim="optim", ddp="ddp")
    this = SimpleNamespace(cfg=cfg, recipe=recipe, layout=Layout(), folder=None, beginning=first)
    loop, found = run._Run._prepare(this, {"student": SimpleNamespace(shape=SMALL_SHAPE, weights="folder")})
    checked = [("readable", 4)] if there else [("whole", OTHER)] if takes else []
    assert parts.did == [*checked, ("load_weights", weights), ("attach", "chunks"), *more]
    assert found == start and caplog.messages == ([says] if says else [])
    assert loop.given == ("wrapped", "optimizer", objective, Layout(), cfg)


@pytest.mark.parametrize("again", [False, True])
def test_a_run_folder_says_what_the_run_is_before_a_step_is_taken(tmp_path, again):
    """Started again it is the same run, and no longer one that has diverged."""
    cfg = replace(config(), output=str(tmp_path))
    if again:
        begin.write_beginning(cfg, tmp_path, None)
        (tmp_path / DIVERGED).write_text("it did")
    own = begin.write_beginning(cfg, tmp_path, Beginning("c", 3, "weights", "s") if not again else None)
    assert own == identity.identify(tmp_path) and (tmp_path / "checkpoints").is_dir()
    assert not (tmp_path / DIVERGED).exists() and (tmp_path / begin.FILE).is_file() is not again
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["trainer"]["steps"] == 4 and written["started_in"] == str(Path.cwd())


@pytest.mark.parametrize("moment", range(10))
def test_a_run_that_is_killed_while_it_begins_is_begun_again(tmp_path, monkeypatch, moment):
    """Between any two of the files and folders that it makes, half-written ones among them."""
    cfg, first = replace(config(), output=str(tmp_path / "run")), Beginning("c", 3, "weights", "s")
    (tmp_path / "run" / ".model.partial").mkdir(parents=True)
    done = []

    def until(what):
        def either(*given, **how):
            if len(done) == moment:
                raise KeyboardInterrupt
            done.append(what)
            return what(*given, **how)

        return either

    with monkeypatch.context() as killed:
        # A kill leaves what an exception would sweep.
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        for name in ("mkdir", "replace"):
            killed.setattr(Path, name, until(getattr(Path, name)))
        killed.setattr(os, "fsync", until(os.fsync))
        with suppress(KeyboardInterrupt):
            begin.write_beginning(cfg, tmp_path / "run", first)
    assert len(done) == min(moment, 7), "as many moments as there are"
    before = check_run_folder(tmp_path / "run", cfg)
    assert before == {} or before["trainer.steps"] == 4
    assert begin.write_beginning(cfg, tmp_path / "run", first) == identity.identify(tmp_path / "run")
    (tmp_path / "run" / "notes").touch()
    assert check_run_folder(tmp_path / "run", cfg)["trainer.steps"] == 4


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["checkpoints/"], True), (["checkpoints/", "run.json"], True), ([".config.yaml.ab12.partial", "run.json"], True),
        (["checkpoints/step_00000001/", "run.json"], False), (["checkpoints"], False), (["run.json", "notes"], False),
        ([".git/"], False),
    ],
)  # fmt: skip
def test_a_folder_of_nothing_but_beginnings_is_begun_again(tmp_path, names, taken):
    for name in names:
        if name.endswith("/"):
            (tmp_path / "run" / name).mkdir(parents=True)
        else:
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / name).touch()
    cfg = replace(config(), output=str(tmp_path / "run"))
    if taken:
        assert check_run_folder(tmp_path / "run", cfg) == {}
    else:
        with pytest.raises(UserError, match=r"exists and is not a run folder: choose another output=$"):
            check_run_folder(tmp_path / "run", cfg)


class Stop(Exception):
    """The part of a start that comes next."""


@pytest.mark.parametrize(
    ("precision", "device", "asked"), [("auto", "cpu", True), ("auto", "cuda", False), ("fp32", "cpu", False)]
)
def test_on_cpus_there_is_room_for_float32(monkeypatch, precision, device, asked):
    """What they compute in is settled later."""
    room = []

    def stop(*_):
        raise Stop

    monkeypatch.setattr(run.saved, "check_room", lambda *given: room.append(given))
    monkeypatch.setattr(run.saved, "computed_in", stop)
    monkeypatch.setattr(run, "pick_device", lambda _: torch.device(device))
    cfg = replace(config(), precision=precision)
    checked = SimpleNamespace(
        recipe=SimpleNamespace(trained="student"), layout=Layout(), shapes={"student": SMALL_SHAPE}, folders={}, data=None,
        before={},
    )  # fmt: skip
    with pytest.raises(Stop):
        run.run_training(cfg, checked)
    assert room == ([(Path("run/checkpoints"), run.count_parameters(SMALL_SHAPE), 4, cfg.trainer)] if asked else [])
