"""What a teacher is checked for and built as: beside the student, in a layout of its own, or cached."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from minitron_megatron.config import ModelConfig, TeacherParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import correct_teacher, distill, distill_checks
from minitron_megatron.train.distill_checks import check_teacher, recipe_of, teacher_layout
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_run_checks import LENGTH, config


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
