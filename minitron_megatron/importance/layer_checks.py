"""What launch/layers.py checks by its options and folders alone: before torch is there."""

from dataclasses import dataclass

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.task_stamps import task_stamps
from minitron_megatron.config import LayersConfig
from minitron_megatron.data.folder import open_data
from minitron_megatron.data.questions import QuestionFile
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.tokenizer import check_tokenizer, tokenizer_stamps
from minitron_megatron.data.windows import WindowPlan, taken
from minitron_megatron.importance.blocks import Block, contiguous_blocks
from minitron_megatron.importance.layers import check_blocks
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.outputs import check_command_output
from minitron_megatron.over_data import OverData
from minitron_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Analysing(OverData):
    """A model over its data, what is taken out of it, and what judges it.

    Attributes:
        lengths, blocks: what is taken out.
        count: windows.
        file: questions, if any.
    """

    lengths: list[int]
    blocks: list[Block]
    count: int
    file: QuestionFile | None


def check_layers(cfg: LayersConfig) -> Analysing:
    """Model, layout, blocks, data, questions and output. Raises UserError."""
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    check_layout(folder.shape, layout)
    check_sequence(cfg.data.sequence_length, layout)
    check_weights(folder)
    lengths = check_blocks(cfg.block, folder.shape.num_layers)
    blocks = contiguous_blocks(folder.shape.num_layers, lengths)
    data = open_data(cfg.data.path, cfg.split, folder.shape, cfg.data.sequence_length)
    check_same_tokenizer(data, {"model": folder.path})
    # Full windows only: padding would have a share in Block Influence.
    whole = WindowPlan(data, cfg.split, cfg.data.sequence_length).whole
    count = taken("samples", cfg.samples, whole, cfg.split)
    file = QuestionFile(cfg.questions, cfg.limit) if cfg.questions else None
    if file or cfg.tasks:
        check_tokenizer(folder.path)
    inputs = {"model": folder.digest, "data": data.digest, **({"questions": file.digest} if file else {})}
    if file or cfg.tasks:
        inputs |= {**tokenizer_stamps(folder), **task_stamps(cfg.tasks)}
    check_command_output(cfg, inputs)
    return Analysing(layout, folder, data, inputs, lengths, blocks, count, file)
