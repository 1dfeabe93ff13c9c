"""The models to measure: folders of ours or of Hugging Face, and the form that each engine reads, made on the way if need be."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.checkpoints.folder import MANIFEST, check_space, open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.index import check_weights, total_bytes
from minitron_megatron.config import ExportHfConfig, ImportHfConfig, ModelConfig, ThroughputConfig
from minitron_megatron.data.tokenizer import check_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.models.families import FAMILIES, check_exportable, class_of_export
from minitron_megatron.models.limits import check_layout
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout

# Engines that read a model folder; the others read Hugging Face's.
OURS = frozenset({"megatron"})
# In the output, while it is made: models in the other form.
MADE = "converted"
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A model to measure."""

    name: str
    path: Path
    shape: ModelShape
    digest: str
    ours: bool

    def fits(self, engine: str) -> bool:
        """Whether an engine reads the folder as it is."""
        return self.ours == (engine in OURS)

    def form(self, engine: str, made: Path) -> Path:
        """The folder that an engine reads; where the model is in the other form, a place under `made` for it."""
        return self.path if self.fits(engine) else made / MADE / self.name

    def prepare(self, engine: str, made: Path) -> None:
        """Make the form that an engine reads, unless it is there."""
        if self.fits(engine):
            return
        # Torch's, which a look at the models does without.
        from minitron_megatron.checkpoints.hf import export_hf, import_hf

        output = str(self.form(engine, made))
        if self.ours:
            export_hf(ExportHfConfig(model=ModelConfig(path=str(self.path)), output=output))
        else:
            import_hf(ImportHfConfig(hf=str(self.path), output=output))

    def clear(self, made: Path) -> None:
        """Remove what `prepare` made."""
        shutil.rmtree(made / MADE / self.name, ignore_errors=True)
        if (made / MADE).is_dir() and not any((made / MADE).iterdir()):
            (made / MADE).rmdir()


def open_sources(models: object) -> list[Source]:
    """Open `models={name: folder, …}`. Raises UserError."""
    if not isinstance(models, Mapping) or not models:
        raise UserError(
            "models= is missing: give {name: folder, …}, as models={teacher: outputs/llama, width: outputs/4b}"
        )
    for name, path in models.items():
        if not _NAME.fullmatch(str(name)) or not isinstance(path, str):
            raise UserError(f"models.{name}={path}: give a name of letters and digits, and a folder")
    return [_open(str(name), Path(path)) for name, path in models.items()]


def _open(name: str, path: Path) -> Source:
    if not (path / "config.json").is_file():
        folder = open_model_folder(path)
        check_weights(folder)
        return Source(name, folder.path, folder.shape, folder.digest, ours=True)
    folder = HfFolder(path)
    folder.check()
    digest = read_manifest(path)["digest"] if (path / MANIFEST).is_file() else json.dumps(folder.stamps)
    return Source(name, path, folder.shape, digest, ours=False)


def check_sources(cfg: ThroughputConfig, sources: Sequence[Source], layout: Layout) -> None:
    """Raise UserError where a model cannot be measured as it is asked for."""
    length = cfg.input_length + cfg.output_length
    for source in sources:
        shape, where = source.shape, f"models.{source.name}={source.path}"
        if length > shape.max_position_embeddings:
            raise UserError(
                f"input_length + output_length = {length} is above the {shape.max_position_embeddings} positions of {where}: "
                f"use input_length={max(1, shape.max_position_embeddings - cfg.output_length)}"
            )
        if "megatron" in cfg.engine:
            check_layout(shape, layout, where)
        if not set(cfg.engine) <= OURS:
            check_exportable(shape, where)
            # A folder of ours is exported as a class that takes it.
            if not source.ours and class_of_export(shape) is not FAMILIES[shape.family]:
                raise UserError(
                    f"{where}: hidden_size={shape.hidden_size} is not a multiple of num_attention_heads="
                    f"{shape.num_attention_heads}, which transformers 5 refuses of a Llama: engine=[megatron] alone"
                )
        if "tensorrt_llm" in cfg.engine:
            check_tokenizer(source.path)


def check_room(cfg: ThroughputConfig, sources: Sequence[Source]) -> None:
    """Raise UserError where the disk has no room for a form that is made on the way: one model's at a time."""
    need = max(
        (total_bytes(source.shape) for source in sources if not all(map(source.fits, cfg.engine))),
        default=0,
    )
    check_space(Path(cfg.output), need, "a model in the form of another engine")
