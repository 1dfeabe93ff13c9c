"""What each command says is next: pasted into a shell it runs, whatever the paths are called."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.checkpoints.digests import joint_digest, sha256_of
from minitron_megatron.cli import next_command, spelling
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.next_command import NEXT, Next, free_name, line_of, load_words
from minitron_megatron.config import ImportanceConfig, ModelConfig, ParallelConfig
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.words import word
from tests.slurm_cluster import programs_by_name
from tests.test_commands import ROOT, command_of, environment, run
from tests.tiny import TEXT, hf_model, save_hf

# What a command itself says is next, or that nothing is.
SAY_IT_THEMSELVES = {"demo", "submit", "benchmark", "status"}
ODD = "it's a $HOME, {odd} [name]"


def test_every_command_has_its_next():
    assert set(COMMANDS) == set(NEXT) | SAY_IT_THEMSELVES


def config(tmp_path: Path, **options) -> ImportanceConfig:
    return ImportanceConfig(output=str(tmp_path / "there"), **options)


def test_words_are_quoted_for_the_shell_and_for_hydra(tmp_path):
    found = Next("report", {"folders": [f"{ODD}/a", "plain/b"]}, "report")
    words = shlex.split(line_of(found, config(tmp_path)))
    assert words[-2] == "folders=['" + ODD.replace("'", "\\'") + "/a',plain/b]"
    assert words[-1] == f"output={tmp_path / 'report'}"
    assert (word(0.6e9), word(True), word({"a": 3})) == ("600000000", "true", "{a: 3}")


def test_an_output_that_is_there_is_not_named_again(tmp_path):
    assert free_name(tmp_path / "scores") == tmp_path / "scores"
    for made, then in (("scores", "scores_2"), ("scores_2", "scores_3")):
        (tmp_path / made).mkdir()
        assert free_name(tmp_path / "scores") == tmp_path / then


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_started_as_this_one_was(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(spelling, "TYPED", ["launch/importance.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    given = config(tmp_path, parallel=ParallelConfig(tensor=2, sequence=True), device="cpu")
    prune = line_of(Next("prune", {"model": "m"}, "pruned"), given)
    search = line_of(Next("search", {"model": "m"}, "found"), given)
    many = r"--nproc-per-node 2 (launch/prune\.py|prune) " if processes == 2 else r"python launch/prune\.py "
    assert re.search(many, prune) and "parallel.tensor=2 parallel.sequence=true device=cpu" in prune
    assert search == f"python launch/search.py model=m output={tmp_path / 'found'}"


def test_a_python_that_the_shell_does_not_find_has_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(spelling, "TYPED", ["launch/importance.py"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert line_of(Next("search", {}, "found"), config(tmp_path)).startswith(f"{shlex.quote(sys.executable)} launch/")


def test_stages_dry_runs_and_folders_that_went_away_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NEXT, "importance", lambda cfg: Next("search", {}, "found"))
    next_command.show_next("importance", config(tmp_path, dry_run=True))
    monkeypatch.setenv("MINITRON_STAGE", "1")
    next_command.show_next("importance", config(tmp_path))
    monkeypatch.delenv("MINITRON_STAGE")
    monkeypatch.setitem(NEXT, "importance", lambda cfg: next_command._shape(tmp_path / "gone"))
    next_command.show_next("importance", config(tmp_path))
    assert capsys.readouterr().out == ""


def last_line(printed: str) -> str:
    lines = printed.rstrip().splitlines()
    assert lines[-2] == "Next:", printed
    return lines[-1].strip()


def paste(line: str, folder: Path) -> str:
    """Run a line as a shell does that has this Python first; gives what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not (Path(sys.executable).parent / "minitron").exists():
        # An environment that was made before the package had this program.
        if not (folder / "programs").is_dir():
            programs_by_name(folder / "programs", minitron=f'exec {sys.executable} -m minitron_megatron "$@"')
        path = f"{folder / 'programs'}:{path}"
    shell = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment(), "PATH": path},
        check=False,
    )
    assert shell.returncode == 0, (line, shell.stdout, shell.stderr)
    return shell.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_the_whole_road_by_pasting_what_is_said(tmp_path, processes):
    """From an import to a loaded export; only the text has to be filled in."""
    folder = tmp_path / ODD
    save_hf(hf_model(spread=0.02, max_position_embeddings=64), folder / "hf")
    (folder / "text.md").write_text("\n\n".join(f"{number}. {TEXT * 3}" for number in range(40)))
    printed = run("import_hf", f"hf={folder / 'hf'}", f"output={folder / 'teacher'}").stdout
    line = last_line(printed)
    assert "launch/prepare_data.py" in line and "input=TEXT.jsonl" in line
    printed = paste(line.replace("TEXT.jsonl", "text.md"), folder)
    commands = ["importance", "search", "prune", "distill", "evaluate", "export_hf"]
    for command in commands:
        line = last_line(printed)
        assert command_of(line) == command
        if processes and command == "importance":
            line = f"{sys.executable} -m minitron_megatron --nproc-per-node {processes} {line.partition(' ')[2]}"
        if command == "distill":
            line += " logger.wandb=disabled"
        printed = paste(line, folder)
        if processes and command in ("search", "prune"):
            assert "--nproc-per-node 2" in last_line(printed)
    loads = last_line(printed)
    assert "pipeline('text-generation'" in loads.replace("'\"'\"'", "'") and str(ROOT) not in loads
    paste(loads, folder)


