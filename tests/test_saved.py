"""Checkpoints of training: damage is noticed and named, all ranks take the newest whole one, and a lock is its run's."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from minitron_megatron.checkpoints import copies, digests, locks
from minitron_megatron.checkpoints.folder import open_model_folder, output_folder
from minitron_megatron.checkpoints.unfinished import partial_folder
from minitron_megatron.config import DistillConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checkpoint, saved
from minitron_megatron.train.begin import find_checkpoint
from minitron_megatron.train.distill import distill
from minitron_megatron.train.saved import Written, newest_whole
from tests.pool import WorkerError
from tests.test_train import checkpoints, exit_code, make_sources, options, untimed, with_validation_losses


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


# --- Digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_byte_that_changed_is_in_one_segment(tmp_path, monkeypatch, segment, threads):
    """On both sides of every border; of files that are empty, shorter and longer than a segment."""
    monkeypatch.setattr(digests, "SEGMENT_BYTES", segment)
    for size in (0, 1, 6, 7, 8, 63, 64, 65):
        (tmp_path / str(size)).write_bytes(bytes(range(size)))
    files = digests.digest_files(tmp_path, [path.name for path in tmp_path.iterdir()], threads)
    places = digests.segments_of(files)
    assert {name: file.size for name, file in files.items()} == {name: int(name) for name in files}
    assert digests.other_segments(tmp_path, files, places, threads) == []
    for size, at in ((1, 0), (7, 6), (8, 7), (64, 63), (65, 0), (65, 64)):
        file = tmp_path / str(size)
        before = file.read_bytes()
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert digests.other_segments(tmp_path, files, places, threads) == [(str(size), at // segment)]
        file.write_bytes(before)


# --- Which checkpoint is whole ----------------------------------------------------------------------------------------

FILES = {".metadata": b"index", "metadata.json": b"{}", "__0_0.distcp": b"weights" * 9, "__1_0.distcp": b"moments" * 7}
INPUTS = {"teacher": "blake3:a", "student": "blake3:b", "data": "sha256:c"}


def written(folder: Path, *steps: int, inputs: Mapping[str, str] = INPUTS) -> Path:
    """A run's checkpoints of some steps, whose files hold nothing that could be loaded."""
    for step in steps:
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        for name, content in FILES.items():
            (path / name).write_bytes(content + str(step).encode())
        files = digests.digest_files(path, FILES)
        Written("fully_reshardable", False, saved.places(Layout()), step, dict(inputs), files).write(path)
    return folder


def steps_of(found: tuple) -> tuple[int | None, list[str]]:
    there, damaged = found
    return there and there.step, [f"{name[-1]}: {reason}" for name, reason in damaged.items()]


def test_what_is_written_is_what_is_read(tmp_path):
    (_, path), *_ = saved.find_checkpoints(written(tmp_path, 3))
    found = Written.read(path)
    assert (found.optimizer, found.scales, found.step, found.inputs) == ("fully_reshardable", False, 3, INPUTS)
    assert found.places == saved.places(Layout()) and set(found.files) == set(FILES)


def test_no_bit_of_the_format_can_change_unnoticed(tmp_path):
    (_, path), *_ = saved.find_checkpoints(written(tmp_path, 3))
    file, wanted = path / saved.FORMAT, Written.read(path)
    content = file.read_bytes()
    unnoticed = []
    for at, byte in enumerate(content):
        file.write_bytes(content[:at] + bytes([byte ^ (1 << at % 7)]) + content[at + 1 :])
        try:
            found = Written.read(path)
        except saved.Damaged:
            continue
        if found != wanted:
            unnoticed.append(at)
    assert not unnoticed


