"""Who has what of a micro-batch and who sends it, rank by rank; answers of a cache in their order; the projection's beginning."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.distill import intermediate
from minitron_megatron.distill.cache import CachedTeacher
from minitron_megatron.distill.intermediate import IntermediateLoss, Projection, distances
from minitron_megatron.distill.losses import TopK
from minitron_megatron.distill.routing import Side, _joined, _rows, messages, route
from minitron_megatron.parallel.layout import Layout

TENSOR = Layout(tensor=2, world_size=4)
SEQUENCE = Layout(tensor=2, sequence=True, world_size=4)
PIPELINE = Layout(pipeline=2, world_size=4)


@pytest.mark.parametrize(
    ("side", "numbers", "ranks"),
    [
        (Side.of_tokens(TENSOR), [[0, 2, 4], [0, 2, 4], [1, 3], [1, 3]], {0: [0, 1], 1: [2, 3], 2: [0, 1]}),
        (Side.of_tokens(PIPELINE), [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3]], {0: [0, 2], 1: [1, 3]}),
        (Side.of_final_states(PIPELINE), [[], [], [0, 2, 4], [1, 3]], {0: [2], 1: [3], 4: [2]}),
        (Side.of_final_states(Layout(context=2, world_size=4)), [[0, 2, 4]] * 2 + [[1, 3]] * 2, {0: [0, 1], 1: [2, 3]}),
    ],
)
def test_micro_batches_are_those_of_a_ranks_place(side, numbers, ranks):
    assert [list(side.numbers(rank, 5)) for rank in range(4)] == numbers
    for number, wanted in ranks.items():
        assert list(side.ranks(number)) == wanted


@pytest.mark.parametrize(
    ("side", "senders"),
    [
        # Both have it all: the receiver itself, or one of them by the receiver's number.
        (Side.of_tokens(TENSOR), [[0], [1], [0], [1]]),
        (Side.of_tokens(PIPELINE), [[0], [2], [2], [2]]),
        (Side.of_final_states(PIPELINE), [[2], [2], [2], [2]]),
        # Each has a part, and sends it to everybody.
        (Side.of_final_states(SEQUENCE), [[0, 1]] * 4),
        (Side.of_tokens(Layout(context=2, world_size=4)), [[0, 1]] * 4),
    ],
)
def test_every_receiver_has_its_senders(side, senders):
    assert [side.senders(0, to) for to in range(4)] == senders


def test_positions_of_a_sequence_are_split_over_context_and_tensor_ranks():
    layout = Layout(context=2, tensor=2, sequence=True, world_size=4)
    found = [Side.of_final_states(layout).positions(rank, 16).tolist() for rank in range(4)]
    assert found == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert Side.of_tokens(layout).positions(1, 16).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert not Side.of_final_states(Layout(sequence=True)).split and not Side.of_tokens(layout).last_stage


def test_messages_are_those_of_the_drawing():
    """Rank 0 keeps the first half of 0 and 2, and sends those of 1 and 3; rank 1 sends second halves of 0 and 2."""
    teacher, student = (
        Side.of_final_states(Layout(tensor=2, sequence=True, world_size=2)),
        Side.of_final_states(Layout(world_size=2)),
    )
    found = [
        (m.number, m.sender, m.to, m.rows.tolist(), m.places.tolist()) for m in messages(teacher, student, 0, 4, 4)
    ]
    assert found == [
        (1, 0, 1, [0, 1], [0, 1]), (3, 0, 1, [0, 1], [0, 1]),
        (0, 0, 0, [0, 1], [0, 1]), (0, 1, 0, [0, 1], [2, 3]), (2, 0, 0, [0, 1], [0, 1]), (2, 1, 0, [0, 1], [2, 3]),
    ]  # fmt: skip


def test_rows_that_follow_one_another_are_a_view_and_parts_are_put_at_their_places():
    tensor = torch.arange(12).view(6, 2)
    for rows in ([1, 2, 3], [0], [5], [4, 1], [0, 2]):
        found = _rows(tensor, np.array(rows))
        assert found.tolist() == tensor[rows].tolist()
        shares = found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert shares == (rows == list(range(rows[0], rows[-1] + 1)))
    parts = [(np.array([2, 0]), torch.tensor([[1], [2]])), (np.array([1, 3]), torch.tensor([[3], [4]]))]
    assert _joined(parts, 4).tolist() == [[2], [3], [1], [4]] and _joined(parts[:1], 2) is parts[0][1]


def routed(source, target, count, length):
    """What this rank has of micro-batches whose every position says which it is, [positions, 2]."""
    from minitron_megatron.parallel import collectives

    me, like = collectives.rank(), torch.empty(0, 2, dtype=torch.int64)

    def of(side):
        return [
            torch.tensor([[number, place] for place in side.positions(me, length)])
            for number in side.numbers(me, count)
        ]

    found = route(of(source), source, target, count=count, length=length, like=like)
    wanted = of(target)
    same = len(found) == len(wanted) and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    # What is kept of one's own is not held as a part of something larger.
    small = all(one.untyped_storage().nbytes() == one.numel() * 8 for one in found)
    return same, small


@pytest.mark.parametrize(
    ("source", "target"),
    [(SEQUENCE, Layout(world_size=4)), (Layout(world_size=4), SEQUENCE), (PIPELINE, Layout(context=2, world_size=4))],
    ids=str,
)
def test_every_rank_gets_what_it_needs_and_holds_no_more(gloo, source, target):
    sides = (Side.of_final_states(source), Side.of_final_states(target))
    assert gloo(4, routed, *sides, 5, 8) == [(True, True)] * 4


# Answers of a cache


def test_answers_of_a_cache_come_in_the_order_of_the_micro_batches(monkeypatch):
    """The next is read while this one is used; a rank's positions of each, as [s, b, K]; what fills up a round is sample 0."""
    asked = []

    def of_samples(numbers, split, tokens):
        asked.append((list(numbers), split, list(tokens)))
        ids = torch.tensor(numbers)[:, None, None] * 100 + torch.arange(4)[:, None] * 10 + torch.arange(2)
        return TopK(ids, ids / 7, ids[..., 0] / 3)

    teacher = CachedTeacher(SimpleNamespace(of_samples=of_samples))
    monkeypatch.setattr(
        teacher, "_thread", SimpleNamespace(submit=lambda f, *given: SimpleNamespace(result=lambda: f(*given)))
    )
    batches = [
        {
            "number": torch.tensor(numbers),
            "checksum": torch.tensor([7, 8]),
            "position_ids": torch.tensor([[0, 3]] * 2),
            "tokens": torch.zeros(2, 2),
        }
        for numbers in ([3, 1], [2, -1], [0, 4])
    ]
    for split in ("train", "validation"):
        teacher.run_ahead(batches)
        asked.clear()
        for batch, numbers in zip(batches, ([3, 1], [2, 0], [0, 4]), strict=True):
            found = teacher.targets(batch, split)
            wanted = [[[n * 100 + place * 10 + k for k in range(2)] for n in numbers] for place in (0, 3)]
            assert found.ids.tolist() == wanted and found.rest.shape == (2, 2)
            assert torch.equal(found.log_probs, torch.tensor(wanted) / 7)
        assert asked == [([3, 1], split, [7, 8]), ([2, 0], split, [7, 8]), ([0, 4], split, [7, 8])]
    assert CachedTeacher.ahead is None


