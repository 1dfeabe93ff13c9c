"""launch/submit.py and the words that job scripts start; on a real Slurm they run in tests/test_slurm.py."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from minitron_megatron.cli.arguments import CONF, presets, words_after_dashes
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose
from minitron_megatron.submit import SCRIPT, read_command, render, submit
from tests.slurm_cluster import programs_by_name
from tests.test_commands import environment, error_of, free_port, run

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("teacher=llama3_1_8b", "student=llama3_1_minitron_4b_width", "experiment=llama3_1_minitron_4b_width")


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def started(tmp_path):
    """`started(script, *options, **variables)`: the words after launch/ that a script gives to srun."""
    words = tmp_path / "words"
    programs = programs_by_name(
        tmp_path / "programs",
        srun=f"printf '%s\\0' \"$@\" > '{words}'; exit 2",
        scontrol="echo node1; echo node2",
        squeue="echo RUNNING",
    )
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "ROOT": str(ROOT)}

    def start(script: Path, *options: str, **variables: str) -> tuple[list[str], list[str]]:
        environment = {**os.environ, **job, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(script), *options], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        found = words.read_text().split("\0")[:-1]
        at = next(i for i, word in enumerate(found) if "/launch/" in word)
        return found[:at], found[at:]

    return start


@pytest.mark.parametrize(
    ("script", "variables", "options", "sizes"),
    [
        ("distill_4b", {"TEACHER": "t", "STUDENT": "s", "DATA": "d"}, ("optim.lr=2e-4",), {"tokens": 94e9}),
        ("distill_mn_8b", {"TEACHER": "t", "STUDENT": "s", "DATA": "d"}, (), {"tokens": 380e9}),
        ("correct_teacher", {"TEACHER": "t", "DATA": "d"}, (), {"tokens": 100e9}),
        (
            "correct_teacher",
            {"TEACHER": "t", "DATA": "d", "RECIPE": "correct_mistral_nemo_12b"},
            (),
            {"tokens": 127e9, "global_batch_size": 768},
        ),
        ("importance", {"MODEL": "m", "DATA": "d"}, ("importance.batch=mean",), {}),
        ("prune_4b", {"MODEL": "m", "SCORES": "s"}, (), {}),
        ("run", {}, ("evaluate", "model=m", "data.path=a b", "output=it's"), {}),
    ],
)
def test_what_a_script_starts_is_a_command_with_options_that_it_has(hydra, started, script, variables, options, sizes):
    before, (file, *words) = started(ROOT / "slurm" / f"{script}.sh", *options, **variables)
    name = Path(file).stem
    if name not in COMMANDS:
        pytest.skip(f"launch/{name}.py is not there yet")
    config = compose(name, words)
    for key, value in sizes.items():
        assert getattr(config.trainer, key) == value
    assert before[0] == "--nodes=2" and before[before.index("--nproc-per-node") + 1] == "8"


def test_a_container_sees_every_folder_where_it_is(started, tmp_path):
    folders = {"MODEL": str(tmp_path / "a b" / "model"), "DATA": "data", "OUTPUT": "out/scores"}
    before, _ = started(
        ROOT / "slurm" / "importance.sh", **folders, CONTAINER="image.sqsh", MOUNTS="/scratch:/tmp", ACTIVATE="unused"
    )
    assert "--container-image=image.sqsh" in before and f"--container-workdir={tmp_path}" in before
    mounts = next(w for w in before if w.startswith("--container-mounts=")).partition("=")[2].split(",")
    seen = [ROOT, tmp_path, tmp_path / "a b" / "model", tmp_path / "data", tmp_path / "out"]
    assert set(mounts) == {*(f"{path}:{path}" for path in seen), "/scratch:/tmp"}
    assert "bash" not in before


@pytest.mark.slow
def test_a_rendered_script_gives_the_command_the_words_that_were_typed(started, tmp_path):
    typed = [
        *SIZES,
        "data.path=a path, with = odd 'ch@racters'",
        'logger.name="$HOME"',
        "output=x",
        "parallel.tensor=2",
    ]
    output = tmp_path / "it's a job"
    done = run(
        "submit", "cluster=h200", "nodes=32", "submit=false", f"output={output}", "cluster.setup=['export ODD=\"a b\"']",
        "--", "distill", *typed, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = (output / SCRIPT).read_text()
    assert "--signal=B:USR1@300" in script and 'export ODD="a b"' in script and script in done.stdout
    _, (_, *words) = started(output / SCRIPT)
    assert words == typed


def test_the_command_may_be_one_line():
    assert read_command("launch/distill.py teacher='a b'") == ("distill", ["teacher=a b"])
    assert words_after_dashes(["output=x", "--", "prune", "model=a'b"], "command") == [
        "output=x",
        "command=['prune','model=a\\'b']",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("command=distil",), "there is no command distil: it is one of"),
        (("command=compress",), "slurm/compress.sh runs a chain"),
        (("command=[]",), "no command: write it after --"),
        (("command='torchrun launch/distill.py'",), "leave torchrun out"),
        (('command="distill \\"teacher=x"',), "cannot be read"),
        (("command=['distill','trainer.step=3']",), "did you mean trainer.steps?"),
        (("command='export_hf model=x output=y'", "cluster.time=soon"), "cluster.time=soon is not a time"),
        (("command='export_hf model=x output=y'", "cluster.sbatch=['exclude=n1']"), "with their dashes"),
        (("command='export_hf model=x output=y'",), "there is no sbatch here"),
    ],
)  # fmt: skip
def test_mistakes_end_before_anything_is_written(hydra, tmp_path, monkeypatch, words, says):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as raised:
        submit(compose("submit", [f"output={tmp_path / 'x'}", *words]))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_command_would_refuse_is_refused(tmp_path):
    options = ("submit", f"output={tmp_path / 'x'}", "submit=false", "nodes=3", "cluster.gpus_per_node=8")
    says = error_of(run(*options, "--", "distill", *SIZES, "data.path=d", "output=y", "parallel.tensor=5"))
    assert "distill: parallel.tensor × pipeline × context = 5" in says and "24" in says
    assert list(tmp_path.iterdir()) == []


def test_every_cluster_preset_composes(hydra):
    for name in presets("submit")["cluster"]:
        config = compose("submit", [f"cluster={name}", "command=x", "output=y"])
        assert config.cluster.gpu == name and config.cluster.gpus_per_node > 0


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_bash_and_name_no_place_of_one_machine(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert str(ROOT) not in text and str(Path.home()) not in text and sys.prefix not in text


WORKER = """
import os, signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(1)
    Path(f"saved-{os.environ['RANK']}").touch()
    while len(list(Path().glob("saved-*"))) < 2:
        time.sleep(0.1)
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun_passes_signals_on_and_ends_as_its_processes_do(tmp_path, number):
    (tmp_path / "worker.py").write_text(WORKER.replace("SIGUSR1", number.name))
    words = ["--nproc-per-node=2", f"--master-port={free_port()}", "worker.py"]
    job = subprocess.Popen(
        [sys.executable, "-m", "minitron_megatron.parallel.torchrun", *words],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    job.send_signal(number)
    assert job.wait(60) == 75


def jobs_of(tmp_path, script, before="", **variables):
    """What a script that is run where sbatch is gives to it: (words of each job, what it says); `before` adds words."""
    said = tmp_path / "sbatch"
    programs = programs_by_name(
        tmp_path / "programs",
        sbatch=f"SAID='{said}'; {before}printf '%s\\n' \"$*\" >> '{said}'; wc -l < '{said}'",
        python="echo 'candidates of each rung: 4 2 1'",
    )
    (tmp_path / "activate").write_text("")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{script}.sh")], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "ROOT": str(ROOT), "ACTIVATE": str(tmp_path / "activate"), **variables,
             "PATH": f"{programs}:{os.environ['PATH']}"},
    )  # fmt: skip
    return [line.split() for line in said.read_text().splitlines()], done.stdout


