"""What may change where a run continues, by one rule from the options; and runs that begin with another's checkpoint."""

import json
import math
import random
import re
import shlex
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.changing import decided_by, decisive, free_options
from minitron_megatron.checkpoints import folder
from minitron_megatron.checkpoints.folder import (
    check_output,
    load_yaml,
    open_model_folder,
    output_folder,
    read_manifest,
)
from minitron_megatron.checkpoints.lineage import beginning_in_words, lineage
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import CommandConfig, CorrectTeacherConfig, DistillConfig, GuardConfig, SubmitConfig
from minitron_megatron.config import options as options_of
from minitron_megatron.effects import ARITHMETIC, FREE, LENGTH, PUBLISHED, SAMPLES, value_of
from minitron_megatron.errors import UserError
from minitron_megatron.models.fp8 import ScalesBefore
from minitron_megatron.report.folders import find
from minitron_megatron.report.lineage import trace
from minitron_megatron.report.training import _summary
from minitron_megatron.train import saved
from minitron_megatron.train.begin import check_beginning
from minitron_megatron.train.checks import check_run_folder
from minitron_megatron.train.distill_checks import check_distill
from minitron_megatron.train.guard import SpikeGuard
from tests.pool import WorkerError
from tests.test_train import (  # noqa: F401
    STEPS,
    checkpoints,
    exit_code,
    lines,
    options,
    sources,
    untimed,
    with_validation_losses,
)
from tests.tiny import model_option

DOCS = Path(__file__).parents[1] / "docs" / "continuing.md"


def with_option(cfg, name, value):
    """The config with one option, by its dotted name, of another value."""
    first, _, rest = name.partition(".")
    return replace(cfg, **{first: with_option(getattr(cfg, first), rest, value) if rest else value})


def another(one, value):
    """Some other value of an option's type."""
    if one.choices:
        return next(choice for choice in one.choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else 7 if "int" in one.type or "float" in one.type else f"{value}x"


# The rule


def test_the_page_has_what_stands_beside_the_options():
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0] in (SAMPLES, ARITHMETIC, LENGTH, PUBLISHED, FREE):
            rows[cells[0]] = re.findall(r"`([\w.*]+)`", cells[1])
    assert len(rows) == 5
    named = {name: kind for kind, names in rows.items() for name in names if not name.endswith("*")}
    groups = {name[:-1]: kind for kind, names in rows.items() for name in names if name.endswith("*")}
    told = {**decided_by(CorrectTeacherConfig), **decided_by(DistillConfig)}
    assert set(named) <= set(told)
    # The longest group that has it counts, as distill.teacher_parallel.* before distill.*.
    for name, kind in told.items():
        group = max((one for one in groups if name.startswith(one)), key=len, default=None)
        assert named.get(name, groups.get(group)) == kind, name


def test_every_option_that_changes_is_refused_or_not_by_what_it_decides(tmp_path, monkeypatch):
    """Each option of a training in turn, on an unfinished run and on a finished one; those of the cases by name."""
    for module in (saved, folder):
        monkeypatch.setattr(module, "load_yaml", cache(load_yaml))
    cfg = DistillConfig(output=str(tmp_path / "run"))
    cfg.trainer.steps, cfg.data.path = 6, "data"
    run, refused = tmp_path / "run", {}
    (run / "checkpoints").mkdir(parents=True)
    write_config(run, cfg)
    for finished in (False, True):
        if finished:
            with output_folder(
                run / "model", command="x", config=asdict(cfg), inputs={}, resume=True, free=free_options(DistillConfig)
            ):
                pass
        for one in options_of(DistillConfig):
            if one.name == "resume":
                continue
            other = with_option(cfg, one.name, another(one, value_of(cfg, one.name)))
            try:
                check_run_folder(run, other)
                check_output(
                    run / "model", config=asdict(other), inputs={}, resume=True, free=free_options(DistillConfig)
                )
                refused[one.name, finished] = ""
            except UserError as error:
                refused[one.name, finished] = str(error)
    for (name, finished), said in refused.items():
        kind = decided_by(DistillConfig)[name]
        stays = kind in (SAMPLES, ARITHMETIC) or (finished and kind in (LENGTH, PUBLISHED)) or name == "trainer.tokens"
        assert bool(said) == stays, (name, finished, said)
        assert not said or f"{name}=" in said, said
    assert "remove" in refused["trainer.publish", True] and "is finished" in refused["trainer.steps", True]
    asked = "stop_after time_limit_minutes keep_last micro_batch_size validation_interval".split()
    assert not any(refused[f"trainer.{name}", finished] for name in asked for finished in (False, True))
    assert refused["student.engine", True] == refused["student.engine", False] == ""
    assert "holds a run with ddp.grad_reduce_in_fp32=true, not false" in refused["ddp.grad_reduce_in_fp32", False]