# Every command, with folders as they leave them.


def manifest(folder: Path, config: dict, results: dict | None = None, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_yaml", ".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    values = {
        "command": "x",
        "digest": joint_digest({name: sha256_of(folder / name) for name in sizes}),
        "inputs": {"model": "d", "scores": "d"},
        "config": config,
        "results": results or {},
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump({**values, "files": sizes}))
    return folder


@pytest.fixture
def outputs(tmp_path):
    """Folders of a model, data, scores and a search, with nothing in them but what is looked at."""
    root = tmp_path / ODD
    model = {**yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text()), "max_position_embeddings": 64}
    manifest(root / "model", {}, model_yaml=yaml.safe_dump(ModelShape.from_dict(model_sizes(model), "x").to_dict()))
    data = {"train": {"tokens": 3000}, "validation": {"tokens": 300}, "vocab_size": 100}
    manifest(root / "corpus", {}, data)
    (root / "corpus" / "train.bin").touch()
    of_scores = {"model": {"path": str(root / "model")}, "data": {"path": str(root / "corpus"), "sequence_length": 64}}
    manifest(root / "scores", of_scores)
    best = {"rank": 1, "num_layers": 30, "hidden_size": 504, "ffn_hidden_size": 1280, "num_attention_heads": 9}
    best |= {"num_query_groups": 3, "predicted_loss": 1.0}
    of_search = {"model": {"path": str(root / "model")}, "scores": str(root / "scores"), "layers": None, "prune": {}}
    found = {"candidates_yaml": yaml.safe_dump({"candidates": [best]}), "targets__rank_01_yaml": "hidden_size: 504\n"}
    manifest(root / "found", of_search, **found)
    return root


def model_sizes(values: dict) -> dict:
    return ModelConfig(**values).sizes("model")


FOLLOWS = {
    "smollm2": ("import_hf", []),
    "import_hf": ("importance", []),
    "import_nemo": ("importance", ["nemo=x"]),
    "random_model": ("throughput", ["model=smollm2_135m"]),
    "prepare_data": ("importance", ["input=x", "model={0}/model"]),
    "adopt_data": ("importance", ["train=x", "validation=x", "model={0}/model"]),
    "importance": ("search", ["model={0}/model", "data.path=x"]),
    "merge_scores": ("search", ["scores=['{1}/scores','{1}/b']"]),
    "layers": ("prune", ["model={0}/model", "data.path=x", "block=[4,2]"]),
    "search": ("prune", ["model={0}/model", "scores={0}/scores", "budget.parameters=1e8"]),
    "prune": ("distill", ["model={0}/model", "scores={0}/scores", "target.hidden_size=504"]),
    "cache_teacher": ("distill", ["teacher={0}/model", "data.path={0}/corpus", "trainer.steps=7"]),
    "correct_teacher": ("importance", ["model={0}/model", "data.path={0}/corpus", "trainer.steps=7"]),
    "distill": ("evaluate", ["teacher={0}/model", "student={0}/model", "data.path={0}/corpus", "trainer.steps=7"]),
    "distill_candidates": ("prune", ["found={0}/found", "data.path={0}/corpus"]),
    "evaluate": ("export_hf", ["model={0}/model", "data.path={0}/corpus"]),
    "export_nemo": ("import_nemo", ["model={0}/model"]),
    "throughput": ("report", ["models={{a: x}}"]),
    "export_hf": (None, ["model={0}/model"]),
    "export_megatron": (None, ["model={0}/model"]),
    "report": (None, ["folders=x"]),
    "compress": (None, ["model={0}/model", "data.path=x", "target.hidden_size=504"]),
}
# What each writes of what is looked at.
WRITES = {
    "import_hf": "model",
    "import_nemo": "model",
    "correct_teacher": "model",
    "prepare_data": "corpus",
    "adopt_data": "corpus",
    "search": "found",
}


