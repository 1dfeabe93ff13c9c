"""`launch/distill.py`: a student learns from its teacher, which is beside it in the same processes and layout."""

from collections.abc import Mapping

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import DistillConfig
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.errors import UserError
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.run import Recipe, check_training, run_training


def distill(cfg: DistillConfig) -> None:
    """Check everything, train or continue, publish the student."""

    def objective(folders: Mapping[str, ModelFolder], layout: Layout) -> Distillation:
        teacher = folders["teacher"]
        dtype = model_dtype(teacher.shape, cfg.precision)
        frozen = build_model_chunks(teacher.shape, layout, dtype, cfg.teacher.engine)
        load_model(frozen, teacher)
        pair = Teacher(frozen, pipelined=layout.pipeline > 1)
        return Distillation(pair, cfg.distill, folders["student"].shape.vocab_size)

    recipe = Recipe(
        verb="distill",
        models={"teacher": cfg.teacher, "student": cfg.student},
        trained="student",
        check=lambda shapes, layout: check_pair(shapes["teacher"], shapes["student"], cfg, layout),
        objective=objective,
    )
    run_training(cfg, recipe)


def check_pair(teacher: ModelShape, student: ModelShape, cfg: DistillConfig, layout: Layout) -> None:
    """Raise UserError when teacher, student, batch and layout do not go together."""
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher has a vocabulary of {teacher.vocab_size}, student of {student.vocab_size}: "
            "logits can only be compared over the same one"
        )
    check_training({"teacher": teacher, "student": student}, cfg, layout)
