"""NeMo checkpoints in and out, through the axis table, a chunk at a time.

    NeMo 2, a folder                                      NeMo 1, a .nemo archive (tar) or what was in it
    weights/         torch_dist (or zarr), module.…       model_weights/      torch_dist or zarr, model.…
    context/         io.json, model.yaml, tokenizer       model_config.yaml

The keys are those of our own weights with a prefix. What NeMo's loader would execute (io.json, common.pt, extra state) stays
unread.
"""

import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from minitron_megatron.checkpoints.archive import Archive
from minitron_megatron.checkpoints.copies import check_copies, some_of
from minitron_megatron.checkpoints.export_checks import Exporting, check_export_nemo
from minitron_megatron.checkpoints.exporting import export_for
from minitron_megatron.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    check_space,
)
from minitron_megatron.checkpoints.hf_folder import print_shape, write_shape
from minitron_megatron.checkpoints.index import total_bytes
from minitron_megatron.checkpoints.megatron_lm import COMMON_FILE, CONTENT, no_extra_state
from minitron_megatron.checkpoints.nemo_folder import (
    CONTEXT,
    IO_FILE,
    MODEL_FILE,
    NEMO_TOKENIZER,
    PREFIX,
    NemoFolder,
    Opened,
    _is_wanted,
    check_import_nemo,
)
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.tokenizer import carry_tokenizer
from minitron_megatron.checkpoints.weights import COMMON_STATE, Chunk, chunks, write_weights
from minitron_megatron.config import ExportNemoConfig, ImportNemoConfig
from minitron_megatron.console import progress
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.nemo import (
    io_json,
    model_yaml,
)
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero, wait_until_seen
from minitron_megatron.parallel.tools import tool_job

log = logging.getLogger(__name__)

_UNPACKED = ".unpacked"


def import_nemo(cfg: ImportNemoConfig, checked: Opened | None = None) -> None:
    """`launch/import_nemo.py`: a NeMo checkpoint into a model folder."""
    path, checked = Path(cfg.nemo), checked or check_import_nemo(cfg)
    source, archive = checked.source, checked.archive
    with tool_job(), checked.scratch:
        if cfg.dry_run:
            print_shape(f"{path} would be imported", source.shape)
            return
        check_copies(files=[path] if archive else some_of(sorted(source.read_files)))
        with command_output(cfg, checked.inputs) as out:
            if out.done:
                return
            began = time.monotonic()
            if archive:
                source = _unpack(archive, out.path, source, cfg)
            ask_rank_zero(lambda: _carry_tokenizer(cfg, source, out.path / TOKENIZER))
            out.digest = write_weights(out.path / WEIGHTS, source.shape, source.fill, "import")
            if collectives.is_rank_zero():
                write_shape(out.path, source.shape)
                shutil.rmtree(out.path / _UNPACKED, ignore_errors=True)
            seconds = round(time.monotonic() - began, 2)
            out.results = {"parameters": count_parameters(source.shape), "seconds": seconds}
        print_shape(f"{cfg.output}: imported from {path}", source.shape, out.results)


def _unpack(archive: Archive, output: Path, index: NemoFolder, cfg: ImportNemoConfig) -> NemoFolder:
    """Unpack an archive beside the weights that are made of it, for as long as they are; rank 0 does, every rank reads."""
    need = archive.need(_is_wanted)
    what = f"{archive.path} unpacked and imported"
    target = output / _UNPACKED

    def unpack() -> list[Path]:
        check_space(output, need + total_bytes(index.shape), what, why="what was unpacked goes at the end")
        target.mkdir()
        held = sum(size for name, size in archive.sizes.items() if _is_wanted(name))
        with progress("unpack", held, unit="B") as advance:
            archive.extract(target, _is_wanted, advance)
        # The folders of tensors; files of a zarr checkpoint can be a hundred thousand.
        return [*target.glob("*"), *target.glob("*/*")]

    wait_until_seen(*ask_rank_zero(unpack))
    return NemoFolder(target, str(archive.path), cfg.vocab_size, cfg.ignore_keys)


def _carry_tokenizer(cfg: ImportNemoConfig, source: NemoFolder, target: Path) -> None:
    folder = Path(cfg.tokenizer) if cfg.tokenizer is not None else source.tokenizer()
    if folder is None:
        log.warning("%s has no Hugging Face tokenizer: give one with tokenizer= to use the model on text", cfg.nemo)
        return
    carry_tokenizer(folder, target)


def export_nemo(cfg: ExportNemoConfig, checked: Exporting | None = None) -> None:
    """`launch/export_nemo.py`: a model folder into a NeMo 2 checkpoint folder."""
    export_for("NeMo 2", cfg, checked or check_export_nemo(cfg), _write_checkpoint)


def _write_checkpoint(target: Path, folder: ModelFolder) -> None:
    _write_weights(target / WEIGHTS, folder)
    if collectives.is_rank_zero():
        _write_context(target / CONTEXT, folder)


def _write_weights(target: Path, folder: ModelFolder) -> None:
    """The weights with NeMo's keys, the vocabulary without padding; each rank its share of the chunks."""
    fill = partial(_fill, WeightReader(folder.weights), folder.shape)
    # Weights alone: nothing of a run that goes on.
    common = {"epoch": 0, "global_step": 0, "content_metadata": CONTENT}
    objects: dict[str, Any] = {}
    if collectives.is_rank_zero():
        objects = {COMMON_STATE: common, **no_extra_state(folder.shape, PREFIX)}
    write_weights(target, folder.shape, fill, "export", objects, list(chunks(folder.shape, PREFIX, padded=False)))
    if collectives.is_rank_zero():
        torch.save(common, target / COMMON_FILE)


def _fill(reader: WeightReader, shape: ModelShape, chunk: Chunk, out: torch.Tensor) -> None:
    reader.read_into(out, chunk.slot, shape, chunk.start)


def _write_context(target: Path, folder: ModelFolder) -> None:
    tokenizer = NEMO_TOKENIZER if folder.tokenizer_path.is_dir() else None
    target.mkdir()
    described = (folder.shape, str(folder.path), tokenizer)
    (target / IO_FILE).write_text(json.dumps(io_json(*described)), encoding="utf-8")
    (target / MODEL_FILE).write_text(yaml.safe_dump(model_yaml(*described)), encoding="utf-8")
    if tokenizer:
        shutil.copytree(folder.tokenizer_path, target / tokenizer)
