"""Options that were given and cannot have their effect are said, or refused, before the run; defaults that do not fit adapt."""

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minitron_megatron import launcher
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import CommandConfig, DistillConfig, ImportanceConfig, OptimConfig
from minitron_megatron.config import options as options_of
from minitron_megatron.effects import beside, including, is_set, only_with, typed, value_of, without
from minitron_megatron.errors import UserError
from minitron_megatron.idle import adapted_defaults, given_options, idle_options
from minitron_megatron.train.schedule import Schedule

REQUIRED = {
    "distill": "teacher=t student=s data.path=d trainer.steps=100",
    "correct_teacher": "model=t data.path=d trainer.steps=100",
    "cache_teacher": "teacher=t data.path=d trainer.steps=100",
    "prune": "model=t",
    "search": "model=t",
    "layers": "model=t data.path=d",
    "evaluate": "model=t",
    "importance": "model=t data.path=d",
    "import_hf": "hf=h",
    "export_hf": "model=t",
    "prepare_data": "input=a.jsonl model=t",
    "throughput": "models={a:x}",
    "compress": "model=t data.path=d",
    "distill_candidates": "found=f data.path=d",
    "submit": "command=x",
    "random_model": "model=llama3_1_8b",
    "benchmark": "model=llama3_1_8b",
}
# What is typed, and how the line about it ends; nothing where there is an effect.
SAID = [
    ("distill", "optim.warmup_steps=101", "101 are its warm-up: it never reaches optim.lr=0.0001"),
    ("distill", "optim.warmup_steps=100", "100 are its warm-up: it has in its last step alone optim.lr=0.0001"),
    ("distill", "optim.warmup_tokens=1e9", "are its warm-up: it never reaches optim.lr=0.0001"),
    ("distill", "optim.warmup_steps=99", None),
    ("distill", "optim.warmup_tokens=1e5 optim.warmup_steps=3", "optim.warmup_tokens=100000.0 stands in its place"),
    ("distill", "optim.decay_steps=7", "it is for optim.schedule=wsd, and here optim.schedule=cosine"),
    ("distill", "optim.decay_steps=7 optim.schedule=wsd", None),
    (
        "distill",
        "optim.decay_share=0.3 optim.decay_tokens=1e5 optim.schedule=wsd",
        "optim.decay_tokens=100000.0 stands",
    ),
    ("distill", "optim.min_lr=1e-6 optim.schedule=constant", "here optim.schedule=constant"),
    ("correct_teacher", "optim.decay_shape=linear optim.schedule=linear", "here optim.schedule=linear"),
    ("distill", "optim.decay_embeddings=false optim.weight_decay=0", "optim.weight_decay=, which is not set here"),
    ("distill", "distill.top_k=50", "it is for distill.loss=topk_kl, and here distill.loss=forward_kl"),
    ("distill", "distill.top_k=1000", "and here distill.loss=forward_kl"),
    ("distill", "distill.top_k=50 distill.loss=topk_kl", None),
    ("distill", "distill.jsd_beta=0.3 distill.loss=topk_kl", "it is for distill.loss=jsd"),
    ("distill", "distill.intermediate_layers=[[-1,-1]]", "distill.intermediate=, which is not set here"),
    ("distill", "distill.intermediate_layers=[[-1,-1]] distill.intermediate=1", None),
    ("distill", "distill.teacher_ahead=4", "here the teacher runs with each micro-batch"),
    ("distill", "distill.teacher_ahead=4 parallel.pipeline=2", None),
    ("distill", "trainer.recompute_num_layers=4", "it is for trainer.recompute=full"),
    ("distill", "trainer.recompute_modules=[mlp] trainer.recompute=full", "it is for trainer.recompute=selective"),
    ("distill", "trainer.stop_after=100", "the run ends with step 100 in any case"),
    ("distill", "trainer.stop_after=99", None),
    ("distill", "trainer.validation_interval=5 trainer.validation_samples=0", "which is not set here"),
    ("distill", "trainer.start_with=weights", "trainer.start_from=, which is not set here"),
    ("distill", "guard.window=3 guard.enabled=false", "guard.enabled=, which is not set here"),
    ("distill", "guard.loss_factor=2 guard.window=200", "before guard.window=200, and the run has 100"),
    ("distill", "logger.project=x logger.wandb=disabled", "here logger.wandb=disabled"),
    ("distill", "parallel.sequence=true", "it splits the tokens over parallel.tensor, which is 1"),
    ("evaluate", "parallel.account_for_loss=true tasks=[a]", "over parallel.pipeline, which is 1"),
    ("evaluate", "samples=8 tasks=[a]", "it is for data.path=, which is not set here"),
    ("evaluate", "data.sequence_length=64 tasks=[a]", "it is for data.path=, which is not set here"),
    ("evaluate", "fewshot=5 data.path=d", "it is for tasks=, which is not set here"),
    ("layers", "normalization=bytes", "it is for questions= or tasks=, which are not set here"),
    ("prune", "prune.keep_last_layers=2", "no layers go: it is for target.num_layers="),
    ("prune", "prune.keep_last_layers=2 target.num_layers=3", None),
    ("evaluate", "parallel.tensor=2 data.path=d hf=h", "hf=h stands in its place"),
    ("search", "prune.judge=bi", "it is for layers=, which is not set here"),
    ("prune", "samples=8 scores=s", "scores=s stands in its place"),
    ("prune", "importance.batch=mean plan=p", "plan=p stands in its place"),
    ("import_hf", "precision=fp32", "import_hf does not use it"),
    ("export_hf", "parallel.tensor=2", "export_hf does not use it"),
    ("random_model", "seed=7", None),
    ("throughput", "vllm.python=/x", "it is for vllm in engine="),
    ("throughput", "vllm.python=/x engine=[vllm]", None),
    ("compress", "perplexity=false evaluate={samples:8}", "it is for perplexity=true, and here perplexity=false"),
    ("compress", "budget.at_least=0.5 target.num_layers=2", "budget.tokens_per_second=, which are not set here"),
    ("compress", "budget.at_least=0.5 budget.parameters=9", None),
    ("search", "budget.batch=5 budget.parameters=9", "it is for budget.memory_gib=, which is not set here"),
    ("search", "budget.batch=5 budget.weight_bytes=1 budget.cache_bytes=1 budget.context=9 budget.memory_gib=9", None),
    ("search", "budget.context=9 budget.flops_per_token=9", None),
    (
        "search",
        "budget.context=9 budget.parameters=9",
        "budget.memory_gib= or budget.flops_per_token=, which are not set",
    ),
    ("distill_candidates", "cache=false cache_teacher={chunk_samples:8}", "it is for cache=true, and here cache=false"),
    ("submit", "cluster.mounts=[a:b]", "it is for cluster.container=, which is not set here"),
    ("benchmark", "step.micro_batches=4", "it is for measure=step or measure=scaling, and here measure=importance"),
]