DAMAGES = {
    "truncated": (lambda path: os.truncate(path / "__1_0.distcp", 3), "__1_0.distcp has 3 bytes instead of 50"),
    "emptied": (lambda path: os.truncate(path / "__0_0.distcp", 0), "__0_0.distcp has 0 bytes instead of 64"),
    "removed": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "longer": (lambda path: (path / "__0_0.distcp").write_bytes(b"x" * 65), "__0_0.distcp has 65 bytes instead of 64"),
    "no index": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "empty index": (lambda path: os.truncate(path / ".metadata", 0), ".metadata has 0 bytes instead of 6"),
    "no backend": (lambda path: (path / "metadata.json").unlink(), "metadata.json is missing"),
    "no format": (lambda path: (path / saved.FORMAT).unlink(), "format.json is missing"),
    "half a format": (lambda path: os.truncate(path / saved.FORMAT, 40), "format.json: "),
    "a list": (lambda path: (path / saved.FORMAT).write_text("[]"), "format.json: "),
    "no folder": (lambda path: (shutil.rmtree(path), path.touch()), "format.json"),
    "another step's": (
        lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("step_00000002"), path)),
        "it is of step 2",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_newest_whole_checkpoint_is_found(tmp_path, what):
    damage, says = DAMAGES[what]
    folder = written(tmp_path / "checkpoints", 2, 4, 6)
    damage(folder / "step_00000006")
    step, (reason,) = steps_of(newest_whole(folder))
    assert step == 4 and reason.startswith("6: ") and says in reason
    shutil.copytree(folder / "step_00000002", tmp_path / "step_00000002")
    for name in ("step_00000002", "step_00000004"):
        shutil.rmtree(folder / name)
    with pytest.raises(
        UserError, match=r"has no whole checkpoint: step_00000006 is damaged \(.*remove .* to begin"
    ) as said:
        newest_whole(folder)
    assert "\n" not in str(said.value)


def test_a_run_without_checkpoints_has_none_and_all_is_well(tmp_path):
    assert newest_whole(tmp_path / "nowhere") == (None, {}) == newest_whole(tmp_path)


def test_several_may_be_damaged_and_are_all_named(tmp_path):
    folder = written(tmp_path, 2, 4, 6)
    (folder / "step_00000006" / ".metadata").unlink()
    assert steps_of(newest_whole(folder, {"step_00000004": "it was read"})) == (
        2,
        ["6: .metadata is missing", "4: it was read"],
    )


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path):
    """Its format.json names no files; an index that is empty is noticed still."""
    folder = written(tmp_path, 2)
    about = {"optimizer": "fully_reshardable", "scales": False, **saved.places(Layout())}
    (folder / "step_00000002" / saved.FORMAT).write_text(json.dumps(about))
    found, damaged = newest_whole(folder)
    assert (found.step, found.written.files, found.written.inputs, damaged) == (2, None, None, {})
    saved.check_inputs(tmp_path, None, INPUTS)
    os.truncate(folder / "step_00000002" / ".metadata", 0)
    with pytest.raises(UserError, match=r"\.metadata has 0 bytes"):
        newest_whole(folder)


# --- One rank decides -------------------------------------------------------------------------------------------------


def chosen(folder: str, odd: str = "") -> tuple[int | None, str]:
    """What a rank takes, and what it says; the last rank has an odd view of the folder."""
    last = dist.get_rank() == dist.get_world_size() - 1
    find, digest = saved.find_checkpoints, digests.digest_of_segment
    if last and odd == "listing":
        saved.find_checkpoints = lambda path: find(path)[:-1]
    if last and odd == "bytes":
        digests.digest_of_segment = lambda file, number: "another"
    if last and odd == "nothing":
        digests.digest_of_segment = lambda file, number: file.with_name("gone").read_text()
    if last and odd == "descriptors":

        def too_many(file: Path, number: int) -> str:
            raise OSError(errno.EMFILE, "Too many open files", str(file))

        digests.digest_of_segment = too_many
    try:
        found = checkpoint.newest(Path(folder))
        return found and found.step, ""
    except UserError as error:
        return None, str(error)
    finally:
        saved.find_checkpoints, digests.digest_of_segment = find, digest


