"""Passes of a model, with stand-ins for it: what a schedule is given, which loss is taken, which tokens are picked."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.models import forward, generation, head, loss
from minitron_megatron.models.forward import attention_mask, forward_only, labels_of
from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.generation import NOT_FINITE, Sampling, _answer, _finite, _pick, _with_a_cache, generate
from minitron_megatron.models.head import Head, fused_loss
from minitron_megatron.models.loss import FirstLoss, summed_loss, summed_terms
from minitron_megatron.models.objective import CrossEntropy, NextToken
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from tests.through_head import identity_of_this_rank

# Forward-only passes


def test_a_token_does_not_look_at_later_ones_nor_at_other_documents():
    assert attention_mask({}) is None
    found = attention_mask({"documents": torch.tensor([[0, 0, 1], [0, 1, 1]])})
    assert found.shape == (2, 1, 3, 3)
    assert (~found[:, 0]).int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    assert labels_of({"labels": torch.tensor([[1, 2], [3, 4]])}).tolist() == [[1, 3], [2, 4]]


class Stage(torch.nn.Module):
    """A chunk that hands its tokens on as hidden states."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, tokens, positions, mask, *, output_processor, output_processor_context):
        self.said.append((tokens.item(), positions.item(), mask))
        return output_processor(
            hidden_states=tokens, output_layer="layer", output_weight="w", context=output_processor_context, more=1
        )


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_micro_batch_runs_through_every_chunk_without_gradients(monkeypatch, chunks):
    said, asked, ran = [], [], []

    def schedule(*, forward_step_func, data_iterator, model, **given):
        asked.append(given)
        iterators = data_iterator if chunks > 1 else [data_iterator]
        assert len(iterators) == len(model) == chunks and not torch.is_grad_enabled()
        for _ in range(given["num_microbatches"]):
            for data, one in zip(iterators, model, strict=True):
                assert not one.training
                out, collect = forward_step_func(data, one)
                assert collect(out) is None and collect(out, non_loss_data=True) is None
                ran.append(out.item())

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(forward, "_schedule", lambda given, groups: asked.append((len(given), groups)) or schedule)
    batches = ({"tokens": torch.tensor([n]), "position_ids": torch.tensor([10 * n])} for n in (1, 2, 3))
    before = []
    found = forward_only(
        [Stage(said) for _ in range(chunks)],
        batches,
        num_micro_batches=3,
        micro_batch_size=5,
        sequence_length=7,
        collect=lambda batch, **given: (batch["tokens"].item(), *sorted(given)),
        before=lambda batch: before.append(batch["tokens"].item()),
        groups="groups",
    )
    each = [n for n in (1, 2, 3) for _ in range(chunks)]
    assert ran == each == before and said == [(n, 10 * n, None) for n in each]
    assert found == [(n, "hidden_states", "output_layer", "output_weight") for n in each]
    sizes = {"num_microbatches": 3, "seq_length": 7, "micro_batch_size": 5}
    assert asked == [(chunks, "groups"), {**sizes, "forward_only": True, "collect_non_loss_data": True}]


def test_a_model_of_other_groups_has_a_schedule_of_its_own(monkeypatch):
    whole = "megatron.core.pipeline_parallel"
    monkeypatch.setattr(f"{whole}.get_forward_backward_func", lambda **how: lambda **given: (how, given))
    monkeypatch.setattr(f"{whole}.p2p_communication.P2PCommunicator", lambda group, config: (group, config))
    pp = SimpleNamespace(size=lambda: 4)
    groups, chunk = SimpleNamespace(pp=pp), SimpleNamespace(config="config")
    assert forward._schedule([chunk], None)() == ({}, {})
    found = forward._schedule([chunk, None], groups)(x=1)
    assert found == ({"pp_size": 4}, {"p2p_communicator": (pp, "config"), "pg_collection": groups, "x": 1})


# The head


@pytest.mark.parametrize(
    ("rows", "columns", "most", "sizes"),
    [
        (10, 4, 10 * 4 * 8, [10]),
        (10, 4, 10 * 4 * 8 - 1, [5, 5]),
        (10, 4, 5 * 4 * 8, [5, 5]),
        (10, 4, 4 * 4 * 8, [4, 4, 2]),
        (10, 4, 4 * 8, [1] * 10),
        (10, 4, 1, [1] * 10),
        (7, 4, 3 * 4 * 8, [3, 3, 1]),
    ],
)
def test_pieces_are_as_few_and_as_even_as_logits_allow(rows, columns, most, sizes):
    given = Head(torch.zeros(rows, 1, 3, dtype=torch.float64), torch.zeros(columns, 3, dtype=torch.float64))
    found = list(head._slices(given, most))
    assert [piece.stop - piece.start for piece in found] == sizes and found[0].start == 0 and found[-1].stop == rows
    assert all(one.stop == other.start for one, other in itertools.pairwise(found))


