"""Options: their defaults, the numbers and words that they take, and what is counted from them."""

import math
from dataclasses import MISSING, fields, is_dataclass
from inspect import get_annotations
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minitron_megatron import config
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import (
    DistillConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    ReportConfig,
    TrainerConfig,
    check,
    flat,
    free_options,
    model_options,
    number_of_steps,
    option,
    options,
    tokens_of_run,
    tokens_per_step,
    warmup_of,
)
from minitron_megatron.effects import ARITHMETIC, FREE, SAMPLES
from minitron_megatron.errors import UserError

KINDS = {
    name: kind
    for name, kind in vars(config).items()
    if isinstance(kind, type) and is_dataclass(kind) and name != "Option"
}
KINDS = {name: kind for name, kind in KINDS.items() if kind.__module__ == config.__name__}


def own_options(kind: type) -> dict[str, object]:
    """The default of each option that a group has of its own, before the words that it takes, where there are some."""
    inherited = getattr(kind.__mro__[1], "__dataclass_fields__", {})
    found = {}
    for one in fields(kind):
        new = one.name not in inherited or one.name in get_annotations(kind)
        if new and not config._nested(one):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            found[one.name] = [default, *one.metadata["choices"]] if one.metadata["choices"] else default
    return found


def test_defaults_are_those_that_were_written_down():
    """A default that changes is another command for whoever typed it before: tests/defaults.yaml is to change with it."""
    written = yaml.safe_load(Path(__file__).with_name("defaults.yaml").read_text())
    assert {name: own for name, kind in KINDS.items() if (own := own_options(kind))} == written


def numbers() -> dict[str, set[type]]:
    """Options of any group whose value is one number, by name, with the groups that have them."""
    found: dict[str, set[type]] = {}
    for kind in KINDS.values():
        for one in fields(kind):
            if str(one.type).replace("<class '", "").rstrip("'>").removesuffix(" | None") in ("int", "float"):
                found.setdefault(one.name, set()).add(kind)
    return found


# What may be 0, and what is bounded otherwise.
MAY_BE_ZERO = frozenset(
    """min_lr warmup_steps warmup_tokens loss_factor grad_norm_factor weight_decay clip_grad validation_interval
    validation_samples seed first_sample fewshot keep_last_layers loss_samples gpus_per_node save_seconds cross_entropy
    intermediate fp8_bf16_layers at_least layers hidden ffn heads rung warmup adam_beta1 adam_beta2""".split()
)
# Checked where they are used, with the model or the text beside them.
ELSEWHERE = frozenset(
    """virtual_pipeline head_dim max_position_embeddings rope_theta rotary_percent norm_eps validation_fraction power
    time_limit_minutes tail temperature tokens decay_tokens jsd_beta""".split()
)


@pytest.mark.parametrize("name", sorted(numbers()))
def test_numbers_are_above_zero_or_may_be_zero(name):
    (one,) = (f for f in fields(next(iter(numbers()[name]))) if f.name == name)
    whole = "int" in str(one.type)

    def refused(value: float) -> bool:
        try:
            check_with(name, value)
        except UserError as error:
            assert str(error).startswith(f"{name}={value} must ")
            return True
        return False

    assert refused(math.nan) and refused(math.inf) and refused(-(2.0**63)) and refused(2.0**63)
    if name not in ELSEWHERE:
        assert refused(-1) and refused(0) is (name not in MAY_BE_ZERO) and not refused(1 if whole else 0.5)


def check_with(name: str, value: float) -> None:
    """`check` of a group that has this option, which has this value beside the defaults of the others."""
    kind = next(iter(numbers()[name]))
    made = object.__new__(kind)
    for one in fields(kind):
        vars(made)[one.name] = one.default if one.default_factory is MISSING else one.default_factory()
    vars(made)[name] = value
    check(made)


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("adam_beta1", (0, 0.999), (1, -0.1)), ("adam_beta2", (0.0, 0.999), (1.0, -0.1)), ("seed", (0, 2**32 - 1), (2**32, -1)),
        ("jsd_beta", (0.01, 0.99), (0, 1)), ("tokens", (1, 1e12), (0.5, 0)), ("decay_tokens", (1,), (0.9,)),
        ("temperature", (0.01, 1000), (0.009, 1001)),
    ],
)  # fmt: skip
def test_numbers_with_bounds_of_their_own(name, taken, refused):
    for value in (*taken, *refused):
        if value in taken:
            check_with(name, value)
        else:
            with pytest.raises(UserError, match=f"{name}={value} must"):
                check_with(name, value)