def overwrite(file: Path) -> None:
    """Other bytes, as many."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"X" + content[len(content) // 2 + 1 :])


def test_all_ranks_take_what_rank_zero_has_found(gloo, tmp_path):
    folder = written(tmp_path, 2, 4, 6)
    assert gloo(3, chosen, str(folder), "listing") == [(6, "")] * 3
    overwrite(folder / "step_00000006" / "__1_0.distcp")
    overwrite(folder / "step_00000004" / ".metadata")
    assert gloo(3, chosen, str(folder), "listing") == [(2, "")] * 3
    assert sorted(os.listdir(folder)) == ["damaged_step_00000004", "damaged_step_00000006", "step_00000002"]
    # What was set aside is set aside for good: steps of that number are written anew.
    written(folder, 4)
    assert gloo(2, chosen, str(folder)) == [(4, "")] * 2


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("bytes", r"rank 1 on \S+ reads other bytes of \S+ than rank 0 does"),
        ("nothing", r"rank 1 on \S+ reads other bytes of \S+ than rank 0 does"),
        (
            "descriptors",
            r"cannot be read by rank 1 on \S+ \(\[Errno 24\] Too many open files.*nothing says that it is damaged",
        ),
    ],
)
def test_a_rank_that_reads_otherwise_damages_nothing(gloo, tmp_path, odd, says):
    folder = written(tmp_path, 2, 4)
    found = gloo(2, chosen, str(folder), odd)
    assert len(set(found)) == 1 and re.search(says, found[0][1]) and "\n" not in found[0][1]
    assert sorted(os.listdir(folder)) == ["step_00000002", "step_00000004"]


def of_copies(roots: list[str], verify: bool, looks: bool = True) -> tuple[int | None, str]:
    """What a rank takes where each is a node with disks of its own."""
    where, of_node, look = os.getcwd(), copies.node, copies._look
    os.chdir(roots[dist.get_rank()])
    copies.node = lambda: (f"node-{dist.get_rank()}", "")
    if not looks:
        copies._look = lambda name, pages: str(os.stat(name).st_size)
    try:
        found = checkpoint.newest(Path("checkpoints"), verify=verify)
        return found and found.step, ""
    except UserError as error:
        return None, str(error)
    finally:
        copies.node, copies._look = of_node, look
        os.chdir(where)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", saved.FORMAT])
def test_a_node_with_another_copy_of_a_checkpoint_is_named(gloo, tmp_path, name):
    """Whichever rank compares the file's digest; where a look cannot tell, every node reads all of it with verify=true."""
    roots = [str(tmp_path / "one"), str(tmp_path / "two")]
    written(tmp_path / "one" / "checkpoints", 2, 4)
    shutil.copytree(*roots)
    for verify in (False, True):
        assert gloo(2, of_copies, roots, verify) == [(4, "")] * 2
    overwrite(tmp_path / "two" / "checkpoints" / "step_00000004" / name)
    one, two = gloo(2, of_copies, roots, False)
    assert one == two and "rank 1" in one[1] and ("different files" in one[1] or "reads other bytes" in one[1])
    if name != saved.FORMAT:
        one, two = gloo(2, of_copies, roots, True, False)
        assert one == two and f"rank 1 on {socket.gethostname()} reads other bytes of {name} than rank 0 does" in one[1]
    assert len(os.listdir(tmp_path / "one" / "checkpoints")) == len(os.listdir(tmp_path / "two" / "checkpoints")) == 2


def test_without_a_whole_one_nothing_is_set_aside(gloo, tmp_path):
    folder = written(tmp_path, 2, 4)
    for name in os.listdir(folder):
        overwrite(folder / name / "__0_0.distcp")
    ((step, said),) = gloo(1, chosen, str(folder))
    assert (
        step is None
        and "has no whole checkpoint: step_00000004 is damaged" in said
        and "1 more are damaged too" in said
    )
    assert sorted(os.listdir(folder)) == ["step_00000002", "step_00000004"]


# --- Whose a lock is --------------------------------------------------------------------------------------------------

FORKS = """
import os, sys
from pathlib import Path
from minitron_megatron.checkpoints.locks import lock

held = lock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
sys.stdin.read()  # until whoever has started it ends it, or ends
"""


def test_a_killed_run_leaves_no_lock_to_whom_it_forked(tmp_path):
    """As a writer of checkpoints that goes on for a while: the output can be made at once."""
    partial = partial_folder(tmp_path / "model")
    partial.mkdir()
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", FORKS, str(partial)], stdin=pipe, stdout=pipe, text=True)
    child = int(run.stdout.readline())
    try:
        another = {"command": "x", "config": {}, "inputs": {}, "resume": True}
        who = rf"\(process {run.pid} on {socket.gethostname()}, since .* ago\): wait for it, end it with kill {run.pid}, or"
        refused = pytest.raises(UserError, match=f"another run is writing .* {who}")
        with refused, output_folder(tmp_path / "model", **another):
            pass
        run.kill()
        run.wait()
        os.kill(child, 0)
        with output_folder(tmp_path / "model", **another):
            pass
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        run.stdout.close()
        run.stdin.close()


