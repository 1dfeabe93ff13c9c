"""The command line: `minitron NAME option=value …`, one process or several, and what each file in launch/ calls.

    minitron prune model=…                                   one process, as python launch/prune.py model=…
    minitron --nproc-per-node 8 prune model=…                eight: checked here, then started by torchrun without its noise
    torchrun --nproc-per-node 8 -m minitron_megatron prune model=…          plain torchrun

torchrun's options, before the command's name or after it, say how it starts. Nothing is imported before the signals are
handled.
"""
# ruff: noqa: E402

from minitron_megatron.first_moments import give_back, handle_first_signals

_BEFORE = handle_first_signals()

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from minitron_megatron import ending
from minitron_megatron.claims import several
from minitron_megatron.cli.start_words import OF_TORCHRUN, nearest_start

# Those that are numbers: how they look, and in words.
_COUNT = "[1-9][0-9]*"
_NUMBERS = {
    "--nproc-per-node": (f"{_COUNT}|gpu|cpu|auto|xpu", "how many processes to start, 1 or more, or gpu, cpu or auto"),
    "--nnodes": (
        f"{_COUNT}(:{_COUNT})?",
        "how many nodes there are, 1 or more, as 2, or as 2:4 for the least and the most",
    ),
    "--node-rank": ("[0-9]+", "this node's number, from 0"),
    "--master-port": ("[0-9]+", "a port's number"),
    "--max-restarts": ("[0-9]+", "how often to start again, 0 or more"),
}
_USAGE = """minitron COMMAND option=value …                         in one process
minitron --nproc-per-node 8 COMMAND option=value …      in eight on this machine
minitron COMMAND --help                                 its options"""
give_back(_BEFORE)


def main() -> None:
    """`minitron …` and `python -m minitron_megatron …`."""
    with ends_in_one_line():
        start, words = split(sys.argv[1:])
        check_start(start)
        if words[:1] == ["-m"]:
            if len(words) == 1:
                _refuse("-m needs a module: minitron --help lists the commands, which need none")
            # A module of this software's own, as torchrun takes it.
            if words[1].partition(".")[0] != "minitron_megatron":
                _refuse(f"-m {words[1]} is no module of minitron_megatron: start others with torchrun")
            _start([*start, *words])
        if not words or words[0] in ("--help", "-h"):
            show_commands()
            return
        if words[0] == "--version":
            from minitron_megatron import __version__

            print(__version__)
            return
        name = find(words[0])
        _as_if_typed(name, words[1:])
        if not start or {"--help", "-h", "--version"} & set(words):
            run(name)
            return
        if "RANK" in os.environ:
            _refuse(f"{start[0]} inside a job that has its processes: leave it out")
        _check_here(name, start, words[1:])
        _start([*start, "-m", "minitron_megatron", name, *words[1:]])


def command(name: str) -> None:
    """One command with the words of sys.argv: what launch/NAME.py calls."""
    with ends_in_one_line():
        run(name)


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Whatever ends a command before its time is said once, in a line; gives the process its exit status."""
    ending.handle_signals()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if ending.is_a_bug(error) and not several():
            raise
        sys.exit(ending.report(error))
    finally:
        ending.no_more_signals()


def run(name: str, *, only_check: bool = False) -> None:
    """Run a command of this process's words, or look only at what they ask for. Raises UserError."""
    check_environment()
    from minitron_megatron.cli.commands import COMMANDS
    from minitron_megatron.launcher import command

    command(COMMANDS[name], only_check=only_check)