def test_words_are_those_of_the_option_and_the_nearest_is_told():
    check(TrainerConfig(recompute="full"))
    with pytest.raises(
        UserError, match=r"^trainer.recompute=ful is not one of none, selective, full: did you mean full\?$"
    ):
        check(DistillConfig(output="x", trainer=TrainerConfig(recompute="ful")))
    with pytest.raises(UserError, match=r"cuda_graphs=zzz is not one of auto, true, false$"):
        check(TrainerConfig(cuda_graphs="zzz"))
    with pytest.raises(UserError, match=r"^output= is empty$"):
        check(EvaluateConfig(output=""))
    check(ModelConfig(family=None, dtype=None))
    check(TrainerConfig(cuda_graphs=True, keep_best=False, time_limit_minutes=None))


# What is counted


@pytest.mark.parametrize(
    ("warmup", "steps", "found"), [(None, 100, 40), (None, 80, 40), (None, 79, 39), (None, 1, 0), (0, 100, 0), (7, 3, 7)]
)  # fmt: skip
def test_a_warm_up_that_nobody_gave_is_half_of_a_short_run(warmup, steps, found):
    assert warmup_of(OptimConfig(warmup_steps=warmup), steps) == found


@pytest.mark.parametrize(
    ("steps", "tokens", "found"), [(7, None, 7), (None, 80, 1), (None, 81, 2), (None, 1.0, 1), (7, 80, None), (None, None, None)]
)  # fmt: skip
def test_steps_are_given_or_follow_from_tokens(steps, tokens, found):
    cfg = SimpleNamespace(
        trainer=SimpleNamespace(steps=steps, tokens=tokens, global_batch_size=8),
        data=SimpleNamespace(sequence_length=10),
    )
    assert tokens_per_step(cfg) == 80
    if found is None:
        assert config._steps_of(cfg) == math.inf
        with pytest.raises(UserError, match=r"give either trainer.steps= or trainer.tokens="):
            number_of_steps(cfg)
    else:
        assert (number_of_steps(cfg), tokens_of_run(cfg), config._steps_of(cfg)) == (found, 80 * found, found)


# When options have an effect


def run(**groups) -> SimpleNamespace:
    own = {"steps": 10, "tokens": None, "global_batch_size": 1, "stop_after": None} | groups.pop("trainer", {})
    optim = {"warmup_steps": None, "warmup_tokens": None, "lr": 0.5} | groups.pop("optim", {})
    others = {name: SimpleNamespace(**values) for name, values in groups.items()}
    data = SimpleNamespace(sequence_length=5)
    return SimpleNamespace(trainer=SimpleNamespace(**own), optim=SimpleNamespace(**optim), data=data, **others)


@pytest.mark.parametrize(
    ("lacks", "given", "says"),
    [
        (config._one_tensor_rank, run(parallel={"tensor": 2}), None),
        (config._one_tensor_rank, run(parallel={"tensor": 1}), "it splits the tokens over parallel.tensor, which is 1"),
        (config._one_stage, run(parallel={"pipeline": 2, "pipeline_layout": None}), None),
        (config._one_stage, run(parallel={"pipeline": 1, "pipeline_layout": None}), "parallel.pipeline, which is 1"),
        (
            config._one_stage,
            run(parallel={"pipeline": 2, "pipeline_layout": "x"}),
            "says the layers of each stage itself",
        ),
        (config._stops_no_sooner, run(), None),
        (config._stops_no_sooner, run(trainer={"stop_after": 9}), None),
        (config._stops_no_sooner, run(trainer={"stop_after": 10}), "the run ends with step 10 in any case"),
        (config._stops_no_sooner, run(trainer={"stop_after": 9, "steps": None}), None),
        (config._never_warm, run(), None),
        (config._never_warm, run(optim={"warmup_steps": 9}), None),
        (
            config._never_warm,
            run(optim={"warmup_steps": 10}),
            "10 are its warm-up: it has in its last step alone optim.lr=0.5",
        ),
        (config._never_warm, run(optim={"warmup_steps": 11}), "11 are its warm-up: it never reaches optim.lr=0.5"),
        (config._never_warm, run(optim={"warmup_steps": 3, "warmup_tokens": 46}), "10 are its warm-up"),
        (config._never_warm, run(optim={"warmup_steps": 30, "warmup_tokens": 45}), None),
        (config._window_never_full, run(guard={"window": 9}), None),
        (
            config._window_never_full,
            run(guard={"window": 10}),
            "no step is compared before guard.window=10, and the run has 10",
        ),
        (config._no_layer_chosen, run(), None),
        (config._no_layer_chosen, SimpleNamespace(drop_layers=[1]), "drop_layers= names the layers that go"),
        (config._no_layer_chosen, SimpleNamespace(drop_layers=[], target=SimpleNamespace(num_layers=3)), None),
        (
            config._no_layer_chosen,
            SimpleNamespace(drop_layers=[], target=SimpleNamespace(num_layers=None)),
            "no layers go",
        ),
        *(
            (config._of_no_batch, SimpleNamespace(measure=one), "runs no batch")
            for one in ("ceilings", "mistakes", "prune", "cut")
        ),
        (config._of_no_batch, SimpleNamespace(measure="step"), None),
    ],
)
def test_what_an_option_lacks_is_said(lacks, given, says):
    found = lacks(given)
    assert found is None if says is None else says in found


