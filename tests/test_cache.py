"""A cached teacher: what comes back from disk, what damage does, the same cache from any layout and after a kill."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from minitron_megatron.checkpoints.folder import output_folder, read_manifest
from minitron_megatron.config import (
    CacheDataConfig,
    CacheOptions,
    CacheRunConfig,
    CacheTeacherConfig,
    DistillConfig,
    DistillOptions,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
)
from minitron_megatron.distill import cache_teacher as command
from minitron_megatron.distill.cache import Cache, write_chunk
from minitron_megatron.distill.contents import Contents
from minitron_megatron.distill.losses import TopK
from minitron_megatron.errors import UserError
from minitron_megatron.train.distill import distill
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

LENGTH = 32
SMALL = Contents("model", "data", 1, 5, False, 128256, 1.0, 4, train=7, validation=2, chunk_samples=3)


def random_answers(contents: Contents, samples: int, seed: int = 0) -> TopK:
    """The top K of random logits."""
    draw = torch.Generator().manual_seed(seed)
    log_p = torch.randn(samples, contents.sequence_length, 50, generator=draw).mul(4).log_softmax(-1)
    log_probs, places = log_p.topk(contents.top_k, -1)
    ids = torch.randint(contents.vocab_size, places.shape, generator=draw)
    return TopK(ids, log_probs, 1 - log_probs.double().exp().sum(-1).float())


def small_cache(path: Path, contents: Contents = SMALL) -> dict[str, TopK]:
    """A whole cache of random answers; what was written, by split."""
    answers = {"train": random_answers(contents, contents.train), "validation": random_answers(contents, 2, 1)}
    with output_folder(path, command="a test", config={}, inputs={}, resume=True) as out:
        for chunk in contents.chunks():
            part = TopK(*(tensor[chunk.first : chunk.last] for tensor in answers[chunk.split]))
            write_chunk(out.path, contents, chunk, part, chunk.samples)
        out.results = asdict(contents)
    return answers


@pytest.mark.parametrize(("vocabulary", "id_bytes"), [(200, 1), (49152, 2), (2**16, 2), (2**16 + 1, 3), (256000, 3)])
def test_samples_come_back_by_number(tmp_path, vocabulary, id_bytes):
    contents = replace(SMALL, vocab_size=vocabulary)
    assert contents.id_bytes == id_bytes
    written = small_cache(tmp_path / "cache", contents)
    cache = Cache.open(tmp_path / "cache")
    sizes = [path.stat().st_size for path in cache.path.glob("*.safetensors")]
    assert len(sizes) == 4 and contents.total_bytes - 4 * 512 < sum(sizes) <= contents.total_bytes
    for split, numbers in (("train", [6, 0, 4, 5, 2]), ("validation", [1, 0])):
        ids, log_probs, rest = cache.of_samples(numbers, split)
        assert torch.equal(ids, written[split].ids[numbers]) and torch.equal(rest, written[split].rest[numbers])
        torch.testing.assert_close(log_probs, written[split].log_probs[numbers], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(log_probs.double().exp().sum(-1) + rest, torch.ones(len(numbers), 5).double())


def test_float16_errs_less_than_bfloat16():
    """Of probabilities and of what a student loses by learning from them, on average."""
    log_p = random_answers(replace(SMALL, sequence_length=2000), 1).log_probs.double().log_softmax(-1)
    missed = {}
    for dtype in (torch.float16, torch.bfloat16):
        rounded = log_p.to(dtype).double().log_softmax(-1)
        missed[dtype] = float((log_p.exp() * (log_p - rounded)).sum(-1).mean())
    assert missed[torch.float16] < missed[torch.bfloat16] / 30


def damaged(cache: Path, what: str) -> None:
    first, second = cache / "train-000000000.safetensors", cache / "train-000000003.safetensors"
    content = bytearray(first.read_bytes())
    if what == "exchanged":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif what == "missing":
        first.unlink()
    elif what == "short":
        first.write_bytes(content[:-1])
    elif what == "header":
        content[20] ^= 1
        first.write_bytes(content)
    else:
        content[int(what)] ^= 1
        first.write_bytes(content)


@pytest.mark.parametrize("what", ["exchanged", "missing", "short", "header", *map(str, range(-1, -500, -41))])
def test_damage_is_one_line(tmp_path, what):
    """A flipped bit anywhere, in ids, probabilities, masses and checksums alike."""
    small_cache(tmp_path / "cache")
    damaged(tmp_path / "cache", what)
    with pytest.raises(UserError, match=r"train-000000000\.safetensors (is|has)") as error:
        Cache.open(tmp_path / "cache").of_samples([0, 1, 2])
    assert "\n" not in str(error.value)


def test_another_folder_is_no_cache(tmp_path):
    with output_folder(tmp_path / "other", command="prune", config={}, inputs={}, resume=True):
        pass
    with pytest.raises(UserError, match=r"is not a teacher cache \(it was made by prune\)"):
        Cache.open(tmp_path / "other")
    small_cache(tmp_path / "cache")
    with pytest.raises(UserError, match="has 7 train samples, none of number 7"):
        Cache.open(tmp_path / "cache").of_samples([7])


# Made by the command


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with a teacher, a smaller student, and data."""
    folder = tmp_path_factory.mktemp("sources")
    imported(hf_model(1, hidden_size=24, intermediate_size=24), folder / "student")
    data_folder(folder, imported(hf_model(0), folder / "teacher"))
    return folder