def test_a_lock_of_another_machine_is_told_by_the_last_start(tmp_path, monkeypatch):
    """Of a training run it stands beside its model; of one that ended here nothing is said."""
    partial = partial_folder(tmp_path / "model")
    partial.mkdir()
    monkeypatch.setattr(locks, "holder", lambda _: None)
    plain = f"another run is writing {partial}: wait for it or choose another output="
    assert str(locks.another_run("is writing", partial)) == plain
    line = {"command": "x", "pid": 7, "host": "node7", "time": time.time() - 3600, "born": 1}
    (tmp_path / "starts.jsonl").write_text(json.dumps(line) + "\n")
    said = str(locks.another_run("is writing", partial))
    assert re.search(r"\(process 7 on node7, since [\d:]+, 60.0 min ago\): .*, end it with kill 7 on node7, or", said)
    (tmp_path / "starts.jsonl").write_text(json.dumps({**line, "host": socket.gethostname()}) + "\n")
    assert str(locks.another_run("is writing", partial)) == plain


def test_the_lock_of_a_run_outlives_whom_it_forks(tmp_path):
    held = locks.lock(tmp_path)
    for _ in range(2):
        child = get_context("fork").Process(target=locks.lock, args=(tmp_path,))
        child.start()
        child.join()
        assert child.exitcode == 0 and locks.lock(tmp_path) is None
    locks.unlock(held)
    locks.unlock(locks.lock(tmp_path))


def slowly_written(cfg: DistillConfig, file: Path, tests: int) -> None:
    """The command, whose forked writers wait as long as the tests run; the first notes its number in a file."""
    run, write = os.getpid(), FileSystemWriterAsync.write_preloaded_data_multithread

    def writing(*rest):
        if os.getpid() != run:
            file.write_text(str(os.getpid()))
            while os.path.exists(f"/proc/{tests}"):
                time.sleep(0.1)
        return write(*rest)

    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(writing)
    distill(cfg)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_while_its_writer_lives(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=3, save_interval=1, validation_samples=0, async_save=True)
    run = get_context("spawn").Process(target=slowly_written, args=(cfg, tmp_path / "writer", os.getpid()))
    run.start()
    while not (tmp_path / "writer").is_file() or not (tmp_path / "writer").read_text():
        assert run.is_alive()
        time.sleep(0.1)
    writer = int((tmp_path / "writer").read_text())
    try:
        run.kill()
        run.join()
        assert gloo(1, exit_code, cfg, timeout=600.0) == [None]
        os.kill(writer, 0)
    finally:
        os.kill(writer, signal.SIGKILL)
    assert checkpoints(tmp_path / "run") == ["step_00000002", "step_00000003"]


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_last_whole_checkpoint(gloo, sources, tmp_path):
    """Overwritten bytes, then an index cut short: the figures and the published bits are those of the undisturbed run."""
    cfg = options(sources, tmp_path / "run", steps=4, save_interval=1, keep_last=4, validation_samples=0)
    gloo(1, exit_code, cfg)
    wanted, digest = untimed(tmp_path / "run"), open_model_folder(tmp_path / "run" / "model").digest
    shutil.rmtree(tmp_path / "run" / "model")
    kept = tmp_path / "run" / "checkpoints"
    overwrite(next((kept / "step_00000004").glob("*.distcp")))
    os.truncate(kept / "step_00000003" / ".metadata", 100)
    (kept / "step_00000002" / "metadata.json").unlink()
    assert gloo(1, exit_code, cfg) == [None]
    assert untimed(tmp_path / "run") == wanted
    assert open_model_folder(tmp_path / "run" / "model").digest == digest
    assert [name for name in checkpoints(tmp_path / "run") if name.startswith("damaged")] == [
        f"damaged_step_0000000{step}" for step in (2, 3, 4)
    ]


