"""Inputs have identities: what was replaced since, under the same name and in the same shape, is refused by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from minitron_megatron.checkpoints.digests import digests_of
from minitron_megatron.checkpoints.folder import (
    MANIFEST,
    TOKENIZER,
    _beside,
    open_model_folder,
    output_folder,
    read_manifest,
)
from minitron_megatron.checkpoints.task_stamps import task_stamps
from minitron_megatron.checkpoints.tokenizer import tokenizer_digest
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import (
    CacheDataConfig,
    CacheOptions,
    CacheRunConfig,
    CacheTeacherConfig,
    DistillConfig,
    DistillOptions,
    EvaluateConfig,
    ImportanceConfig,
    LayersConfig,
    Option,
    PruneConfig,
    TargetConfig,
)
from minitron_megatron.config import options as all_options
from minitron_megatron.data.datasets import token_checksum, training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.distill.cache import write_chunk
from minitron_megatron.distill.cache_checks import check_cache_teacher
from minitron_megatron.distill.contents import Contents
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import checks as evaluate_checks
from minitron_megatron.evaluate.checks import check_evaluate
from minitron_megatron.importance.checks import check_importance
from minitron_megatron.importance.layer_checks import check_layers
from minitron_megatron.launcher import resolved_config
from minitron_megatron.prune.checks import check_prune
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.stages import Stages
from minitron_megatron.train.distill_checks import check_distill
from tests.pool import WorkerError
from tests.test_cache import random_answers
from tests.test_data import prepare
from tests.test_prune import random_scores, write_scores
from tests.test_saved import written
from tests.test_train import LENGTH, exit_code, make_sources, options
from tests.tiny import data_folder, data_option, hf_model, imported, model_option, save_hf, tiny_tokenizer

# Options that name what a command reads, and what that is called among the inputs of its manifest (of compress and the
# candidates: of their stages).
READ = {
    "hf": "file NAME of each, or hf: a digest of all",
    "nemo": "file NAME of the archive or config, and file weights",
    "tokenizer": "file NAME of each",
    "model.path": "model, and file tokenizer/NAME where the tokenizer is read",
    "teacher.path": "teacher",
    "student.path": "student, and file tokenizer/NAME",
    "data.path": "data: of a blend, with its weights",
    "input": "the path of each file",
    "train": "train",
    "validation": "validation",
    "scores": "scores, or scores 1, scores 2, …",
    "layers": "layers",
    "questions": "questions",
    "tasks": "file NAME of task files and what they name",
    "budget.table": "table",
    "plan": "plan: a digest of what is kept",
    "distill.cache": "cache, and teacher: of whom it is",
    "cache": "cache",
    "found": "found",
    "trainer.start_from": "start_from",
    "results": "results PATH",
    "models": "0 NAME, 1 NAME, …",
    "folders": "the name of each",
}
# Options with text that name nothing to read; those of status and submit, which keep nothing that could be taken as done.
NOT_READ = """output rope_scaling pipeline_layout text_key end_of_document begin_of_document block space target
    recompute_modules logger intermediate_layers base_model license engine start ignore_keys vllm
    tensorrt_llm rounds prepare_data importance search prune distill evaluate export_hf cache_teacher
    ranks halving scaling student title folder command name cluster""".split()
OTHER_TEXT = "Pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump over the sphinx of quartz! "


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models and data, and beside them others of the same shape and size."""
    folder = make_sources(tmp_path_factory.mktemp("sources"))
    imported(hf_model(7), folder / "another_teacher")
    imported(hf_model(8, hidden_size=24, intermediate_size=24), folder / "another_student")
    shutil.copytree(folder / "teacher" / "model", folder / "another_tokenizer")
    tiny_tokenizer(folder / "another_tokenizer" / TOKENIZER, OTHER_TEXT)
    as_made(folder / "another_tokenizer")
    shutil.copytree(folder / "float32" / "model", folder / "another_template" / "model")
    config = folder / "another_template" / "model" / TOKENIZER / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "hello"}))
    as_made(folder / "another_template" / "model")
    (folder / "b").mkdir()
    shutil.copytree(data_folder(folder / "b", folder / "teacher" / "model", documents=59), folder / "another_data")
    return folder


