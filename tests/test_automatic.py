"""Options that are auto by default: for every reason what auto becomes, and what an explicit true is told."""

import json
from dataclasses import replace

import pytest
import yaml

from minitron_megatron.automatic import (
    GATHER,
    GRAPHS,
    REDUCE,
    Built,
    Choice,
    Obstacle,
    agreed,
    began_without,
    choose,
    choose_graphs,
    choose_overlaps,
    decided,
    graph_obstacles,
    graph_obstacles_of_machine,
    is_on,
    memory_obstacle,
    reasons_of,
    said,
    tokenising_processes,
)
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import (
    AUTO,
    CorrectTeacherConfig,
    DdpConfig,
    DistillConfig,
    DistillOptions,
    TrainerConfig,
    TrainingDataConfig,
    check,
    flat,
    options,
)
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose, resolved_config
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.distill import distill
from minitron_megatron.train.foresee import RESERVED_GIB, Models, forecast
from tests.test_foresee import hydra  # noqa: F401 (fixture)
from tests.test_teachers import options as run_options
from tests.test_teachers import sources  # noqa: F401 (fixture)

ON_GPU = [Built("teacher", "te", True), Built("student", "te", True)]


def training(length=128, distill=None, ddp=None, **trainer):
    return DistillConfig(
        output="x",
        data=TrainingDataConfig(path="x", sequence_length=length),
        trainer=TrainerConfig(**trainer),
        ddp=DdpConfig(**(ddp or {})),
        distill=DistillOptions(**(distill or {})),
    )


def not_asked():
    raise AssertionError("memory was foreseen though something else speaks against graphs")


# how the run differs, its layout, models, environment, the run that it continues, what is foreseen; the reason, and whether
# an explicit true is an error
REASONS = {
    "recomputed": ({"recompute": "full"}, Layout(), "trainer.recompute=full computes whole layers again", True),
    "length": ({"length": 1000}, Layout(), "data.sequence_length=1000 is no multiple of 128", True),
    "length of context": ({"length": 640}, Layout(context=2, world_size=2), "640 is no multiple of 512", True),
    "intermediate": ({"distill": {"intermediate": 0.5}}, Layout(), "distill.intermediate has work to do between", True),
    "offload": (
        {"distill": {"teacher_offload": True}},
        Layout(),
        "distill.teacher_offload has work to do between",
        True,
    ),
    "transfers": (
        {"tp_comm_overlap": True},
        Layout(tensor=2, sequence=True, world_size=2),
        "trainer.tp_comm_overlap=true does not go with graphs",
        True,
    ),
    "pipeline": ({}, Layout(pipeline=2, world_size=2), "every micro-batch of a step has graphs of its own", False),
}


@pytest.mark.parametrize(("how", "layout", "reason", "is_error"), REASONS.values(), ids=REASONS)
def test_what_the_options_say_against_graphs(how, layout, reason, is_error):
    cfg = training(**how)
    found = choose_graphs(cfg, layout, ON_GPU, {}, not_asked)
    assert not found.value and reason in found.reason and "\n" not in str(found)
    asked = replace(cfg, trainer=replace(cfg.trainer, cuda_graphs=True))
    if is_error:
        with pytest.raises(UserError) as error:
            choose_graphs(asked, layout, ON_GPU, {}, not_asked)
        assert str(error.value).startswith(f"{GRAPHS}=true, but ") and reason in str(error.value)
    else:
        assert choose_graphs(asked, layout, ON_GPU, {}, not_asked).value
    refused = replace(cfg, trainer=replace(cfg.trainer, cuda_graphs=False))
    assert not choose_graphs(refused, layout, ON_GPU, {}, not_asked).value