# Intermediate states


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def projection(width, teacher_width, copy=0, copies=1, seed=5, sequence=False, dtype=torch.float32):
    config = SimpleNamespace(hidden_size=width, params_dtype=dtype, sequence_parallel=sequence)
    return Projection(config, teacher_width, seed=seed, copy=copy, copies=copies).weight


def test_a_projection_begins_as_the_identity_or_with_normal_values_of_its_seed(on_cpu):
    assert torch.equal(projection(6, 6), torch.eye(6))
    drawn = projection(64, 100).detach()
    assert (
        drawn.shape == (100, 64) and float(drawn.std()) * 8 == pytest.approx(1, rel=0.05) and abs(drawn.mean()) < 0.01
    )
    assert torch.equal(drawn, projection(64, 100)) and not torch.equal(drawn, projection(64, 100, seed=6))
    assert projection(6, 6, dtype=torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize(("copy", "copies", "shared"), [(0, 1, None), (0, 2, False), (1, 2, True), (2, 3, True)])
def test_copies_of_a_projection_are_one_parameter(on_cpu, copy, copies, shared):
    for sequence in (False, True):
        weight = projection(6, 6, copy, copies, sequence=sequence)
        assert weight.sequence_parallel is sequence
        assert getattr(weight, "shared", None) is shared and hasattr(weight, "shared_embedding") == (copies > 1)


def test_distances_are_of_normalised_states():
    """1 − cos, of states without their mean and size: 0, 1 and 2."""
    state, weight = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.eye(4)
    same, turned = 5 * state - 2, -state
    across = torch.tensor([1.0, 0.0, 0.0, 0.0]) * 4 + torch.tensor([0.0, 1.0, 2.0, 0.0])
    found = distances(state.expand(3, 4), torch.stack([same, turned, across]), weight)
    centred = [one - one.mean() for one in (state, across)]
    wanted = 1 - torch.dot(*centred) / (centred[0].norm() * centred[1].norm())
    torch.testing.assert_close(found, torch.stack([torch.tensor(0.0), torch.tensor(2.0), wanted]), rtol=1e-4, atol=1e-5)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert distances(state.to(dtype), same.to(dtype), weight.to(dtype)).dtype is wide


@pytest.mark.parametrize("counts", [True, False])
def test_a_sum_is_taken_once_and_by_one_of_those_that_have_its_tokens(counts):
    loss = IntermediateLoss([], [], 1.0, 0)
    loss.total, loss.counts = torch.tensor(2.5, dtype=torch.float64), counts
    assert [loss.take_sum(), loss.take_sum()] == ([2.5, 0.0] if counts else [0.0, 0.0])


@pytest.mark.parametrize(("split", "ranks"), [(False, [[0, 1, 2, 3]] * 2), (True, [[0, 1], [2, 3]])])
def test_a_rank_has_its_own_tokens_where_they_are_split(monkeypatch, split, ranks):
    from megatron.core import parallel_state as ps

    loss = IntermediateLoss([], [], 1.0, 0)
    loss.split_tokens = split
    monkeypatch.setattr(ps, "get_tensor_model_parallel_world_size", lambda: 2)
    for rank, wanted in enumerate(ranks):
        monkeypatch.setattr(ps, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert loss._own_tokens(torch.arange(4)[:, None]).flatten().tolist() == wanted


@pytest.mark.parametrize(("state", "found"), [(-1, (1, "embedding")), (0, (0, 1)), (2, (1, 3)), (3, (1, 4)), (4, None)])
def test_a_state_comes_out_of_its_layer_or_the_embedding(state, found):
    """Chunks of layers 1, 2 and 3, 4; the second has the embedding here."""
    chunks = [
        SimpleNamespace(
            pre_process=number == 1,
            embedding="embedding",
            decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=n) for n in layers]),
        )
        for number, layers in enumerate(((1, 2), (3, 4)))
    ]
    place = intermediate._place(chunks, state)
    if isinstance(found, tuple) and isinstance(found[1], int):
        assert (place[0], place[1].layer_number) == found
    else:
        assert place == found
