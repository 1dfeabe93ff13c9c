"""The distill command: runs that stop and go on as if they had not, their folders, and what is refused before any work."""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.config import (
    BatchConfig,
    DistillConfig,
    EvaluateConfig,
    GuardConfig,
    LoggerConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
    number_of_steps,
)
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.evaluate import evaluate
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.axes import flops_per_token, slots
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.starts import read_starts
from minitron_megatron.train import checkpoint, saved
from minitron_megatron.train.checks import check_run_folder
from minitron_megatron.train.distill import distill
from minitron_megatron.train.distill_checks import check_pair
from minitron_megatron.train.loop import Trainer
from minitron_megatron.train.metrics import OF_THE_MACHINE, Metrics
from tests.pool import WorkerError
from tests.test_models import names
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

STEPS = 6
LENGTH = 32
RUNS = [
    (1, {}, "float32"),
    pytest.param(4, {"tensor": 2, "pipeline": 2, "sequence": True}, "float32", marks=pytest.mark.slow),
    pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, "bfloat16", marks=[pytest.mark.slow, pytest.mark.bf16]),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


def make_sources(folder: Path) -> Path:
    """Folder with a teacher, a smaller student in float32 and in bfloat16, and data."""
    small = {"hidden_size": 24, "intermediate_size": 24}
    teacher = imported(hf_model(0), folder / "teacher")
    imported(hf_model(1, **small), folder / "float32")
    imported(hf_model(1, **small), folder / "bfloat16", torch.bfloat16)
    data_folder(folder, teacher)
    return folder


def options(sources: Path, output: Path, layout=None, dtype="float32", **trainer) -> DistillConfig:
    """A short run; checkpoints every two steps."""
    given = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "save_interval": 2}
    return DistillConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        teacher=model_option(sources / "teacher" / "model"),
        student=model_option(sources / dtype / "model"),
        data=data_option(sources / "data", LENGTH),
        trainer=TrainerConfig(**{**given, "validation_interval": 3, "validation_samples": 9, **trainer}),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        logger=LoggerConfig(wandb="disabled"),
    )


def exit_code(cfg: DistillConfig) -> int | None:
    """Run the command on this rank; how it exits, None when it returns."""
    try:
        distill(cfg)
    except SystemExit as end:
        return end.code
    return None


def signalled(cfg: DistillConfig, number: int, step: int) -> int | None:
    """The same, while the last rank alone gets a signal in the middle of a step (from 0)."""
    train_step = Trainer.train_step

    def stepping(self, at, *rest):
        if at == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), number)
        return train_step(self, at, *rest)

    Trainer.train_step = stepping
    try:
        return exit_code(cfg)
    finally:
        Trainer.train_step = train_step


def killed_while_saving(cfg: DistillConfig, step: int) -> str:
    """The same, but the checkpoint of a step is left half-written."""
    save = checkpoint.Saver.save

    def saving(self, chunks, optimizer, at, **rest):
        if at == step:
            (self.folder / f".step_{at:08d}.partial").mkdir(exist_ok=True)
            raise RuntimeError("killed")
        save(self, chunks, optimizer, at, **rest)

    checkpoint.Saver.save = saving
    try:
        distill(cfg)
    except RuntimeError as error:
        return str(error)
    finally:
        checkpoint.Saver.save = save
    return "not killed"


def written_slowly(cfg: DistillConfig) -> dict[int, int]:
    """Run the command, with writers that take a second longer; by step of a checkpoint: steps done when it was whole."""
    write, complete = FileSystemWriterAsync.write_preloaded_data_multithread, checkpoint.Saver._complete
    train_step, done, whole = Trainer.train_step, [0], {}

    def writing(*rest):
        time.sleep(1)
        return write(*rest)

    def completing(self, partial, name, step, *rest):
        complete(self, partial, name, step, *rest)
        whole[step] = done[0]

    def stepping(self, at, *rest):
        done[0] = at + 1
        return train_step(self, at, *rest)

    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(writing)
    checkpoint.Saver._complete, Trainer.train_step = completing, stepping
    try:
        distill(cfg)
    finally:
        FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(write)
        checkpoint.Saver._complete, Trainer.train_step = complete, train_step
    return whole