@pytest.mark.parametrize(
    ("built", "environment", "reason"),
    [
        ([Built("student", "local", True)], {}, "the student has Megatron's local layers"),
        ([Built("student", "te", True), Built("teacher", "te", False)], {}, "the teacher has float32"),
        (ON_GPU, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True"),
        (ON_GPU, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True"),
    ],
)
def test_what_a_machine_says_against_graphs_is_an_error_where_they_are_asked_for(built, environment, reason):
    found = list(graph_obstacles_of_machine(built, environment))
    assert found and reason in found[0].reason
    assert not choose(GRAPHS, AUTO, found, "").value and not choose(GRAPHS, False, found, "").value
    with pytest.raises(UserError, match=r"^trainer\.cuda_graphs=true, but "):
        choose(GRAPHS, True, found, "")


def test_expandable_segments_are_fine_where_nccl_does_not_register_them():
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}
    assert not list(graph_obstacles_of_machine(ON_GPU, environment))


def test_graphs_are_on_where_nothing_speaks_against_them_and_memory_is_foreseen():
    on, off = Choice(GRAPHS, True, "fits"), Choice(GRAPHS, False, "does not fit")
    for layout in (Layout(), Layout(tensor=2, world_size=4), Layout(context=2, world_size=2)):
        assert choose_graphs(training(512), layout, ON_GPU, {}, lambda: on) == on
        assert choose_graphs(training(512), layout, ON_GPU, {}, lambda: off) == off
    correcting = CorrectTeacherConfig(output="x", data=TrainingDataConfig(path="x", sequence_length=512))
    assert choose_graphs(correcting, Layout(), [Built("model", "te", True)], {}, lambda: on) == on
    assert choose_graphs(training(recompute="selective"), Layout(), ON_GPU, {}, lambda: on) == on


def test_memory_speaks_against_graphs_up_to_the_last_gib():
    assert not list(memory_obstacle(80.0, 80.0))
    (found,) = memory_obstacle(80.5, 80.0)
    assert "80.5 GiB, and its GPU has 80.0" in found.reason
    assert choose(GRAPHS, True, [found], "").value and not choose(GRAPHS, AUTO, [found], "").value


def test_a_run_that_continues_goes_on_as_it_began():
    for before, value in (({}, True), ({GRAPHS: True}, True), ({GRAPHS: AUTO}, True), ({GRAPHS: False}, False)):
        against = list(began_without(GRAPHS, before))
        assert choose(GRAPHS, AUTO, against, "").value == value
        assert choose(GRAPHS, True, against, "").value and not choose(GRAPHS, False, against, "").value


DATA = Layout(tensor=2, world_size=4)


@pytest.mark.parametrize(
    ("ddp", "layout", "device", "wanted", "says"),
    [
        ({}, DATA, "cuda", (True, True), "reduced while the backward pass runs"),
        ({}, Layout(context=2, world_size=2), "cuda", (True, True), "reduced while"),
        ({}, DATA, "cpu", (False, False), "on CPUs transfers take the cores"),
        ({}, Layout(tensor=2, world_size=2), "cuda", (False, False), "there is one data-parallel rank"),
        ({"overlap_grad_reduce": False}, DATA, "cuda", (False, False), "asked for"),
        ({"overlap_param_gather": False}, DATA, "cuda", (True, False), "reduced while"),
        ({"overlap_grad_reduce": True}, DATA, "cpu", (True, False), "asked for"),
        ({"overlap_param_gather": True}, DATA, "cpu", (True, True), "asked for"),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, Layout(), "cpu", (True, True), "asked for"),
    ],
)
def test_when_data_parallel_transfers_overlap(ddp, layout, device, wanted, says):
    reduce, gather = choose_overlaps(training(ddp=ddp), layout, device, {})
    assert (reduce.value, gather.value) == wanted and says in reduce.reason


def test_weights_are_not_gathered_beside_arithmetic_unless_gradients_are_reduced_so():
    with pytest.raises(UserError, match=r"ddp\.overlap_param_gather=true.* needs ddp\.overlap_grad_reduce=true"):
        choose_overlaps(training(ddp={"overlap_grad_reduce": False, "overlap_param_gather": True}), DATA, "cuda", {})


def test_what_is_off_on_one_rank_is_off_on_all():
    on, off = Choice(GRAPHS, True, "here"), Choice(GRAPHS, False, "no Transformer Engine")
    other = Choice(REDUCE, True, "both")
    assert agreed([[on, other], [on, other]]) == [on, other]
    for ranks in ([[on, other], [off, other]], [[off, other], [on, other]]):
        graphs, reduce = agreed(ranks)
        assert not graphs.value and graphs.reason == f"on rank {ranks.index([off, other])} no Transformer Engine"
        assert reduce == other
    assert agreed([[off], [off]]) == [off]


def test_what_is_decided_and_why():
    cfg = training(ddp={"overlap_grad_reduce": False})
    choices = [Choice(GRAPHS, True, "a reason"), Choice(REDUCE, False, "asked for"), Choice(GATHER, False, "another")]
    found = decided(cfg, choices)
    assert found.trainer.cuda_graphs is True and found.ddp.overlap_param_gather is False
    assert reasons_of(cfg, choices) == {
        GRAPHS: "trainer.cuda_graphs=auto is on: a reason",
        GATHER: "ddp.overlap_param_gather=auto is off: another",
    }
    assert said(cfg, [replace(choice, value=False, reason="one rank") for choice in choices]) == [
        "trainer.cuda_graphs=auto, ddp.overlap_param_gather=auto are off: one rank"
    ]
    assert cfg.trainer.cuda_graphs == AUTO and not is_on(AUTO) and is_on(True) and not is_on(False)


def test_switches_are_words_on_every_command_line(hydra):  # noqa: F811
    base = ["teacher=t", "student=s", "data.path=d", "output=o", "trainer.steps=1"]
    assert compose("distill", base).trainer.cuda_graphs == AUTO
    for word, value in (("auto", AUTO), ("true", True), ("false", False), ("True", True)):
        cfg = compose("distill", [*base, f"trainer.cuda_graphs={word}", f"ddp.overlap_grad_reduce={word}"])
        assert cfg.trainer.cuda_graphs == value and cfg.ddp.overlap_grad_reduce == value
    with pytest.raises(UserError, match=r"cuda_graphs=atuo is not one of auto, true, false: did you mean auto\?"):
        compose("distill", [*base, "trainer.cuda_graphs=atuo"])