def test_what_is_inside_of_an_option_is_what_the_option_decides(tmp_path):
    """Options may be mappings, as rope_scaling of a published shape: a run with one goes on, and another one is refused."""
    for command in COMMANDS.values():
        if issubclass(command.config, CommandConfig):
            for name, kind in list(decided_by(command.config).items()):
                assert decided_by(command.config)[f"{name}.inside.of"] == kind
    with pytest.raises(KeyError):
        decided_by(DistillConfig)["none"]
    scaling = {"factor": 8.0, "low_freq_factor": 1.0}
    cfg = DistillConfig(output=str(tmp_path / "run"))
    cfg.teacher.rope_scaling, cfg.student.rope_scaling = dict(scaling), dict(scaling)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_config(tmp_path / "run", cfg)
    assert check_run_folder(tmp_path / "run", cfg)["teacher.rope_scaling.factor"] == 8.0
    cfg.teacher.rope_scaling["factor"] = 4.0
    with pytest.raises(UserError, match=r"holds a run with teacher\.rope_scaling\.factor=8\.0, not 4\.0"):
        check_run_folder(tmp_path / "run", cfg)
    assert decisive({"a": {"b": {"c": 1}, "bc": 2}}, frozenset({"a.b"})) == {"a.bc": 2}


def write_config(run, cfg):
    import yaml

    (run / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))


def test_a_name_is_free_in_all_commands_or_in_none_but_where_time_is_measured():
    found = {}
    for command in COMMANDS.values():
        if issubclass(command.config, CommandConfig) and not command.config.measures_time:
            for name, kind in decided_by(command.config).items():
                found.setdefault(name, set()).add(kind == FREE)
    # A cluster is where a job runs, and for submit what is asked of it; a compression chooses its steps by max_epochs.
    others = {name for name in decided_by(SubmitConfig) if name.startswith("cluster.") and len(found[name]) > 1}
    assert {name for name, kinds in found.items() if len(kinds) > 1} == {*others, "data.max_epochs"}


def test_other_outputs_follow_the_same_rule(tmp_path):
    """What runs a model may run it otherwise; what measures seconds may not; a refusal names the option."""

    def made(name, **values):
        kind = COMMANDS[name].config
        cfg = kind(output=str(tmp_path / name))
        with output_folder(
            cfg.output, command=name, config=asdict(cfg), inputs={}, resume=True, free=free_options(kind)
        ):
            pass
        for option, value in values.items():
            cfg = with_option(cfg, option.replace("__", "."), value)
        check_output(cfg.output, config=asdict(cfg), inputs={}, resume=True, free=free_options(kind))

    made("importance", trainer__micro_batch_size=4, model__engine="local", parallel__tensor=2, device="cpu")
    made("prepare_data", workers=3)
    for name, option, value in (
        ("evaluate", "samples", 3),
        ("throughput", "parallel__tensor", 2),
        ("submit", "cluster__time", "1:00"),
    ):
        told = option.replace("__", ".")
        with pytest.raises(UserError, match=rf"made with other options or inputs \({told}=\S+, not {value}\)"):
            made(name, **{option: value})


# Against itself