def test_logits_are_of_the_rows_that_are_asked_for():
    """Of states [s, b, hidden] in that order, by a matrix or one in FP8."""
    states, matrix = torch.randn(3, 2, 4), torch.randn(5, 4)
    plain, rounded = Head(states, matrix), Head(states, Fp8Matrix.of(matrix))
    assert plain.columns == rounded.columns == 5 and torch.equal(plain.rows, states.reshape(6, 4))
    for given, product in ((plain, lambda rows: rows @ matrix.t()), (rounded, rounded.weight.product)):
        torch.testing.assert_close(given.logits(), product(plain.rows))
        torch.testing.assert_close(given.logits(slice(2, 5)), product(plain.rows[2:5]))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("given", [None, "another"])
def test_what_logits_are_made_of_is_what_megatron_hands_over(monkeypatch, sequence, given):
    """Its hooks run, which wait for weights that are gathered; states of a sequence that is split are put together."""
    ran, whole = [], "megatron.core.tensor_parallel"
    for name in ("copy_to_tensor_model_parallel_region", "gather_from_sequence_parallel_region"):
        monkeypatch.setattr(f"{whole}.{name}", lambda states, group, name=name: (name, states, group))
    layer = SimpleNamespace(sequence_parallel=sequence, weight="weight")
    layer._forward_pre_hooks = {0: lambda *of: ran.append(of), 1: lambda *of: ran.append(of)}
    found = Head.of("states", layer, given, "group")
    name = "gather_from_sequence_parallel_region" if sequence else "copy_to_tensor_model_parallel_region"
    assert found == Head((name, "states", "group"), given or "weight") and ran == [(layer, ("states",))] * 2


def squares(found, some, weight):
    value = found.square().sum(-1)
    if weight is not None:
        found.mul_(2 * weight[:, None])
    return {"loss": value}


