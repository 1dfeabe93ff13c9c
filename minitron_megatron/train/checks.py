"""Everything about a training run that can be checked by its options and folders alone: before torch is there."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minitron_megatron.automatic import check_switches, is_on
from minitron_megatron.changing import decided_by, decisive, differences, free_options, in_words
from minitron_megatron.checkpoints.folder import MANIFEST, ModelFolder, open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf_folder import companion_stamps
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.config import (
    ModelConfig,
    TrainerConfig,
    TrainingConfig,
    number_of_steps,
    tokens_of_run,
    tokens_per_step,
)
from minitron_megatron.data.folder import Data, DocumentMasks, check_enough, open_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.effects import ARITHMETIC, LENGTH, PUBLISHED, SAMPLES, typed
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.lengths import check_positions
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.limits import (
    ITEMSIZES,
    check_fp8,
    check_layout,
    check_sequence,
    computing_dtype,
    sequence_parts,
)
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import identity, saved
from minitron_megatron.train.begin import OPTION as START
from minitron_megatron.train.begin import Beginning, began_with, check_another, check_beginning
from minitron_megatron.train.schedule import Schedule

if TYPE_CHECKING:
    from minitron_megatron.models.objective import Objective

log = logging.getLogger(__name__)
Shapes = Mapping[str, ModelShape]
OVERLAP_OPTION = "trainer.tp_comm_overlap"
TENSOR_SIZES = (1, 2, 4, 8)
PIPELINE_SIZES = (1, 2, 4, 8, 16)
# Whether a layout can run the job: raises UserError where it cannot.
Check = Callable[[Layout], None]


@dataclass(frozen=True)
class Recipe:
    """What a command that trains has of its own.

    Attributes:
        verb: what is done to the model, as in "distill".
        models: every model that takes part, by the name of its option.
        trained: which of them is trained and published; the others are only read.
        check: raises UserError when these models do not go together in a layout.
        objective: what is minimised, made of the decided options and the opened folders in a live layout.
        fp8_of: the option that says how a model's FP8 is scaled, and what it says, by the model's name.
        layout_of: layout of a model, by its name and the layout of the one that is trained; that one, if not given.
        inputs: digests, by name, of what it reads beside models and data.
    """

    verb: str
    models: Mapping[str, ModelConfig]
    trained: str
    check: Callable[[Shapes, Layout], None]
    objective: Callable[[TrainingConfig, Mapping[str, ModelFolder], Layout], "Objective"]
    fp8_of: Callable[[str], tuple[str, str]]
    layout_of: Callable[[str, Layout], Layout] = lambda name, layout: layout
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """What is trained, and the teacher that runs beside it, if any; engines as `model.engine` says them.

    `teacher_layout` gives the teacher's layout beside a student in one.
    """

    student: ModelShape
    student_engine: str
    teacher: ModelShape | None
    teacher_engine: str
    teacher_layout: Callable[[Layout], Layout]


@dataclass(frozen=True)
class Checked:
    """A run of which all has been checked that options and folders show.

    `check` asks whether another layout would do; `folders` and `data` are None in a rehearsal of presets. `before` are options
    of the run in the output folder so far, by their dotted names; `beginning` is the checkpoint of another run that it begins, or
    began, with; `inputs` are digests of all that it reads.
    """

    recipe: Recipe
    layout: Layout
    steps: int
    shapes: Shapes
    models: Models
    check: Check
    folders: Mapping[str, ModelFolder] | None
    data: Data | None
    before: Mapping[str, Any] = field(default_factory=dict)
    beginning: Beginning | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


def check_run(cfg: TrainingConfig, recipe: Recipe) -> Checked:
    """Check a run before torch is there. Raises UserError, before which a dry run prints the layouts that would do."""
    layout = Layout.from_config(cfg.parallel)
    steps = number_of_steps(cfg)
    shapes = {name: _shape(model, name, cfg.dry_run) for name, model in recipe.models.items()}
    models, check = _models(recipe, shapes), partial(recipe.check, shapes)
    _say_larger(models)
    try:
        check(layout)
    except UserError:
        # torch is for the figures of other layouts: a mistake that all of them share is said without it.
        if cfg.dry_run and layouts_that_run(layout, cfg.data.sequence_length, check):
            from minitron_megatron.train.foresee import show_layouts

            show_layouts(cfg, layout, models, check)
        raise
    # A rehearsal of presets has no folders to look into.
    if cfg.dry_run and any(model.path is None for model in recipe.models.values()):
        return Checked(recipe, layout, steps, shapes, models, check, None, None)
    folders, data = _inputs(cfg, recipe)
    run = Path(cfg.output)
    check_another(cfg, run)
    inputs = inputs_of(recipe, folders, data)
    before = check_run_folder(run, cfg, inputs)
    shape = folders[recipe.trained].shape
    beginning = check_beginning(cfg, run, shape, layout, inputs)
    _say_same(recipe, folders)
    inputs = {**inputs, **(beginning.inputs if beginning else {})}
    check_model_there(run, inputs)
    check_checkpoints(run / "checkpoints", cfg, layout, shape, inputs)
    return Checked(recipe, layout, steps, shapes, models, check, folders, data, before, beginning, inputs)


def inputs_of(recipe: Recipe, folders: Mapping[str, ModelFolder], data: Data) -> dict[str, str]:
    """Digests and stamps, by name, of all that a run reads but a checkpoint that it begins with.

    Models, data, and what goes with the trained model's weights.
    """
    models = {name: folder.digest for name, folder in folders.items()}
    return {**recipe.inputs, **models, "data": data.digest, **companion_stamps(folders[recipe.trained])}


def check_model_there(run: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError, naming it, where the model that a finished run has published was made from another input."""
    if (run / "model" / MANIFEST).is_file():
        saved.check_inputs(run, read_manifest(run / "model").get("inputs"), inputs)


