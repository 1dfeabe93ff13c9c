"""What a dry run of a training prints, cell by cell, of a plan whose figures are known; and what it plans for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.automatic import GRAPHS, Choice
from minitron_megatron.config import (
    CorrectTeacherConfig,
    DistillConfig,
    DistillOptions,
    OptimConfig,
    TrainerConfig,
    TrainingDataConfig,
)
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import foresee
from minitron_megatron.train.census import Stage
from minitron_megatron.train.checks import Models
from minitron_megatron.train.foresee import Forecast
from minitron_megatron.train.memory import layers_in_cpu_memory, memory_of_stage
from minitron_megatron.train.speed import Step
from tests.test_speed import BF16, FIRST, GPU, LAST, LONG, SHAPE, TEACHER, plan

GIB = 2**30
SECONDS = {"student, forward and backward": 3.0, "teacher, forward": 1.0, "tensor parallel": 0.0, "data parallel": 1.0}


@pytest.fixture
def shown(monkeypatch):
    """{title: rows} of the tables that are printed; each row by its first cell."""
    found = {}

    def keep(title, columns, rows):
        found[title] = {"": columns, **{row[0]: list(row[1:]) for row in rows}}

    monkeypatch.setattr(foresee, "print_table", keep)
    return found


def foreseen(given, stages, tokens=1000, seconds=None, **more) -> Forecast:
    step = Step(seconds or SECONDS, {"data parallel": 3e9, "tensor parallel": 0.0}, bubble=0.25, tokens=tokens)
    return Forecast(given, stages, step, replace(GPU, **more), Choice(GRAPHS, given.cuda_graphs, "a reason"))


STORED = {"a": 2 * GIB, "b": GIB}, {"b": GIB, "c": 3 * GIB}


def test_a_job_has_its_sizes_its_tokens_and_its_files(shown):
    """A tensor that two stages have is stored once; a weight has 12 bytes of states in a checkpoint."""
    stages = [Stage(n, (replace(chunk, stored=STORED[n]),), ()) for n, chunk in enumerate((FIRST, LAST))]
    foresee._show_job(foreseen(plan(LONG), stages), 50, None)
    assert shown["would be trained"] == {
        "": ["", "value"],
        "layout": [f"{LONG}: 16 processes, 4 data-parallel ranks"],
        "student parameters": [count_parameters(SHAPE)],
        "steps": [50],
        "tokens": [50_000],
        "micro-batches of a rank and step": [6],
        "idle in the pipeline (bubble)": ["25.0%"],
        "weights on disk, GiB": [6.0],
        "checkpoint of the run, GiB": [6.0 + 6.0 / 2 * 12],
    }
    own = Layout(tensor=4, world_size=16)
    foresee._show_job(foreseen(replace(plan(LONG), teacher=TEACHER, teacher_layout=own), stages), 50, None)
    rows = shown["would be distilled"]
    assert rows["teacher's layout"] == [own] and rows["teacher parameters"] == [count_parameters(TEACHER)]


def test_memory_has_a_column_a_stage_a_row_a_kind_and_sums(shown):
    """Larger by a million, so that figures show in GiB of two places."""
    big = [replace(chunk, parameters=chunk.parameters * 10**6) for chunk in (FIRST, LAST)]
    given = replace(plan(LONG), teacher=TEACHER)
    stages = [Stage(n, (chunk,), (chunk,)) for n, chunk in enumerate(big)]
    found = foreseen(given, stages, memory_gib=500)
    foresee._show_memory(found)
    (title, rows), *_ = shown.items()
    memory = [memory_of_stage(stage, given) for stage in stages]
    assert found.memory == memory
    for kind in memory[0]:
        assert rows[kind] == [round(one[kind] / GIB, 2) for one in memory]
    fullest = max(sum(one.values()) for one in memory) / GIB
    assert found.gib == fullest and rows[""] == ["", "stage 0", "stage 1"]
    assert rows["all"] == [round(sum(one.values()) / GIB, 2) for one in memory] and max(rows["all"]) > min(rows["all"])
    assert title == f"GiB of a rank on h100 ({500 - 6 - fullest:.1f} GiB left)"
    for kind, recompute in (("with selective", "selective"), ("with full", "full")):
        other = replace(given, how=replace(BF16, recompute=recompute))
        wanted = [round(sum(memory_of_stage(stage, other).values()) / GIB, 2) for stage in stages]
        assert rows[f"all, {kind} recomputation"] == wanted
    assert not any("none" in row or "without" in row or "CPU" in row for row in rows)
    shown.clear()
    recomputed = replace(given, how=replace(BF16, recompute="full"))
    foresee._show_memory(foreseen(recomputed, stages[:1], memory_gib=10))
    (title, rows), *_ = shown.items()
    assert rows[""] == ["", "every rank"] and "all, without recomputation" in rows
    assert title.endswith(f"(does NOT fit: {memory_gib(recomputed, stages[0]) + 6 - 10:.1f} GiB too much)")


def memory_gib(given, stage) -> float:
    return sum(memory_of_stage(stage, given).values()) / GIB


def test_a_teacher_in_cpu_memory_and_in_a_layout_of_its_own_has_its_row_and_names(shown):
    given = replace(plan(LONG), teacher=TEACHER, teacher_how=replace(BF16, offloaded=True))
    stages = [Stage(0, (FIRST,), (FIRST,), 3), Stage(1, (LAST,), (LAST,))]
    foresee._show_memory(foreseen(given, stages))
    (rows,) = shown.values()
    assert rows[""] == ["", "stage 0, teacher's 3", "stage 1"]
    wanted = [round(sum(layers_in_cpu_memory(stage, given)) / GIB, 2) for stage in stages]
    assert rows["teacher weights in CPU memory"] == wanted


def test_time_has_shares_and_the_run_its_rates_and_hours(shown):
    """A step of 5 s and 1,000 tokens on 16 GPUs; kinds that take no time are left out."""
    given = replace(plan(LONG), teacher=TEACHER)
    foresee._show_time(foreseen(given, []), 72_000)
    assert shown["a step"] == {
        "": ["", "seconds", "share", "GB a rank sends"],
        "student, forward and backward": ["3.000", "60.0%", ""],
        "teacher, forward": ["1.000", "20.0%", ""],
        "data parallel": ["1.000", "20.0%", "3.00"],
        "step": ["5.000", "100.0%", ""],
    }
    student, teacher = flops_per_token(SHAPE, 64), flops_per_token(TEACHER, 64)
    assert shown["the run"] == {
        "": ["", "value"],
        "GFLOP a token: student, forward and backward": [3 * student / 1e9],
        "GFLOP a token: teacher, forward": [teacher / 1e9],
        "tokens/s": [200],
        "tokens/s of a GPU": [round(200 / 16)],
        "share of the peak (MFU)": [f"{(3 * student + teacher) * 200 / (16 * 2e12):.1%}"],
        "hours to 7.2e+07 tokens": [100.0],
        "GPU hours": [1600],
    }
    # Of a peak that the run reaches a part of.
    slow = foreseen(plan(LONG), [], tokens=10**9, bf16_tflops=0.1)
    foresee._show_time(slow, 1)
    assert shown["the run"]["share of the peak (MFU)"] == [f"{3 * student * 2e8 / (16 * 1e11):.1%}"]
    assert not any("teacher" in row for row in shown["the run"])


@pytest.mark.parametrize("fp8", [{}, {"fp8": True}, {"fp8_head": True}])
def test_assumptions_are_those_of_the_plan(shown, fp8):
    given = replace(plan(LONG), teacher=TEACHER, teacher_how=replace(BF16, **fp8))
    foresee._show_assumptions(foreseen(given, []))
    rows = shown["assumptions"]
    peak = "2 in bfloat16; FP8 4, " + ("its products count 1.6 times as fast as bfloat16's" if fp8 else "not used")
    assert rows["peak, TFLOP/s"] == [peak]
    assert rows["GPU"] == ["h100 in nodes of 8: 80 GiB at 10 GB/s"]
    assert rows["of it, on one GPU"] == ["50% (cluster.efficiency; measured: docs/cluster.md)"]
    links = "NVLink 100 GB/s among 8 GPUs, network 10 GB/s a GPU, CPU memory 5 GB/s; 80% of it is reached"
    assert rows["links"] == [links]
    assert rows["overlap"] == ["none: communication and optimizer come after arithmetic"]
    assert rows["launches"] == ["3 ms for a layer's forward pass (cluster.launch_ms)"]
    assert rows[GRAPHS] == ["off: a reason"] and rows["recomputation"] == ["none"]
    assert rows["layers"] == ["Transformer Engine's, with fused attention"]
    assert rows["reserved"] == ["6 GiB a GPU for CUDA, NCCL and fragmentation"]
    assert "graphs" not in rows["not counted"][0]


def test_assumptions_of_graphs_of_other_layers_and_of_a_plain_node(shown):
    local = replace(BF16, engine="local", dtype=torch.float32, recompute="full", fp8=True)
    given = replace(plan(LONG, local, cuda_graphs=True), teacher=TEACHER, teacher_how=replace(BF16, offloaded=True))
    foresee._show_assumptions(foreseen(given, [], gpus_per_node=0))
    rows = shown["assumptions"]
    assert rows["GPU"] == ["h100: 80 GiB at 10 GB/s"] and rows["peak, TFLOP/s"][0].startswith(
        "1 in float32; FP8 4, its"
    )
    assert rows["overlap"][0].startswith("copies of the teacher's layers with its arithmetic; communication")
    assert rows["launches"] == ["CUDA graphs"] and rows[GRAPHS] == ["on: a reason"]
    assert rows["recomputation"] == ["every layer from its input, whatever trainer.recompute_num_layers"]
    assert rows["layers"] == ["Megatron's local ones, attention unfused"]
    assert rows["not counted"][0].endswith(", graphs of every micro-batch")
    foresee._show_assumptions(foreseen(replace(given, layout=Layout()), [], fp8_tflops=None))
    assert (
        "graphs" not in shown["assumptions"]["not counted"][0] and "FP8" not in shown["assumptions"]["peak, TFLOP/s"][0]
    )


def test_layouts_that_fit_come_first_and_the_fastest_of_them(monkeypatch, shown):
    """Of fourteen the last two are not shown; the given one is marked."""
    layouts = [Layout(tensor=n, world_size=n) for n in range(1, 15)]
    given = layouts[4]

    def forecast(cfg, layout, models):
        n = layout.tensor
        return SimpleNamespace(
            plan=SimpleNamespace(layout=layout, micro_batches=100 + n),
            step=SimpleNamespace(bubble=n / 100),
            gib=n + 0.26,
            fits=n % 2 == 1,
            tokens_per_second=1000 * n + 0.6,
        )

    monkeypatch.setattr(foresee, "forecast", forecast)
    monkeypatch.setattr(foresee, "layouts_that_run", lambda layout, length, check: layouts if length == 32 else [])
    cfg = SimpleNamespace(data=SimpleNamespace(sequence_length=32))
    foresee.show_layouts(cfg, given, None, None)
    rows = shown["layouts of 5 processes that divide"]
    assert rows.pop("") == ["layout", "data", "micro-batches", "bubble", "GiB", "fits", "tokens/s"]
    order = [13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6]
    names = [f"{layouts[n - 1]}{'  ◀ this one' if n == 5 else ''}" for n in order]
    assert list(rows) == names
    assert list(rows.values()) == [
        [1, 100 + n, f"{n:.1f}%", round(n + 0.26, 1), "yes" if n % 2 else "no", 1000 * n + 1] for n in order
    ]
    shown.clear()
    cfg.data.sequence_length = 33
    foresee.show_layouts(cfg, given, None, None)
    assert not shown


# What is planned for


def config(**changed) -> DistillConfig:
    trainer = TrainerConfig(steps=3, global_batch_size=48, micro_batch_size=2, fp8="none", recompute="selective")
    cfg = DistillConfig(output="x", precision="bf16", trainer=trainer, data=TrainingDataConfig(sequence_length=64))
    return replace(cfg, **changed)


MODELS = Models(SHAPE, "auto", TEACHER, "local", lambda one: one)


def test_a_plan_is_what_the_options_say():
    layout = Layout(context=2, world_size=8)
    options = DistillOptions(logits_mib=3, teacher_ahead=5, teacher_head_fp8=True, teacher_offload=True)
    found = foresee._plan_of(config(distill=options, optim=OptimConfig(state_precision="bf16")), layout, MODELS)
    assert (found.student, found.teacher, found.layout, found.teacher_layout) == (SHAPE, TEACHER, layout, None)
    assert found.micro_batches == 48 // (2 * 4) and found.batch.tokens == 2 * 32 and found.batch.sequence_length == 64
    assert found.logits_bytes == 3 * 2**20 and found.ahead == 5 and found.cuda_graphs and not found.tp_comm_overlap
    assert (found.how.engine, found.how.recompute, found.how.fp8, found.how.fp8_head) == (
        "te",
        "selective",
        False,
        False,
    )
    theirs = found.teacher_how
    assert (theirs.engine, theirs.recompute, theirs.fp8, theirs.fp8_head, theirs.offloaded) == (
        "local",
        "none",
        False,
        True,
        True,
    )
    assert found.state_precision == "bf16" and found.optimizer_bytes == 8
    own = Layout(tensor=2, world_size=8)
    both = replace(MODELS, teacher_layout=lambda one: own)
    trainer = replace(config().trainer, fp8="delayed", tp_comm_overlap=True)
    other = foresee._plan_of(
        config(precision="fp32", trainer=trainer, optim=OptimConfig(state_precision="bf16")), layout, both
    )
    assert other.teacher_layout is own and other.how.fp8 and other.tp_comm_overlap and other.how.engine == "local"
    # Half of the moments is saved of bfloat16 models alone.
    assert other.state_precision == "fp32" and other.optimizer_bytes == 8
    alone = CorrectTeacherConfig(output="x", precision="bf16", trainer=config().trainer, data=config().data)
    plain = foresee._plan_of(alone, layout, replace(MODELS, teacher=None, teacher_layout=None))
    assert plain.teacher is None and plain.ahead is None and plain.teacher_layout is None


@pytest.mark.parametrize(
    ("recompute", "modules", "counted"),
    [
        ("none", ["core_attn"], "none"),
        ("selective", ["core_attn"], "selective"),
        ("selective", ["mlp"], "none"),
        ("selective", ["mlp", "core_attn"], "selective"),
        ("full", ["mlp"], "full"),
    ],
)
def test_what_is_counted_as_recomputed(recompute, modules, counted):
    assert foresee._recomputed(TrainerConfig(recompute=recompute, recompute_modules=modules)) == counted


@pytest.mark.parametrize(
    ("asked", "dtype", "engine"),
    [
        ("auto", torch.bfloat16, "te"),
        ("auto", torch.float32, "local"),
        ("te", torch.float32, "te"),
        ("local", torch.bfloat16, "local"),
    ],
)
def test_gpus_take_transformer_engine_for_bfloat16(asked, dtype, engine):
    assert foresee._engine(asked, dtype) == engine


def test_processes_on_cpus_have_local_layers_and_no_graphs(monkeypatch):
    """As many micro-batches as the batch has of each size, and one at least."""
    asked = []
    monkeypatch.setattr(foresee, "take_census", lambda *_: "stages")
    monkeypatch.setattr(foresee, "gib_of_fullest", lambda stages, one: asked.append(one) or len(asked))
    cfg = config(trainer=replace(config().trainer, global_batch_size=8))
    layout = Layout(context=2, world_size=4)
    assert foresee.gib_on_cpus(cfg, layout, MODELS, [1, 2, 4, 16]) == [1, 2, 3, 4]
    assert [(one.batch.samples, one.batch.tokens_of_sample, one.micro_batches) for one in asked] == [
        (1, 32, 4), (2, 32, 2), (4, 32, 1), (16, 32, 1)
    ]  # fmt: skip
    for one in asked:
        assert not one.cuda_graphs
        assert all(how.engine == "local" and not how.fused_norms for how in (one.how, one.teacher_how))


def test_a_forecast_is_of_the_fullest_rank_and_of_all_tokens():
    given = plan(LONG)
    stages = [Stage(0, (FIRST,), ()), Stage(1, (LAST,), ())]
    for order in (1, -1):
        assert foresee.gib_of_fullest(stages[::order], given) == max(memory_gib(given, stage) for stage in stages)
    assert foreseen(given, stages).tokens_per_second == 200.0


def test_a_dry_run_shows_the_job_its_memory_its_time_what_is_assumed_and_other_layouts(monkeypatch):
    """Of the layout without what is idle in it."""
    did = []
    for name in ("_show_job", "_show_memory", "_show_time", "_show_assumptions", "show_layouts", "say_assumed"):
        monkeypatch.setattr(foresee, name, lambda *given, name=name: did.append((name, *given)))
    monkeypatch.setattr(foresee, "forecast", lambda *given: did.append(("forecast", *given)) or "found")
    cfg, layout = config(), Layout(world_size=2)
    foresee.foresee(cfg, replace(layout, sequence=True), 7, MODELS, "check", {"before": 1})
    assert did == [
        ("say_assumed", cfg.cluster),
        ("forecast", cfg, layout, MODELS, {"before": 1}),
        ("_show_job", "found", 7, cfg),
        ("_show_memory", "found"),
        ("_show_time", "found", 7),
        ("_show_assumptions", "found"),
        ("show_layouts", cfg, layout, MODELS, "check"),
    ]
