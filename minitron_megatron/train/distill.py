"""`launch/distill.py`: a student learns from its teacher, which is beside it in the same processes and layout, or cached."""

from collections.abc import Mapping

from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import DistillConfig
from minitron_megatron.data.datasets import DocumentMasks, Windows, open_data
from minitron_megatron.distill.cache import Cache, CachedTeacher
from minitron_megatron.distill.losses import Divergence
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.errors import UserError
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.run import Recipe, check_training, number_of_steps, run_training


def distill(cfg: DistillConfig) -> None:
    """Check everything, train or continue, publish the student."""
    cache = open_cache(cfg)
    models = {"student": cfg.student} if cfg.distill.cache else {"teacher": cfg.teacher, "student": cfg.student}

    def objective(folders: Mapping[str, ModelFolder], layout: Layout) -> Distillation:
        if cache and cfg.verify:
            cache.verify()
        teacher = CachedTeacher(cache) if cache else _beside(cfg, folders["teacher"], layout)
        return Distillation(teacher, cfg.distill, folders["student"].shape.vocab_size)

    recipe = Recipe(
        verb="distill",
        models=models,
        trained="student",
        check=lambda shapes, layout: check_pair(shapes.get("teacher"), shapes["student"], cfg, layout),
        objective=objective,
    )
    run_training(cfg, recipe)


def _beside(cfg: DistillConfig, teacher: ModelFolder, layout: Layout) -> Teacher:
    """The teacher, loaded, in the student's processes and layout."""
    frozen = build_model_chunks(teacher.shape, layout, model_dtype(teacher.shape, cfg.precision), cfg.teacher.engine)
    load_model(frozen, teacher)
    return Teacher(frozen, pipelined=layout.pipeline > 1)


def open_cache(cfg: DistillConfig) -> Cache | None:
    """The cached teacher, checked to be one for this run; None without one, and in rehearsals of presets.

    Raises UserError.
    """
    if cfg.distill.cache is None or (cfg.dry_run and cfg.student.path is None):
        return None
    cache, length = Cache.open(cfg.distill.cache), cfg.data.sequence_length
    student = open_model_folder(cfg.student.folder("student")).shape
    masks = DocumentMasks(cfg.data.reset_attention_mask, cfg.data.eod_mask_loss)
    data = open_data(cfg.data.path, "train", student, length, masks)
    validation = cfg.trainer.validation_samples
    if validation:
        open_data(cfg.data.path, "validation", student, length)
        validation = min(validation, len(Windows(data, "validation", length)))
    cache.check(
        data=data,
        seed=cfg.seed,
        sequence_length=length,
        vocab_size=student.vocab_size,
        how=Divergence.from_options(cfg.distill, student.vocab_size),
        train=number_of_steps(cfg) * cfg.trainer.global_batch_size,
        validation=validation,
        teacher=open_model_folder(cfg.teacher.path).digest if cfg.teacher.path else None,
    )
    return cache


def check_pair(teacher: ModelShape | None, student: ModelShape, cfg: DistillConfig, layout: Layout) -> None:
    """Raise UserError when teacher (None where it is cached), student, loss, batch and layout do not go together."""
    if teacher and teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher has a vocabulary of {teacher.vocab_size}, student of {student.vocab_size}: "
            "logits can only be compared over the same one"
        )
    Divergence.from_options(cfg.distill, student.vocab_size)
    check_training({"teacher": teacher, "student": student} if teacher else {"student": student}, cfg, layout)
