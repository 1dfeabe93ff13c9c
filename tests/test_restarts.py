"""What happens after an end: which starts, requeues and exit statuses follow, and which checkpoint is gone on from.

Job scripts are tried with programs that stand for Slurm's; tests/test_slurm.py has the real ones.
"""

import contextlib
import itertools
import logging
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checkpoint, run, saved
from tests.slurm_cluster import programs_by_name

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which something hangs, however busy the machine is.
PATIENCE = 300
# A start: its exit status, then what it leaves: c a checkpoint, m the model, w waits for a signal first.
START = """#!/usr/bin/env bash
n=$(($(cat "$STATE/starts" 2> /dev/null || echo 0) + 1))
echo $n > "$STATE/starts"
word=$(cut -d' ' -f$n <<< "$ENDS")
case $word in *w*)
    trap 'touch "$STATE/told"' USR1
    echo $$ > "$STATE/ready.partial" && mv "$STATE/ready.partial" "$STATE/ready"
    until [ -e "$STATE/told" ]; do sleep 0.02; done ;;
esac
case $word in *c*) mkdir -p "$OUTPUT/checkpoints/step_0000000$n" ;; esac
case $word in *m*) mkdir -p "$OUTPUT/model"; touch "$OUTPUT/model/manifest.yaml" ;; esac
exit "${word//[a-z]/}"
"""