def lines_of(name, words, monkeypatch):
    """What is said of a command's words, composed as it would be."""
    said = []
    monkeypatch.setattr(launcher.log, "info", lambda form, line: said.append(line))
    launcher._say_once.cache_clear()
    import hydra

    with hydra.initialize_config_dir(str(launcher.CONF), version_base="1.3"):
        launcher.compose(name, [*REQUIRED[name].split(), *words.split(), "output=o"])
    return said


@pytest.mark.parametrize(("name", "words", "ends"), SAID, ids=[f"{name} {words}" for name, words, _ in SAID])
def test_an_option_without_effect_is_said(name, words, ends, monkeypatch):
    said = lines_of(name, words, monkeypatch)
    if ends is None:
        assert said == []
        return
    first = words.split()[-1 if words.startswith(("optim.warmup_tokens=1e5", "perplexity", "cache=")) else 0]
    (line,) = [line for line in said if line.startswith(f"{name}: {first.partition('=')[0]}")]
    assert " has no effect: " in line and ends in line


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        (
            "prune",
            "drop_layers=[0] layers=/no/such",
            r"layers=/no/such: drop_layers=\[0\] stands in its place: leave one",
        ),
        ("distill", "student.num_layers=1", "student.num_layers=1: student=s is a folder, whose sizes are its own"),
        ("export_hf", "model.vocab_size=9", "model.vocab_size=9: model=t is a folder"),
        ("evaluate", "teacher=u teacher.dtype=float32 data.path=d", "teacher.dtype=float32: teacher=u is a folder"),
    ],
)
def test_what_contradicts_is_refused(name, words, says, monkeypatch):
    with pytest.raises(UserError, match=says):
        lines_of(name, words, monkeypatch)


def test_sizes_beside_a_preset_are_what_they_say(monkeypatch):
    assert lines_of("random_model", "model.num_layers=2", monkeypatch) == []


def test_a_command_says_it_before_it_checks(monkeypatch, caplog, tmp_path):
    """As typed: by the command itself, before the mistake that ends it."""
    monkeypatch.setattr(launcher, "start_logging", lambda: None)
    words = [f"teacher={tmp_path}", f"student={tmp_path}", f"data.path={tmp_path}", "trainer.steps=20"]
    monkeypatch.setattr(sys, "argv", ["distill", *words, "distill.top_k=9", f"output={tmp_path / 'o'}"])
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match="manifest"):
        launcher.command(COMMANDS["distill"])
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("distill.top_k=9 has no effect")]
    assert "optim.warmup_steps=10, half of the run's 20 steps, rather than 40" in said


