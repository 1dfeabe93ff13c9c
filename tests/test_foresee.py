"""The dry run against real runs: bytes of weights, gradients and optimizer, activations, what is in flight; and what it says."""

import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra import initialize_config_dir

from minitron_megatron.benchmark.step import Case
from minitron_megatron.config import DdpConfig, DistillConfig, HardwareConfig, ModelConfig, OptimConfig, ParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, check_processes, compose
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.hardware import gpu_of, hardware, say_assumed
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import take_census
from minitron_megatron.train.checks import Models, _say_same
from minitron_megatron.train.distill import distill
from minitron_megatron.train.distill_checks import check_distill
from minitron_megatron.train.foresee import forecast
from minitron_megatron.train.memory import (
    OPTIMIZER_BYTES,
    Arithmetic,
    MicroBatch,
    Plan,
    _loss_bytes,
    chunk_activations,
    in_flight,
    layers_in_cpu_memory,
    memory_of_stage,
)
from minitron_megatron.train.speed import LINK_EFFICIENCY, forward_flops

SAMPLES, LENGTH = 2, 64


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def tiny(family="llama", **sizes) -> ModelShape:
    given = {
        "num_layers": 4, "hidden_size": 96, "ffn_hidden_size": 160, "num_attention_heads": 8, "num_query_groups": 4,
        "head_dim": 16, "vocab_size": 1000, "max_position_embeddings": 128, "rope_theta": 1e4, "norm_eps": 1e-5,
        "tied_embeddings": False, "dtype": "bfloat16", "rotary_percent": 0.5 if family == "nemotron" else 1.0, **sizes,
    }  # fmt: skip
    return ModelShape(family=family, **given)


def preset(name: str) -> ModelShape:
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return ModelShape.from_dict(ModelConfig(**values).sizes("model"), name)


def plan_of(shape: ModelShape, layout: Layout, dtype: torch.dtype, micro_batches: int = 4) -> Plan:
    how = Arithmetic(dtype, "local", fused_norms=False)
    return Plan(shape, None, layout, MicroBatch.of(SAMPLES, LENGTH, layout), micro_batches, how, how)


def random_chunks(shape: ModelShape, layout: Layout, dtype: torch.dtype):
    from minitron_megatron.models.build import build_model_chunks

    chunks = build_model_chunks(shape, layout, dtype, "local")
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    return chunks


