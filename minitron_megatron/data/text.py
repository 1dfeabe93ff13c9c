"""Documents out of text files: .txt, .md and .rst are one document each, .jsonl (also .gz, .xz) one a line.

Files are streamed in sorted order; every complaint names the file and the line.
"""

import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from minitron_megatron.errors import UserError

PLAIN, LINES = (".txt", ".md", ".rst"), (".jsonl", ".jsonl.gz", ".jsonl.xz")


def find_files(inputs: str | Sequence[str]) -> list[Path]:
    """The text files named, or found below folders that are named. Raises UserError."""
    names = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"input={inputs} must be a path or a list of paths")
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(PLAIN + LINES))
            if not found:
                raise UserError(f"input={path} has no file that ends in {', '.join(PLAIN + LINES)}")
            files += found
        elif not path.is_file():
            raise UserError(f"input={path} does not exist: give a text file or a folder of them")
        elif not path.name.endswith(PLAIN + LINES):
            raise UserError(f"input={path} does not end in one of {', '.join(PLAIN + LINES)}")
        else:
            files.append(path)
    return files


def documents(files: Sequence[Path], key: str) -> Iterator[str]:
    """Every document with something in it, in file order. Raises UserError naming file and line."""
    for file in files:
        try:
            if file.name.endswith(PLAIN):
                text = file.read_text(encoding="utf-8-sig")
                if text.strip():
                    yield text
            else:
                with _open(file) as lines:
                    yield from _json_lines(file, lines, key)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it first") from None
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{file} cannot be read ({error})") from None


def _open(file: Path) -> IO[str]:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    if file.name.endswith(".xz"):
        return lzma.open(file, "rt", encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


def _json_lines(file: Path, lines: IO[str], key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is not JSON ({str(error)[:80]})") from None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f"{file}:{number} has no text under {key!r}: set text_key=")
        if any("\ud800" <= letter <= "\udfff" for letter in record[key]):
            raise UserError(f"{file}:{number} has half a character (a lone surrogate) in its text: mend the file")
        if record[key].strip():
            yield record[key]