def test_every_command_is_tried():
    assert set(FOLLOWS) == set(NEXT)


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_follows_is_a_command_that_is_accepted(outputs, monkeypatch, capsys, name):
    monkeypatch.setattr(spelling, "TYPED", [f"launch/{name}.py"])
    command, words = FOLLOWS[name]
    output = outputs / WRITES.get(name, f"{name} of mine")
    output.mkdir(exist_ok=True)
    odd = str(outputs).replace("'", "\\'")
    given = [one.format(outputs, odd) for one in words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        needed = ["hf=x"] if name == "import_hf" else []
        cfg = compose(name, [*given, *needed, f"output={output}"])
        next_command.show_next(name, cfg)
        printed = capsys.readouterr().out
        line = last_line(printed)
        following = shlex.split(line)
        if command is None:
            assert len(following) > 1
            return
        script = next(i for i, one in enumerate(following) if one.endswith(f"launch/{command}.py"))
        there = compose(command, following[script + 1 :])
    assert not Path(there.output).exists() and Path(there.output).parent == outputs
    if command == "importance":
        assert there.samples * (there.data.sequence_length or 64) <= 3000


def test_a_run_of_steps_reads_the_text_once(outputs, monkeypatch):
    monkeypatch.setattr(spelling, "TYPED", ["launch/prune.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "prune", [f"model={outputs / 'model'}", f"scores={outputs / 'scores'}", f"output={outputs / 'x'}"]
        )
    options = NEXT["prune"](cfg).options
    assert options["data.path"] == str(outputs / "corpus") and options["trainer.global_batch_size"] == 9
    assert options["trainer.steps"] == 3000 // (9 * 64) and options["data.sequence_length"] == 64


def test_a_line_has_quotes_that_can_be_read():
    code = load_words("outputs/hf")[-1]
    line = line_of(Next("", {}, "", shell=load_words("outputs/hf")), None)
    assert line.endswith(f'"{code}"') and shlex.split(line)[-1] == code
    for odd in ("it's $HOME", "a`b", "say!", 'a"b', "c\\d"):
        assert shlex.split(line_of(Next("", {}, "", shell=load_words(odd)), None)) == load_words(odd)


# What of a command's options the next one gets


def of_run(**more) -> SimpleNamespace:
    """Options as a training run's."""
    own = {
        "output": "out/x", "model": SimpleNamespace(path="m"), "teacher": SimpleNamespace(path="t"),
        "data": SimpleNamespace(path="d", sequence_length=None), "hf": None, "export": True,
    }  # fmt: skip
    return SimpleNamespace(**{**own, **more})


@pytest.mark.parametrize(
    ("name", "config", "command", "options", "output"),
    [
        ("smollm2", of_run(), "import_hf", {"hf": "out/x"}, "teacher"),
        ("random_model", of_run(), "throughput", {"models": {"random": "out/x"}}, "throughput"),
        ("distill", of_run(), "evaluate", {"model": "out/x", "teacher": "t", "data.path": "d"}, "evaluation"),
        ("distill", of_run(data=SimpleNamespace(path="d", sequence_length=512)), "evaluate",
         {"model": "out/x", "teacher": "t", "data.path": "d", "data.sequence_length": 512}, "evaluation"),
        ("distill", of_run(data=SimpleNamespace(path="d", sequence_length=1024)), "evaluate",
         {"model": "out/x", "teacher": "t", "data.path": "d"}, "evaluation"),
        ("evaluate", of_run(), "export_hf", {"model": "m", "results": ["out/x"]}, "hf"),
        ("evaluate", of_run(hf="h"), "report", {"folders": ["out"]}, "report"),
        ("throughput", of_run(), "report", {"folders": ["out"]}, "report"),
        ("export_nemo", of_run(), "import_nemo", {"nemo": "out/x"}, "from_nemo"),
        ("cache_teacher", of_run(
            distill=SimpleNamespace(top_k=7, temperature=2.0),
            trainer=SimpleNamespace(steps=3, tokens=None, global_batch_size=4, validation_samples=5),
        ), "distill", {
            "teacher": "t", "student": "STUDENT", "data.path": "d", "trainer.steps": 3, "trainer.tokens": None,
            "trainer.global_batch_size": 4, "trainer.validation_samples": 5, "distill.loss": "topk_kl", "distill.cache": "out/x",
            "distill.top_k": 7, "distill.temperature": 2.0,
        }, "distilled"),
    ],
)  # fmt: skip
def test_options_are_handed_on(name, config, command, options, output):
    found = NEXT[name](config)
    assert (found.command, found.options, found.output) == (command, options, output)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("export_megatron", of_run(), ["cat", "out/x/arguments.sh"]),
        ("report", of_run(output="a/b.html"), ["PYTHON", "-m", "webbrowser", "a/b.html"]),
        ("report", of_run(output="a/b.md"), None), ("compress", of_run(export=False), None),
    ],
)  # fmt: skip
def test_lines_of_other_programs(monkeypatch, name, config, words):
    monkeypatch.setattr(spelling, "python_word", lambda: "PYTHON")
    found = NEXT[name](config)
    assert found is None if words is None else found.shell == words