def as_made(folder: Path) -> Path:
    """A folder whose files were changed, as if its command had made it so: its manifest has their sizes and digests."""
    manifest = yaml.safe_load((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    manifest["digests"] = digests_of(folder, _beside(manifest["files"]))
    (folder / MANIFEST).write_text(yaml.safe_dump(manifest))
    return folder


@contextmanager
def replaced(there: Path, by: Path) -> Iterator[None]:
    """For a while another folder, or file, has the name of this one; or a copy of itself."""
    aside = there.with_name(f"{there.name}.aside")
    there.rename(aside)
    by = aside if by == there else by
    try:
        (shutil.copytree if by.is_dir() else shutil.copyfile)(by, there)
        yield
    finally:
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        aside.rename(there)


def test_what_every_command_reads_is_known():
    """An option that may name a file is in one of the two tables: whoever adds one says how its file is known."""
    named = {option.name for command in COMMANDS.values() for option in with_text(command.config)}
    unknown = {n for n in named - set(READ) if not set(n.split(".")) & set(NOT_READ)}
    assert not unknown and not set(READ) - named
    # What names files is compared as paths are; a report's model may be a name.
    kinds = [command.config for command in COMMANDS.values() if command.name != "status"]
    assert {one.name for kind in kinds for one in all_options(kind) if one.path} == {*READ, "output"}


def with_text(config: type) -> list[Option]:
    """Options whose values are text, or anything, and not one of a few words."""
    return [o for o in all_options(config) if ("str" in o.type or "Any" in o.type) and not o.choices]


# --- Runs that go on --------------------------------------------------------------------------------------------------


REPLACED = {
    "teacher": ("teacher/model", "another_teacher/model", r"teacher= is another one than the run has had so far"),
    "student": ("float32/model", "another_student/model", r"student= is another one than the run has had so far"),
    "data": ("data", "another_data", r"data\.path= is another one than the run has had so far"),
    # Its weights are the same: what is published beside them would be another one's.
    "chat template": (
        "float32/model",
        "another_template/model",
        r"file tokenizer/tokenizer_config\.json is another one than the run has had so far",
    ),
}


@pytest.fixture(scope="module")
def begun(gloo, sources, tmp_path_factory) -> DistillConfig:
    """A run of six steps that was stopped after the second."""
    cfg = options(sources, tmp_path_factory.mktemp("begun") / "run", validation_samples=0, stop_after=2)
    assert gloo(1, exit_code, cfg) == [0]
    return cfg


@pytest.mark.parametrize("what", REPLACED)
def test_a_run_does_not_go_on_with_another_input(begun, sources, tmp_path, what):
    """Neither one that has steps left, nor one that is done; with the same folder again, copied, it does."""
    name, other, says = REPLACED[what]
    goes_on = replace(begun, trainer=replace(begun.trainer, stop_after=None))
    done = replace(begun, output=str(tmp_path / "done"))
    finished = Path(done.output) / "model"
    with output_folder(finished, command="x", config={}, inputs=check_distill(begun).inputs, resume=True):
        pass
    (finished.parent / "config.yaml").write_text(yaml.safe_dump(resolved_config(done)))
    for cfg in (begun, goes_on, done):
        with replaced(sources / name, sources / other), pytest.raises(UserError, match=says) as said:
            check_distill(cfg)
        assert "\n" not in str(said.value)
        with replaced(sources / name, sources / name):
            check_distill(cfg)


def test_a_command_that_goes_on_says_it_too(gloo, begun, sources):
    says = r"teacher= is another one than the run has had so far \(blake3:.*, now blake3:"
    another = replaced(sources / "teacher" / "model", sources / "another_teacher" / "model")
    with another, pytest.raises(WorkerError, match=says):
        gloo(1, exit_code, begun)
    assert gloo(1, exit_code, begun) == [0]


def cached(path: Path, sources: Path, data: Path, teacher: str, seed: int) -> Path:
    """A cache for the run of `begun`, of random answers of a teacher."""
    digests = open_model_folder(sources / teacher / "model").digest, read_manifest(data)["digest"]
    contents = Contents(*digests, 1234, LENGTH, False, 300, 1.0, 4, train=48, validation=0, chunk_samples=48)
    shape = open_model_folder(sources / teacher / "model").shape
    text = open_data(str(data), "train", shape, LENGTH)
    samples = training_samples(text, "train", sequence_length=LENGTH, seed=1234, count=48)
    tokens = [token_checksum(samples[number]["tokens"]) for number in range(48)]
    with output_folder(path, command="a test", config={"x": seed}, inputs={}, resume=True) as out:
        (chunk,) = contents.chunks()
        write_chunk(out.path, contents, chunk, random_answers(contents, 48, seed), tokens)
        out.results = asdict(contents)
    return path


@pytest.mark.parametrize(
    ("teacher", "says"),
    [("teacher", r"distill\.cache= is another"), ("another_teacher", r"distill\.cache= is another")],
)
def test_a_run_does_not_go_on_with_another_cache(sources, tmp_path, teacher, says):
    """Of the same data and shape: of other answers, or of another teacher, whom no option names."""
    one = cached(tmp_path / "cache", sources, sources / "data", "teacher", 0)
    other = cached(tmp_path / "other", sources, sources / "data", teacher, 1)
    cfg = options(sources, tmp_path / "run", validation_samples=0)
    cfg.distill, cfg.teacher = DistillOptions(loss="topk_kl", top_k=4, cache=str(one)), replace(cfg.teacher, path=None)
    inputs = check_distill(cfg).inputs
    assert inputs["teacher"] == open_model_folder(sources / "teacher" / "model").digest and "cache" in inputs
    run = tmp_path / "run"
    written(run / "checkpoints", 2, inputs=inputs)
    (run / "config.yaml").write_text(yaml.safe_dump(resolved_config(cfg)))
    check_distill(cfg)
    with replaced(one, other), pytest.raises(UserError, match=says):
        check_distill(cfg)


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def swapped_ends(tokenizer: Path) -> None:
    """The same pieces, of which two have each other's id: documents begin where the model ends them."""
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["<s>"], vocab["</s>"] = vocab["</s>"], vocab["<s>"]
    for token in values["added_tokens"]:
        token["id"] = vocab[token["content"]]
    (tokenizer / "tokenizer.json").write_text(json.dumps(values))


def swapped_special(tokenizer: Path) -> None:
    """Special tokens alone are called otherwise."""
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    del values["model"]["vocab"]["</s>"]
    values["added_tokens"][1]["content"] = "<|end|>"
    (tokenizer / "tokenizer.json").write_text(json.dumps(values))


def other_merges(tokenizer: Path) -> None:
    """The same tokens, made in another order: text becomes other ids."""
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    values["model"]["merges"].reverse()
    (tokenizer / "tokenizer.json").write_text(json.dumps(values))


def saved_again(tokenizer: Path) -> None:
    """As another version of the library writes it, with another chat template: the same tokenizer."""
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    values["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]]
    values["version"], values["post_processor"] = "2.0", None
    (tokenizer / "tokenizer.json").write_text(json.dumps(values, indent=3))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "x"}))


