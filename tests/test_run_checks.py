"""What a training checks by its options alone, and what it decides of devices, optimizers and buffers: both sides of each."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints.folder import MANIFEST
from minitron_megatron.config import (
    DistillConfig,
    DistillOptions,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
    TrainingDataConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checks, distill_checks
from minitron_megatron.train.checks import check_training, layouts_that_run, recomputation
from minitron_megatron.train.distill_checks import check_teacher
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


@pytest.mark.parametrize(
    ("changed", "layout", "taken"),
    [
        ({}, Layout(), True),
        ({"recompute": "selective", "recompute_modules": ["moe"]}, Layout(), False),
        ({"tp_comm_overlap": True}, Layout(), False),
        ({"tp_comm_overlap": True}, Layout(tensor=2, sequence=True, world_size=2), True),
        ({"cuda_graphs": True, "recompute": "full"}, Layout(), False),
        ({"fp8": "tensorwise"}, Layout(), True),
        ({"fp8": "tensorwise", "fp8_bf16_layers": 2}, Layout(), False),
        ({"length": SMALL_SHAPE.max_position_embeddings}, Layout(), True),
        ({"length": SMALL_SHAPE.max_position_embeddings + 1}, Layout(), False),
        ({"length": 34}, Layout(context=2, world_size=2), False),
        ({"lr": 1e-6}, Layout(), False),
        ({}, Layout(pipeline=8, world_size=8), False),
    ],
)
def test_every_check_of_a_training_is_made(changed, layout, taken):
    changed, data = dict(changed), {}
    if "length" in changed:
        data = {"data": TrainingDataConfig(path="data", sequence_length=changed.pop("length"))}
    if "lr" in changed:
        data = {"optim": OptimConfig(lr=changed.pop("lr"), min_lr=1e-5)}
    assert refused(check_training, SHAPES, replace(config(**changed), **data), layout) != taken


def test_tokens_in_fp8_are_those_of_a_micro_batch_on_a_rank(monkeypatch):
    asked = []
    for module in (checks, distill_checks):
        monkeypatch.setattr(module, "check_fp8", lambda *given: asked.append(given))
    cfg = config({"teacher_fp8": "blockwise"}, micro_batch_size=4, fp8="tensorwise", fp8_bf16_layers=1)
    layout = Layout(context=2, world_size=2)
    check_training(SHAPES, cfg, layout)
    check_teacher(SMALL_SHAPE, cfg, layout)
    assert asked == [
        ("trainer.fp8", "tensorwise", SMALL_SHAPE, layout, 4 * LENGTH // 2, 1),
        ("distill.teacher_fp8", "blockwise", SMALL_SHAPE, layout, 4 * LENGTH // 2),
    ]


# Models and inputs


@pytest.mark.parametrize(
    ("dry_run", "paths", "opened"), [(False, "ab", True), (True, "ab", True), (True, "a", False), (True, "", False)]
)
def test_a_run_is_checked_in_order_and_a_rehearsal_of_presets_as_far_as_it_goes(monkeypatch, dry_run, paths, opened):
    did = []

    def note(name, found=None):
        monkeypatch.setattr(checks, name, lambda *given: did.append((name, *given)) or found)

    folders = {"student": SimpleNamespace(shape=SMALL_SHAPE), "teacher": SimpleNamespace(shape="other")}
    note("_say_larger")
    note("_say_same")
    note("_shape", SMALL_SHAPE)
    note("_models", "models")
    note("_inputs", (folders, "data"))
    note("check_another")
    note("check_run_folder", {"before": 1})
    beginning = SimpleNamespace(inputs={"start_from": "6"})
    note("check_beginning", beginning)
    note("inputs_of", {"an": "input"})
    note("check_model_there")
    note("check_checkpoints")
    models = {
        name: ModelConfig(path=path) for name, path in zip(("student", "teacher"), [*paths, None, None], strict=False)
    }
    recipe = SimpleNamespace(models=models, trained="student", check=lambda *given: did.append(("check", *given)))
    cfg = replace(config(), dry_run=dry_run)
    found = checks.check_run(cfg, recipe)
    shapes, run = {"student": SMALL_SHAPE, "teacher": SMALL_SHAPE}, Path("run")
    first = [
        *(("_shape", model, name, dry_run) for name, model in models.items()),
        ("_models", recipe, shapes), ("_say_larger", "models"), ("check", shapes, found.layout),
    ]  # fmt: skip
    whole = {"an": "input", "start_from": "6"}
    rest = [
        ("_inputs", cfg, recipe), ("check_another", cfg, run), ("inputs_of", recipe, folders, "data"),
        ("check_run_folder", run, cfg, {"an": "input"}),
        ("check_beginning", cfg, run, SMALL_SHAPE, found.layout, {"an": "input"}), ("_say_same", recipe, folders),
        ("check_model_there", run, whole),
        ("check_checkpoints", run / "checkpoints", cfg, found.layout, SMALL_SHAPE, whole),
    ]  # fmt: skip
    assert did == [*first, *(rest if opened else [])] and found.steps == 4
    assert (found.folders, found.data) == ((folders, "data") if opened else (None, None))
    assert (found.before, found.beginning, found.inputs) == (
        ({"before": 1}, beginning, whole) if opened else ({}, None, {})
    )


@pytest.mark.parametrize("validation", [0, 3])
def test_all_that_a_run_reads_is_looked_at(monkeypatch, validation):
    """Weights of every model, data for the one that is trained, and that there are enough of them."""
    did = []
    for name in ("check_weights", "check_same_tokenizer", "check_enough"):
        monkeypatch.setattr(checks, name, lambda *given, name=name: did.append((name, *given)))
    monkeypatch.setattr(checks, "open_data", lambda path, split, *more: did.append((split, *more)) or split)
    monkeypatch.setattr(checks, "open_model_folder", lambda path: SimpleNamespace(path=path, shape=f"shape of {path}"))
    models = {"teacher": ModelConfig(path="t"), "student": ModelConfig(path="s")}
    cfg = config(validation_samples=validation)
    cfg = replace(cfg, data=replace(cfg.data, reset_attention_mask=True, max_epochs=2.5))
    folders, data = checks._inputs(cfg, SimpleNamespace(models=models, trained="student"))
    assert list(folders) == ["teacher", "student"] and data == "train"
    train, *later = did[2:]
    assert did[:2] == [("check_weights", folders["teacher"]), ("check_weights", folders["student"])]
    assert train[:3] == ("train", "shape of s", LENGTH)
    assert (train[3].reset_attention, train[3].end_of_document) == (True, False)
    wanted = [
        ("check_same_tokenizer", "train", {"teacher": "t", "student": "s"}),
        ("check_enough", "train", 4 * 8 * LENGTH, 2.5),
    ]
    assert later == [*wanted, *([("validation", "shape of s", LENGTH)] if validation else [])]


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


def test_inputs_are_of_models_data_and_files(monkeypatch):
    stamped = []
    monkeypatch.setattr(checks, "companion_stamps", lambda folder: stamped.append(folder.digest) or {"file t": "5"})
    folders = {name: SimpleNamespace(digest=name[0]) for name in ("teacher", "student")}
    recipe = SimpleNamespace(inputs={"cache": "4"}, trained="student")
    plain = {"cache": "4", "teacher": "t", "student": "s", "data": "3", "file t": "5"}
    assert checks.inputs_of(recipe, folders, SimpleNamespace(digest="3")) == plain and stamped == ["s"]


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