def test_a_page_in_a_folder_is_opened_there(tmp_path, monkeypatch):
    monkeypatch.setattr(spelling, "python_word", lambda: "PYTHON")
    assert NEXT["report"](of_run(output=str(tmp_path))).shell[-1] == str(tmp_path / "report.html")
    assert NEXT["compress"](of_run()).shell == load_words("out/x/hf") and "'out/x/hf'" in load_words("out/x/hf")[-1]


@pytest.mark.parametrize(
    ("tokens", "positions", "options"),
    [
        (None, 2048, {}), (1024 * 1024, 2048, {}), (1024 * 1024 - 1, 2048, {"samples": 1023}), (16 * 1024, 2048, {"samples": 16}),
        (16 * 1024 - 1, 2048, {"samples": 31, "data.sequence_length": 512}),
        (100, 2048, {"samples": 6, "data.sequence_length": 16}), (5, 2048, {"samples": 1, "data.sequence_length": 16}),
        (64 * 1024, 64, {}), (64 * 16, 64, {"samples": 16}),
        (64 * 16 - 1, 64, {"samples": 31, "data.sequence_length": 32}),
    ],
)  # fmt: skip
def test_calibration_takes_as_many_samples_as_there_are(monkeypatch, tokens, positions, options):
    monkeypatch.setattr(next_command, "_tokens", lambda data: tokens)
    monkeypatch.setattr(next_command, "_shape", lambda model: SimpleNamespace(max_position_embeddings=positions))
    assert next_command._calibration("d", "m") == options


@pytest.mark.parametrize(
    ("processes", "parallel", "tokens", "options"),
    [
        (1, {}, None, {"trainer.tokens": 1e9}),
        (1, {}, 8 * 10 * 80, {"trainer.steps": 80}),
        (1, {}, 8 * 10 * 80 - 1, {"trainer.steps": 79, "optim.warmup_steps": 3}),
        (1, {}, 8 * 10 * 19, {"trainer.steps": 19, "optim.warmup_steps": 1}),
        (1, {}, 5, {"trainer.steps": 1, "optim.warmup_steps": 1}),
        (3, {}, None, {"trainer.global_batch_size": 9, "trainer.tokens": 1e9}),
        (16, {}, 16 * 10 * 99, {"trainer.global_batch_size": 16, "trainer.steps": 99}),
        (12, {"tensor": 2, "pipeline": 2}, 9 * 10 * 99, {"trainer.global_batch_size": 9, "trainer.steps": 99}),
        (8, {"context": 2, "tensor": 2}, None, {"trainer.tokens": 1e9}),
    ],
)
def test_steps_read_the_data_once_in_batches_that_divide(monkeypatch, processes, parallel, tokens, options):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(next_command, "_tokens", lambda data: tokens)
    length = SimpleNamespace(sequence_length=10)
    assert next_command._one_epoch("d", length, ParallelConfig(**parallel)) == options
    assert "trainer.tokens" in next_command._one_epoch(None, length, ParallelConfig(**parallel))


def data_folder(path: Path, tokens: int, vocabulary: dict | None = None) -> str:
    """As far as the next line looks at it; its tokenizer is a vocabulary."""
    path.mkdir()
    (path / "train.bin").touch()
    results = {"vocab_size": 3, "train": {"tokens": tokens}}
    (path / "manifest.yaml").write_text(yaml.safe_dump({"results": results, "files": {}, "digest": "x"}))
    if vocabulary:
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    return str(path)


