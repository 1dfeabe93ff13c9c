"""Output folders from their first look to their manifest: what is taken, refused and said, in which order, and what stays."""

import contextlib
import errno
import fcntl
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minitron_megatron.checkpoints import folder as folders
from minitron_megatron.checkpoints import locks, places
from minitron_megatron.checkpoints.digests import digest_of_files
from minitron_megatron.checkpoints.folder import (
    Output,
    check_output,
    check_place,
    load_json,
    load_yaml,
    open_model_folder,
    output_folder,
    read_manifest,
    read_output,
)
from minitron_megatron.checkpoints.unfinished import has_work, partial_folder
from minitron_megatron.errors import UserError
from minitron_megatron.starts import STARTS


def asked(config: dict | None = None, inputs: dict | None = None, resume: bool = True, **more) -> dict:
    return {"config": config or {"a": 1}, "inputs": inputs or {}, "resume": resume, **more}


def write(path: Path, **how) -> Path:
    with output_folder(path, command="the command", **asked(**how)) as out:
        if not out.done:
            (out.path / "file").write_text("x")
    return path


# What is there


@pytest.mark.parametrize(
    ("name", "makes", "says"),
    [
        ("none", None, "does not exist: give the output folder of the command that makes it$"),
        ("none.txt", None, "does not exist: give the output folder of the command that makes it$"),
        ("a.bin", "file", "is a file: give the output folder of the command that makes it$"),
        ("a.jsonl", "file", r"is a file: .* makes it; prepare_data input=… makes a data folder of text$"),
        ("folder", "folder", r"has no manifest\.yaml: it is half-written or not one of our folders; make it again$"),
        ("folder.txt", "folder", r"has no manifest\.yaml: it is half-written"),
        ("hf", "hf", r"has no manifest\.yaml; it is a Hugging Face folder: import_hf hf=… makes a model folder of it$"),
    ],
)
def test_what_is_no_folder_of_ours_is_said_with_what_to_do(tmp_path, name, makes, says):
    path = tmp_path / name
    if makes == "file":
        path.touch()
    elif makes:
        path.mkdir()
    if makes == "hf":
        (path / "config.json").touch()
    for read in (read_manifest, open_model_folder):
        with pytest.raises(UserError, match=rf"^{path} {says}"):
            read(path)


def test_a_manifest_names_files_below_its_folder():
    names = {"a": True, "a/b": True, "a..b": True, "/a": False, "../a": False, "a/../b": False, 3: False}
    assert {name: folders._is_name(name) for name in names} == names


def test_files_that_are_gone_or_of_another_size_are_said(tmp_path):
    path = write(tmp_path / "o")
    (path / "file").write_text("xy")
    with pytest.raises(UserError, match=rf"^{path}/file has 2 bytes instead of 1: the folder is damaged"):
        read_manifest(path)
    (path / "file").unlink()
    with pytest.raises(UserError, match=rf"^{path}/file is missing: the folder is damaged"):
        read_manifest(path)


@pytest.mark.parametrize("lacks", ["model.yaml", "weights/.metadata", None])
def test_a_model_folder_has_a_shape_and_an_index(tmp_path, lacks):
    with output_folder(tmp_path / "o", command="prune x=1", **asked()) as out:
        (out.path / "weights").mkdir()
        for name in {"model.yaml", "weights/.metadata"} - {lacks}:
            (out.path / name).write_text("family: none")
    says = r"is not a model folder \(it was made by prune x=1\)" if lacks else r"missing .* in the model's shape"
    with pytest.raises(UserError, match=says):
        open_model_folder(tmp_path / "o")


def test_the_model_of_a_run_is_meant_where_the_run_itself_is_none(tmp_path):
    for path in (tmp_path / "run" / "model", tmp_path / "both", tmp_path / "moved"):
        write(path)
    (tmp_path / "moved").rename(tmp_path / "both" / "model")
    with pytest.raises(UserError, match=rf"^{tmp_path}/run/model is not a model folder"):
        open_model_folder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"^{tmp_path}/both is not a model folder"):
        open_model_folder(tmp_path / "both")


