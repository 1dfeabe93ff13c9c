"""What imports and exports of models check by their options and folders alone: before torch is there."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minitron_megatron.checkpoints import card
from minitron_megatron.checkpoints.folder import ModelFolder, load_json, open_model_folder
from minitron_megatron.checkpoints.hf_folder import HF_FILES, HfFolder, companion_stamps
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.config import (
    CommandConfig,
    ExportHfConfig,
    ExportMegatronConfig,
    ExportNemoConfig,
    ImportHfConfig,
    RandomModelConfig,
)
from minitron_megatron.models.families import FAMILIES, check_exportable, class_of_export
from minitron_megatron.models.megatron_lm import check_expressible
from minitron_megatron.models.nemo import check_nemo_class
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exporting:
    """A model folder that another program's form can express; `results` are evaluations for its card."""

    folder: ModelFolder
    inputs: dict[str, str]
    results: Sequence[card.Measured] = ()


def check_import_hf(cfg: ImportHfConfig) -> HfFolder:
    """The source, every tensor of it, and the output. Raises UserError."""
    source = HfFolder(cfg.hf, cfg.ignore_keys)
    source.check()
    check_command_output(cfg, source.stamps)
    return source


def check_export_hf(cfg: ExportHfConfig) -> Exporting:
    """Model, evaluations and output. Raises UserError."""
    checked = _check_export(cfg, check_exportable)
    check_companions(checked.folder)
    results = card.read_results(cfg.results, checked.folder)
    inputs = {**checked.inputs, **{f"results {one.path}": one.digest for one in results}}
    check_command_output(cfg, inputs)
    return Exporting(checked.folder, inputs, results)


def check_companions(folder: ModelFolder) -> None:
    """Raise UserError where Hugging Face's configs of a model folder cannot be read; say where its class is another one."""
    for file in (folder.path / HF_FILES).glob("*.json"):
        load_json(file)
    exported = class_of_export(folder.shape)
    if exported is not FAMILIES[folder.shape.family]:
        log.warning(
            "hidden_size=%d is not a multiple of num_attention_heads=%d, which transformers 5 refuses of a Llama: exported as "
            "%s, which computes the same",
            folder.shape.hidden_size,
            folder.shape.num_attention_heads,
            exported.architecture,
        )


def check_export_megatron(cfg: ExportMegatronConfig) -> Exporting:
    """Model and output. Raises UserError."""
    return _check_export(cfg, check_expressible)


def check_export_nemo(cfg: ExportNemoConfig) -> Exporting:
    """Model and output. Raises UserError."""
    return _check_export(cfg, check_nemo_class)


def _check_export(cfg: CommandConfig, expressible: Callable[[ModelShape, str], object]) -> Exporting:
    folder = open_model_folder(cfg.model.folder("model"))
    check_weights(folder)
    expressible(folder.shape, str(folder.path))
    if not folder.tokenizer_path.is_dir():
        log.warning(
            "%s has no tokenizer, so the export has none: copy the files of the one that its data were prepared with",
            folder.path,
        )
    inputs = {"model": folder.digest, **companion_stamps(folder)}
    # Other inputs of an export are added to these.
    check_command_output(cfg, inputs)
    return Exporting(folder, inputs)


def check_random_model(cfg: RandomModelConfig) -> ModelShape:
    """Sizes and output. Raises UserError."""
    shape = ModelShape.from_dict(cfg.model.sizes("model"), "model")
    check_command_output(cfg, {})
    return shape
