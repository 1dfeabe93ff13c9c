"""`make setup`: .venv with everything locked here. What is missing is said in one line, before anything is downloaded.

    Python 3.12, its venv and room for 5.6 GB? ──▶ .venv with pip ──▶ uv ──▶ lock.txt, no-deps.txt, the repository itself

What the programs say goes to .venv/setup.log; of what fails, the reason is shown. Older Pythons must be able to read this file,
to say that they are too old.
"""

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (3, 12)
GB = 1e9
# Of the environment; packages in uv's cache on the same disk are linked and take no more.
SIZE = 5.6 * GB
# What programs say of a network, a proxy or a disk that is at fault, among much else.
_REASONS = re.compile(
    r"Name or service not known|Temporary failure in name resolution|failed to lookup address|dns error|Network is unreachable"
    r"|No route to host|Connection refused|Connection reset|[Tt]imed? ?out|operation timed out|Tunnel connection failed[^'\")]*"
    r"|Cannot connect to proxy|certificate verify failed|invalid peer certificate|40[137] [A-Z][a-z ]+|50\d [A-Z][a-z ]+"
    r"|No space left on device|Read-only file system|Disk quota exceeded|Permission denied"
)


class Missing(Exception):
    """What the user can put right: one line."""


# Imports what the commands import, late imports included, each alone: what cannot be imported here is none of its business.
IMPORT_ONCE = """
import contextlib, importlib
from minitron_megatron.cli.commands import COMMANDS
core = "models.gpt.gpt_model optimizer distributed datasets.gpt_dataset dist_checkpointing pipeline_parallel"
late = ["megatron.core." + name for name in core.split()] + ["matplotlib.pyplot", "lm_eval.tasks", "wandb", "transformers"]
modules = ["minitron_megatron." + name.partition(":")[0] for one in COMMANDS.values() for name in (one.check, one.run)]
for name in [*modules, *late]:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
with contextlib.suppress(Exception):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
"""


def check_python(version: tuple, executable: str) -> None:
    """Raise Missing unless this is the Python that the lock is for, with venv."""
    if tuple(version[:2]) != NEEDED:
        have = ".".join(map(str, version[:2]))
        raise Missing(
            f"Python 3.12 is needed, and {executable} is {have}: install it, or name it with make PYTHON=/path/to/python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise Missing(f"{executable} has no venv: install it (on Debian and Ubuntu: apt install python3.12-venv)")


def free(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the first of its parents that is there."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def is_writable(folder: Path) -> bool:
    """Whether a folder can be made and written."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def uv_cache() -> Path:
    """Where uv keeps packages."""
    if os.environ.get("UV_CACHE_DIR"):
        return Path(os.environ["UV_CACHE_DIR"]).absolute()
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))).absolute() / "uv"


def has_packages(cache: Path) -> bool:
    """Whether the cache has the largest package already."""
    return any(cache.glob("archive-v0/*/torch"))


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, or their first parents that are there, are on one disk."""
    one, other = (next(path for path in (p, *p.parents) if path.exists()) for p in (one, other))
    return one.stat().st_dev == other.stat().st_dev


def check_room(venv: Path) -> None:
    """Raise Missing where the environment has no room."""
    if not is_writable(venv):
        raise Missing(
            f"{venv} cannot be made: {venv.parent} is not writable; clone the repository to where you can write"
        )
    made = any(venv.glob("lib/python3*/site-packages/torch"))
    linked = same_disk(venv, uv_cache()) and has_packages(uv_cache())
    if not made and not linked and free(venv) < SIZE:
        raise Missing(
            f"no space for the environment: {SIZE / GB:.1f} GB are needed in {venv}, {free(venv) / GB:.1f} GB are free; "
            "free some, or clone the repository to another disk"
        )


def environment(venv: Path) -> dict:
    """For uv: pip's index and certificates, which it does not read itself; a cache of its own where the user's has no room."""
    own = dict(os.environ, UV_NO_PROGRESS="1")
    for pip_name, uv_name in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        found = pip_option(venv, pip_name)
        if found and uv_name not in own:
            own[uv_name] = found
    cache = uv_cache()
    if not is_writable(cache) or (not has_packages(cache) and free(cache) < SIZE):
        # Beside the environment its files are linked; it goes when all is there.
        own["UV_CACHE_DIR"] = str(venv / ".cache")
    return own


def pip_option(venv: Path, name: str) -> str:
    """What pip is told by its variable or in its files; empty where nothing is."""
    given = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if given:
        return given
    said = subprocess.run(
        [str(venv / "bin/python"), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    found = re.findall(rf"^(?:global|install)\.{re.escape(name)}='(.*)'$", said.stdout.decode(errors="replace"), re.M)
    return found[-1] if found else ""


def run(log: io.BufferedRandom, what: str, words: list, own: dict = os.environ) -> None:
    """Run a program, all it says into the log. Raises Missing with its reason."""
    log.write((" ".join(words) + "\n").encode())
    log.flush()
    began = log.tell()
    status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, cwd=str(ROOT), env=own).returncode
    if status == 0:
        return
    log.seek(began)
    reason = reason_of(log.read().decode(errors="replace")) or f"status {status}"
    raise Missing(f"{what} failed ({reason}); all of it is in {log.name}{advice_for(reason)}")


def reason_of(said: str) -> str:
    """The line of a failed program that says why, at most 200 characters."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    known = [found.group() for found in map(_REASONS.search, lines) if found]
    named = [line for line in lines if re.match(r"(error|×|Caused by)", line, re.I)]
    return (known or named or lines or [""])[-1][:200]


def advice_for(reason: str) -> str:
    """What there is to do about a disk, or else about the network."""
    if re.search("No space|quota", reason):
        return "; free some and run make again"
    if _REASONS.search(reason):
        return "; mend the network or name a proxy (HTTPS_PROXY=) or a mirror (PIP_INDEX_URL=), and run make again"
    return ""


def make(venv: Path) -> None:
    """Make the environment. Raises Missing."""
    check_python(sys.version_info, sys.executable)
    check_room(venv)
    print(
        f"making {venv} of the versions locked in requirements/: {SIZE / GB:.1f} GB, 3 to 8 minutes the first time",
        flush=True,
    )
    venv.mkdir(parents=True, exist_ok=True)
    python = str(venv / "bin/python")
    with open(venv / "setup.log", "w+b") as log:
        run(log, "python -m venv", [sys.executable, "-m", "venv", str(venv)])
        pip = [python, "-m", "pip", "install", "--retries", "2", "-r", "requirements/uv.txt"]
        run(log, "pip install -r requirements/uv.txt", pip)
        own, uv = environment(venv), [python, "-m", "uv", "pip", "install", "--python", python]
        for words in (
            ["-r", "requirements/lock.txt"],
            ["--no-deps", "-r", "requirements/no-deps.txt"],
            ["--no-deps", "--editable", "."],
        ):
            run(log, "uv pip install " + " ".join(words), [*uv, *words], own)
        # Without compiled files each command starts 10 s later, and where this is set none are left behind by it.
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        run(log, "compiling what commands import", [python, "-c", IMPORT_ONCE], own)
    shutil.rmtree(str(venv / ".cache"), ignore_errors=True)


if __name__ == "__main__":
    try:
        make(ROOT / ".venv")
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