def options(sources: Path, output: Path, layout: dict | None = None, **changes) -> CacheTeacherConfig:
    """20 training samples in 5 files and 3 validation windows in one."""
    return CacheTeacherConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        teacher=model_option(sources / "teacher" / "model"),
        data=CacheDataConfig(path=str(sources / "data"), sequence_length=LENGTH),
        trainer=CacheRunConfig(steps=5, global_batch_size=4, validation_samples=3, micro_batch_size=3),
        **{"distill": CacheOptions(top_k=20, temperature=1.5), "chunk_samples": 4, **changes},
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def made(gloo, sources, tmp_path_factory):
    """The cache that one process makes."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    gloo(1, command.cache_teacher, options(sources, folder))
    return folder


def test_a_cache_holds_what_the_teacher_says(sources, made):
    """Against transformers' own module in float64, sample by sample of the training order."""
    from minitron_megatron.checkpoints.folder import open_model_folder
    from minitron_megatron.data.datasets import Windows, training_samples
    from minitron_megatron.data.folder import open_data

    data = open_data(str(sources / "data"), "train", open_model_folder(sources / "teacher" / "model").shape, LENGTH)
    of_split = {
        "train": training_samples(data, "train", sequence_length=LENGTH, seed=1234, count=20),
        "validation": Windows(data, "validation", LENGTH),
    }
    cache, teacher = Cache.open(made), hf_model(0).double()
    for split, numbers in (("train", [0, 7, 19]), ("validation", [0, 2])):
        ids, log_probs, rest = cache.of_samples(numbers, split)
        with torch.no_grad():
            tokens = torch.stack([of_split[split][n]["tokens"] for n in numbers])
            log_p = torch.log_softmax(teacher(tokens).logits / 1.5, -1)
        wanted, places = log_p.topk(20, -1)
        assert torch.equal(ids, places)
        torch.testing.assert_close(log_probs.double(), wanted, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(rest.double(), 1 - wanted.exp().sum(-1), rtol=1e-4, atol=1e-5)
    manifest = read_manifest(made)
    assert manifest["results"]["train"] == 20 and manifest["results"]["validation"] == 3
    check_rate(manifest["results"], 23)
    # The mean loss of the labels in the first file.
    samples = [of_split["train"][n] for n in range(4)]
    tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(teacher(tokens).logits.flatten(0, 1), labels.flatten())
    assert manifest["results"]["teacher_loss"] == pytest.approx(float(loss), rel=0.05)
    assert set(manifest["inputs"]) == {"model", "data"}
    assert len(hashes(made)) == 6


def check_rate(results: dict, samples: int) -> None:
    """Tokens are those of the whole cache; the rate is of what this start has made."""
    assert results["tokens"] == 23 * LENGTH
    made = results["tokens_per_second"] * results["seconds"]
    assert made == pytest.approx(samples * LENGTH, rel=0.02 + 0.006 / results["seconds"])


def with_bar(cfg: CacheTeacherConfig) -> list[tuple]:
    """The command; what its bar was given."""
    plain, given = command.progress, []

    @contextmanager
    def bar(description, total, **more):
        given.append((description, total, more))
        yield lambda n, made: given.append((n, made))

    command.progress = bar
    try:
        command.cache_teacher(cfg)
    finally:
        command.progress = plain
    return given


def with_odd_answers(cfg: CacheTeacherConfig, part: int) -> str:
    """The command, of whose answers one number is none; what it says."""
    plain = command.answer

    def answer(*given):
        found = plain(*given)
        found[part].view(-1)[-1] = float("nan")
        return found

    command.answer = answer
    try:
        command.cache_teacher(cfg)
    except UserError as error:
        return str(error)
    finally:
        command.answer = plain
    return "nothing"


@pytest.mark.parametrize("part", [1, 2])
def test_answers_that_are_no_numbers_are_not_kept(gloo, sources, tmp_path, part):
    (said,) = gloo(1, with_odd_answers, options(sources, tmp_path / "cache"), part)
    assert "logits are not finite; the weights or precision= are at fault" in said
    assert not (tmp_path / "cache").exists() and not hashes(tmp_path / ".cache.partial")


LAYOUTS = [
    pytest.param(2, {"tensor": 2, "sequence": True}, marks=pytest.mark.slow),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    pytest.param(4, {"pipeline": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_every_layout_writes_the_same_cache(gloo, sources, made, tmp_path, ranks, layout):
    gloo(ranks, command.cache_teacher, options(sources, tmp_path / "cache", layout))
    found, wanted = Cache.open(tmp_path / "cache"), Cache.open(made)
    for split, count in (("train", 20), ("validation", 3)):
        for here, there in zip(
            found.of_samples(range(count), split), wanted.of_samples(range(count), split), strict=True
        ):
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.of_samples(range(count), split).ids, wanted.of_samples(range(count), split).ids)


def killed(cfg: CacheTeacherConfig, chunks: int) -> str:
    """The command, killed in the middle of writing a file after so many whole ones."""
    write, written = command.write_chunk, []

    def writing(folder, contents, chunk, *of_samples):
        if len(written) == chunks:
            (folder / f".{chunk.name}.partial").write_bytes(b"half")
            raise RuntimeError("killed")
        written.append(chunk)
        return write(folder, contents, chunk, *of_samples)

    command.write_chunk = writing
    try:
        command.cache_teacher(cfg)
    except RuntimeError as error:
        return str(error)
    finally:
        command.write_chunk = write
    return "not killed"


def test_a_killed_run_goes_on_to_the_same_bytes(gloo, sources, made, tmp_path):
    """What it left whole stays as it is; what was damaged since is made again; nothing half-written remains."""
    cfg, partial = options(sources, tmp_path / "cache"), tmp_path / ".cache.partial"
    assert gloo(1, killed, cfg, 3) == ["killed"]
    assert not (tmp_path / "cache").exists() and len(hashes(partial)) == 3
    names = sorted(hashes(partial))
    before = (partial / names[0]).stat().st_mtime_ns
    content = bytearray((partial / names[1]).read_bytes())
    content[-3] ^= 4
    (partial / names[1]).write_bytes(content)
    # Two of six files stay: 15 of 23 samples are left, and run in micro-batches of 3 that are filled up.
    ((begun, *moved),) = gloo(1, with_bar, cfg)
    assert begun == ("cache", 15, {"unit": "samples", "made": "tokens"})
    assert sum(n for n, _ in moved) == 15 and {tokens for _, tokens in moved} == {3 * LENGTH}
    check_rate(read_manifest(tmp_path / "cache")["results"], 15)
    assert hashes(tmp_path / "cache") == hashes(made)
    assert (tmp_path / "cache" / names[0]).stat().st_mtime_ns == before
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".safetensors", ".yaml"}
    assert read_manifest(tmp_path / "cache")["digest"] == read_manifest(made)["digest"]


def test_a_cache_is_verified_like_any_folder(made, tmp_path):
    from minitron_megatron.checkpoints.folder import verify_files

    shutil.copytree(made, tmp_path / "cache")
    digest = read_manifest(tmp_path / "cache")["digest"]
    verify_files(tmp_path / "cache", digest)
    damaged(tmp_path / "cache", "-1")
    with pytest.raises(UserError, match="is damaged: its files differ"):
        verify_files(tmp_path / "cache", digest)


# A student that learns from it


def distillation(sources: Path, output: Path, layout: dict | None = None, **loss) -> DistillConfig:
    """Five steps over the samples of `options`, in other micro-batches."""
    return DistillConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        teacher=ModelConfig() if "cache" in loss else model_option(sources / "teacher" / "model"),
        student=model_option(sources / "student" / "model"),
        data=data_option(sources / "data", LENGTH),
        trainer=TrainerConfig(steps=5, global_batch_size=4, micro_batch_size=2, validation_samples=3),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        distill=DistillOptions(**loss),
        logger=LoggerConfig(wandb="disabled"),
    )


def figures(run: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


TOP_20 = {"loss": "topk_kl", "top_k": 20, "temperature": 1.5}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"tensor": 2, "sequence": True}), (4, {"pipeline": 2})],
    ids=lambda value: str(value),
)
@pytest.mark.slow
def test_a_cached_teacher_is_as_good_as_the_same_top_k_online(gloo, sources, made, tmp_path, ranks, layout):
    """To what float16 keeps, over five steps and in a validation, in layouts that the cache knows nothing of."""
    gloo(1, distill, distillation(sources, tmp_path / "online", **TOP_20))
    gloo(ranks, distill, distillation(sources, tmp_path / "cached", layout, **TOP_20, cache=str(made)))
    found, wanted = figures(tmp_path / "cached"), figures(tmp_path / "online")
    assert len(found) == 5 and found == pytest.approx(wanted, rel=2e-3)
    for name in ("grad_norm", "validation_perplexity"):
        assert figures(tmp_path / "cached", name) == pytest.approx(figures(tmp_path / "online", name), rel=5e-3)