def check_environment() -> None:
    """Raise UserError where this process cannot be a rank of what its environment says, has no working directory, or cannot
    read its own words: bytes that the locale has no letter for, which no manifest, log or library can take.
    """
    values = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    for name, value in values.items():
        if not re.fullmatch("[0-9]+", value):
            _refuse(f"{name}={value} in the environment is no number: unset it, or start with torchrun")
    rank, size = int(values.get("RANK", "0")), int(values.get("WORLD_SIZE", "1"))
    if rank >= size:
        _refuse(
            f"RANK={rank} and WORLD_SIZE={values.get('WORLD_SIZE', 'nothing')} in the environment: ranks count from 0 and "
            "are below WORLD_SIZE; unset both, or start with torchrun"
        )
    try:
        folder = os.getcwd()
    except OSError:
        _refuse("the working directory was removed: cd to another one")
    encoding = sys.getfilesystemencoding()
    for word in (*sys.argv[1:], folder):
        if not word.isascii() and any("\udc80" <= letter <= "\udcff" for letter in word):
            advice = "rename it" if encoding == "utf-8" else "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            _refuse(f"{word!a} has bytes that are no letters in this locale ({encoding}): {advice}")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """(how to start, the command's name and its words). Raises UserError."""
    start: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            # Before the command's name it stands for nothing; after it what follows may be another command.
            if not rest:
                continue
            return start, [*rest, word, *left]
        option, has_value, _ = word.partition("=")
        takes = OF_TORCHRUN.get(option.replace("_", "-"))
        if takes is None:
            rest.append(word)
            continue
        if takes and not has_value and not left:
            _refuse(f"{word} needs a value, as in {word} 8")
        start += [word, *([left.pop(0)] if takes and not has_value else [])]
    return start, rest


def check_start(start: list[str]) -> None:
    """Say which number of how to start is none, before torchrun is imported. Raises UserError."""
    for option, value in _values(start).items():
        wanted, what = _NUMBERS.get(option, (".*", ""))
        if not re.fullmatch(wanted, value):
            _refuse(f"{option} {value}: it takes {what}")
    given = _values(start)
    least, _, most = given.get("--nnodes", "1").partition(":")
    if most and int(most) < int(least):
        _refuse(f"--nnodes {least}:{most}: the most are fewer than the least")
    if "--node-rank" in given and int(given["--node-rank"]) >= int(most or least):
        _refuse(f"--node-rank {given['--node-rank']} of --nnodes {most or least}: nodes count from 0")
    if int(given.get("--master-port", "0")) > 65535:
        _refuse(f"--master-port {given['--master-port']}: ports are below 65536")


def _values(start: list[str]) -> dict[str, str]:
    """The value of each of torchrun's options, as --nproc-per-node 2 or --nproc_per_node=2."""
    values, left = {}, list(start)
    while left:
        option, has_value, value = left.pop(0).partition("=")
        option = option.replace("_", "-")
        values[option] = value if has_value or not OF_TORCHRUN[option] else left.pop(0)
    return values


def _refuse(why: str) -> NoReturn:
    from minitron_megatron.errors import UserError

    raise UserError(why)


def find(word: str) -> str:
    """The command that a word names: prune, or a path of launch/prune.py. Raises UserError with the nearest one."""
    from minitron_megatron.cli.commands import COMMANDS
    from minitron_megatron.errors import UserError

    name = word.rpartition("launch/")[2].removesuffix(".py")
    if name not in COMMANDS:
        if word.startswith("-"):
            meant = nearest_start(word)
            raise UserError(
                f"{word} is no option of minitron: {f'did you mean {meant}? ' if meant else ''}minitron --help lists all"
            )
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no command {word!r}: {hint}minitron --help lists all")
    return name


def show_commands() -> None:
    """Every command with a line about it."""
    from rich.table import Table

    from minitron_megatron.cli.commands import COMMANDS
    from minitron_megatron.console import console

    screen, table = console(), Table(box=None, show_header=False, pad_edge=False)
    screen.print(f"{_USAGE}\n", highlight=False)
    for name, entry in COMMANDS.items():
        table.add_row(name, " ".join((entry.config.__doc__ or "").split()).partition(". ")[0])
    screen.print(table)


def _as_if_typed(name: str, words: list[str]) -> None:
    """Messages and manifests then have the command as it is typed."""
    sys.argv = [f"minitron {name}", *words]


def _check_here(name: str, start: list[str], words: list[str]) -> None:
    """Say a mistake before any process starts, where the number of processes is known. Raises UserError.

    On one of several nodes a mistake in the words is every node's, and ends each. One in a folder may be this node's alone: it is
    said at once, and the others learn it when they have met.
    """
    given = _values(start)
    processes, nodes = given.get("--nproc-per-node", "1"), given.get("--nnodes", "1")
    if not processes.isdecimal() or not nodes.isdecimal():
        return
    os.environ["WORLD_SIZE"] = str(int(processes) * int(nodes))
    try:
        run(name, only_check=True)
    except Exception as error:
        if int(nodes) == 1 or not getattr(error, "of_folders", isinstance(error, OSError)):
            raise
        ending.report_early(error)
    finally:
        del os.environ["WORLD_SIZE"]
        _as_if_typed(name, words)


def _start(words: list[str]) -> NoReturn:
    from minitron_megatron.parallel.torchrun import launch

    sys.exit(launch(words))
