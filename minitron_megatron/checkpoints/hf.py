"""Hugging Face folders in and out, streamed through the axis table one tensor at a time, shared out over the ranks.

    model.layers.3.self_attn.{q,k,v}_proj.weight  ──parts of one row──▶  chunk of decoder.layers.self_attention.linear_qkv.weight

Only safetensors are read: a .bin checkpoint is a pickle, and nothing loaded from disk may execute code.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open

from minitron_megatron.checkpoints import card
from minitron_megatron.checkpoints.folder import (
    SHAPE_FILE,
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    load_json,
    open_model_folder,
)
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.safetensors_stream import write_safetensors
from minitron_megatron.checkpoints.weights import BLOCK_BYTES, Chunk, verify_digest, write_weights
from minitron_megatron.config import ExportHfConfig, ImportHfConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, count_parameters, slots
from minitron_megatron.models.families import check_exportable, hf_config, shape_from_hf
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.tools import tool_job

log = logging.getLogger(__name__)

# What travels beside the weights: the source's own config (its keys that are no sizes) and its tokenizer.
HF_FILES = "huggingface"
GENERATION = "generation_config.json"
_CONFIG_FILES = ("config.json", GENERATION)
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

    def _index(self) -> dict[str, Path]:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
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
            with safe_open(file, "pt") as tensors:
                return list(tensors.keys())
        except (SafetensorError, OSError) as error:
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
            with safe_open(file, "pt") as tensors:
                for name in set(tensors.keys()) & set(wanted):
                    self._check_tensor(name, tensors.get_slice(name), wanted[name])

    def _check_tensor(self, name: str, there: Any, shape: tuple[int, ...]) -> None:
        dtype = {"F32": "float32", "BF16": "bfloat16"}.get(there.get_dtype(), there.get_dtype())
        if tuple(there.get_shape()) != shape:
            raise UserError(f"{self.path}: {name} is {tuple(there.get_shape())}, config.json makes it {shape}")
        if dtype != self.shape.dtype:
            raise UserError(f"{self.path}: {name} is {dtype}, config.json says {self.shape.dtype}: store one dtype")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
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


def fill_from_hf(source: HfFolder, chunk: Chunk, out: torch.Tensor) -> None:
    """Fill a checkpoint chunk from Hugging Face tensors: parts interleaved, vocabulary padded with zeros."""
    if "vocab" in chunk.slot.row.axes:
        out[max(0, source.shape.vocab_size - chunk.start) :] = 0
    for part, name in chunk.slot.hf_names().items():
        positions = part_positions(chunk.slot, source.shape, part)
        first, last = np.searchsorted(positions, (chunk.start, chunk.stop))
        if first < last:
            out[torch.from_numpy(positions[first:last] - chunk.start)] = source.read(name, int(first), int(last))


def import_hf(cfg: ImportHfConfig) -> None:
    """`launch/import_hf.py`: a Hugging Face folder into a model folder."""
    with tool_job():
        source = HfFolder(cfg.hf)
        source.check()
        shape = source.shape
        if cfg.dry_run:
            check_command_output(cfg, {})
            print_shape(f"{cfg.hf} would be imported", shape)
            return
        with command_output(cfg, {}) as out:
            if out.done:
                return
            began = time.monotonic()
            out.digest = write_weights(out.path / WEIGHTS, shape, partial(fill_from_hf, source), "import")
            if collectives.is_rank_zero():
                write_shape(out.path, shape)
                copy_files(source.path, out.path / HF_FILES, _CONFIG_FILES)
                copy_files(source.path, out.path / TOKENIZER, TOKENIZER_FILES)
            out.results = {"parameters": count_parameters(shape), "seconds": round(time.monotonic() - began, 2)}
        print_shape(f"{cfg.output}: imported from {cfg.hf}", shape, out.results)


def write_shape(folder: Path, shape: ModelShape) -> None:
    """Write model.yaml."""
    (folder / SHAPE_FILE).write_text(yaml.safe_dump(shape.to_dict(), sort_keys=False), encoding="utf-8")


def copy_companions(source: ModelFolder, target: Path) -> None:
    """Copy tokenizer and Hugging Face files from one model folder into another that is being written."""
    for name in (TOKENIZER, HF_FILES):
        if (source.path / name).is_dir():
            shutil.copytree(source.path / name, target / name)


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


class _Exporter:
    """Gives any Hugging Face tensor of a model folder as blocks of rows."""

    def __init__(self, folder: ModelFolder) -> None:
        self.shape = folder.shape
        self.reader = WeightReader(folder.weights)
        self.where = {name: (slot, part) for slot in slots(self.shape) for part, name in slot.hf_names().items()}

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a tensor, some at a time."""
        slot, part = self.where[name]
        positions = part_positions(slot, self.shape, part)
        row_bytes = torch.Size(slot.shape(self.shape)[1:]).numel() * getattr(torch, self.shape.dtype).itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, len(positions), step):
            rows = positions[start : start + step]
            first = int(rows[0])
            block = self.reader.read_slot(slot, self.shape, first, int(rows[-1]) + 1)
            yield block if len(block) == len(rows) else block[torch.from_numpy(rows - first)]