def test_a_cache_of_the_whole_vocabulary_gives_the_whole_divergence(gloo, sources, tmp_path):
    """With nothing outside K, the figures of a run with the teacher beside the student and forward KL, validations too."""
    whole = options(sources, tmp_path / "cache", distill=CacheOptions(top_k=300))
    gloo(1, command.cache_teacher, whole)
    gloo(1, distill, distillation(sources, tmp_path / "online"))
    cached = {"loss": "topk_kl", "top_k": 300, "cache": str(tmp_path / "cache")}
    gloo(1, distill, distillation(sources, tmp_path / "cached", **cached))
    for name in ("loss", "validation_loss", "validation_perplexity"):
        assert figures(tmp_path / "cached", name) == pytest.approx(figures(tmp_path / "online", name), rel=2e-3)


def test_cross_entropy_is_mixed_in_by_its_weight(gloo, sources, made, tmp_path):
    gloo(1, distill, distillation(sources, tmp_path / "run", **TOP_20, cache=str(made), cross_entropy=0.25))
    losses, parts = figures(tmp_path / "run"), zip(*(figures(tmp_path / "run", n) for n in PARTS), strict=True)
    assert losses == pytest.approx([divergence + 0.25 * labels for divergence, labels in parts], rel=1e-6)
    gloo(1, distill, distillation(sources, tmp_path / "without", **TOP_20, cache=str(made)))
    assert figures(tmp_path / "run", "divergence")[0] == figures(tmp_path / "without")[0]
    assert figures(tmp_path / "run", "cross_entropy")[-1] < figures(tmp_path / "run", "cross_entropy")[0]