def test_a_blend_is_read_once_too(tmp_path, monkeypatch):
    """By its weights: until a folder of it begins again."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    a, b = data_folder(tmp_path / "a", 8000), data_folder(tmp_path / "b", 24000)
    length = SimpleNamespace(sequence_length=10)
    for data, tokens in ((a, 8000), ([a], 8000), ([a, b], 32000), ([1, a, 3.0, b], 32000), ([1, a, 1, b], 16000)):
        assert next_command._tokens(data) == tokens
        assert next_command._one_epoch(data, length, ParallelConfig()) == {"trainer.steps": tokens // 80}
    assert next_command._tokens(None) is None


def test_an_import_is_followed_by_data_of_its_own_tokenizer(tmp_path):
    """Of those beside it; one without a tokenizer is taken by its size alone."""
    ours, other = {"a": 0, "b": 1, "c": 2}, {"c": 0, "b": 1, "a": 2}
    model = data_folder(tmp_path / "model", 1, ours)
    (tmp_path / "model" / "train.bin").unlink()
    data_folder(tmp_path / "corpus_a", 1, other)
    assert next_command._data_beside(model, 3) is None
    data_folder(tmp_path / "corpus_b", 1, ours)
    assert next_command._data_beside(model, 3) == tmp_path / "corpus_b"
    data_folder(tmp_path / "corpus", 1)
    assert next_command._data_beside(model, 3) == tmp_path / "corpus"


def test_a_search_keeps_the_share_of_the_published_models(monkeypatch):
    monkeypatch.setattr(next_command, "_shape", lambda _: None)
    monkeypatch.setattr(next_command, "count_parameters", lambda _: 134_515_008)
    assert next_command._search("m", "s").options == {"model": "m", "scores": "s", "budget.parameters": 81e6}


def test_layers_go_as_many_as_the_smallest_block(monkeypatch):
    monkeypatch.setattr(next_command, "_shape", lambda _: SimpleNamespace(num_layers=6))
    for block, kept in ((2, 4), ([4, 3], 3), (6, None), (5, 1)):
        found = NEXT["layers"](of_run(block=block))
        assert (
            found is None
            if kept is None
            else found.options == {"model": "m", "layers": "out/x", "target.num_layers": kept}
        )


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
    ],
)
def test_as_many_processes_as_this_node_had(monkeypatch, variables, count):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert next_command._processes() == count


def test_an_import_is_followed_by_the_data_that_are_there_or_by_their_making(outputs, monkeypatch):
    cfg = of_run(output=str(outputs / "model"))
    monkeypatch.setattr(next_command, "has_tokenizer", lambda folder: folder == outputs / "model" / "tokenizer")
    assert NEXT["import_hf"](cfg).options["data.path"] == outputs / "corpus"
    for vocabulary in (100, 99):
        assert bool(next_command._data_beside(cfg.output, vocabulary)) is (vocabulary == 100)
    (outputs / "corpus" / "train.bin").unlink()
    following = NEXT["import_hf"](cfg)
    assert (following.command, following.options) == ("prepare_data", {"input": "TEXT.jsonl", "model": cfg.output})
    monkeypatch.setattr(next_command, "has_tokenizer", lambda folder: False)
    assert NEXT["import_hf"](cfg) is None
    for model, command in ((str(outputs / "model"), "importance"), (str(outputs / "corpus"), "import_hf")):
        cfg = of_run(output=str(outputs / "corpus"), model=SimpleNamespace(path=model))
        assert NEXT["prepare_data"](cfg).command == command


def test_a_report_is_written_over_an_older_one_and_others_beside(tmp_path, monkeypatch):
    for name in ("report", "found"):
        (tmp_path / name).mkdir()
    given = config(tmp_path)
    assert line_of(Next("report", {}, "report"), given).endswith(f"output={tmp_path}/report_2")
    (tmp_path / "report" / "report.html").touch()
    assert line_of(Next("report", {}, "report"), given).endswith(f"output={tmp_path}/report")
    assert line_of(Next("search", {"a": None, "b": 1}, "found"), given).endswith(f" b=1 output={tmp_path}/found_2")


def test_this_line_starts_the_same_command_in_as_many_processes(monkeypatch):
    monkeypatch.setattr(spelling, "line_of", lambda *given: given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for typed, found in (
        (["launch/distill.py", "a=1"], ("distill", ["a=1"], 3)), (["minitron search", "b"], ("search", ["b"], 1)),
        (["/x/launch/prune.py"], ("prune", [], 3)),
    ):  # fmt: skip
        monkeypatch.setattr(spelling, "TYPED", typed)
        assert next_command.this_line() == found