def allocated(shape: ModelShape, layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a rank really holds after an optimizer step, by distinct storages."""
    from minitron_megatron.train.optimizer import wrap_and_optimize

    wrapped, optimizer = wrap_and_optimize(random_chunks(shape, layout, dtype), OptimConfig(), DdpConfig())
    optimizer.step()
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
    one = optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
    masters = [p for o in one for group in o.shard_fp32_from_float16_groups for p in group]
    moments = [s[name] for o in one for s in o.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": distinct_bytes([p for chunk in wrapped for p in chunk.parameters()]),
        "gradients": distinct_bytes([buffer.grad_data for buffer in buffers]),
        "optimizer": sum(t.numel() * t.itemsize for t in [*masters, *moments]),
    }


def distinct_bytes(tensors) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("ranks", "sizes", "dtype", "tied"),
    [
        pytest.param(2, {}, torch.bfloat16, False, marks=pytest.mark.bf16),
        (2, {}, torch.float32, True),
        pytest.param(4, {"tensor": 2}, torch.bfloat16, False, marks=pytest.mark.bf16),
        pytest.param(4, {"pipeline": 2}, torch.bfloat16, True, marks=pytest.mark.bf16),
        (4, {"tensor": 2, "pipeline": 2}, torch.float32, False),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, torch.bfloat16, True, marks=pytest.mark.bf16),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2}, torch.bfloat16, False, marks=pytest.mark.bf16),
    ],
    ids=str,
)
def test_weights_gradients_and_optimizer_are_what_a_run_allocates(gloo, ranks, sizes, dtype, tied):
    """Exactly, but for the padding of Megatron's buffers: 64 numbers a parameter, and their ends."""
    layout, shape = Layout(**sizes, world_size=ranks), tiny(tied_embeddings=tied)
    found = gloo(layout.world_size, allocated, shape, layout, dtype, layout=layout)
    stages = {s.number: s for s in take_census(shape, None, layout, dtype, dtype)}
    plan = plan_of(shape, layout, dtype)
    for rank, real in enumerate(found):
        stage = stages[layout.place(rank)[1]]
        planned = memory_of_stage(stage, plan)
        tensors = 2 + 7 * sum(len(chunk.layers) for chunk in stage.student)
        padding = 64 * tensors + 2 * len(stage.student) * math.lcm(128, layout.data)
        assert 0 <= real["weights"] - planned["weights"] <= padding * dtype.itemsize
        assert 0 <= real["gradients"] - planned["gradients"] <= padding * 4
    for number, stage in stages.items():
        # Data-parallel ranks have shares that differ a little; together they are all of it.
        shares = [real["optimizer"] for rank, real in enumerate(found) if layout.place(rank) == (0, number)]
        assert sum(shares) == OPTIMIZER_BYTES[dtype] * sum(chunk.parameters for chunk in stage.student)
        assert memory_of_stage(stage, plan)["optimizer"] == sum(shares) // layout.data


def kept_for_backward(shape: ModelShape, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of the whole model saves on this rank."""
    from minitron_megatron.benchmark.memory import kept_bytes

    (model,) = random_chunks(shape, layout, dtype)
    tokens = torch.randint(0, shape.vocab_size, (SAMPLES, LENGTH))
    return kept_bytes(model, {"tokens": tokens, "position_ids": torch.arange(LENGTH).expand(SAMPLES, LENGTH)})[0]


@pytest.mark.parametrize(
    ("family", "groups", "sizes", "dtype"),
    [
        pytest.param("llama", 4, {}, torch.bfloat16, marks=pytest.mark.bf16),
        ("llama", 8, {}, torch.float32),
        pytest.param("llama", 4, {"tensor": 2}, torch.bfloat16, marks=pytest.mark.bf16),
        pytest.param("llama", 4, {"tensor": 2, "sequence": True}, torch.bfloat16, marks=pytest.mark.bf16),
        ("qwen2", 4, {"tensor": 2, "sequence": True}, torch.float32),
        pytest.param("qwen3", 4, {}, torch.bfloat16, marks=pytest.mark.bf16),
        ("qwen3", 4, {"tensor": 2}, torch.float32),
        ("qwen3", 8, {}, torch.float32),
        pytest.param("nemotron", 4, {}, torch.bfloat16, marks=pytest.mark.bf16),
        ("nemotron", 4, {"tensor": 2, "sequence": True}, torch.float32),
    ],
    ids=str,
)
def test_activations_are_what_autograd_saves(gloo, family, groups, sizes, dtype):
    """Local layers on a CPU: to the byte without tensor parallelism, within 0.5 % with it (masks of the embedding)."""
    layout, shape = Layout(**sizes, world_size=sizes.get("tensor", 1)), tiny(family, num_query_groups=groups)
    real = gloo(layout.world_size, kept_for_backward, shape, layout, dtype, layout=layout)[0]
    (stage,) = take_census(shape, None, layout, dtype, dtype)
    plan = plan_of(shape, layout, dtype)
    planned = chunk_activations(shape, stage.student[0], layout, plan.batch, plan.how)
    assert planned == pytest.approx(real, rel=5e-3) if sizes else planned == real


def most_in_flight(shape: ModelShape, layout: Layout, micro_batches: int) -> int:
    """The most passes of this rank's chunks that wait for their backward pass in Megatron's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = random_chunks(shape, layout, torch.float32)
    waiting, most = 0, 0

    def begins(_, args, kwargs):
        nonlocal waiting, most
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden.requires_grad:
            hidden.register_hook(ends)
            waiting += 1
            most = max(most, waiting)

    def ends(_):
        nonlocal waiting
        waiting -= 1

    for chunk in chunks:
        chunk.decoder.layers[0].register_forward_pre_hook(begins, with_kwargs=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)

    def step(data, model):
        out = model(tokens, torch.arange(LENGTH).expand(SAMPLES, LENGTH), None)
        return out, lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks,
        num_microbatches=micro_batches,
        seq_length=LENGTH,
        micro_batch_size=SAMPLES,
        forward_only=False,
    )
    assert waiting == 0
    return most


@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [({}, 3), ({"pipeline": 2}, 1), ({"pipeline": 4}, 6), ({"pipeline": 2, "virtual_pipeline": 2}, 4)],
    ids=str,
)
def test_micro_batches_in_flight_are_those_of_megatrons_schedules(gloo, sizes, micro_batches):
    layout = Layout(**sizes, world_size=sizes.get("pipeline", 1))
    found = gloo(layout.world_size, most_in_flight, tiny(), layout, micro_batches, layout=layout)
    assert found == [in_flight(layout, stage, micro_batches) for stage in range(layout.pipeline)]


