"""Hugging Face folders, looked into and described without torch: which tensors there are, and what lies beside them.

hf.py reads and writes the weights.
"""

import logging
import math
import shutil
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import MANIFEST, SHAPE_FILE, TOKENIZER, ModelFolder, load_json
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.checkpoints.tokenizer import TEMPLATES, TOKENIZER_FILES, copy_tokenizer
from minitron_megatron.console import print_table
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, count_parameters, slots
from minitron_megatron.models.families import shape_from_hf
from minitron_megatron.models.limits import ITEMSIZES
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.plain_files import parse_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# What travels beside the weights: the source's own config (its keys that are no sizes) and its tokenizer.
HF_FILES = "huggingface"


GENERATION = "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


CONFIG_FILES = ("config.json", GENERATION)


# What stands beside weights that are no model by themselves: transformers loads another one, named in it, first.
ADAPTER = "adapter_config.json"
# Files beside the weights that must be whole, small enough to be looked into at once.
_SMALL_JSON = (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Bytes that two tensors are compared by.
_COMPARED = 2**22
# Files that one line names.
_NAMED = 12


class HfFolder:
    """A Hugging Face folder with safetensors weights: its shape, and any rows of any tensor.

    `ignored` are keys of config.json that are not known, of which the user says that they change nothing. Raises UserError.
    """

    def __init__(self, path: Path | str, ignored: Collection[str] = ()) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"hf={self.path} does not exist or is not a folder: give a Hugging Face model folder")
        if (self.path / ADAPTER).is_file():
            raise UserError(f"{self.path} is an adapter ({ADAPTER}): merge it into its model first")
        if (self.path / MANIFEST).is_file() and not (self.path / "config.json").exists():
            raise UserError(f"{self.path} is a model folder of this software, imported already: give it as model=")
        self.config = load_json(self.path / "config.json")
        shape = shape_from_hf(self.config, str(self.path / "config.json"), ignored)
        self.files = self._index()
        self.shape = shape if self._tied(shape) else shape.resized(tied_embeddings=False)

    @cached_property
    def stamps(self) -> dict[str, str]:
        """Stamps of every file that an import reads, as inputs of a manifest."""
        return file_stamps(self.path, self._read_files())

    def _read_files(self) -> list[Path]:
        beside = (self.path / name for name in (*CONFIG_FILES, *TOKENIZER_FILES, INDEX))
        return [*set(self.files.values()), *beside, *(self.path / TEMPLATES).glob("*.jinja")]

    def say_others(self) -> None:
        """Name what lies in the folder and is not imported, in one line."""
        read = {file.relative_to(self.path).parts[0] for file in self._read_files()}
        others = [file.name + "/" * file.is_dir() for file in self.path.iterdir() if file.name not in {*read, MANIFEST}]
        others = sorted(name for name in others if not name.startswith("."))
        if others:
            more = ", …" * (len(others) > _NAMED)
            log.info("%s: not imported: %s%s", self.path, ", ".join(others[:_NAMED]), more)

    def _index(self) -> dict[str, Path]:
        """The file of each tensor, from the source that transformers takes: the single file before an index."""
        index, single = self.path / INDEX, self.path / SINGLE
        if single.is_file():
            self._name_the_other_source(index)
            return dict.fromkeys(self._names(single), single)
        if not index.is_file():
            hint = " (.bin files can execute code: convert them)" if list(self.path.glob("*.bin")) else ""
            raise UserError(f"{self.path} has no {SINGLE} or its index{hint}")
        names = load_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(map(_is_file_name, names.values())):
            raise UserError(f"{index} is damaged: weight_map does not name files of the folder")
        files = {name: self.path / file for name, file in names.items()}
        missing = sorted({str(file) for file in files.values() if not file.is_file()})
        if missing:
            raise UserError(f"{missing[0]} is missing: the index of {self.path} names it")
        return files

    def _name_the_other_source(self, index: Path) -> None:
        """Say that there is an index of other files beside the single one, as saving over an older model leaves it."""
        try:
            names = load_json(index).get("weight_map") if index.is_file() else {}
        except UserError:
            names = None
        plain = isinstance(names, dict) and all(map(_is_file_name, names.values()))
        if not plain or set(names.values()) - {SINGLE}:
            log.warning(
                "%s: taken from %s, as transformers does; %s names other files: remove one", self.path, SINGLE, INDEX
            )

    def _tied(self, shape: ModelShape) -> bool:
        """Whether one matrix stands at both ends: not where the folder has another head, which transformers then takes."""
        if not shape.tied_embeddings or not {_EMBEDDING, _HEAD} <= set(self.files) or self._equal(_EMBEDDING, _HEAD):
            return shape.tied_embeddings
        log.warning(
            "%s: %s differs from %s, though config.json ties them: taken as untied, as transformers does",
            self.path,
            _HEAD,
            _EMBEDDING,
        )
        return False

    def _equal(self, *names: str) -> bool:
        """Whether two tensors have the same bytes. Raises UserError where a file lacks one."""
        (first, one), (second, other) = (self._bytes(name) for name in names)
        if first != second or len(one) != len(other):
            return False
        starts = range(0, len(one), _COMPARED)
        return all(np.array_equal(one[at : at + _COMPARED], other[at : at + _COMPARED]) for at in starts)

    def _bytes(self, name: str) -> tuple[Any, np.ndarray]:
        """Dtype and shape of a tensor, and its bytes as they lie in the file."""
        file = self.files[name]
        if name not in self._names(file):
            raise self._lacks(file, name)
        with open(file, "rb") as there:
            length = int.from_bytes(there.read(8), "little")
            about = parse_json(there.read(length))[name]
        start, stop = about["data_offsets"]
        place = 8 + length + start
        if start == stop:
            return (about["dtype"], about["shape"]), np.empty(0, np.uint8)
        return (about["dtype"], about["shape"]), np.memmap(file, np.uint8, "r", place, (stop - start,))

    def _names(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "numpy") as tensors:
                return list(tensors.keys())
        except (SafetensorError, OSError) as error:
            pass_on_unless_damage(error)
            raise UserError(f"{file} is damaged ({error}): download it again") from None

    def _lacks(self, file: Path, name: str) -> UserError:
        return UserError(f"{file} has no {name}, which {INDEX} says is in it: download both again")

    def check(self) -> None:
        """Every tensor of the table is there with its shape and one dtype, and nothing else is. Raises UserError."""
        wanted = {name: shape for slot in slots(self.shape) for name, shape in hf_tensors(slot, self.shape).items()}
        spare = {_HEAD} if self.shape.tied_embeddings else set()
        unknown = sorted(n for n in set(self.files) - set(wanted) - spare if not _is_buffer(n))
        missing = sorted(set(wanted) - set(self.files))
        if missing or unknown:
            what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a tensor of {self.shape.family}"
            raise UserError(f"{self.path}: {what} ({len(missing)} missing, {len(unknown)} unknown)")
        for file in sorted(set(self.files.values())):
            names = set(self._names(file))
            self._check_index(file, names)
            with safe_open(file, "numpy") as tensors:
                for name in names & set(wanted):
                    self._check_tensor(name, tensors.get_slice(name), wanted[name])
        for name in _SMALL_JSON:
            if (self.path / name).is_file():
                load_json(self.path / name)

    def _check_index(self, file: Path, names: set[str]) -> None:
        """Raise UserError where a file has other tensors than its index says: transformers reads all that is there."""
        said = {name for name, there in self.files.items() if there == file}
        if said - names:
            raise self._lacks(file, min(said - names))
        more = sorted(name for name in names - said if not _is_buffer(name))
        if more:
            where = f"says it is in {self.files[more[0]].name}" if more[0] in self.files else "does not name it"
            raise UserError(f"{file} has {more[0]}, and {INDEX} {where}: leave the one that is right")

    def _check_tensor(self, name: str, there: Any, shape: tuple[int, ...]) -> None:
        dtype = {"F32": "float32", "BF16": "bfloat16"}.get(there.get_dtype(), there.get_dtype())
        if tuple(there.get_shape()) != shape:
            raise UserError(f"{self.path}: {name} is {tuple(there.get_shape())}, config.json makes it {shape}")
        if dtype != self.shape.dtype:
            raise UserError(f"{self.path}: {name} is {dtype}, config.json says {self.shape.dtype}: store one dtype")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Rows `start` to `stop` of a tensor. The file is mapped only while it is read, so memory does not grow."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_slice(name)[start:stop]


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and not Path(value).is_absolute() and ".." not in Path(value).parts


