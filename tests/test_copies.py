"""Copies on nodes that are not there: who reads what, what is looked at, and how files are told from others."""

import os
from pathlib import Path

import pytest
from blake3 import blake3

from minitron_megatron.checkpoints import copies, digests, stamps
from minitron_megatron.checkpoints import task_stamps as task_stamps_module
from minitron_megatron.checkpoints.copies import by_node, check_copies, ranks_by_node, share_of_node, verify_copies
from minitron_megatron.checkpoints.digests import (
    FileDigest,
    digest_files,
    number_of_segments,
    other_segments,
    segments_of,
)
from minitron_megatron.checkpoints.folder import MANIFEST, output_folder, read_manifest
from minitron_megatron.checkpoints.task_stamps import task_stamps
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives


@pytest.fixture
def job(monkeypatch):
    """`job(rank, hosts, said)`: be a rank of a job, each of whose ranks is on a host and says something."""

    def be(rank: int, hosts: str, said: list | None = None) -> None:
        nodes = [(host, "") for host in hosts]
        monkeypatch.setattr(collectives, "rank", lambda: rank)
        monkeypatch.setattr(copies, "node", lambda: nodes[rank])
        monkeypatch.setattr(collectives, "all_gather_objects", lambda mine: nodes if mine == nodes[rank] else said)

    return be


def test_ranks_of_a_node_share_out_all_that_it_reads(job):
    """Each node reads everything, whatever ranks it has; rank 0's is the first."""
    wanted = {0: [0, 2, 4, 6], 1: [0, 3, 6], 2: [1, 3, 5], 3: [1, 4], 4: [2, 5]}
    for rank, mine in wanted.items():
        job(rank, "ababb")
        assert list(ranks_by_node().items()) == [(("a", ""), [0, 2]), (("b", ""), [1, 3, 4])]
        assert share_of_node(range(7)) == mine


def test_what_the_ranks_of_a_node_have_found_is_put_together(job):
    job(1, "aba", [({"x": 1}, None), ({"x": 2, "y": 3}, None), ({"y": 4}, None)])
    assert by_node({}, None) == {"a (rank 0)": {"x": 1, "y": 4}, "b (rank 1)": {"x": 2, "y": 3}}


@pytest.mark.parametrize(("hosts", "says"), [("aba", "two (rank 2 on a)"), ("aaa", "one")])
def test_the_first_problem_is_said_with_its_node_where_there_are_several(job, hosts, says):
    job(0, hosts, [({}, None), ({}, "one"), ({}, "two")])
    with pytest.raises(UserError) as error:
        by_node({}, None)
    assert str(error.value) == says


@pytest.fixture
def made(tmp_path):
    with output_folder(tmp_path / "o", command="", config={}, inputs={}, resume=True) as out:
        for name, size in (("b", 5), ("large", 9), ("a", 5), ("none", 0)):
            (out.path / name).write_bytes(b"x" * size)
    return tmp_path / "o"


def test_every_file_is_read_the_largest_first(made):
    seen, digest = [], read_manifest(made)["digest"]
    verify_copies(made, digest, seen.append)
    assert seen == ["large", "a", "b", "none"]
    (made / "a").write_bytes(b"xxxxy")
    with pytest.raises(UserError, match=rf"^{made} is damaged: its files differ from the digest"):
        verify_copies(made, digest)


