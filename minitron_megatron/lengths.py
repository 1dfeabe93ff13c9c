"""How long a sample is where nobody says: min(1024, the positions of the models), filled in before a command starts.

    data.sequence_length=null, input_length=null ──the models that the options name──▶ numbers in the resolved config

So the manifest and the fingerprint of an output have the number itself. Of folders only the sizes are read; a folder that is
missing or damaged is left to the command, which says so.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.config import model_options
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import parse_json, parse_yaml

# Tokens of a sample, and of a prompt, of models that take as many.
DEFAULT = 1024


def settle_lengths(config: Any) -> str | None:
    """Fill in what was not given of data.sequence_length, or of a throughput's input_length.

    Gives the line that says so, where the models are shorter than the default. Raises UserError, with the value to type, for a
    given length above the positions of a model.
    """
    if hasattr(config, "input_length"):
        return _settle(config, "input_length", _of_mapping(config.models), config.output_length)
    data = getattr(config, "data", None)
    if data is None:
        return None
    if data.sequence_length is None and not getattr(config, "rounds", True):
        # A compression without rounds of one's own chooses its length by model, machine and text (choosing.py).
        return None
    line = _settle(data, "sequence_length", _models_of(config), 0)
    return line and f"data.{line}" if data.path is not None else None


def check_positions(length: int, positions: int, what: str, *, option: str = "data.sequence_length") -> None:
    """Raise UserError when sequences are longer than a model takes; `what` is the model, as in "the teacher"."""
    if length > positions:
        raise UserError(f"{option}={length} is above {what}'s {positions} positions: use {option}={positions}")


def _settle(options: Any, name: str, models: Mapping[str, int], reserved: int) -> str | None:
    """Set or check one length; `reserved` positions are for tokens that follow."""
    given, full = getattr(options, name), name if reserved else f"data.{name}"
    shortest = min(models, key=lambda one: models[one], default=None)
    room = None if shortest is None else models[shortest] - reserved
    if room is not None and room < 1:
        raise UserError(
            f"output_length={reserved} leaves no room for a prompt in the {models[shortest]} positions of {shortest}: use "
            f"output_length={max(1, models[shortest] // 2)}"
        )
    if given is None:
        setattr(options, name, DEFAULT if room is None else min(DEFAULT, room))
        return f"{name}={room}, as many as {shortest} takes" if room is not None and room < DEFAULT else None
    if room is not None and given > room:
        after = f" less output_length={reserved}" if reserved else ""
        raise UserError(
            f"{full}={given} is above the {models[shortest]} positions of {shortest}{after}: use {full}={room}"
        )
    return None


def _models_of(config: Any) -> dict[str, int]:
    """Positions of every model that the options name, where they can be known, by what the option says."""
    found = {}
    for option in model_options(type(config)):
        model = getattr(config, option)
        if model.path is None and model.max_position_embeddings is not None:
            found[f"{option}="] = model.max_position_embeddings
        elif model.path is not None:
            found |= _of_folder(f"{option}={model.path}", Path(model.path))
    if getattr(config, "hf", None):
        found |= _of_folder(f"hf={config.hf}", Path(config.hf))
    if getattr(config, "found", None):
        # Shapes that a search found are of the model that it searched.
        searched = _mapping(Path(config.found) / "manifest.yaml").get("config")
        path = searched.get("model", {}).get("path") if isinstance(searched, Mapping) else None
        if isinstance(path, str):
            found |= _of_folder(f"{path}, the model of found={config.found}", Path(path))
    return found


def _of_mapping(models: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, path in models.items() if isinstance(models, Mapping) else ():
        if isinstance(path, str):
            found |= _of_folder(f"models.{name}={path}", Path(path))
    return found


def _of_folder(what: str, folder: Path) -> dict[str, int]:
    """{what: positions} of a model folder, a training run or a Hugging Face folder; nothing where they cannot be read."""
    for values in _sizes(folder):
        positions = values.get("max_position_embeddings")
        if type(positions) is int and positions > 0:
            return {what: positions}
    return {}


def _sizes(folder: Path) -> Iterator[Mapping[str, Any]]:
    for file in ("model.yaml", "model/model.yaml", "config.json"):
        yield _mapping(folder / file)


def _mapping(file: Path) -> Mapping[str, Any]:
    """What a YAML or JSON file says; nothing where it is none."""
    try:
        text = file.read_text(encoding="utf-8")
        values = parse_json(text) if file.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, Mapping) else {}
