"""Archives from elsewhere: what is judged of a member's name, kind and place, and both sides of every bound."""

import io
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints import archive
from minitron_megatron.checkpoints.archive import Archive
from minitron_megatron.errors import UserError

BLOCK = 4096


def written(path: Path, *members: tuple[str, bytes | None], form: int = tarfile.GNU_FORMAT) -> Path:
    """An archive of files by name, and of folders, which have no bytes."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def refused(path: Path) -> str:
    """What an archive is refused with; nothing where it is taken."""
    try:
        Archive(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)
    return ""


def test_files_lie_where_the_archive_says(tmp_path):
    """Those that are wanted, in folders of any depth; a file takes room however small it is."""
    path = written(
        tmp_path / "x.tar", ("./deep", None), ("deep/er/a", b"1"), ("./deep/er/b", b"22"), ("none", b""), ("c", b"333")
    )
    opened, out, seen = Archive(path), tmp_path / "out", []
    out.mkdir()
    assert opened.sizes == {"deep/er/a": 1, "deep/er/b": 2, "none": 0, "c": 3}
    assert opened.need() == 6 + 4 * BLOCK and opened.need(lambda name: name[0] == "d") == 3 + 2 * BLOCK
    opened.extract(out, lambda name: name != "c", seen.append)
    there = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert there == {"deep/er/a": b"1", "deep/er/b": b"22", "none": b""} and seen == [1, 2]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a", None), ("a", None), ("a/b", b"1")], ""),
        ([("a", b"1"), ("a", b"1")], "'a' is in it twice"),
        ([("a", b"1"), ("./a", b"1")], "'a' is in it twice"),
        ([("a", b"1"), ("a", None)], "'a' is a file and a folder"),
        ([("a", None), ("a", b"1")], "'a' is a file and a folder"),
        ([("a/b", b"1"), ("a", b"1")], "'a' is a file and a folder"),
        ([("a", b"1"), ("a/b", b"1")], "'a/b' is a file and a folder"),
        ([("a", b"1"), ("a/b/c", b"1")], "'a/b/c' is a file and a folder"),
    ],
)
def test_a_name_is_one_file_or_one_folder(tmp_path, members, says):
    found = refused(written(tmp_path / "x.tar", *members))
    assert (says in found) if says else found == ""


def of_nothing() -> Archive:
    made = object.__new__(Archive)
    made.path = Path("x.tar")
    return made


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("./a", "a"),
        ("a/./b", "a/b"),
        ("a..b", "a..b"),
        ("/a", None),
        ("..", None),
        ("../a", None),
        ("a/../b", None),
        ("a\0b", None),
    ],
)
def test_names_lie_below_the_folder(name, found):
    if found:
        assert of_nothing()._name(tarfile.TarInfo(name)) == found
    else:
        with pytest.raises(UserError, match="leads out of the folder"):
            of_nothing()._name(tarfile.TarInfo(name))


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"type": tarfile.SYMTYPE}, "is a symbolic link"),
        ({"type": tarfile.LNKTYPE}, "is a hard link"),
        *(({"type": kind}, "is a device") for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
        ({"type": b"Z"}, "is of another kind"),
        ({"sparse": [(0, 1)]}, "is of another kind"),
        ({"size": -1}, "is of another kind"),
    ],
)
def test_members_are_plain_files_and_folders(about, says):
    info = tarfile.TarInfo("a")
    for key, value in about.items():
        setattr(info, key, value)
    with pytest.raises(UserError, match=f"'a' {says}, no plain file or folder"):
        of_nothing()._name(info)
    for kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        info = tarfile.TarInfo("a")
        info.type = kind
        assert of_nothing()._name(info) == "a"


@pytest.mark.parametrize(("form", "size"), [(tarfile.GNU_FORMAT, 151), (tarfile.PAX_FORMAT, 160)])
def test_headers_before_others_have_a_largest_size_and_files_have_none(tmp_path, monkeypatch, form, size):
    """A name of 150 letters stands in a header of its own."""
    path = written(tmp_path / "x.tar", ("n" * 150, b"x" * 999), form=form)
    monkeypatch.setattr(archive, "_LONGEST_HEADER", size)
    assert refused(path) == ""
    monkeypatch.setattr(archive, "_LONGEST_HEADER", size - 1)
    assert f"is damaged or no tar archive (a header of {size} bytes)" in refused(path)


def test_a_header_says_no_size_below_zero():
    info = tarfile.TarInfo("a")
    for size in (0, 1, -1):
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        if size >= 0:
            assert archive._Header.frombuf(header, "utf-8", "strict").size == size
        else:
            with pytest.raises(ValueError, match="a header of -1 bytes"):
                archive._Header.frombuf(header, "utf-8", "strict")


@pytest.mark.parametrize("room", [0, -1])
def test_members_may_take_all_that_the_disk_has(tmp_path, monkeypatch, room):
    """When they are judged, and when they are unpacked: then before the first is written."""
    path, out = written(tmp_path / "x.tar", ("a", b"x" * 10), ("b", None)), tmp_path / "out"
    out.mkdir()
    free = [10 + 2 * BLOCK + room]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    if room:
        assert "with b its files are larger than what the disk has left" in refused(path)
    free[0] = 2**40
    opened = Archive(written(tmp_path / "y.tar", ("a", b"x" * 10)))
    free[0] = 10 + BLOCK + room
    if room:
        with pytest.raises(UserError, match=r"no space left for what \S+y\.tar holds"):
            opened.extract(out, lambda _: True)
    else:
        opened.extract(out, lambda _: True)
    assert [file.name for file in out.iterdir()] == ["a"] * (room == 0)


def test_names_have_an_end(tmp_path, monkeypatch):
    """The folder itself is one of them."""
    monkeypatch.setattr(archive, "_MOST_MEMBERS", 4)
    members = [(name, b"") for name in "abcd"]
    assert refused(written(tmp_path / "x.tar", *members[:3])) == ""
    assert "'d' is one of more than 4 files and folders" in refused(written(tmp_path / "y.tar", *members))


def test_headers_are_not_kept(tmp_path):
    path = written(tmp_path / "x.tar", *((name, b"x") for name in "abc"))
    assert [len(tar.members) for _, _, tar in Archive(path)._members()] == [0, 0, 0]


def test_a_file_that_is_shorter_than_its_header_says_is_damage(tmp_path):
    opened, member = of_nothing(), tarfile.TarInfo("a")
    for size in (2, 3):
        (tmp_path / str(size)).mkdir()
        opened.sizes, member.size = {"a": size}, size
        opened._members = lambda: iter([("a", member, SimpleNamespace(extractfile=lambda _: io.BytesIO(b"12")))])
        if size == 2:
            opened.extract(tmp_path / "2", lambda _: True)
        else:
            with pytest.raises(UserError, match=r"x\.tar is damaged \(a ends too soon\)"):
                opened.extract(tmp_path / "3", lambda _: True)


def test_memory_that_is_wanting_is_no_damage(tmp_path, monkeypatch):
    def wanting(*_, **__):
        raise MemoryError

    path = written(tmp_path / "x.tar", ("a", b""))
    monkeypatch.setattr(tarfile, "open", wanting)
    with pytest.raises(MemoryError):
        Archive(path)
