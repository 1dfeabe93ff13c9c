"""What a cache of teacher answers is of: sizes to the byte, numbers that can be, and which distillation it is one for."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.checkpoints.folder import output_folder
from minitron_megatron.config import (
    CacheDataConfig,
    CacheOptions,
    CacheRunConfig,
    CacheTeacherConfig,
    DistillOptions,
    HardwareConfig,
    ModelConfig,
)
from minitron_megatron.data.folder import DocumentMasks
from minitron_megatron.distill import cache_checks, cache_teacher, contents
from minitron_megatron.distill.cache import Cache, check_chunk, write_chunk
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.contents import Chunk, Contents
from minitron_megatron.distill.losses import TopK
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import flops_per_token
from minitron_megatron.models.shape import LARGEST
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import distill
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_cache import SMALL, random_answers, small_cache

# Sizes and files


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"vocab_size": 200},
        {"top_k": 7, "sequence_length": 3},
        {"train": 6, "validation": 0},
        {"train": 4, "validation": 5, "chunk_samples": 1},
    ],
)
def test_a_cache_has_the_bytes_that_it_says_but_for_headers(tmp_path, changed):
    """Ids, a float16 and the mass of the rest for each token, two checksums a sample; a header is below 512 bytes."""
    of = replace(SMALL, **changed)
    headers, payload = [], 0
    for chunk in of.chunks():
        answers = random_answers(of, len(chunk.samples))
        write_chunk(tmp_path, of, chunk, answers, chunk.samples)
        raw = (tmp_path / chunk.name).read_bytes()
        headers.append(8 + int.from_bytes(raw[:8], "little"))
        payload += len(raw) - headers[-1]
    assert of.files == len(headers) and max(headers) <= 512 == contents._HEADER
    assert payload == of.total_bytes - 512 * len(headers)


@pytest.mark.parametrize(
    ("train", "validation", "size", "ranges"),
    [
        (7, 2, 3, [("train", 0, 3), ("train", 3, 6), ("train", 6, 7), ("validation", 0, 2)]),
        (6, 0, 3, [("train", 0, 3), ("train", 3, 6)]),
        (1, 3, 2, [("train", 0, 1), ("validation", 0, 2), ("validation", 2, 3)]),
        (2, 1, 9, [("train", 0, 2), ("validation", 0, 1)]),
    ],
)
def test_samples_lie_in_files_in_order(train, validation, size, ranges):
    of = replace(SMALL, train=train, validation=validation, chunk_samples=size)
    assert [(one.split, one.first, one.last) for one in of.chunks()] == ranges and of.files == len(ranges)
    for split, count in (("train", train), ("validation", validation)):
        for sample in range(count):
            chunk = of.chunk_of(split, sample)
            assert sample in chunk.samples and chunk in list(of.chunks())
    assert Chunk("train", 64, 128).name == "train-000000064.safetensors"


# Numbers that can be


@pytest.mark.parametrize("name", ["sequence_length", "vocab_size", "top_k", "train", "validation", "chunk_samples"])
def test_sizes_of_a_cache_have_ends(name):
    least = 0 if name in ("train", "validation") else 1
    for value in (least, 2**62 - 1):
        assert replace(SMALL, **{name: value}).odd() is None
    for value in (least - 1, 2**62, 1.0, "1", True, None):
        assert replace(SMALL, **{name: value}).odd() == name


@pytest.mark.parametrize(
    ("name", "value", "odd"),
    [
        ("temperature", 1, False),
        ("temperature", LARGEST, False),
        ("temperature", LARGEST * 2, True),
        ("temperature", 0, True),
        ("temperature", float("nan"), True),
        ("temperature", True, True),
        ("model", 3, True),
        ("data", None, True),
        ("seed", -5, False),
        ("seed", "5", True),
        ("reset_attention_mask", True, False),
        ("reset_attention_mask", 1, True),
    ],
)
def test_what_else_a_cache_says_is_of_its_kind(name, value, odd):
    assert replace(SMALL, **{name: value}).odd() == (name if odd else None)


def made(path, results, files=()):
    with output_folder(path, command="a test", config={}, inputs={}, resume=True) as out:
        for name in files:
            (out.path / name).touch()
        out.results = results
    return path


def test_a_folder_is_a_cache_by_its_manifest(tmp_path):
    """Every field is there, can be, and so are all its files."""
    names = [chunk.name for chunk in SMALL.chunks()]
    assert Cache.open(made(tmp_path / "whole", asdict(SMALL) | {"more": 1}, names)).contents == SMALL
    for field in fields(Contents):
        short = {name: value for name, value in asdict(SMALL).items() if name != field.name}
        with pytest.raises(UserError, match=r"is not a teacher cache \(it was made by a test\)"):
            Cache.open(made(tmp_path / f"without {field.name}", short, names))
    for n, (changed, files, says) in enumerate((
        ({"top_k": 0}, names, r"is damaged \(top_k=0 in its manifest cannot be\)"),
        ({"train": 10**9}, names, r"is damaged \(its number of samples in its manifest cannot be\)"),
        ({}, names[:-1], "its number of samples"),
        ({}, [*names[:-1], "other"], r"validation-000000000\.safetensors is missing"),
        ({}, ["other", *names[1:]], r"train-000000000\.safetensors is missing"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=says):
            Cache.open(made(tmp_path / f"odd {n}", asdict(SMALL) | changed, files))


# Which run it is for


def test_a_cache_is_for_a_run_of_the_same(tmp_path):
    small_cache(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    data = SimpleNamespace(digest="data", masks=SimpleNamespace(reset_attention=False))
    same = {
        "data": data, "seed": 1, "sequence_length": 5, "vocab_size": 128256, "how": Divergence("topk_kl", 1.0, top_k=4),
        "train": 7, "validation": 2,
    }  # fmt: skip
    for fits in ({}, {"teacher": "model"}, {"train": 0, "validation": 0}, {"train": 6, "validation": 1}):
        cache.check(**same | fits)
    kl = same["how"]
    for other, says in (
        ({"how": replace(kl, kind="jsd")}, "holds the top 4 log probabilities: give distill.loss=topk_kl"),
        ({"data": SimpleNamespace(digest="x", masks=data.masks)}, "was made of other data"),
        ({"teacher": "x"}, "was made with another teacher"),
        ({"seed": 2}, "seed=1, this run has 2"),
        ({"sequence_length": 6}, "data.sequence_length=5, this run has 6"),
        ({"vocab_size": 7}, "a vocabulary=128256, this run has 7"),
        ({"how": replace(kl, temperature=2.0)}, "distill.temperature=1.0, this run has 2.0"),
        ({"how": replace(kl, top_k=3)}, "distill.top_k=4, this run has 3"),
        ({"train": 8}, "has 7 train samples, this run takes 8: make a longer cache"),
        ({"validation": 3}, "has 2 validation samples, this run takes 3"),
        (
            {"data": SimpleNamespace(digest="data", masks=SimpleNamespace(reset_attention=True))},
            "reset_attention_mask=False, ",
        ),
    ):
        with pytest.raises(UserError) as error:
            cache.check(**same | other)
        assert says in str(error.value)


def test_samples_are_read_by_number_up_to_the_last(tmp_path):
    small_cache(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    for split, count in (("train", 7), ("validation", 2)):
        assert cache.of_samples([count - 1], split).ids.shape == (1, 5, 4)
        for outside in (-1, count):
            with pytest.raises(UserError, match=f"has {count} {split} samples, none of number {outside}"):
                cache.of_samples([0, outside], split)


def test_a_file_of_another_shape_is_damaged(tmp_path):
    """Though every checksum in it is right."""
    (chunk, *_) = SMALL.chunks()
    answers = random_answers(SMALL, 3)
    write_chunk(tmp_path, SMALL, chunk, answers, chunk.samples)
    assert len(check_chunk(tmp_path, SMALL, chunk)) == 32
    for other in (
        replace(SMALL, top_k=3),
        replace(SMALL, sequence_length=6),
        replace(SMALL, vocab_size=9),
        replace(SMALL, chunk_samples=2),
    ):
        assert check_chunk(tmp_path, other, next(other.chunks())) is None
    assert check_chunk(tmp_path, SMALL, list(SMALL.chunks())[1]) is None
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


# The command


def config(**changed) -> CacheTeacherConfig:
    given = {
        "data": CacheDataConfig(path="d", sequence_length=8),
        "trainer": CacheRunConfig(steps=3, global_batch_size=4, validation_samples=5, micro_batch_size=2),
        "distill": CacheOptions(top_k=6, temperature=1.5),
        "chunk_samples": 4,
        **changed,
    }
    return CacheTeacherConfig(output="o", **given)


@pytest.mark.parametrize(("windows", "validation"), [(None, 0), (3, 3), (5, 5), (9, 5)])
def test_a_cache_is_of_every_sample_of_a_run_and_the_windows_that_there_are(windows, validation):
    found = cache_checks.contents_of(
        replace(config(), seed=9), SimpleNamespace(digest="m", shape=SMALL_SHAPE), SimpleNamespace(digest="d"),
        None if windows is None else range(windows),
    )  # fmt: skip
    assert found == Contents("m", "d", 9, 8, False, SMALL_SHAPE.vocab_size, 1.5, 6, 12, validation, 4)


def test_room_is_needed_for_what_is_not_written_yet(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cache_checks, "check_space", lambda place, need, *_, **__: asked.append(need))
    cache_checks.check_room(tmp_path / "o", 100)
    for folder, size in (("o", 30), (".o.partial", 7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_bytes(b"x" * size)
        cache_checks.check_room(tmp_path / "o", 100)
    assert asked == [100, 70, 63]


@pytest.mark.parametrize(
    ("layout", "options", "taken"),
    [
        (Layout(), {}, True),
        (Layout(tensor=2, pipeline=2, world_size=4), {}, True),
        (Layout(context=2, world_size=2), {}, False),
        (Layout(tensor=3, world_size=3), {}, False),
        (Layout(), {"top_k": SMALL_SHAPE.vocab_size}, True),
        (Layout(), {"top_k": SMALL_SHAPE.vocab_size + 1}, False),
    ],
)
def test_a_teacher_that_is_cached_runs_forward_alone(monkeypatch, layout, options, taken):
    monkeypatch.setattr(cache_checks, "check_weights", lambda folder: None)
    cfg = config(distill=CacheOptions(**options)) if options else config()
    assert refused(cache_checks.check_teacher, cfg, SimpleNamespace(shape=SMALL_SHAPE), layout) != taken


def test_a_dry_run_says_how_large_it_gets_and_how_long_it_takes(monkeypatch):
    """Forward alone, on all GPUs of the layout at what they reach of their peak."""
    shown = {}
    monkeypatch.setattr(cache_teacher, "print_table", lambda title, columns, rows: shown.update(rows))
    gpu = HardwareConfig(gpu="h100", efficiency=0.5, bf16_tflops=2.0)
    monkeypatch.setattr(cache_teacher, "hardware", lambda given: gpu)
    of = replace(SMALL, train=60, validation=4, sequence_length=8)
    cache_teacher._dry_run(SimpleNamespace(shape=SMALL_SHAPE), of, Layout(world_size=4))
    tokens = 64 * 8
    assert shown == {
        "training samples": 60,
        "validation samples": 4,
        "tokens": tokens,
        "files": 22,
        "bytes a token": of.total_bytes / tokens,
        "GiB": of.total_bytes / 2**30,
        "hours on 4 h100 (at 50% of the peak in bf16)": pytest.approx(
            flops_per_token(SMALL_SHAPE, 8) * tokens / 4e12 / 3600
        ),
    }


def test_the_loss_of_the_labels_is_over_the_tokens_that_count():
    """Each label the most probable token, or none of the K: of a vocabulary of 10 the other 8 share the rest."""
    of = replace(SMALL, sequence_length=3, top_k=2, vocab_size=10, temperature=1.0)
    rows = [
        {"labels": torch.tensor([1, 2, 5]), "loss_mask": torch.tensor([1.0, 1.0, 1.0])},
        {"labels": torch.tensor([1, 1, 9]), "loss_mask": torch.tensor([1.0, 0.0, 1.0])},
    ]
    answers = TopK(
        torch.tensor([1, 2]).expand(2, 3, 2), torch.tensor([0.5, 0.25]).log().expand(2, 3, 2), torch.full((2, 3), 0.25)
    )
    found = cache_teacher.label_sums(rows, Chunk("train", 0, 2), of, answers)
    nll = -torch.tensor([0.5, 0.25, 0.25 / 8, 0.5, 0.25 / 8], dtype=torch.float64).log().sum()
    assert found == [pytest.approx(float(nll), rel=1e-6), 5.0]
    assert cache_teacher.label_sums(rows, Chunk("train", 1, 2), of, TopK(*(part[1:] for part in answers)))[1] == 2.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_an_earlier_run_has_left_is_known_to_every_rank(gloo, tmp_path, ranks):
    chunks = list(SMALL.chunks())
    answers = random_answers(SMALL, 3)
    for chunk in (chunks[1], chunks[3]):
        part = TopK(*(one[: len(chunk.samples)] for one in answers))
        write_chunk(tmp_path, SMALL, chunk, part, chunk.samples)
    wanted = {chunk: check_chunk(tmp_path, SMALL, chunk) for chunk in (chunks[1], chunks[3])}
    for found in gloo(ranks, cache_teacher._done, tmp_path, SMALL, Layout(world_size=ranks)):
        assert found == wanted


def test_a_cache_is_checked_before_its_teacher_is_loaded(monkeypatch):
    """Output and disk too, with what it is going to hold."""
    did = []
    folder, data = SimpleNamespace(digest="m"), SimpleNamespace(digest="d")
    monkeypatch.setattr(cache_checks, "open_model_folder", lambda path: folder)
    monkeypatch.setattr(cache_checks, "plan_cache", lambda *given: did.append(("plan", *given)) or (data, SMALL))
    monkeypatch.setattr(cache_checks, "check_command_output", lambda *given: did.append(("output", *given)))
    monkeypatch.setattr(cache_checks, "check_room", lambda *given: did.append(("room", *given)))
    cfg = config(teacher=ModelConfig(path="t"))
    found = cache_checks.check_cache_teacher(cfg)
    inputs = {"model": "m", "data": "d"}
    assert did == [("plan", cfg, folder, Layout()), ("output", cfg, inputs), ("room", Path("o"), SMALL.total_bytes)]
    assert (found.layout, found.folder, found.data, found.inputs, found.contents) == (
        Layout(),
        folder,
        data,
        inputs,
        SMALL,
    )


@pytest.mark.parametrize("validation", [0, 5])
def test_data_of_a_cache_are_opened_as_its_distillation_opens_them(monkeypatch, validation):
    did = []
    folder = SimpleNamespace(digest="m", shape=SMALL_SHAPE, path="t")
    for name in ("check_teacher", "check_same_tokenizer", "check_enough"):
        monkeypatch.setattr(cache_checks, name, lambda *given, name=name: did.append((name, *given)))
    data = SimpleNamespace(digest="d")
    monkeypatch.setattr(cache_checks, "open_data", lambda path, split, *more: did.append((split, *more)) or data)
    monkeypatch.setattr(cache_checks, "WindowPlan", lambda *given: did.append(given) or range(3))
    cfg = config()
    cfg.trainer.validation_samples, cfg.data.reset_attention_mask = validation, True
    found, contents = cache_checks.plan_cache(cfg, folder, Layout())
    assert found is data and (contents.validation, contents.train) == (3 if validation else 0, 12)
    masks = DocumentMasks(reset_attention=True)
    wanted = [
        ("check_teacher", cfg, folder, Layout()), ("train", SMALL_SHAPE, 8, masks),
        ("check_same_tokenizer", data, {"teacher": "t"}), ("check_enough", data, 12 * 8, cfg.data.max_epochs),
    ]  # fmt: skip
    assert did == [*wanted, *([("validation", SMALL_SHAPE, 8), (data, "validation", 8)] if validation else [])]


@pytest.mark.parametrize("verify", [True, False])
def test_copies_of_a_cache_are_compared_and_where_asked_for_all_its_bytes(monkeypatch, verify):
    did = []
    monkeypatch.setattr(distill, "check_copies", lambda *paths: did.append(paths))
    monkeypatch.setattr(Cache, "verify", lambda self: did.append(self.digest))
    cfg = SimpleNamespace(verify=verify, distill=DistillOptions(loss="topk_kl", top_k=4))
    cache, folders = contents.CacheFolder(Path("c"), SMALL, "digest"), {"student": SimpleNamespace(shape=SMALL_SHAPE)}
    found = distill.distillation(cfg, cache, folders, Layout())
    assert did == [(Path("c"),), *(["digest"] if verify else [])]
    assert (found.teacher.cache.path, found.teacher.cache.contents) == (Path("c"), SMALL)
    assert found.vocab_size == SMALL_SHAPE.vocab_size and found.intermediate is None
