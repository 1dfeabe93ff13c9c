"""Hugging Face folders, looked into and described without torch: which tensors there are, and what lies beside them.

hf.py reads and writes the weights.
"""

import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import SHAPE_FILE, TOKENIZER, ModelFolder, load_json
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.console import print_table
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, count_parameters, slots
from minitron_megatron.models.families import shape_from_hf
from minitron_megatron.models.limits import ITEMSIZES
from minitron_megatron.models.shape import ModelShape

if TYPE_CHECKING:
    import torch

# What travels beside the weights: the source's own config (its keys that are no sizes) and its tokenizer.
HF_FILES = "huggingface"


GENERATION, INDEX = "generation_config.json", "model.safetensors.index.json"


CONFIG_FILES = ("config.json", GENERATION)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class HfFolder:
    """A Hugging Face folder with safetensors weights: its shape, and any rows of any tensor."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"hf={self.path} does not exist or is not a folder: give a Hugging Face model folder")
        self.config = load_json(self.path / "config.json")
        self.shape = shape_from_hf(self.config, str(self.path / "config.json"))
        self.files = self._index()

    @cached_property
    def stamps(self) -> dict[str, str]:
        """Stamps of every file that an import reads, as inputs of a manifest."""
        beside = (*CONFIG_FILES, *TOKENIZER_FILES, INDEX)
        return file_stamps(self.path, [*set(self.files.values()), *(self.path / name for name in beside)])

    def _index(self) -> dict[str, Path]:
        index, single = self.path / INDEX, self.path / "model.safetensors"
        if index.is_file():
            names = load_json(index).get("weight_map", {})
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{index} is damaged: weight_map does not name files")
            files = {name: self.path / file for name, file in names.items()}
        elif single.is_file():
            files = dict.fromkeys(self._names(single), single)
        else:
            hint = " (.bin files can execute code: convert them)" if list(self.path.glob("*.bin")) else ""
            raise UserError(f"{self.path} has no model.safetensors or its index{hint}")
        missing = sorted({str(file) for file in files.values() if not file.is_file()})
        if missing:
            raise UserError(f"{missing[0]} is missing: the index of {self.path} names it")
        return files

    def _names(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "numpy") as tensors:
                return list(tensors.keys())
        except (SafetensorError, OSError) as error:
            pass_on_unless_damage(error)
            raise UserError(f"{file} is damaged ({error}): download it again") from None

    def check(self) -> None:
        """Every tensor of the table is there with its shape and one dtype, and nothing else is. Raises UserError."""
        wanted = {name: shape for slot in slots(self.shape) for name, shape in hf_tensors(slot, self.shape).items()}
        spare = {"lm_head.weight"} if self.shape.tied_embeddings else set()
        unknown = sorted(n for n in set(self.files) - set(wanted) - spare if not n.endswith("rotary_emb.inv_freq"))
        missing = sorted(set(wanted) - set(self.files))
        if missing or unknown:
            what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a tensor of {self.shape.family}"
            raise UserError(f"{self.path}: {what} ({len(missing)} missing, {len(unknown)} unknown)")
        for file in sorted(set(self.files.values())):
            self._names(file)
            with safe_open(file, "numpy") as tensors:
                for name in set(tensors.keys()) & set(wanted):
                    self._check_tensor(name, tensors.get_slice(name), wanted[name])

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


def copy_companions(source: ModelFolder, target: Path) -> None:
    """Copy tokenizer and Hugging Face files from one model folder into another that is being written."""
    for name in (TOKENIZER, HF_FILES):
        if (source.path / name).is_dir():
            shutil.copytree(source.path / name, target / name)


def companion_stamps(folder: ModelFolder) -> dict[str, str]:
    """Stamps of what lies beside a model's weights and goes where they go, as inputs: its digest is that of the weights alone."""
    return file_stamps(folder.path, [file for name in (TOKENIZER, HF_FILES) for file in (folder.path / name).glob("*")])


def print_shape(title: str, shape: ModelShape, results: dict[str, Any] | None = None) -> None:
    """Print a model's sizes and a command's results."""
    sizes = {k: v for k, v in shape.to_dict().items() if v is not None}
    sizes["rope_scaling"] = "llama3" if shape.rope_scaling else "none"
    rows = list({**sizes, "parameters": count_parameters(shape), **(results or {})}.items())
    print_table(title, ["", "value"], rows)


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
