"""A planned step's seconds, worked out by hand from what a layer sends, computes and launches."""

import math
from dataclasses import replace

import pytest
import torch

from minitron_megatron.config import HardwareConfig
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import speed
from minitron_megatron.train.census import Chunk, Stage
from minitron_megatron.train.memory import Arithmetic, MicroBatch, Plan
from minitron_megatron.train.speed import Links, Pass, Step, forward_flops, pass_of_stage, stage_bytes, tensor_bytes

SHAPE = ModelShape(
    family="llama", num_layers=5, hidden_size=96, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4,
    head_dim=16, vocab_size=1000, max_position_embeddings=128, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False,
    dtype="bfloat16",
)  # fmt: skip
TEACHER = SHAPE.resized(hidden_size=192, num_layers=6)
# Half of 2 TFLOP/s is reached; links give 80 % of their data sheet.
GPU = HardwareConfig(
    gpu="h100", gpus_per_node=8, nvlink_gpus=8, memory_gib=80, bf16_tflops=2, fp8_tflops=4, fp32_tflops=1, memory_gb_s=10,
    nvlink_gb_s=100, network_gb_s=10, host_gb_s=5, launch_ms=3, efficiency=0.5,
)  # fmt: skip
BF16 = Arithmetic(torch.bfloat16, "te")
FIRST = Chunk((0, 1), 5000, 3000, 1000, embedding=True, head=False, stored={})
LAST = Chunk((2, 3, 4), 7000, 4000, 1000, embedding=False, head=True, stored={})
WHOLE = Chunk((0, 1), 9000, 3500, 1000, embedding=True, head=True, stored={})
# Two samples of 64 tokens. Causal attention: half of two products of 2 operations, over 8 heads of 16 numbers and 64 keys.
TOKENS, ATTENTION, HEAD = 128, 2 * 8 * 16 * 64, 2 * 1024 * 96


def plan(layout: Layout = Layout(), how: Arithmetic = BF16, **more) -> Plan:  # noqa: B008 (frozen)
    return Plan(SHAPE, None, layout, MicroBatch.of(2, 64, layout), 6, how, how, **more)


TENSOR = Layout(tensor=2, world_size=2)
SEQUENCE = Layout(tensor=2, sequence=True, world_size=2)


@pytest.mark.parametrize("layout", [Layout(), TENSOR, Layout(context=2, world_size=2)], ids=str)
@pytest.mark.parametrize(
    ("chunks", "matrices", "layers", "head"),
    [([FIRST], 3000, 2, 0), ([LAST], 4000, 3, HEAD), ([FIRST, LAST], 7000, 5, HEAD)],
)
def test_a_forward_pass_is_matrices_attention_and_the_head(layout, chunks, matrices, layers, head):
    """2 operations a weight and token; those in FP8 take 1.6 times less."""
    tokens = TOKENS // layout.context
    for fp8, fp8_head in ((False, False), (True, False), (False, True)):
        how = replace(BF16, fp8=fp8, fp8_head=fp8_head)
        shared = layers * ATTENTION + (head / 1.6 if fp8_head else head)
        wanted = tokens * (2 * matrices / (1.6 if fp8 else 1) + shared / layout.tensor)
        assert forward_flops(SHAPE, chunks, plan(layout), how) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("chunks", "backward", "recompute", "sequence", "shares"),
    [
        ([FIRST], False, "none", False, 2 * (2 * 2 + 1)),  # two all-reduces a layer, and the embedding's
        ([FIRST], True, "none", False, 2 * (2 * 4 + 1)),
        ([LAST], False, "none", False, 2 * 3 * 2),
        ([LAST], True, "none", False, 2 * (3 * 4 + 1)),  # and the head's, backward
        ([WHOLE], True, "none", False, 2 * (2 * 4 + 2)),
        ([WHOLE], True, "selective", False, 2 * (2 * 4 + 2)),
        ([WHOLE], True, "full", False, 2 * (2 * 6 + 2)),
        ([WHOLE], False, "full", False, 2 * (2 * 2 + 1)),
        ([WHOLE], True, "none", True, 2 * (2 * 4 + 2) + 2 * 2),  # the linears' inputs are gathered again
        ([WHOLE], False, "none", True, 2 * (2 * 2 + 1)),
        ([FIRST, LAST], True, "none", False, 2 * (5 * 4 + 2)),
    ],
)
def test_tensor_parallel_ranks_send_two_sums_a_layer_and_pass(chunks, backward, recompute, sequence, shares):
    """An all-reduce sends twice what a gather does: (n − 1) / n of the residual stream."""
    how = replace(BF16, recompute=recompute)
    for tensor in (1, 2, 4):
        layout = Layout(tensor=tensor, sequence=sequence, world_size=tensor)
        gather = (tensor - 1) / tensor * TOKENS * 96 * 2
        found = tensor_bytes(SHAPE, chunks, plan(layout, how), how, backward=backward)
        assert found == pytest.approx(shares * gather, rel=1e-12)


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (SEQUENCE, 0),
        (Layout(pipeline=2, world_size=2), TOKENS * 96),
        (Layout(pipeline=2, tensor=2, world_size=4), TOKENS * 96),
        (Layout(pipeline=2, tensor=2, sequence=True, world_size=4), TOKENS * 96 // 2),
        (Layout(pipeline=2, virtual_pipeline=3, world_size=2), TOKENS * 96 * 3),
    ],
    ids=str,
)
def test_a_stage_sends_its_share_of_the_residual_stream_from_each_chunk(layout, numbers):
    for dtype, item in ((torch.bfloat16, 2), (torch.float32, 4)):
        assert stage_bytes(SHAPE, plan(layout), Arithmetic(dtype, "te")) == numbers * item