PARTS = ("divergence", "cross_entropy")


def test_a_cache_of_something_else_is_refused(sources, made, tmp_path):
    """In one line, before anything is written."""
    cfg = distillation(sources, tmp_path / "run", **TOP_20, cache=str(made))
    loss, trainer = cfg.distill, cfg.trainer
    data_folder(tmp_path / "other", sources / "teacher" / "model", documents=50)
    other = imported(hf_model(3), tmp_path / "teacher")
    for changed, says in (
        (
            {"distill": replace(loss, loss="forward_kl")},
            "holds the top 20 log probabilities: give distill.loss=topk_kl",
        ),
        ({"distill": replace(loss, top_k=10)}, "was made with distill.top_k=20, this run has 10"),
        ({"distill": replace(loss, temperature=1.0)}, "was made with distill.temperature=1.5, this run has 1.0"),
        ({"distill": replace(loss, cache=str(sources / "data"))}, "data is not a teacher cache"),
        ({"distill": replace(loss, cache=str(tmp_path / "none"))}, "none does not exist"),
        ({"seed": 5}, "was made with seed=1234, this run has 5: they must be the same"),
        ({"data": data_option(tmp_path / "other" / "data", LENGTH)}, "was made of other data than data.path="),
        ({"data": data_option(sources / "data", 16)}, "was made with data.sequence_length=32, this run has 16"),
        ({"data": replace(cfg.data, reset_attention_mask=True)}, "with data.reset_attention_mask=False, this run has"),
        ({"teacher": model_option(other)}, "was made with another teacher than teacher=: leave it out"),
        ({"trainer": replace(trainer, steps=6)}, "has 20 train samples, this run takes 24: make a longer cache"),
        ({"trainer": replace(trainer, validation_samples=4)}, "has 3 validation samples, this run takes 4"),
    ):
        with pytest.raises(UserError, match=says) as error:
            distill(replace(cfg, **changed))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    distill(replace(cfg, teacher=model_option(sources / "teacher" / "model"), dry_run=True))


