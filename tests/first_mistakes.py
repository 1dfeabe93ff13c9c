"""Runs commands with mistakes in this one process, and says of each what was printed and what had been imported by then.

python -m tests.first_mistakes NAME      cases on standard input, [[word, …], …], answers on standard output, both JSON
"""

import contextlib
import io
import json
import sys

from minitron_megatron.launcher import command

HEAVY = """torch megatron transformers tokenizers pyarrow pandas scipy matplotlib lm_eval wandb datasets
    safetensors.torch""".split()


def answer(name: str, words: list[str]) -> dict:
    """Exit status, standard error, and which heavy modules there are."""
    sys.argv = [f"launch/{name}.py", *words]
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            command(name)
        except SystemExit as error:
            status = error.code
    return {"status": status, "said": said.getvalue(), "heavy": [m for m in HEAVY if m in sys.modules]}


if __name__ == "__main__":
    chosen = sys.argv[1]
    json.dump([answer(chosen, words) for words in json.load(sys.stdin)], sys.stdout)