def plan_shards(shape: ModelShape, max_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Files of an export, each with its tensors and their shapes, in data-flow order and at most `max_bytes` each."""
    itemsize = getattr(torch, shape.dtype).itemsize
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for slot in slots(shape):
        for name, tensor in hf_tensors(slot, shape).items():
            n = torch.Size(tensor).numel() * itemsize
            if files[-1] and size + n > max_bytes:
                files.append({})
                size = 0
            files[-1][name] = tensor
            size += n
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def export_hf(cfg: ExportHfConfig) -> None:
    """`launch/export_hf.py`: a model folder into a Hugging Face folder that plain transformers loads."""
    with tool_job():
        folder = open_model_folder(cfg.model.folder("model"))
        check_weights(folder)
        shape = folder.shape
        check_exportable(shape, str(folder.path))
        files = plan_shards(shape, int(cfg.max_shard_gb * 1e9))
        if cfg.verify:
            verify_digest(folder)
        results = card.read_results(cfg.results, folder)
        inputs = {"model": folder.digest, **{f"results {one.path}": one.digest for one in results}}
        if cfg.dry_run:
            check_command_output(cfg, inputs)
            print_shape(f"{folder.path} would be exported into {len(files)} files", shape)
            return
        with command_output(cfg, inputs) as out:
            if out.done:
                return
            began = time.monotonic()
            _write_shards(out.path, folder, files)
            if collectives.is_rank_zero():
                _write_companions(out.path, folder, files)
                text = card.model_card(cfg, folder, results)
                (out.path / card.FILE).write_text(text, encoding="utf-8")
            out.results = {"parameters": count_parameters(shape), "seconds": round(time.monotonic() - began, 2)}
        print_shape(f"{cfg.output}: exported from {folder.path}", shape, {"files": len(files), **out.results})


def _write_shards(target: Path, folder: ModelFolder, files: dict[str, dict[str, tuple[int, ...]]]) -> None:
    exporter = _Exporter(folder)
    mine = [file for i, file in enumerate(files) if i % collectives.world_size() == collectives.rank()]
    itemsize = getattr(torch, folder.shape.dtype).itemsize
    total = sum(torch.Size(shape).numel() * itemsize for file in mine for shape in files[file].values())
    with progress("export", total, unit="B") as advance:
        for file in mine:
            write_safetensors(target / file, folder.shape.dtype, files[file], exporter.blocks, advance)


def _write_companions(target: Path, folder: ModelFolder, files: dict[str, dict[str, tuple[int, ...]]]) -> None:
    source = folder.path / HF_FILES
    own = load_json(source / "config.json") if (source / "config.json").is_file() else {}
    (target / "config.json").write_text(json.dumps(hf_config(folder.shape, own), indent=2) + "\n", encoding="utf-8")
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)
    else:
        values = _generation_config(own, folder)
        (target / GENERATION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if folder.tokenizer_path.is_dir():
        shutil.copytree(folder.tokenizer_path, target, dirs_exist_ok=True)
    if len(files) > 1:
        size = count_parameters(folder.shape) * getattr(torch, folder.shape.dtype).itemsize
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _generation_config(config: dict[str, Any], folder: ModelFolder) -> dict[str, Any]:
    """Where a source has none: the tokens that begin, end and pad a text, by its config, or else by its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: config.get(name) for name in names}
    if found["eos_token_id"] is None and folder.tokenizer_path.is_dir():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder.tokenizer_path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a tokenizer's files can be wrong in as many ways as transformers has loaders
            log.warning(
                "generation_config.json names no end of text: %s cannot be loaded (%s)", folder.tokenizer_path, error
            )
        else:
            found = {name: getattr(tokenizer, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