def with_small_files(cfg: DistillConfig) -> str:
    """The command on this rank, where no file may grow to its checkpoints' size; what it says."""
    begin, before = checkpoint.Saver._begin, resource.getrlimit(resource.RLIMIT_FSIZE)

    def beginning(self, name):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        return begin(self, name)

    checkpoint.Saver._begin = beginning
    try:
        distill(cfg)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoint.Saver._begin = begin
    return "nothing"


def contents(checkpoint_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    reader = WeightReader(checkpoint_folder)
    stored = {k: v for k, v in reader.metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    return {key: reader.read(key, [0] * len(value.size), value.size) for key, value in stored.items()}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    """Metrics but for what the clock says."""
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("ranks", "layout", "dtype"), RUNS, ids=names)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(gloo, sources, tmp_path, ranks, layout, dtype):
    """Every figure of every step and every bit of the published weights."""
    whole, stopped = (options(sources, tmp_path / name, layout, dtype) for name in ("whole", "stopped"))
    assert gloo(ranks, exit_code, whole) == [None] * ranks
    assert gloo(ranks, signalled, stopped, signal.SIGTERM, 2) == [75] * ranks
    assert checkpoints(tmp_path / "stopped") == ["step_00000002", "step_00000003"]
    assert not (tmp_path / "stopped" / "model").exists()
    assert gloo(ranks, exit_code, stopped) == [None] * ranks
    assert checkpoints(tmp_path / "stopped") == ["step_00000004", "step_00000006"]
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    digests = {open_model_folder(tmp_path / name / "model").digest for name in ("whole", "stopped")}
    assert len(digests) == 1


def saved_at_every_step(cfg: DistillConfig) -> list[list[dict]]:
    """Run all steps and keep each checkpoint; then go on from each of them: every run's metrics after its start."""
    distill(cfg)
    kept = Path(cfg.output) / "checkpoints"
    runs = [untimed(Path(cfg.output))]
    for step, path in saved.find_checkpoints(kept)[:-1]:
        output = Path(f"{cfg.output}-{step}")
        if dist.get_rank() == 0:
            shutil.copytree(path, output / "checkpoints" / path.name)
            shutil.copy(Path(cfg.output) / "config.yaml", output)
        dist.barrier()
        distill(replace(cfg, output=str(output)))
        runs.append(untimed(output))
    return runs


@pytest.mark.parametrize(
    ("ranks", "layout", "how"),
    [
        pytest.param(1, {}, "fully_reshardable", marks=pytest.mark.slow),
        pytest.param(2, {}, "dp_reshardable", marks=pytest.mark.slow),
    ],
    ids=names,
)
def test_a_run_goes_on_from_each_of_its_steps(gloo, sources, tmp_path, ranks, layout, how):
    """With the same losses, gradient norms and skipped steps: the spike guard judges by a window of two steps."""
    trainer = {"steps": 8, "save_interval": 1, "keep_last": 8, "validation_samples": 0, "checkpoint_format": how}
    cfg = options(sources, tmp_path / "run", layout, **trainer)
    cfg.guard = GuardConfig(window=2, loss_factor=1.01, grad_norm_factor=1.2, stop_after=9)
    whole, *continued = gloo(ranks, saved_at_every_step, cfg, timeout=240)[0]
    assert [line["step"] for line in whole] == list(range(1, 9)) and 0 < whole[-1]["skipped"] < 6
    assert continued == [whole[k:] for k in range(1, 8)]


@pytest.mark.parametrize(
    ("ranks", "layout", "how"),
    [
        (1, {}, "fully_reshardable"),
        pytest.param(2, {"pipeline": 2}, "dp_reshardable", marks=pytest.mark.slow),
    ],
    ids=names,
)
def test_a_checkpoint_written_beside_later_steps_has_none_of_them(gloo, sources, tmp_path, ranks, layout, how):
    """The same figures and, bit for bit, the same checkpoints as where training waits for each of them."""
    trainer = {"keep_last": 3, "checkpoint_format": how, "validation_samples": 0}
    waiting, beside = (options(sources, tmp_path / str(on), layout, **trainer, async_save=on) for on in (False, True))
    assert gloo(ranks, written_slowly, waiting)[0] == {2: 2, 4: 4, 6: 6}
    whole = gloo(ranks, written_slowly, beside)[0]
    assert whole[2] > 2 and whole[4] > 4 and whole[6] == 6
    assert untimed(tmp_path / "True") == untimed(tmp_path / "False")
    names_there = checkpoints(tmp_path / "False")
    assert checkpoints(tmp_path / "True") == names_there == [f"step_0000000{step}" for step in (2, 4, 6)]
    for name in names_there:
        one, other = (contents(tmp_path / on / "checkpoints" / name) for on in ("False", "True"))
        assert one.keys() == other.keys() and any("optimizer" in key for key in one)
        # Megatron's buffers have gaps between parameters, with whatever was in that memory.
        assert all(torch.equal(one[key], other[key]) for key in one if "gbuf_idx" not in key)
    shutil.rmtree(tmp_path / "True" / "model")
    for name in names_there[1:]:
        shutil.rmtree(tmp_path / "True" / "checkpoints" / name)
    assert gloo(ranks, exit_code, beside) == [None] * ranks
    assert untimed(tmp_path / "True") == untimed(tmp_path / "False")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_one_line(gloo, sources, tmp_path, asynchronous):
    cfg = options(sources, tmp_path / "run", steps=2, save_interval=1, validation_samples=0, async_save=asynchronous)
    (said,) = gloo(1, with_small_files, cfg)
    assert "a checkpoint could not be written (its writer's error is above" in said and "\n" not in said
    (free,) = re.findall(r"; ([\d.]+) GB are free there\)", said)
    assert float(free) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.2, abs=1.0)
    assert all(name.endswith(".partial") for name in checkpoints(tmp_path / "run"))
    assert gloo(1, exit_code, cfg) == [None]
    assert checkpoints(tmp_path / "run") == ["step_00000001", "step_00000002"]


