"""A command as a job: what its script has in each line, what is rehearsed, and what becomes of it."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir

from minitron_megatron import submit as submitting
from minitron_megatron.config import ClusterConfig, SubmitConfig
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.stages import ROOT, Ended
from minitron_megatron.submit import (
    SCRIPTS,
    Job,
    check_job,
    check_submit,
    processes_per_node,
    read_command,
    rehearse,
    render,
    submit,
)


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


CONFIG = SimpleNamespace(output="out/run", trainer=None)


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """Renders a command that reads no folders and has no checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submitting, "_folders", lambda _: [Path("/a b")])
    monkeypatch.setattr(submitting, "_has_checkpoints", lambda config: config.trainer is not None)
    return lambda cfg, config=CONFIG: render(cfg, "distill", ["a=it's", "b=1"], config)


def job_of(**cluster) -> SubmitConfig:
    return SubmitConfig(output="jobs/one", command="x", cluster=ClusterConfig(**cluster))


def test_a_script_is_what_was_asked_for_line_by_line(plain, tmp_path):
    cfg = replace(
        job_of(
            gpus_per_node=4, time="30", partition="p q", account="acc", save_seconds=60, container="image",
            mounts=["/x:/y", "/z:/z"], sbatch=["--exclude=n1"], setup=["module load cuda", "export A=b"],
        ),
        name="a job", nodes=3,
    )  # fmt: skip
    assert plain(cfg, SimpleNamespace(output="out/run", trainer=1)) == (
        "#!/usr/bin/env bash\n# Written by submit. Give it to sbatch again to continue what it runs.\n"
        "#SBATCH '--job-name=a job'\n#SBATCH --nodes=3\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=4\n"
        "#SBATCH --exclusive\n#SBATCH --time=30\n#SBATCH '--partition=p q'\n#SBATCH --account=acc\n#SBATCH --requeue\n"
        f"#SBATCH --signal=B:USR1@60\n#SBATCH --output={tmp_path}/jobs/one_%j.log\n#SBATCH --open-mode=append\n"
        f"#SBATCH --exclude=n1\nset -euo pipefail\n\ncd {tmp_path}\nROOT={ROOT}\nOUTPUT={tmp_path}/out/run\nGPUS=4\n"
        f"LOGS={tmp_path}/jobs/one_logs\nCONTAINER=image\nMOUNTS=/x:/y,/z:/z\nmodule load cuda\nexport A=b\n\n"
        f"# shellcheck source=/dev/null\n. {SCRIPTS}/common.sh \"$ROOT\" '/a b'\n\n"
        "launch distill \\\n    'a=it'\"'\"'s' \\\n    b=1\n"
    )


