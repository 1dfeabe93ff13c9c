"""Chains of rounds: whole ones by real commands, killed ones that continue, and mistakes refused before anything runs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.locks import lock, unlock
from minitron_megatron.cli.arguments import CONF, presets
from minitron_megatron.compress import SUMMARY, compress
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.stages import Stages, alone_in, run_program
from tests.slurm_cluster import programs_by_name
from tests.test_commands import ROOT, environment, error_of, run, shown
from tests.tiny import data_folder, hf_model, imported

ROUNDS = """
    {name: first, prune: {target.hidden_size: 24, target.ffn_hidden_size: 40}},
    {name: second, teacher: %s, importance: {samples: 6}, prune: {target: {num_query_groups: 2, num_attention_heads: 4}}}
"""
STAGES = ("importance", "prune", "distill", "evaluate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, data) of a tiny model."""
    folder = tmp_path_factory.mktemp("compress")
    path = imported(hf_model(), folder)
    return path, data_folder(folder, path)


def words(folders, output, *more, teacher="source"):
    """A chain of two rounds in which every stage takes a second or two."""
    model, data = folders
    return (
        "compress",
        f"model={model}",
        f"data.path={data}",
        "data.sequence_length=32",
        f"rounds=[{' '.join((ROUNDS % teacher).split())}]",
        "importance={samples: 4}",
        "distill={trainer: {steps: 8, global_batch_size: 4, save_interval: 2, validation_samples: 4}}",
        "distill.optim.lr=1e-3",
        "distill.logger.wandb=disabled",
        "export=false",
        f"output={output}",
        *more,
    )


def summary(root: Path) -> dict:
    return json.loads((root / SUMMARY).read_text())


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """An undisturbed chain: (its folder, what it printed)."""
    root = tmp_path_factory.mktemp("whole") / "chain"
    done = run(*words(folders, root), timeout=900)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


@pytest.mark.slow
def test_a_stage_runs_once_and_what_its_command_refuses_is_passed_on(folders, tmp_path, capfd):
    def cut(drop_layers):
        stages = Stages(tmp_path / "stages.json")
        stages.command("cut", tmp_path / "out", "prune", f"model={folders[0]}", f"drop_layers={drop_layers}")
        return capfd.readouterr().out

    assert shown(cut([1])) == ["prune"]
    digest = open_model_folder(tmp_path / "out").digest
    again = cut([1])
    assert "cut: done before in" in again and not shown(again)
    with pytest.raises(
        UserError,
        match=r"^cut: output=\S+ was made with other options or inputs \(drop_layers=\[1\], not \[2\]\): remove",
    ):
        cut([2])
    assert open_model_folder(tmp_path / "out").digest == digest


@pytest.mark.slow
def test_each_round_prunes_the_student_of_the_round_before(folders, whole):
    root, printed = whole
    found = summary(root)
    assert [one["name"] for one in found["rounds"]] == ["first", "second"]
    for one in found["rounds"]:
        at = root / one["name"]
        student = open_model_folder(at / "distilled")
        assert one["digest"] == student.digest
        assert (
            one["parameters"]
            == count_parameters(student.shape)
            == count_parameters(open_model_folder(at / "pruned").shape)
        )
        results = json.loads((at / "evaluation" / "results.json").read_text())
        assert (one["loss"], one["perplexity"]) == (results["loss"], results["perplexity"])
        assert one["tokens"] == 8 * 4 * 32 and set(one["seconds"]) == set(STAGES)
        assert f"{one['parameters']:,}" in printed
    first, second = (open_model_folder(root / name / "distilled").shape for name in ("first", "second"))
    assert (first.hidden_size, first.ffn_hidden_size, first.num_query_groups) == (24, 40, 4)
    assert (second.hidden_size, second.ffn_hidden_size, second.num_query_groups) == (24, 40, 2)
    inputs = read_manifest(root / "second" / "distilled" / "model")["inputs"]
    assert inputs["teacher"] == found["rounds"][0]["digest"]
    samples = [read_manifest(root / name / "scores")["results"]["samples"] for name in ("first", "second")]
    assert samples == [4, 6]
    assert len(shown(printed)) == 8 == printed.count(f" {ROOT}/launch/")


