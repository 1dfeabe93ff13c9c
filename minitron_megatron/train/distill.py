"""`launch/distill.py`: a student learns from its teacher, which is beside it in the same processes, or cached."""

from collections.abc import Mapping

import torch

from minitron_megatron.automatic import is_on
from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.config import DistillConfig
from minitron_megatron.distill.cache import Cache, CachedTeacher
from minitron_megatron.distill.choices import chosen_pairs
from minitron_megatron.distill.contents import CacheFolder
from minitron_megatron.distill.intermediate import IntermediateLoss
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.offload import offload_layers
from minitron_megatron.distill.routed import RoutedTeacher, TeacherWeights
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.fp8 import check_fp8_matrix_device, fp8_fields
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import Checked
from minitron_megatron.train.distill_checks import check_distill, teacher_layout
from minitron_megatron.train.run import run_training


def distill(cfg: DistillConfig, checked: Checked | None = None) -> None:
    """Train or continue, publish the student."""
    run_training(cfg, checked or check_distill(cfg))


def distillation(
    cfg: DistillConfig, cache: CacheFolder | None, folders: Mapping[str, ModelFolder], layout: Layout
) -> Distillation:
    """The loss to a teacher, which is loaded, or whose answers are in `cache`."""
    student = folders["student"].shape
    if cache:
        answers = Cache(cache.path, cache.contents, cache.digest)
        check_copies(cache.path)
        if cfg.verify:
            answers.verify()
        return Distillation(CachedTeacher(answers), cfg.distill, student.vocab_size)
    if cfg.distill.teacher_head_fp8:
        check_fp8_matrix_device("distill.teacher_head_fp8", torch.device(torch.cuda.current_device()))
    teacher = load_teacher(cfg, folders["teacher"], layout)
    intermediate = intermediate_loss(cfg, folders["teacher"].shape, student, teacher)
    return Distillation(teacher, cfg.distill, student.vocab_size, intermediate)


def load_teacher(cfg: DistillConfig, teacher: ModelFolder, layout: Layout) -> Teacher | RoutedTeacher:
    """The teacher of a folder, as `build_teacher` makes it."""
    return build_teacher(cfg, TeacherWeights.of_folder(teacher), layout)


def build_teacher(cfg: DistillConfig, teacher: TeacherWeights, layout: Layout) -> Teacher | RoutedTeacher:
    """The teacher with its weights, in the student's processes, and in its layout or one of its own."""
    own, ahead = teacher_layout(cfg, layout), cfg.distill.teacher_ahead
    dtype = model_dtype(teacher.shape, cfg.precision)
    options, fp8 = cfg.distill, fp8_fields(cfg.distill.teacher_fp8, frozen=True)
    how = {"head_fp8": options.teacher_head_fp8, "graphs": is_on(cfg.trainer.cuda_graphs)}
    if own != layout:
        how |= {"fp8": fp8, "offload": options.teacher_offload}
        return RoutedTeacher(teacher, own, layout, dtype, cfg.teacher.engine, ahead, **how)
    # Without gradients Transformer Engine keeps no transposed copies of FP8 weights.
    with torch.no_grad():
        frozen = build_model_chunks(teacher.shape, layout, dtype, cfg.teacher.engine, fp8)
        if options.teacher_offload:
            offload_layers(frozen)
        teacher.fill(frozen, None)
    return Teacher(frozen, pipelined=layout.pipeline > 1, ahead=ahead, **how)


def intermediate_loss(
    cfg: DistillConfig, teacher: ModelShape, student: ModelShape, beside: Teacher | RoutedTeacher
) -> IntermediateLoss | None:
    """The losses on intermediate states, where they are asked for; `beside` is the running teacher."""
    pairs = chosen_pairs(cfg.distill, student.num_layers, teacher.num_layers)
    return IntermediateLoss(pairs, beside.chunks, cfg.distill.intermediate, cfg.seed) if pairs else None