def _models(recipe: Recipe, shapes: Shapes) -> Models:
    """What is trained, and what is read beside it."""
    teacher = next((name for name in shapes if name != recipe.trained), None)
    return Models(
        shapes[recipe.trained],
        recipe.models[recipe.trained].engine,
        shapes[teacher] if teacher else None,
        recipe.models[teacher].engine if teacher else "auto",
        partial(recipe.layout_of, teacher),
    )


def _say_larger(models: Models) -> None:
    """Warn where the student is the larger one: most often the two options are swapped."""
    if models.teacher is not None:
        teacher, student = count_parameters(models.teacher), count_parameters(models.student)
        if student > teacher:
            log.warning(
                "the student has %s parameters, and its teacher %s: are they swapped?", f"{student:,}", f"{teacher:,}"
            )


def _say_same(recipe: Recipe, folders: Mapping[str, ModelFolder]) -> None:
    """Warn where the trained model is its teacher: there is nothing to learn."""
    trained = folders[recipe.trained]
    for name, folder in folders.items():
        if name != recipe.trained and folder.digest == trained.digest:
            log.warning(
                "%s=%s and %s=%s are the same model, which has nothing to learn of itself: is the %s the pruned one?",
                recipe.trained,
                trained.path,
                name,
                folder.path,
                recipe.trained,
            )


def schedule_of(cfg: TrainingConfig) -> Schedule:
    """The learning rates of the run. Raises UserError."""
    return Schedule.of_run(cfg.optim, number_of_steps(cfg), tokens_per_step(cfg))


def _shape(model: ModelConfig, name: str, dry_run: bool) -> ModelShape:
    if model.path is None and dry_run:
        return ModelShape.from_dict(model.sizes(name), name)
    return open_model_folder(model.folder(name)).shape


def _inputs(cfg: TrainingConfig, recipe: Recipe) -> tuple[dict[str, ModelFolder], Data]:
    """Models and data, checked to be whole and to go together. Raises UserError."""
    folders = {name: open_model_folder(model.folder(name)) for name, model in recipe.models.items()}
    for folder in folders.values():
        check_weights(folder)
    shape = folders[recipe.trained].shape
    masks = DocumentMasks(cfg.data.reset_attention_mask, cfg.data.eod_mask_loss)
    data = open_data(cfg.data.path, "train", shape, cfg.data.sequence_length, masks)
    check_same_tokenizer(data, {name: folder.path for name, folder in folders.items()})
    check_enough(data, tokens_of_run(cfg), cfg.data.max_epochs)
    if cfg.trainer.validation_samples:
        open_data(cfg.data.path, "validation", shape, cfg.data.sequence_length)
    return folders, data