def test_rungs_wait_for_one_another(tmp_path):
    """Each for the one before; as many tasks as candidates."""
    jobs, said = jobs_of(tmp_path, "halving", FOUND="f", DATA="d", AT_ONCE="3")
    after = [[word for word in words if word.startswith("--dependency")] for words in jobs]
    assert after == [[], *([f"--dependency=afterok:{n}"] for n in (1, 2, 3))]
    assert [word for words in jobs for word in words if word.startswith("--array")] == [
        "--array=1-4%3", "--array=1-2%3", "--array=1-1%3",
    ]  # fmt: skip
    assert all("--kill-on-invalid-dep=yes" in words for words in jobs) and "rung 3 4 (1 candidates)" in said


def test_jobs_of_the_road_wait_for_one_another(tmp_path):
    jobs, _ = jobs_of(tmp_path, "road", HF="hf", CORPUS="c", NODES="2")
    after = [next((word for word in words if word.startswith("--dependency")), "") for words in jobs]
    assert after == ["", *(f"--dependency=afterok:{n}" for n in ("1", "2", "3", "2", "4:5", "6", "6"))]
    assert all("--kill-on-invalid-dep=yes" in words for words in jobs)


def test_every_start_has_a_rendezvous_of_its_own(started):
    """One is used once: two starts of a job differ; all are on the first node, at a port of the job."""
    found = []
    for _ in range(3):
        before, _ = started(ROOT / "slurm" / "run.sh", "evaluate", "output=x")
        found.append(before[before.index("--rdzv-id") + 1])
        assert before[before.index("--rdzv-endpoint") + 1] == "node1:20007"
    assert len(set(found)) > 1 and all(one.startswith("7-") for one in found)