@pytest.mark.slow
def test_the_same_command_again_runs_nothing(folders, whole):
    root, _ = whole
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file() and f.parent != root}
    done = run(*words(folders, root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before in") == 8 and not shown(done.stdout)
    assert before == {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file() and f.parent != root}


@pytest.mark.slow
def test_a_copy_under_another_name_is_done_as_well(hydra, folders, whole, tmp_path, monkeypatch):
    """Model, data and chain: by the words for the copies; and where a command is asked again, it finds its copy whole."""
    copies = [shutil.copytree(one, tmp_path / f"copy{i}") for i, one in enumerate(folders)]
    chain = shutil.copytree(whole[0], tmp_path / "other")
    before = summary(chain)
    asked = []

    def ask(program, processes):
        asked.append(program)
        return run_program(program, processes)

    monkeypatch.setattr("minitron_megatron.stages.run_program", ask)
    rehearse(*words(folders, chain)[1:])
    assert not asked and [one["seconds"] for one in summary(chain)["rounds"]] == [
        one["seconds"] for one in before["rounds"]
    ]
    made = {file: file.stat().st_mtime_ns for file in chain.rglob("manifest.yaml")}
    rehearse(*words(copies, chain)[1:])
    assert asked and made == {file: file.stat().st_mtime_ns for file in chain.rglob("manifest.yaml")}
    assert summary(chain)["rounds"][1]["digest"] == before["rounds"][1]["digest"]


@pytest.mark.slow
def test_what_a_finished_stage_says_of_other_options_is_passed_on(folders, whole):
    root, _ = whole
    before = summary(root)
    done = run(*words(folders, root, "distill.optim.weight_decay=0.2"))
    says = error_of(done)
    assert says.startswith(f"error: round first, distill: output={root / 'first' / 'distilled'} holds a run with")
    assert "optim.weight_decay=0.1, not 0.2" in says
    assert summary(root) == before


def start(command):
    script, *rest = map(str, command)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / f"{script}.py"), *rest],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(running, there):
    deadline = time.monotonic() + 600
    while not there() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert there() and running.poll() is None