def test_what_cannot_be_read_is_said_as_it_is(made, monkeypatch):
    def other(name):
        raise UserError(f"{name} is odd")

    digest = read_manifest(made)["digest"]
    with pytest.raises(UserError, match=r"^large is odd$"):
        verify_copies(made, digest, other)

    def broken(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(copies, "sha256_of", broken)
    with pytest.raises(UserError, match=rf"^{made}: Input/output error \({made}/large\)$"):
        verify_copies(made, digest)


@pytest.mark.parametrize(("files", "pages"), [(0, 64), (1, 64), (32, 64), (33, 62), (2048, 1), (2049, 1)])
def test_of_many_files_fewer_pages_are_looked_at(monkeypatch, files, pages):
    """2,048 of all of them, 64 of one, and one of each; nothing where there is one process."""
    looked, compared = [], []
    monkeypatch.setattr(copies, "_look", lambda name, pages: looked.append((name, pages)) or f"seen {name}")
    monkeypatch.setattr(copies, "_some", lambda folder: [f"{folder}/x"] * bool(files))
    monkeypatch.setattr(copies, "check_same", lambda given, what: compared.append((given, what)))
    given = [Path(str(i)) for i in range(files - 1)]
    check_copies(Path("f"), files=given)
    assert not looked and not compared
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(copies, "ask_rank_zero", lambda look: look())
    check_copies(Path("f"), files=given)
    names = ["f/x", *map(str, given)] if files else []
    assert {number for _, number in looked} <= {pages} and len(looked) == files
    assert compared == [({name: f"seen {name}" for name in names}, "files")]


def test_of_thousands_of_files_some_are_looked_at_the_first_and_the_last_too(monkeypatch):
    names = [f"{i:03d}" for i in range(40)]
    monkeypatch.setattr(copies, "read_manifest", lambda folder: {"files": dict.fromkeys(reversed(names), 1)})
    monkeypatch.setattr(copies, "_MOST_FILES", 40)
    assert copies._some(Path("f")) == [f"f/{name}" for name in (MANIFEST, *names)]
    monkeypatch.setattr(copies, "_MOST_FILES", 39)
    some = copies._some(Path("f"))
    assert 40 <= len(some) <= 42 and some == copies._some(Path("f"))
    monkeypatch.setattr(copies, "_MOST_FILES", 3)
    some = copies._some(Path("f"))
    assert [some[0], some[1], some[-1]] == [f"f/{name}" for name in (MANIFEST, "000", "039")] and 4 <= len(some) <= 6


@pytest.mark.parametrize("size", [0, 64, 65])
def test_a_small_file_is_looked_at_as_a_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(copies, "_SMALL", 64)
    monkeypatch.setattr(copies, "_PAGE", 1)
    data = bytes(range(size))
    (tmp_path / "f").write_bytes(data)
    whole = f"{size} bytes, {blake3(data).hexdigest()[:16]}"
    assert (copies._look(str(tmp_path / "f"), 3) == whole) is (size <= 64)


# Digests


def test_a_file_has_segments_of_256_mib():
    mib = 2**20
    sizes = (0, 1, 256 * mib, 256 * mib + 1, 512 * mib, 600 * mib)
    assert [number_of_segments(size) for size in sizes] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("size", "segments", "taken"),
    [
        (0, [], True),
        (5, ["a"], True),
        (5, [], False),
        (5, ["a", "b"], False),
        (0, ["a"], False),
        (-1, [], False),
        (True, ["a"], False),
        (5.0, ["a"], False),
        (5, [1], False),
    ],
)
def test_a_digest_of_a_file_has_one_for_each_segment(size, segments, taken):
    values = {"size": size, "segments": segments}
    if taken:
        assert FileDigest.from_json(values) == FileDigest(size, tuple(segments))
        assert FileDigest.from_json(values).to_json() == values
    else:
        with pytest.raises(ValueError, match="no digest of a file"):
            FileDigest.from_json(values)


@pytest.mark.parametrize(("asked", "started"), [(0, 1), (1, 1), (3, 3), (8, 8), (9, 8), (100, 8)])
def test_threads_are_as_many_as_asked_for_up_to_eight(tmp_path, monkeypatch, asked, started):
    pools, pool = [], digests.ThreadPoolExecutor
    monkeypatch.setattr(digests, "ThreadPoolExecutor", lambda size: pools.append(size) or pool(size))
    monkeypatch.setattr(digests, "SEGMENT_BYTES", 4)
    for name, size in (("b", 5), ("a", 9)):
        (tmp_path / name).write_bytes(bytes(range(size)))
    found = digest_files(tmp_path, ["b", "a"], asked)
    assert segments_of(found) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert found["b"].segments == tuple(blake3(data).hexdigest() for data in (b"\0\1\2\3", b"\4"))
    (tmp_path / "a").write_bytes(b"\0\1\2\3\4\5\6\7x")
    assert other_segments(tmp_path, found, reversed(segments_of(found)), asked) == [("a", 2)]
    assert pools == [started, started]


# Stamps


def test_files_up_to_32_mib_are_told_by_their_contents():
    assert stamps.LARGEST_READ == 32 * 2**20