@pytest.mark.slow
def test_data_parallel_ranks_share_out_a_checkpoint(gloo, sources, tmp_path):
    """What it holds is the same; the files of the ranks are less uneven; each reads a share and goes on alike."""
    for on in (False, True):
        cfg = options(sources, tmp_path / str(on), parallel_save=on, parallel_load=on, validation_samples=0)
        assert gloo(2, signalled, cfg, signal.SIGTERM, 1) == [75] * 2
    one, other = (tmp_path / on / "checkpoints" / "step_00000002" for on in ("False", "True"))
    before, after = contents(one), contents(other)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert max(sizes_by_rank(other)) < 0.8 * max(sizes_by_rank(one))
    for on in ("False", "True"):
        cfg = options(sources, tmp_path / on, parallel_load=on == "True", validation_samples=0)
        assert gloo(2, exit_code, cfg) == [None] * 2
    assert untimed(tmp_path / "True") == untimed(tmp_path / "False")


def sizes_by_rank(folder: Path) -> list[int]:
    """Bytes that each rank has written of a checkpoint."""
    sizes = Counter()
    for path in folder.glob("__*_*.distcp"):
        sizes[path.name.split("_")[2]] += path.stat().st_size
    return list(sizes.values())


def test_metrics_go_back_to_the_checkpoint_of_a_killed_run(gloo, sources, tmp_path):
    whole, killed = (options(sources, tmp_path / name) for name in ("whole", "killed"))
    gloo(1, exit_code, whole)
    assert gloo(1, killed_while_saving, killed, STEPS) == ["killed"]
    assert checkpoints(tmp_path / "killed") == [".step_00000006.partial", "step_00000002", "step_00000004"]
    assert lines(tmp_path / "killed")[-1]["step"] == STEPS
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    gloo(1, exit_code, killed)
    assert checkpoints(tmp_path / "killed") == ["step_00000004", "step_00000006"]
    # Each start is noted, with the step that it began from, as the report shows them.
    assert [one["step"] for one in read_starts(tmp_path / "killed")] == [0, 4]
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_wandb_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    """Online only where someone is logged in; one id for all starts; what it is given is what metrics.jsonl has."""
    started, logged = [], []

    class FakeRun:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**given):
        started.append(given)
        return FakeRun()

    fake = SimpleNamespace(login=lambda prompt: len(started) == 1, init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    values = {"step": 1, "loss": 2.0, "tokens_per_second": 3.0}
    for start in (0, 1):
        metrics = Metrics(tmp_path, LoggerConfig(wandb="auto"), {}, 2, start, "distill")
        metrics.add({**values, "step": start + 1})
        metrics.close()
    assert [given["mode"] for given in started] == ["offline", "online"]
    assert started[0]["id"] == started[1]["id"] and {given["dir"] for given in started} == {str(tmp_path)}
    rest = {"loss": 2.0, "tokens_per_second": 3.0}
    assert [one[1].pop("run_seconds") >= 0 for one in logged if one != "finished"] == [True, True]
    assert logged == [(1, rest), "finished", (2, rest), "finished"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(gloo, sources, tmp_path):
    """Losses to 1e-4: sums run in another order there."""
    gloo(1, exit_code, options(sources, tmp_path / "whole"))
    gloo(4, signalled, options(sources, tmp_path / "moved", {"tensor": 2, "pipeline": 2}), signal.SIGUSR1, 1)
    gloo(2, signalled, options(sources, tmp_path / "moved"), signal.SIGUSR1, 3)
    gloo(2, exit_code, options(sources, tmp_path / "moved", {"tensor": 2}))
    found, wanted = untimed(tmp_path / "moved"), untimed(tmp_path / "whole")
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for there, here in zip(found, wanted, strict=True):
        for key in there.keys() & {"loss", "validation_loss", "validation_perplexity"}:
            assert there[key] == pytest.approx(here[key], rel=1e-4)


def test_the_published_student_is_the_one_that_was_trained(gloo, sources, tmp_path):
    """Its perplexity by the evaluate command is what training measured; its weights are not the first ones."""
    cfg = options(sources, tmp_path / "run")
    gloo(1, exit_code, cfg)
    manifest = read_manifest(tmp_path / "run" / "model")
    assert manifest["results"]["steps"] == STEPS and manifest["results"]["tokens"] == STEPS * 8 * LENGTH
    named = {name for name in manifest["inputs"] if not name.startswith("file ")}
    assert named == {"teacher", "student", "data"} and "file tokenizer/tokenizer.json" in manifest["inputs"]
    asked = EvaluateConfig(
        output=str(tmp_path / "evaluated"),
        model=model_option(tmp_path / "run" / "model"),
        data=data_option(sources / "data", LENGTH),
        samples=9,
        trainer=BatchConfig(micro_batch_size=2),
    )
    gloo(1, evaluate, asked)
    perplexity = json.loads((tmp_path / "evaluated" / "results.json").read_text())["perplexity"]
    assert perplexity == pytest.approx(manifest["results"]["validation_perplexity"], rel=1e-5)
    shape = open_model_folder(tmp_path / "run" / "model").shape
    trained, first = (WeightReader(p / "model" / "weights") for p in (tmp_path / "run", sources / "float32"))
    for slot in slots(shape):
        assert not torch.equal(trained.read_slot(slot, shape), first.read_slot(slot, shape)), slot
        if "vocab" in slot.row.axes:
            assert (trained.read_slot(slot, shape)[shape.vocab_size :] == 0).all()


def test_a_complete_run_is_left_alone(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=1, validation_samples=0)
    gloo(1, exit_code, cfg)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").rglob("*")}
    metrics = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert gloo(1, exit_code, cfg) == [None]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").rglob("*")} == before
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == metrics


def test_the_best_checkpoint_stays_and_can_be_published(gloo, sources, tmp_path):
    """Validation losses are made to be lowest at the second step; of the others the newest two are kept."""
    cfg = options(
        sources, tmp_path / "run", steps=5, validation_interval=1, save_interval=1, keep_best=True, publish="best"
    )
    assert gloo(1, with_validation_losses, cfg, [5.0, 1.0, 3.0, 2.0, 4.0]) == [None]
    kept = ["step_00000002", "step_00000004", "step_00000005"]
    assert checkpoints(tmp_path / "run") == kept
    shape = open_model_folder(tmp_path / "run").shape
    folder = tmp_path / "run" / "checkpoints"
    published, second, last = (
        WeightReader(path) for path in (tmp_path / "run" / "model" / "weights", folder / kept[0], folder / kept[2])
    )
    slot = next(iter(slots(shape)))
    assert torch.equal(published.read_slot(slot, shape), second.read_slot(slot, shape))
    assert not torch.equal(published.read_slot(slot, shape), last.read_slot(slot, shape))
    # Its figures are its own, and what the run took is the run's.
    loss = next(line["loss"] for line in lines(tmp_path / "run") if line["step"] == 2 and "loss" in line)
    results = read_manifest(tmp_path / "run" / "model")["results"]
    wanted = {"loss": loss, "validation_loss": 1.0, "validation_perplexity": 1.0, "published_step": 2, "steps": 5}
    assert {name: results[name] for name in wanted} == wanted


def with_validation_losses(cfg: DistillConfig, losses: list[float]) -> int | None:
    """The command on this rank, with these losses for its validations."""
    validate, left = Trainer.validate, iter(losses)
    Trainer.validate = lambda self, *_: {"validation_loss": next(left), "validation_perplexity": 1.0}
    try:
        return exit_code(cfg)
    finally:
        Trainer.validate = validate


def test_a_time_limit_saves_and_asks_to_be_requeued(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=3, validation_samples=0, time_limit_minutes=1e-9)
    assert [gloo(1, exit_code, cfg)[0] for _ in range(3)] == [75, 75, None]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_metrics_say_what_a_step_did(gloo, sources, tmp_path):
    """What merely informs is measured when a line is written; on CPUs there is no MFU."""
    cfg = options(sources, tmp_path / "run", steps=4, validation_samples=0)
    cfg.logger.interval = 2
    gloo(2, exit_code, cfg)
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [2, 4]
    for line in found:
        assert 0 <= line["agreement"] <= 1 and 0 < line["teacher_entropy"] < math.log(300)
        assert line["tokens"] == 8 * LENGTH and line["skipped"] == 0 and "mfu" not in line
        assert line["tokens_per_second_per_gpu"] == pytest.approx(line["tokens_per_second"] / 2)
        assert 0 < line["data_seconds"] < line["step_seconds"] and line["resident_gib"] > 0.05
        teacher, student = (
            flops_per_token(open_model_folder(sources / name / "model").shape, LENGTH)
            for name in ("teacher", "float32")
        )
        work = line["tokens_per_second_per_gpu"] * (3 * student + teacher)
        assert line["tflops_per_gpu"] == pytest.approx(work / 1e12)


def test_a_format_that_needs_the_same_layout_says_so(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=2, validation_samples=0, checkpoint_format="dp_reshardable")
    assert gloo(1, signalled, cfg, signal.SIGTERM, 0) == [75]
    with pytest.raises(WorkerError, match=r"no other layout: use parallel\.tensor=1\n"):
        gloo(2, exit_code, replace(cfg, parallel=ParallelConfig(tensor=2)))
    assert gloo(2, exit_code, cfg) == [None] * 2  # two data-parallel ranks can


def test_checkpoints_without_room_are_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    refused(
        options(sources, tmp_path / "run"), r"no space left for the checkpoints of .*trainer\.keep_last=2 and one being"
    )


def test_a_run_can_be_made_longer(gloo, sources, tmp_path):
    """Its published student has to be removed by hand first; what was trained stays."""
    short = options(sources, tmp_path / "run", steps=2, validation_samples=0)
    longer = replace(short, trainer=replace(short.trainer, steps=3))
    gloo(1, exit_code, short)
    before = untimed(tmp_path / "run")
    with pytest.raises(WorkerError, match=r"is finished, with trainer\.steps=2, not 3: remove \S+model, and the same"):
        gloo(1, exit_code, longer)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["steps"] == 2
    shutil.rmtree(tmp_path / "run" / "model")
    gloo(1, exit_code, longer)
    found = untimed(tmp_path / "run")
    assert found[:2] == before and [line["step"] for line in found] == [1, 2, 3]
    assert read_manifest(tmp_path / "run" / "model")["results"]["steps"] == 3


def test_validation_does_not_depend_on_the_stages(gloo, sources, tmp_path):
    """Nine samples neither fill the micro-batches nor the rounds of an interleaved pipeline of three stages."""
    folder = tmp_path / "deep"
    imported(hf_model(0, num_hidden_layers=6), folder / "teacher")
    imported(hf_model(1, num_hidden_layers=6), folder / "float32")
    (folder / "data").symlink_to(sources / "data")
    found = []
    for ranks, layout in ((1, {}), (3, {"pipeline": 3, "virtual_pipeline": 2})):
        trainer = {"steps": 1, "global_batch_size": 3, "micro_batch_size": 1}
        gloo(ranks, exit_code, options(folder, tmp_path / f"run{ranks}", layout, **trainer))
        found.append(lines(tmp_path / f"run{ranks}")[-1])
    assert found[1]["validation_loss"] == pytest.approx(found[0]["validation_loss"], rel=1e-5)
    assert found[1]["validation_perplexity"] == pytest.approx(found[0]["validation_perplexity"], rel=1e-5)


# What is refused, before a process group starts


def refused(cfg: DistillConfig, words: str) -> None:
    """Refused with these words, in one line, and nothing is written."""
    with pytest.raises(UserError, match=words) as error:
        distill(cfg)
    assert "\n" not in str(error.value)
    assert not Path(cfg.output).exists()


def test_impossible_runs_are_refused(sources, tmp_path):
    cfg = options(sources, tmp_path / "run")
    trainer = cfg.trainer
    refused(replace(cfg, trainer=replace(trainer, steps=None)), "either trainer.steps= or trainer.tokens=")
    refused(replace(cfg, trainer=replace(trainer, tokens=1e6)), "either trainer.steps= or trainer.tokens=")
    refused(replace(cfg, trainer=replace(trainer, micro_batch_size=3)), "not a multiple of 3")
    refused(replace(cfg, data=data_option(sources / "data", 256)), "above the teacher's 128 positions")
    short = replace(cfg.data, max_epochs=2)
    refused(
        replace(cfg, data=short, trainer=replace(trainer, steps=1000)), r"takes 256,000 tokens, .* by data\.max_epochs="
    )
    refused(replace(cfg, optim=OptimConfig(lr=1e-5, min_lr=1e-4)), "min_lr=0.0001 is above optim.lr=1e-05")
    refused(replace(cfg, trainer=replace(trainer, publish="best")), "publish=best needs trainer.keep_best=true")
    refused(replace(cfg, trainer=replace(trainer, keep_best=True, validation_samples=0)), "needs validations")
    refused(replace(cfg, student=model_option(tmp_path / "none")), "none does not exist")
    refused(replace(cfg, data=data_option(tmp_path / "none", LENGTH)), "none does not exist")
    refused(replace(cfg, data=data_option(tmp_path / "none", LENGTH), dry_run=True), "none does not exist")


def test_a_teacher_of_another_vocabulary_is_refused(sources, tmp_path):
    shape = open_model_folder(sources / "teacher" / "model").shape
    with pytest.raises(UserError, match="vocabulary of 301, student of 300"):
        check_pair(shape.resized(vocab_size=301), shape, options(sources, tmp_path), Layout())


def test_layouts_that_do_not_divide_are_refused(sources, tmp_path):
    cfg, shape = options(sources, tmp_path / "run"), open_model_folder(sources / "teacher" / "model").shape
    odd = shape.resized(num_layers=1)
    with pytest.raises(UserError, match="more than num_layers=1 of the student"):
        check_pair(shape, odd, cfg, Layout(pipeline=2, world_size=2))
    with pytest.raises(UserError, match=r"not a multiple of 6 .*: use 6 or 12"):
        check_pair(shape, shape, cfg, Layout(world_size=3))


def test_tokens_become_steps(sources, tmp_path):
    cfg = options(sources, tmp_path, steps=None, tokens=1000.0)
    assert number_of_steps(cfg) == 4  # of 256 tokens


def test_a_folder_with_another_run_is_refused(sources, tmp_path):
    cfg = options(sources, tmp_path / "run")
    (tmp_path / "run").mkdir()
    check_run_folder(tmp_path / "run", cfg)
    (tmp_path / "run" / ".model.partial").mkdir()
    check_run_folder(tmp_path / "run", cfg)
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        check_run_folder(tmp_path / "run", cfg)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(resolved_config(cfg)))
    check_run_folder(tmp_path / "run", replace(cfg, parallel=ParallelConfig(tensor=2)))
    with pytest.raises(UserError, match="resume=false"):
        check_run_folder(tmp_path / "run", replace(cfg, resume=False))
    other = replace(cfg, seed=5, optim=replace(cfg.optim, lr=1e-3))
    with pytest.raises(UserError, match=r"holds a run with seed=1234, not 5 \(optim\.lr too\)"):
        check_run_folder(tmp_path / "run", other)
    check_run_folder(tmp_path / "run", replace(cfg, trainer=replace(cfg.trainer, steps=STEPS + 1)))
    # Before a step is taken no length is fixed; then it is that with which steps were taken, whatever was asked for since.
    check_run_folder(tmp_path / "run", replace(cfg, trainer=replace(cfg.trainer, steps=STEPS - 1)))
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    first.mkdir(parents=True)
    saved.Written("fully_reshardable", False, {}, 1, {}, {}, options={"trainer.steps": STEPS}).write(first)
    check_run_folder(tmp_path / "run", cfg)
    longer = replace(cfg, trainer=replace(cfg.trainer, steps=800))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(resolved_config(longer)))
    check_run_folder(tmp_path / "run", cfg)
    with pytest.raises(UserError, match=r"holds a run with trainer\.steps=6, not 5"):
        check_run_folder(tmp_path / "run", replace(cfg, trainer=replace(cfg.trainer, steps=STEPS - 1)))
    with pytest.raises(UserError, match=r"holds a run with trainer\.steps=6, not null"):
        check_run_folder(tmp_path / "run", replace(cfg, trainer=replace(cfg.trainer, steps=None, tokens=1e6)))


def test_a_dry_run_counts_and_writes_nothing(sources, tmp_path, capsys):
    distill(replace(options(sources, tmp_path / "run"), dry_run=True))
    shown = capsys.readouterr().out
    for words in ("teacher parameters", "student parameters", "optimizer", "1,536"):
        assert words in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_a_save_starts_outlives_the_signal_that_asks_for_another(number):
    """Slurm signals every process of a job; the manager stands for the one that Megatron's writers keep."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with checkpoint._undisturbed():
        manager = get_context("spawn").Manager()
    with manager:
        queue = manager.Queue()
        os.kill(manager._process.pid, number)
        time.sleep(0.5)
        queue.put("still here")
        assert queue.get(timeout=10) == "still here"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
