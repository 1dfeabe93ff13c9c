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
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from minitron_megatron.checkpoints.archive import Archive
from minitron_megatron.checkpoints.exporting import export_for
from minitron_megatron.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    check_space,
    load_yaml,
)
from minitron_megatron.checkpoints.hf import TOKENIZER_FILES, copy_files, print_shape, write_shape
from minitron_megatron.checkpoints.index import total_bytes
from minitron_megatron.checkpoints.megatron_lm import COMMON_FILE, CONTENT, no_extra_state
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import COMMON_STATE, Chunk, chunks, write_weights
from minitron_megatron.checkpoints.zarr_arrays import HEADER, ZarrArrays
from minitron_megatron.config import ExportNemoConfig, ImportNemoConfig
from minitron_megatron.console import progress
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, count_parameters, slots
from minitron_megatron.models.nemo import (
    Fields,
    check_nemo_class,
    fields_of_nemo1,
    fields_of_nemo2,
    io_json,
    model_yaml,
    shape_from_nemo,
    torch_name,
)
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.tools import tool_job

log = logging.getLogger(__name__)

CONTEXT, IO_FILE, MODEL_FILE, NEMO_TOKENIZER = "context", "io.json", "model.yaml", "nemo_tokenizer"
NEMO1_CONFIG, NEMO1_WEIGHTS = "model_config.yaml", "model_weights"
PREFIX = "module."
# NeMo 2's, NeMo 1's, and those of models that were wrapped once more.
_PREFIXES = (PREFIX, "model.", "module.module.", "model.module.", "")
_UNPACKED = ".unpacked"
# Real configs have some tens of KiB; indices of checkpoints some MiB.
_LARGEST_CONFIG, _LARGEST_INDEX = 4 * 2**20, 256 * 2**20
_BUFFERS = ("_extra_state", "rotary_pos_emb.inv_freq")


