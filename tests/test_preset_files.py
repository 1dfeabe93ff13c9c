"""Files of one's own in place of presets: the same config as the preset's, the same checks, nothing of the environment."""

import shutil
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.cli.arguments import CONF, presets
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import REQUIRED, model_options, options
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import ROOT, compose, resolved_config
from minitron_megatron.words import quoted, word
from tests.test_commands import error_of, run


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(command: str, *words: str) -> dict:
    """The config that these words make, with something for every option that is required."""
    given = {word.partition("=")[0] for word in words}
    needed = [f"{o.name}=x" for o in options(COMMANDS[command].config) if o.default == REQUIRED and o.name not in given]
    return resolved_config(compose(command, [*needed, *words]))


def cases():
    for command, config in ((name, one.config) for name, one in COMMANDS.items()):
        for group, names in presets(command).items():
            for name in names[:1] if group == "model" else names:
                for option in model_options(config) if group == "model" else [group]:
                    yield pytest.param(command, option, group, name, id=f"{command}-{option}-{name}")


@pytest.mark.parametrize(("command", "option", "group", "name"), cases())
def test_a_copy_of_a_preset_is_that_preset(tmp_path, command, option, group, name):
    copy = tmp_path / "it's, a {copy}.yaml"
    shutil.copyfile(CONF / group / f"{name}.yaml", copy)
    try:
        wanted = composed(command, f"{option}={name}")
    except UserError as error:  # an experiment of another command
        with pytest.raises(UserError) as of_file:
            composed(command, f"{option}={copy}")
        assert group == "experiment" and str(copy) in str(of_file.value) and "unknown option" in str(of_file.value), (
            error
        )
    else:
        assert composed(command, f"{option}={copy}") == wanted


def write(folder: Path, values: object) -> Path:
    file = folder / "my.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def test_the_command_line_goes_over_the_file_wherever_it_stands(tmp_path):
    file = write(tmp_path, {"lr": 0.5, "min_lr": 0.25})
    for words in ([f"optim={file}", "optim.lr=0.125"], ["optim.lr=0.125", f"optim={file}"]):
        optim = composed("distill", *words)["optim"]
        assert (optim["lr"], optim["min_lr"]) == (0.125, 0.25)


@pytest.mark.parametrize(
    "text", ["a b", "it's", "a, [b] {c: d}", "\\'", "tail\\", "true", "null", "3", 'é "q"', "#x", "a=b"]
)
def test_text_in_a_file_arrives_as_it_is(tmp_path, text):
    file = write(
        tmp_path, {"rounds": [{"name": text, "distill": {"logger.name": text}}], "distill": {"logger": {"name": text}}}
    )
    config = composed("compress", f"chain={file}")
    assert config["rounds"] == [{"name": text, "distill": {"logger.name": text}}]
    assert config["distill"] == {"logger": {"name": text}}


@pytest.mark.parametrize(
    ("command", "group", "values", "says"),
    [
        ("compress", "chain", {"distil": {"trainer": {"steps": 3}}}, "unknown option 'distil.trainer.steps' of"),
        ("compress", "chain", "seed: 1\nseed: 2", "seed is there twice"),
        ("compress", "chain", {"chain": "other.yaml"}, "a file cannot name another file"),
        ("distill", "optim", {"lrr": 1.0}, "unknown option 'optim.lrr' of minitron distill: did you mean optim.lr?"),
        ("distill", "optim", {"lr": "fast"}, "optim.lr=fast must be a number"),
        ("distill", "optim", {"lr": -1.0}, "optim.lr=-1.0 must be above 0"),
        ("distill", "experiment", {"trainer": {"recompute": "ful"}}, "trainer.recompute=ful is not one of"),
        ("distill", "experiment", {"defaults": [{"override /optim": "no_such"}]}, "optim=no_such is not a preset of conf/optim"),
        ("distill", "experiment", {"defaults": ["../secret"]}, "defaults: '../secret' cannot be read"),
        ("submit", "cluster", {"time": "12:00", "gpuss": 3}, "unknown option 'cluster.gpuss'"),
        ("evaluate", "suite", "tasks: 2020-01-01", "is a date: put it in quotes"),
        ("evaluate", "suite", "- a\n- b", "is not a mapping"),
        ("evaluate", "suite", "tasks: [", "cannot be read"),
        ("random_model", "model", {"num_layer": 2}, "did you mean model.num_layers?"),
        ("prune", "target", {"hidden_size": "big"}, "target.hidden_size=big must be a whole number"),
        ("prune", "target", {1: 2}, "1 is not the name of an option"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_with_it(tmp_path, command, group, values, says):
    file = write(tmp_path, values)
    with pytest.raises(UserError) as error:
        composed(command, f"{group}={file}")
    assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["${oc.env:HF_TOKEN}", "a${oc.env:HF_TOKEN}b", "${seed}", "${oc.decode:${oc.env:HF_TOKEN}}"]
)
@pytest.mark.parametrize(
    "place", ['{output: "%s"}', '{rounds: [{name: "%s"}]}', '{distill: {a: ["%s"]}}', '{model: "%s"}']
)
def test_nothing_of_the_environment_is_read_or_shown(tmp_path, monkeypatch, text, place):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    file = write(tmp_path, place % text)
    with pytest.raises(UserError) as error:
        composed("compress", f"chain={file}")
    assert "interpolation" in str(error.value) and "secret" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    for group, command in (("chain", "compress"), ("teacher", "distill"), ("cluster", "submit")):
        says = error_of(run(command, f"{group}={tmp_path / 'none.yaml'}", "output=x", cwd=tmp_path))
        assert f"{group}={tmp_path / 'none.yaml'} does not exist: give a YAML file of your own, or a preset" in says


def test_a_folder_whose_name_ends_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "model.yaml").mkdir()
    assert composed("prune", f"model={tmp_path / 'model.yaml'}")["model"]["path"] == str(tmp_path / "model.yaml")


def test_the_chain_of_the_documentation_is_one(tmp_path):
    text = (ROOT / "docs" / "chains.md").read_text()
    file = write(tmp_path, text.partition("```yaml\n")[2].partition("```")[0])
    config = composed("compress", f"chain={file}")
    assert [one["name"] for one in config["rounds"]] == ["half", "quarter"]
    assert config["distill"]["trainer"] == {"tokens": 1e9, "global_batch_size": 256}


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (None, "null"), (True, "true"), (False, "false"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (1e15, "1000000000000000.0"),
        (9e14, "900000000000000"), (-2.0, "-2"), (1e-7, "1e-07"), (float("inf"), "inf"), ("a b", "a b"), (Path("a/b"), "a/b"),
        ([], "[]"), (["a", "b c", 1, None, True], "[a,'b c',1,null,true]"), (("a,b",), "['a,b']"), ([["it's"]], r"[['it\'s']]"),
        ({"a": 1, "b": "x y", "c": {"d": [1.0]}}, "{a: 1,b: 'x y',c: {d: [1]}}"), ([Path("a b")], "['a b']"), ([""], "['']"),
    ],
)  # fmt: skip
def test_values_as_they_are_typed(value, typed):
    assert word(value) == typed


@pytest.mark.parametrize(
    ("text", "in_quotes"),
    [
        ("a", "'a'"),
        ("it's", r"'it\'s'"),
        ("a\\b", r"'a\b'"),
        ("a\\", r"'a\\'"),
        ("a\\\\", r"'a\\\\'"),
        ("a\\'b", r"'a\\\'b'"),
        ("", "''"),
    ],
)
def test_a_backslash_is_one_except_before_a_quote(text, in_quotes):
    assert quoted(text) == in_quotes
