"""What lm-evaluation-harness asks becomes requests of a model, and what a model says figures: numbers alone, without a model."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.data.questions import Request
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import adapter, scoring
from minitron_megatron.evaluate.adapter import MegatronLM, Ranks
from minitron_megatron.evaluate.answers import Rule
from minitron_megatron.evaluate.run_tasks import _figures
from minitron_megatron.models.generation import NOT_FINITE
from minitron_megatron.parallel.layout import Layout

POSITIONS = 8


class Letters:
    """A tokenizer: 1 begins a text, 2 ends it, letters follow."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begins = text.startswith("<s>")
        letters = [ord(one) for one in text.removeprefix("<s>")]
        return [1] * (begins + add_special_tokens) + letters

    def decode(self, tokens, skip_special_tokens: bool = False) -> str:
        tokens = [tokens] if isinstance(tokens, int) else tokens
        return "".join({1: "<s>", 2: "</s>"}.get(token, chr(token)) for token in tokens)


class Asked:
    """Ranks that note what they are asked; a request's value is how many of its tokens are scored."""

    def __init__(self) -> None:
        self.tokenizer, self.shape = Letters(), SimpleNamespace(max_position_embeddings=POSITIONS)
        self.calls = []

    def run(self, name, *given):
        self.calls.append((name, *given))
        if name == "generate":
            return [[ord("x"), ord("!"), ord("y")] for _ in given[0]]
        return np.array(given[2], np.float64), np.array([True] * len(given[2]))


@pytest.fixture
def asked():
    return Asked()


def language_model(asked: Asked) -> MegatronLM:
    """The harness's view of these ranks, of a folder that says nothing of how it generates."""
    return MegatronLM(asked, Rule(Path("no such folder"), Letters.eos_token_id))


@pytest.mark.parametrize(("context", "left"), [(3, 6), (6, 9), (7, 9), (20, 9)])
def test_what_is_too_long_loses_its_beginning(asked, context, left):
    """A model of 8 positions takes 9 tokens: the last one is a label alone."""
    tokens = list(range(10, 10 + context))
    assert language_model(asked)._loglikelihood_tokens([("a", tokens, [97, 98, 99])]) == [(3.0, True)]
    _, sent, lengths, scored = asked.calls[0]
    assert sent.tolist() == [*tokens, 97, 98, 99][-left:] and (lengths, scored) == ([left], [3])


@pytest.mark.parametrize(("tokens", "taken"), [(0, False), (1, True), (POSITIONS, True), (POSITIONS + 1, False)])
def test_a_continuation_fits_into_the_model(asked, tokens, taken):
    ask = language_model(asked)._loglikelihood_tokens
    if taken:
        assert ask([("a", [5], [7] * tokens)]) == [(tokens, True)]
    else:
        with pytest.raises(UserError, match=f"is {tokens} tokens after its context, of 1 to 8"):
            ask([("a", [5], [7] * tokens)])


@pytest.mark.parametrize("lengths", [(1, 7), (8, 9, 3), (20, 1, 16)])
def test_every_token_of_a_whole_text_is_scored_once_in_as_few_windows_as_there_can_be(asked, lengths):
    """The token that begins a text is one of it; what stands before that is the prefix."""
    texts = [SimpleNamespace(args=("a" * length,)) for length in lengths]
    assert language_model(asked).loglikelihood_rolling(texts) == [length + 1 for length in lengths]
    windows = [math.ceil((length + 1) / POSITIONS) for length in lengths]
    assert len(asked.calls[0][2]) == sum(windows) and max(asked.calls[0][2]) <= POSITIONS + 1


@pytest.mark.parametrize(
    ("text", "given", "tokens"),
    [("ab", {}, [1, 97, 98]), ("<s>ab", {}, [1, 97, 98]), ("ab", {"add_special_tokens": False}, [97, 98])],
)
def test_a_text_begins_once(asked, text, given, tokens):
    assert language_model(asked).tok_encode(text, **given) == tokens


def answers(asked, *texts: str, **options) -> list[str]:
    return language_model(asked).generate_until(
        [SimpleNamespace(args=(text, {"until": ["!"], **options})) for text in texts]
    )


@pytest.mark.parametrize(("most", "taken"), [(0, False), (1, True), (POSITIONS - 1, True), (POSITIONS, False)])
def test_an_answer_leaves_a_position_for_its_prompt(asked, most, taken):
    if not taken:
        with pytest.raises(UserError, match=rf"generation_kwargs\.max_gen_toks={most} of a task"):
            answers(asked, "abcdefghij", max_gen_toks=most)
        return
    assert answers(asked, "abcdefghij", max_gen_toks=most) == ["x"]
    _, prompts, ends, stops, longest, _ = asked.calls[0]
    assert prompts == [Letters().encode("abcdefghij")[-(POSITIONS - most) :]] and longest == most
    assert stops == ["!", "</s>"] and ends == [2]


