"""A mistake that options and folders show is one line, and said before torch is there: by every command."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron import stages
from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.cli import main, starting
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.launcher import check_processes
from tests.test_bounds import refused
from tests.test_prune import random_scores, write_scores
from tests.tiny import data_folder, hf_model, imported

ROOT = Path(__file__).resolve().parent.parent
# Options that would do, in three processes where the layout says so; {…} are folders of `whole`.
DATA = "data.path={data} data.sequence_length=32"
TRAINS = f"{DATA} data.max_epochs=100 trainer.steps=2 trainer.global_batch_size=3 trainer.validation_samples=0"
BY_HAND = {
    "demo": "",
    "smollm2": "",
    "import_hf": "hf={hf}",
    "import_nemo": "nemo={nemo}",
    "random_model": "model=smollm2_135m",
    "prepare_data": "input={text} model={model} validation_fraction=0.2",
    "adopt_data": "train={data}/train validation={data}/validation model={model}",
    "importance": "model={model} samples=2 " + DATA,
    "merge_scores": "scores=[{scores},{more_scores}]",
    "layers": "model={model} samples=2 " + DATA,
    "search": "model={model} scores={scores} budget.parameters=50000 space.multiple=4",
    "prune": "model={model} scores={scores} target.hidden_size=16",
    "cache_teacher": "teacher={model} distill.top_k=8 " + TRAINS,
    "correct_teacher": "model={model} " + TRAINS,
    "distill": "teacher={model} student={model} " + TRAINS,
    "evaluate": "model={model} " + DATA,
    "export_hf": "model={model}",
    "export_megatron": "model={model}",
    "export_nemo": "model={model}",
    "throughput": "models={{one:{model}}} engine=[megatron] input_length=16 output_length=16",
    "compress": "model={model} rounds='[{{name: one, prune: {{target: {{hidden_size: 16}}}}}}]' importance.samples=2 "
    "distill.trainer.steps=2 " + DATA,
    "distill_candidates": "found={found} ranks=[1,2] distill.trainer.steps=2 distill.distill.top_k=8 data.max_epochs=100 "
    + DATA,
    "benchmark": "measure=cut model={model} target.hidden_size=16 sequence_length=32",
    "report": "folders={model}",
    "status": "folder={model}",
    "submit": "submit=false nodes=1",
}
# What takes a layout, and what is to be added for it.
IN_THREE = {
    **dict.fromkeys(
        ("importance", "layers", "cache_teacher", "correct_teacher", "distill", "evaluate", "benchmark"), ""
    ),
    "prune": "data.path={data} data.sequence_length=32 loss_samples=2",
    "throughput": "",
    "compress": "processes=3",
}
# Their outputs are no folders of ours that are compared with a manifest.
OTHER_OUTPUT = {"demo": "is not the folder of a demo", "compress": "is not the folder of a chain"}
OTHER_OUTPUT |= {"distill_candidates": "is not the folder of", "correct_teacher": "is not a run folder"}
OTHER_OUTPUT |= {"distill": "is not a run folder", "report": "exists and is not a report"}
# What is taken out of a folder to leave half of it.
HALF = {"hf": "model.safetensors", "nemo": "context"}
# These take a tokenizer and data that lie in any folder.
NEEDS_NO_MANIFEST = ("prepare_data", "adopt_data", "status")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A whole folder of each kind, by its name; and `half`, the same without what makes them whole."""
    root = tmp_path_factory.mktemp("whole")
    model = Path(imported(hf_model(), root))
    found = {"model": model, "hf": root / "hf", "data": data_folder(root, model), "text": root / "text.jsonl"}
    for name in ("scores", "more_scores"):
        part = {"data": name, "seed": 0, "first_sample": 0, "samples": 2}
        results = {
            "sequence_length": 32,
            "sequence_aggregation": "mean",
            "batch_aggregation": "l2",
            "heads": "per_token",
        }
        results |= {"head_dim": 8, "samples": 2, "tokens": 64, "parts": [part]}
        found[name] = write_scores(random_scores(model), root / name, results)
    (root / "nemo" / "context").mkdir(parents=True)
    (root / "nemo" / "context" / "model.yaml").write_text("{}")
    found["nemo"] = root / "nemo"
    search = BY_HAND["search"].format(**found).split()
    run("search", [*search, f"output={root / 'found'}"])
    found["found"] = root / "found"
    for name, folder in found.items():
        if folder.is_dir():
            half = root / "half" / name
            shutil.copytree(folder, half)
            out = half / HALF.get(name, "manifest.yaml")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return {**found, "root": root}


