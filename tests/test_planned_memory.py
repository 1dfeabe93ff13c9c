"""Bytes of a planned rank, worked out by hand: what each kind of layer keeps, what is alive for a moment, and who holds what."""

from dataclasses import replace

import pytest
import torch

from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import census
from minitron_megatron.train.census import Chunk, Stage, distinct_stages, take_census
from minitron_megatron.train.memory import (
    Arithmetic,
    MicroBatch,
    Plan,
    chunk_activations,
    in_flight,
    layer_bytes,
    memory_of_stage,
)

# Two samples of 64 tokens.
TOKENS, HIDDEN, Q, KV, FFN = 128, 96, 8 * 16, 4 * 16, 160
TE = Arithmetic(torch.bfloat16, "te")


def shape(family: str = "llama", **sizes) -> ModelShape:
    given = {
        "num_layers": 4, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 8, "num_query_groups": 4,
        "head_dim": 16, "vocab_size": 1000, "max_position_embeddings": 128, "rope_theta": 1e4, "norm_eps": 1e-5,
        "tied_embeddings": False, "dtype": "bfloat16", "rotary_percent": 0.5 if family == "nemotron" else 1.0, **sizes,
    }  # fmt: skip
    return ModelShape(family=family, **given)


def kept(how: Arithmetic, layout: Layout = Layout(), family: str = "llama", layer: int = 0, **sizes) -> int:  # noqa: B008
    return layer_bytes(shape(family, **sizes), layer, layout, MicroBatch.of(2, 64, layout), how)


# What a layer keeps

# Of each token: a norm's input and 1/rms, and its output, a linear's input; values (a copy), rotated queries and keys,
# attention's output and a log-sum-exp a head; the first product of the feed-forward block and the second one's input.
NORMS = 2 * (2 * HIDDEN + 4 + 2 * HIDDEN)
ATTENTION = 2 * KV + 2 * (Q + KV) + 2 * Q + 4 * 8
MLP = 2 * 2 * FFN + 2 * FFN


@pytest.mark.parametrize(
    ("how", "a_token"),
    [
        ({}, NORMS + ATTENTION + MLP),
        ({"recompute": "full"}, 2 * HIDDEN),
        ({"recompute": "selective"}, NORMS + ATTENTION - 4 * 8 + MLP),
        # In FP8 linears keep a byte a number of their inputs, the output linear a copy beside attention's output.
        ({"fp8": True}, NORMS - 2 * HIDDEN + ATTENTION + Q + MLP - FFN),
        ({"dtype": torch.float32}, 2 * (NORMS - 8) + 8 + 2 * (ATTENTION - 32) + 32 + 2 * MLP),
    ],
)
def test_a_layer_of_transformer_engine_keeps(how, a_token):
    assert kept(replace(TE, **how)) == TOKENS * a_token
    assert kept(replace(TE, **how), Layout(context=2, world_size=2)) == TOKENS // 2 * a_token


def test_tensor_parallel_ranks_keep_their_share():
    """Of attention and the feed-forward block always, of the residual stream with sequence parallelism."""
    inner = ATTENTION + MLP
    assert kept(TE, Layout(tensor=2, world_size=2)) == TOKENS * NORMS + TOKENS * inner // 2
    assert kept(TE, Layout(tensor=2, sequence=True, world_size=2)) == TOKENS * (NORMS + inner) // 2
    full = replace(TE, recompute="full")
    assert kept(full, Layout(tensor=2, sequence=True, world_size=2)) == TOKENS * 2 * HIDDEN // 2


def test_layers_keep_by_their_own_width():
    widths = (16, 160, 64, 32)
    found = [kept(TE, layer=layer, ffn_hidden_size=widths) for layer in range(4)]
    assert found == [TOKENS * (NORMS + ATTENTION + 6 * width) for width in widths]


def test_families_keep_what_their_norms_and_blocks_do():
    # Two statistics a token of a LayerNorm; no gate.
    assert kept(TE, family="nemotron") == TOKENS * (NORMS + 2 * 4 + ATTENTION + 4 * FFN)
    # Norms of heads keep the mixed output of the qkv linear, a statistic a head, and a copy of grouped queries.
    mixed = 2 * (Q + 2 * KV) - 2 * KV
    assert kept(TE, family="qwen3") == TOKENS * (NORMS + ATTENTION + mixed + 4 * (8 + 4) + 2 * Q + MLP)
    # Without groups a rank has as many keys as queries, which are views of the mixed output.
    alone = 2 * 3 * Q + 2 * 2 * Q + 2 * Q + 4 * 8 + 4 * (8 + 8)
    assert kept(TE, family="qwen3", num_query_groups=8) == TOKENS * (NORMS + alone + MLP)