def test_a_file_that_is_no_mapping_is_said(tmp_path):
    file = tmp_path / "f"
    file.write_text("[1]")
    for load, what in ((load_yaml, "a mapping of keys to values"), (load_json, "a JSON object: make it again")):
        with pytest.raises(UserError, match=rf"^{file} is not {what}$"):
            load(file, *([": make it again"] if load is load_json else []))
    with pytest.raises(UserError, match=r"has no other \(it was made by the command\): give the output of x$"):
        read_output(write(tmp_path / "o"), "other", "x")


# What is in the way


def test_an_empty_folder_is_used_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        check_output(path, **asked())
        assert sorted(one.name for one in write(path).iterdir()) == ["file", "manifest.yaml"]


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({"m": "1", "d": "2"}, {"m": "1", "d": "2"}, None),
        ({"m": "1", "d": "2"}, {"m": "1"}, None),
        ({"m": "1", "d": "2"}, {"m": "1", "d": "3"}, r"was made from other inputs: d changed since; choose another"),
        ({"m": "1", "d": "2", "file a": "3"}, {"m": "2"}, "from other inputs: a, m changed since; choose another"),
        ({"m": "1"}, {"m": "1", "file a": "3"}, "from other files: a changed since; choose another"),
    ],
)
def test_what_is_known_of_the_inputs_is_compared_before_the_work_begins(tmp_path, before, now, says):
    """An input that is not known yet says nothing; a file that is gone does."""
    path = write(tmp_path / "o", inputs=before)
    if says is None:
        check_output(path, **asked(inputs=now))
        return
    with pytest.raises(UserError, match=says):
        check_output(path, **asked(inputs=now))
    # The first option that is another one is what is said.
    for ask in (check_output, lambda path, **how: write(path, **how)):
        with pytest.raises(UserError, match=r"was made with other options or inputs \(a=1, not 2\): remove it or"):
            ask(path, **asked({"a": 2}, now))
        with pytest.raises(UserError, match=r"was made with other options or inputs: remove it or"):
            ask(path, **asked({"b": 1}, before))


def test_an_output_that_is_to_be_made_anew_is_looked_at_no_further(tmp_path):
    path = write(tmp_path / "o")
    check_output(path, **asked({"a": 2}, anew=True))
    with pytest.raises(UserError, match="resume=false"):
        check_output(path, **asked(resume=False))
    (path / "manifest.yaml").unlink()
    with pytest.raises(UserError, match="is not one of our folders"):
        check_output(path, **asked(anew=True))


@pytest.mark.parametrize("damage", [False, True])
def test_what_is_unfinished_is_refused_before_the_work_begins(tmp_path, damage):
    with (
        contextlib.suppress(SystemExit),
        output_folder(tmp_path / "o", command="", **asked(inputs={"d": "1", "e": "1"}), continues=True) as out,
    ):
        (out.path / "hours").touch()
        out.keep = True
        raise SystemExit
    partial = partial_folder(tmp_path / "o")
    if damage:
        (partial / ".made-of").write_text("[" * 9)
        with pytest.raises(UserError, match="was begun with other options"):
            check_output(tmp_path / "o", **asked())
    else:
        check_output(tmp_path / "o", **asked(inputs={"d": "1"}))
        with pytest.raises(UserError, match="was begun with a=1, not 2"):
            check_output(tmp_path / "o", **asked({"a": 2}))
        with pytest.raises(UserError, match="was begun from other inputs: d changed since"):
            check_output(tmp_path / "o", **asked(inputs={"d": "2"}))
    assert (partial / "hours").is_file()