@pytest.mark.parametrize(
    ("sizes", "student"),
    [
        ({"tensor": 2}, "llama3_1_minitron_4b_width"),
        ({"tensor": 8, "pipeline": 4}, "llama3_1_70b"),
        ({"tensor": 1, "pipeline": 2, "virtual_pipeline": 2}, "smollm2_135m"),
        ({"tensor": 4, "context": 2}, "minitron_4b"),
    ],
    ids=str,
)
def test_the_census_of_all_ranks_is_the_model(sizes, student):
    """Counted from models built for 256 ranks: weights on disk, operations, and nothing that takes memory."""
    layout, shape = Layout(**sizes, world_size=256), preset(student)
    stages = take_census(shape, None, layout, torch.bfloat16, torch.bfloat16)
    stored = {key: size for stage in stages for chunk in stage.student for key, size in chunk.stored.items()}
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    assert sum(stored.values()) == 2 * (count_parameters(shape) + padding)
    if layout.pipeline <= 2:
        plan = plan_of(shape, layout, torch.bfloat16)
        flops = sum(forward_flops(shape, stage.student, plan, plan.how) for stage in stages) * layout.tensor
        assert flops == pytest.approx(plan.batch.tokens * flops_per_token(shape, LENGTH))


@pytest.mark.parametrize(
    ("given", "here", "says"),
    [
        (
            HardwareConfig(),
            None,
            "no GPU here: the plan is for cluster=h100; cluster=gb200, cluster=h200, cluster=a100 or",
        ),
        (HardwareConfig(memory_gib=3), "Tesla T4", "an unknown GPU here: the plan is for cluster=h100; "),
        (HardwareConfig(), "NVIDIA H200", None),
        (HardwareConfig(gpu="a100"), None, None),
    ],
)
def test_the_gpu_that_a_plan_assumes_is_said(monkeypatch, caplog, given, here, says):
    caplog.set_level("INFO", "minitron_megatron")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: here)
    say_assumed(given)
    assert [one.message.startswith(says) for one in caplog.records] == ([True] if says else [])


def test_a_batch_that_does_not_divide_is_refused_with_the_layouts_that_do(hydra, capsys):
    words = ("experiment=llama3_1_minitron_4b_width", "dry_run=true", "parallel.world_size=256", "parallel.tensor=1")
    with pytest.raises(UserError, match=r"1152 is not a multiple of 256 .*: use 1024 or 1280 or parallel\.tensor=2 or"):
        distill(compose("distill", [*words]))
    shown = capsys.readouterr().out
    assert "tensor 2 × data 128, sequence parallel" in shown and "this one" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.min_lr=1"], "optim.min_lr=1.0 is above optim.lr="),
        (["distill.intermediate=1", "distill.intermediate_layers=[[99,0]]"], "has layer 99 of the student"),
        (["distill.loss=topk_kl", "distill.top_k=500000"], "distill.top_k=500000 is above the vocabulary"),
        (
            ["trainer.global_batch_size=7", "trainer.micro_batch_size=2"],
            "trainer.global_batch_size=7 is not a multiple",
        ),
    ],
)
def test_a_mistake_of_every_layout_is_said_without_torch(hydra, monkeypatch, words, says):
    """Figures of layouts that would do need torch and Megatron, seconds: there are none to show."""
    monkeypatch.delitem(sys.modules, "minitron_megatron.train.foresee", raising=False)
    alone = ["parallel.tensor=1", "parallel.world_size=1", "dry_run=true"]
    cfg = compose("distill", ["experiment=llama3_1_minitron_4b_width", *alone, *words])
    with pytest.raises(UserError, match=re.escape(says)):
        check_distill(cfg)
    assert "minitron_megatron.train.foresee" not in sys.modules


@pytest.mark.parametrize(("digest", "said"), [("a", True), ("b", False)])
def test_a_student_that_is_its_teacher_is_said(caplog, digest, said):
    folders = {"teacher": SimpleNamespace(path="t", digest="a"), "student": SimpleNamespace(path="s", digest=digest)}
    _say_same(SimpleNamespace(trained="student"), folders)
    assert ("student=s and teacher=t are the same model" in caplog.text) == said