def test_local_layers_keep_scores_and_a_mask():
    """float32 scores and a copy in the model's dtype; keys and values of a group are repeated for its queries."""
    local, scores = Arithmetic(torch.bfloat16, "local"), 64 * 8
    rotary = 4 * 64 * 16 * 2
    found = kept(local)
    assert found == TOKENS * (NORMS + 3 * 2 * Q + 2 * Q + 6 * scores + 5 * 2 * FFN) + rotary + 64**2
    plain = kept(local, num_query_groups=8)
    assert plain == TOKENS * (NORMS + 2 * 3 * Q + 2 * 2 * Q + 2 * Q + 6 * scores + 5 * 2 * FFN) + rotary + 64**2
    selective = kept(replace(local, recompute="selective"))
    assert selective == TOKENS * (NORMS + 2 * (Q + 2 * KV) + 2 * (Q + KV) + 2 * Q + 5 * 2 * FFN) + rotary
    # Of a sequence that is split over two ranks each has its queries, and the keys of both.
    half = kept(local, Layout(context=2, world_size=2))
    assert half == TOKENS // 2 * (NORMS + 8 * Q + 6 * scores + 10 * FFN) + rotary // 2 + 64**2


def test_a_chunk_keeps_its_layers_token_ids_and_the_final_norm():
    first = Chunk((0, 1), 0, 0, 0, embedding=True, head=False, stored={})
    last = Chunk((2, 3), 0, 0, 0, embedding=False, head=True, stored={})
    model, layout = shape(ffn_hidden_size=(16, 160, 64, 32)), Layout()
    batch = MicroBatch.of(2, 64, layout)
    found = [chunk_activations(model, chunk, layout, batch, TE) for chunk in (first, last)]
    assert found[0] == TOKENS * (2 * (NORMS + ATTENTION) + 6 * (16 + 160) + 8)
    assert found[1] == TOKENS * (2 * (NORMS + ATTENTION) + 6 * (64 + 32) + 2 * HIDDEN + 4 + 2 * HIDDEN)


@pytest.mark.parametrize(
    ("layout", "micro_batches", "stages"),
    [
        (Layout(), 4, [1]),
        (Layout(pipeline=4, world_size=4), 8, [4, 3, 2, 1]),
        (Layout(pipeline=4, world_size=4), 2, [2, 2, 2, 1]),
        (Layout(pipeline=4, virtual_pipeline=2, world_size=4), 8, [11, 9, 7, 5]),
        (Layout(pipeline=4, virtual_pipeline=3, world_size=4), 8, [15, 13, 11, 9]),
        (Layout(pipeline=4, virtual_pipeline=2, world_size=4), 4, [8, 8, 7, 5]),
    ],
)
def test_stages_keep_what_the_schedule_has_begun(layout, micro_batches, stages):
    assert [in_flight(layout, stage, micro_batches) for stage in range(layout.pipeline)] == stages


# What is alive for a moment

STUDENT = Chunk((0, 1), 10_000, 6_000, 4_000, embedding=False, head=False, stored={})
THEIRS = Chunk((0, 1, 2), 20_000, 9_000, 5_000, embedding=False, head=False, stored={})
TEACHER = shape(hidden_size=192, num_layers=6)


def plan(how: Arithmetic = TE, layout: Layout = Layout(), teacher: bool = False, **more) -> Plan:  # noqa: B008
    beside = TEACHER if teacher else None
    return Plan(shape(), beside, layout, MicroBatch.of(2, 64, layout), 4, how, more.pop("teacher_how", how), **more)


def stage(student: Chunk = STUDENT, *teacher: Chunk) -> Stage:
    return Stage(0, (student,), teacher)


