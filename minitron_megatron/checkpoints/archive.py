"""Tar archives from elsewhere: only plain files and folders, only below the target, and never more than the disk has room for.

A .nemo archive is a tar file, plain or gzipped. Python's tarfile reads its headers; every one of them is judged before anything
is written, and files are written by their bytes alone: no links, devices, owners, modes or times of the archive's.
"""

import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import check_space
from minitron_megatron.checkpoints.index import short
from minitron_megatron.errors import UserError

_COPY_BYTES = 4 * 2**20
# Room that a file takes however small it is, so that millions of empty ones count.
_BLOCK = 4096
# Names are held in memory; a checkpoint's archive has some thousands.
_MOST_MEMBERS = 10**6
# A header that goes before another (long names, pax records) is held in memory: real ones are of some hundred bytes.
_LONGEST_HEADER = 2**20
_HEADERS_BEFORE = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Header(tarfile.TarInfo):
    """A header of sane size, before tarfile reads on by it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _HEADERS_BEFORE and header.size > _LONGEST_HEADER):
            raise ValueError(f"a header of {header.size} bytes")
        return header


class Archive:
    """A tar archive whose headers have all been judged. Raises UserError where one of them is hostile, or the file damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        for name, member, _ in self._members():
            if member.isreg():
                self.sizes[name] = member.size

    def need(self, wanted: Callable[[str], bool] = lambda _: True) -> int:
        """Bytes that its files take on disk, those whose names are wanted."""
        return sum(size + _BLOCK for name, size in self.sizes.items() if wanted(name))

    def extract(
        self, target: Path, wanted: Callable[[str], bool], advance: Callable[[int], None] = lambda _: None
    ) -> None:
        """Write the files whose names are wanted below `target`, a folder that is there.

        Raises:
            UserError: the disk has no room for them, or the archive is damaged.
        """
        check_space(target, self.need(wanted), f"what {self.path} holds")
        for name, member, tar in self._members():
            if not member.isreg() or not wanted(name):
                continue
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            data = tar.extractfile(member)
            with open(file, "xb") as out:
                while block := data.read(_COPY_BYTES):
                    out.write(block)
                    advance(len(block))
            if file.stat().st_size != member.size:
                raise UserError(f"{self.path} is damaged ({name} ends too soon): download it again")

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        """Each member with its name without "./", in the archive's order."""
        seen: dict[str, bool] = {}
        room = shutil.disk_usage(self.path.absolute().parent).free
        try:
            with tarfile.open(self.path, "r:*", tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    # It keeps every header; an archive may have very many.
                    tar.members.clear()
                    name = self._name(member)
                    folders = [str(folder) for folder in PurePosixPath(name).parents]
                    if seen.get(name, member.isdir()) != member.isdir() or any(seen.get(f) is False for f in folders):
                        raise self._hostile(name, "is a file and a folder")
                    if member.isreg() and name in seen:
                        raise self._hostile(name, "is in it twice")
                    if len(seen) >= _MOST_MEMBERS:
                        raise self._hostile(name, f"is one of more than {_MOST_MEMBERS:,} files and folders")
                    seen[name] = member.isdir()
                    seen.update(dict.fromkeys(folders, True))
                    room -= member.size + _BLOCK
                    if room < 0:
                        raise UserError(
                            f"{self.path}: with {name} its files are larger than what the disk has left: refused; free some "
                            "room if the archive is what you take it for"
                        )
                    yield name, member, tar
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # arbitrary bytes can fail in any way in tarfile and the decompressors
            pass_on_unless_damage(error)
            raise UserError(f"{self.path} is damaged or no tar archive ({short(error)}): download it again") from None

    def _name(self, member: tarfile.TarInfo) -> str:
        """Its path below the target. Raises UserError for anything else than a plain file or folder below it."""
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\0" in member.name:
            raise self._hostile(member.name, "leads out of the folder that it is unpacked in")
        if not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
            raise self._hostile(member.name, f"is {_kind(member)}, no plain file or folder")
        return str(path)

    def _hostile(self, name: str, what: str) -> UserError:
        return UserError(f"{self.path}: {name!r} {what}: refused; take the archive from who made it")


def _kind(member: tarfile.TarInfo) -> str:
    kinds = {"a symbolic link": member.issym(), "a hard link": member.islnk(), "a device": member.isdev()}
    return next((kind for kind, it_is in kinds.items() if it_is), "of another kind")