@pytest.mark.parametrize(
    ("recompute", "backward", "times", "again"),
    [
        ("none", False, 1, 0),
        ("full", False, 1, 0),
        ("selective", False, 1, 0),
        ("none", True, 3, 0),
        ("full", True, 4, 0),
        ("selective", True, 3, 1),
    ],
)
def test_a_backward_pass_is_twice_the_forward_pass_and_what_is_computed_again(recompute, backward, times, again):
    layout, how = Layout(tensor=2, pipeline=2, world_size=4), replace(BF16, recompute=recompute)
    given = plan(layout, how)
    found = pass_of_stage(SHAPE, [FIRST], given, how, GPU, backward=backward)
    flops = times * TOKENS * (2 * 3000 + 2 * ATTENTION / 2) + again * TOKENS * 2 * ATTENTION / 2
    assert found.compute == pytest.approx(flops / 1e12, rel=1e-12)
    assert found.pipeline_bytes == (2 if backward else 1) * TOKENS * 96 * 2
    assert found.tensor_bytes == tensor_bytes(SHAPE, [FIRST], given, how, backward=backward)
    # 3 ms a layer's pass, 1.2 times that with transfers.
    assert found.launches == pytest.approx(times * 2 * 0.003 * 1.2)
    links = Links(tensor=4.0, data=0.0, pipeline=8.0)
    assert Pass(1.0, 8.0, 4.0, 99.0).seconds(links) == 1.0 + 2.0 + 0.5


@pytest.mark.parametrize(
    ("layout", "overlap", "graphs", "seconds"),
    [
        (Layout(), False, False, 0.006),
        (Layout(), True, False, 0.006),
        (TENSOR, False, False, 0.0072),
        (TENSOR, True, False, 0.0072),
        (SEQUENCE, False, False, 0.0072),
        (SEQUENCE, True, False, 0.006),
        (SEQUENCE, False, True, 0.0),
    ],
)
def test_layers_are_launched_one_by_one_without_graphs(layout, overlap, graphs, seconds):
    """Transfers beside products are launched with them, where sequence parallelism lets them be."""
    given = plan(layout, cuda_graphs=graphs, tp_comm_overlap=overlap)
    assert pass_of_stage(SHAPE, [FIRST], given, BF16, GPU, backward=False).launches == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("layout", "network", "tensor", "data", "pipeline"),
    [
        (Layout(tensor=8, world_size=8), 10, 80, 80, 80),
        (Layout(tensor=2, world_size=8), 10, 80, 80, 80),
        (Layout(tensor=2, world_size=16), 10, 80, 32, 8),  # four of a ring's members on a node
        (Layout(tensor=2, world_size=16), 50, 80, 80, 40),
        (Layout(tensor=16, world_size=16), 10, 8, 8, 8),
        (Layout(tensor=2, pipeline=2, world_size=16), 10, 80, 80, 8),
        (Layout(tensor=2, context=2, pipeline=2, world_size=8), 10, 80, 80, 80),
        (Layout(context=16, world_size=16), 10, 80, 64, 8),
    ],
    ids=str,
)
def test_groups_use_nvlink_where_they_fit_into_it(layout, network, tensor, data, pipeline):
    """GB/s of 100 over NVLink among 8 GPUs, 80 % of which is reached; through nodes a ring has an adapter for each member."""
    found = Links.of(plan(layout), replace(GPU, network_gb_s=network))
    assert (found.tensor, found.data, found.pipeline) == pytest.approx((tensor * 1e9, data * 1e9, pipeline * 1e9))


