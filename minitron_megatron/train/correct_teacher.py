"""`launch/correct_teacher.py`: a teacher is fine-tuned on the data of the distillation before it teaches.

Where the data that a teacher was trained on are not at hand, its predictions on other data are off, and so is what a student
learns from them. arXiv 2408.11796 ("teacher correction") fine-tunes it there first, for about 100 B tokens at one fifth of its
original peak learning rate: the validation loss of the distillation was more than 6 % lower. Importance and pruning need not wait
for it.
"""

from minitron_megatron.config import CorrectTeacherConfig
from minitron_megatron.models.objective import NextToken
from minitron_megatron.train.run import Recipe, check_training, run_training


def correct_teacher(cfg: CorrectTeacherConfig) -> None:
    """Check everything, train or continue, publish the corrected teacher."""
    recipe = Recipe(
        verb="correct",
        models={"model": cfg.model},
        trained="model",
        check=lambda shapes, layout: check_training(shapes, cfg, layout),
        objective=lambda folders, layout: NextToken(folders["model"].shape.vocab_size),
        fp8_of=lambda name: ("trainer.fp8", cfg.trainer.fp8),
    )
    run_training(cfg, recipe)