def test_what_was_not_asked_for_is_not_in_a_script(plain):
    lines = plain(job_of(gpus_per_node=0, time="1-00:00:00")).splitlines()
    options = [line.removeprefix("#SBATCH --").partition("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert options == ["job-name", "nodes", "ntasks-per-node", "exclusive", "time", "requeue", "output", "open-mode"]
    assert "#SBATCH --job-name=distill" in lines and "#SBATCH --time=1-00:00:00" in lines and "GPUS=1" in lines
    assert not [line for line in lines if line.startswith(("CONTAINER", "MOUNTS", "ACTIVATE"))]


@pytest.mark.parametrize(("own", "gpus", "processes"), [(None, 8, 8), (None, 0, 1), (3, 8, 3), (2, 0, 2)])
def test_a_node_has_a_process_a_gpu_or_as_many_as_it_is_said(own, gpus, processes):
    assert processes_per_node(ClusterConfig(processes_per_node=own, gpus_per_node=gpus)) == processes


def test_what_a_node_sources_is_given_or_the_packages_own(monkeypatch, tmp_path):
    assert submitting._activate(ClusterConfig()) is None
    monkeypatch.chdir(tmp_path)
    assert submitting._activate(ClusterConfig(activate="a/activate")) == tmp_path / "a/activate"
    # An installed package has no launch/ beside it.
    monkeypatch.setattr(submitting, "ROOT", tmp_path)
    assert submitting._activate(ClusterConfig(container="x")) is None
    monkeypatch.setattr(submitting.sys, "prefix", str(tmp_path))
    assert submitting._activate(ClusterConfig()) == Path(os.devnull)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    assert submitting._activate(ClusterConfig()) == tmp_path / "bin" / "activate"


@pytest.mark.parametrize(
    ("time", "fine"),
    [("30", True), ("1:30", True), ("24:00:00", True), ("2-12", True), ("2-12:00:00", True), ("soon", False), ("1:2:3:4", False),
     ("-1", False), ("", False), ("1:", False), ("1h", False)],
)  # fmt: skip
def test_times_are_slurms(time, fine):
    if fine:
        check_job(replace(job_of(time=time), submit=False))
    else:
        with pytest.raises(UserError, match=r"is not a time: write minutes, HH:MM:SS or DAYS-HH:MM:SS"):
            check_job(replace(job_of(time=time), submit=False))


@pytest.mark.parametrize(
    ("cluster", "more", "says"),
    [
        ({"sbatch": ["exclude=n1"]}, {}, "cluster.sbatch has 'exclude=n1': write options of sbatch with their dashes"),
        ({"sbatch": ["--a=b\nc"]}, {}, "cluster.sbatch has '--a=b\\nc'"), ({"sbatch": ["-x"]}, {}, "cluster.sbatch has '-x'"),
        ({"sbatch": ["--a=b"]}, {}, None),
        ({"activate": "/dev/null", "container": "x"}, {}, "are both given: a container brings its environment itself"),
        ({"activate": "/no/such"}, {}, "cluster.activate=/no/such does not exist"),
        ({"activate": str(ROOT / "Makefile")}, {}, None),
        ({}, {"name": "a\nb"}, "name='a\\nb' has a line break"), ({"partition": "a\nb"}, {}, "cluster.partition='a\\nb' has a"),
        ({"account": "a\nb"}, {}, "cluster.account='a\\nb' has a"), ({}, {"output": "a\nb"}, "output='a\\nb' has a"),
        ({}, {"submit": True}, "there is no sbatch here"), ({}, {"submit": True, "dry_run": True}, None),
    ],
)  # fmt: skip
def test_what_slurm_or_the_shell_would_misread_is_refused(monkeypatch, tmp_path, cluster, more, says):
    monkeypatch.setenv("PATH", str(tmp_path))
    cfg = replace(job_of(**cluster), **{"submit": False, **more})
    if says is None:
        check_job(cfg)
    else:
        with pytest.raises(UserError) as error:
            check_job(cfg)
        assert says in str(error.value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("distill a=1", ("distill", ["a=1"])), (["launch/distill.py", "a=b c"], ("distill", ["a=b c"])),
        (["prune"], ("prune", [])),
        ("distill.py", ("distill", [])), ([], "no command"), ("", "no command"),
        ("python x", "leave python out, the job starts it"),
        (["torchrun"], "leave torchrun out"), ("a 'b", "cannot be read"),
        *((name, f"{name} is not for a job of this kind") for name in
          ("compress", "distill_candidates", "demo", "status", "submit", "throughput")),
        ("nothing", "there is no command nothing: it is one of adopt_data, benchmark,"),
    ],
)  # fmt: skip
def test_which_commands_are_jobs(value, found):
    if isinstance(found, tuple):
        assert read_command(value) == found
    else:
        with pytest.raises(UserError, match=found):
            read_command(value)


def test_a_command_is_rehearsed_as_a_process_of_the_job(monkeypatch):
    ran = []
    monkeypatch.setattr(
        submitting, "run_program", lambda words, processes: ran.append((words, processes)) or Ended(0, "")
    )
    rehearse("distill", ["a=1", "device=cuda", "dry_run=false", "devices=2"], 24)
    ((words, processes),) = ran
    assert words[:4] == ["env", "-u", "MASTER_ADDR", "WORLD_SIZE=24"] and processes == 1
    assert words[-4:] == ["distill", "a=1", "devices=2", "dry_run=true"] or words[-3:] == [
        "a=1",
        "devices=2",
        "dry_run=true",
    ]
    for ended, says in (
        (Ended(2, "a mistake"), "distill: a mistake"), (Ended(3, ""), "distill: its dry run ended with status 3"),
    ):  # fmt: skip
        monkeypatch.setattr(submitting, "run_program", lambda *_, ended=ended: ended)
        with pytest.raises(UserError, match=f"^{says}$"):
            rehearse("distill", [], 1)


def test_the_clusters_hardware_is_foreseen_unless_the_command_says_its_own():
    cluster = ClusterConfig(gpu="h100", memory_gib=80)
    known = SimpleNamespace(cluster=1)
    words = submitting._hardware_words(known, cluster, ["a=1"])
    assert {"cluster.gpu=h100", "cluster.memory_gib=80"} <= set(words) and not [
        one for one in words if one.endswith("=None")
    ]
    assert submitting._hardware_words(SimpleNamespace(), cluster, ["a=1"]) == []
    for own in ("cluster=h200", "cluster.gpu=h200"):
        assert submitting._hardware_words(known, cluster, [own]) == []
    assert not [one for one in words if one.startswith(("cluster.time", "cluster.partition"))]


def test_what_becomes_of_a_job(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    rehearsed, given = [], []
    monkeypatch.setattr(submitting, "rehearse", lambda *words: rehearsed.append(words))
    monkeypatch.setattr(submitting, "render", lambda *_: "the script\n")
    monkeypatch.setattr(submitting, "_sbatch", lambda file: given.append(file.read_text()) or "77")
    job = Job("distill", ["a=1"], SimpleNamespace())
    cfg = replace(job_of(gpus_per_node=4), nodes=3, submit=False, output=str(tmp_path / "j"))
    submit(replace(cfg, dry_run=True), job)
    assert not (tmp_path / "j").exists() and capsys.readouterr().out == "the script\n\n"
    submit(cfg, job)
    said = capsys.readouterr().out
    assert said == f"the script\n\nWritten: {tmp_path}/j/job.sh; sbatch it when it is right\n" and given == []
    (tmp_path / "j" / "job.sh").write_text("edit script\n"[:11])
    submit(replace(cfg, submit=True), job)
    # One that was edited is the one that is submitted.
    assert capsys.readouterr().out.endswith(f"Submitted: job 77 ({tmp_path}/j/job.sh)\n") and given == ["edit script"]
    assert rehearsed == [("distill", ["a=1"], 12)] * 3


def test_slurms_number_or_its_reason(monkeypatch):
    answers = iter([(0, "77;cluster\n", ""), (0, "78\n", ""), (1, "", "no\n  such partition\n"), (3, "", "")])
    asked = []

    def run(words, **_):
        asked.append(words)
        return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), next(answers), strict=True)))

    monkeypatch.setattr(subprocess, "run", run)
    assert [submitting._sbatch(Path("job.sh")) for _ in range(2)] == ["77", "78"]
    assert asked[0] == ["sbatch", "--parsable", "job.sh"]
    for says in ("sbatch refused job.sh: no such partition", "sbatch refused job.sh: status 3"):
        with pytest.raises(UserError, match=f"^{says}$"):
            submitting._sbatch(Path("job.sh"))


