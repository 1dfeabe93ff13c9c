"""torchrun's options, which say how a command is started. Nothing but Python's own is imported here."""

import difflib

# torchrun's options that may follow the command's name, with how many words each takes.
OF_TORCHRUN = {
    "--nproc-per-node": 1,
    "--nnodes": 1,
    "--node-rank": 1,
    "--rdzv-backend": 1,
    "--rdzv-endpoint": 1,
    "--rdzv-id": 1,
    "--rdzv-conf": 1,
    "--master-addr": 1,
    "--master-port": 1,
    "--local-addr": 1,
    "--max-restarts": 1,
    "--log-dir": 1,
    "--tee": 1,
    "--redirects": 1,
    "--standalone": 0,
}


def nearest_start(word: str) -> str | None:
    """The option of torchrun's that a word may mean: it begins so, or is nearly that."""
    typed = word.partition("=")[0].strip("-").replace("_", "-")
    names = [option.strip("-") for option in OF_TORCHRUN]
    begin = [name for name in names if len(typed) > 2 and name.startswith(typed)]
    meant = next(iter([*begin, *difflib.get_close_matches(typed, names, n=1, cutoff=0.7)]), None)
    return meant and f"--{meant}"