# Free options that a run on one CPU can have otherwise, with values to draw from; what is left is named below.
DRAWN = {
    "trainer.micro_batch_size": [1, 4, 8],
    "trainer.validation_interval": [0, 1, 2],
    "trainer.save_interval": [1, 3, 100],
    "trainer.keep_last": [1, 3],
    "trainer.keep_best": [True],
    "trainer.checkpoint_format": ["dp_reshardable"],
    "trainer.async_save": [True],
    "trainer.parallel_save": [False],
    "trainer.parallel_load": [True],
    "trainer.time_limit_minutes": [1000.0],
    "trainer.recompute": ["selective", "full"],
    "trainer.recompute_modules": [["mlp"], ["core_attn", "mlp"]],
    "trainer.recompute_method": ["block"],
    "trainer.recompute_num_layers": [2],
    "trainer.cuda_graphs": [False],
    "trainer.stop_after": [STEPS, 100],
    "data.max_epochs": [50.0],
    "distill.logits_mib": [1, 64],
    "distill.teacher_ahead": [1, 2],
    "student.engine": ["local"],
    "teacher.engine": ["local"],
    "ddp.bucket_size": [1000],
    "ddp.overlap_grad_reduce": [True, False],
    "ddp.overlap_param_gather": [False],
    "device": ["cpu"],
    "verify": [True],
    "logger.interval": [2],
    "logger.project": ["other"],
    "logger.name": ["other"],
    "cluster.gpu": ["a100"],
}
# Layouts are test_train's, a GPU's have tests/gpu, and of these groups one stands for all.
ELSEWHERE = (
    *"output resume dry_run logger.wandb trainer.tp_comm_overlap distill.teacher_offload".split(),
    *"parallel. distill.teacher_parallel. cluster.".split(),
)


def test_every_free_option_is_drawn_or_tried_elsewhere():
    left = {name for name in free_options(DistillConfig) - set(DRAWN) if not name.startswith(ELSEWHERE)}
    assert not left and set(DRAWN) <= free_options(DistillConfig)


def continued_otherwise(whole: DistillConfig, cases: list[tuple[int, dict]]) -> list[list[dict]]:
    """On this rank: a run that is stopped after a case's steps and goes on with its options; every run's metrics."""
    assert exit_code(whole) is None
    found = [untimed(Path(whole.output))]
    for number, (stop, changed) in enumerate(cases):
        cfg = replace(whole, output=f"{whole.output}-{number}")
        assert exit_code(with_option(cfg, "trainer.stop_after", stop)) == 0
        for name, value in changed.items():
            cfg = with_option(cfg, name, value)
        assert exit_code(cfg) is None
        found.append(untimed(Path(cfg.output)))
        # On the finished run: nothing is done again, whatever is free is as it was before.
        manifest = Path(cfg.output) / "model" / "manifest.yaml"
        made = manifest.stat().st_mtime_ns
        assert exit_code(replace(whole, output=cfg.output)) is None and manifest.stat().st_mtime_ns == made
    return found


@pytest.mark.slow
def test_a_run_that_goes_on_with_free_options_changed_has_the_same_losses(gloo, sources, tmp_path):  # noqa: F811
    """Stopped at a random step, every free option in some case; sums in another order give the losses to 1e-5."""
    draw, names, cases = random.Random(18), list(DRAWN), []
    draw.shuffle(names)
    for part in (names[i::12] for i in range(12)):
        cases.append((draw.randrange(1, STEPS), {name: draw.choice(DRAWN[name]) for name in part}))
    whole = options(sources, tmp_path / "run", validation_samples=3)
    whole.distill.intermediate = 0.5
    undisturbed, *found = gloo(1, continued_otherwise, whole, cases, timeout=500)[0]
    wanted = {line["step"]: line for line in undisturbed if "loss" in line}
    assert len(wanted) == STEPS
    for (stop, changed), run in zip(cases, found, strict=True):
        there = {line["step"]: line for line in run if "loss" in line}
        assert set(there) >= ({STEPS} if "logger.interval" in changed else set(wanted)), changed
        for step, line in there.items():
            for name in ("loss", "grad_norm", "alpha"):
                assert line[name] == pytest.approx(wanted[step][name], rel=1e-5), (stop, changed, step, name)


# What a refused step, or a figure that is none, changes