class _Tensors(Protocol):
    """What reads stored tensors: a torch_dist or a zarr folder."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor: ...


class NemoFolder:
    """A NeMo checkpoint as a folder: its shape, and any rows of any tensor.

    `where` is what errors call it; `vocab_size` the user's, if rows of the embedding from there on are padding.
    """

    def __init__(self, path: Path, where: str, vocab_size: int | None = None) -> None:
        self.where = where
        inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
        self.root = next((folder for folder in (path, *inside) if _config_file(folder)), None)
        if self.root is None:
            raise UserError(
                f"{where} has neither {CONTEXT}/{MODEL_FILE} (NeMo 2) nor {NEMO1_CONFIG} (.nemo): give a whole NeMo checkpoint"
            )
        self.config, fields = _read_config(self.root, where)
        # Without the embedding yet: a config that is not supported is told before the weights are looked at.
        first = shape_from_nemo(fields, 1, "float32", None)
        self.stored = _stored(self.root, where)
        self.tensors = dict(self.stored.tensors)
        self.prefix, ((self.rows, *_), dtype) = self._embedding(next(slots(first)).key(first))
        self.shape = shape_from_nemo(fields, self.rows, torch_name(dtype), vocab_size)

    def _embedding(self, key: str) -> tuple[str, tuple[tuple[int, ...], torch.dtype]]:
        for prefix in _PREFIXES:
            if prefix + key in self.tensors:
                return prefix, self.tensors[prefix + key]
        raise UserError(
            f"{self.where}: its weights have no {PREFIX}{key}: it is not a checkpoint of Megatron-core's GPT model"
        )

    def check(self) -> None:
        """Every tensor of the table is there with its shape and one dtype, and nothing else is. Raises UserError."""
        wanted = set()
        for slot in slots(self.shape):
            key, lead = self._place(slot)
            found = self.tensors.get(key)
            shape = (*((self.shape.num_layers,) if lead else ()), *self._shape(slot))
            if found is None:
                raise UserError(f"{self.where}: {key} is missing from its weights")
            if found[0] != shape:
                raise UserError(f"{self.where}: {key} is {found[0]}, its config makes it {shape}")
            if torch_name(found[1]) != self.shape.dtype:
                raise UserError(
                    f"{self.where}: {key} is {torch_name(found[1])}, others are {self.shape.dtype}: store one dtype"
                )
            wanted.add(key)
        # A tied model's last stage may have stored its copy, and without a prefix optimizer states lie beside the weights.
        spare = {self.prefix + str(slot.row.tied_path) for slot in slots(self.shape) if slot.row.tied_path}
        for key in sorted(set(self.tensors) - wanted - spare):
            if key.startswith(self.prefix) and not key.startswith("optimizer") and not key.endswith(_BUFFERS):
                raise UserError(f"{self.where}: {key} is not a tensor of {self.shape.family}")

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        """Shape as stored: the vocabulary with NeMo's padding, not ours."""
        shape = slot.shape(self.shape)
        return (self.rows, *shape[1:]) if "vocab" in slot.row.axes else shape

    def _place(self, slot: Slot) -> tuple[str, tuple[int, ...]]:
        """Key of a slot's tensor and its offset along stacked layers, which NeMo keeps apart where it was told to."""
        key = self.prefix + slot.key(self.shape)
        return (key, slot.lead(self.shape)) if key in self.tensors else (self.prefix + slot.numbered_key(), ())

    def fill(self, chunk: Chunk, out: torch.Tensor) -> None:
        """Fill a checkpoint chunk; rows of the vocabulary's padding with zeros."""
        stop = min(chunk.stop, self.shape.vocab_size) if "vocab" in chunk.slot.row.axes else chunk.stop
        rows = max(0, stop - chunk.start)
        out[rows:] = 0
        if rows:
            (key, lead), rest = self._place(chunk.slot), chunk.shape[1:]
            offsets, sizes = (*lead, chunk.start, *(0 for _ in rest)), (*(1 for _ in lead), rows, *rest)
            out[:rows] = self.stored.read(key, offsets, sizes).view(rows, *rest)

    def tokenizer(self) -> Path | None:
        """The folder of its Hugging Face tokenizer, if it has one."""
        values = self.config.get("tokenizer")
        name = values.get("pretrained_model_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        folder = self.root / CONTEXT / name
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES) else None


def _config_file(folder: Path) -> Path | None:
    files = (folder / CONTEXT / MODEL_FILE, folder / NEMO1_CONFIG)
    return next((file for file in files if file.is_file()), None)


def _read_config(root: Path, where: str) -> tuple[dict[str, Any], Fields]:
    file = _config_file(root)
    assert file is not None
    if file.stat().st_size > _LARGEST_CONFIG:
        raise UserError(f"{where}: {file.name} has {file.stat().st_size} bytes: that is no model's config")
    config, name = load_yaml(file), f"{where}: {file.name}"
    return config, (fields_of_nemo1 if file.name == NEMO1_CONFIG else fields_of_nemo2)(config, name)


def _stored(root: Path, where: str) -> _Tensors:
    """The reader of a checkpoint's weights. Raises UserError for forms that are none of Megatron-core's distributed ones."""
    # NeMo 2 wrote weights without a folder of their own at first.
    places = [root / name for name in (WEIGHTS, NEMO1_WEIGHTS, ".")]
    for folder in places:
        if (folder / ".metadata").is_file():
            return WeightReader(folder)
        if folder.is_dir() and next(folder.glob(f"*/{HEADER}"), None):
            return ZarrArrays(folder)
    if next(root.rglob("*.ckpt"), None):
        raise UserError(
            f"{where}: its weights are pickles of tensor-parallel ranks (model_weights.ckpt), older than distributed "
            "checkpoints: save it as one with NeMo 1 (model.dist_ckpt_format=torch_dist), or take its Hugging Face version"
        )
    raise UserError(f"{where} has no weights as torch_dist or zarr: give a whole NeMo checkpoint")