WORK = "loss, or work of a layer"
GATHERED = 2 * TOKENS * HIDDEN * 2
# Gradients of queries and keys, cuDNN's parts of dq (2 bytes a score, or 4 a number of the queries), and dk and dv of every
# query head.
BACKWARD = TOKENS * (2 * (Q + KV) * 2 + 2 * 64 * 8 + 4 * Q)
INNER = TOKENS * 3 * FFN * 2


@pytest.mark.parametrize(
    ("how", "alive"),
    [
        ({}, max(INNER, BACKWARD - TOKENS * MLP)),
        ({"fixed_order": False}, max(INNER, BACKWARD + TOKENS * (4 * Q - 2 * 64 * 8) - TOKENS * MLP)),
        ({"recompute": "full"}, max(INNER, BACKWARD - TOKENS * MLP) + TOKENS * (NORMS + ATTENTION + MLP)),
        ({"recompute": "selective"}, max(INNER, BACKWARD - TOKENS * MLP) + TOKENS * 4 * 8),
    ],
)
def test_a_layers_backward_pass_works_in_gradients_and_what_is_computed_again(how, alive):
    assert memory_of_stage(stage(), plan(replace(TE, **how)))[WORK] == GATHERED + alive


def test_attention_works_in_more_than_the_feed_forward_block_where_sequences_are_long():
    """And in half of its scores where context parallelism takes a rank's keys in turn."""
    long = Plan(shape(), None, Layout(), MicroBatch.of(1, 4096, Layout()), 4, TE, TE)
    backward = 4096 * (2 * (Q + KV) * 2 + 2 * 4096 * 8 + 4 * Q)
    assert memory_of_stage(stage(), long)[WORK] == 2 * 4096 * HIDDEN * 2 + backward - 4096 * MLP
    plain = replace(long, student=shape(num_query_groups=8))
    without_repeats = 4096 * (2 * 2 * Q * 2 + 2 * 4096 * 8)
    assert memory_of_stage(stage(), plain)[WORK] == 2 * 4096 * HIDDEN * 2 + without_repeats - 4096 * MLP
    layout = Layout(context=2, world_size=2)
    half = replace(long, layout=layout, batch=MicroBatch.of(1, 4096, layout))
    backward = 2048 * (2 * (Q + KV) * 2 + 2 * 2048 * 8 + 4 * Q)
    assert memory_of_stage(stage(), half)[WORK] == 2 * 2048 * HIDDEN * 2 + backward - 2048 * MLP


def test_local_layers_work_in_scores_and_hold_a_matrixs_gradient():
    """Scores, their masked and float32 forms; a gradient in the model's dtype, as of an embedding and a head everywhere."""
    local = Arithmetic(torch.bfloat16, "local")
    scores = TOKENS * 64 * 8 * (4 + 2 * 2)
    assert memory_of_stage(stage(), plan(local))[WORK] == GATHERED + scores + 4_000 * 2
    works = GATHERED + max(INNER, BACKWARD - TOKENS * MLP)
    assert memory_of_stage(stage(), plan())[WORK] == works
    assert memory_of_stage(stage(replace(STUDENT, embedding=True)), plan())[WORK] == works + 4_000 * 2


def test_a_teachers_layer_works_forward_alone_and_the_larger_of_both_counts():
    of_student = GATHERED + max(INNER, BACKWARD - TOKENS * MLP)
    for width in (100, 200):
        given = replace(plan(teacher=True), teacher=shape(hidden_size=192, num_layers=6, ffn_hidden_size=width))
        of_teacher = 2 * TOKENS * 192 * 2 + TOKENS * 3 * width * 2
        assert memory_of_stage(stage(STUDENT, THEIRS), given)[WORK] == max(of_student, of_teacher)
        assert (of_teacher > of_student) == (width == 200)
    # In graphs layers work in memory of their own.
    with_graphs = memory_of_stage(stage(STUDENT, THEIRS), plan(teacher=True, cuda_graphs=True))
    assert with_graphs[WORK] == 0