@pytest.mark.parametrize(
    ("names", "work"),
    [([], False), ([".made-of", STARTS], False), ([".x"], False), ([".x", "a"], True), (["a", ".computed-in"], True)],
)
def test_what_a_command_can_go_on_from_is_no_mark(tmp_path, names, work):
    for name in names:
        (tmp_path / name).touch()
    assert has_work(tmp_path) is work and partial_folder(Path("a/b")) == Path("a/.b.partial")


def test_what_is_no_work_is_swept_with_its_folders(tmp_path):
    partial = partial_folder(tmp_path / "o")
    (partial / "deep" / "er").mkdir(parents=True)
    (partial / "deep" / "er" / "x").touch()
    assert sorted(one.name for one in write(tmp_path / "o").iterdir()) == ["file", "manifest.yaml"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    long = tmp_path / ("n" * 300)
    for path, says in ((long, r"\(File name too long\)"), (tmp_path / "file" / "o", f"{tmp_path}/file is a file")):
        with pytest.raises(UserError, match=f"cannot be made:? ?{says}"):
            check_place(path)
    made, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **how: made.append(how["dir"]) or make(**how))
    assert check_place(tmp_path / "a" / "b") == tmp_path and not made
    assert check_place(tmp_path / "a" / "b", try_it=True) == tmp_path and made == [tmp_path]
    assert check_place(tmp_path, try_it=True) == tmp_path and made == [tmp_path]
    assert [one.name for one in tmp_path.iterdir()] == ["file"]

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(UserError, match=rf"cannot be made in {tmp_path} \(Read-only file system\)"):
        check_place(tmp_path / "a", try_it=True)
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(UserError, match=rf"{tmp_path} is not writable"):
        check_place(tmp_path / "a")


PLACES = ["new", "empty", "link", "dangling", "far"]
NO_PLACES = {
    "mount": "is a mount point, which a finished folder cannot replace: give a folder in it, as output=.*/my disk/new$",
    "a link to it": "is a mount point",
    ".": "is the working directory, which a finished folder cannot replace: give a folder in it, as output=.*/here/new$",
    "loop": "is a link to itself: choose another output=$",
    "file": "is a file; choose another output=$",
}


def place(tmp_path: Path, kind: str, monkeypatch) -> Path:
    """A path of some kind, as it is typed in tmp_path/here."""
    here, there, mounted = tmp_path / "here", tmp_path / "there", tmp_path / "my disk"
    for folder in (here, there, mounted):
        folder.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "mounts").write_text(
        f"36 35 98:0 / {str(mounted).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw\n"
    )
    monkeypatch.setattr(places, "MOUNTS", tmp_path / "mounts")
    match kind:
        case "empty":
            (here / "o").mkdir()
        case "link":
            (here / "o").symlink_to(there)
        case "dangling":
            (here / "o").symlink_to("../later")
        case "far":
            (here / "o").symlink_to(there / "a" / "b")
        case "mount":
            return mounted
        case "a link to it":
            (here / "o").symlink_to(mounted)
        case ".":
            return Path(".")
        case "loop":
            (here / "o").symlink_to("o")
        case "file":
            (here / "f").touch()
            (here / "o").symlink_to("f")
    return Path("o")


