"""The commands as users type them: help, one-line errors with exit status 2, and whole runs under torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron_megatron.checkpoints.folder import output_folder
from minitron_megatron.cli.arguments import CONF, group_of, presets
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.help import show_help
from minitron_megatron.config import ModelConfig, model_options, options
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from tests.tiny import data_folder, hf_model, imported

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = str(Path(sys.executable).parent / "torchrun")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """Several test runs may share a machine; torchrun's default port is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*words: object, processes: int = 0, cwd: Path = ROOT, timeout: int = 300) -> subprocess.CompletedProcess:
    """`python launch/NAME.py …`, or with torchrun for `processes` above 0."""
    name, *rest = map(str, words)
    torchrun = [TORCHRUN, "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    start = torchrun if processes else [sys.executable]
    command = [*start, str(ROOT / "launch" / f"{name}.py"), *rest]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=timeout, check=False
    )


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line on standard error of a refused command."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def command_of(line: str) -> str:
    """The command that a line starts: launch/NAME.py, or minitron NAME."""
    return re.search(r"(?:launch/|minitron (?:--nproc-per-node \d+ )?|minitron_megatron (?:--\S+ \d+ )?)(\w+)", line)[1]


def shown(printed: str) -> list[str]:
    """The commands of the lines that a chain shows before it starts them, or in its plan."""
    return [command_of(line) for line in printed.splitlines() if line.startswith("$ ")]