READERS: dict[str, Callable[[str, Path, Path], object]] = {
    "importance": lambda model, data, out: check_importance(
        ImportanceConfig(output=str(out), model=model_option(model), data=data_option(data), samples=2)
    ),
    "layers": lambda model, data, out: check_layers(
        LayersConfig(output=str(out), model=model_option(model), data=data_option(data))
    ),
    "prune": lambda model, data, out: check_prune(
        PruneConfig(
            output=str(out),
            model=model_option(model),
            data=data_option(data),
            samples=2,
            target=TargetConfig(ffn_hidden_size=24),
        )
    ),
    "evaluate": lambda model, data, out: check_evaluate(
        EvaluateConfig(output=str(out), model=model_option(model), data=data_option(data))
    ),
    "evaluate hf": lambda model, data, out: check_evaluate(
        EvaluateConfig(output=str(out), hf=str(hf_of(model)), data=data_option(data))
    ),
    "cache_teacher": lambda model, data, out: check_cache_teacher(
        CacheTeacherConfig(
            output=str(out),
            teacher=model_option(model),
            data=CacheDataConfig(path=str(data), sequence_length=LENGTH),
            trainer=CacheRunConfig(steps=1, global_batch_size=1, validation_samples=0),
            distill=CacheOptions(top_k=2),
        )
    ),
    "distill": lambda model, data, out: check_distill(
        replace(
            options(model.parent, out, validation_samples=0),
            teacher=model_option(model),
            student=model_option(model),
            data=data_option(data, LENGTH),
        )
    ),
}