@pytest.mark.parametrize("kind", PLACES)
def test_an_output_is_made_in_any_place_that_can_take_it(tmp_path, monkeypatch, kind):
    """Through links, which stay; and a second start finds it, by the folder's own name too."""
    path = place(tmp_path, kind, monkeypatch)
    check_output(path, **asked())
    with output_folder(path, command="", **asked()) as out:
        assert partial_folder(path) == out.path and not partial_folder(path).is_symlink()
        (out.path / "file").write_text("x")
    assert sorted(one.name for one in path.iterdir()) == ["file", "manifest.yaml"]
    assert path.is_symlink() == (kind in ("link", "dangling", "far"))
    assert not [one for one in tmp_path.rglob(".*") if one.name.endswith(".partial")]
    for again in (path, path.resolve()):
        with output_folder(again, command="", **asked()) as out:
            assert out.done and (out.path / "file").is_file()


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("kind", NO_PLACES)
def test_a_place_that_a_finished_folder_cannot_take_is_refused_before_the_work(tmp_path, monkeypatch, kind, anew):
    path = place(tmp_path, kind, monkeypatch)
    if anew and kind in ("mount", "."):
        (path / "manifest.yaml").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=NO_PLACES[kind]):
        check_output(path, **asked(anew=anew))
    with pytest.raises(UserError, match=NO_PLACES[kind]), output_folder(path, command="", **asked(anew=anew)):
        raise AssertionError("it began")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_renamed_over_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda where, how: Path(where) != tmp_path)
    (tmp_path / "o").mkdir()
    with pytest.raises(UserError, match=rf"/o cannot be made: {tmp_path}, where it gets its name, is not writable"):
        check_output(tmp_path / "o", **asked())


# What is written


def test_an_output_is_made_in_this_order(tmp_path, monkeypatch, caplog):
    """Ranks see the folder before they write, meet before it is finished, and see it whole before they go on."""
    said, path, kept = [], tmp_path / "o", []
    finish = folders._finish

    @contextlib.contextmanager
    def keeping(what):
        kept.append(what)
        yield

    monkeypatch.setattr(folders, "check_same", lambda given, what: said.append((given, what)))
    monkeypatch.setattr(folders, "wait_until_seen", lambda *paths: said.append(tuple(one.name for one in paths)))
    monkeypatch.setattr(folders.collectives, "barrier", lambda: said.append("meet"))
    monkeypatch.setattr(folders, "_finish", lambda *given: said.append("finish") or finish(*given))
    monkeypatch.setattr(folders, "keeping", keeping)
    with output_folder(path, command="", **asked(inputs={"file x": "5 bytes of 1"}), continues=True) as out:
        assert (out.path / STARTS).is_file() and kept[0]() == folders.NOTHING_KEPT
        out.keep = True
        assert kept[0]() == folders.SOME_KEPT
        out.results = {"found": 1}
        said.append("work")
    compared = ({"a": 1, "file x": "5"}, "options or inputs")
    assert said == [compared, (".o.partial",), "work", "meet", "finish", ("manifest.yaml",)]
    assert out.path == path and [one.name for one in path.iterdir()] == ["manifest.yaml"]
    caplog.set_level("INFO")
    with output_folder(path, command="", **asked(inputs={"file x": "5 bytes of 1"})) as again:
        assert again.done and again.results == {"found": 1}
    assert caplog.messages == [f"{path} is complete already: nothing to do"]


@pytest.mark.parametrize("everything", [False, True])
def test_a_manifest_is_this(tmp_path, everything):
    """In its order, as text that people read; what there is nothing of is left out."""
    path, more = tmp_path / "o", {"reasons": {"a": "since é"}} if everything else {}
    with output_folder(path, command="make é", **asked(inputs={"m": "1"}, **more)) as out:
        (out.path / "sub").mkdir()
        (out.path / "sub" / "b").write_text("bb")
        (out.path / "a").write_text("a")
        if everything:
            out.digest, out.precision, out.started_from = "blake3:x", {"computed_in": "float32"}, {"takes": "weights"}
    manifest = yaml.safe_load(text := (path / "manifest.yaml").read_text())
    wanted = [
        "command", "made", "digest", "fingerprint", "seconds", "seconds_starting", "processes", "device", "precision", "inputs",
        "started_from", "results", "versions", "automatic", "started_in", "config", "files",
    ]  # fmt: skip
    assert list(manifest) == [
        name for name in wanted if everything or name not in ("precision", "started_from", "automatic")
    ]
    assert "command: make é\n" in text and manifest["files"] == {"a": 1, "sub/b": 2}
    assert manifest["digest"] == ("blake3:x" if everything else digest_of_files(path, ["a", "sub/b"]))
    assert manifest["started_in"] == os.getcwd() and manifest["config"] == {"a": 1} and manifest["inputs"] == {"m": "1"}
    assert 0 <= manifest["seconds"] < 60 and manifest["processes"] == 1 and manifest["device"] == "cpu"


