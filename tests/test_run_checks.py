"""What a training checks by its options alone, and what it decides of devices, optimizers and buffers: both sides of each."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints.folder import MANIFEST
from minitron_megatron.config import (
    DistillConfig,
    DistillOptions,
    ModelConfig,
    TeacherParallelConfig,
    TrainerConfig,
    TrainingDataConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checks, correct_teacher, distill, distill_checks
from minitron_megatron.train.checks import check_training, layouts_that_run, recomputation
from minitron_megatron.train.distill_checks import check_teacher, recipe_of, teacher_layout
from tests.test_bounds import SMALL_SHAPE, refused

SHAPES = {"student": SMALL_SHAPE}
LENGTH = 32


def config(loss: dict | None = None, **trainer) -> DistillConfig:
    given = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1, **trainer}
    return DistillConfig(
        output="run",
        trainer=TrainerConfig(**given),
        data=TrainingDataConfig(path="data", sequence_length=LENGTH),
        distill=DistillOptions(**(loss or {})),
    )


# Batches and layouts


@pytest.mark.parametrize(
    ("batch", "micro", "layout", "says"),
    [
        (8, 2, Layout(world_size=4), None),
        (12, 2, Layout(world_size=4), "of 8 (trainer.micro_batch_size=2 × 4 data-parallel ranks): use 8 or 16 or "
                                      "parallel.tensor=2 or parallel.tensor=4"),
        (6, 2, Layout(world_size=4), "of 8 (trainer.micro_batch_size=2 × 4 data-parallel ranks): use 8 or parallel.tensor=4"),
        (9, 2, Layout(), "of 2 (trainer.micro_batch_size=2 × 1 data-parallel ranks): use 8 or 10"),
        (8, 1, Layout(pipeline=2, virtual_pipeline=2, world_size=4), None),
        (6, 1, Layout(pipeline=2, virtual_pipeline=2, world_size=4), "of 4 (trainer.micro_batch_size=1 × 2 data-parallel ranks × "
                                                                     "pipeline stages): use 4 or 8 or parallel.tensor=2"),
        (6, 1, Layout(pipeline=2, world_size=4), None),
    ],
)  # fmt: skip
def test_a_batch_is_a_multiple_of_what_all_ranks_take_at_once(batch, micro, layout, says):
    """Sizes of tensor parallelism that are named give whole rounds; more than there are processes or groups are not."""
    cfg = config(global_batch_size=batch, micro_batch_size=micro)
    if says is None:
        check_training(SHAPES, cfg, layout)
        return
    with pytest.raises(UserError) as error:
        check_training(SHAPES, cfg, layout)
    assert str(error.value) == f"trainer.global_batch_size={batch} is not a multiple {says}"


@pytest.mark.parametrize(
    ("trainer", "taken"),
    [
        ({"keep_best": True}, True),
        ({"keep_best": True, "validation_samples": 0}, False),
        ({"validation_samples": 0}, True),
        ({"keep_best": True, "publish": "best"}, True),
        ({"publish": "best"}, False),
    ],
)
def test_the_best_is_kept_where_there_are_validations_and_published_where_it_is_kept(trainer, taken):
    assert refused(check_training, SHAPES, config(**trainer), Layout()) != taken


def test_layouts_that_run_are_sizes_that_divide_the_processes():
    """The given one first, without what is idle; sequence parallelism where the length allows it."""
    given = Layout(tensor=1, sequence=True, world_size=8)
    found = layouts_that_run(given, LENGTH, lambda _: None)
    wanted = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
    assert found == [Layout(tensor=t, pipeline=p, sequence=t > 1, world_size=8) for t, p in wanted]
    odd = layouts_that_run(replace(given, pipeline=2, virtual_pipeline=2), 30, lambda _: None)
    assert odd[0] == Layout(pipeline=2, virtual_pipeline=2, world_size=8) and len(odd) == 11
    assert {one.tensor: one.sequence for one in odd} == {1: False, 2: True, 4: False, 8: False}
    wide = layouts_that_run(Layout(context=4, world_size=8), LENGTH, lambda _: None)
    assert [(one.tensor, one.pipeline, one.context) for one in wide] == [(1, 1, 4), (1, 2, 4), (2, 1, 4)]

    def check(layout):
        if layout.tensor > 2:
            raise UserError("too many")

    assert {one.tensor for one in layouts_that_run(given, LENGTH, check)} == {1, 2}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"recompute_num_layers": 3}, {}),
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, {"granularity": "selective", "modules": ["mlp"]}),
        (
            {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3},
            {"granularity": "full", "method": "block", "num_layers": 3},
        ),
    ],
)
def test_recomputation_is_megatrons(options, wanted):
    assert recomputation(TrainerConfig(**options)) == {f"recompute_{name}": value for name, value in wanted.items()}


# Models and inputs


def test_a_student_that_is_larger_than_its_teacher_is_said(caplog):
    small = SMALL_SHAPE.resized(num_layers=3)
    for student, teacher, said in (
        (SMALL_SHAPE, small, 1), (small, SMALL_SHAPE, 0), (SMALL_SHAPE, SMALL_SHAPE, 0), (small, None, 0)
    ):  # fmt: skip
        caplog.clear()
        checks._say_larger(checks.Models(student, "auto", teacher, "auto", lambda layout: layout))
        assert len(caplog.records) == said


def test_a_model_is_trained_beside_the_other_one():
    """Each with its engine; the teacher's layout is asked for by its name."""
    asked = []
    shapes = {"student": SMALL_SHAPE, "teacher": SMALL_SHAPE.resized(num_layers=3)}
    models = {"student": ModelConfig(engine="te"), "teacher": ModelConfig(engine="local")}
    recipe = SimpleNamespace(
        trained="student", models=models, layout_of=lambda name, layout: asked.append((name, layout))
    )
    found = checks._models(recipe, shapes)
    assert (found.student, found.student_engine) == (shapes["student"], "te")
    assert (found.teacher, found.teacher_engine) == (shapes["teacher"], "local")
    found.teacher_layout(Layout())
    assert asked == [("teacher", Layout())]
    alone = checks._models(recipe, {"student": SMALL_SHAPE})
    assert (alone.teacher, alone.teacher_engine) == (None, "auto")