def test_options_of_a_user_go_over_those_of_a_script(started):
    """They come last: of one option that is given twice the last counts."""
    variables = {"TEACHER": "t", "STUDENT": "s", "DATA": "d", "MODEL": "m", "SCORES": "c", "FOUND": "f"}
    for script in ("distill_4b", "distill_mn_8b", "correct_teacher", "importance", "prune_4b"):
        _, words = started(ROOT / "slurm" / f"{script}.sh", "mine=1", **variables)
        assert words[-1] == "mine=1"


def test_the_output_of_run_is_the_word_that_says_so(started, tmp_path):
    """Not one that has it inside."""
    started(ROOT / "slurm" / "run.sh", "evaluate", "data.output=no/x", "output=yes/x", "hydra_output=no/y")
    assert (tmp_path / "yes").is_dir() and not (tmp_path / "no").exists()


def words_of(tmp_path, script, *options, **variables):
    """(words, environment) of what a job script starts: srun on all nodes, or python on the first one."""
    said = tmp_path / "said"
    note = f"printf '%s\\0' \"$@\" > '{said}'; env -0 > '{said}.env'; exit 2"
    programs = tmp_path / "programs"
    if not programs.exists():
        programs_by_name(
            programs, srun=note, python=note, squeue="echo RUNNING",
            scontrol="case $* in *node1) echo Node=node1 NodeAddr=10.0.0.1 Port=1 ;; *) echo node1; echo node2 ;; esac",
        )  # fmt: skip
        (tmp_path / "activate").write_text("")
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{script}.sh"), *options], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": f"{programs}:{os.environ['PATH']}", **job, "ACTIVATE": str(tmp_path / "activate"), **variables},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    words, values = (Path(f"{said}{of}").read_text().split("\0")[:-1] for of in ("", ".env"))
    return words, dict(value.split("=", 1) for value in values)


FOLDERS_OF = {"TEACHER": "t", "STUDENT": "s", "DATA": "d", "MODEL": "m", "SCORES": "c", "FOUND": "f"}
JOBS = [path.stem for path in sorted((ROOT / "slurm").glob("*.sh")) if "\n#SBATCH" in path.read_text()]


def test_a_chain_has_the_processes_of_all_nodes(tmp_path):
    """compress.sh runs its program on the first node; what starts a stage is on all of them."""
    words, _ = words_of(tmp_path, "compress", "mine=1", MODEL="m", DATA="d", CHAIN="c", GPUS="4")
    assert {"processes=8", "parallel.tensor=8", "parallel.sequence=true", "chain=c"} <= set(words) and words[
        -1
    ] == "mine=1"
    assert any(word.startswith("start=srun --nodes=2") and "--nproc-per-node 4" in word for word in words)


@pytest.mark.parametrize("script", JOBS)
def test_whatever_a_script_takes_from_its_environment_reaches_what_it_starts(tmp_path, script):
    """Each of its variables, given as a number of its own, stands in the words of the command or its container."""
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    names = set(re.findall(r"(?:^| )([A-Z_]+)=\$\{\1\b", text, re.MULTILINE)) - {"ROOT"}
    given = {name: str(9000 + number) for number, name in enumerate(sorted(names))}
    own = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "9900"} if "SLURM_ARRAY" in text else {}
    container = {"CONTAINER": "9901", "MOUNTS": "/9902:/x", "GPUS": "h100:9903", "LOGS": "9904"}
    options = ("evaluate", "output=o") if script == "run" else ()
    words, _ = words_of(tmp_path, script, *options, **{**FOLDERS_OF, **container, **own, **given})
    if script == "run":
        given.pop("OUTPUT", None)
    wanted = {**given, **own, **container, "MOUNTS": "9902", "GPUS": "9903"}
    wanted.pop("SLURM_ARRAY_JOB_ID", None)
    assert [name for name, value in wanted.items() if not any(value in word for word in words)] == []
    assert "h100" not in " ".join(words)


@pytest.mark.parametrize(("rung", "task"), [("", ""), ("0", ""), ("2", "3")])
def test_which_rung_and_candidate_a_job_trains(tmp_path, rung, task):
    """All of them, the teacher's cache, which is rung 0, or a candidate of a rung, which is a task of an array."""
    of_array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": task} if task else {}
    words, _ = words_of(tmp_path, "distill_candidates", FOUND="f", DATA="d", RUNG=rung, **of_array)
    asked = [word for word in words if word.startswith(("rung=", "candidate="))]
    assert asked == [*([f"rung={rung}"] if rung else []), *([f"candidate={task}"] if task else [])]
    assert "processes=16" in words and "found=f" in words