@pytest.mark.parametrize("zero", [None, False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_gradient_that_megatron_holds_is_added_up_before_its_scale_is_known(zero, scale):
    """So it must be 1; and whoever adds up the other one all the same is to get nothing."""
    states, matrix = torch.randn(4, 1, 3, requires_grad=True), torch.randn(5, 3).requires_grad_()
    matrix.main_grad = torch.zeros(5, 3)
    if zero is not None:
        matrix.zero_out_wgrad = zero
    total, terms = fused_loss(Head(states, matrix), squares, torch.ones(4, 1))
    assert not terms["loss"].requires_grad and not hasattr(matrix, "grad_added_to_main_grad")
    if scale != 1:
        with pytest.raises(RuntimeError):
            (total * scale).backward()
        return
    (total * scale).backward()
    assert matrix.grad_added_to_main_grad is True and matrix.grad.shape == (5, 3)
    assert not zero or (matrix.grad == 0).all()
    flat = states.detach()[:, 0]
    torch.testing.assert_close(matrix.main_grad, 2 * (flat @ matrix.detach().t()).t() @ flat)


# Losses


def batch(mask: list[list[float]]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor([[1, 2, 0], [0, 1, 3]]), "loss_mask": torch.tensor(mask)}


MASKS = [[[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]


@pytest.fixture
def parts(alone, monkeypatch):
    """Logits [s, b, V] of two micro-batches through `collect`, on the one stage that there is; and what it is called with."""
    logits = [torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    layer = SimpleNamespace(
        _forward_pre_hooks={}, sequence_parallel=False, weight=identity_of_this_rank(logits[0], alone)
    )
    monkeypatch.setattr(collectives, "tensor_parallel_group", lambda: alone)
    monkeypatch.setattr(collectives, "sum_from_last_stage", lambda values, everywhere=(): list(values))
    monkeypatch.setattr(Head, "of", classmethod(lambda cls, states, *_: Head(states, layer.weight)))
    asked = []

    def passes(chunks, batches, *, collect, **how):
        asked.append(how)
        return [
            collect(one, hidden_states=states, output_layer=layer, output_weight=None)
            for one, states in zip(batches, logits, strict=True)
        ]

    monkeypatch.setattr(loss, "forward_only", passes)
    return SimpleNamespace(logits=logits, asked=asked, passes=passes, layer=layer)


def nll(logits: torch.Tensor, of: dict, size: int) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[..., :size].flatten(0, 1), of["labels"].t().reshape(-1), reduction="none"
    ).view(3, 2)


def test_losses_are_summed_over_the_tokens_that_count(parts):
    batches = [batch(mask) for mask in MASKS]
    sums = [(nll(z, one, 4) * one["loss_mask"].t()).sum() for z, one in zip(parts.logits, batches, strict=True)]
    how = {"micro_batch_size": 2, "sequence_length": 3}
    found, tokens = summed_loss([], batches, vocab_size=4, **how)
    assert found == pytest.approx(float(sum(sums))) and tokens == 5

    def terms(one):
        return lambda logits, rows, weight: {"a": logits[:, 0], "b": logits[:, 1]}

    before = []
    wanted = [
        float(sum((z[..., i] * one["loss_mask"].t()).sum() for z, one in zip(parts.logits, batches, strict=True)))
        for i in (1, 0)
    ]
    found = summed_terms([], batches, ("b", "a"), terms, before=before.append, **how)
    assert found == pytest.approx([*wanted, 5.0])
    assert parts.asked[1] == {"num_micro_batches": 2, "before": before.append, **how}


def test_the_first_loss_is_that_of_the_first_micro_batch_alone(parts):
    first, batches = FirstLoss(4), [batch(mask) for mask in MASKS]
    assert first.mean() == 0.0
    parts.passes([], batches, collect=first)
    wanted = float((nll(parts.logits[0], batches[0], 4) * batches[0]["loss_mask"].t()).sum())
    assert first.sums == pytest.approx([wanted, 4.0]) and first.mean() == pytest.approx(wanted / 4)


def test_the_next_token_is_learned_and_judged_once(parts, monkeypatch):
    from minitron_megatron.models import objective

    said, of = [], batch(MASKS[0])
    monkeypatch.setattr(objective, "warn_of_guessing", lambda *given: said.append(given))
    made, states = NextToken(4), parts.logits[0].clone()
    total, terms = made(states, parts.layer, None, of, measure=False)
    wanted = nll(parts.logits[0], of, 4)
    torch.testing.assert_close(terms["loss"], wanted)
    torch.testing.assert_close(total, (wanted * of["loss_mask"].t()).sum())
    validated = made.validation(states, parts.layer, None, of)
    assert set(validated) == {"loss", "nll"} and all(torch.allclose(value, wanted) for value in validated.values())
    assert made.names(True) == made.names(False) == ("loss",) and made.at_once is None
    assert not made.needs_first_pass and made.sums_of_stages() == [] and made.state_dict() == made.results() == {}
    for value in (3.0, 2.0):
        assert made.finish({"loss": value}, []) == {"loss": value}
    assert said == [("the model", 3.0, 4)]


def test_the_gradient_of_a_label_takes_the_logits_place(alone):
    logits, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([3, 0, 1])
    plain = logits.clone().requires_grad_()
    value = torch.nn.functional.cross_entropy(plain[:, :4], labels, reduction="none")
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    (value * weight).sum().backward()
    entropy = CrossEntropy(labels[:, None], vocab_size=4, group=alone)
    before = logits.clone()
    torch.testing.assert_close(entropy(logits, slice(0, 3), None)["loss"], value.detach())
    assert torch.equal(logits, before)
    torch.testing.assert_close(entropy(logits, slice(0, 3), weight)["loss"], value.detach())
    torch.testing.assert_close(logits, plain.grad)


# Tokens


class Scripted:
    """A model that answers with given tokens, and notes what it is asked."""

    def __init__(self, script):
        self.script, self.asked = iter(script), []

    def next_tokens(self, tokens, cache, sampling, keys):
        self.asked.append((tokens.tolist(), cache.sequence_len_offset, [n for _, _, n in keys]))
        return next(self.script)


def test_answers_begin_where_their_prompts_end():
    """The shortest prompt runs at once; a row whose prompt goes on has its own next token, the others what was picked."""
    model = Scripted([[10, 99], [11, 99], [12, 20], [13, 21]])
    found = _answer(model, [4, 7], [[1, 2], [3, 4, 5, 6]], Sampling(3, stop_tokens=[21]))
    assert found == [[10, 11, 12], [20, 21]]
    assert model.asked == [
        ([[1, 2], [3, 4]], 0, [0, 0]),
        ([[10], [5]], 2, [1, 0]),
        ([[11], [6]], 3, [2, 0]),
        ([[12], [20]], 4, [3, 1]),
    ]


@pytest.mark.parametrize(
    ("script", "sampling", "found"),
    [
        ([[5], [6], [7]], Sampling(3), [5, 6, 7]),
        ([[5]], Sampling(1), [5]),
        ([[5], [6]], Sampling(3, stop_tokens=[9, 6]), [5, 6]),
        ([[5], [NOT_FINITE]], Sampling(3), [5, NOT_FINITE]),
        ([[5], [6]], Sampling(3, finished=lambda answer: answer == [5, 6]), [5, 6]),
    ],
)
def test_an_answer_ends(script, sampling, found):
    model = Scripted(script)
    assert _answer(model, [0], [[1]], sampling) == [found] and next(model.script, None) is None


def test_an_answer_that_is_not_finite_is_no_token_of_the_others():
    model = Scripted([[NOT_FINITE, 3], [8, 4]])
    assert _answer(model, [0, 1], [[1], [2]], Sampling(2)) == [[NOT_FINITE], [3, 4]]
    assert model.asked[1][0] == [[0], [3]]


@pytest.mark.parametrize(("data", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_prompts_run_in_batches_by_their_length_and_come_back_in_their_order(monkeypatch, data, rank):
    """The longest first; data-parallel ranks take batches in turn, of as many prompts as there are for each."""
    from megatron.core import parallel_state as ps

    ran, told = [], []

    def answer(model, numbers, prompts, sampling):
        ran.append(list(numbers))
        return [[10 * number] for number in numbers]

    everyone = {number: [10 * number] for number in range(5)}
    monkeypatch.setattr(generation, "_Model", lambda *_: None)
    monkeypatch.setattr(generation, "_answer", answer)
    monkeypatch.setattr(ps, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(collectives, "gather_over_data_parallel", lambda mine: [mine, everyone])
    shape, prompts = SimpleNamespace(max_position_embeddings=9), [[1], [1, 2], [1, 2, 3], [4, 5], [6]]
    layout, chunk = Layout(world_size=data), torch.nn.Dropout()
    found = generate([chunk], layout, shape, prompts, Sampling(2), batch_size=2, advance=told.append)
    assert found == [[0], [10], [20], [30], [40]] and chunk.training
    batches = [[2, 1], [3, 0], [4]]
    assert ran == batches[rank::data] and told == [len(numbers) for numbers in ran]
    ran.clear()
    generate([chunk], layout, shape, prompts, Sampling(2))
    assert ran == ([[2, 1, 3, 0, 4]] if data == 1 else [[[2, 1, 3], [0, 4]][rank]])
    with pytest.raises(ValueError, match="context=1"):
        generate([], Layout(context=2, world_size=2), shape, prompts, Sampling(2))
    with pytest.raises(ValueError, match="10 positions of 9"):
        generate([], layout, shape, prompts, Sampling(8))


def test_a_token_is_picked_where_logits_are_finite(alone):
    """Of real columns alone; of one row that is not finite the others know nothing."""
    logits = torch.tensor(
        [[1.0, 3.0, 2.0, 9.0], [1.0, math.nan, 2.0, 9.0], [math.inf, 0.0, 0.0, 9.0], [-math.inf] * 3 + [9.0]]
    )
    assert _finite(logits, 3, alone).tolist() == [True, False, False, False]
    assert not _finite(logits, 0, alone).any()
    keys = [(1, row, 0) for row in range(4)]
    assert _pick(logits, 3, Sampling(1), keys, alone).tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE]
    drawn = _pick(logits, 3, Sampling(1, temperature=0.01), keys, alone)
    assert drawn.tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE]
    assert dist.get_world_size(alone) == 1 and (Sampling(1).temperature, Sampling(1).top_k, Sampling(1).top_p) == (
        0,
        0,
        1,
    )


def test_what_a_cache_does_not_go_with_is_off_meanwhile():
    """And as it was afterwards, of every module and its config."""
    inner, outer = torch.nn.Linear(1, 1), torch.nn.ModuleList()
    outer.append(inner)
    inner.config = SimpleNamespace(sequence_parallel=True, fused_single_qkv_rope=False, other=True)
    outer.scatter_to_sequence_parallel, inner.reduce_scatter_embeddings, inner.sequence_parallel = True, True, 1

    def state():
        return (
            *(inner.config.sequence_parallel, inner.config.fused_single_qkv_rope, inner.config.other),
            *(outer.scatter_to_sequence_parallel, inner.reduce_scatter_embeddings, inner.sequence_parallel),
        )

    before = state()
    with pytest.raises(ZeroDivisionError), _with_a_cache([outer]):
        assert state() == (False, False, True, False, False, 1)
        raise ZeroDivisionError
    assert state() == before == (True, False, True, True, True, 1)


@pytest.mark.parametrize(("strings", "longest"), [(["é", "ab"], 3), ([], 1), (["abcd"], 5)])
def test_of_an_answer_as_much_is_decoded_as_a_stop_string_is_long(strings, longest):
    """A token is a byte at least."""
    asked = []
    finished = generation.stop_strings(lambda tokens: asked.append(list(tokens)) or "xx", strings)
    assert finished([*range(9)]) is False and asked == [[*range(9)][-longest:]]
    assert generation.stop_strings(lambda _: "xaby", ["q", "ab"])([1])