def refusing(cfg: DistillConfig, steps: list[int]) -> int | None:
    """The command on this rank, whose guard refuses these steps (from 0)."""
    takes = SpikeGuard.takes

    def taking(self, step, loss, grad_norm):
        if step in steps:
            self.skipped += 1
            return False
        return takes(self, step, loss, grad_norm)

    SpikeGuard.takes = taking
    try:
        return exit_code(cfg)
    finally:
        SpikeGuard.takes = takes


def test_a_refused_step_changes_no_alpha(gloo, sources, tmp_path):  # noqa: F811
    """A step after a refused one has α of the last that was taken; where the first is refused, the next measures its own."""
    cfg = options(sources, tmp_path / "run", steps=4, validation_samples=0)
    cfg.distill.intermediate = 0.5
    gloo(1, refusing, cfg, [2])
    found = {line["step"]: line for line in lines(tmp_path / "run")}
    ratio = {step: line["divergence"] / line["intermediate"] for step, line in found.items()}
    assert found[3]["alpha"] == pytest.approx(ratio[2], rel=1e-6)
    assert found[4]["alpha"] == pytest.approx(ratio[2], rel=1e-6) and ratio[3] != pytest.approx(ratio[2], rel=1e-4)
    first = replace(cfg, output=str(tmp_path / "first"))
    gloo(1, refusing, first, [0])
    found = {line["step"]: line for line in lines(tmp_path / "first")}
    assert found[2]["alpha"] == pytest.approx(found[2]["divergence"] / found[2]["intermediate"], rel=1e-5)


