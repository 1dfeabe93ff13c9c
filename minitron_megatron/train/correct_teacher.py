"""`launch/correct_teacher.py`: a teacher is fine-tuned on the data of the distillation before it teaches.

Where the data that a teacher was trained on are not at hand, its predictions on other data are off, and so is what a student
learns from them. arXiv 2408.11796 ("teacher correction") fine-tunes it there first, for about 100 B tokens at one fifth of its
original peak learning rate: the validation loss of the distillation was more than 6 % lower. Importance and pruning need not wait
for it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.config import CorrectTeacherConfig
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import Checked, Recipe, check_run, check_training

if TYPE_CHECKING:
    from minitron_megatron.models.objective import NextToken


def check_correct_teacher(cfg: CorrectTeacherConfig) -> Checked:
    """Model, data and output, checked before torch is there. Raises UserError."""

    def objective(_: CorrectTeacherConfig, folders: Mapping[str, ModelFolder], layout: Layout) -> "NextToken":
        from minitron_megatron.models.objective import NextToken

        return NextToken(folders["model"].shape.vocab_size)

    recipe = Recipe(
        verb="correct",
        models={"model": cfg.model},
        trained="model",
        check=lambda shapes, layout: check_training(shapes, cfg, layout),
        objective=objective,
        fp8_of=lambda name: ("trainer.fp8", cfg.trainer.fp8),
    )
    return check_run(cfg, recipe)


def correct_teacher(cfg: CorrectTeacherConfig, checked: Checked | None = None) -> None:
    """Train or continue, publish the corrected teacher."""
    from minitron_megatron.train.run import run_training

    run_training(cfg, checked or check_correct_teacher(cfg))
