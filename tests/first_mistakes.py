"""Runs commands with mistakes, and says of each what was printed and what had been imported by then.

python -m tests.first_mistakes      requests on standard input, a line of JSON each, and a line of JSON to answer each:
    {"name": …, "cases": [[word, …], …], "environment": {…}}      how each case ends
    {"module": …}                                                 the heavy modules that there are when it was imported

Importing takes longer than what is asked: this process has imported what every command does, and used Hydra. A fork of it
imports the module that checks a command. Each case is a fork of that: a process says why it ends only once. None of these may
hold a heavy module, and each case looks for itself.
"""

import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import hydra

from minitron_megatron.cli import next_command, spelling  # noqa: F401
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.main import command
from minitron_megatron.launcher import CONF

HEAVY = """torch megatron transformers tokenizers pyarrow pandas scipy matplotlib lm_eval wandb datasets
    safetensors.torch""".split()


def heavy() -> list[str]:
    return [name for name in HEAVY if name in sys.modules]


def of_a_fork(function: Callable[[], Any]) -> Any:
    """What the function returns in a fork of this process; an error's traceback in its place."""
    with tempfile.TemporaryFile("w+") as found:
        child = os.fork()
        if child == 0:
            try:
                answer = function()
            except BaseException:
                answer = traceback.format_exc()
            json.dump(answer, found)
            found.flush()
            os._exit(0)
        os.waitpid(child, 0)
        found.seek(0)
        return json.load(found)


def ended(name: str, words: list[str]) -> dict:
    """Exit status, standard error, and which heavy modules there are; of this process, which then is of no more use."""
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said.fileno(), 2)
        sys.argv = [f"launch/{name}.py", *words]
        spelling.TYPED[:] = sys.argv
        status = 0
        try:
            command(name)
        except SystemExit as error:
            status = error.code
        sys.stderr.flush()
        said.seek(0)
        return {"status": status, "said": said.read(), "heavy": heavy()}


def answers(name: str, cases: list[list[str]], environment: dict[str, str] | None = None) -> list[dict]:
    os.environ.update(environment or {})
    import_module(f"minitron_megatron.{COMMANDS[name].check.partition(':')[0]}")
    return [of_a_fork(lambda words=words: ended(name, words)) for words in cases]


def answer(request: dict) -> Any:
    if "module" in request:
        import_module(request["module"])
        return heavy()
    return answers(**request)


def warm() -> None:
    """Have Hydra import what it needs to read words of every kind."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        hydra.compose(overrides=["+a={b:[1,x]}", "+c=1.5", "+d='y'"])


if __name__ == "__main__":
    warm()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(of_a_fork(lambda line=line: answer(json.loads(line)))), flush=True)