def check_training(shapes: Shapes, cfg: TrainingConfig, layout: Layout) -> None:
    """Raise UserError when models, batch and layout do not go together."""
    for name, shape in shapes.items():
        check_model(name, shape, cfg.data.sequence_length, layout)
        tokens = cfg.trainer.micro_batch_size * cfg.data.sequence_length // layout.context
        check_fp8("trainer.fp8", cfg.trainer.fp8, shape, layout, tokens, cfg.trainer.fp8_bf16_layers)
    batch, micro = cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size
    at_once = micro * layout.data * (layout.pipeline if layout.virtual_pipeline else 1)
    if batch % at_once:
        stages = " × pipeline stages" if layout.virtual_pipeline else ""
        fits = [str(n) for n in (batch // at_once * at_once, (batch // at_once + 1) * at_once) if n]
        # Micro-batches that the batch is not a multiple of divide over no number of ranks.
        sizes = [] if batch % micro else _tensor_sizes_that_divide(shapes, batch // micro, layout)
        fits += [f"parallel.tensor={n}" for n in sizes]
        raise UserError(
            f"trainer.global_batch_size={batch} is not a multiple of {at_once} (trainer.micro_batch_size={micro} × "
            f"{layout.data} data-parallel ranks{stages}): use {' or '.join(fits)}"
        )
    schedule_of(cfg)
    recomputation(cfg.trainer)
    check_switches(cfg, layout)
    check_overlap(cfg.trainer, layout)
    trainer = cfg.trainer
    if trainer.keep_best and not trainer.validation_samples:
        raise UserError("trainer.keep_best=true needs validations: set trainer.validation_samples= above 0")
    if trainer.publish == "best" and not trainer.keep_best:
        raise UserError("trainer.publish=best needs trainer.keep_best=true")


def check_model(name: str, shape: ModelShape, sequence_length: int, layout: Layout) -> None:
    """Raise UserError when a model and its sequences do not go into a layout."""
    check_layout(shape, layout, f"the {name}")
    check_sequence(sequence_length, layout)
    check_positions(sequence_length, shape.max_position_embeddings, f"the {name}")


def _tensor_sizes_that_divide(shapes: Shapes, samples: int, layout: Layout) -> list[int]:
    """Other tensor-parallel sizes, up to 8, with which so many micro-batches divide over the data-parallel ranks."""
    found = []
    for tensor in TENSOR_SIZES:
        with contextlib.suppress(UserError):
            other = replace(layout, tensor=tensor)
            for shape in shapes.values():
                check_layout(shape, other)
            if samples % (other.data * (other.pipeline if other.virtual_pipeline else 1)) == 0:
                found.append(tensor)
    return found


def layouts_that_run(layout: Layout, sequence_length: int, check: Check) -> list[Layout]:
    """Layouts of as many processes that `check` accepts: the given one, and tensor × pipeline sizes up to 8 × 16.

    Sequence parallelism, which costs nothing and saves memory, is on wherever it can be.
    """
    found = []
    for tensor in TENSOR_SIZES:
        for pipeline in PIPELINE_SIZES:
            if layout.world_size % (tensor * pipeline * layout.context) == 0:
                sizes = replace(
                    layout,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=None,
                    pipeline_layout=None,
                    sequence=tensor > 1,
                )
                divides = sequence_length % sequence_parts(sizes) == 0
                found.append(sizes if divides else replace(sizes, sequence=False))
    return [one for one in dict.fromkeys([without_idle_options(layout), *found]) if _accepts(check, one)]


def without_idle_options(layout: Layout) -> Layout:
    """Sequence parallelism is nothing on one tensor-parallel rank."""
    return replace(layout, sequence=layout.sequence and layout.tensor > 1)


def _accepts(check: Check, layout: Layout) -> bool:
    try:
        check(layout)
    except UserError:
        return False
    return True


def what_is_trained(cfg: TrainingConfig) -> dict[str, Any]:
    """Options that a run has from beginning to end, by their dotted names, and its length and what is published of it."""
    return decisive(resolved_config(cfg), free_options(type(cfg)))


def _is_beginning(path: Path) -> bool:
    """Whether a run killed in its first moments, before its config.yaml was there, may have left this, and nothing else."""
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name == identity.FILE or (path.name.startswith(".") and path.name.endswith(".partial"))


def check_run_folder(
    run: Path, cfg: TrainingConfig, inputs: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The options that the run in the output folder has had so far, by their dotted names; none where there is no run.

    `inputs` are digests of what is read, the beginning aside: an option that names a copy is the same. Raises UserError when it
    is another run, or something else.
    """
    if not run.exists() or all(map(_is_beginning, run.iterdir())):
        return {}
    if not (run / "config.yaml").is_file():
        raise UserError(f"output={run} exists and is not a run folder: choose another output=")
    if not cfg.resume:
        raise UserError(f"output={run} has a run in it and resume=false: remove it or choose another output=")
    now, decides = what_is_trained(cfg), decided_by(type(cfg))
    named = {kind: {k: v for k, v in now.items() if decides[k] == kind} for kind in (SAMPLES, ARITHMETIC, LENGTH)}
    identity.check_own(run, {**named[SAMPLES], **named[ARITHMETIC]}, named[LENGTH], inputs)
    there, _ = saved.newest_whole(run / "checkpoints")
    # config.yaml is written before a step is taken: the length that counts is that with which steps were.
    taken = (there and there.written.options) or {}
    before = {**saved.read_options(run, now), **{k: taken[k] for k in named[LENGTH] if k in taken}}
    before = saved.with_copies(before, _read_so_far(run, there), now, inputs)
    asked = {before.get(START), now.get(START)}
    if len(asked) == 2 and None not in asked and began_with(run, Path(now[START])):
        before[START] = now[START]
    differ = list(differences(before, now))
    changes = [name for name in differ if decides[name] == PUBLISHED]
    lengths = [k for k in differ if decides[k] == LENGTH and None not in (before[k], now[k])]
    changes += [k for k in lengths if there is None or now[k] > before[k]]
    if fixed := [name for name in differ if name not in changes]:
        first, *others = fixed
        also = f" ({', '.join(others[:3])} too)" if others else ""
        raise UserError(
            f"output={run} holds a run with {in_words(first, before[first], now[first])}{also}: give the same, or another "
            f"output= (with trainer.start_from={run} it begins with what this run has)"
        )
    if changes and (run / "model").exists():
        first = changes[0]
        raise UserError(
            f"output={run} is finished, with {in_words(first, before[first], now[first])}: remove {run / 'model'}, and the same "
            "command goes on from its last checkpoint"
        )
    for name in changes:
        log.info("%s is %s from here on, and was %s", name, typed(now[name]), typed(before[name]))
    return before


def _read_so_far(run: Path, there: saved.Checkpoint | None) -> Mapping[str, str] | None:
    """Digests of what a run has read so far, by its newest checkpoint or the model that it has published."""
    if there is not None and there.written.inputs is not None:
        return there.written.inputs
    return read_manifest(run / "model").get("inputs") if (run / "model" / MANIFEST).is_file() else None


def check_checkpoints(
    folder: Path, cfg: TrainingConfig, layout: Layout, shape: ModelShape, inputs: Mapping[str, str]
) -> None:
    """Raise UserError when a run cannot go on from what is there in this layout with these inputs, or there is no room."""
    there, _ = saved.newest_whole(folder)
    if there is not None:
        saved.check_inputs(folder.parent, there.written.inputs, inputs)
        saved.check_readable(there, layout)
    itemsize = ITEMSIZES[computing_dtype(shape, cfg.precision)]
    saved.check_room(folder, count_parameters(shape), itemsize, cfg.trainer)


def recomputation(options: TrainerConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for activation recomputation. Raises UserError for modules that a layer has not."""
    # Megatron's layernorm is not among them: local layers cannot, and Transformer Engine's norms are part of their linears.
    known = ("core_attn", "mlp")
    wrong = [name for name in options.recompute_modules if name not in known]
    if wrong:
        raise UserError(f"trainer.recompute_modules has {wrong[0]}: use {' or '.join(known)}, or both")
    if options.recompute == "none":
        return {}
    if options.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(options.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
    }


def check_overlap(trainer: TrainerConfig, layout: Layout) -> None:
    """Raise UserError where there is nothing to overlap, or what cannot be."""
    if not trainer.tp_comm_overlap:
        return
    if layout.tensor == 1 or not layout.sequence:
        raise UserError(
            f"{OVERLAP_OPTION}=true is for sequence parallelism: set {layout.option}.tensor= above 1 and "
            f"{layout.option}.sequence=true"
        )
    if is_on(trainer.cuda_graphs):
        raise UserError(f"{OVERLAP_OPTION}=true does not go with trainer.cuda_graphs=true: use one of them")
    if trainer.fp8 == "blockwise":
        raise UserError(
            f"{OVERLAP_OPTION}=true does not go with trainer.fp8=blockwise, whose scales its buffers do not carry"
        )
