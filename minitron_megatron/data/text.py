"""Documents out of text files: .txt, .md and .rst are one document each; .jsonl, .ndjson and .parquet have one a row.

All but .parquet may be compressed as well (.gz, .bz2, .xz, .zst), and a suffix may be in capitals. Files are streamed in sorted
order; every complaint names the file and the line or row.
"""

import bz2
import glob
import gzip
import io
import logging
import lzma
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from minitron_megatron.checkpoints.folder import is_output
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.plain_files import parse_json
from minitron_megatron.starts import read_starts

log = logging.getLogger(__name__)

PLAIN, LINES, ROWS, PACKED = (
    (".txt", ".md", ".rst"),
    (".jsonl", ".ndjson"),
    (".parquet",),
    (".gz", ".bz2", ".xz", ".zst"),
)
KNOWN = PLAIN + LINES + ROWS
_READ = f"{', '.join(KNOWN)}, all but the last also with {', '.join(PACKED)}"
# Rows of a Parquet file that are in memory at once.
_ROWS_AT_ONCE = 256


# Letters that make a name a pattern, where no file has that very name.
_PATTERN = frozenset("*?[")


def find_files(inputs: str | Sequence[str]) -> list[Path]:
    """The text files named, found below folders, or matched by patterns, the last two in sorted order. Raises UserError."""
    names = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"input={inputs} must be a path or a list of paths")
    files: list[Path] = []
    for path in (path for name in names for path in _matched(name)):
        if path.is_dir():
            files += _text_files(path)
        elif not path.is_file():
            raise UserError(f"input={path} does not exist: give a text file or a folder of them")
        elif _kind(path.name) is None:
            raise UserError(f"input={path} does not end in one of {_READ}")
        else:
            files.append(path)
    by_place: dict[str, Path] = {}
    for file in files:
        place = os.path.realpath(file)
        if place in by_place:
            other = "" if by_place[place] == file else f" (as {by_place[place]} too)"
            raise UserError(f"input={inputs} names {file} twice{other}: its text would count twice")
        by_place[place] = file
    return files


def _kind(name: str) -> str | None:
    """Which of KNOWN a file is by its name, without its compression; None where it is no text file."""
    name = name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    name = name.removesuffix(packed)
    return next((kind for kind in KNOWN if name.endswith(kind) and not (packed and kind in ROWS)), None)


def has_rows(file: Path) -> bool:
    """Whether a text file has its documents in rows, by its name."""
    return _kind(file.name) in (*LINES, *ROWS)


def _text_files(folder: Path) -> list[Path]:
    """Text files below a folder, sorted; what else is there is counted in one line. Raises UserError where there are none."""
    found, others, hidden, outputs = [], Counter[str](), 0, list[Path]()
    for file in sorted(_below(folder, outputs)):
        if file.name.startswith("."):
            hidden += 1
        elif _kind(file.name) is None:
            others["".join(file.suffixes[-2:]) or file.name] += 1
        elif not file.is_file():
            raise UserError(f"input={folder}: {file} does not exist, or is no file: remove it, or mend the link")
        else:
            found.append(file)
    kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(5)) + ", …" * (len(others) > 5)
    left = [f"{others.total()} of other kinds ({kinds})"] * bool(others) + [f"{hidden} hidden"] * bool(hidden)
    left += [_told(outputs)] * bool(outputs)
    if not found:
        there = f" but {' and '.join(left)}" if left else ""
        raise UserError(f"input={folder} has no file that ends in {_READ}{there}")
    if left:
        log.warning("input=%s: %d files taken, left out: %s", folder, len(found), ", ".join(left))
    return found