def test_inputs_are_of_models_data_files_and_the_beginning(monkeypatch):
    stamped = []
    monkeypatch.setattr(checks, "companion_stamps", lambda folder: stamped.append(folder.digest) or {"file t": "5"})
    folders = {name: SimpleNamespace(digest=name[0]) for name in ("teacher", "student")}
    recipe = SimpleNamespace(inputs={"cache": "4"}, trained="student")
    data, beginning = SimpleNamespace(digest="3"), SimpleNamespace(inputs={"start_from": "6"})
    plain = {"cache": "4", "teacher": "t", "student": "s", "data": "3", "file t": "5"}
    assert checks.inputs_of(recipe, folders, data, None) == plain
    assert checks.inputs_of(recipe, folders, data, beginning) == {**plain, "start_from": "6"} and stamped == ["s", "s"]


def test_the_model_of_a_finished_run_was_made_from_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "read_manifest", lambda folder: {"inputs": {"data": "1"}})
    checks.check_model_there(tmp_path, {"data": "2"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / MANIFEST).touch()
    checks.check_model_there(tmp_path, {"data": "1"})
    with pytest.raises(UserError, match=r"data\.path= is another one than the run has had so far \(1, now 2\)"):
        checks.check_model_there(tmp_path, {"data": "2"})


def test_room_is_for_weights_in_the_dtype_that_is_computed_in(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checks.saved, "check_room", lambda folder, count, item, options: asked.append((count, item)))
    for dtype, precision, item in (("bfloat16", "bf16", 2), ("bfloat16", "fp32", 4), ("float32", "fp32", 4)):
        cfg = replace(config(), precision=precision)
        checks.check_checkpoints(tmp_path, cfg, Layout(), replace(SMALL_SHAPE, dtype=dtype), {})
        assert asked.pop() == (checks.count_parameters(SMALL_SHAPE), item)


# Teachers


@pytest.mark.parametrize(
    ("loss", "layout", "says"),
    [
        ({"cache": "c"}, Layout(), None),
        (
            {"cache": "c", "teacher_fp8": "tensorwise"},
            Layout(),
            "distill.teacher_fp8 and distill.teacher_head_fp8 are for",
        ),
        (
            {"cache": "c", "teacher_head_fp8": True},
            Layout(),
            "distill.teacher_fp8 and distill.teacher_head_fp8 are for",
        ),
        ({"cache": "c", "teacher_ahead": 1}, Layout(), "distill.teacher_ahead and distill.teacher_parallel are for"),
        (
            {"cache": "c", "teacher_parallel": TeacherParallelConfig(sequence=False)},
            Layout(),
            "distill.teacher_ahead and distill.teacher_parallel are for",
        ),
        ({"cache": "c", "teacher_offload": True}, Layout(), "distill.teacher_offload is for a teacher that runs"),
        ({"cache": "c", "intermediate": 0.5}, Layout(), "distill.intermediate compares states"),
        ({"teacher_offload": True, "teacher_fp8": "tensorwise"}, Layout(), "FP8 weights stay on the GPU"),
        ({"teacher_offload": True}, Layout(), None),
        ({"teacher_head_fp8": True}, Layout(), None),
        ({"teacher_ahead": 3}, Layout(pipeline=2, world_size=2), None),
        (
            {"teacher_ahead": 3},
            Layout(pipeline=2, virtual_pipeline=2, world_size=2),
            "is not a multiple of the 2 stages",
        ),
        ({"teacher_ahead": 4}, Layout(pipeline=2, virtual_pipeline=2, world_size=2), None),
        ({"intermediate": 0.5}, Layout(world_size=2), None),
        (
            {"intermediate": 0.5, "teacher_parallel": TeacherParallelConfig(tensor=2)},
            Layout(world_size=2),
            "distill.intermediate needs the teacher in the student's layout",
        ),
        ({"intermediate": 0.5, "teacher_parallel": TeacherParallelConfig(tensor=1)}, Layout(world_size=2), None),
        ({"teacher_parallel": TeacherParallelConfig(pipeline=4)}, Layout(world_size=4), None),
        ({"teacher_parallel": TeacherParallelConfig(pipeline=3)}, Layout(world_size=3), "must: use 1 or 2"),
        ({"teacher_parallel": TeacherParallelConfig(tensor=3)}, Layout(world_size=3), "of the teacher"),
    ],
)
def test_a_teacher_runs_as_asked_or_is_refused(loss, layout, says):
    """Where its answers are cached there is none that runs."""
    cfg = config(loss)
    teacher = None if cfg.distill.cache else SMALL_SHAPE
    if says is None:
        check_teacher(teacher, cfg, layout)
        return
    with pytest.raises(UserError) as error:
        check_teacher(teacher, cfg, layout)
    assert says in str(error.value)


@pytest.mark.parametrize(("hidden", "taken"), [(32, True), (40, False), (48, True)])
def test_a_head_in_fp8_has_channels_of_16(hidden, taken):
    cfg = config({"teacher_head_fp8": True})
    assert refused(check_teacher, SMALL_SHAPE.resized(hidden_size=hidden), cfg, Layout()) != taken


def test_a_teachers_layout_is_the_students_but_for_what_is_given():
    """One of its own has neither an interleaved pipeline nor the student's split of layers."""
    student = Layout(pipeline=2, virtual_pipeline=2, tensor=2, sequence=True, world_size=8, account_for_loss=True)

    def of(**given):
        return teacher_layout(config({"teacher_parallel": TeacherParallelConfig(**given)}), student)

    assert of() is student and of(tensor=2, sequence=True) is student and of(pipeline=2) is student
    own = of(tensor=4)
    assert own == Layout(tensor=4, pipeline=2, sequence=True, world_size=8) and own.option == "distill.teacher_parallel"
    assert of(sequence=False) == Layout(tensor=2, pipeline=2, world_size=8)
    assert of(context=2, pipeline=1) == Layout(tensor=2, context=2, sequence=True, world_size=8)
    with pytest.raises(UserError, match=r"^distill\.teacher_parallel\.tensor × pipeline × context = 3 × 2 × 1 = 6"):
        of(tensor=3)


def test_a_distillation_reads_a_teacher_or_a_cache():
    cfg = config({"teacher_fp8": "tensorwise", "teacher_parallel": TeacherParallelConfig(tensor=2)}, fp8="delayed")
    beside = recipe_of(cfg, None)
    assert list(beside.models) == ["teacher", "student"] and beside.trained == "student" and beside.inputs == {}
    assert beside.fp8_of("student") == ("trainer.fp8", "delayed")
    assert beside.fp8_of("teacher") == ("distill.teacher_fp8", "tensorwise")
    assert beside.layout_of("student", Layout(world_size=2)).tensor == 1
    assert beside.layout_of("teacher", Layout(world_size=2)).tensor == 2
    cache = SimpleNamespace(contents=SimpleNamespace(model="m"), digest="d")
    cached = recipe_of(config({"cache": "c"}), cache)
    assert list(cached.models) == ["student"] and cached.inputs == {"teacher": "m", "cache": "d"}


def test_a_cache_is_checked_against_what_the_run_takes(monkeypatch):
    """Its steps times its batch, and the windows of a validation that there are."""
    asked, opened = [], []
    cache = SimpleNamespace(check=lambda **given: asked.append(given))
    monkeypatch.setattr(distill_checks.CacheFolder, "open", lambda path: opened.append(path) or cache)
    monkeypatch.setattr(distill_checks, "open_data", lambda path, split, *more: opened.append(split) or more)
    monkeypatch.setattr(distill_checks, "WindowPlan", lambda data, split, length: range(5))
    monkeypatch.setattr(distill_checks, "open_model_folder", lambda path: SimpleNamespace(digest=f"of {path}"))
    for validation, taken, splits in (
        (0, 0, ["train"]),
        (3, 3, ["train", "validation"]),
        (9, 5, ["train", "validation"]),
    ):
        cfg = config({"cache": "c", "loss": "topk_kl", "top_k": 3}, validation_samples=validation)
        cfg = replace(cfg, seed=7, data=replace(cfg.data, reset_attention_mask=True))
        assert distill_checks.check_cache(cfg, SMALL_SHAPE) is cache
        (given,) = asked
        assert (given["train"], given["validation"], given["seed"]) == (4 * 8, taken, 7)
        assert (given["sequence_length"], given["vocab_size"], given["teacher"]) == (
            LENGTH,
            SMALL_SHAPE.vocab_size,
            None,
        )
        assert given["how"].kind == "topk_kl" and given["how"].top_k == 3
        shape, length, masks = given["data"]
        assert (shape, length, masks.reset_attention, masks.end_of_document) == (SMALL_SHAPE, LENGTH, True, False)
        assert opened == ["c", *splits]
        asked.clear()
        opened.clear()
    distill_checks.check_cache(replace(cfg, teacher=ModelConfig(path="t")), SMALL_SHAPE)
    assert asked[0]["teacher"] == "of t"


@pytest.mark.parametrize(
    ("cache", "dry_run", "path", "opened"),
    [(None, False, "s", False), ("c", False, "s", True), ("c", True, "s", True), ("c", True, None, False)],
)
def test_a_cache_is_opened_but_for_rehearsals_of_presets(monkeypatch, cache, dry_run, path, opened):
    monkeypatch.setattr(distill_checks, "open_model_folder", lambda path: SimpleNamespace(shape=SMALL_SHAPE))
    monkeypatch.setattr(distill_checks, "check_cache", lambda cfg, shape: "a cache")
    cfg = replace(config({"cache": cache}), dry_run=dry_run, student=ModelConfig(path=path))
    assert (distill_checks.open_cache(cfg) == "a cache") is opened


def test_a_correction_trains_its_model_alone(monkeypatch):
    monkeypatch.setattr(correct_teacher, "check_run", lambda cfg, recipe: recipe)
    cfg = SimpleNamespace(model="m", trainer=SimpleNamespace(fp8="blockwise"))
    recipe = correct_teacher.check_correct_teacher(cfg)
    assert (recipe.verb, recipe.models, recipe.trained) == ("correct", {"model": "m"}, "model")
    assert recipe.fp8_of("model") == ("trainer.fp8", "blockwise")
    assert recipe.layout_of("model", Layout()) == Layout() and recipe.inputs == {}
    objective = recipe.objective(cfg, {"model": SimpleNamespace(shape=SMALL_SHAPE)}, Layout())
    assert objective.vocab_size == SMALL_SHAPE.vocab_size


def test_states_are_compared_where_their_loss_has_a_weight():
    beside = SimpleNamespace(chunks=["a chunk"])
    teacher = SMALL_SHAPE.resized(num_layers=3)
    assert distill.intermediate_loss(config(), teacher, SMALL_SHAPE, beside) is None
    cfg = replace(config({"intermediate": 0.5, "intermediate_layers": [[-1, -1]]}), seed=9)
    found = distill.intermediate_loss(cfg, teacher, SMALL_SHAPE, beside)
    assert found.pairs == ((-1, -1), (3, 2)) and found.teacher == ["a chunk"]
    assert (found.weight, found.seed, found.alpha) == (0.5, 9, None)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_is_built_as_its_options_say(monkeypatch, own, offload):
    """In the student's layout, or routed in one of its own."""
    made = {}
    monkeypatch.setattr(distill, "model_dtype", lambda *_: "a dtype")
    monkeypatch.setattr(distill, "fp8_fields", lambda scaling, frozen: {"fp8": scaling} if frozen else None)
    monkeypatch.setattr(distill, "build_model_chunks", lambda *given: made.update(built=given) or ["chunks"])
    monkeypatch.setattr(distill, "offload_layers", lambda chunks: made.update(offloaded=chunks))
    monkeypatch.setattr(distill, "Teacher", lambda chunks, **more: ("beside", chunks, more))
    monkeypatch.setattr(distill, "RoutedTeacher", lambda *given, **more: ("routed", given, more))
    weights = SimpleNamespace(shape=SMALL_SHAPE, fill=lambda chunks, groups: made.update(filled=(chunks, groups)))
    parallel = TeacherParallelConfig(tensor=2 if own else None)
    loss = {"teacher_parallel": parallel, "teacher_ahead": 3, "teacher_offload": offload, "teacher_head_fp8": True}
    cfg = replace(config({**loss, "teacher_fp8": "tensorwise"}, cuda_graphs=True), teacher=ModelConfig(engine="te"))
    layout = Layout(pipeline=2, world_size=4)
    kind, given, more = distill.build_teacher(cfg, weights, layout)
    how = {"head_fp8": True, "graphs": True}
    if own:
        other = Layout(tensor=2, pipeline=2, world_size=4)
        assert (kind, given) == ("routed", (weights, other, layout, "a dtype", "te", 3))
        assert more == {**how, "fp8": {"fp8": "tensorwise"}, "offload": offload} and not made
        return
    assert (kind, given, more) == ("beside", ["chunks"], {**how, "pipelined": True, "ahead": 3})
    assert made["built"] == (SMALL_SHAPE, layout, "a dtype", "te", {"fp8": "tensorwise"})
    assert made["filled"] == (["chunks"], None) and made.get("offloaded") == (["chunks"] if offload else None)