def _is_buffer(name: str) -> bool:
    """Whether a tensor follows from the config, and was stored all the same by older programs."""
    return name.endswith("rotary_emb.inv_freq")


def hf_tensors(slot: Slot, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors of a slot with their shapes; the vocabulary is not padded there."""
    rest = slot.shape(shape)[1:]
    return {name: (len(part_positions(slot, shape, part)), *rest) for part, name in slot.hf_names().items()}


def part_positions(slot: Slot, shape: ModelShape, part: str) -> np.ndarray:
    """Ascending rows of a slot's tensor that are, in this order, the rows of one Hugging Face tensor (without padding)."""
    positions = slot.row.dims[0].indices(shape.lengths(slot.layer), {}, part)
    return positions[: shape.vocab_size] if "vocab" in slot.row.axes else positions


def write_shape(folder: Path, shape: ModelShape) -> None:
    """Write model.yaml."""
    (folder / SHAPE_FILE).write_text(yaml.safe_dump(shape.to_dict(), sort_keys=False), encoding="utf-8")


def copy_companions(source: ModelFolder, target: Path, data: Path | None = None) -> None:
    """Copy tokenizer and Hugging Face files from one model folder into another that is being written.

    Where the source has no tokenizer, that of a data folder is taken: the one that made the tokens it was trained on.
    """
    for name in (TOKENIZER, HF_FILES):
        if (source.path / name).is_dir():
            shutil.copytree(source.path / name, target / name)
    if (target / TOKENIZER).is_dir():
        return
    if data is not None:
        copy_tokenizer(data / TOKENIZER, target / TOKENIZER)
    if (target / TOKENIZER).is_dir():
        log.info("the tokenizer is that of %s: %s has none", data, source.path)
    else:
        log.warning("%s has no tokenizer, so the new model has none: it cannot be used on text", source.path)


def companion_stamps(folder: ModelFolder) -> dict[str, str]:
    """Stamps of what lies beside a model's weights and goes where they go, as inputs: its digest is that of the weights alone."""
    return file_stamps(
        folder.path, [file for name in (TOKENIZER, HF_FILES) for file in (folder.path / name).rglob("*")]
    )


def print_shape(title: str, shape: ModelShape, results: dict[str, Any] | None = None) -> None:
    """Print a model's sizes and a command's results."""
    sizes = {k: v for k, v in shape.to_dict().items() if v is not None}
    sizes["rope_scaling"] = "llama3" if shape.rope_scaling else "none"
    rows = list({**sizes, "parameters": count_parameters(shape), **(results or {})}.items())
    print_table(title, ["", "value"], rows)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has what transformers makes a tokenizer of."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def said_of_tokenizer(folder: Path) -> dict[str, str]:
    """A row for the summary of an import from a folder without a tokenizer; none where it has one."""
    if has_tokenizer(folder):
        return {}
    return {
        "tokenizer": "none found, which prepare_data, adopt_data and evaluate with tasks= need: put its files into the "
        "folder, and import into another output="
    }


def check_loaded(found: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless transformers has loaded every weight of a model, and no other, as its `output_loading_info` says.

    It draws those that a folder lacks at random, and passes over those that the model has no place for.
    """
    kinds = {"missing": "missing", "unexpected": "not of this model", "mismatched": "of another shape"}
    for kind, what in kinds.items():
        if keys := sorted(str(key[0] if isinstance(key, tuple) else key) for key in found[f"{kind}_keys"]):
            more = f" and {len(keys) - 1} more are" if len(keys) > 1 else " is"
            raise UserError(f"{where}: {keys[0]}{more} {what}: give a whole folder")


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the named files that are there; the target is made if there is one."""
    present = [name for name in names if (source / name).is_file()]
    if present:
        target.mkdir()
    for name in present:
        shutil.copyfile(source / name, target / name)


def plan_shards(shape: ModelShape, max_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Files of an export, each with its tensors and their shapes, in data-flow order and at most `max_bytes` each."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for slot in slots(shape):
        for name, tensor in hf_tensors(slot, shape).items():
            n = math.prod(tensor) * ITEMSIZES[shape.dtype]
            if files[-1] and size + n > max_bytes:
                files.append({})
                size = 0
            files[-1][name] = tensor
            size += n
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}
