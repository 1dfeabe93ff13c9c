"""Runs commands with mistakes, and says of each what was printed and what had been imported by then.

python -m tests.first_mistakes NAME      cases on standard input, [[word, …], …], answers on standard output, both JSON

Each case is a fork of this process, which has imported what every command does: a process says why it ends only once.
"""

import json
import os
import sys
import tempfile

from minitron_megatron import launcher  # noqa: F401
from minitron_megatron.cli import spelling
from minitron_megatron.cli.main import command

HEAVY = """torch megatron transformers tokenizers pyarrow pandas scipy matplotlib lm_eval wandb datasets
    safetensors.torch""".split()


def answer(name: str, words: list[str]) -> dict:
    """Exit status, standard error, and which heavy modules there are."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as heavy:
        child = os.fork()
        if child == 0:
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
            json.dump([m for m in HEAVY if m in sys.modules], heavy)
            heavy.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        heavy.seek(0)
        return {"status": status, "said": said.read(), "heavy": json.load(heavy)}


if __name__ == "__main__":
    chosen = sys.argv[1]
    json.dump([answer(chosen, words) for words in json.load(sys.stdin)], sys.stdout)
