"""What launch/distill.py checks by its options and folders alone: before torch is there."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder
from minitron_megatron.config import DistillConfig, number_of_steps
from minitron_megatron.data.folder import DocumentMasks, open_data
from minitron_megatron.data.windows import WindowPlan
from minitron_megatron.distill.choices import Divergence, chosen_pairs
from minitron_megatron.distill.contents import CacheFolder
from minitron_megatron.errors import UserError
from minitron_megatron.models.limits import FP8_MULTIPLE, check_fp8
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import Checked, Recipe, check_model, check_run, check_training

if TYPE_CHECKING:
    from minitron_megatron.distill.objective import Distillation


def check_distill(cfg: DistillConfig) -> Checked:
    """Models, cached answers, data and output, checked. Raises UserError."""
    return check_run(cfg, recipe_of(cfg, open_cache(cfg)))


def recipe_of(cfg: DistillConfig, cache: CacheFolder | None) -> Recipe:
    """The student, and the teacher where its answers are not cached."""
    models = {"student": cfg.student} if cfg.distill.cache else {"teacher": cfg.teacher, "student": cfg.student}

    def objective(cfg: DistillConfig, folders: Mapping[str, ModelFolder], layout: Layout) -> "Distillation":
        from minitron_megatron.train.distill import distillation

        return distillation(cfg, cache, folders, layout)

    return Recipe(
        verb="distill",
        models=models,
        trained="student",
        check=lambda shapes, layout: check_pair(shapes.get("teacher"), shapes["student"], cfg, layout),
        objective=objective,
        fp8_of=lambda name: (
            ("trainer.fp8", cfg.trainer.fp8) if name == "student" else ("distill.teacher_fp8", cfg.distill.teacher_fp8)
        ),
        layout_of=lambda name, layout: teacher_layout(cfg, layout) if name == "teacher" else layout,
        # Of whom the answers are, too: another cache of the same teacher is not another teacher.
        inputs={"teacher": cache.contents.model, "cache": cache.digest} if cache else {},
    )


def teacher_layout(cfg: DistillConfig, layout: Layout) -> Layout:
    """The teacher's layout beside a student in `layout`: the same, but for what distill.teacher_parallel says.

    A forward pass alone has nothing of an interleaved pipeline but its transfers, and how the student's layers are shared out
    is the student's affair: a layout of its own has neither. Raises UserError where it does not divide the processes.
    """
    given = {name: value for name, value in asdict(cfg.distill.teacher_parallel).items() if value is not None}
    if all(getattr(layout, name) == value for name, value in given.items()):
        return layout
    return Layout(
        **{name: given.get(name, getattr(layout, name)) for name in asdict(cfg.distill.teacher_parallel)},
        world_size=layout.world_size,
        option="distill.teacher_parallel",
    )


def open_cache(cfg: DistillConfig) -> CacheFolder | None:
    """The cached teacher, checked to be one for this run; None without one, and in rehearsals of presets.

    Raises UserError.
    """
    if cfg.distill.cache is None or (cfg.dry_run and cfg.student.path is None):
        return None
    return check_cache(cfg, open_model_folder(cfg.student.folder("student")).shape)


def check_cache(cfg: DistillConfig, student: ModelShape) -> CacheFolder:
    """The cached teacher of distill.cache, checked to be one for this run of such a student. Raises UserError."""
    cache, length = CacheFolder.open(cfg.distill.cache), cfg.data.sequence_length
    masks = DocumentMasks(cfg.data.reset_attention_mask, cfg.data.eod_mask_loss)
    data = open_data(cfg.data.path, "train", student, length, masks)
    validation = cfg.trainer.validation_samples
    if validation:
        open_data(cfg.data.path, "validation", student, length)
        validation = min(validation, len(WindowPlan(data, "validation", length)))
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
    if teacher:
        chosen_pairs(cfg.distill, student.num_layers, teacher.num_layers)
    check_teacher(teacher, cfg, layout)
    check_training({"student": student}, cfg, layout)


def check_teacher(teacher: ModelShape | None, cfg: DistillConfig, layout: Layout) -> None:
    """Raise UserError when the teacher cannot run as asked beside a student in `layout`."""
    ahead, options = cfg.distill.teacher_ahead, cfg.distill
    if options.intermediate and options.cache:
        raise UserError(
            "distill.intermediate compares states of the teacher, which distill.cache does not have: leave one of them out"
        )
    if options.cache and (ahead is not None or any(v is not None for v in asdict(options.teacher_parallel).values())):
        raise UserError(
            "distill.teacher_ahead and distill.teacher_parallel are for a teacher that runs, and distill.cache has one that "
            "need not: leave them out"
        )
    if options.cache and (options.teacher_fp8 != "none" or options.teacher_head_fp8):
        raise UserError(
            "distill.teacher_fp8 and distill.teacher_head_fp8 are for a teacher that runs, and distill.cache has one that need "
            "not: leave them out"
        )
    if options.teacher_offload and options.cache:
        raise UserError(
            "distill.teacher_offload is for a teacher that runs, and distill.cache has one that need not: leave one of them out"
        )
    if options.teacher_offload and options.teacher_fp8 != "none":
        raise UserError(
            f"distill.teacher_offload=true and distill.teacher_fp8={options.teacher_fp8}: FP8 weights stay on the GPU: choose one"
        )
    if ahead is not None and layout.virtual_pipeline and ahead % layout.pipeline:
        raise UserError(
            f"distill.teacher_ahead={ahead} is not a multiple of the {layout.pipeline} stages of the interleaved pipeline"
        )
    if teacher is None:
        return
    own = teacher_layout(cfg, layout)
    if own != layout and options.intermediate:
        raise UserError(
            "distill.intermediate needs the teacher in the student's layout, where their states meet: leave out "
            "distill.teacher_parallel"
        )
    check_model("teacher", teacher, cfg.data.sequence_length, own)
    tokens = cfg.trainer.micro_batch_size * cfg.data.sequence_length // own.context
    check_fp8("distill.teacher_fp8", options.teacher_fp8, teacher, own, tokens)
    if options.teacher_head_fp8 and teacher.hidden_size % FP8_MULTIPLE:
        raise UserError(
            f"distill.teacher_head_fp8 needs a multiple of {FP8_MULTIPLE}: hidden_size of the teacher is {teacher.hidden_size}"
        )
    if own != layout and teacher.num_layers % own.pipeline:
        fits = [str(n) for n in range(1, own.pipeline) if teacher.num_layers % n == 0]
        raise UserError(
            f"{own.option}.pipeline={own.pipeline} does not divide num_layers={teacher.num_layers} of the teacher, as a layout "
            f"of its own must: use {' or '.join(fits[-2:])}"
        )
