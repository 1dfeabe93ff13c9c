"""Teachers that know nothing of the text are named before a step is taken: zeros, the embedding of another model."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import (
    BatchConfig,
    CacheOptions,
    CacheRunConfig,
    CacheTeacherConfig,
    CorrectTeacherConfig,
    DataConfig,
    DistillConfig,
    DistillOptions,
    ImportanceConfig,
    LoggerConfig,
    OptimConfig,
    ParallelConfig,
    TeacherParallelConfig,
    TrainerConfig,
)
from minitron_megatron.data.datasets import training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.distill.cache_teacher import cache_teacher
from minitron_megatron.distill.losses import TopK, nll_of_top_k
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.models.guessing import SHARE, is_guessing
from minitron_megatron.train.correct_teacher import correct_teacher
from minitron_megatron.train.distill import distill
from tests.tiny import SIZES, data_folder, data_option, hf_model, imported, model_option

VOCABULARY = SIZES["vocab_size"]
SAYS = "predicts this text no better than a guess: its loss is"


@given(st.integers(2, 10**6))
def test_guessing_is_the_logarithm_of_the_vocabulary_or_a_little_less(vocabulary):
    guess = math.log(vocabulary)
    assert (
        is_guessing(guess, vocabulary) and is_guessing(SHARE * guess, vocabulary) and is_guessing(2 * guess, vocabulary)
    )
    assert not is_guessing(SHARE * guess * (1 - 1e-9), vocabulary)
    assert is_guessing(math.nan, vocabulary) and is_guessing(math.inf, vocabulary)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_top_k_tells_the_loss_of_its_labels(k, temperature):
    """Exactly where the other tokens are equally probable, and wherever the label is."""
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(k), dtype=torch.float64).t()
    best = logits.topk(k).indices
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False)
    logits = torch.where(others, logits.amin(-1, keepdim=True), logits)
    scaled = (logits / temperature).log_softmax(-1)
    top = TopK(best, scaled.gather(-1, best), (scaled.exp() * others).sum(-1))
    for label in range(20):
        labels = torch.full((9,), label)
        found = nll_of_top_k(top, labels, vocab_size=20, temperature=temperature)
        torch.testing.assert_close(found, -logits.log_softmax(-1)[:, label], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Data; a teacher that knows them; one of zeros; one with the embedding of another model; a student."""
    folder = tmp_path_factory.mktemp("sources")
    model = hf_model(0)
    data = data_folder(folder, imported(model, folder / "first"))
    shape = open_model_folder(folder / "first" / "model").shape
    samples = training_samples(open_data(str(data), "train", shape, 32), "train", sequence_length=32, seed=1, count=64)
    tokens = torch.stack([samples[i]["tokens"] for i in range(64)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    imported(model, folder / "sound")
    with torch.no_grad():
        # As where both are one tensor.
        model.model.embed_tokens.weight.copy_(hf_model(5).model.embed_tokens.weight)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        imported(model, folder / "foreign")
        for parameter in model.parameters():
            parameter.zero_()
    imported(model, folder / "zeros")
    imported(hf_model(1, hidden_size=24, intermediate_size=24), folder / "student")
    return folder


def said(command, cfg) -> list[str]:
    """What a command warns of on this rank."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("minitron_megatron")
    logger.addHandler(handler)
    try:
        command(cfg)
    finally:
        logger.removeHandler(handler)
    return [line for line in records if SAYS in line]


def distillation(sources, output, teacher: str, layout=None, **options) -> DistillConfig:
    return DistillConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        teacher=model_option(sources / teacher / "model"),
        student=model_option(sources / "student" / "model"),
        data=data_option(sources / "data"),
        trainer=TrainerConfig(steps=2, global_batch_size=8, micro_batch_size=2, save_interval=2, validation_samples=0),
        optim=OptimConfig(warmup_steps=0),
        logger=LoggerConfig(wandb="disabled"),
        distill=DistillOptions(**options),
    )


@pytest.mark.parametrize("teacher", ["zeros", "foreign", "sound"])
def test_a_teacher_that_guesses_is_named_once(gloo, sources, tmp_path, teacher):
    (lines,) = gloo(1, said, distill, distillation(sources, tmp_path / "run", teacher))
    loss = read_manifest(tmp_path / "run" / "model")["results"]["teacher_loss"]
    assert (len(lines) == 1) == (teacher != "sound") == is_guessing(loss, VOCABULARY)
    assert all(line.startswith(f"the teacher {SAYS} {loss:.4g} nats") for line in lines)
    if teacher == "zeros":
        assert loss == pytest.approx(math.log(VOCABULARY), abs=1e-5)
    # It is no metric of the run: its steps are those of a run that is continued.
    assert "teacher_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout", "options"),
    [
        (2, {"pipeline": 2}, {}),
        (2, {"tensor": 2, "sequence": True}, {"cross_entropy": 0.5, "loss": "reverse_kl"}),
        (2, {}, {"teacher_parallel": TeacherParallelConfig(tensor=2)}),
        (1, {}, {"intermediate": 1.0}),
    ],
    ids=["pipeline", "tensor", "a layout of its own", "intermediate"],
)
def test_its_loss_is_the_same_wherever_it_runs(gloo, sources, tmp_path, ranks, layout, options):
    gloo(1, said, distill, distillation(sources, tmp_path / "one", "foreign"))
    lines = gloo(ranks, said, distill, distillation(sources, tmp_path / "run", "foreign", layout, **options))
    assert [len(of_rank) for of_rank in lines] == [1] + [0] * (ranks - 1)
    one, other = (read_manifest(tmp_path / run / "model")["results"]["teacher_loss"] for run in ("one", "run"))
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_cache_names_its_teacher_when_it_is_made_and_when_it_teaches(gloo, sources, tmp_path):
    for teacher in ("zeros", "sound"):
        cfg = CacheTeacherConfig(
            output=str(tmp_path / teacher),
            teacher=model_option(sources / teacher / "model"),
            data=data_option(sources / "data"),
            trainer=CacheRunConfig(steps=2, global_batch_size=8, micro_batch_size=2, validation_samples=0),
            distill=CacheOptions(top_k=20),
            chunk_samples=8,
        )
        lines = gloo(2, said, cache_teacher, cfg)
        assert [len(of_rank) for of_rank in lines] == [teacher == "zeros", 0]
        loss = read_manifest(tmp_path / teacher)["results"]["teacher_loss"]
        run = distillation(sources, tmp_path / f"{teacher}-run", teacher, loss="topk_kl", top_k=20)
        run.distill.cache = str(tmp_path / teacher)
        (lines,) = gloo(1, said, distill, run)
        assert [line.startswith("the cached teacher predicts") for line in lines] == [True] * (teacher == "zeros")
        found = read_manifest(tmp_path / f"{teacher}-run" / "model")["results"]["teacher_loss"]
        # Of all samples at first, then of those of the first step.
        assert found == pytest.approx(loss, rel=0.1) and is_guessing(loss, VOCABULARY) == (teacher == "zeros")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["zeros", "sound"])
def test_models_are_named_where_they_are_corrected_and_measured(gloo, sources, tmp_path, model):
    correction = CorrectTeacherConfig(
        output=str(tmp_path / "corrected"),
        model=model_option(sources / model / "model"),
        data=data_option(sources / "data"),
        trainer=TrainerConfig(steps=2, global_batch_size=8, micro_batch_size=2, save_interval=2, validation_samples=0),
        optim=OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0),
        logger=LoggerConfig(wandb="disabled"),
    )
    measurement = ImportanceConfig(
        output=str(tmp_path / "scores"),
        model=model_option(sources / model / "model"),
        data=DataConfig(path=str(sources / "data"), sequence_length=32),
        samples=8,
        trainer=BatchConfig(micro_batch_size=2),
    )
    for command, cfg in ((correct_teacher, correction), (measure_importance, measurement)):
        lines = gloo(2, said, command, cfg)
        assert [len(of_rank) for of_rank in lines] == [model == "zeros", 0], command