def test_captured_layers_work_in_memory_of_their_own():
    """What attention works in does not take the place of what the feed-forward block has kept; a copy of each layer's input for
    the micro-batches in flight, and gradients at either end. Of the teacher a layer, and what goes in and comes out."""
    name, copies = "what CUDA graphs work in", (2 * 1 + 2) * TOKENS * HIDDEN * 2
    work = INNER + BACKWARD + GATHERED
    assert memory_of_stage(stage(), plan(cuda_graphs=True))[name] == work + copies
    found = memory_of_stage(stage(STUDENT, THEIRS), plan(teacher=True, cuda_graphs=True))[name]
    norms, residual = 2 * (2 * 192 + 4 + 2 * 192), TOKENS * 192 * 2
    assert found == work + copies + TOKENS * (norms + ATTENTION + MLP) + 2 * residual + 2 * residual
    assert name not in memory_of_stage(stage(), plan())
    # The first of two stages has two micro-batches in flight.
    piped = plan(layout=Layout(pipeline=2, world_size=2), cuda_graphs=True)
    assert memory_of_stage(stage(), piped)[name] == work + (2 * 2 + 2) * TOKENS * HIDDEN * 2


# Who holds what


def test_a_rank_holds_weights_gradients_and_its_share_of_the_states():
    layout = Layout(context=2, world_size=8)
    found = memory_of_stage(stage(), plan(layout=layout))
    assert found["weights"] == 20_000 and found["gradients"] == 40_000
    assert found["optimizer"] == 10_000 * 12 // 8
    assert memory_of_stage(stage(), plan(replace(TE, fp8=True)))["weights"] == 20_000 + 2 * 6_000
    half = memory_of_stage(stage(), plan(state_precision="bf16"))
    assert half["optimizer"] == 10_000 * 8
    single = memory_of_stage(stage(), plan(Arithmetic(torch.float32, "te")))
    assert (single["weights"], single["gradients"], single["optimizer"]) == (40_000, 40_000, 80_000)


def test_activations_are_of_the_micro_batches_in_flight_and_of_every_chunk():
    layout = Layout(pipeline=2, virtual_pipeline=2, world_size=2)
    two = Stage(0, (STUDENT, replace(STUDENT, layers=(2,))), ())
    layer = TOKENS * (NORMS + ATTENTION + MLP)
    # Four passes of warm-up and one more, each of one of both chunks.
    assert memory_of_stage(two, plan(layout=layout))["activations"] == 3 * layer * 5 // 2
    assert memory_of_stage(stage(), plan(layout=Layout(pipeline=2, world_size=2)))["activations"] == 2 * layer * 2


HEAD = 1024 * 192


