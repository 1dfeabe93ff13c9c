"""What launch/cache_teacher.py checks by its options and folders alone: before torch is there."""

from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.checkpoints.folder import ModelFolder, check_space, open_model_folder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.unfinished import partial_folder
from minitron_megatron.config import CacheTeacherConfig, number_of_steps, tokens_of_run
from minitron_megatron.data.folder import Data, DocumentMasks, check_enough, open_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.windows import VALIDATED, WindowPlan, taken
from minitron_megatron.distill.choices import check_top_k
from minitron_megatron.distill.contents import Contents
from minitron_megatron.errors import UserError
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.outputs import check_command_output
from minitron_megatron.over_data import OverData
from minitron_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Caching(OverData):
    """A teacher over its data; `contents` is what the cache will hold."""

    contents: Contents


def check_cache_teacher(cfg: CacheTeacherConfig) -> Caching:
    """Teacher, layout, data, output and room on its disk. Raises UserError."""
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.teacher.folder("teacher"))
    data, contents = plan_cache(cfg, folder, layout)
    inputs = {"model": folder.digest, "data": data.digest}
    check_command_output(cfg, inputs)
    check_room(Path(cfg.output), contents.total_bytes)
    return Caching(layout, folder, data, inputs, contents)


def plan_cache(cfg: CacheTeacherConfig, folder: ModelFolder, layout: Layout) -> tuple[Data, Contents]:
    """Everything checked, but for the output and its disk: data, and what is going to be held."""
    check_teacher(cfg, folder, layout)
    masks = DocumentMasks(reset_attention=cfg.data.reset_attention_mask)
    data = open_data(cfg.data.path, "train", folder.shape, cfg.data.sequence_length, masks)
    check_same_tokenizer(data, {"teacher": folder.path})
    check_enough(data, tokens_of_run(cfg), cfg.data.max_epochs)
    return data, contents_of(cfg, folder, data, _windows(cfg, folder, data))


def check_teacher(cfg: CacheTeacherConfig, folder: ModelFolder, layout: Layout) -> None:
    """Raise UserError when teacher, layout and options do not go together."""
    check_layout(folder.shape, layout, "the teacher")
    check_sequence(cfg.data.sequence_length, layout)
    check_weights(folder)
    if layout.context > 1:
        raise UserError(
            f"parallel.context={layout.context}: a forward pass needs no context parallelism; use parallel.tensor with "
            "parallel.sequence=true for long sequences"
        )
    check_top_k(cfg.distill.top_k, folder.shape.vocab_size)


def contents_of(cfg: CacheTeacherConfig, folder: ModelFolder, data: Data, windows: WindowPlan | None) -> Contents:
    """What the cache is going to hold. Raises UserError unless just one of steps and tokens is given."""
    trainer, length = cfg.trainer, cfg.data.sequence_length
    return Contents(
        model=folder.digest,
        data=data.digest,
        seed=cfg.seed,
        sequence_length=length,
        reset_attention_mask=cfg.data.reset_attention_mask,
        vocab_size=folder.shape.vocab_size,
        temperature=cfg.distill.temperature,
        top_k=cfg.distill.top_k,
        train=number_of_steps(cfg) * trainer.global_batch_size,
        validation=0 if windows is None else taken(VALIDATED, trainer.validation_samples, len(windows), "validation"),
        chunk_samples=cfg.chunk_samples,
    )


def _windows(cfg: CacheTeacherConfig, folder: ModelFolder, data: Data) -> WindowPlan | None:
    if not cfg.trainer.validation_samples:
        return None
    open_data(cfg.data.path, "validation", folder.shape, cfg.data.sequence_length)
    return WindowPlan(data, "validation", cfg.data.sequence_length)


def check_room(output: Path, need: int) -> None:
    """Raise UserError where the disk has less than what is not written yet."""
    written = sum(f.stat().st_size for folder in (output, partial_folder(output)) for f in folder.glob("*"))
    check_space(output, need - written, str(output), advice="lower distill.top_k= or the tokens")