def test_a_teacher_in_cpu_memory_takes_the_longer_of_its_copies_and_its_arithmetic(hydra):
    """Llama 3.1 8B's layers, 436 MB each: 30 of 32 leave the GPU; small micro-batches wait for them, large ones do not."""
    teacher, student = preset("llama3_1_8b"), preset("llama3_1_minitron_4b_width")
    models = Models(student, "te", teacher, "te", lambda layout: layout)
    layers, seconds, weights = 32 * 2 * 218_112_000, {}, {}
    for samples in (1, 16):
        for offload in (False, True):
            words = (f"trainer.micro_batch_size={samples}", f"distill.teacher_offload={offload}")
            cfg = compose("distill", ["experiment=llama3_1_minitron_4b_width", "data.sequence_length=1024", *words])
            found = forecast(cfg, Layout(world_size=8), models)
            seconds[samples, offload] = found.step.seconds["teacher, forward"] / found.plan.micro_batches
            weights[offload] = found.memory[0]["teacher weights"]
            assert sum(layers_in_cpu_memory(found.stages[0], found.plan)) == offload * layers
    assert weights[False] - weights[True] == layers * 30 / 32
    copies = layers / (LINK_EFFICIENCY * 64e9)
    assert seconds[1, True] == pytest.approx(copies) and seconds[1, False] < copies / 2
    assert seconds[16, True] == seconds[16, False] > copies


FP8 = {"fp8": "delayed", "teacher_fp8": "tensorwise", "teacher_head_fp8": True}


@pytest.mark.parametrize(
    ("layers", "length", "layout", "step", "seconds", "gib", "waits"),
    [
        (12, 8192, Layout(), {}, 1.2437, 48.7, False),
        (12, 8192, Layout(tensor=2, sequence=True, world_size=4), {}, 1.4247, 20.5, False),
        (12, 8192, Layout(pipeline=2, world_size=4), {}, 1.5334, 27.3, False),
        (12, 8192, Layout(tensor=4, sequence=True, world_size=4), {}, 2.2834, 12.9, True),
        (12, 8192, Layout(tensor=4, sequence=True, world_size=4), {"overlap": True}, 2.1235, 12.9, True),
        (32, 4096, Layout(), {}, 1.3607, 87.5, False),
        (32, 8192, Layout(), {}, 2.9187, 102.5, False),
        (32, 8192, Layout(world_size=4), {"overlap": True}, 2.9334, 77.3, False),
        (32, 8192, Layout(tensor=2, sequence=True, world_size=4), {}, 3.4104, 43.1, False),
        (32, 8192, Layout(pipeline=2, world_size=4), {}, 3.3777, 57.4, False),
        (32, 8192, Layout(context=2, world_size=4), {}, 3.251, 62.4, False),
        (32, 8192, Layout(tensor=4, sequence=True, world_size=4), {"overlap": True}, 5.0898, 26.3, True),
        (32, 8192, Layout(tensor=2, pipeline=2, sequence=True, world_size=4), {}, 3.8244, 33.3, False),
        (32, 4096, Layout(), FP8, 1.277, 86.2, True),
        (32, 4096, Layout(), {**FP8, "cuda_graphs": True}, 0.9973, 90.2, False),
        (32, 8192, Layout(), {**FP8, "cuda_graphs": True}, 2.2033, 106.0, False),
        (32, 8192, Layout(), {"teacher_fp8": "tensorwise"}, 2.6373, 96.0, False),
        (32, 4096, Layout(), {**FP8, "fp8": "none", "cuda_graphs": True}, 1.2079, 84.5, False),
        (4, 4096, Layout(), {"cuda_graphs": True}, None, 26.10, False),
        (8, 4096, Layout(), {"cuda_graphs": True}, None, 35.44, False),
        (4, 8192, Layout(), {"cuda_graphs": True}, None, 31.66, False),
        (8, 8192, Layout(), {"cuda_graphs": True}, None, 42.61, False),
        (8, 4096, Layout(), {**FP8, "cuda_graphs": True}, None, 34.81, False),
    ],
    ids=str,
)
def test_steps_take_what_was_measured_on_h200s(hydra, layers, length, layout, step, seconds, gib, waits):
    """Four micro-batches a GPU, as in docs/benchmarks.md: seconds to 10 %, and launches waited for where GPUs were seen to;
    memory of the fullest rank to 3 %, with what graphs work in."""
    options = ["output=x", f"sequence_length={length}", f"model.num_layers={layers}", f"target.num_layers={layers}"]
    cfg = compose(
        "benchmark", ["benchmark=scaling", *options, *(f"step.{name}={value}" for name, value in step.items())]
    )
    case = Case(cfg, layout, 4 * layout.world_size // layout.data, overlap=cfg.step.overlap)
    teacher, student = case.shapes
    run = replace(case.run, cluster=HardwareConfig(gpu="h200"))
    found = forecast(run, layout, Models(student, "te", teacher, "te", lambda one: one))
    assert seconds is None or found.step.total == pytest.approx(seconds, rel=0.1)
    assert (found.step.seconds["waiting for launches"] > 0) == waits
    assert gib is None or found.gib == pytest.approx(gib, rel=0.03)


def test_presets_of_an_experiment_give_way_to_what_is_typed(hydra):
    config = compose(
        "distill", ["experiment=llama3_1_minitron_4b_width", "teacher=llama3_1_70b", "student=some/folder"]
    )
    assert config.teacher.num_layers == 80 and config.teacher.path is None
    assert config.student.path == "some/folder" and config.parallel.tensor == 2


@pytest.mark.parametrize(
    ("planned", "started", "dry_run", "refused"),
    [
        (None, None, False, False),
        (256, None, True, False),
        (256, None, False, True),
        (256, "8", True, True),
        (8, "8", False, False),
        (1, None, False, False),
    ],
)
def test_a_real_run_has_as_many_processes_as_its_world_size_says(monkeypatch, planned, started, dry_run, refused):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started:
        monkeypatch.setenv("WORLD_SIZE", started)
    config = DistillConfig(output="x", parallel=ParallelConfig(world_size=planned), dry_run=dry_run)
    if not refused:
        check_processes(config)
        return
    with pytest.raises(UserError, match=r"parallel\.world_size=256, but") as error:
        check_processes(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "gb200"])
