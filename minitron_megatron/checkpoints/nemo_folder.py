"""A NeMo checkpoint as a folder or an archive, looked into without torch: what model it is, and which tensors it has.

nemo.py reads and writes the weights.
"""

import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minitron_megatron.checkpoints.archive import Archive
from minitron_megatron.checkpoints.folder import WEIGHTS, load_yaml
from minitron_megatron.checkpoints.index import Stored, check_files, stored_tensors
from minitron_megatron.checkpoints.stamps import file_stamps, stamp_of_folder
from minitron_megatron.checkpoints.tokenizer import CLASS_FILE, TOKENIZER_FILES, tokenizer_files
from minitron_megatron.checkpoints.zarr_arrays import HEADER, ZarrArrays
from minitron_megatron.config import ImportNemoConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, slots
from minitron_megatron.models.nemo import Fields, fields_of_nemo1, fields_of_nemo2, shape_from_nemo
from minitron_megatron.outputs import check_command_output

if TYPE_CHECKING:
    import torch

    from minitron_megatron.checkpoints.weights import Chunk


CONTEXT, IO_FILE, MODEL_FILE, NEMO_TOKENIZER = "context", "io.json", "model.yaml", "nemo_tokenizer"
NEMO1_CONFIG, NEMO1_WEIGHTS = "model_config.yaml", "model_weights"
PREFIX = "module."
# NeMo 2's, NeMo 1's, and those of models that were wrapped once more.
_PREFIXES = (PREFIX, "model.", "module.module.", "model.module.", "")
# Real configs have some tens of KiB; indices of checkpoints some MiB.
_LARGEST_CONFIG, _LARGEST_INDEX = 4 * 2**20, 256 * 2**20
_BUFFERS = ("_extra_state", "rotary_pos_emb.inv_freq")


class _Tensors(Protocol):
    """What reads stored tensors: a torch_dist or a zarr folder."""

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> "torch.Tensor": ...


class NemoFolder:
    """A NeMo checkpoint as a folder: its shape, and any rows of any tensor.

    `where` is what errors call it; `vocab_size` the user's, if rows of the embedding from there on are padding; `ignored` are
    keys of its config that are not known, of which the user says that they change nothing. Raises UserError.
    """

    def __init__(self, path: Path, where: str, vocab_size: int | None = None, ignored: Collection[str] = ()) -> None:
        self.where = where
        inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
        # In what was given, or one folder down, as archives have it.
        fitting = [path] if _config_file(path, where) else [one for one in inside if _config_file(one, where)]
        self.root = only(fitting, where, "checkpoints")
        if self.root is None:
            raise UserError(
                f"{where} has neither {CONTEXT}/{MODEL_FILE} (NeMo 2) nor {NEMO1_CONFIG} (.nemo): give a whole NeMo checkpoint"
            )
        self.config, fields = _read_config(self.root, where, ignored)
        # Without the embedding yet: a config that is not supported is told before the weights are looked at.
        first = shape_from_nemo(fields, 1, "float32", None)
        self.weights, self.tensors = _stored(self.root, where)
        self.prefix, ((self.rows, *_), dtype) = self._embedding(next(slots(first)).key(first))
        self.shape = shape_from_nemo(fields, self.rows, dtype, vocab_size)

    def _embedding(self, key: str) -> tuple[str, Stored]:
        prefix = only([one for one in _PREFIXES if one + key in self.tensors], self.where, f"tensors that end in {key}")
        if prefix is not None:
            return prefix, self.tensors[prefix + key]
        raise UserError(
            f"{self.where}: its weights have no {PREFIX}{key}: it is not a checkpoint of Megatron-core's GPT model"
        )

    def _check_files(self, keys: Iterable[str]) -> None:
        if (self.weights / ".metadata").is_file():
            check_files(self.weights)
        else:
            arrays = ZarrArrays(self.weights)
            for key in sorted(keys):
                arrays.check_files(key)

    def check(self, *, whole: bool = True) -> None:
        """Every tensor of the table is there with its shape and one dtype, and nothing else is. Raises UserError.

        Where the folder is `whole`, and not what says what an archive is, the files of the weights are there too.
        """
        wanted = set()
        for slot in slots(self.shape):
            key, lead = self._place(slot)
            found = self.tensors.get(key)
            shape = (*((self.shape.num_layers,) if lead else ()), *self._shape(slot))
            if found is None:
                raise UserError(f"{self.where}: {key} is missing from its weights")
            if found[0] != shape:
                raise UserError(f"{self.where}: {key} is {found[0]}, its config makes it {shape}")
            if found[1] != self.shape.dtype:
                raise UserError(f"{self.where}: {key} is {found[1]}, others are {self.shape.dtype}: store one dtype")
            wanted.add(key)
        if whole:
            self._check_files(wanted)
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

    @cached_property
    def _reader(self) -> "_Tensors":
        from minitron_megatron.checkpoints.reading import WeightReader

        return WeightReader(self.weights) if (self.weights / ".metadata").is_file() else ZarrArrays(self.weights)

    def fill(self, chunk: "Chunk", out: "torch.Tensor") -> None:
        """Fill a checkpoint chunk; rows of the vocabulary's padding with zeros."""
        stop = min(chunk.stop, self.shape.vocab_size) if "vocab" in chunk.slot.row.axes else chunk.stop
        rows = max(0, stop - chunk.start)
        out[rows:] = 0
        if rows:
            (key, lead), rest = self._place(chunk.slot), chunk.shape[1:]
            offsets, sizes = (*lead, chunk.start, *(0 for _ in rest)), (*(1 for _ in lead), rows, *rest)
            out[:rows] = self._reader.read(key, offsets, sizes).view(rows, *rest)

    @cached_property
    def read_files(self) -> list[Path]:
        """Config and weights, as far as an import reads them."""
        config = _config_file(self.root, self.where)
        assert config is not None
        there = (file for file in self.weights.rglob("*") if file.is_file())
        return [config, *(file for file in there if _is_wanted(str(file.relative_to(self.weights))))]

    def tokenizer(self) -> Path | None:
        """The folder of its Hugging Face tokenizer, if it has one."""
        values = self.config.get("tokenizer")
        name = values.get("pretrained_model_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        folder = self.root / CONTEXT / name
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES) else None