def run(name: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, f"launch/{name}.py", *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., list]]:
    """What tests/first_mistakes.py, one process of it, answers to a request."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.first_mistakes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:

        def ask(**request: object) -> list:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def words_of(template: str, folders: dict[str, object]) -> list[str]:
    return shlex.split(template.format(**folders))


def check_all(found: list[dict], says: list[str]) -> None:
    for answer, wanted in zip(found, says, strict=True):
        assert answer["status"] == 2, answer
        assert answer["said"].startswith("error: ") and answer["said"].count("\n") == 1, answer
        assert wanted in answer["said"], answer
        assert not answer["heavy"], answer


def test_every_command_has_its_mistakes():
    assert set(BY_HAND) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_module_that_checks_imports_nothing_heavy(name, ask):
    assert ask(module=f"minitron_megatron.{COMMANDS[name].check.partition(':')[0]}") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_first_mistakes_are_one_line_each_before_torch_is_there(name, whole, ask, tmp_path):
    """An unknown option; each folder missing, and half-written; an output that is there with other options."""
    template, output = BY_HAND[name], f"output={tmp_path / 'x'}"
    command = ["--", "prune", "nonsense=1", "output=y"] if name == "submit" else []
    # It writes nothing, and half-written outputs are what it is for.
    writes = name != "status"
    outputs = [output] if writes else []
    cases, says = [[*words_of(template, whole), *outputs, "nonsense=1"]], ["unknown option 'nonsense'"]
    for key in sorted(set(re.findall(r"(?<!{){(\w+)}(?!})", template))):
        for kind in ("nowhere", "half"):
            place = whole["root"] / kind / key
            if kind == "nowhere" or (place.is_dir() and name not in NEEDS_NO_MANIFEST):
                cases.append([*words_of(template, {**whole, key: place}), *outputs])
                says.append(f"{kind}/{key}")
    if name == "submit":
        cases.append([*words_of(template, whole), output, *command])
        says.append("unknown option 'nonsense' of launch/prune.py")
    elif writes:
        shutil.copytree(whole["model"], tmp_path / "other")
        cases.append([*words_of(template, whole), "seed=7", f"output={tmp_path / 'other'}"])
        says.append(OTHER_OUTPUT.get(name, "was made with other options or inputs"))
    check_all(ask(name=name, cases=cases), says)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"status", "submit"}))
def test_an_output_that_cannot_be_made_is_said_before_torch_is_there(name, whole, ask, tmp_path):
    (tmp_path / "file").write_text("x")
    words = words_of(BY_HAND[name], whole)
    places = [tmp_path / "file" / "x", "/proc/x y=[,$", tmp_path / ("a" * 300), tmp_path / ("a" * 250), "a${seed}"]
    says = [f"output={place} cannot be made" for place in places[:-1]] + ["output=a${seed} has an interpolation"]
    check_all(ask(name=name, cases=[[*words, f"output={place}"] for place in places]), says)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", IN_THREE)
def test_a_shape_that_does_not_divide_is_one_line_before_torch_is_there(name, whole, ask, tmp_path):
    words = words_of(f"{BY_HAND[name]} {IN_THREE[name]}", whole)
    started = {} if name in ("throughput", "compress") else {"WORLD_SIZE": "3"}
    cases = [[*words, "parallel.tensor=3", f"output={tmp_path / 'x'}"]]
    check_all(ask(name=name, cases=cases, environment=started), ["does not divide"])


def test_the_benchmark_knows_every_commands_mistake():
    from minitron_megatron.benchmark.mistakes import MISTAKES, STARTS

    assert set(MISTAKES) == set(COMMANDS) and set(STARTS) <= set(COMMANDS)


def test_manifests_say_how_long_the_command_took_to_start(whole, tmp_path):
    """Of a search, which has no need of torch; of a training run a stage finds it in its model's folder."""
    began = time.monotonic()
    run("search", [*words_of(BY_HAND["search"], whole), f"output={tmp_path / 'found'}"])
    seconds = load_yaml(tmp_path / "found" / "manifest.yaml")["seconds_starting"]
    assert 0 < seconds < time.monotonic() - began
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "found", tmp_path / "run" / "model")
    assert [stages._of_manifest(tmp_path / name, "seconds_starting") for name in ("run", "found")] == [seconds] * 2
    assert stages._of_manifest(tmp_path, "seconds_starting") is None


def test_the_first_useful_work_is_noted_once(monkeypatch):
    monkeypatch.setattr(starting, "_began", None)
    assert starting.seconds_starting(otherwise=1.234) == 1.23
    starting.at_work()
    first = starting.seconds_starting(otherwise=0)
    assert 0 < first <= starting.seconds_of_process() + 0.01
    time.sleep(0.05)
    starting.at_work()
    assert starting.seconds_starting(otherwise=0) == first


@pytest.mark.parametrize(
    ("rank", "size", "taken"), [("0", None, True), ("1", None, False), ("3", "4", True), ("4", "4", False)]
)
def test_ranks_are_below_the_size_of_the_job(monkeypatch, rank, size, taken):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert refused(main.check_environment) != taken


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("--master-port 65535", True),
        ("--master-port 65536", False),
        ("--nnodes 2 --node-rank 1", True),
        ("--nnodes 2 --node-rank 2", False),
        ("--nnodes 2:4 --node-rank 3", True),
        ("--nnodes 2:2", True),
        ("--nnodes 3:2", False),
        ("--node-rank 0", True),
        ("--node-rank 1", False),
        ("--max-restarts 0", True),
        ("--nproc-per-node 0", False),
        ("--nproc-per-node 1", True),
    ],
)
def test_numbers_of_a_start_have_ends(words, taken):
    assert refused(main.check_start, words.split()) != taken


@pytest.mark.parametrize(
    ("planned", "started", "dry_run", "taken"),
    [
        (None, "4", False, True),
        (4, "4", False, True),
        (8, "4", False, False),
        (2, "4", False, False),
        (1, None, False, True),
        (2, None, False, False),
        (8, None, True, True),
        (8, "4", True, False),
    ],
)
def test_a_job_has_the_processes_that_it_was_planned_for(monkeypatch, planned, started, dry_run, taken):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started:
        monkeypatch.setenv("WORLD_SIZE", started)
    config = SimpleNamespace(parallel=SimpleNamespace(world_size=planned), dry_run=dry_run)
    assert refused(check_processes, config) != taken