@pytest.mark.parametrize("draws", [True, False])
def test_only_what_is_drawn_has_a_way_to_draw(asked, draws):
    how = {"temperature": 0.5, "top_k": 3}
    answers(asked, "a", max_gen_toks=2, do_sample=draws, **how)
    assert asked.calls[0][5] == (how if draws else {})
    with pytest.raises(UserError, match=r"generation_kwargs\.num_beams of a task is not for this model"):
        answers(asked, "a", max_gen_toks=2, num_beams=2)


def test_prompts_that_are_asked_alike_go_together_and_answers_come_back_in_order(asked):
    ask = [("a", 2), ("b", 3), ("c", 2)]
    requests = [SimpleNamespace(args=(text, {"until": ["!"], "max_gen_toks": most})) for text, most in ask]
    found = []
    asked.run = lambda name, prompts, *_: found.append(len(prompts)) or [prompt[-1:] for prompt in prompts]
    assert language_model(asked).generate_until(requests) == ["a", "b", "c"] and found == [2, 1]


@pytest.mark.parametrize(
    ("raised", "told"), [(None, None), (UserError("no task"), "no task"), (KeyError("x"), "the first rank failed")]
)
def test_how_rank_zero_ends_is_how_all_do(monkeypatch, raised, told):
    sent, ranks = [], Ranks.__new__(Ranks)
    monkeypatch.setattr(adapter.collectives, "is_rank_zero", lambda: not sent)
    monkeypatch.setattr(adapter.collectives, "broadcast_object", lambda value: sent.append(value) or sent[0])

    def work():
        if raised:
            raise raised
        return 5

    if raised:
        with pytest.raises(type(raised)):
            ranks.on_rank_zero(work)
    else:
        assert ranks.on_rank_zero(work) == 5
    assert sent == [("", told)]
    # Another rank is told the same.
    if told:
        with pytest.raises(UserError, match=told):
            ranks.on_rank_zero(work)
    else:
        assert ranks.on_rank_zero(work) is None


def test_figures_and_their_errors_have_names_of_their_own_and_questions_are_those_that_were_asked():
    said = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"},
            "g": {"acc,none": 0.75},
        },
        "n-shot": {"t": 3},
        "n-samples": {"t": {"original": 10, "effective": 4}, "u": {"original": 7, "effective": 5}},
        "group_subtasks": {"g": ["t", "u"]},
    }
    assert _figures(said, "t") == {"acc": 0.5, "acc_stderr": 0.1, "f1,strict": 1.0, "fewshot": 3, "questions": 4}
    assert _figures(said, "g") == {"acc": 0.75, "questions": 9}


def test_without_a_context_a_text_stands_behind_its_prefix(asked, monkeypatch):
    """That is the token that begins a text, or where there is none the one that ends it."""
    model = language_model(asked)
    assert (model.eot_token_id, model.prefix_token_id, model.max_length, model.max_gen_toks) == (2, 1, POSITIONS, 256)
    monkeypatch.setattr(Letters, "bos_token_id", None)
    assert model.prefix_token_id == 2
    monkeypatch.setattr(asked.tokenizer, "encode", lambda text, **_: [ord(one) for one in text])
    answers(asked, "", "ab", max_gen_toks=2)
    assert asked.calls[0][1] == [[2], [97, 98]]
    assert model._loglikelihood_tokens([]) == [] and len(asked.calls) == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3, "top_p": 0.25, "temperature": 1.0}])
def test_what_is_drawn_is_drawn_as_the_task_says(asked, options):
    answers(asked, "a", max_gen_toks=2, do_sample=True, **options)
    how = asked.calls[0][5]
    assert how | options == how and set(how) <= {"temperature", "top_k", "top_p"} and None not in how.values()


def test_an_answer_of_no_logits_names_its_document(asked, monkeypatch):
    monkeypatch.setattr(asked, "run", lambda *_: [[120], [120, NOT_FINITE], [NOT_FINITE]])
    requests = [
        SimpleNamespace(args=("a", {"until": [], "max_gen_toks": 2}), task_name="t", doc_id=n) for n in (3, 7, 9)
    ]
    with pytest.raises(UserError, match=r"tasks=\[t\], document 7: "):
        language_model(asked).generate_until(requests)


# On every rank


def ranks(**more) -> Ranks:
    layout = Layout(world_size=6, pipeline=2)
    shape = SimpleNamespace(vocab_size=300)
    return Ranks(["c"], layout, shape, Letters(), **{"tokens_at_once": 64, "prompts_at_once": 3, "seed": 9, **more})


def test_requests_come_as_one_array_and_are_told_apart(monkeypatch):
    given = []
    monkeypatch.setattr(adapter, "score", lambda *found, **how: given.append((found, how)) or "scored")
    assert ranks().score(np.arange(6, dtype=np.int32), [1, 3, 2], [1, 2, 1]) == "scored"
    ((chunks, layout, vocabulary, requests), how) = given[0]
    assert (chunks, layout.data, vocabulary, how) == (["c"], 3, 300, {"tokens_at_once": 64})
    assert requests == [Request([0], 1), Request([1, 2, 3], 2), Request([4, 5], 1)]