def test_a_best_checkpoint_that_was_damaged_is_not_published(gloo, sources, tmp_path):
    how = {"steps": 3, "validation_interval": 1, "save_interval": 1, "keep_best": True}
    cfg = options(sources, tmp_path / "run", **how, publish="best")
    gloo(1, with_validation_losses, cfg, [5.0, 1.0, 3.0])
    shutil.rmtree(tmp_path / "run" / "model")
    best, _ = saved.find_best(tmp_path / "run" / "checkpoints")
    assert best.name == "step_00000002"
    overwrite(next(best.glob("*.distcp")))
    with pytest.raises(
        WorkerError, match=r"the best checkpoint, is damaged \(.*other bytes.*give trainer\.publish=last"
    ):
        gloo(1, exit_code, cfg)
    assert best.is_dir()


def without_other_processes(cfg) -> int | None:
    """The command on this rank, where no manager of Megatron's is there and none can be started."""

    def refuse(*_):
        raise AssertionError("a process is started")

    plain, queue = BaseContext.Manager, filesystem_async._results_queue
    BaseContext.Manager, filesystem_async._results_queue = refuse, None
    try:
        return exit_code(cfg)
    finally:
        BaseContext.Manager, filesystem_async._results_queue = plain, queue


def test_a_save_that_is_waited_for_starts_no_process(gloo, sources, tmp_path):
    """It would import torch first."""
    cfg = options(sources, tmp_path / "run", steps=2, save_interval=1, validation_samples=0)
    assert gloo(1, without_other_processes, cfg) == [None]
    assert checkpoints(tmp_path / "run") == ["step_00000001", "step_00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_file_has_a_digest_whoever_wrote_it(gloo, sources, tmp_path, asynchronous):
    """Two ranks write files of their own, in this process or in one forked for it; three then read them, a share each."""
    cfg = options(
        sources, tmp_path / "run", validation_samples=0, stop_after=4, async_save=asynchronous, parallel_save=True
    )
    gloo(2, exit_code, cfg)
    path = tmp_path / "run" / "checkpoints" / "step_00000004"
    found = Written.read(path)
    assert set(found.files) == {file.name for file in path.iterdir()} - {saved.FORMAT}
    assert len([name for name in found.files if name.endswith(".distcp")]) == 2
    assert gloo(3, chosen, str(path.parent)) == [(4, "")] * 3
    overwrite(path / "__1_0.distcp")
    assert gloo(3, chosen, str(path.parent)) == [(2, "")] * 3


def test_a_run_begins_with_a_whole_checkpoint_of_another(gloo, tmp_path):
    """The newest that is; and not with one that was named, or is the last, where its bytes are others."""
    folder = written(tmp_path / "run" / "checkpoints", 2, 4)
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"
    os.truncate(folder / "step_00000004" / ".metadata", 1)
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"
    overwrite(folder / "step_00000002" / "__0_0.distcp")
    for name, says in (("step_00000002", "__0_0.distcp has other bytes"), ("step_00000004", ".metadata has 1 bytes")):
        with pytest.raises(WorkerError, match=rf"{name} is damaged \({re.escape(says)}.*put it back as it was"):
            gloo(1, checkpoint.check_whole, folder / name)


def without_digests(cfg) -> str:
    """The command on this rank, whose writer ends before it has digested what it wrote; what it says."""
    plain = checkpoint._write_and_digest
    checkpoint._write_and_digest = lambda write, threads, *rest: write(*rest)
    try:
        exit_code(cfg)
    except UserError as error:
        return str(error)
    finally:
        checkpoint._write_and_digest = plain
    return "nothing"


def test_a_writer_that_was_killed_leaves_no_checkpoint(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=2, validation_samples=0)
    (said,) = gloo(1, without_digests, cfg)
    assert "could not be written: rank 0's writer ended before" in said and "\n" not in said
    assert all(name.startswith(".") for name in checkpoints(tmp_path / "run"))
    assert gloo(1, exit_code, replace(cfg, trainer=replace(cfg.trainer, async_save=True))) == [None]
    assert checkpoints(tmp_path / "run") == ["step_00000002"]