@pytest.fixture
def job(tmp_path):
    """`job(ends, state, signal, **variables)`: a job whose starts end so: (its exit status, how many starts, what it said)."""
    said = tmp_path / "said"
    tell = f"kill -USR1 $(cat '{tmp_path}/ready')"
    programs = programs_by_name(
        tmp_path / "programs",
        squeue=f'echo "${{STATE_OF_JOB:-RUNNING}}"; echo squeue "$*" >> \'{said}\'',
        scontrol=f"case $1 in show) echo node1 ;; *) echo scontrol \"$*\" >> '{said}' ;; esac",
        scancel=f"echo scancel \"$*\" >> '{said}'; {tell}",
        srun="exit 99",
    )
    (tmp_path / "start").write_text(START)
    (tmp_path / "start").chmod(0o755)
    script = f'set -euo pipefail; . "$ROOT/slurm/common.sh"; persist "{tmp_path}/start"'
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "ROOT": str(ROOT)}
    folders = {"STATE": str(tmp_path), "OUTPUT": str(tmp_path / "it's <b>out"), "LOGS": str(tmp_path / "logs")}

    def start(ends, number=None, **variables):
        for file in ("starts", "ready", "told", "said"):
            (tmp_path / file).unlink(missing_ok=True)
        path = {"PATH": f"{programs}:{os.environ['PATH']}", "ENDS": ends}
        with subprocess.Popen(
            ["bash", "-c", script], env={**os.environ, **slurm, **folders, **path, **variables}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                if number is not None:
                    wait_for(tmp_path / "ready")
                    os.kill(process.pid, number)
                if number == signal.SIGTERM:
                    # Slurm tells the processes itself: the script has its own signal by then.
                    (tmp_path / "told").touch()
                shown, _ = process.communicate(timeout=PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        told = said.read_text() if said.exists() else ""
        return process.returncode, int((tmp_path / "starts").read_text()), told, shown

    return start


def wait_for(file):
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("ends", "variables", "status", "starts", "requeued"),
    [
        ("0m", {}, 0, 1, False),
        ("0c", {}, 0, 1, False),  # trainer.stop_after
        ("2", {}, 2, 1, False),  # a user's mistake
        ("2c", {}, 2, 1, False),
        ("1c 2", {}, 2, 2, False),
        ("1 1 1 1 0m", {}, 1, 4, False),  # three times again without a checkpoint
        ("1 1 1 0m", {}, 0, 4, False),
        ("137c 1c 1c 1c 1c 1c 0m", {}, 0, 7, False),  # never three without one
        ("1 1 1c 1 1 1 0m", {}, 1, 6, False),
        ("1 1 1c 1 1 0m", {}, 0, 6, False),
        ("1 1 0m", {"RESTARTS": "1"}, 1, 2, False),
        ("1 0m", {"RESTARTS": "0"}, 1, 1, False),
        ("75", {}, 0, 1, True),  # asked to stop: the nodes go back
        ("75c", {"SLURM_RESTART_COUNT": "9"}, 0, 1, True),
        ("75", {"SLURM_RESTART_COUNT": "2"}, 0, 1, True),
        ("75", {"SLURM_RESTART_COUNT": "3"}, 1, 1, False),  # requeue after requeue brings nothing
        ("75", {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}, 1, 1, False),
        ("1c 75", {"SLURM_RESTART_COUNT": "9"}, 0, 2, True),
        ("1 75", {"SLURM_RESTART_COUNT": "9"}, 1, 2, False),
    ],
)  # fmt: skip
def test_what_follows_an_end(job, ends, variables, status, starts, requeued):
    found, count, told, shown = job(ends, **variables)
    assert (found, count, "scontrol requeue 7" in told) == (status, starts, requeued), shown
    assert shown.count("started again") == starts - 1
    assert ("not requeued" in shown) == (not requeued and "75" in ends)


@pytest.mark.parametrize(
    ("state", "starts"),
    [
        *(
            (state, 1)
            for state in ("CANCELLED", "COMPLETING", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REQUEUED", "TIMEOUT")
        ),
        ("RUNNING", 2),
        ("", 2),
    ],
)
def test_a_job_that_slurm_has_given_up_is_not_started_again(job, state, starts):
    assert job("1c 0m", STATE_OF_JOB=state)[:2] == ((1 if starts == 1 else 0), starts)


def test_a_signal_before_the_limit_saves_and_requeues(job):
    """All processes are told; the job is started again though its command ended as after a failure."""
    for ends in ("75cw", "1cw"):
        status, starts, told, _ = job(ends, signal.SIGUSR1)
        assert (status, starts) == (0, 1) and "scancel --signal=USR1 7" in told and "scontrol requeue 7" in told


def test_a_job_that_is_ended_from_outside_is_not_started_again(job):
    """Slurm has told the processes itself."""
    status, starts, said, _ = job("1cw 0m", signal.SIGTERM)
    assert (status, starts) == (1, 1) and "requeue" not in said and "--signal=USR1" not in said


def test_a_task_of_an_array_asks_for_itself(job):
    _, _, told, _ = job("1c 75", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert "scontrol requeue 5_3" in told and "--jobs=5_3" in told


# Which checkpoint a run goes on from, and publishes


def there(folder, *steps, best=None):
    for step in steps:
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        figures = {"validation_loss": best[1]} if best and best[0] == step else None
        saved.Written("fully_reshardable", False, saved.places(Layout()), step, {}, {}, figures, bool(figures)).write(
            path
        )
    return folder


def test_whole_checkpoints_are_those_that_have_their_name(tmp_path):
    folder = there(tmp_path, 100, 2, 30)
    for name in (".step_00000200.ab.partial", "step_200", "step_000000201", "step_00000202.old", "best.json"):
        (folder / name).mkdir()
    assert [step for step, _ in saved.find_checkpoints(folder)] == [2, 30, 100]
    assert saved.find_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("steps", "best", "publish", "wanted"),
    [
        ((2, 4, 10), None, "last", 10),
        ((2, 4, 10), (4, 1.5), "last", 10),
        ((2, 4, 10), (4, 1.5), "best", 4),
        ((2,), (2, 1.5), "best", 2),
    ],
)
def test_what_a_run_publishes(tmp_path, steps, best, publish, wanted):
    cfg = SimpleNamespace(trainer=SimpleNamespace(publish=publish))
    folder = there(tmp_path, *steps, best=best)
    assert run._Run.to_publish(SimpleNamespace(cfg=cfg, folder=folder)).path.name == f"step_{wanted:08d}"


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path, monkeypatch):
    """With the guard and the objective that were saved with it."""
    folder = there(tmp_path, 2, 10, 4, best=(4, 1.0))
    loaded, states = [], {}

    def load(path, *_):
        loaded.append(path.name)
        return int(path.name[5:]), {"of": "guard"}, {"of": "objective"}

    def keeping(name):
        return SimpleNamespace(load_state_dict=lambda state: states.update({name: state}), attach=lambda _: None)

    objective = keeping("objective")
    recipe = SimpleNamespace(
        trained="student", models={"student": SimpleNamespace(engine="local")}, objective=lambda *_: objective
    )
    loop = SimpleNamespace(guard=keeping("guard"))
    for name, value in {
        "model_dtype": None, "build_model_chunks": [], "load_weights": None, "training_fields": {},
        "wrap_and_optimize": ([], None), "Trainer": loop,
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, lambda *_, value=value: value)
    monkeypatch.setattr(checkpoint, "load", load)
    cfg = SimpleNamespace(precision="fp32", trainer=None, optim=None, ddp=None, verify=False)
    this = SimpleNamespace(cfg=cfg, recipe=recipe, layout=Layout(), folder=folder, beginning=None)
    found, start = run._Run._prepare(this, {"student": SimpleNamespace(shape=None, weights=None)})
    assert (loaded, start, found) == (["step_00000010"], 10, loop)
    assert states == {"guard": {"of": "guard"}, "objective": {"of": "objective"}}
    this.folder = tmp_path / "none"
    assert run._Run._prepare(this, {"student": SimpleNamespace(shape=None, weights=None)})[1] == 0 and len(loaded) == 1


@pytest.mark.parametrize(("keep", "best", "left"), [
    (1, None, [50]), (2, None, [40, 50]), (2, 10, [10, 40, 50]), (2, 40, [40, 50]), (9, 10, [10, 20, 30, 40, 50]),
])  # fmt: skip
def test_the_newest_checkpoints_stay_and_the_best(tmp_path, keep, best, left):
    folder = there(tmp_path, 10, 20, 30, 40, 50, best=best and (best, 1.0))
    checkpoint._drop_old(folder, TrainerConfig(keep_last=keep))
    assert [step for step, _ in saved.find_checkpoints(folder)] == left


@pytest.mark.parametrize("keep_best", [True, False])
def test_what_may_be_the_best_stays(tmp_path, keep_best):
    """One whose format cannot be read where the best is kept; nothing is published as the best beside it."""
    folder = there(tmp_path, 10, 20, 30, 40, best=(20, 1.0))
    (folder / "step_00000010" / saved.FORMAT).write_text("{")
    checkpoint._drop_old(folder, TrainerConfig(keep_last=1, keep_best=keep_best))
    assert [step for step, _ in saved.find_checkpoints(folder)] == ([10, 20, 40] if keep_best else [20, 40])
    if keep_best:
        with pytest.raises(UserError, match=r"step_00000010 is damaged \(.*may be the best .*trainer\.publish=last"):
            saved.best_whole(folder)


def test_the_best_follows_from_the_checkpoints_alone(tmp_path):
    """A note of an earlier version, cut off, gone or of another step, changes nothing; the first of equal ones is the best."""
    losses = {2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0, 10: None}
    for step, loss in losses.items():
        path = tmp_path / f"step_{step:08d}"
        path.mkdir()
        figures = {"loss": 9.0} if loss is None else {"loss": 9.0, "validation_loss": loss}
        saved.Written("fully_reshardable", False, saved.places(Layout()), step, {}, {}, figures, step != 4).write(path)
    for note in (
        None,
        '{"step": 4, "valida',
        '{"step": 2, "validation_loss": 0.5}',
        '{"step": 10, "validation_loss": 0.5}',
    ):
        if note is not None:
            (tmp_path / saved.BEST).write_text(note)
        assert saved.find_best(tmp_path) == (tmp_path / "step_00000004", 1.0)
        assert saved.best_whole(tmp_path)[0].step == 4
        # Where the best is not kept any more, what was written to be kept stays.
        assert saved.find_best(tmp_path, kept=True) == (tmp_path / "step_00000006", 1.0)


@pytest.mark.parametrize(("marked", "wanted"), [
    ('{"step": 4, "validation_loss": 1.5}', ("step_00000004", 1.5)),
    ('{"step": 5, "validation_loss": 1.5}', None),  # it is gone
    ('{"step": 4}', None), ("{", None), ("[4]", None), ('{"step": "4", "validation_loss": 1}', None),
])  # fmt: skip
def test_the_best_is_one_that_is_there(tmp_path, marked, wanted):
    folder = there(tmp_path, 4)
    assert saved.find_best(folder) is None
    (folder / "best.json").write_text(marked)
    found = saved.find_best(folder)
    assert found == (wanted and (folder / wanted[0], wanted[1]))


def a_run(folder, **trainer):
    """What `_Run`'s decisions ask of it, and what it did."""
    done = []
    saver = SimpleNamespace(
        save=lambda chunks, optimizer, step, *, guard, objective, figures: done.append(
            (step, figures["validation_loss"])
        ),
        finish=lambda: done.append("whole"),
    )
    state = SimpleNamespace(state_dict=dict)
    cfg = SimpleNamespace(trainer=TrainerConfig(**{"save_interval": 10, "validation_interval": 5, **trainer}))
    loop = SimpleNamespace(chunks=[], optimizer=None, guard=state, objective=state, stop_asked=False)
    this = SimpleNamespace(cfg=cfg, saver=saver, loop=loop, end=25, folder=folder, began=time.monotonic())
    return this, done


@pytest.mark.parametrize(("step", "stop", "wanted"), [
    (9, False, []), (10, False, [(10, 0.1)]), (11, False, []), (20, False, [(20, 0.1)]),
    (24, False, []), (25, False, [(25, 0.1), "whole"]), (3, True, [(3, 0.1), "whole"]), (10, True, [(10, 0.1), "whole"]),
])  # fmt: skip
def test_when_a_checkpoint_is_saved(tmp_path, step, stop, wanted):
    """On the interval, at the end and before a stop; it is whole before the run ends."""
    this, done = a_run(tmp_path)
    run._Run._save_if_due(this, step, stop, {"validation_loss": 0.1})
    assert done == wanted


@pytest.mark.parametrize(("before", "loss", "best"), [
    (None, 3.0, 3.0), ((4, 3.0), 2.9, 2.9), ((4, 3.0), 3.0, None), ((4, 3.0), 3.1, None),
    (None, math.nan, None), (None, math.inf, None), ((4, 3.0), math.nan, None),
])  # fmt: skip
def test_a_lower_validation_loss_is_saved_as_the_best(tmp_path, before, loss, best):
    """Once the checkpoint that is being written is whole: it may be the best so far. Of equal losses the first stays."""
    folder = there(tmp_path, 4, best=before)
    this, done = a_run(folder, keep_best=True)
    run._Run._save_if_due(this, 7, False, {"validation_loss": loss})
    assert done == (["whole", (7, best)] if best is not None else ["whole"])
    this, done = a_run(folder, keep_best=True)
    run._Run._save_if_due(this, 7, False, {})
    assert done == []


@pytest.mark.parametrize(("interval", "step", "due"), [
    (5, 4, False), (5, 5, True), (5, 6, False), (5, 25, True), (0, 5, False), (0, 25, True), (None, 10, False),
])  # fmt: skip
def test_when_a_run_validates(tmp_path, interval, step, due):
    this, _ = a_run(tmp_path, validation_interval=interval)
    this._validate = lambda windows: {"validation_loss": 1.0}
    assert bool(run._Run._validate_if_due(this, ["a window"], step)) is due
    assert run._Run._validate_if_due(this, None, step) == {}


@pytest.mark.parametrize(("minutes", "since", "asked"), [(None, 10**6, False), (2, 119, False), (2, 121, True)])
def test_a_time_limit_asks_for_a_stop_when_it_is_over(tmp_path, monkeypatch, minutes, since, asked):
    this, _ = a_run(tmp_path, time_limit_minutes=minutes)
    monkeypatch.setattr(run.time, "monotonic", lambda: this.began + since)
    run._Run._look_at_the_clock(this)
    assert this.loop.stop_asked is asked


def test_where_a_start_of_a_run_ends(tmp_path, monkeypatch):
    """With its last step, or after as many as it was asked to do."""
    for name in ("model_dtype", "flops_per_token", "StepMetrics"):
        monkeypatch.setattr(run, name, lambda *_, **__: 1)
    monkeypatch.setattr(run, "schedule_of", lambda _: SimpleNamespace(steps=25))
    monkeypatch.setattr(checkpoint, "Saver", lambda *_: None)
    monkeypatch.setattr(run._Run, "_prepare", lambda self, folders: (None, 0))
    checked = SimpleNamespace(
        recipe=SimpleNamespace(trained="s"), folders={"s": SimpleNamespace(shape=None)}, beginning=None, inputs={}
    )
    job = SimpleNamespace(layout=Layout(), device=None)
    for stop_after, end in ((None, 25), (1, 1), (24, 24), (25, 25), (30, 25)):
        trainer = TrainerConfig(stop_after=stop_after)
        data = SimpleNamespace(sequence_length=8)
        cfg = SimpleNamespace(trainer=trainer, output=str(tmp_path), data=data, precision="fp32", cluster=None)
        assert run._Run(cfg, checked, job, 0.0, None).end == end


@pytest.mark.parametrize(("asked", "interrupted", "status"), [(True, False, 75), (True, True, 130), (False, False, 0)])
def test_how_a_run_with_steps_left_ends(tmp_path, monkeypatch, caplog, asked, interrupted, status):
    """75 is requeued, 130 after Ctrl-C is not; as far as it was to go is a success."""
    caplog.set_level(logging.INFO)
    this, _ = a_run(tmp_path, stop_after=7)
    this.schedule, this.reached, this.asked_to_stop = SimpleNamespace(steps=25), 7, asked
    this.loop.any_interrupted = interrupted
    ended = []
    monkeypatch.setattr(run, "stop_together", lambda text, code: ended.append((text, code)) or exit(code))
    with pytest.raises(SystemExit) as end:
        run._Run.leave(this)
    assert end.value.code == status
    if asked:
        assert ended == [("at step 7 of 25, which is saved: the same command continues it", status)]
    else:
        assert "step 7 of 25: as far as trainer.stop_after=7 goes" in caplog.text


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("steps", [(), (1,), (1, 2, 3, 4)])
def test_room_for_checkpoints_is_what_is_kept_and_one_more(tmp_path, monkeypatch, steps, keep_best):
    """Less those that are there, and at least one; of 1000 parameters in bfloat16 each takes 14,000 bytes."""
    folder = there(tmp_path / "run" / "checkpoints", *steps)
    folder.mkdir(parents=True, exist_ok=True)
    options = TrainerConfig(keep_last=2, keep_best=keep_best)
    need = max(1, 3 + keep_best - len(steps)) * 14_000
    for free, enough in ((need, True), (need - 1, False)):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            saved.check_room(folder, 1000, 2, options)
        else:
            with pytest.raises(UserError, match="no space left for the checkpoints"):
                saved.check_room(folder, 1000, 2, options)


@pytest.mark.parametrize(
    ("optimizer", "scales"), list(itertools.product(("dp_reshardable", "fully_reshardable"), (False, True)))
)
def test_a_layout_may_change_where_the_format_allows_it(tmp_path, optimizer, scales):
    """The number of data-parallel ranks always; the rest with fully_reshardable and without kept scales alone."""
    path = tmp_path / "step_00000001"
    path.mkdir()
    saved.Written(optimizer, scales, saved.places(Layout(tensor=2, world_size=4)), 1, {}, {}).write(path)
    written = saved.whole(path)
    saved.check_readable(written, Layout(tensor=2, world_size=8))
    fixed = optimizer == "dp_reshardable" or scales
    for other in (Layout(tensor=1, world_size=4), Layout(tensor=2, pipeline=2, world_size=4)):
        if fixed:
            with pytest.raises(UserError, match=r"no other layout: use parallel\."):
                saved.check_readable(written, other)
        else:
            saved.check_readable(written, other)