def test_files_are_named_as_they_lie_below_the_folder(tmp_path):
    for name in ("sub/a", "b", "elsewhere"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    root, other = tmp_path / "sub", tmp_path / "elsewhere"
    found = stamps.file_stamps(root, [other, root / "a", root / "none", root])
    assert list(found) == [f"file {other}", "file a"]
    several = [root / "a", other]
    for stamp, same_in_any_order in (
        (lambda files: stamps.stamp_of_folder("x", root, files)["file x"], True),
        (stamps.stamp_of_files, False),
    ):
        assert stamp(several).startswith("sha256:") and stamp(several) == stamp(list(several))
        assert (stamp(several) == stamp(several[::-1])) is same_in_any_order
        assert stamp(several) != stamp(several[:1])
    before = stamps.stamp_of_files(several)
    other.rename(tmp_path / "renamed")
    assert stamps.stamp_of_files([root / "a", tmp_path / "renamed"]) != before
    assert stamps.of_tokenizer("file tokenizer/a") and not stamps.of_tokenizer("file tokenizers/a")


@pytest.mark.parametrize("length", [1, 249, 250])
def test_files_that_a_task_names_are_inputs_where_their_names_can_be(tmp_path, length):
    """Beside the task, whatever else stands there; nothing where it cannot be read."""
    name, folder = "x" * length, tmp_path / "tasks"
    folder.mkdir()
    (folder / name).write_text("data")
    task = folder / "task.yaml"
    task.write_text(f'a: [{{data: "{name}"}}, "a\\0b", 3]\n')
    found = task_stamps([str(task), "arc_easy"])
    assert (f"file {folder / name}" in found) is (length < 250) and f"file {task}" in found
    task.write_bytes(b"a: [\xff")
    assert list(task_stamps([str(task)])) == [f"file {task}"]


def task_folder(root: Path) -> Path:
    """A group of a task that is made from a base in another folder: every way in which task files name others."""
    for name, text in {
        "group.yaml": "group: mine\ntask: [part.yaml, arc_easy]\n",
        "part.yaml": "include: [base/base]\ntask: part\nprocess_docs: !function utils.f\n",
        "utils.py": "import helper\n",
        "helper.py": "",
        "base/base": "include: ../ring.yaml\ndataset_path: ../set\n"
        "dataset_kwargs: {data_files: {test: 'parts/*.jsonl', train: one}}\n",
        "ring.yaml": "include: base/base\nother: &a [*a]\nfewshot_config: {samples: !function base.fewshot.f}\n",
        "base/fewshot.py": "",
        "base/parts/1.jsonl": "",
        "base/parts/2.jsonl": "",
        "base/one": "",
        "set/a/data.jsonl": "",
        "set/README": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "group.yaml"


def test_every_file_that_a_task_reads_is_an_input(tmp_path):
    """Whichever is another one, the task is another; what is not read may change."""
    task = task_folder(tmp_path / "tasks")
    files = [path for path in task.parent.rglob("*") if path.is_file()]
    before = task_stamps([str(task)])
    for file in (task.parent / name for name in ("base/parts/notes.txt", "base/unread", "README")):
        file.write_text("not read")
    assert len(files) == 12 and task_stamps([str(task)]) == before and task_stamps(["arc_easy"]) == {}
    for file in files:
        text = file.read_text()
        file.write_text(f"{text}# another\n")
        assert task_stamps([str(task)]) != before, file
        file.write_text(text)
    for name in ("set/a/new.jsonl", "base/parts/3.jsonl"):
        (task.parent / name).write_text("")
        assert task_stamps([str(task)]) != before, name
        (task.parent / name).unlink()
    assert task_stamps([str(task)]) == before


def test_a_task_that_names_a_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(task_stamps_module, "_MOST_FILES", 3)
    task = tmp_path / "task.yaml"
    (tmp_path / "set").mkdir()
    task.write_text("dataset_path: set\n")
    for i in range(3):
        (tmp_path / "set" / str(i)).write_text("")
    assert len(task_stamps([str(task)])) == 2
    (tmp_path / "set" / "3").write_text("")
    with pytest.raises(UserError, match=r"set names more than 3 files: name those that the task reads"):
        task_stamps([str(task)])


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({"file a": "1", "model": "x"}, {"file a": "2", "model": "y"}, "from other inputs: a, model changed since"),
        ({}, {f"file {n}": "1" for n in "cab"}, "from other files: a, b, c changed since"),
        ({}, {f"file {n}": "1" for n in "dcab"}, "from other files: a, b, c … changed since"),
    ],
)
def test_what_an_output_was_made_from_is_told_in_words(before, now, says):
    assert stamps.say_others(before, now) == stamps.say_others(now, before) == says


def test_only_files_have_times_of_their_own_on_each_node():
    given = {"file a": "5 bytes of 1", "file b": "sha256:1", "model": "5 bytes of 1"}
    assert stamps.for_all_nodes(given) == {**given, "file a": "5"}


def test_a_look_leaves_no_file_open(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        copies._look(str(tmp_path / "f"), 1)
    assert len(os.listdir("/proc/self/fd")) == before