@pytest.mark.parametrize("script", JOBS)
def test_how_a_script_is_queued(script):
    """Long ones are told before their limit, all go back into the queue, and logs are gone on with."""
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    assert "#SBATCH --requeue\n" in text and "#SBATCH --open-mode=append\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text and "\nset -euo pipefail\n" in text
    assert ("#SBATCH --signal=B:USR1@300\n" in text) == ("--time=24" in text)


def test_what_the_processes_of_a_job_find_in_their_environment(tmp_path):
    """What is documented, or what the user has set; one that fails leaves the others a minute, and logs are gone on with."""
    plain = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "8"}
    words, found = words_of(tmp_path, "run", "evaluate", "output=o")
    assert found.items() >= {**plain, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}.items()
    assert {"--kill-on-bad-exit=0", "--wait=60", "--open-mode=append", "--cpu-bind=none"} <= set(words)
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.1:20007"
    mine = dict.fromkeys(plain, "77") | {"PYTHONPATH": "/mine"}
    _, found = words_of(tmp_path, "run", "evaluate", "output=o", **mine)
    assert found.items() >= {**mine, "PYTHONPATH": f"{ROOT}:/mine"}.items()
    for job in (19_999, 20_000, 40_001):
        words, _ = words_of(tmp_path, "run", "evaluate", "output=o", SLURM_JOB_ID=str(job))
        assert words[words.index("--rdzv-endpoint") + 1].endswith(f":{20_000 + job % 20_000}")


def test_what_the_jobs_of_the_road_are_given(tmp_path):
    """Each has what the ones before it make: the corrected teacher teaches, the model itself is corrected and cut."""
    note = '"$TEACHER" "$MODEL" "$DATA" "$SCORES" "$STUDENT" "$OUTPUT"'
    jobs, said = jobs_of(
        tmp_path, "road", f"printf '%s|%s|%s|%s|%s|%s ' {note} >> \"$SAID\"; ", HF="/hf", CORPUS="/c", NODES="2", GPUS="5",
        WORK="w", DISTILL="distill_mn_8b", SEQUENCE="77",
    )  # fmt: skip
    seen = {Path(next(w for w in words if w.endswith(".sh"))).stem: words[0].split("|") for words in jobs}
    assert seen["importance"][1:3] == ["w/model", "w/data"] and seen["importance"][-1] == "w/scores"
    assert seen["prune_4b"][1:4:2] == ["w/model", "w/scores"] and seen["prune_4b"][-1] == "w/student"
    assert seen["correct_teacher"][0] == "w/model" and seen["correct_teacher"][-1] == "w/teacher"
    assert seen["distill_mn_8b"][0] == "w/teacher" and seen["distill_mn_8b"][4:] == ["w/student", "w/distilled"]
    assert ["--nodes=2" in words for words in jobs] == [False] * 4 + [True] * 2 + [False] * 2
    assert all("--gpus-per-node=5" in words for words in jobs)
    of_run = {
        words[words.index(str(ROOT / "slurm" / "run.sh")) + 1]: words for words in jobs if "/run.sh" in " ".join(words)
    }
    assert {"hf=/hf", "output=w/model"} <= set(of_run["import_hf"])
    assert {"input=/c", "model=w/model", "output=w/data"} <= set(of_run["prepare_data"])
    assert {"model=w/distilled", "data.path=w/data", "data.sequence_length=77"} <= set(of_run["evaluate"])
    assert {"model=w/distilled", "output=w/hf"} <= set(of_run["export_hf"]) and "w/hf" in said


def test_only_what_saves_is_signalled_before_the_limit(hydra):
    for words, signalled in (
        (["distill", "teacher=t", "student=s", "data.path=d", "output=o"], True),
        (["evaluate", "model=m", "data.path=d", "output=o"], False),
    ):
        cfg = compose("submit", ["output=j", "command=x", "cluster.save_seconds=77"])
        text = render(cfg, words[0], words[1:], compose(words[0], words[1:]))
        assert ("--signal=B:USR1@77" in text) is signalled and "--requeue" in text


def test_the_folders_of_a_rendered_job_are_those_that_its_command_reads(hydra, tmp_path):
    """A container has no others: model and data by their absolute places, as the last words of the line that is sourced."""
    folders = [tmp_path / "t", tmp_path / "a b" / "s", tmp_path / "d"]
    for folder in folders:
        folder.mkdir(parents=True)
    words = [f"{name}={folder}" for name, folder in zip(("teacher", "student", "data.path"), folders, strict=True)]
    words += [f"output={tmp_path}/later"]
    cfg = compose("submit", ["output=j", "command=x"])
    text = render(cfg, "distill", words, compose("distill", words))
    (line,) = (line for line in text.splitlines() if line.startswith(". ") and "common.sh" in line)
    _, sourced, root, *seen = shlex.split(line)
    assert sourced.endswith("/slurm/common.sh") and root == "$ROOT" and seen == sorted(map(str, folders))