def test_impossible_caches_are_refused(sources, tmp_path, tmp_path_factory, capsys):
    cfg = options(sources, tmp_path / "cache")
    without_validation = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(sources / "data", without_validation)
    manifest = yaml.safe_load((without_validation / "manifest.yaml").read_text())
    del manifest["results"]["validation"]
    (without_validation / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    endless = replace(cfg.data, max_epochs=1e12)
    for changed, says in (
        (replace(cfg, data=replace(cfg.data, path=str(without_validation))), "has no split 'validation'"),
        (replace(cfg, distill=CacheOptions(top_k=301)), "distill.top_k=301 is above the vocabulary of 300"),
        (replace(cfg, trainer=CacheRunConfig()), "give either trainer.steps= or trainer.tokens="),
        (replace(cfg, teacher=model_option(tmp_path / "none")), "none does not exist"),
        (replace(cfg, parallel=ParallelConfig(tensor=3)), "does not divide"),
        (replace(cfg, trainer=CacheRunConfig(tokens=1e5)), "takes 100,096 tokens, and .* has 9,174 to train on"),
        (replace(cfg, data=endless, trainer=CacheRunConfig(tokens=1e15)), "no space left for .*GiB are needed"),
    ):
        with pytest.raises(UserError, match=says):
            command.cache_teacher(changed)
    command.cache_teacher(replace(cfg, dry_run=True))
    shown = capsys.readouterr().out
    assert "training samples" in shown and "hours on 1 h100 (at 54% of the peak in bf16)" in shown and "GiB" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_is_of_one_sample_of_one_cache():
    """Of its split and number, of what it is a cache of, and of every byte."""
    ids, rest = np.arange(6, dtype=np.uint8), np.ones(2, np.float32)
    known = {
        SMALL.checksum("train", 1, ids, rest),
        SMALL.checksum("train", 2, ids, rest),
        SMALL.checksum("validation", 1, ids, rest),
        replace(SMALL, temperature=2.0).checksum("train", 1, ids, rest),
        replace(SMALL, model="another").checksum("train", 1, ids, rest),
        SMALL.checksum("train", 1, ids[::-1], rest),
        SMALL.checksum("train", 1, ids, rest * 2),
    }
    assert len(known) == 7