@pytest.mark.parametrize(
    ("how", "student", "theirs", "tied", "own", "numbers"),
    [
        ({}, False, False, False, None, 2 * 20_000),
        ({"fp8": True}, False, False, False, None, 2 * 20_000 - 9_000),
        ({"fp8_head": True}, True, True, False, None, 2 * 20_000 - HEAD),
        ({"fp8_head": True}, False, False, False, None, 2 * 20_000),
        ({"fp8_head": True}, True, True, True, None, 2 * 20_000 + HEAD),
        # In a layout of its own the output matrix is where the student's head is, in the student's shards.
        ({}, True, False, False, Layout(tensor=2, pipeline=2, world_size=4), 2 * (20_000 + HEAD)),
        ({}, False, True, False, Layout(tensor=2, pipeline=2, world_size=4), 2 * (20_000 - HEAD // 2)),
        ({}, True, True, False, Layout(tensor=2, pipeline=2, world_size=4), 2 * (20_000 + HEAD - HEAD // 2)),
        ({"fp8_head": True}, True, False, True, Layout(tensor=2, pipeline=2, world_size=4), 2 * 20_000 + HEAD),
    ],
)
def test_a_teacher_holds_its_weights_in_what_they_are_in(how, student, theirs, tied, own, numbers):
    given = plan(
        teacher=True, teacher_how=replace(TE, **how), teacher_layout=own, layout=Layout(pipeline=4, world_size=4)
    )
    given = replace(given, teacher=shape(hidden_size=192, num_layers=6, tied_embeddings=tied))
    one = stage(replace(STUDENT, head=student), replace(THEIRS, head=theirs))
    assert memory_of_stage(one, given)["teacher weights"] == numbers


def test_the_matrix_of_a_tied_teacher_stays_where_it_is_the_embedding_too():
    own = Layout(tensor=2, world_size=4)
    given = plan(teacher=True, teacher_layout=own, layout=Layout(pipeline=4, world_size=4))
    given = replace(given, teacher=shape(hidden_size=192, num_layers=6, tied_embeddings=True))
    for embedding, parameters in ((True, 20_000), (False, 20_000 - HEAD // 2)):
        one = stage(STUDENT, replace(THEIRS, head=True, embedding=embedding))
        assert memory_of_stage(one, given)["teacher weights"] == 2 * parameters


STATES, NAME = TOKENS * 192 * 2, "teacher hidden states"
FOUR = Layout(pipeline=4, world_size=4)


@pytest.mark.parametrize(
    ("layout", "own", "ahead", "student", "theirs", "count"),
    [
        (Layout(), None, None, True, True, 1),
        (FOUR, None, None, True, True, 4),
        (FOUR, None, 3, True, True, 3),
        (FOUR, None, 9, True, True, 4),
        (FOUR, None, None, False, False, 0),
        (FOUR, Layout(tensor=4, world_size=4), None, True, True, 4 + 4),
        (FOUR, Layout(tensor=4, world_size=4), 2, True, True, 2 + 2),
        (FOUR, Layout(tensor=4, world_size=4), 2, False, True, 2),
        (FOUR, Layout(world_size=4), 3, False, True, 1),  # three over four ranks, rounded up
        (FOUR, Layout(pipeline=2, world_size=4), 3, True, False, 3),
        (Layout(world_size=4), Layout(tensor=4, world_size=4), 1, False, True, 4),
    ],
)
def test_a_teacher_keeps_the_states_of_a_round_where_they_are_made_and_where_they_are_used(
    layout, own, ahead, student, theirs, count
):
    given = plan(teacher=True, layout=layout, teacher_layout=own, ahead=ahead)
    one = stage(replace(STUDENT, head=student), replace(THEIRS, head=theirs))
    assert memory_of_stage(one, given)[NAME] == count * STATES
    assert NAME not in memory_of_stage(stage(), plan(layout=layout))


# Which ranks are counted


@pytest.mark.parametrize(("pipeline", "some"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 7])])
def test_stages_between_the_second_and_the_last_are_as_the_second(pipeline, some):
    assert distinct_stages(pipeline, uniform=True) == some
    assert distinct_stages(pipeline, uniform=False) == list(range(pipeline))


def test_a_rank_of_every_pair_of_stages_that_meet_is_counted(monkeypatch):
    """Of eight stages three are built; ranks of the teacher's two stages meet the student's in order."""
    built = []

    def chunks(model, layout, number, dtype):
        built.append((model.num_layers, number))
        return (replace(STUDENT, parameters=100 * model.num_layers + number),)

    monkeypatch.setattr(census, "_chunks", chunks)
    layout, own = Layout(pipeline=8, world_size=16), Layout(pipeline=2, world_size=16)
    found = take_census(shape(num_layers=8), shape(num_layers=6), layout, None, None, own)
    # Stages of two ranks each: the second stands for the third to the seventh.
    assert [(one.number, one.teacher_number) for one in found] == [(0, 0), (1, 0), (1, 1), (7, 1)]
    assert [one.student[0].parameters for one in found] == [800, 801, 801, 807]
    assert [one.teacher[0].parameters for one in found] == [600, 600, 601, 601]
    assert built == [(8, 0), (8, 1), (8, 7), (6, 0), (6, 1)]
    alone = take_census(shape(num_layers=8), None, layout, None, None)
    assert [(one.number, one.teacher, one.teacher_number) for one in alone] == [(n, (), None) for n in (0, 1, 7)]
    beside = take_census(shape(num_layers=8), shape(num_layers=6), Layout(pipeline=2, world_size=2), None, None)
    assert [(one.number, one.teacher[0].parameters, one.teacher_number) for one in beside] == [
        (0, 600, None),
        (1, 601, None),
    ]
    # Where layers differ, or are laid out by hand, every stage counts.
    uneven = shape(ffn_hidden_size=(16, 32, 48, 64))
    four = Layout(pipeline=4, world_size=4)
    by_hand = replace(four, pipeline_layout="Et|t|t|tL")
    for student, teacher, where in ((uneven, None, four), (shape(), uneven, four), (shape(), None, by_hand)):
        assert [one.number for one in take_census(student, teacher, where, None, None)] == [0, 1, 2, 3]
    assert [one.number for one in take_census(shape(), None, four, None, None)] == [0, 1, 3]
