"""Hugging Face folders in and out, streamed through the axis table one tensor at a time, shared out over the ranks.

    model.layers.3.self_attn.{q,k,v}_proj.weight  ──parts of one row──▶  chunk of decoder.layers.self_attention.linear_qkv.weight

Only safetensors are read: a .bin checkpoint is a pickle, and nothing loaded from disk may execute code.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_megatron.checkpoints import card
from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.export_checks import Exporting, check_export_hf, check_import_hf
from minitron_megatron.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    load_json,
)
from minitron_megatron.checkpoints.hf_folder import (
    CONFIG_FILES,
    GENERATION,
    HF_FILES,
    HfFolder,
    copy_files,
    part_positions,
    plan_shards,
    print_shape,
    said_of_tokenizer,
    write_shape,
)
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.safetensors_stream import write_safetensors
from minitron_megatron.checkpoints.tokenizer import carry_tokenizer, export_tokenizer, read_tokenizer
from minitron_megatron.checkpoints.weights import BLOCK_BYTES, Chunk, verify_digest, write_weights
from minitron_megatron.config import ExportHfConfig, ImportHfConfig
from minitron_megatron.console import progress
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, slots
from minitron_megatron.models.families import hf_config
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero
from minitron_megatron.parallel.tools import tool_job

log = logging.getLogger(__name__)


def fill_from_hf(source: HfFolder, chunk: Chunk, out: torch.Tensor) -> None:
    """Fill a checkpoint chunk from Hugging Face tensors: parts interleaved, vocabulary padded with zeros."""
    if "vocab" in chunk.slot.row.axes:
        out[max(0, source.shape.vocab_size - chunk.start) :] = 0
    for part, name in chunk.slot.hf_names().items():
        positions = part_positions(chunk.slot, source.shape, part)
        first, last = np.searchsorted(positions, (chunk.start, chunk.stop))
        if first < last:
            out[torch.from_numpy(positions[first:last] - chunk.start)] = source.read(name, int(first), int(last))


def import_hf(cfg: ImportHfConfig, source: HfFolder | None = None) -> None:
    """`launch/import_hf.py`: a Hugging Face folder into a model folder."""
    with tool_job():
        source = source or check_import_hf(cfg)
        shape = source.shape
        if cfg.dry_run:
            print_shape(f"{cfg.hf} would be imported", shape, said_of_tokenizer(source.path))
            return
        check_copies(files=sorted(set(source.files.values())))
        with command_output(cfg, source.stamps) as out:
            if out.done:
                return
            began = time.monotonic()
            ask_rank_zero(lambda: carry_tokenizer(source.path, out.path / TOKENIZER))
            out.digest = write_weights(out.path / WEIGHTS, shape, partial(fill_from_hf, source), "import")
            if collectives.is_rank_zero():
                write_shape(out.path, shape)
                copy_files(source.path, out.path / HF_FILES, CONFIG_FILES)
                source.say_others()
            out.results = {"parameters": count_parameters(shape), "seconds": round(time.monotonic() - began, 2)}
        results = {**out.results, **said_of_tokenizer(source.path)}
        print_shape(f"{cfg.output}: imported from {cfg.hf}", shape, results)


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


def export_hf(cfg: ExportHfConfig, checked: Exporting | None = None) -> None:
    """`launch/export_hf.py`: a model folder into a Hugging Face folder that plain transformers loads."""
    with tool_job():
        checked = checked or check_export_hf(cfg)
        folder, results, inputs = checked.folder, checked.results, checked.inputs
        shape = folder.shape
        files = plan_shards(shape, int(cfg.max_shard_gb * 1e9))
        check_copies(folder.path)
        if cfg.verify:
            verify_digest(folder)
        if cfg.dry_run:
            with tempfile.TemporaryDirectory() as scratch:
                ask_rank_zero(lambda: _write_companions(Path(scratch), folder, files))
            print_shape(f"{folder.path} would be exported into {len(files)} files", shape)
            return
        with command_output(cfg, inputs) as out:
            if out.done:
                return
            began = time.monotonic()
            ask_rank_zero(lambda: _write_companions(out.path, folder, files))
            _write_shards(out.path, folder, files)
            if collectives.is_rank_zero():
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
        export_tokenizer(folder.tokenizer_path, target, folder.shape.vocab_size)
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
        try:
            tokenizer = read_tokenizer(folder.tokenizer_path, folder.shape.vocab_size)
        except UserError as error:
            log.warning("generation_config.json names no end of text: %s", error)
        else:
            found = {name: getattr(tokenizer, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