@pytest.mark.slow
def test_a_killed_chain_continues_to_the_same_student(folders, whole, tmp_path):
    """Killed while the first round distils: nothing that was finished runs again, and the last student is the same."""
    root = tmp_path / "chain"
    command = words(folders, root, "perplexity=false")
    with start(command) as running:
        wait_for(running, lambda: list((root / "first" / "distilled" / "checkpoints").glob("step_*")))
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate(timeout=60)
    assert not (root / "first" / "distilled" / "model").exists() and not (root / SUMMARY).exists()
    kept = [root / "first" / folder / "manifest.yaml" for folder in ("scores", "pruned")]
    before = [file.stat().st_mtime_ns for file in kept]
    done = run(*command, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stdout and done.stdout.count("done before in") == 2
    assert before == [file.stat().st_mtime_ns for file in kept]
    digests = [[one["digest"] for one in summary(folder)["rounds"]] for folder in (root, whole[0])]
    assert digests[0] == digests[1]
    assert all(one["perplexity"] is None for one in summary(root)["rounds"])


@pytest.mark.slow
def test_a_signal_lets_the_running_stage_save_first(folders, tmp_path):
    root = tmp_path / "chain"
    more = ("distill.trainer.steps=400", "distill.trainer.save_interval=300", "data.max_epochs=9")
    command = words(folders, root, *more, "perplexity=false")
    with start(command) as running:
        wait_for(running, lambda: (root / "first" / "distilled" / "metrics.jsonl").is_file())
        running.terminate()
        says = running.communicate(timeout=300)[1].strip()
        assert running.returncode == 75
    steps = [int(path.name.partition("_")[2]) for path in (root / "first" / "distilled" / "checkpoints").glob("step_*")]
    assert len(steps) == 1 and steps[0] < 300
    where = f"in round first, distill, at step {steps[0]} of 400"
    assert says.splitlines()[-1] == f"stopped {where}, which is saved: the same command continues it"


@pytest.mark.slow
def test_stages_of_two_processes_with_the_first_model_as_teacher(folders, tmp_path):
    root = tmp_path / "chain"
    more = ("processes=2", "parallel.pipeline=2", "distill.parallel.pipeline=1", "evaluate.processes=1")
    done = run(*words(folders, root, *more, "evaluate.parallel.pipeline=1", teacher="first"), timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" --nproc-per-node 2 ") == 6 and len(shown(done.stdout)) == 8
    inputs = [read_manifest(root / name / "distilled" / "model")["inputs"] for name in ("first", "second")]
    assert {i["teacher"] for i in inputs} == {open_model_folder(folders[0]).digest}
    layouts = [
        read_manifest(root / "second" / f)["config"]["parallel"]["pipeline"] for f in ("scores", "distilled/model")
    ]
    assert layouts == [2, 1]


def test_a_dry_run_shows_every_stage_and_writes_nothing(folders, tmp_path):
    more = ("dry_run=true", "processes=4", "parallel.tensor=2", "evaluate={processes: 1, parallel.tensor: 1}")
    done = run(*words(folders, tmp_path / "chain", *more))
    assert done.returncode == 0, done.stderr
    model = count_parameters(open_model_folder(folders[0]).shape)
    assert f"{model:,}" in done.stdout and "importance 4, prune 4, distill 4, evaluate 1" in done.stdout
    assert done.stdout.count(" --nproc-per-node 4 ") == 6 and len(shown(done.stdout)) == 8
    assert "target.hidden_size=24" in done.stdout and "parallel.tensor=2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_job_script_starts_every_stage_on_all_nodes(folders, tmp_path):
    """slurm/compress.sh with a dry run, Slurm's own programs standing there by name."""
    programs = programs_by_name(
        tmp_path / "programs", srun="exit 1", scontrol="echo node1; echo node2", squeue="echo RUNNING"
    )
    activate = tmp_path / "it's an environment"
    activate.write_text(f"PATH={programs}:{Path(sys.executable).parent}:$PATH\n")
    job = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "MODEL": str(folders[0]),
        "DATA": str(folders[1]),
        "OUTPUT": str(tmp_path / "chain"),
        "ROOT": str(ROOT),
        "ACTIVATE": str(activate),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "TENSOR": "2",
        "GPUS": "2",
        "CHAIN": "",
        "LOGS": str(tmp_path / "logs"),
    }
    options = "rounds=[{name:one,prune:{target.hidden_size:16}}] data.sequence_length=32 importance.samples=4 "
    options += "distill.trainer.steps=2 distill.trainer.validation_samples=0 export=false dry_run=true"
    script = ["bash", str(ROOT / "slurm" / "compress.sh"), *options.split()]
    done = subprocess.run(script, env={**environment(), **job}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    shell, torchrun = ["bash", "-c", '. "$0" && exec "$@"', str(activate)], "minitron_megatron.parallel.torchrun"
    assert [line[0] for line in lines] == ["srun"] * 4 and all(
        line[i : i + 4] == shell for line in lines for i in [line.index("bash")]
    )
    assert all(line[line.index(torchrun) + 1 :][:4] == ["--nnodes", "2", "--nproc-per-node", "2"] for line in lines)
    assert not (tmp_path / "chain").exists()


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def rehearse(*words: str) -> None:
    compress(compose("compress", list(words)))


SIZES_15B = (
    "model=llama3_1_8b",
    "model.hidden_size=6144",
    "model.num_attention_heads=48",
    "model.ffn_hidden_size=24576",
    "model.vocab_size=256000",
)


@pytest.mark.parametrize(
    ("preset", "model"), [("minitron_15b_8b_4b", SIZES_15B), ("demo_two_rounds", ("model=smollm2_135m",))]
)
def test_presets_fit_the_models_that_they_are_for(hydra, capsys, tmp_path, preset, model):
    rehearse(*model, f"chain={preset}", "data.path=nowhere", f"output={tmp_path / 'x'}", "dry_run=true")
    last = yaml.safe_load((CONF / "chain" / f"{preset}.yaml").read_text())["rounds"][-1]
    printed = capsys.readouterr().out
    assert f"output={tmp_path / 'x' / last['name'] / 'evaluation'}" in printed.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


def test_every_preset_is_tried():
    assert presets("compress")["chain"] == ["demo_two_rounds", "minitron_15b_8b_4b"]


def one_round(**options) -> str:
    """`rounds=` of a good first round, and a second one with these."""
    good = {"name": "first", "prune": {"target.hidden_size": 24}}
    return "rounds=" + json.dumps([good, {"name": "second", "prune": {"target.hidden_size": 16}, **options}]).replace(
        '"', ""
    )


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            ["rounds=[]"],
            "how small is not said: give budget.parameters=4.5e9 (search finds the shape), target=PRESET, chain=PRESET",
        ),
        (["rounds=5"], "no rounds: give chain=PRESET"),
        ([one_round(), "search.keep=3"], "search.keep= is of a stage that does not run without a budget: leave it out"),
        (["rounds=[{prune: {target.hidden_size: 24}}]"], "round 1 of rounds= has no name"),
        ([one_round(name="first")], "round first: there are two rounds of this name"),
        ([one_round(name="a/b")], "round a/b: a round's name is that of its folder: no slashes"),
        ([one_round(name="..")], "round ..: a round's name"),
        ([one_round(distil={})], "round second: unknown option 'distil': a round has name, teacher"),
        ([one_round(teacher="firts")], "round second: teacher=firts is not one of source, first: did you mean first?"),
        (
            [one_round(distill={"trainer.step": 3})],
            "round second, distill: unknown option 'trainer.step' of minitron distill: did you",
        ),
        ([one_round(distill={"trainer": {"steps": -3}})], "round second, distill: trainer.steps=-3 must be above 0"),
        (
            [one_round(distill={"trainer.tokens": 3})],
            "round second, distill: give either trainer.steps= or trainer.tokens=",
        ),
        ([one_round(distill={"student": "x"})], "round second, distill: student is set by the chain"),
        ([one_round(distill=5)], "round second, distill: distill=5 must be a mapping"),
        ([one_round(prune={})], "round second, prune: nothing to cut"),
        ([one_round(prune={"prune.heads": "merge"})], "round second, prune: nothing to cut"),
        (
            [one_round(prune={"target.hidden_size": 25})],
            "round second, prune: target.hidden_size=25 must be a whole number from 1 to the source model's 24",
        ),
        (
            [one_round(prune={"target": "mn_minitron_8"})],
            "round second, prune: target=mn_minitron_8 is not a preset of conf/target: did you mean mn_minitron_8b?",
        ),
        (
            [one_round(prune={"target.num_query_groups": 3})],
            "round second, prune: target.num_attention_heads=8 is not a multiple",
        ),
        ([one_round(importance={"processes": 0})], "round second, importance: processes=0 must be a whole number"),
        ([one_round(importance={"processes": 3})], "round second, importance: parallel.tensor × pipeline × context"),
        (
            [one_round(importance={"samples": 10**6})],
            "round second, importance: 1000000 samples of 32 tokens are asked for",
        ),
        (
            [one_round(evaluate={"data.sequence_length": 500})],
            "round second, evaluate: data.sequence_length=500 is above",
        ),
        (
            [one_round(prune={"target.num_query_groups": 1, "target.num_attention_heads": 2})],
            "round second, distill: parallel.tensor=2 does not divide num_query_groups=1 of the student",
        ),
        (
            ["distill.trainer.global_batch_size=3", "processes=4"],
            "round first, distill: trainer.global_batch_size=3 is not a multiple of 2",
        ),
        (
            ["start=nonsense -n {processes}"],
            "round first, importance: start=nonsense -n {processes}: there is no program 'nonsense' here",
        ),
        (["start=torchrun 'x"], "cannot be read (No closing quotation)"),
        (
            ["start=torchrun --nproc-per-node 2", "evaluate.processes=4"],
            "round first, evaluate: processes=4, but start= always starts processes=2",
        ),
        (["data.path=nowhere"], "nowhere does not exist"),
        (["distill.trainer.steps=400"], "round first, distill: the run takes 51,200 tokens, and "),
    ],
)
def test_mistakes_are_found_before_anything_runs(hydra, folders, tmp_path, extra, says):
    given = dict(
        word.split("=", 1) for word in words(folders, tmp_path / "chain", "processes=2", "parallel.tensor=2")[1:]
    )
    given |= dict(word.split("=", 1) for word in extra)
    with pytest.raises(UserError) as error:
        rehearse(*(f"{key}={value}" for key, value in given.items()))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("chain=demo_two_round",), "is not a preset of conf/chain: did you mean demo_two_rounds?"),
        (("distil.trainer.steps=3",), "did you mean distill"),
        (("start=false {processes}", "processes=2"), "round first, importance: ended with status 1"),
    ],
)
def test_mistakes_and_failures_are_one_line_with_status_2(folders, tmp_path, more, says):
    assert says in error_of(run(*words(folders, tmp_path / "chain", *more)))
    assert not (tmp_path / "chain" / "first").exists()