def test_the_default_of_the_warm_up_follows_the_steps():
    def warmup(steps, **given):
        return Schedule.of_run(OptimConfig(**given), steps, 100).warmup

    assert [warmup(steps) for steps in (1, 2, 20, 79, 80, 81, 1000)] == [0, 1, 10, 39, 40, 40, 40]
    assert warmup(20, warmup_steps=40) == 40 and warmup(20, warmup_tokens=500.0) == 5
    for steps in range(1, 100):
        rates = [Schedule.of_run(OptimConfig(schedule="wsd"), steps, 100).learning_rate(k) for k in range(steps)]
        assert max(rates) == pytest.approx(1e-4) or steps < 3


def test_every_condition_can_be_asked_of_every_command():
    """Of a command's defaults, in which nothing is given, and with one option at a time: a line, or none, never a mistake."""
    for command in COMMANDS.values():
        if not issubclass(command.config, CommandConfig):
            continue
        config = command.config()
        assert idle_options(config, given_options(config, ()), command.name) == []
        assert adapted_defaults(config) == []
        for one in options_of(command.config):
            for effect in one.when:
                assert effect.lacks(config) is None or isinstance(effect.lacks(config), str)
            group = one.name.partition(".")[0]
            assert group not in config.unread or hasattr(config, group)
            assert value_of(config, one.name) == one.default


def test_a_size_of_a_preset_beside_a_folder_was_not_typed():
    """An experiment brings a student's preset; the folder that is typed stands for it."""
    config = COMMANDS["distill"].config()
    config = replace(config, student=replace(config.student, path="s", num_layers=4))
    given = given_options(config, ("student",))
    assert "student.num_layers" in given and idle_options(config, given, "distill") == []


# What an option needs, one condition at a time


@pytest.mark.parametrize(
    ("value", "is_one"),
    [(None, False), (False, False), (0, False), (0.0, False), ("none", False), ([], False), ({}, False), (True, True), (1, True),
     (-1, True), ("", True), ("x", True), ([0], True), ({"a": None}, True)],
)  # fmt: skip
def test_what_counts_as_set(value, is_one):
    assert is_set(value) is is_one


@pytest.mark.parametrize(
    ("value", "word"), [(None, "null"), (True, "true"), (False, "false"), (0, "0"), ("a b", "a b"), ([1], "[1]")]
)
def test_values_as_they_are_typed(value, word):
    assert typed(value) == word


def holding(**values) -> SimpleNamespace:
    return SimpleNamespace(a=SimpleNamespace(**values))


@pytest.mark.parametrize(
    ("effect", "given", "lacks"),
    [
        (only_with("a.x", True), holding(x=True), None),
        (only_with("a.x", True), holding(x=False), "it is for a.x=true, and here a.x=false"),
        (only_with("a.x", "p", "q"), holding(x="q"), None),
        (only_with("a.x", "p", "q"), holding(x=None), "it is for a.x=p or a.x=q, and here a.x=null"),
        (including("a.x", "p", "q"), holding(x=["o", "q"]), None),
        (including("a.x", "p", "q"), holding(x=["o"]), "it is for p or q in a.x=, and here a.x=['o']"),
        (beside("a.x"), holding(x=3), None),
        (beside("a.x"), holding(x=0), "it is for a.x=, which is not set here"),
        (beside("a.x", "a.y"), holding(x=None, y=1), None),
        (beside("a.x", "a.y"), holding(x=None, y="none"), "it is for a.x= or a.y=, which are not set here"),
        (without("a.x", "a.y"), holding(x=None, y=False), None),
        (without("a.x", "a.y"), holding(x=None, y=True), "a.y=true stands in its place: leave one of them out"),
    ],
)
def test_what_an_option_needs_of_others(effect, given, lacks):
    assert effect.lacks(given) == lacks
    assert not effect.refused and without("a.x", refused=True).refused


def test_what_was_given_was_typed_or_is_no_default():
    config = ImportanceConfig(output="o", seed=CommandConfig.seed + 1, samples=ImportanceConfig.samples)
    found = given_options(config, {"samples", "trainer.micro_batch_size", "data.path"})
    assert {"seed", "output", "samples", "trainer.micro_batch_size"} <= found and "device" not in found
    config.trainer.micro_batch_size = 0
    assert "trainer.micro_batch_size" in given_options(config, set())


@pytest.mark.parametrize(
    ("steps", "warmup", "tokens", "lines"),
    [
        (20, None, None, ["optim.warmup_steps=10, half of the run's 20 steps, rather than 40"]), (79, None, None, 1),
        (80, None, None, 0),
        (20, 10, None, 0), (20, None, 100, 0), (None, None, None, 0),
    ],
)  # fmt: skip
def test_a_warm_up_that_was_adapted_is_said(steps, warmup, tokens, lines):
    config = DistillConfig(output="o", optim=OptimConfig(warmup_steps=warmup, warmup_tokens=tokens))
    config.trainer.steps = steps
    found = adapted_defaults(config)
    assert found == lines if isinstance(lines, list) else len(found) == lines
    assert adapted_defaults(ImportanceConfig(output="o")) == []
