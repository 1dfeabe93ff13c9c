"""The job scripts on a real Slurm of two nodes: slurm/distill_4b.sh itself, made smaller by variables and options alone.

Whatever happens to a job, its losses are those of an undisturbed one. Needs Slurm's programs; without them these tests are
skipped, except where CI is set.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.launcher import CONF, compose
from minitron_megatron.search.search import search_shapes
from minitron_megatron.train.metrics import OF_THE_MACHINE
from tests.slurm_cluster import PACKAGES, Cluster, missing_programs, slurm_cluster
from tests.test_prune import random_scores, write_scores
from tests.tiny import data_folder, hf_model, imported

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_INTERVAL = 16, 4
SMALLER = (
    f"trainer.steps={STEPS}",
    "trainer.tokens=null",
    f"trainer.save_interval={SAVE_INTERVAL}",
    "trainer.global_batch_size=4",
    "trainer.validation_samples=0",
    "data.sequence_length=32",
    "logger.wandb=disabled",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One Slurm for all tests."""
    if missing := missing_programs():
        reason = f"no {', '.join(missing)} here: apt-get install {PACKAGES}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def variables(cluster):
    """What the scripts take from the environment."""
    model = imported(hf_model(), cluster.folder)
    student = imported(hf_model(1, hidden_size=16, intermediate_size=32), cluster.folder / "student")
    return {
        "ROOT": str(ROOT),
        "ACTIVATE": _activate(cluster.folder),
        "TEACHER": str(model),
        "STUDENT": str(student),
        "DATA": str(data_folder(cluster.folder, model)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _activate(folder: Path) -> str:
    """This Python's environment, by a file whose name wants quotes."""
    file = folder / "it's an environment"
    file.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    return str(file)


def distill(cluster: Cluster, variables: dict[str, str], output: Path) -> int:
    """sbatch the shipped script over both nodes; gives the job's number."""
    return cluster.submit(
        "--nodes=2", "--gpus-per-node=1", "--time=10", ROOT / "slurm" / "distill_4b.sh", *SMALLER,
        **variables, OUTPUT=str(output), LOGS=str(output.with_suffix(".logs")),
    )  # fmt: skip


def metrics(output: Path) -> list[dict]:
    """Every line of a run's metrics without what depends on the machine."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def wait_for_checkpoint(cluster: Cluster, output: Path, timeout: float = 600.0) -> None:
    deadline = time.monotonic() + timeout
    while not list((output / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def pid_of_rank(rank: int, job: int) -> int:
    """The training process of a rank, by the environment that torchrun gave it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            training = b"launch/distill.py" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if training and {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job}".encode()} <= set(environment):
            return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


@pytest.fixture
def initialized():
    """Configs can be composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def undisturbed(cluster, variables):
    """Metrics of a job that nothing happened to."""
    output = cluster.folder / "undisturbed"
    number = distill(cluster, variables, output)
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "0", cluster.logs()
    assert (output / "model" / "manifest.yaml").is_file()
    assert len(list(output.with_suffix(".logs").glob(f"{number}-*.log"))) == 2, "one log a node"
    return metrics(output)


def test_the_shipped_script_distills_over_both_nodes(undisturbed):
    assert [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))
    assert undisturbed[-1]["loss"] < undisturbed[0]["loss"]


def _preempt(cluster: Cluster, job: int) -> None:
    cluster.call("scontrol", "requeue", job)


def _time_limit(cluster: Cluster, job: int) -> None:
    """What `--signal=B:USR1@300` does 300 seconds before the limit."""
    cluster.call("scancel", "--batch", "--signal=USR1", job)


def _kill_a_rank(_: Cluster, job: int) -> None:
    os.kill(pid_of_rank(1, job), signal.SIGKILL)


@pytest.mark.parametrize(
    ("happening", "restarts", "says"),
    [
        (_preempt, "1", "DUE TO JOB REQUEUE"),
        (_time_limit, "1", "stopped before its end"),
        (_kill_a_rank, "0", "started again (1 of 3"),
    ],
    ids=["preempted", "time limit", "killed rank"],
)
def test_a_disturbed_job_ends_with_the_losses_of_an_undisturbed_one(
    cluster, variables, undisturbed, happening, restarts, says
):
    output = cluster.folder / happening.__name__.strip("_")
    job = distill(cluster, variables, output)
    wait_for_checkpoint(cluster, output)
    happening(cluster, job)
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == restarts, cluster.logs()
    assert says in (cluster.folder / f"distill_4b_{job}.log").read_text()
    log = "".join(file.read_text() for file in output.with_suffix(".logs").iterdir())
    assert "continuing from step" in log
    if happening is _time_limit:
        assert "stopped at step" in log
    assert metrics(output) == undisturbed


def test_a_mistake_ends_the_job_at_once_with_its_line(cluster, variables):
    output = cluster.folder / "mistake"
    job = distill(cluster, {**variables, "TENSOR": "7"}, output)
    assert cluster.wait(job)["ExitCode"] == "2:0", cluster.logs()
    logs = "".join(file.read_text() for file in output.with_suffix(".logs").iterdir())
    said = re.findall(r"error: rank \d on \S+: parallel\.tensor × pipeline × context = 7", logs)
    assert len(said) == 1 and not output.exists()


def test_a_submitted_command_runs_as_its_rendered_script(cluster, variables):
    output, job_folder = cluster.folder / "perplexity", cluster.folder / "it's a job"
    words = ["cluster=h100", "cluster.gpus_per_node=1", "nodes=2", "cluster.time=10", f"output={job_folder}"]
    words += [
        f"cluster.activate={variables['ACTIVATE']}",
        "cluster.setup=['export OMP_NUM_THREADS=1']",
        "--",
        "evaluate",
    ]
    words += [f"model={variables['TEACHER']}", f"data.path={variables['DATA']}", "data.sequence_length=32"]
    said = cluster.call(sys.executable, ROOT / "launch" / "submit.py", *words, "parallel.tensor=2", f"output={output}")
    job = int(re.search(r"Submitted: job (\d+)", said).group(1))
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.logs()
    manifest = yaml.safe_load((output / "manifest.yaml").read_text())
    assert manifest["config"]["parallel"]["tensor"] == 2 and manifest["results"]["perplexity"] > 1
    assert len(list(cluster.folder.glob(f"it's a job_logs/{job}-*.log"))) == 2


def test_candidates_side_by_side_are_arrays_that_wait_for_one_another(cluster, variables, initialized):
    """slurm/halving.sh: of two candidates one goes on. The task that has the array's own number stops: it alone is requeued."""
    scores = write_scores(random_scores(Path(variables["TEACHER"])), cluster.folder / "scores")
    options = ["budget.parameters=50000", "budget.at_least=0.5", "space={multiple: 4, tensor: 1}", "keep=2"]
    found, output = cluster.folder / "found", cluster.folder / "candidates"
    words = [f"model={variables['TEACHER']}", f"scores={scores}", *options, f"output={found}"]
    search_shapes(compose("search", words))
    trainer = "{steps: 20, global_batch_size: 4, validation_samples: 4, save_interval: 2}"
    distill = f"distill={{trainer: {trainer}, logger: {{wandb: disabled}}}}"
    said = cluster.call(
        "bash", ROOT / "slurm" / "halving.sh", distill, "cache=false", "halving.steps=[10]", "data.sequence_length=32",
        "data.max_epochs=9", **variables, FOUND=str(found), OUTPUT=str(output), GPUS="1", SBATCH_TIMELIMIT="10",
    )  # fmt: skip
    prepared, *rungs = map(int, re.findall(r"(?:cache|rung \d) (\d+)", said))
    after = [cluster.job(number)["Dependency"] for number in rungs]
    assert [f"afterok:{number}" in text for number, text in zip([prepared, *rungs], after, strict=False)] == [
        True,
        True,
    ]
    wait_for_checkpoint(cluster, output / "candidates" / "rank_02" / "distilled")
    assert cluster.job(f"{rungs[0]}_2")["JobId"] == str(rungs[0])
    cluster.call("scancel", "--batch", "--signal=USR1", f"{rungs[0]}_2")
    assert cluster.wait(f"{rungs[1]}_1")["JobState"] == "COMPLETED", cluster.logs()
    restarts = {task: cluster.job(f"{rungs[0]}_{task}")["Restarts"] for task in (1, 2)}
    assert restarts == {1: "0", 2: "1"}
    results = json.loads((output / "results.json").read_text())
    assert [len(one["validation_kl"]) for one in results["candidates"]] == [2, 1]
    assert results["candidates"][0]["validation_kl"]["10"] <= results["candidates"][1]["validation_kl"]["10"]


def test_the_road_is_a_chain_of_jobs(cluster):
    """Every script of it is one that Slurm takes, and waits for what it needs; nothing of it runs."""
    variables = {"HF": "hf", "CORPUS": "text", "NODES": "2", "GPUS": "2", "SBATCH_PARTITION": "closed"}
    said = cluster.call("bash", ROOT / "slurm" / "road.sh", ROOT=str(ROOT), **variables)
    numbers = dict(re.findall(r"(\w[\w ]*) (\d+)[,:]", said))
    jobs = {name: cluster.job(int(number)) for name, number in numbers.items()}
    cluster.call("scancel", *numbers.values())
    after = {
        name: {other for other, number in numbers.items() if f":{number}" in job["Dependency"]}
        for name, job in jobs.items()
    }
    assert after == {
        "import": set(),
        "data": {"import"},
        "importance": {"data"},
        "prune": {"importance"},
        "correct teacher": {"data"},
        "distill": {"prune", "correct teacher"},
        "evaluate": {"distill"},
        "export": {"distill"},
    }
    assert {name: job["NumNodes"][0] for name, job in jobs.items() if job["NumNodes"][0] != "1"} == {
        "correct teacher": "2",
        "distill": "2",
    }