def test_the_first_line_says_what_will_be_done_and_is_there_before_the_work(tmp_path):
    """In a process of its own: Hydra silences loggers that were there before it."""
    with output_folder(tmp_path / "made", command="launch/x.py", config={}, inputs={}, resume=True):
        pass
    done = run("report", f"folders={tmp_path / 'made'}", f"output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    first = " ".join(done.stdout.split())
    assert f"report into {tmp_path / 'page.html'}: One page about a set of output folders" in first
    assert "report into" not in run("report", "folders=x", f"output={tmp_path / 'page.html'}", "dry_run=true").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option(name):
    done = run(name, "--help")
    assert done.returncode == 0 and not done.stderr
    for option in options(COMMANDS[name].config):
        shown = option.name.split(".")[0] if option.name.startswith(("model.", "teacher.", "student.")) else option.name
        assert shown in done.stdout


def test_help_says_what_is_required_and_what_is_taken_without_an_option(capsys, monkeypatch):
    """Nothing stands for no default; of choices each is named."""
    monkeypatch.setenv("COLUMNS", "400")
    show_help("evaluate", COMMANDS["evaluate"].config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    of = {row[0]: row[1:] for row in rows if row}
    assert of["output"][:2] == ["str", "required"] and of["samples"][:1] == ["int"] and of["samples"][1] != "None"
    assert of["split"][:2] == ["str", "validation"] and of["split"][-2:] == ["[train,", "validation]"]
    assert not any("None" in row for row in rows)


def test_every_command_has_its_file_and_its_config():
    assert {p.stem for p in (ROOT / "launch").glob("*.py")} == set(COMMANDS)
    assert {p.stem for p in CONF.glob("*.yaml")} == set(COMMANDS)
    for name, command in COMMANDS.items():
        for model in model_options(command.config):
            assert f"- {group_of(model)}: null" in (CONF / f"{name}.yaml").read_text(), name


def test_every_command_names_functions_that_exist():
    """Read, not imported: modules named by commands may be heavy."""
    for command in COMMANDS.values():
        for dotted in (command.check, command.run):
            module, _, function = dotted.partition(":")
            source = (ROOT / "minitron_megatron" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert f"\ndef {function}(" in source, dotted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("prune", "target.hiden_size=3"),
            "unknown option 'target.hiden_size' of launch/prune.py: did you mean target.hidden_size?",
        ),
        (("distill", "trainer.step=3"), "did you mean trainer.steps?"),
        (("prune", "nonsense=1"), "unknown option 'nonsense'"),
        (
            ("prune", "target=llama3_1_minitron_4b"),
            "is not a preset of conf/target: did you mean llama3_1_minitron_4b_",
        ),
        (("prune", "target=null"), "target=null is not a preset of conf/target: use one of"),
        (("prune", "+nonsense=1"), "unknown option 'nonsense'"),
        (("prune", "~output"), "cannot be deleted"),
        (("prune", "output=x", "output=y"), "output= is given twice"),
        (("smollm2", "output="), "output= is empty"),
        (
            ("random_model", "model=smollm2_135m", "model.rope_theta=nan", "output=x"),
            "rope_theta=nan must be a finite number",
        ),
        (("random_model", "model=smollm2_135m", "output=/etc/passwd/x"), "/etc/passwd is a file"),
        pytest.param(
            ("random_model", "model=llama3_1_8b", "model.num_layers=16384", "output=x"),
            "no space left",
            marks=pytest.mark.slow,
        ),
        (("prune",), "needs model=… (model folder); scores=… (the output of importance) or data.path=…"),
        (("distill", "output=x", "data.path=y", "trainer.steps=abc"), "trainer.steps"),
        (("distill", "output=x", "data.path=y", "trainer.steps=-1"), "trainer.steps=-1 must be above 0"),
        (("distill", "output=x", "data.path=y"), "trainer.steps=… or trainer.tokens=…"),
        (("prune", "output=x", "model=nowhere"), "nowhere does not exist"),
        (("prune", "output=x", "model=llama3_1_8b"), "must be a model folder here"),
        (
            ("evaluate", "output=x", "data.path=y", "model=z", "split=test"),
            "split=test is not one of train, validation",
        ),
        (
            ("import_hf", "output=x", "hf=a path, with = odd 'ch@racters'"),
            "hf=a path, with = odd 'ch@racters' does not exist",
        ),
        (("importance", "output=x", "data.path=y", "model=z", "parallel.tensor=2"), "does not divide"),
        (("import_hf", "output=x", "hf=[1"), "hf=[1 cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(words, says, tmp_path):
    assert says in error_of(run(*words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_presets_are_whole_shapes_of_the_published_sizes():
    import yaml

    published = {
        "llama3_1_8b": 8.03e9,
        "llama3_1_minitron_4b_width": 4.51e9,
        "llama3_1_minitron_4b_depth": 4.54e9,
        "mistral_nemo_12b": 12.2e9,
        "mn_minitron_8b": 8.4e9,
        "smollm2_135m": 134.5e6,
        "nemotron4_15b": 15.6e9,
        "minitron_8b": 8.27e9,
        "minitron_4b": 4.19e9,
        "llama3_2_1b": 1.236e9,
        "llama3_2_3b": 3.213e9,
        "qwen2_5_7b": 7.616e9,
        "qwen3_8b": 8.191e9,
        "llama3_1_70b": 70.55e9,
    }
    found = presets("distill")["model"]
    assert set(found) == set(published)
    for name, parameters in published.items():
        values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
        shape = ModelShape.from_dict(ModelConfig(**values).sizes("model"), name)
        assert count_parameters(shape) == pytest.approx(parameters, rel=5e-3)


def preset(group: str, name: str) -> dict:
    import yaml

    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("names", "theta", "positions", "eps", "factor"),
    [
        ("llama3_1_8b llama3_1_70b llama3_1_minitron_4b_width llama3_1_minitron_4b_depth", 5e5, 131072, 1e-5, 8.0),
        ("llama3_2_1b llama3_2_3b", 5e5, 131072, 1e-5, 32.0),
        ("mistral_nemo_12b mn_minitron_8b", 1e6, 131072, 1e-5, None),
        ("nemotron4_15b minitron_8b minitron_4b", 1e4, 4096, 1e-5, None),
        ("qwen2_5_7b", 1e6, 131072, 1e-6, None),
        ("qwen3_8b", 1e6, 40960, 1e-6, None),
        ("smollm2_135m", 1e5, 8192, 1e-5, None),
    ],
)
def test_presets_have_the_numbers_of_their_published_configs(names, theta, positions, eps, factor):
    """Those that no count of parameters shows; with them the heads, which divide what it counts."""
    for values in (preset("model", name) for name in names.split()):
        found = values["rope_theta"], values["max_position_embeddings"], values["norm_eps"]
        assert found == (theta, positions, eps) and values["dtype"] == "bfloat16"
        scaling = factor and {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        assert values["rope_scaling"] == scaling
        assert values["head_dim"] == (64 if "smollm2_135m" in names or values["hidden_size"] == 2048 else 128)
        assert values.get("rotary_percent", 1.0) == (0.5 if values["family"] == "nemotron" else 1.0)


def test_experiments_have_the_numbers_of_their_papers():
    """arXiv 2408.11796, table 4 and section 4; where a preset has another number, its file says what it was chosen by."""
    for name, lr, least, warmup in (
        ("llama3_1_minitron_4b", 1e-4, 1e-5, 40),
        ("mn_minitron_8b", 1e-4, 4.5e-7, 60),
        ("correct_llama3_1_8b", 6e-5, 3e-6, 120),
        ("correct_mistral_nemo_12b", 6e-5, 4.5e-7, 120),
    ):
        given = {"lr": lr, "min_lr": least, "warmup_steps": warmup, "schedule": "cosine"}
        assert preset("optim", name) == given
    for name, models, optim, tokens, batch, tensor in (
        (
            "llama3_1_minitron_4b_width",
            ("llama3_1_8b", "llama3_1_minitron_4b_width"),
            "llama3_1_minitron_4b",
            94e9,
            1152,
            2,
        ),
        ("mn_minitron_8b", ("mistral_nemo_12b", "mn_minitron_8b"), "mn_minitron_8b", 380e9, 768, 4),
        ("correct_llama3_1_8b", ("llama3_1_8b",), "correct_llama3_1_8b", 100e9, 1152, 2),
        ("correct_mistral_nemo_12b", ("mistral_nemo_12b",), "correct_mistral_nemo_12b", 127e9, 768, 4),
    ):
        values = preset("experiment", name)
        assert [next(iter(one.values())) for one in values["defaults"]] == [*models, optim]
        # YAML takes 94.0e9 for text; OmegaConf does not.
        assert (float(values["trainer"]["tokens"]), values["trainer"]["global_batch_size"]) == (tokens, batch)
        assert values["data"]["sequence_length"] == 8192 and values["parallel"] == {"tensor": tensor}
    chain = preset("chain", "minitron_15b_8b_4b")
    assert [one["prune"]["target"] for one in chain["rounds"]] == [
        preset("target", name) for name in ("minitron_8b", "minitron_4b")
    ]
    assert chain["importance"] == {"samples": 1024} and chain["data"] == {"sequence_length": 4096}
    assert {k: float(v) for k, v in chain["distill"]["trainer"].items()} == {"tokens": 100e9, "global_batch_size": 1152}
    assert chain["distill"]["optim"] == {"lr": 2e-4, "min_lr": 4.5e-7, "schedule": "cosine"}
    tasks = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "truthfulqa_mc2": 0}
    assert preset("suite", "article")["tasks"] == {**tasks, "xlsum_en": 3, "mbpp": 0}


def test_clusters_have_what_one_gpu_does_in_one_direction():
    """Of the makers' sheets: dense products, half of NVLink's figure, which is of both directions."""
    sheets = {
        "a100": (80, 312, None, 2039, 600),
        "h100": (80, 989.4, 1978.9, 3350, 900),
        "h200": (141, 989.4, 1978.9, 4800, 900),
        "gb200": (186, 2500, 5000, 8000, 1800),
    }
    assert set(sheets) == set(presets("submit")["cluster"])
    for name, sheet in sheets.items():
        values = preset("cluster", name)
        found = (values[key] for key in ("memory_gib", "bf16_tflops", "fp8_tflops", "memory_gb_s", "nvlink_gb_s"))
        assert tuple(found) == (*sheet[:-1], sheet[-1] / 2) and values["gpu"] == name
        assert values["gpus_per_node"] == (4 if name == "gb200" else 8)


def test_targets_lead_from_one_published_shape_to_the_next():
    for source, target, of in (
        ("nemotron4_15b", "minitron_8b", "minitron_8b"),
        ("minitron_8b", "minitron_4b", "minitron_4b"),
        ("llama3_1_8b", "llama3_1_minitron_4b_width", "llama3_1_minitron_4b_width"),
        ("llama3_1_8b", "llama3_1_minitron_4b_depth", "llama3_1_minitron_4b_depth"),
        ("mistral_nemo_12b", "mn_minitron_8b", "mn_minitron_8b"),
    ):
        assert preset("model", source) | preset("target", target) == preset("model", of)


@pytest.mark.slow
def test_a_job_of_published_size_can_be_rehearsed_without_weights(tmp_path):
    words = ("experiment=llama3_1_minitron_4b_width", "dry_run=true", "parallel.world_size=256")
    done = run("distill", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if "│" in line]
    value = {row[0]: row[1] for row in rows}
    assert value["student parameters"] == "4,512,746,496" and value["teacher parameters"] == "8,030,261,248"
    assert value["steps"] == "9,961" and value["tokens"] == "94,003,789,824"
    assert value["layout"].endswith("128 data-parallel ranks") and value["micro-batches of a rank and step"] == "9"
    assert 30 < float(value["all"]) < 50  # GiB of an H100
    assert 5 < float(value["hours to 9.4e+10 tokens"]) < 20
    assert list(tmp_path.iterdir()) == []


def test_hydras_own_flags_work(tmp_path):
    done = run("prune", "--cfg", "job", "model=a/b", "output=x", "target=llama3_1_minitron_4b_width", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 3072" in done.stdout and "path: a/b" in done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(teacher, data) of a tiny model."""
    folder = tmp_path_factory.mktemp("commands")
    path = imported(hf_model(), folder)
    return path, data_folder(folder, path)


def distill_words(teacher, student, data, output, steps=8):
    return (
        "distill",
        f"teacher={teacher}",
        f"student={student}",
        f"data.path={data}",
        "data.sequence_length=32",
        f"trainer.steps={steps}",
        "trainer.global_batch_size=4",
        "trainer.save_interval=2",
        "trainer.validation_samples=4",
        "optim.lr=1e-2",
        "optim.warmup_steps=2",
        "logger.wandb=disabled",
        f"output={output}",
    )


def losses(run_folder: Path) -> dict[int, float]:
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_the_whole_road_under_torchrun(folders, tmp_path):
    """Every stage in two processes, each in another layout; the last one is read by transformers."""
    teacher, data = folders
    length = "data.sequence_length=32"
    stages = [
        ("importance", f"model={teacher}", f"data.path={data}", length, "samples=4", "parallel.pipeline=2"),
        ("prune", f"model={teacher}", f"scores={tmp_path / 'importance'}", "target.hidden_size=16"),
        (
            *distill_words(teacher, tmp_path / "prune", data, "", steps=3)[:-1],
            "parallel.tensor=2",
            "parallel.sequence=true",
        ),
        ("evaluate", f"model={tmp_path / 'distill'}", f"data.path={data}", length, "split=validation"),
        ("export_hf", f"model={tmp_path / 'distill'}", f"results=[{tmp_path / 'evaluate'}]"),
    ]
    for name, *words in stages:
        done = run(name, *words, f"output={tmp_path / name}", processes=2)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert set(results) >= {"loss", "perplexity", "tokens"}
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export_hf").config.hidden_size == 16
    card = (tmp_path / "export_hf" / "README.md").read_text()
    assert all(f"python launch/{name}.py" in card.replace(f"{ROOT}/", "") for name in ("prune", "distill"))
    assert "| calibration | 4 samples of 32 tokens |" in card and "| steps | 3 |" in card and "| perplexity |" in card
    again = run("prune", *stages[1][1:], f"output={tmp_path / 'prune'}")
    assert again.returncode == 0 and "complete already" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stopped_run_continues_to_the_same_losses(folders, tmp_path, number):
    """A signal after the first checkpoint; the same command then ends with the losses of an undisturbed run, bit for bit."""
    teacher, data = folders
    student = imported(hf_model(1, hidden_size=16), tmp_path)
    whole = run(*distill_words(teacher, student, data, tmp_path / "whole", steps=24))
    assert whole.returncode == 0, whole.stderr
    words = [*map(str, distill_words(teacher, student, data, tmp_path / "stopped", steps=24))]
    command = [sys.executable, str(ROOT / "launch" / "distill.py"), *words[1:]]
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as running:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "stopped" / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # A kill takes the whole job, as Slurm's does: Megatron's checkpoint writer is a process of its own.
        os.killpg(running.pid, number) if number == signal.SIGKILL else running.send_signal(number)
        running.communicate(timeout=60)
        assert running.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "stopped" / "model").exists()
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stdout
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 24
    other = run(*[w.replace("optim.lr=1e-2", "optim.lr=1e-3") for w in words])
    assert "holds a run with optim.lr=0.01, not 0.001" in error_of(other)


@pytest.mark.slow
def test_errors_under_torchrun_are_one_line_too(folders, tmp_path):
    teacher, data = folders
    words = ("importance", f"model={teacher}", f"data.path={data}", "data.sequence_length=32", "samples=4")
    done = run(*words, "parallel.tensor=3", f"output={tmp_path / 'x'}", processes=3)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    mistake = "parallel.tensor=3 does not divide num_query_groups=4 of the model: use one of 1, 2, 4"
    assert re.fullmatch(rf"error: rank [012] on \S+: {mistake}", line)
    assert not (tmp_path / "x").exists()