def test_a_refused_step_changes_no_scales_of_fp8():
    """Tensors stand for Transformer Engine's, in the places where it has them."""
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = ScalesBefore([chunk])
    before.remember()
    before.restore()
    for module in chunk:
        ways = ("scaling_fwd", "scaling_bwd")
        module.fp8_meta = {way: SimpleNamespace(scale=torch.ones(3), amax_history=torch.ones(8, 3)) for way in ways}
    held = [t for module in chunk for way in module.fp8_meta.values() for t in (way.scale, way.amax_history)]
    for value in (2.0, 5.0):
        for tensor in held:
            tensor.fill_(value)
        before.remember()
        for tensor in held:
            tensor.fill_(math.inf)
        before.restore()
        assert all((tensor == value).all() for tensor in held)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        pytest.param([math.nan, 5.0, 3.0], 3, id="first"),
        pytest.param([5.0, 3.0, -math.inf], 2, id="last, infinite", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_no_number_is_never_best(gloo, sources, tmp_path, losses, best):  # noqa: F811
    trainer = {"steps": 3, "validation_interval": 1, "save_interval": 1, "keep_best": True, "publish": "best"}
    cfg = options(sources, tmp_path / "run", **trainer)
    assert gloo(1, with_validation_losses, cfg, losses) == [None]
    assert saved.find_best(tmp_path / "run" / "checkpoints")[0].name == f"step_{best:08d}"


def test_without_a_number_there_is_no_best_to_publish(gloo, sources, tmp_path):  # noqa: F811
    trainer = {"steps": 2, "validation_interval": 1, "save_interval": 1, "keep_best": True, "publish": "best"}
    cfg = options(sources, tmp_path / "run", **trainer)
    with pytest.raises(WorkerError, match=r"no best checkpoint: .*trainer\.publish=last publishes the last"):
        gloo(1, with_validation_losses, cfg, [math.nan, math.nan])
    (tmp_path / "run" / "checkpoints" / "best.json").write_text('{"step": 1, "validation_loss": NaN}')
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    replace(saved.Written.read(first), figures=None).write(first)
    assert saved.find_best(tmp_path / "run" / "checkpoints") is None
    last = with_option(cfg, "trainer.publish", "last")
    assert gloo(1, exit_code, last) == [None] and (tmp_path / "run" / "model").exists()


# From a checkpoint, with other options


@pytest.fixture(scope="module")
def trained(gloo, sources, tmp_path_factory):  # noqa: F811
    """A finished run of six steps with checkpoints of steps 2, 4 and 6, and its options."""
    cfg = options(sources, tmp_path_factory.mktemp("trained") / "run", keep_last=3, validation_samples=3)
    assert gloo(1, exit_code, cfg) == [None]
    return cfg


def begun(cfg: DistillConfig, output: Path, step: int | None = None, **changed) -> DistillConfig:
    """A run that begins with a checkpoint of another, with options of other values (`__` for dots)."""
    start = cfg.output if step is None else f"{cfg.output}/checkpoints/step_{step:08d}"
    cfg = with_option(replace(cfg, output=str(output)), "trainer.start_from", start)
    for name, value in changed.items():
        cfg = with_option(cfg, name.replace("__", "."), value)
    return cfg


def test_everything_goes_on_from_a_checkpoint_of_another_run(gloo, trained, tmp_path):
    """With the same options its losses bit by bit; with a lower rate the next loss is the same, and the one after is not."""
    gloo(1, exit_code, begun(trained, tmp_path / "same", step=2))
    before = untimed(Path(trained.output))
    assert untimed(tmp_path / "same") == [line for line in before if line["step"] > 2]
    lower = begun(trained, tmp_path / "lower", step=4, optim__lr=1e-3, optim__min_lr=1e-4)
    gloo(1, exit_code, lower)
    was, now = ({x["step"]: x for x in run if "loss" in x} for run in (before, lines(tmp_path / "lower")))
    assert now[5]["loss"] == was[5]["loss"] and now[5]["lr"] < was[5]["lr"] / 5 and now[6]["loss"] != was[6]["loss"]
    manifest = read_manifest(tmp_path / "lower" / "model")
    told = manifest["started_from"]
    assert told["step"] == 4 and told["takes"] == "everything"
    assert told["options"] == {"optim.lr": [0.01, 0.001], "optim.min_lr": [0.001, 0.0001]}
    assert manifest["inputs"]["start_from"] == told["stamp"]
    # Finished, and the other run is gone: the same command has nothing to do, and needs nothing.
    assert check_distill(lower).beginning.step == 4
    moved = replace(
        lower, trainer=replace(lower.trainer, start_from=str(tmp_path / "lower")), output=str(tmp_path / "x")
    )
    again = check_beginning(with_option(moved, "trainer.steps", 9), tmp_path / "x", shape_of(trained), layout(), {})
    assert again.before["checkpoint"].endswith("step_00000004") and again.step == 6
    step = lineage(open_model_folder(tmp_path / "lower"))[0]
    assert "everything of" in step.beginning and "optim.lr=0.01, not 0.001" in step.beginning
    shown = trace(find([str(tmp_path / "lower"), trained.output])[0])
    (one,) = [folder for folder in shown.folders if folder.manifest.get("started_from")]
    assert step.beginning in _summary(shown, one)


def shape_of(cfg):
    return open_model_folder(cfg.student.path).shape


def layout():
    from minitron_megatron.parallel.layout import Layout

    return Layout()


def test_weights_alone_begin_anew_on_other_samples(gloo, sources, trained, tmp_path):  # noqa: F811
    """What they say first is what the published model says: a run of that model has the same first loss."""
    how = {"trainer__start_with": "weights", "trainer__global_batch_size": 4, "seed": 5, "trainer__steps": 2}
    gloo(1, exit_code, begun(trained, tmp_path / "warm", **how))
    plain = {name: value for name, value in how.items() if name != "trainer__start_with"}
    cfg = replace(begun(trained, tmp_path / "plain", **plain), student=model_option(Path(trained.output) / "model"))
    gloo(1, exit_code, with_option(cfg, "trainer.start_from", None))
    warm, other = (lines(tmp_path / name) for name in ("warm", "plain"))
    assert [line["step"] for line in warm] == [line["step"] for line in other]
    assert [x["loss"] for x in warm if "loss" in x] == [x["loss"] for x in other if "loss" in x]


@pytest.mark.bf16
def test_a_run_goes_on_in_another_precision(gloo, sources, tmp_path):  # noqa: F811
    """bf16 to float32, which takes the float32 weights that the optimizer had."""
    half = options(sources, tmp_path / "half", dtype="bfloat16", steps=4, validation_samples=0)
    half.precision = "bf16"
    gloo(1, exit_code, half)
    gloo(1, exit_code, begun(half, tmp_path / "single", step=2, precision="fp32"))
    was, now = ({x["step"]: x["loss"] for x in lines(tmp_path / name)} for name in ("half", "single"))
    assert set(now) == {3, 4} and now[3] == pytest.approx(was[3], rel=2e-2) and now[3] != was[3]


def test_a_run_goes_on_with_another_adam(gloo, trained, tmp_path):
    """Its own options are those of the new command, not those in the checkpoint."""
    gloo(1, exit_code, begun(trained, tmp_path / "betas", step=4, optim__adam_beta1=0.0, optim__adam_beta2=0.5))
    before, after = (
        {x["step"]: x for x in lines(run) if "loss" in x} for run in (Path(trained.output), tmp_path / "betas")
    )
    assert after[5]["loss"] == before[5]["loss"] and after[6]["loss"] != before[6]["loss"]


def test_beginnings_that_mean_nothing_are_refused(sources, trained, tmp_path):  # noqa: F811
    output = tmp_path / "new"

    def refused(words, **changed):
        with pytest.raises(UserError, match=words) as error:
            check_distill(begun(trained, output, **changed))
        assert "\n" not in str(error.value) and not output.exists()

    refused(r"run with seed=1234, not 9: .*trainer\.start_with=weights", seed=9)
    refused(r"run with trainer\.global_batch_size=8, not 16", trainer__global_batch_size=16, trainer__steps=20)
    refused("has 6 steps done, and the run has 6: raise trainer.steps=")
    refused("decay_embeddings=true, not false", optim__decay_embeddings=False, trainer__steps=20)
    refused("without distill.intermediate, whose linear", distill__intermediate=0.5, trainer__steps=20)
    refused("is of another model: ", student=model_option(sources / "teacher" / "model"), trainer__steps=20)
    refused("has no checkpoint: give a run folder", trainer__start_from=str(sources / "teacher" / "model"))
    assert check_distill(begun(trained, output, trainer__steps=20, trainer__validation_samples=2)).beginning.step == 6
    with pytest.raises(UserError, match="is the output itself"):
        check_distill(replace(begun(trained, output), output=trained.output))


@pytest.mark.parametrize("takes", ["everything", "weights"])
def test_what_was_replaced_is_another_though_its_path_is_the_same(trained, tmp_path, takes):
    """Samples go on in the same data alone; another teacher is told wherever the beginning is."""
    source = tmp_path / "source"
    shutil.copytree(trained.output, source)
    cfg = begun(replace(trained, output=str(source)), tmp_path / "run", trainer__steps=9, trainer__start_with=takes)
    assert check_distill(cfg).beginning.others == {}
    last = source / "checkpoints" / "step_00000006"
    ours = saved.Written.read(last)
    replace(ours, inputs={**ours.inputs, "teacher": "sha256:of-another-teacher"}).write(last)
    found = check_distill(cfg).beginning
    assert not any(name.startswith(("data", "teacher")) for name in found.options) and not found.keeps_judging
    assert found.others == {"teacher": ["sha256:of-another-teacher", ours.inputs["teacher"]]}
    assert "another teacher (sha256:of-another-te…, now " in beginning_in_words({"started_from": asdict(found)})
    replace(ours, inputs={**ours.inputs, "data": "sha256:of-other-data"}).write(last)
    if takes == "weights":
        assert check_distill(cfg).beginning.others == {"data": ["sha256:of-other-data", ours.inputs["data"]]}
        return
    with pytest.raises(UserError, match=r"is of a run with other data \(.*, now .*trainer\.start_with=weights"):
        check_distill(cfg)


def test_a_run_that_began_with_another_checkpoint_does_not_take_a_new_one(gloo, trained, tmp_path):
    """Killed before its first save, it begins again with the same checkpoint, and with no other that took its place."""
    source = tmp_path / "source"
    shutil.copytree(trained.output, source)
    cfg = begun(replace(trained, output=str(source)), tmp_path / "run", step=2)
    checked = check_distill(cfg)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_config(tmp_path / "run", cfg)
    checked.beginning.write(tmp_path / "run")
    assert check_distill(cfg).beginning == checked.beginning
    index = source / "checkpoints" / "step_00000002" / "format.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(UserError, match="is another checkpoint than the one that output="):
        check_distill(cfg)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(trained, tmp_path):
    """Of the same models and data, with another seed and rate, in the place of ours."""
    run = tmp_path / "run"
    shutil.copytree(trained.output, run)
    shutil.rmtree(run / "model")
    cfg = replace(trained, output=str(run))
    check_distill(cfg)
    last = run / "checkpoints" / "step_00000006"
    ours = saved.Written.read(last)
    assert ours.run == json.loads((run / "run.json").read_text())["id"] and ours.options["seed"] == 1234
    assert set(ours.figures) == {"loss", "validation_loss", "validation_perplexity"}
    theirs = {**ours.options, "seed": 7, "optim.lr": 0.1}
    replace(ours, run="theirs", options=theirs).write(last)
    with pytest.raises(
        UserError, match=r"step_00000006 is of another run \(with seed=7, not 1234, optim\.lr=0\.1, not 0\.01\)"
    ):
        check_distill(cfg)
    # To begin with it is what start_from is for; what it is of it says itself.
    found = check_distill(begun(cfg, tmp_path / "new", seed=7, trainer__steps=8)).beginning
    assert found.step == 6 and found.options["optim.lr"] == [0.1, 0.01] and "seed" not in found.options


def diverging(cfg: DistillConfig) -> str:
    """The command on this rank; what it says when its guard ends it."""
    from minitron_megatron.errors import Diverged
    from minitron_megatron.train.distill import distill

    try:
        distill(cfg)
    except Diverged as error:
        return str(error)
    return "it went on"


def test_what_is_said_of_a_divergence_can_be_followed(gloo, sources, tmp_path):  # noqa: F811
    """The words of the message, typed, make a run that goes on from the last checkpoint."""
    cfg = options(sources, tmp_path / "run", steps=8, validation_samples=0)
    cfg.guard = GuardConfig(window=3, loss_factor=1e-3, stop_after=3)
    (said,) = gloo(1, diverging, cfg)
    assert "step 6: the loss is" in said and "go on from step 4, the last that is saved" in said
    words = dict(word.split("=", 1) for word in shlex.split(said) if re.match(r"[\w.]+=", word))
    assert words == {"trainer.start_from": cfg.output, "optim.lr": "0.005", "output": f"{cfg.output}-2"}
    reason, advice = (tmp_path / "run" / "diverged.txt").read_text().splitlines()
    assert said == f"{reason}: {advice}"
    typed = replace(cfg, output=words["output"], guard=GuardConfig())
    typed = with_option(with_option(typed, "optim.lr", float(words["optim.lr"])), "trainer.start_from", cfg.output)
    assert gloo(1, diverging, typed) == ["it went on"]
    assert [line["step"] for line in lines(Path(typed.output))] == [5, 6, 7, 8]
    # Before the first checkpoint there is nothing to go on from.
    never = replace(cfg, output=str(tmp_path / "never"), trainer=replace(cfg.trainer, save_interval=100))
    never.optim.min_lr = 1e-2
    (said,) = gloo(1, diverging, never)
    assert "no step is saved: begin again with the same words but optim.lr=0.005 optim.min_lr=0.0005" in said


def test_a_run_that_grows_is_said_to(gloo, sources, trained, tmp_path):  # noqa: F811
    """trainer.steps and trainer.publish of a finished run: once its model is removed, and that is what is said."""
    run = tmp_path / "run"
    shutil.copytree(trained.output, run)
    longer = with_option(replace(trained, output=str(run)), "trainer.steps", 7)
    with pytest.raises(
        UserError, match=r"is finished, with trainer\.steps=6, not 7: remove \S+model, and the same command"
    ):
        check_distill(longer)
    shutil.rmtree(run / "model")
    gloo(1, exit_code, longer)
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 7
