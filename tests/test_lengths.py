"""Lengths that nobody gives: as many tokens as the models take, 1024 at most, in every command and in what is recorded."""

import json
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import model_options, options
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, compose, resolved_config
from minitron_megatron.lengths import DEFAULT, settle_lengths

# Every command with a length of samples, but those that name no model by an option of theirs.
WITH_LENGTH = [
    name
    for name, command in COMMANDS.items()
    if any(o.name == "data.sequence_length" for o in options(command.config)) and model_options(command.config)
]


@pytest.fixture(autouse=True, scope="module")
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def model(folder: Path, positions: int, file: str = "model.yaml") -> Path:
    """As much of a model folder, a run (model/model.yaml) or a Hugging Face folder (config.json) as has its positions."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    values = {"max_position_embeddings": positions}
    (folder / file).write_text(json.dumps(values) if file.endswith("json") else yaml.safe_dump(values))
    return folder


def words(name: str, folder: Path, *more: str) -> list[str]:
    """The command with every model at the same folder."""
    models = model_options(COMMANDS[name].config)
    rounds = ["rounds=[{name: a}]"] if name == "compress" else []
    return [*(f"{one}={folder}" for one in models), "data.path=d", "output=out", *rounds, *more]


@pytest.mark.parametrize("name", WITH_LENGTH)
@pytest.mark.parametrize("file", ["model.yaml", "model/model.yaml"])
@pytest.mark.parametrize(
    ("positions", "length"), [(512, 512), (1023, 1023), (1024, 1024), (1025, 1024), (131072, 1024)]
)
def test_a_length_that_nobody_gives_is_the_models_and_1024_at_most(tmp_path, name, file, positions, length):
    config = compose(name, words(name, model(tmp_path / "m", positions, file)))
    assert config.data.sequence_length == length
    assert resolved_config(config)["data"]["sequence_length"] == length


@pytest.mark.parametrize("name", WITH_LENGTH)
def test_a_given_length_stays_up_to_the_models_and_above_it_is_refused_with_the_value_to_type(tmp_path, name):
    folder = model(tmp_path / "m", 512)
    assert compose(name, words(name, folder, "data.sequence_length=512")).data.sequence_length == 512
    option = model_options(COMMANDS[name].config)[0]
    with pytest.raises(UserError) as refused:
        compose(name, words(name, folder, "data.sequence_length=513"))
    assert str(refused.value) == (
        f"data.sequence_length=513 is above the 512 positions of {option}={folder}: use data.sequence_length=512"
    )


def test_the_shortest_of_several_models_counts(tmp_path):
    given = [
        f"teacher={model(tmp_path / 't', 700)}",
        f"student={model(tmp_path / 's', 300)}",
        "data.path=d",
        "output=o",
    ]
    assert compose("distill", given).data.sequence_length == 300
    hf = model(tmp_path / "hf", 200, "config.json")
    assert compose("evaluate", [f"hf={hf}", "data.path=d", "output=o"]).data.sequence_length == 200


@pytest.mark.parametrize(("preset", "length"), [("llama3_1_8b", DEFAULT), ("smollm2_135m", DEFAULT)])
def test_presets_have_positions_too(preset, length):
    assert compose("importance", [f"model={preset}", "data.path=d", "output=o"]).data.sequence_length == length
    with pytest.raises(UserError, match=r"positions of model=: use data\.sequence_length="):
        compose("importance", [f"model={preset}", "data.path=d", "output=o", "data.sequence_length=200000"])


def test_a_compression_without_rounds_chooses_its_length_itself(tmp_path):
    given = [f"model={model(tmp_path / 'm', 512)}", "data.path=d", "output=o"]
    assert compose("compress", given).data.sequence_length is None
    with pytest.raises(UserError, match=r"use data\.sequence_length=512"):
        compose("compress", [*given, "data.sequence_length=600"])


def test_prompts_leave_room_for_the_answer(tmp_path):
    one, other = model(tmp_path / "a", 512), model(tmp_path / "b", 400, "config.json")
    models = f"models={{a: {one}, b: {other}}}"
    assert compose("throughput", [models, "output=o"]).input_length == 400 - 128
    assert compose("throughput", [f"models={{a: {model(tmp_path / 'c', 4096)}}}", "output=o"]).input_length == DEFAULT
    with pytest.raises(
        UserError,
        match=r"input_length=300 is above the 400 positions of models\.b=.* less output_length=128: use input_length=272",
    ):
        compose("throughput", [models, "output=o", "input_length=300"])
    with pytest.raises(UserError, match="output_length=400 leaves no room for a prompt"):
        compose("throughput", [models, "output=o", "output_length=400"])


def test_candidates_take_the_length_of_the_model_that_was_searched(tmp_path):
    found = tmp_path / "found"
    found.mkdir()
    path = str(model(tmp_path / "m", 512))
    (found / "manifest.yaml").write_text(yaml.safe_dump({"config": {"model": {"path": path}}}))
    given = [f"found={found}", "data.path=d", "output=o"]
    assert compose("distill_candidates", given).data.sequence_length == 512


@pytest.mark.parametrize(
    "content", [None, "", "[1]", "max_position_embeddings: many", "a: [", "max_position_embeddings: -4"]
)
def test_folders_that_cannot_be_read_are_left_to_the_command(tmp_path, content):
    if content is not None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "model.yaml").write_text(content)
    config = compose("importance", words("importance", tmp_path / "m"))
    assert config.data.sequence_length == DEFAULT


def test_a_shorter_default_is_said_once_and_only_where_data_are_read(tmp_path):
    config = COMMANDS["prune"].config(output="o")
    config.model.path = str(model(tmp_path / "m", 512))
    assert settle_lengths(config) is None and config.data.sequence_length == 512
    config.data.path, config.data.sequence_length = "d", None
    assert settle_lengths(config) == f"data.sequence_length=512, as many as model={tmp_path / 'm'} takes"
    assert settle_lengths(config) is None