def test_every_switch_is_auto_by_default_and_has_its_words():
    found = [
        o for command in COMMANDS.values() for o in options(command.config) if AUTO in o.choices and True in o.choices
    ]
    assert {o.name for o in found} >= {GRAPHS, REDUCE, GATHER}
    assert all((o.default == AUTO and "auto" in o.doc) or o.name.startswith("step.") for o in found)
    for wrong in ("yes", 2, None):
        cfg = training(cuda_graphs=wrong)
        with pytest.raises(UserError, match="is not one of auto, true, false"):
            check(cfg.trainer, "trainer.")


def test_a_run_says_and_keeps_what_its_options_became_and_old_runs_go_on(sources, tmp_path, caplog, gloo):  # noqa: F811
    """Of two steps on a CPU, then the same again, then as an option of the run was before there was auto."""
    run = tmp_path / "run"
    cfg = run_options(sources, run)
    caplog.set_level("INFO", "minitron_megatron")
    gloo(1, distill, cfg)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    manifest = yaml.safe_load((run / "model" / "manifest.yaml").read_text())
    for config in (kept, manifest["config"]):
        assert {flat(config)[name] for name in (GRAPHS, REDUCE, GATHER)} == {False}
    assert manifest["automatic"][GRAPHS].endswith("the teacher has Megatron's local layers")
    assert manifest["automatic"][REDUCE].startswith("ddp.overlap_grad_reduce=auto is off: ")
    # Done already, whatever is said of the machine's part.
    for value in (False, AUTO):
        asked = replace(cfg, ddp=replace(cfg.ddp, overlap_grad_reduce=value))
        gloo(1, distill, asked)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2, 3]


def models_of(teacher, student):
    return Models(student, "te", teacher, "te", lambda layout: layout)


def preset(name):
    cfg = compose("random_model", [f"model={name}", "output=x"])
    return ModelShape.from_dict(cfg.model.sizes("model"), "model")


@pytest.mark.parametrize("layers", [8, 32])
def test_a_dry_run_decides_as_the_run_will_and_gives_graphs_up_where_they_do_not_fit(hydra, layers):  # noqa: F811
    """On a GPU that has just what a rank takes with graphs; and on one that has a little less, where the run without fits."""
    teacher, student = (
        replace(preset(name), num_layers=layers) for name in ("llama3_1_8b", "llama3_1_minitron_4b_width")
    )
    words = ["experiment=llama3_1_minitron_4b_width", "parallel.world_size=8", "parallel.tensor=1"]
    layout, models = Layout(world_size=8), models_of(teacher, student)

    def found(*more):
        return forecast(compose("distill", [*words, *more]), layout, models)

    with_graphs = found("trainer.cuda_graphs=true").gib
    without = found("trainer.cuda_graphs=false").gib
    assert with_graphs > without
    roomy = found(f"cluster.memory_gib={with_graphs + RESERVED_GIB + 0.01}")
    tight = found(f"cluster.memory_gib={with_graphs + RESERVED_GIB - 0.01}")
    assert roomy.graphs.value and roomy.gib == with_graphs and roomy.fits
    assert not tight.graphs.value and tight.gib == without and tight.fits and "would take" in tight.graphs.reason
    asked = found(f"cluster.memory_gib={with_graphs + RESERVED_GIB - 0.01}", "trainer.cuda_graphs=true")
    assert asked.plan.cuda_graphs and not asked.fits


def test_obstacles_name_what_to_do_only_where_true_is_refused():
    hard, soft = Obstacle("a", "do b"), Obstacle("c")
    with pytest.raises(UserError, match=r"^x=true, but a: do b$"):
        choose("x", True, [soft, hard], "")
    assert choose("x", AUTO, [soft, hard], "") == Choice("x", False, "c")
    assert choose("x", True, [soft], "") == Choice("x", True, "asked for")
    assert choose("x", AUTO, [], "because") == Choice("x", True, "because")


def test_obstacles_of_options_come_in_one_order():
    """The reason that is said is the first."""
    cfg = training(length=1000, recompute="full")
    assert [o.reason.partition(" ")[0] for o in graph_obstacles(cfg, Layout())] == [
        "trainer.recompute=full",
        "data.sequence_length=1000",
    ]
    assert resolved_config(cfg)["trainer"]["cuda_graphs"] == AUTO


def test_as_many_processes_tokenise_as_have_work_and_a_core():
    mb = 1_000_000
    for size, cores, wanted in ((0, 8, 1), (15 * mb, 8, 1), (16 * mb, 8, 2), (1000 * mb, 8, 8), (10**12, 128, 32)):
        assert tokenising_processes(size, cores) == wanted