def _is_index(name: str) -> bool:
    """What says everything of an archive but the weights themselves; of pickles by rank, that they are there."""
    return Path(name).name in (NEMO1_CONFIG, MODEL_FILE, ".metadata", HEADER)


def _is_wanted(name: str) -> bool:
    """What an import reads: no optimizer states, where they are files of their own."""
    return not any(part.startswith("optimizer") for part in Path(name).parts)


def _open_archive(path: Path, scratch: Path) -> Archive:
    """Judge an archive, and unpack what says what it is into `scratch`. Raises UserError."""
    archive = Archive(path)
    if archive.need(_is_index) > _LARGEST_INDEX:
        raise UserError(
            f"{path}: its configs and indices take more than {_LARGEST_INDEX // 2**20} MiB: that is no model"
        )
    archive.extract(scratch, _is_index)
    for name in archive.sizes:
        if name.endswith(".ckpt"):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).touch()
    return archive


def import_nemo(cfg: ImportNemoConfig) -> None:
    """`launch/import_nemo.py`: a NeMo checkpoint into a model folder."""
    path = Path(cfg.nemo)
    if not path.exists():
        raise UserError(f"nemo={path} does not exist: give a NeMo 2 checkpoint folder or a .nemo archive")
    if cfg.tokenizer is not None and not any((Path(cfg.tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"tokenizer={cfg.tokenizer} has none of {', '.join(TOKENIZER_FILES)}: give a Hugging Face tokenizer"
        )
    with tool_job(), tempfile.TemporaryDirectory(prefix="nemo-") as scratch:
        archive = _open_archive(path, Path(scratch)) if path.is_file() else None
        source = NemoFolder(Path(scratch) if archive else path, str(path), cfg.vocab_size)
        source.check()
        check_command_output(cfg, {})
        if cfg.dry_run:
            print_shape(f"{path} would be imported", source.shape)
            return
        with command_output(cfg, {}) as out:
            if out.done:
                return
            began = time.monotonic()
            if archive:
                source = _unpack(archive, out.path, source, cfg.vocab_size)
            out.digest = write_weights(out.path / WEIGHTS, source.shape, source.fill, "import")
            if collectives.is_rank_zero():
                write_shape(out.path, source.shape)
                _copy_tokenizer(cfg, source, out.path / TOKENIZER)
                shutil.rmtree(out.path / _UNPACKED, ignore_errors=True)
            seconds = round(time.monotonic() - began, 2)
            out.results = {"parameters": count_parameters(source.shape), "seconds": seconds}
        print_shape(f"{cfg.output}: imported from {path}", source.shape, out.results)


def _unpack(archive: Archive, output: Path, index: NemoFolder, vocab_size: int | None) -> NemoFolder:
    """Unpack an archive beside the weights that are made of it, for as long as they are; rank 0 does, every rank reads."""
    need = archive.need(_is_wanted)
    what = f"{archive.path} unpacked and imported"
    check_space(output, need + total_bytes(index.shape), what, why="what was unpacked goes at the end")
    target = output / _UNPACKED
    if collectives.is_rank_zero():
        target.mkdir()
        with progress("unpack", need, unit="B") as advance:
            archive.extract(target, _is_wanted, advance)
    collectives.barrier()
    return NemoFolder(target, str(archive.path), vocab_size)


def _copy_tokenizer(cfg: ImportNemoConfig, source: NemoFolder, target: Path) -> None:
    folder = Path(cfg.tokenizer) if cfg.tokenizer is not None else source.tokenizer()
    if folder is None:
        log.warning("%s has no Hugging Face tokenizer: give one with tokenizer= to use the model on text", cfg.nemo)
        return
    copy_files(folder, target, TOKENIZER_FILES)


def export_nemo(cfg: ExportNemoConfig) -> None:
    """`launch/export_nemo.py`: a model folder into a NeMo 2 checkpoint folder."""
    export_for("NeMo 2", cfg, check_nemo_class, _write_checkpoint)


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