def by_hand(given: Plan, stages: list[Stage], own: Layout | None) -> dict[str, float]:
    """Seconds by kind of a step, from the passes of its slowest stages."""
    links, theirs = Links.of(given, GPU), Links.of(given.of_teacher, GPU)
    ranks = given.layout.data * given.layout.context
    student = max(
        (pass_of_stage(SHAPE, one.student, given, BF16, GPU, backward=True) for one in stages),
        key=lambda one: one.seconds(links),
    )
    teacher, count, rounds = Pass(), 6, math.ceil(6 / given.ahead) if given.ahead else 1
    if given.teacher:
        teacher = max(
            (pass_of_stage(TEACHER, one.teacher, given.of_teacher, BF16, GPU, backward=False) for one in stages),
            key=lambda one: one.seconds(theirs),
        )
    of_teacher = math.ceil(6 * given.layout.data / own.data) if own else 6
    idle = (given.layout.pipeline - 1) / (given.layout.virtual_pipeline or 1)
    idle_of_teacher = ((own or given.layout).pipeline - 1) / ((own or given.layout).virtual_pipeline or 1)
    share = 2 if given.layout.sequence else 1
    routed = 6 * TOKENS * 192 * 2 / share if own else 0
    working = count * student.seconds(links) + of_teacher * teacher.seconds(theirs)
    waiting = count * student.launches + of_teacher * teacher.launches - working
    return {
        "student, forward and backward": 6 * student.compute,
        "teacher, forward": of_teacher * teacher.compute,
        "tensor parallel": 6 * student.tensor_bytes / links.tensor + of_teacher * teacher.tensor_bytes / theirs.tensor,
        "pipeline parallel": 6 * student.pipeline_bytes / links.pipeline
        + of_teacher * teacher.pipeline_bytes / theirs.pipeline,
        "teacher's states to the student": routed / links.pipeline,
        "waiting for launches": max(0.0, waiting),
        "idle in the pipeline": rounds * (idle * student.seconds(links) + idle_of_teacher * teacher.seconds(theirs)),
        # The larger stage has 7,000 parameters: float32 gradients scattered, bfloat16 weights gathered.
        "data parallel": (ranks - 1) / ranks * 7000 * (4 + 2) / links.data,
        # Gradients are cleared, and summed once a micro-batch; a rank reads and writes its share of 12 bytes of states.
        "gradients and optimizer": 7000 * (4 + 6 * (2 + 8) + (4 + 2 * 12 + 2) / ranks) / 10e9,
    }


LONG = Layout(pipeline=2, virtual_pipeline=2, tensor=2, sequence=True, world_size=16)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("layout", "teacher", "own", "ahead"),
    [
        (Layout(), False, None, None),
        (Layout(context=2, world_size=8), True, None, None),
        (LONG, False, None, None),
        (LONG, True, None, None),
        (LONG, True, None, 4),
        (LONG, True, Layout(tensor=4, world_size=16), 4),
        (Layout(world_size=6), True, Layout(pipeline=3, world_size=6), 5),
    ],
    ids=str,
)
def test_a_step_is_its_passes_its_bubble_its_collectives_and_its_optimizer(layout, teacher, own, ahead, graphs):
    """Six micro-batches of a rank; the slowest stage sets the pace, of each model in its own layout."""
    stages = [Stage(0, (FIRST,), (FIRST,) if teacher else ()), Stage(1, (LAST,), (LAST,) if teacher else ())]
    given = plan(layout, cuda_graphs=graphs, ahead=ahead if teacher else None, teacher_layout=own)
    given = replace(given, teacher=TEACHER if teacher else None)
    for order in (1, -1):
        found = speed.time_of_step(stages[::order], given, GPU)
        wanted = by_hand(given, stages, own)
        assert found.seconds == pytest.approx(wanted, rel=1e-12)
        assert found.total == pytest.approx(sum(wanted.values()))
        rounds = math.ceil(6 / ahead) if ahead else 1
        assert found.bubble == rounds * (layout.pipeline - 1) / (layout.virtual_pipeline or 1) / 6
        assert found.tokens == 6 * 2 * 64 * layout.data
        links, theirs = Links.of(given, GPU), Links.of(given.of_teacher, GPU)
        if links == theirs:
            for kind, link in {"tensor parallel": links.tensor, "pipeline parallel": links.pipeline}.items():
                assert found.sent[kind] == pytest.approx(wanted[kind] * link)
        assert found.sent["data parallel"] == pytest.approx(wanted["data parallel"] * links.data)
        assert found.sent["teacher's states to the student"] == pytest.approx(
            wanted["teacher's states to the student"] * links.pipeline
        )
    assert Step({"a": 1.0, "b": 2.5}, {}, 0.0, 1).total == 3.5


@pytest.mark.parametrize(("layers", "copied"), [(0, 0), (1, 0), (2, 0), (3, 3), (5, 5)])
def test_layers_in_cpu_memory_are_copied_unless_both_buffers_hold_them_all(monkeypatch, layers, copied):
    """4 GB a layer, at 80 % of 5 GB/s."""
    monkeypatch.setattr(speed, "layers_in_cpu_memory", lambda *_: [4 * 10**9] * layers)
    given = replace(plan(), teacher=TEACHER)
    plain = pass_of_stage(TEACHER, [FIRST], given, BF16, GPU, backward=False)
    found = speed._pass_of_teacher(Stage(0, (FIRST,), (FIRST,)), given, GPU)
    assert found == replace(plain, compute=copied * 1.0 if copied else plain.compute)
