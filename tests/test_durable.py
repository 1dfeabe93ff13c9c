"""What is whole is on the disk before it has its name, and a command that is killed between any two steps loses nothing whole.

The order of writes, fsyncs, renames and removals is recorded and compared.
"""

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import output_folder, read_manifest
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.checkpoints.safetensors_stream import write_safetensors
from minitron_megatron.config import ModelConfig, RandomModelConfig
from minitron_megatron.data import prepare
from minitron_megatron.data.indexed import SplitWriter
from minitron_megatron.distill.cache import write_chunk
from minitron_megatron.distill.contents import Contents
from minitron_megatron.distill.losses import TopK
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checkpoint, metrics
from minitron_megatron.train.saved import OfRun, find_best, find_checkpoints, whole
from tests.test_checkpoints import random_sizes

# What changes a folder, and what makes a change lasting.
OPERATIONS = ((os, "rename"), (os, "replace"), (os, "rmdir"), (os, "unlink"), (os, "fsync"), (shutil, "rmtree"))


class Recorder:
    """Every operation in order, as (name, files, bytes that the file then has); those within a removal are counted alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple] = []
        self.count, self.kill_at, self.within = 0, None, False
        for module, name in OPERATIONS:
            monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name, plain):
        def operation(*given, **more):
            if self.kill_at == self.count:
                os._exit(9)
            self.count += 1
            removes = name == "rmtree" and not self.within
            there = not removes or Path(given[0]).exists()
            if there and not self.within and name not in ("unlink", "rmdir"):
                self.seen.append(self._described(name, given))
            self.within = self.within or removes
            try:
                return plain(*given, **more)
            finally:
                self.within = self.within and not removes

        return operation

    def _described(self, name, given):
        if name == "fsync":
            return "fsync", Path(os.readlink(f"/proc/self/fd/{given[0]}")).name, os.fstat(given[0]).st_size
        names = [Path(one).name for one in given if isinstance(one, str | os.PathLike)]
        return "replace" if name == "rename" else name, *names

    def killed(self, number, function):
        """Run a function in a process that ends instead of operation `number`, as by SIGKILL."""
        pid = os.fork()
        if not pid:
            self.count, self.kill_at = 0, number
            with suppress(BaseException):
                function()
            os._exit(0)
        os.waitpid(pid, 0)

    def place(self, *operation):
        return self.seen.index(operation)


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    return Recorder(monkeypatch)


def write(path, value, **options):
    options = {"resume": True, **options}
    with output_folder(path, command="test", config={"value": value}, inputs={}, **options) as out:
        if not out.done:
            (out.path / "file").write_text(value)
        return out.done


def test_a_manifest_is_on_the_disk_before_the_folder_has_its_name(recorder, tmp_path):
    write(tmp_path / "o", "new")
    size = (tmp_path / "o" / "manifest.yaml").stat().st_size
    assert recorder.seen == [("fsync", "manifest.yaml", size), ("replace", ".o.partial", "o")]


def test_a_folder_that_is_made_anew_goes_when_the_new_one_is_there(recorder, tmp_path):
    write(tmp_path / "o", "old")
    recorder.seen = []
    write(tmp_path / "o", "new", anew=True)
    size = (tmp_path / "o" / "manifest.yaml").stat().st_size
    assert recorder.seen == [
        ("fsync", "manifest.yaml", size),
        ("replace", "o", ".o.replaced"),
        ("replace", ".o.partial", "o"),
        ("rmtree", ".o.replaced"),
    ]


@pytest.mark.parametrize("anew", [False, True])
def test_an_output_that_is_killed_anywhere_is_whole_or_made_again(recorder, tmp_path, anew):
    """What is there under its name afterwards is whole; the same command ends with the new one, and nothing else is left."""
    for number in range(9):
        path = tmp_path / str(number) / "o"
        path.parent.mkdir()
        if anew:
            write(path, "old")
        recorder.killed(number, lambda path=path: write(path, "new", anew=anew))
        if path.exists():
            assert read_manifest(path)["config"]["value"] == (path / "file").read_text()
        write(path, "new", anew=anew)
        assert (path / "file").read_text() == "new" == read_manifest(path)["config"]["value"]
        assert [one.name for one in path.parent.iterdir()] == ["o"]


def test_the_files_of_a_model_are_on_the_disk_before_its_manifest(recorder, tmp_path):
    make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes()), output=str(tmp_path / "m")))
    manifest = recorder.place("fsync", "manifest.yaml", (tmp_path / "m" / "manifest.yaml").stat().st_size)
    written = sorted((tmp_path / "m" / "weights").glob("*.distcp"))
    assert written
    for file in written:
        assert recorder.place("fsync", file.name, file.stat().st_size) < manifest
    assert any(name.startswith(".metadata") for kind, name, *_ in recorder.seen[:manifest] if kind == "fsync")
    assert manifest < recorder.place("replace", ".m.partial", "m")


def test_an_exported_file_is_on_the_disk_when_it_is_written(recorder, tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x", "float32", shapes, lambda name: iter([tensors[name]]))
    assert recorder.seen == [("fsync", "x", (tmp_path / "x").stat().st_size)]
    with pytest.raises(ValueError, match="16 bytes written, 40 announced"):
        write_safetensors(tmp_path / "y", "float32", shapes, lambda name: iter([tensors[name][:1]]))


CONTENTS = Contents("m", "d", 1, 3, False, 300, 1.0, 2, 4, 0, 4)


def test_answers_of_a_teacher_are_on_the_disk_before_they_have_their_name(recorder, tmp_path):
    answers = TopK(torch.zeros(4, 3, 2, dtype=torch.int64), torch.full((4, 3, 2), -1.0), torch.full((4, 3), 0.25))
    chunk = next(CONTENTS.chunks())
    recorder.killed(1, lambda: write_chunk(tmp_path, CONTENTS, chunk, answers, range(4)))
    assert not (tmp_path / chunk.name).exists()
    write_chunk(tmp_path, CONTENTS, chunk, answers, range(4))
    size = (tmp_path / chunk.name).stat().st_size
    assert recorder.seen == [
        ("fsync", f".{chunk.name}.partial", size),
        ("replace", f".{chunk.name}.partial", chunk.name),
    ]


def test_tokens_are_on_the_disk_before_the_journal_says_so(recorder, tmp_path):
    """Of both files of a split what was added, then the journal, which is replaced whole."""
    done = prepare.Done()
    with SplitWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(5, dtype=np.uint16))
        writer.commit()
        done.add(prepare.Encoded("train", np.arange(5), 9, 0, 1, False))
        done.write(tmp_path)
    journal = tmp_path / prepare.JOURNAL
    assert recorder.seen == [
        ("fsync", "train.bin", 10),
        ("fsync", "train.lengths", 4),
        ("fsync", f"{journal.name}.new", journal.stat().st_size),
        ("replace", f"{journal.name}.new", journal.name),
    ]
    assert prepare.Done.read(tmp_path) == done


def test_every_commit_of_a_preparation_is_tokens_first(recorder, tmp_path, monkeypatch):
    """As the command itself does it, after every document."""
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_COMMITS", 0.0)
    monkeypatch.setattr(prepare, "_tokenise", encoded)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(6)))
    out = SimpleNamespace(path=tmp_path, keep=False, results={})
    cfg = SimpleNamespace(text_key="text", validation_fraction=0.5, seed=1)
    encoder = SimpleNamespace(tokenizer=None, results=dict)
    monkeypatch.setattr(prepare, "vocabulary_size", lambda _: 300)
    prepare._write(cfg, [tmp_path / "in.jsonl"], out, encoder)
    names = [name for kind, name, *_ in recorder.seen if kind == "fsync"]
    commit = ["train.bin", "train.lengths", "validation.bin", "validation.lengths", f"{prepare.JOURNAL}.new"]
    assert names[: 6 * 5] == commit * 6 and out.keep
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl", "train.bin", "train.idx", "validation.bin", "validation.idx",
    ]  # fmt: skip


def encoded(pieces, cfg, dtype):
    """Every text as its bytes."""
    for split, piece in pieces:
        ids = np.frombuffer(piece.text.encode(), np.uint8).astype(dtype)
        yield prepare.Encoded(split, ids, len(piece.text), piece.file, piece.number, False)


def complete(folder, step, best=None, keep_last=2):
    """What a save does once its files are written."""
    name = f"step_{step:08d}"
    written = folder / f".{name}.abcd.partial"
    written.mkdir(parents=True, exist_ok=True)
    (written / "tensors").write_text(str(step))
    saver = object.__new__(checkpoint.Saver)
    saver.options = SimpleNamespace(
        checkpoint_format="fully_reshardable", fp8="none", keep_last=keep_last, keep_best=True
    )
    saver.folder, saver.layout, saver.of_run = folder, Layout(), OfRun("this", {"seed": 1}, {})
    saver._complete(written, name, step, {} if best is None else {"validation_loss": best}, False)


def test_a_checkpoint_has_its_name_and_with_it_its_loss_before_old_ones_go(recorder, tmp_path):
    for step in (1, 2):
        complete(tmp_path, step)
    recorder.seen = []
    complete(tmp_path, 3, best=0.5)
    size = (tmp_path / "step_00000003" / "format.json").stat().st_size
    assert recorder.seen == [
        ("fsync", "format.json", size),
        ("replace", ".step_00000003.abcd.partial", "step_00000003"),
        ("replace", "step_00000001", ".step_00000001.removed.partial"),
        ("rmtree", ".step_00000001.removed.partial"),
    ]


@pytest.mark.parametrize("again", [False, True])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint_and_the_best(recorder, tmp_path, again):
    """A new one, or one of the same step as one that is there."""
    for number in range(12):
        folder = tmp_path / str(number)
        for step in (1, 2, 3):
            complete(folder, step, best=1.0 if step == 1 else None)
        step = 3 if again else 4
        recorder.killed(number, partial(complete, folder, step, best=0.5))
        steps = [found for found, _ in find_checkpoints(folder)]
        assert 2 in steps or steps[-1] >= 3
        for found, path in find_checkpoints(folder):
            assert (path / "tensors").read_text() == str(found) and whole(path).written.step == found
        best, loss = find_best(folder)
        assert best.is_dir() and (best.name, loss) in {("step_00000001", 1.0), (f"step_{step:08d}", 0.5)}
        # A new one is the best from the moment that it has its name.
        assert again or (loss == 0.5) is (folder / f"step_{step:08d}").is_dir()
        complete(folder, step, best=0.5)
        assert find_best(folder) == (folder / f"step_{step:08d}", 0.5)


def test_metrics_are_cut_back_whole_or_not_at_all(recorder, tmp_path):
    """Killed anywhere, lines of the steps that stay are there; who has the file open still reads all of it."""
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    for number in range(3):
        file = tmp_path / str(number) / "metrics.jsonl"
        file.parent.mkdir()
        file.write_text("".join(lines) + '{"st')
        recorder.killed(number, partial(metrics._cut_back, file, 2))
        assert file.read_text() in ("".join(lines) + '{"st', "".join(lines[:2]))
        with open(file) as before:
            metrics._cut_back(file, 1)
            assert before.read().startswith("".join(lines[:2])) and file.read_text() == lines[0]


@pytest.mark.parametrize("free", [99, 100])
def test_a_full_disk_is_told_with_the_reason_and_nothing_half_stays(tmp_path, free, monkeypatch):
    """The error of any write; both ends of the room that is asked for."""
    from minitron_megatron.checkpoints.folder import check_space

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if free == 99:
        with pytest.raises(UserError, match="no space left for it"):
            check_space(tmp_path / "not" / "there", 100, "it")
    else:
        check_space(tmp_path / "not" / "there", 100, "it")