def hf_of(model: Path) -> Path:
    """A Hugging Face folder with the tokenizer of a model folder."""
    target = model.with_name(f"{model.name}_hf")
    if not target.exists():
        shutil.copytree(model.parent / "teacher" / "hf", target)
        shutil.copytree(model / TOKENIZER, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    return target


@pytest.mark.parametrize("name", READERS)
def test_data_of_another_tokenizer_are_refused(sources, tmp_path, name):
    """Of the same number of tokens: by every command that reads data with a model."""
    with pytest.raises(
        UserError, match=r"data\.path=\S+ was made with another tokenizer than that of \w+=\S+ \("
    ) as said:
        READERS[name](sources / "another_tokenizer", sources / "data", tmp_path / "out")
    assert "\n" not in str(said.value) and "prepare the data with this model's tokenizer" in str(said.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped_ends, r"documents end in token 1, '</s>' in the data, '<s>' in the model's"),
        (other_merges, r"their merges differ"),
        (swapped_special, r"documents end in token 1, '</s>' in the data, '<\|end\|>' in the model's"),
        (saved_again, None),
        (lambda tokenizer: shutil.rmtree(tokenizer), None),
    ],
    ids=["ends", "merges", "special", "saved again", "none"],
)
def test_what_makes_a_tokenizer_another_one(sources, tmp_path, change, says):
    model = tmp_path / "model"
    shutil.copytree(sources / "teacher" / "model", model)
    change(model / TOKENIZER)
    as_made(model)
    if says is None:
        READERS["importance"](model, sources / "data", tmp_path / "out")
        return
    with pytest.raises(UserError, match=says):
        READERS["importance"](model, sources / "data", tmp_path / "out")