def test_prompts_are_answered_by_the_seed_and_the_stops_and_counted_over_all_ranks(monkeypatch):
    given, moved = [], []

    def generated(*found, advance, **how):
        given.append((found, how))
        advance(2)
        return [[1], [2]]

    class Bar:
        def __enter__(self):
            return moved.append

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(adapter, "generate", generated)
    monkeypatch.setattr(adapter, "progress", lambda *words, **how: moved.append((*words, how)) or Bar())
    assert ranks().generate([[5], [6]], [7, 8], ["xy"], 11, {"temperature": 0.5, "top_k": 2}) == [[1], [2]]
    ((chunks, _, _, prompts, sampling), how) = given[0]
    assert (chunks, prompts, how) == (["c"], [[5], [6]], {"batch_size": 3})
    assert (sampling.max_new_tokens, sampling.stop_tokens, sampling.seed) == (11, [7, 8], 9)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 2, 1.0)
    assert sampling.finished([120, 121]) and not sampling.finished([120, 122])
    assert moved == [("answers", 2, {"unit": "prompts"}), 2 * 3]


def test_a_method_that_rank_zero_runs_is_run_by_all(monkeypatch):
    sent = []
    monkeypatch.setattr(adapter.collectives, "broadcast_object", sent.append)
    monkeypatch.setattr(Ranks, "score", lambda self, *given: given)
    assert ranks().run("score", 1, 2) == (1, 2) and sent == [("score", (1, 2))]
    orders = iter([("score", (3, 4)), ("score", (5,)), ("", None)])
    done = []
    monkeypatch.setattr(Ranks, "score", lambda self, *given: done.append(given))
    monkeypatch.setattr(adapter.collectives, "broadcast_object", lambda _: next(orders))
    monkeypatch.setattr(adapter.collectives, "is_rank_zero", lambda: False)
    assert ranks().on_rank_zero(lambda: 1 / 0) is None and done == [(3, 4), (5,)]


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        (range(6), [(6, 7, 0), (9, 8, 0), (9, 9, 2), (4, 5, 1)]),
        # A context-parallel rank has some of the positions.
        ([0, 1, 4, 5], [(4, 5, 1)]),
        ([2, 3], [(0, 7, 0), (3, 8, 0), (3, 9, 2)]),
        ([4, 5], []),
    ],
)
def test_scored_tokens_are_the_last_of_each_request_that_has_this_input(positions, wanted):
    """Row of [s · b] of the position before each, its id, and the request; fillers have none."""
    requests = [Request([1, 2, 3, 7, 8], 2), Request([4, 9, 5], 1), Request([1, 2, 3, 7, 9], 1)]
    collect = scoring._Collect(requests, [[0, 2], [1]], torch.zeros(3, 2), 300)
    batch = {"position_ids": torch.tensor([list(positions)] * 3), "number": torch.tensor([0, 1, -1])}
    assert list(zip(*collect._scored(batch), strict=True)) == wanted


@pytest.mark.parametrize(
    ("at_once", "data", "sizes"),
    [
        (64, 1, [2, 1]),
        (96, 1, [3, 1]),
        (1, 1, [1, 1]),
        (10**6, 1, [5, 2]),
        (10**6, 2, [3, 1]),
        (31, 1, [1, 1]),
        (32, 1, [1, 1]),
    ],
)
def test_requests_of_one_length_run_together_as_many_as_tokens_fit(monkeypatch, at_once, data, sizes):
    """Of 32 and 64 tokens; no more than there are for a data-parallel rank, and one at least. Values come back in their order."""
    runs = []

    def forward(chunks, batches, *, collect, before, **how):
        runs.append((how["sequence_length"], how["micro_batch_size"], how["num_micro_batches"], len(batches)))
        for numbers in collect.numbers:
            for number in numbers:
                collect.table[number] += torch.tensor([-float(number), requests[number].scored - number % 2])

    def share(samples, numbers, size, layout):
        return scoring.MicroBatches(samples, numbers, size, 0, layout.data)

    monkeypatch.setattr(scoring, "forward_only", forward)
    monkeypatch.setattr(scoring.MicroBatches, "of_this_rank", share)
    monkeypatch.setattr(scoring.collectives, "sum_over_all", lambda table: table)
    monkeypatch.setattr(scoring, "progress", lambda *_, **__: contextlib.nullcontext(lambda n: None))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    requests = [Request([n, *range(40 if n in (1, 4) else 9)], 1 + n % 3) for n in range(7)]
    values, greedy = scoring.score(["c"], Layout(world_size=data), 300, requests, tokens_at_once=at_once)
    assert [(length, size) for length, size, *_ in runs] == [(32, sizes[0]), (64, sizes[1])]
    assert all(count == number for _, _, count, number in runs)
    assert values.tolist() == [-float(n) for n in range(7)] and greedy.tolist() == [n % 2 == 0 for n in range(7)]