def test_a_preset_is_no_model_of_a_job_that_is_submitted(hydra, monkeypatch, tmp_path):
    """But for those commands that make weights themselves, and in what is only looked at."""
    monkeypatch.setattr(submitting, "check_job", lambda _: None)
    export = ["export_hf", "model=llama3_1_8b", f"output={tmp_path}/o"]
    cfg = SubmitConfig(output=str(tmp_path / "j"), command=export)
    with pytest.raises(UserError, match="model=… must be a model folder here"):
        check_submit(cfg)
    for given in (replace(cfg, submit=False), replace(cfg, dry_run=True)):
        assert check_submit(given).name == "export_hf"
    made = ["random_model", "model=llama3_1_8b", f"output={tmp_path}/o"]
    assert check_submit(replace(cfg, command=made)).words == made[1:]
    assert check_submit(replace(cfg, command=["export_hf", "model=m", f"output={tmp_path}/o"])).config.model.path == "m"


def test_what_a_job_reads_and_whether_it_saves(hydra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m/x", "d/y", "z"):
        (tmp_path / name).mkdir(parents=True)
    config = compose("evaluate", ["model=m/x", "data.path=d/y", "output=none/here"])
    assert submitting._folders(config) == [tmp_path / "d/y", tmp_path / "m/x"]
    assert not submitting._has_checkpoints(config)
    assert submitting._has_checkpoints(compose("distill", ["teacher=m", "student=m", "data.path=d", "output=o"]))
    assert not submitting._has_checkpoints(compose("export_hf", ["model=m", "output=o"]))
