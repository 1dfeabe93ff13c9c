"""What launch/importance.py checks by its options and folders alone: before torch is there."""

from typing import Any

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.config import ImportanceConfig
from minitron_megatron.data.folder import Data, open_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.outputs import check_command_output
from minitron_megatron.over_data import OverData
from minitron_megatron.parallel.layout import Layout


def check_calibration(cfg: ImportanceConfig, data: Data) -> None:
    """Raise UserError where a sequence cannot be split, or there are too few samples for what is asked."""
    check_sequence(cfg.data.sequence_length, Layout.from_config(cfg.parallel))
    last, length = cfg.first_sample + cfg.samples, cfg.data.sequence_length
    if data.tokens("train") < last * length:
        first = f"first_sample={cfg.first_sample} and " if cfg.first_sample else ""
        room = data.tokens("train") // length - cfg.first_sample
        fits = (
            f"use samples={room}" if room > 0 else f"lower {'first_sample= or ' if first else ''}data.sequence_length="
        )
        raise UserError(
            f"{first}samples={cfg.samples} of {length} tokens are more than the train split's {data.tokens('train'):,}: "
            f"{fits}, or prepare more text"
        )
    if cfg.importance.batch == "variance" and cfg.samples < 2:
        raise UserError("importance.batch=variance needs samples= of at least 2: one sample has no variance")


def aggregation(cfg: ImportanceConfig, head_dim: int) -> dict[str, Any]:
    """How activations become scores: what runs must share for their statistics to be added up."""
    options = cfg.importance
    return {
        "sequence_length": cfg.data.sequence_length,
        "sequence_aggregation": options.sequence,
        "batch_aggregation": options.batch,
        "heads": options.heads,
        "head_dim": head_dim,
    }


def check_importance(cfg: ImportanceConfig) -> OverData:
    """Model, layout, data and output. Raises UserError."""
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    check_layout(folder.shape, layout)
    check_weights(folder)
    data = open_data(cfg.data.path, "train", folder.shape, cfg.data.sequence_length)
    check_same_tokenizer(data, {"model": folder.path})
    check_calibration(cfg, data)
    inputs = {"model": folder.digest, "data": data.digest}
    check_command_output(cfg, inputs)
    return OverData(layout, folder, data, inputs)