@pytest.mark.parametrize("keeps", [False, True])
def test_what_can_be_continued_stays_where_it_ends_while_it_is_finished(tmp_path, monkeypatch, keeps):
    """All of its files are read then, which takes long: hours of work are not given up for that."""
    path, finish = tmp_path / "o", folders.digest_of_files

    def make() -> bool:
        with output_folder(path, command="", **asked(), continues=True) as out:
            found = (out.path / "hours").is_file()
            (out.path / "hours").touch()
            out.keep = keeps
        return found

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "digest_of_files", stopped)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert (partial_folder(path) / "hours").is_file() is keeps and not path.exists()
    monkeypatch.setattr(folders, "digest_of_files", finish)
    if keeps:
        (partial_folder(path) / "manifest.yaml").write_text("of a run that was killed later")
    assert make() is keeps and sorted(one.name for one in path.iterdir()) == ["hours", "manifest.yaml"]
    assert set(read_manifest(path)["files"]) == {"hours"}


def test_what_an_output_took_is_counted_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "time", SimpleNamespace(monotonic=lambda: 101.23456))
    monkeypatch.setattr(folders, "seconds_starting", lambda otherwise: otherwise)
    output = Output(tmp_path, began=100.0, process_seconds=7.0)
    assert folders._cost(output) == {"seconds": 1.23, "seconds_starting": 7.0, "processes": 1, "device": "cpu"}
    assert (output.done, output.keep, output.results, output.digest) == (False, False, {}, None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told_and_nothing_else_is_called_so(tmp_path, number):
    with (
        pytest.raises(UserError if number != errno.EIO else OSError, match=r"no space left while|odd") as raised,
        output_folder(tmp_path / "o", command="", **asked()),
    ):
        raise OSError(number, "odd")
    assert isinstance(raised.value, UserError) is (number != errno.EIO) and not list(tmp_path.iterdir())


# Locks


def test_a_lock_is_of_its_holder_and_leaves_nothing_open(tmp_path, monkeypatch):
    """Who could not take it, and who gave it back, holds nothing that a fork would let go of."""
    held_before, open_before = set(locks._HELD), len(os.listdir("/proc/self/fd"))
    first = locks.lock(tmp_path)
    assert held_before | {first} == locks._HELD and locks.lock(tmp_path) is None and locks.is_locked(tmp_path)
    assert held_before | {first} == locks._HELD and len(os.listdir("/proc/self/fd")) == open_before + 1
    locks.unlock(first)
    assert not locks.is_locked(tmp_path) and held_before == locks._HELD
    assert len(os.listdir("/proc/self/fd")) == open_before

    def broken(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", broken)
    for ask in (locks.lock, locks.is_locked):
        with pytest.raises(OSError, match="No locks available"):
            ask(tmp_path)
    assert held_before == locks._HELD and len(os.listdir("/proc/self/fd")) == open_before


def test_those_who_only_ask_do_not_see_one_another(tmp_path):
    asks = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(asks, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not locks.is_locked(tmp_path) and locks.lock(tmp_path) is None
    os.close(asks)
    held = locks.lock(tmp_path)
    assert held is not None
    locks.unlock(held)


def test_a_forked_process_lets_go_of_the_lock(tmp_path):
    held = locks.lock(tmp_path)
    pid = os.fork()
    if not pid:
        # Its copy of the descriptor is closed; the lock is still taken.
        with contextlib.suppress(OSError):
            os.fstat(held)
            os._exit(1)
        os._exit(0 if not locks._HELD and locks.is_locked(tmp_path) else 2)
    assert os.waitpid(pid, 0)[1] == 0 and locks.is_locked(tmp_path)
    locks.unlock(held)