def _below(folder: Path, outputs: list[Path]) -> Iterator[Path]:
    """Every file below a folder, through links too, and every hidden folder itself. Raises UserError for what cannot be read.

    Outputs of this software are not looked into, and added to `outputs`: their pages and logs are no text to train on, and were
    not there when a command began that is started again.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"input={folder}: {error.filename} cannot be read ({error.strerror})")

    # Where each folder really is, and those above it, by the way to it.
    way = {str(folder): frozenset((os.path.realpath(folder),))}
    for where, inside, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = way.pop(where)
        if where != str(folder) and _is_of_ours(Path(where)):
            inside.clear()
            outputs.append(Path(where))
            continue
        for name in list(inside):
            below = os.path.join(where, name)
            place = os.path.realpath(below)
            if name.startswith("."):
                inside.remove(name)
                yield Path(below)
            elif place in here:
                inside.remove(name)  # a link to a folder above it
            else:
                way[below] = here | {place}
        yield from (Path(where) / name for name in names)


def _told(outputs: Sequence[Path]) -> str:
    named = ", ".join(map(str, outputs[:3])) + ", …" * (len(outputs) > 3)
    return f"what commands of this software have made ({named})"


def _is_of_ours(folder: Path) -> bool:
    """Whether a folder is an output of this software, finished or not."""
    return bool(read_starts(folder)) or is_output(folder)


def _matched(name: str) -> list[Path]:
    """The path of a name, or all that a pattern such as `texts/*.jsonl` or `**/*.parquet` matches, sorted."""
    path = Path(os.path.expanduser(name))
    if path.exists() or not _PATTERN & set(name):
        return [path]
    first = next(part for part in (*reversed(path.parents), path) if _PATTERN & set(str(part)))
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    # As below a folder: only the folders that the pattern itself names may be outputs.
    below = {one: [place for place in (one, *one.parents) if first.parent in place.parents] for one in found}
    outputs = sorted(filter(_is_of_ours, set[Path]().union(*below.values())))
    found = [one for one in found if not set(below[one]) & set(outputs)]
    if found and outputs:
        log.warning("input=%s: %d matches taken, left out: %s", name, len(found), _told(outputs))
    if not found:
        raise UserError(f"input={name} matches no file: look at what is in {first.parent}")
    return found


def documents(file: Path, key: str) -> Iterator[str]:
    """Every document of a file with something in it, in order. Raises UserError naming file and line or row."""
    kind = _kind(file.name)
    try:
        if kind in PLAIN:
            with _open(file) as whole:
                texts: Iterator[str] = iter([whole.read()])
        elif kind in ROWS:
            texts = _parquet_rows(file, key)
        else:
            texts = _json_lines(file, key)
        yield from (text for text in texts if text.strip())
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{file}:{_bad_line(file)} is not UTF-8 (byte 0x{byte:02x}): convert it first") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read ({in_one_line(error, 200)})") from None


def _open(file: Path, errors: str = "strict") -> IO[str]:
    how = {"encoding": "utf-8-sig", "errors": errors}
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file, "rt", **how)
        case ".bz2":
            return bz2.open(file, "rt", **how)
        case ".xz":
            return lzma.open(file, "rt", **how)
        case ".zst":
            import pyarrow

            # Unlike others, Arrow's reader goes on over several frames and notices a truncated one.
            return io.TextIOWrapper(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"), **how)
    return open(file, **how)


def _bad_line(file: Path) -> int:
    """The first line with bytes that are not UTF-8: a decoder's own offset is one in its buffer."""
    with _open(file, "surrogateescape") as lines:
        return next((number for number, line in enumerate(lines, 1) if not _is_utf8(line)), 1)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(file: Path, key: str) -> Iterator[str]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number} is not JSON ({str(error)[:80]})") from None
            text = record.get(key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{file}:{number} has no text under {key!r}: set text_key=")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{file}:{number} has half a character (a lone surrogate) in its text: mend the file")
            yield text


def _parquet_rows(file: Path, key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            _check_column(file, table.schema_arrow, key)
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[key]):
                # By its name: a field `text` of a column `a` is read beside a column `a.text`.
                for text in batch.column(key).to_pylist():
                    number += 1
                    if text is None:
                        raise UserError(f"{file}: row {number} has no text in column {key!r}")
                    yield text
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} cannot be read ({in_one_line(error, 200)})") from None


def _check_column(file: Path, schema: Any, key: str) -> None:
    """Raise UserError unless the column is there once and holds text."""
    from pyarrow import types

    if schema.names.count(key) != 1:
        raise UserError(f"{file} has no column {key!r} but {', '.join(schema.names)[:200]}: set text_key=")
    kind = schema.field(key).type
    if not types.is_string(kind) and not types.is_large_string(kind):
        raise UserError(f"{file}: column {key!r} holds {kind}, not text: set text_key=")