def test_another_folder_is_left_alone(hydra, folders, tmp_path):
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "mine").touch()
    with pytest.raises(UserError, match="is not the folder of a chain"):
        rehearse(*words(folders, tmp_path / "chain")[1:])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        rehearse(*words(folders, tmp_path / "file" / "chain")[1:])


def test_a_stage_is_done_once_in_the_same_words(tmp_path):
    """And while what it made is there; by another run too, which reads what is done."""
    made, output = [], tmp_path / "out"

    def run_it(stages, what):
        stages.run("stage", output, lambda: made.append(what) or output.touch(), what)

    stages = Stages(tmp_path / "stages.json")
    for what, count in (("a", 1), ("a", 1), ("b", 2)):
        run_it(stages, what)
        assert len(made) == count
    run_it(Stages(tmp_path / "stages.json"), "b")
    assert len(made) == 2
    output.unlink()
    run_it(Stages(tmp_path / "stages.json"), "b")
    assert made == ["a", "b", "b"]


def test_a_stage_whose_output_is_being_written_is_not_started(tmp_path, monkeypatch):
    """As by the stage of a whole that was killed, which goes on; it is named, and what is to be done about it."""
    monkeypatch.setattr("minitron_megatron.stages.run_program", lambda *_: pytest.fail("it was started"))
    for partial in (tmp_path / ".out.partial", tmp_path / "out" / ".model.partial"):
        partial.mkdir(parents=True)
        held = lock(partial)
        who = (
            rf"process {os.getpid()} on .*, since .*\): wait for it, end it with kill {os.getpid()}, or choose another"
        )
        with pytest.raises(UserError, match=rf"^distill: another run is writing {partial} \({who}"):
            Stages(tmp_path / "stages.json").command("distill", tmp_path / "out", "distill")
        unlock(held)


def test_whoever_works_in_the_folder_of_a_whole_is_named(tmp_path):
    refused = pytest.raises(UserError, match=rf"at work in .* \(process {os.getpid()} on ")
    with alone_in(tmp_path / "x"), refused, alone_in(tmp_path / "x"):
        pass


def test_a_stage_that_ignores_a_signal_is_not_followed(tmp_path):
    """It ends as if nothing were; the whole ends for the signal, so that no other stage begins."""
    ready = tmp_path / "ready"
    deaf = "import signal, time; got = []; signal.signal(signal.SIGTERM, lambda *_: got.append(1))"
    code = f"{deaf}; open({str(ready)!r}, 'w').close()\nwhile not got: time.sleep(0.01)"

    def ask():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    status, *_ = run_program([sys.executable, "-c", code], 1)
    asking.join()
    assert status == 143
    assert run_program([sys.executable, "-c", "import sys; sys.exit(7)"], 1)[0] == 7