def test_every_gpu_has_its_figures_and_one_can_be_replaced(gpu):
    found = hardware(HardwareConfig(gpu=gpu, efficiency=0.3))
    assert found.gpu == gpu and found.efficiency == 0.3
    assert found.bf16_tflops > found.fp32_tflops and found.nvlink_gb_s > found.network_gb_s > 0
    assert found.network_gb_s < found.host_gb_s < found.memory_gb_s
    assert gpu_of(f"NVIDIA {gpu.upper()} 80GB HBM3") == gpu
    assert (found.fp8_tflops is None) == (gpu == "a100")


def test_recomputation_trades_activations_for_work():
    """Selective leaves out the scores of unfused attention, full all but a layer's input."""
    shape, layout = tiny(), Layout()
    (stage,) = take_census(shape, None, layout, torch.bfloat16, torch.bfloat16)
    plan = plan_of(shape, layout, torch.bfloat16)
    kept = [
        memory_of_stage(stage, replace(plan, how=replace(plan.how, recompute=recompute)))["activations"]
        for recompute in ("none", "selective", "full")
    ]
    scores = shape.num_layers * SAMPLES * shape.num_attention_heads * LENGTH**2 * (4 + 2)
    assert kept[0] - kept[1] > 0.9 * scores and kept[2] < 0.3 * kept[1]


def test_the_loss_takes_logits_states_and_three_blocks_in_float32():
    """By hand: 128 tokens of a vocabulary of 1,024, whole and in two pieces, with a teacher and without; two ranks share it."""
    how, alone = Arithmetic(torch.bfloat16, "local"), tiny()
    for layout in (Layout(), Layout(tensor=2, world_size=2)):
        width = 1024 // layout.tensor
        batch = MicroBatch.of(SAMPLES, LENGTH, layout)
        for teacher in (None, tiny(hidden_size=160)):
            for pieces in (1, 2):
                models = 2 if teacher else 1
                limit = models * 128 * width * 2 // pieces
                plan = Plan(alone, teacher, layout, batch, 4, how, how, logits_bytes=limit)
                logits, states = 128 // pieces * width, 128 * (96 + (160 if teacher else 0))
                assert _loss_bytes(plan) == models * logits * 2 + 2 * states * 2 + 3 * 4 * logits