def test_data_of_a_hugging_face_folder_have_its_tokenizer_alone(sources, tmp_path):
    """Not its weights; and it is the one of the model that was imported from it."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"words {i}"}) + "\n" for i in range(40)))
    hf = save_hf(hf_model(0), tmp_path / "hf")
    one = prepare(hf, tmp_path / "in.jsonl", tmp_path / "one")
    other = prepare(sources / "teacher" / "model", tmp_path / "in.jsonl", tmp_path / "other")
    assert {path.name for path in (one / TOKENIZER).iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    }
    digests = [read_manifest(folder)["results"]["tokenizer"] for folder in (one, other)]
    assert digests[0] == digests[1] == tokenizer_digest(hf) == tokenizer_digest(one / TOKENIZER)


def test_samples_are_of_the_data_that_are_there(sources, tmp_path):
    """Other data that were copied over these: the index of samples that lies there is of those before."""
    shape = open_model_folder(sources / "teacher" / "model").shape

    def samples(path: Path) -> list[list[int]]:
        found = training_samples(
            open_data(str(path), "train", shape, LENGTH), "train", sequence_length=LENGTH, seed=1, count=9
        )
        return [found[i]["tokens"].tolist() for i in range(9)]

    shutil.copytree(sources / "data", tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    shutil.copytree(sources / "another_data", tmp_path / "other", ignore=shutil.ignore_patterns("cache"))
    before, wanted = samples(tmp_path / "data"), samples(tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "cache")
    shutil.copytree(tmp_path / "other", tmp_path / "data", dirs_exist_ok=True)
    assert samples(tmp_path / "data") == wanted != before


# --- Outputs that are done --------------------------------------------------------------------------------------------


def test_a_pruned_model_names_all_that_it_was_made_of(sources, tmp_path):
    """Scores that were measured anew, and a tokenizer that was changed, are no longer those of the output."""
    model = tmp_path / "model"
    shutil.copytree(sources / "teacher" / "model", model)
    scores = write_scores(random_scores(model), tmp_path / "scores")
    cfg = PruneConfig(
        model=model_option(model),
        scores=str(scores),
        target=TargetConfig(ffn_hidden_size=24),
        output=str(tmp_path / "pruned"),
    )
    prune_model(cfg)
    inputs = read_manifest(tmp_path / "pruned")["inputs"]
    assert inputs["scores"] == read_manifest(scores)["digest"] and "file tokenizer/tokenizer.json" in inputs
    prune_model(cfg)
    other = write_scores(random_scores(model, seed=3), tmp_path / "other")
    with (
        replaced(scores, other),
        pytest.raises(UserError, match=r"pruned was made from other inputs: scores changed since"),
    ):
        check_prune(cfg)
    saved_again(model / TOKENIZER)
    as_made(model)
    with pytest.raises(UserError, match=r"pruned was made from other files: tokenizer/tokenizer\.json, tokenizer/tok"):
        check_prune(cfg)


def test_a_task_file_is_known_with_the_data_that_it_names(tmp_path):
    (tmp_path / "questions.jsonl").write_text("{}")
    task = tmp_path / "task.yaml"
    task.write_text(
        "task: mine\nprocess_docs: !function utils.f\ndataset_kwargs: {data_files: {test: questions.jsonl}}\n"
    )
    (tmp_path / "utils.py").write_text("def f(documents): return documents\n")
    stamps = task_stamps(["winogrande", str(task)])
    assert [Path(name.removeprefix("file ")).name for name in stamps] == ["questions.jsonl", "task.yaml", "utils.py"]
    (tmp_path / "questions.jsonl").write_text("{} ")
    assert stamps != task_stamps([str(task)]) and stamps.keys() == task_stamps([str(task)]).keys()


# --- Stages -----------------------------------------------------------------------------------------------------------


def test_the_tasks_of_a_hugging_face_folder_are_inputs_too(tmp_path, monkeypatch):
    """Whoever computes, a task whose data were replaced is another one."""
    (tmp_path / "base.yaml").write_text("dataset_kwargs: {data_files: {test: questions.jsonl}}\n")
    task = tmp_path / "task.yaml"
    task.write_text("include: base.yaml\ntask: mine\n")
    asked = []
    monkeypatch.setattr(evaluate_checks, "check_folder", lambda *_, **__: None)
    monkeypatch.setattr(evaluate_checks, "check_command_output", lambda _, inputs: asked.append(inputs))
    cfg = EvaluateConfig(output=str(tmp_path / "out"), hf=str(tmp_path), tasks=[str(task)])
    for text in ("{}", "{} "):
        (tmp_path / "questions.jsonl").write_text(text)
        assert check_evaluate(cfg).inputs == asked[-1] == task_stamps([str(task)]) and len(asked[-1]) == 3
    assert asked[0] != asked[1]


def stage(root: Path, name: str, content: str, counts: list[str]) -> Callable[[Stages], None]:
    """A stage whose output holds some text."""

    def work() -> None:
        counts.append(name)
        output = {"command": name, "config": {"x": content}, "inputs": {}, "resume": True}
        with output_folder(root / name, **output) as out:
            if not out.done:
                (out.path / "file").write_text(content)

    return lambda stages: stages.run(name, root / name, work, "the same", root / name)


def test_stages_notice_outputs_that_were_replaced(tmp_path):
    counts: list[str] = []
    one, two = (stage(tmp_path, name, name, counts) for name in ("one", "two"))

    def start() -> None:
        stages = Stages(tmp_path / "stages.json")
        one(stages)
        two(stages)

    start()
    start()
    assert counts == ["one", "two"]
    stage(tmp_path / "elsewhere", "two", "something else", [])(Stages(tmp_path / "elsewhere.json"))
    says = r"^two: \S+two is another one than was made here \(sha256"
    with replaced(tmp_path / "two", tmp_path / "elsewhere" / "two"), pytest.raises(UserError, match=says):
        start()
    # Made anew, and otherwise: the command of the next stage compares what it reads, and has to be asked.
    shutil.rmtree(tmp_path / "one")
    one = stage(tmp_path, "one", "otherwise", counts)
    start()
    assert counts == ["one", "two", "one", "two"]
    start()
    assert counts == ["one", "two", "one", "two"]