@pytest.mark.parametrize(
    ("pipeline", "own", "lacks"),
    [(1, {}, True), (2, {}, False), (1, {"tensor": 2}, False), (1, {"sequence": False}, False)],
)
def test_a_teacher_runs_ahead_of_a_pipeline_or_in_a_layout_of_its_own(pipeline, own, lacks):
    teacher = config.TeacherParallelConfig(
        **{"tensor": None, "pipeline": None, "sequence": None, "context": None, **own}
    )
    given = SimpleNamespace(
        parallel=SimpleNamespace(pipeline=pipeline), distill=SimpleNamespace(teacher_parallel=teacher)
    )
    assert bool(config._teacher_not_ahead(given)) is lacks


# What is said of options


def test_options_are_listed_with_the_required_ones_first_and_with_what_their_group_says():
    listed = {one.name: one for one in options(DistillConfig)}
    required = [name for name, one in listed.items() if one.default == config.REQUIRED and "." not in name]
    assert (
        list(listed)[: len(required)] == required
        and listed["data.path"].decides == SAMPLES
        and listed["data.path"].path
    )
    assert (listed["optim.lr"].type, listed["optim.lr"].decides, listed["model.engine" if "model.engine" in listed else
            "student.engine"].decides) == ("float", ARITHMETIC, FREE)  # fmt: skip
    nested = [name for name in listed if "." in name]
    assert list(listed)[-len(nested) :] == nested and all(one.doc for one in listed.values())


def test_a_default_that_is_a_list_is_each_ones_own():
    first, second = (TrainerConfig() for _ in range(2))
    first.recompute_modules.append("x")
    assert second.recompute_modules == ["core_attn"]
    assert option([1], "x").default_factory() == [1] and option(3, "x").default == 3
    assert option(3, "x").metadata == {
        "doc": "x",
        "choices": (),
        "decides": ARITHMETIC,
        "when": (),
        "path": False,
        "whole": False,
    }
    assert (
        config.switch("x").metadata["choices"] == ("auto", True, False)
        and config.switch("x").metadata["decides"] == FREE
    )


def test_models_and_mappings_among_options():
    assert model_options(DistillConfig) == ["teacher", "student"] and model_options(ReportConfig) == []
    assert free_options(COMMANDS["compress"].config) == [
        "prepare_data", "importance", "search", "prune", "distill", "evaluate", "export_hf",
    ]  # fmt: skip
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2} and flat({"a": {}}, "x.") == {}


def test_a_model_is_a_folder_or_a_preset():
    with pytest.raises(UserError, match=r"teacher=… must be a model folder here"):
        ModelConfig(family="llama").folder("teacher")
    with pytest.raises(UserError, match=r"model=… must be a preset of conf/model here, such as model=llama3_1_8b"):
        ModelConfig(path="m").sizes("model")
    assert ModelConfig(path="m").folder("model") == "m"
    sizes = ModelConfig(path="m", family="llama", engine="te", num_layers=3).sizes("model")
    assert (
        sizes["num_layers"] == 3 and not {"path", "engine"} & set(sizes) and len(sizes) == len(fields(ModelConfig)) - 2
    )
