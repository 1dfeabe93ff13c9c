"""Files are compared before they are trusted: what a command found, texts, outputs of stages, copies on other nodes."""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import initialize_config_dir

from minitron_megatron.checkpoints import copies, folder
from minitron_megatron.checkpoints.card import read_results
from minitron_megatron.checkpoints.copies import check_copies, verify_copies
from minitron_megatron.checkpoints.folder import RESULTS, load_results, open_model_folder, output_folder, read_manifest
from minitron_megatron.checkpoints.weights import verify_digest
from minitron_megatron.compress_source import Source, open_source
from minitron_megatron.config import AdoptDataConfig, CompressConfig, PrepareDataConfig, TrainingDataConfig
from minitron_megatron.data.adopt import check_adopt
from minitron_megatron.data.datasets import token_checksum, training_samples
from minitron_megatron.data.folder import open_data, verify_data
from minitron_megatron.data.prepare import check_prepare
from minitron_megatron.data.sample_index import DIGESTS
from minitron_megatron.distill.cache import Cache, CachedTeacher, write_chunk
from minitron_megatron.errors import UserError
from minitron_megatron.importance.merge import _manifest
from minitron_megatron.importance.scores import FILE, load_scores
from minitron_megatron.launcher import CONF
from minitron_megatron.parallel import collectives
from minitron_megatron.report.folders import find
from minitron_megatron.search.found import read_search
from minitron_megatron.stages import Stages
from tests.test_cache import SMALL, random_answers
from tests.tiny import data_folder, hf_model, imported, model_option

DIFFER = "is damaged: its files differ from the digest in its manifest.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return imported(hf_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    return data_folder(tmp_path_factory.mktemp("data"), model)


def flip(file: Path, place: int = -1) -> None:
    """One bit of a file, which keeps its size and its time."""
    stat, bits = file.stat(), bytearray(file.read_bytes())
    bits[place] ^= 1
    file.write_bytes(bits)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# What a command found


