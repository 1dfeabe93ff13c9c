"""Generated tokens equal transformers' own, token by token, in every layout, by a cache there and whole passes here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.models.generation import Sampling, _evaluating, draw, generate, stop_strings
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.test_models import names
from tests.tiny import LLAMA3, hf_model, imported

NEW = 12
LENGTHS = (5, 9, 3, 9, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(transformers' model, its folder, prompts of several lengths); five layers, which no pipeline divides."""
    made = hf_model(num_hidden_layers=5, rope_parameters=LLAMA3)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in LENGTHS]
    return made, imported(made, tmp_path_factory.mktemp("model")), prompts


def recomputed(made, prompt: list[int], number: int, sampling: Sampling) -> list[int]:
    """An answer by whole passes of transformers' model over everything so far."""
    tokens = list(prompt)
    for n in range(sampling.max_new_tokens):
        with torch.no_grad():
            logits = made(torch.tensor([tokens])).logits[:, -1]
        chance = np.random.default_rng((sampling.seed, number, n)).random()
        tokens += draw(logits, torch.tensor([chance], dtype=torch.float64), sampling).tolist()
    return tokens[len(prompt) :]


DRAWN = Sampling(NEW, temperature=1.5, top_k=40, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def wanted(model):
    """Transformers' greedy answers without stopping, and drawn ones."""
    made, _, prompts = model
    greedy = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    answers = [made.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in prompts]
    return answers, [recomputed(made, prompt, number, DRAWN) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {"tensor": 2, "sequence": True}),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param(2, {}, marks=pytest.mark.slow),
    ],
    ids=names,
)
def test_answers_equal_transformers_in_every_layout(gloo, model, wanted, ranks, layout):
    _, path, prompts = model
    greedy, drawn = wanted
    stopping = Sampling(NEW, stop_tokens=[greedy[0][4]])
    answers = gloo(ranks, jobs.generated, str(path), prompts, [Sampling(NEW), DRAWN, stopping], layout, layout=layout)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][:2] == [greedy, drawn] and drawn != greedy
    assert answers[0][2] == [a[: a.index(greedy[0][4]) + 1] if greedy[0][4] in a else a for a in greedy]


def test_what_is_drawn_has_the_probabilities_of_what_is_left():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    for sampling, wanted in (
        (Sampling(1, temperature=1.0), [0.4, 0.1, 0.3, 0.2]),
        (Sampling(1, temperature=0.5), [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        (Sampling(1, temperature=1.0, top_k=2), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(1, temperature=1.0, top_p=0.75), [4 / 9, 0, 3 / 9, 2 / 9]),
        (Sampling(1, temperature=1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
    ):
        chances = (torch.arange(9000, dtype=torch.float64) + 0.5) / 9000
        found = draw(logits.expand(9000, 4), chances, sampling)
        np.testing.assert_allclose(torch.bincount(found, minlength=4) / 9000, wanted, atol=3e-4)


def test_a_stop_string_may_lie_across_tokens():
    finished = stop_strings(lambda tokens: "".join(map(chr, tokens)), ["\n\n", "Q:"])
    text = "long answer\nQ"
    assert not any(finished([ord(c) for c in text[:n]]) for n in range(1, len(text) + 1))
    assert finished([ord(c) for c in text + ":"]) and finished([ord(c) for c in "\n\n"])


@pytest.mark.parametrize(("prompt", "taken"), [([1] * 5, True), ([1] * 6, False), ([], False)])
def test_the_last_token_of_an_answer_needs_no_position(prompt, taken):
    """What fits comes as far as the model, of which there is none here."""
    shape = SimpleNamespace(max_position_embeddings=8)
    with pytest.raises(IndexError if taken else ValueError):
        generate([], Layout(), shape, [prompt], Sampling(4))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_the_mode_that_it_was_in(training):
    model = torch.nn.Dropout().train(training)
    with _evaluating([model]):
        assert not model.training
    assert model.training is training


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_of_the_most_probable_tokens_there_are_k(k):
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    chances = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    found = draw(logits.expand(400, 4), chances, Sampling(1, temperature=1.0, top_k=k))
    assert set(found.tolist()) == set([1, 3, 2, 0][:k])
