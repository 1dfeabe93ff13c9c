"""What lm-evaluation-harness asks becomes requests of a model, and what a model says figures: numbers alone, without a model."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import adapter
from minitron_megatron.evaluate.adapter import MegatronLM, Ranks
from minitron_megatron.evaluate.answers import Rule
from minitron_megatron.evaluate.run_tasks import _figures

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