def only[T: (Path, str)](fitting: Sequence[T], where: str, what: str) -> T | None:
    """The one that fits, or None. Raises UserError where several do: which is meant is the user's to say."""
    if len(fitting) > 1:
        names = ", ".join(repr(one) if isinstance(one, str) else one.name or "." for one in fitting[:5])
        more = f" and {len(fitting) - 5} more" if len(fitting) > 5 else ""
        raise UserError(f"{where} has {len(fitting)} {what} ({names}{more}): give one of them")
    return fitting[0] if fitting else None


def _config_file(folder: Path, where: str) -> Path | None:
    files = (folder / CONTEXT / MODEL_FILE, folder / NEMO1_CONFIG)
    return only([file for file in files if file.is_file()], where, f"configs in {folder.name or folder}")


def _read_config(root: Path, where: str, ignored: Collection[str]) -> tuple[dict[str, Any], Fields]:
    file = _config_file(root, where)
    assert file is not None
    if file.stat().st_size > _LARGEST_CONFIG:
        raise UserError(f"{where}: {file.name} has {file.stat().st_size} bytes: that is no model's config")
    config, name = load_yaml(file), f"{where}: {file.name}"
    return config, (fields_of_nemo1 if file.name == NEMO1_CONFIG else fields_of_nemo2)(config, name, ignored)


def _stored(root: Path, where: str) -> tuple[Path, dict[str, Stored]]:
    """Where a checkpoint's weights are, and what is stored. Raises UserError for forms that are not Megatron-core's."""
    # NeMo 2 wrote weights without a folder of their own at first.
    places = [root / name for name in (WEIGHTS, NEMO1_WEIGHTS, ".")]
    fitting = [one for one in places if (one / ".metadata").is_file() or next(one.glob(f"*/{HEADER}"), None)]
    folder = only(fitting, where, "folders of weights")
    if folder is not None and (folder / ".metadata").is_file():
        return folder, {key: found for key, found in stored_tensors(folder).items() if found is not None}
    if folder is not None:
        return folder, ZarrArrays(folder).tensors
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


@dataclass(frozen=True)
class Opened:
    """A checked NeMo checkpoint. `with opened.scratch:` around its use: there lies what says what an archive is."""

    source: NemoFolder
    archive: Archive | None
    scratch: tempfile.TemporaryDirectory
    inputs: dict[str, str]


def check_import_nemo(cfg: ImportNemoConfig) -> Opened:
    """The checkpoint, every tensor of it, its tokenizer and the output. Raises UserError."""
    path = Path(cfg.nemo)
    if not path.exists():
        raise UserError(f"nemo={path} does not exist: give a NeMo 2 checkpoint folder or a .nemo archive")
    if cfg.tokenizer is not None and not any((Path(cfg.tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"tokenizer={cfg.tokenizer} has none of {', '.join(TOKENIZER_FILES)}: give a Hugging Face tokenizer"
        )
    check_command_output(cfg, {})
    scratch = tempfile.TemporaryDirectory(prefix="nemo-")
    try:
        archive = _open_archive(path, Path(scratch.name)) if path.is_file() else None
        source = NemoFolder(Path(scratch.name) if archive else path, str(path), cfg.vocab_size, cfg.ignore_keys)
        source.check(whole=archive is None)
        inputs = _stamps(cfg, path, source)
        check_command_output(cfg, inputs)
    except BaseException:
        scratch.cleanup()
        raise
    return Opened(source, archive, scratch, inputs)


def _stamps(cfg: ImportNemoConfig, path: Path, source: NemoFolder) -> dict[str, str]:
    """Stamps of what an import reads, as inputs: the archive, or config and weights; and the tokenizer."""
    stamps: dict[str, str] = {}
    if path.is_file():
        stamps |= file_stamps(path.parent, [path])
    else:
        config, *weights = source.read_files
        stamps |= file_stamps(path, [config])
        stamps |= stamp_of_folder("weights", source.weights, weights)
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer is not None else None if path.is_file() else source.tokenizer()
    if tokenizer is not None:
        stamps |= file_stamps(tokenizer, [*tokenizer_files(tokenizer), tokenizer / CLASS_FILE])
    return stamps