READERS = {
    "load_scores": (FILE, load_scores),
    "merge_scores": ("statistics.safetensors", _manifest),
    "search": ("targets/rank_01.yaml", read_search),
    "chain": (RESULTS, lambda path: load_results(path, "evaluate")),
    "report": (RESULTS, lambda path: find([str(path)])[0][0].read_json(RESULTS)),
    "card": (RESULTS, lambda path: read_results([str(path)], None)),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_was_found_is_compared_whenever_it_is_read(tmp_path, reader):
    """Layers are read by the same function as scores; `verify` need not be asked for."""
    odd, read = READERS[reader]
    with output_folder(tmp_path / "out", command="x", config={}, inputs={"model": "m"}, resume=True) as out:
        for name in {FILE, "candidates.yaml", RESULTS, odd}:
            (out.path / name).parent.mkdir(exist_ok=True)
            (out.path / name).write_text("{}")
    flip(tmp_path / "out" / odd)
    with pytest.raises(UserError, match=DIFFER):
        read(tmp_path / "out")


@pytest.mark.parametrize("file", ["model.yaml", "plan.yaml", "huggingface/config.json", "tokenizer/tokenizer.json"])
def test_what_lies_beside_weights_is_compared_whenever_a_model_is_opened(model, tmp_path, monkeypatch, file):
    """Their digest is that of the weights alone; a large file is compared with verify=true, and none of an earlier version's."""
    with output_folder(tmp_path / "m", command="x", config={}, inputs={}, resume=True) as out:
        shutil.copytree(model, out.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.yaml"))
        (out.path / "plan.yaml").write_text("layers: [0, 1]\n")
        out.digest = open_model_folder(model).digest
    verify_digest(open_model_folder(tmp_path / "m"))
    monkeypatch.setattr(folder, "_SMALL", (tmp_path / "m" / file).stat().st_size)
    whole = open_model_folder(tmp_path / "m")
    flip(tmp_path / "m" / file)
    says = rf"m/{file} differs from its digest in manifest\.yaml: put it back"
    with pytest.raises(UserError, match=says):
        open_model_folder(tmp_path / "m")
    monkeypatch.setattr(folder, "_SMALL", 0)
    with pytest.raises(UserError, match=says):
        verify_digest(whole)
    manifest = yaml.safe_load((tmp_path / "m" / "manifest.yaml").read_text())
    assert not any(name.startswith("weights/") for name in manifest["digests"])
    (tmp_path / "m" / "manifest.yaml").write_text(yaml.safe_dump({**manifest, "digests": {}}))
    verify_digest(whole)


# Small texts


def texts(tmp_path: Path, model: Path, data: Path) -> dict[str, str]:
    """Stamps of text by command."""
    prepare = PrepareDataConfig(
        input=str(tmp_path / "text.jsonl"), model=model_option(model), output=str(tmp_path / "o")
    )
    adopt = AdoptDataConfig(
        train=str(tmp_path / "train"),
        validation=str(data / "validation"),
        model=model_option(model),
        output=str(tmp_path / "o"),
    )
    chain = CompressConfig(
        model=model_option(model),
        input=str(tmp_path / "text.jsonl"),
        data=TrainingDataConfig(sequence_length=32),
        output=str(tmp_path / "o"),
    )
    return {
        "prepare_data": check_prepare(prepare).inputs[str(tmp_path / "text.jsonl")],
        "adopt_data": check_adopt(adopt).inputs["train"],
        "compress": composed(chain).inputs["data"],
    }


def composed(cfg: CompressConfig) -> Source:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return open_source(cfg)


def test_a_text_is_known_by_its_contents(model, data, tmp_path):
    """Another one of the same size and time is another; the same one of another time is the same."""
    shutil.copyfile(data.parent / "text.jsonl", tmp_path / "text.jsonl")
    for ending in (".bin", ".idx"):
        shutil.copyfile(data / f"train{ending}", tmp_path / f"train{ending}")
    before = texts(tmp_path, model, data)
    for file in ("text.jsonl", "train.bin", "train.idx"):
        os.utime(tmp_path / file, ns=(1, 1))
    assert texts(tmp_path, model, data) == before
    flip(tmp_path / "text.jsonl", 20)
    flip(tmp_path / "train.bin", 0)
    after = texts(tmp_path, model, data)
    assert all(after[command] != before[command] for command in before)


# Outputs of stages


def test_a_finished_stage_that_lost_a_file_is_not_done(tmp_path):
    made = []

    def start() -> None:
        def work() -> None:
            made.append(1)
            with output_folder(tmp_path / "out", command="x", config={}, inputs={}, resume=True) as out:
                (out.path / "model.safetensors").write_text("whole")

        Stages(tmp_path / "stages.json").run("export", tmp_path / "out", work, "the same", tmp_path / "out")

    start()
    start()
    for content in (None, "short"[:-1]):
        lost = tmp_path / "out" / "model.safetensors"
        lost.unlink() if content is None else lost.write_text(content)
        with pytest.raises(
            UserError, match=r"^export: \S+out/model.safetensors (is missing|has 4 bytes).+remove \S+out,"
        ):
            start()
        shutil.rmtree(tmp_path / "out")
        start()
    assert len(made) == 3


# The index of samples


def order(path, shape) -> list:
    found = training_samples(open_data(path, "train", shape, 16), "train", sequence_length=16, seed=3, count=40)
    return [found[i]["tokens"].tolist() for i in range(40)]


DAMAGE = {
    "flipped": flip,
    "short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "missing": Path.unlink,
    "without digests": lambda file: (file.parent / DIGESTS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("index", ["shuffle_index", "dataset_sample_index"])
def test_an_index_that_is_not_as_it_was_made_is_made_again(model, data, tmp_path, caplog, index, damage):
    """Of a folder and of a blend: the run sees the same samples, and says why."""
    shape, copy = open_model_folder(model).shape, tmp_path / "data"
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))
    path = str(copy)
    if index != "shuffle_index":
        path = [2, path, 1, str(data_folder(tmp_path / "other", model, documents=30))]
    before = order(path, shape)
    (file,) = (copy / "cache").glob(f"*/*{index}.npy")
    DAMAGE[damage](file)
    assert order(path, shape) == before
    (line,) = [record.message for record in caplog.records if "is made again" in record.message]
    assert str(file.parent) in line
    assert order(path, shape) == before and len([r for r in caplog.records if "made again" in r.message]) == 1
    assert {one.name.split("-")[0] for one in (copy / "cache").iterdir()} <= {"train", "blend"}


def test_answers_belong_to_tokens_and_not_to_a_number(tmp_path):
    """A cached teacher gives none for other tokens than it saw, whatever put them under the number."""
    rows = torch.arange(SMALL.train * 5).view(-1, 5)
    with output_folder(tmp_path / "cache", command="x", config={}, inputs={}, resume=True) as out:
        for chunk in SMALL.chunks():
            answers = random_answers(SMALL, len(chunk.samples))
            write_chunk(out.path, SMALL, chunk, answers, [token_checksum(rows[n]) for n in chunk.samples])
        out.results = asdict(SMALL)
    teacher = CachedTeacher(Cache.open(tmp_path / "cache"))

    def targets(numbers: list[int], tokens: torch.Tensor) -> None:
        batch = {
            "number": torch.tensor(numbers),
            "checksum": torch.tensor([token_checksum(row) for row in tokens]),
            "position_ids": torch.arange(5).expand(2, 5),
            "tokens": tokens,
        }
        teacher.run_ahead([batch, batch])
        for _ in range(2):
            teacher.targets(batch, "train")

    targets([3, 6], rows[[3, 6]])
    with pytest.raises(UserError, match="train sample 6 of this run has other tokens than the teacher saw"):
        targets([3, 6], rows[[3, 5]])


# Copies on other nodes


def seen_by_nodes(roots: list[str], digest: str) -> list[str]:
    """What each check says where this rank is a node with disks of its own: below the root of its number."""
    where, of_node = os.getcwd(), copies.node
    os.chdir(roots[collectives.rank()])
    copies.node = lambda: (f"node-{collectives.rank()}", "")
    found = []
    shape = open_model_folder("model").shape
    try:
        for check in (
            lambda: check_copies(Path("model"), Path("data")),
            lambda: verify_digest(open_model_folder("model")),
            lambda: verify_data(open_data("data", "train", shape, 16)),
            lambda: verify_copies(Path("data"), digest),
        ):
            try:
                check()
                found.append("")
            except UserError as error:
                found.append(str(error))
    finally:
        copies.node = of_node
        os.chdir(where)
    return found


@pytest.fixture(scope="module")
def disks(model, data, tmp_path_factory):
    """The disks of two nodes, the same and others: with weights of another model, with another text."""
    root = tmp_path_factory.mktemp("disks")
    for name in ("one", "same", "weights", "text"):
        shutil.copytree(model, root / name / "model")
        shutil.copytree(data, root / name / "data", ignore=shutil.ignore_patterns("cache"))
    other = imported(hf_model(9), root / "other")
    for file in (other / "weights").glob("*.distcp"):
        shutil.copyfile(file, root / "weights" / "model" / "weights" / file.name)
    tokens = root / "text" / "data" / "train.bin"
    tokens.write_bytes(np.flip(np.fromfile(tokens, "<u2")).tobytes())
    return root


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("same", ["", "", "", ""]),
        (
            "weights",
            [
                r"different files: model/weights/\S+ is \d+ bytes, \w+ on rank 0 \(.+\), \d+ bytes, \w+ on rank 1",
                r"^model: the weights differ on node-1 \(rank 1\) from the digest",
                "",
                "",
            ],
        ),
        (
            "text",
            [
                "different files: data/train.bin is .+ on rank 0 .+ on rank 1",
                "",
                r"^data/train.bin is damaged on node-1 \(rank 1\): its files differ",
                r"^data/train.bin is damaged on node-1 \(rank 1\): its files differ",
            ],
        ),
    ],
)
def test_a_node_with_another_copy_is_named_by_all_ranks(gloo, disks, data, other, says):
    one, two = gloo(2, seen_by_nodes, [str(disks / "one"), str(disks / other)], read_manifest(data)["digest"])
    assert one == two
    for said, wanted in zip(one, says, strict=True):
        assert re.search(wanted, said) if wanted else said == ""


def test_a_look_at_a_large_file_tells_copies_apart(tmp_path, monkeypatch):
    """The same places on every rank: of a file's beginning, its end and between."""
    monkeypatch.setattr(copies, "_SMALL", 64)
    monkeypatch.setattr(copies, "_PAGE", 16)
    whole = bytes(range(256)) * 8
    looks = {}
    for name, content in {
        "whole": whole,
        "copy": whole,
        "other": whole[::-1],
        "begins otherwise": b"x" + whole[1:],
        "ends otherwise": whole[:-1] + b"x",
        "zeros after the first half": whole[:1024] + bytes(1008) + whole[-16:],
        "shorter": whole[:-1],
    }.items():
        (tmp_path / name).write_bytes(content)
        looks[name] = copies._look(str(tmp_path / name), 16)
    assert looks.pop("copy") == looks["whole"] and len(set(looks.values())) == len(looks)
    assert copies._look(str(tmp_path / "none"), 16) is None
