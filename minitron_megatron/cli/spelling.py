"""How commands are spelt for people: as this one was started, as `python launch/NAME.py` or as `minitron NAME`.

Lines to paste, stages, help, mistakes and manifests take it from here. A line works in the shell in which this command was typed:
Python, minitron and launch/ are named as they are found there. Nothing heavy is imported.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from minitron_megatron.plain_text import ODD

# The command as it was typed; sys.argv is Hydra's later on.
TYPED = list(sys.argv)


def _launch() -> Path | None:
    """The folder launch/ as it was typed; None where this command was started as minitron, or from other Python code."""
    folder = Path(TYPED[0]).parent
    return folder if folder.name == "launch" else None


def called(name: str) -> str:
    """What a command is called: launch/NAME.py, or minitron NAME."""
    return f"minitron {name}" if _launch() is None else f"launch/{name}.py"


def script(name: str) -> str:
    """A job script: in slurm/ of the repository, or the package's copy of it."""
    return f"slurm/{name}" if _launch() is not None else str((Path(__file__).parent.parent / "slurm" / name).resolve())


def command_line() -> str:
    """The command as it was typed, for manifests."""
    program = TYPED[0].split(" ") if TYPED[0].startswith("minitron ") else ["python", TYPED[0]]
    return shlex.join([*program, *TYPED[1:]])


def program_words(name: str, processes: int = 1) -> list[str]:
    """The words that start a command, in so many processes of this machine."""
    launch = _launch()
    if processes > 1:
        return [*minitron_words(), "--nproc-per-node", str(processes), name]
    return [*minitron_words(), name] if launch is None else [python_word(), str(launch / f"{name}.py")]


def words_after_start(name: str) -> list[str]:
    """The words that a launcher of several processes, such as torchrun, needs to start a command."""
    launch = _launch()
    return ["-m", "minitron_megatron", name] if launch is None else [str(launch / f"{name}.py")]


def line_of(name: str, words: Sequence[str] = (), processes: int = 1) -> str:
    """The line that starts a command with its options."""
    return joined([*program_words(name, processes), *words])


def joined(words: Iterable[str]) -> str:
    """Words as one line for the shell, whatever is in them: it can be pasted, and stand in a comment."""
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word for the shell. What is no plain text, such as a line break, is spelt as bash and zsh read it in $'…'."""
    if not ODD.search(word):
        # Double quotes where they are easier to read: nothing in them means anything to a shell.
        return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)
    return "$'" + ODD.sub(_in_bytes, re.sub(r"[\\']", r"\\\g<0>", word)) + "'"


def _in_bytes(odd: re.Match) -> str:
    """\\n, or a byte of a name on disk each."""
    if odd[0] == "\n":
        return r"\n"
    try:
        name = os.fsencode(odd[0])
    except UnicodeEncodeError:
        name = odd[0].encode(errors="surrogatepass")
    return "".join(rf"\x{byte:02x}" for byte in name)


def minitron_words() -> list[str]:
    """The program that pip installs beside Python, or the package where it does not."""
    beside = Path(sys.executable).parent / "minitron"
    if beside.is_file():
        return [_on_path("minitron", str(beside))]
    return [python_word(), "-m", "minitron_megatron"]


def python_word() -> str:
    """This Python."""
    return _on_path("python", sys.executable)


def _on_path(name: str, this: str) -> str:
    """A program's name where the shell finds this very one by it, else its path."""
    there = shutil.which(name)
    same = there is not None and Path(there).parent.resolve() == Path(this).parent.resolve()
    return name if same else this
