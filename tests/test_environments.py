"""Odd places to run in: terminals without UTF-8, narrow or none; machines where `make setup` cannot succeed."""

import fcntl
import importlib.util
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron import console

ROOT = Path(__file__).resolve().parent.parent
# Without Python's own remedies: it takes the C locale for UTF-8 otherwise.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENCODINGS = ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, PLAIN)
SHOW = """
import time
from minitron_megatron import console
console.write_anywhere()
console.print_table("α → β × 3 ≤ ±½ 日本", ["name", "figure"], [["x·wᵀ — “well”", 1.5]])
with console.progress("über ─▶", 3, made="tokens") as advance:
    for _ in range(3):
        advance(1, 100)
"""


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """A program that shows all kinds."""
    file = tmp_path_factory.mktemp("show") / "show.py"
    file.write_text(SHOW, encoding="utf-8")
    return str(file)


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, check=False)


def in_a_terminal(words: list[str], columns: int, **environment: str) -> tuple[int, bytes]:
    """Exit status of a program, and what it wrote, in a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        words, env={**own, "TERM": "xterm", **environment}, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(ours)
    return child.wait(60), written


def lines_of(written: bytes) -> list[str]:
    """What a terminal shows, without its colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode("utf-8", "replace")).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("environment", ENCODINGS, ids=["ascii", "latin-1", "C"])
def test_everything_shown_can_be_written(show, environment):
    """Tables and bars into a file and in a narrow terminal, and errors; what an encoding lacks is spelled in it."""
    encoding = "latin-1" if "latin-1" in environment.values() else "ascii"
    for words in ([show], ["launch/demo.py", "output=no → where", "seed=x"]):
        done = run([sys.executable, *words], **environment)
        assert b"Traceback" not in done.stderr and done.returncode == (0 if words == [show] else 2)
        (done.stdout + done.stderr).decode(encoding)
    status, written = in_a_terminal([sys.executable, show], 60, **environment)
    # What is spelled in several letters may make a line that much longer.
    assert status == 0 and max(len(line.rstrip()) for line in lines_of(written)) <= 68
    written.decode(encoding)


def test_a_narrow_terminal_is_not_exceeded(show):
    """Examples stay on one line, to be copied; nothing else is wider, and no word of the first column is lost."""
    for words in ([show], ["launch/distill.py", "--help"]):
        status, written = in_a_terminal([sys.executable, *words], 60)
        shown = lines_of(written)
        examples = ("launch/", "--nproc-per-node", "PRESET")
        wide = [line for line in shown if len(line.rstrip()) > 60 and not any(word in line for word in examples)]
        assert status == 0 and not wide
    assert any(line.startswith("precision") for line in shown)


@pytest.mark.parametrize("closed", [">&- <&-", ">&- 2>&-"])
def test_without_any_terminal(show, closed):
    """Standard output or error may be closed: the status says it still."""
    for words, status in ((show, 0), ("launch/demo.py output=x seed=x", 2)):
        line = f"{sys.executable} {words} {closed}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
    assert "2>&-" in closed or done.stderr.startswith(b"error: ")


def test_a_table_too_wide_for_the_terminal_keeps_its_numbers_whole(tmp_path):
    """A row becomes a table of its own; none is lost, and none is broken."""
    program = tmp_path / "wide.py"
    names = [f"column {i}" for i in range(9)]
    rows = [[f"row {r}", *(10**6 * r + i for i in range(8))] for r in (1, 2)]
    program.write_text(f"from minitron_megatron import console\nconsole.print_table('wide', {names}, {rows})\n")
    for columns in (60, 200):
        status, written = in_a_terminal([sys.executable, str(program)], columns)
        shown = lines_of(written)
        assert status == 0 and max(map(len, shown)) <= columns
        assert all(any(f"{10**6 * r + i:,}" in line for line in shown) for r in (1, 2) for i in range(8))


def test_signs_of_our_own_texts_have_a_spelling():
    """Every sign that the package writes in a message is spelled in ASCII, rather than as a question mark."""
    printed = set()
    for file in (ROOT / "minitron_megatron").rglob("*.py"):
        # Texts that tokenizers are tried with are never printed.
        source = re.sub(r"(?ms)^_PROBES = \(.*?^\)", "", file.read_text(encoding="utf-8"))
        for text in re.findall(r'"([^"\n]*[^\x00-\x7f][^"\n]*)"', source):
            printed |= {sign for sign in text if ord(sign) > 127}
    lacking = {sign for sign in printed if "?" in console._in_ascii(UnicodeEncodeError("ascii", sign, 0, 1, ""))[0]}
    assert not lacking


# make setup


@pytest.fixture(scope="module")
def setup():
    """requirements/setup.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("setup_of_the_environment", ROOT / "requirements" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_can_read_the_file_that_refuses_it(setup):
    """By the grammar of 3.7; and it says so in a line."""
    import ast

    ast.parse((ROOT / "requirements" / "setup.py").read_text(), feature_version=(3, 7))
    for version in ((3, 7, 1), (3, 11, 4), (3, 13, 0)):
        with pytest.raises(setup.Missing, match=rf"3\.12 is needed, and /x/python is 3\.{version[1]}: install it"):
            setup.check_python(version, "/x/python")
    setup.check_python((3, 12, 7), "/x/python")


def test_a_python_without_venv_is_refused(setup, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup.Missing, match="has no venv: install it"):
        setup.check_python((3, 12, 7), "/x/python")


def test_room_is_looked_for_before_anything_is_downloaded(setup, monkeypatch, tmp_path):
    """As long as neither environment nor uv's cache on this disk has the packages."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=5.5e9))
    with pytest.raises(setup.Missing, match=r"5\.6 GB are needed in .*\.venv, 5\.5 GB are free"):
        setup.check_room(tmp_path / ".venv")
    (tmp_path / "cache/archive-v0/abc/torch").mkdir(parents=True)
    setup.check_room(tmp_path / ".venv")
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / ".venv/lib/python3.12/site-packages/torch").mkdir(parents=True)
    setup.check_room(tmp_path / ".venv")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=5.7e9))
    setup.check_room(tmp_path / "other/.venv")
    (tmp_path / "file").touch()
    with pytest.raises(setup.Missing, match="is not writable"):
        setup.check_room(tmp_path / "file/.venv")


def test_uv_gets_pips_index_and_a_cache_that_can_be_written(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(
        setup, "pip_option", lambda venv, name: {"index-url": "https://mirror/simple", "cert": ""}[name]
    )
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=9e9))
    for name in ("UV_DEFAULT_INDEX", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    own = setup.environment(tmp_path / ".venv")
    assert own["UV_DEFAULT_INDEX"] == "https://mirror/simple" and own["UV_CACHE_DIR"] == str(tmp_path / "cache")
    monkeypatch.setenv("UV_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(setup, "is_writable", lambda folder: not str(folder).startswith("/proc"))
    assert setup.environment(tmp_path / ".venv")["UV_CACHE_DIR"] == str(tmp_path / ".venv/.cache")


@pytest.mark.parametrize(
    ("said", "reason", "advice"),
    [
        (
            "WARNING: Retrying … [Errno -2] Name or service not known\nERROR: No matching distribution",
            "Name or service",
            "proxy",
        ),
        (
            "error: Request failed\n  Caused by: dns error\n  Caused by: failed to lookup address",
            "failed to lookup",
            "proxy",
        ),
        (
            "ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407 Proxy Auth'))",
            "Cannot",
            "proxy",
        ),
        ("error: failed to write\n  Caused by: No space left on device (os error 28)", "No space left", "free some"),
        ("hint: x\nerror: the wheel is for another platform\n", "error: the wheel is for another platform", ""),
        ("", "", ""),
    ],
)
def test_what_failed_is_said_with_its_reason(setup, said, reason, advice):
    found = setup.reason_of(said)
    assert found.startswith(reason) and "\n" not in found and advice in setup.advice_for(found)


@pytest.mark.slow
def test_make_without_a_network_is_one_line(tmp_path):
    """And of make its own line about the target."""
    for name in ("Makefile", "pyproject.toml", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "requirements" else None
    (tmp_path / "requirements").mkdir()
    for file in (ROOT / "requirements").iterdir():
        if file.is_file():
            (tmp_path / "requirements" / file.name).write_bytes(file.read_bytes())
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    own |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    python = os.path.realpath(sys.executable)
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, env=own, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and len(errors) == 1
    assert re.match(r"error: pip install .* failed \(.*Connection refused.*\).*HTTPS_PROXY", errors[0])


def test_of_two_places_that_say_one_thing_the_users_own_goes_first(setup, monkeypatch, tmp_path):
    """uv's own variable over pip's, pip's variable over its files, and of those the last; nothing where neither says."""
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=9e9))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    said = "global.index-url='http://a'\ninstall.index-url='http://b'\nglobal.extra-index-url='http://c'\nglobal.cert='/x y'\n"
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said.encode()))
    for name in ("UV_DEFAULT_INDEX", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    assert setup.pip_option(tmp_path, "index-url") == "http://b" and setup.pip_option(tmp_path, "cert") == "/x y"
    assert setup.pip_option(tmp_path, "proxy") == ""
    own = setup.environment(tmp_path)
    assert (own["UV_DEFAULT_INDEX"], own["SSL_CERT_FILE"], own["UV_NO_PROGRESS"]) == ("http://b", "/x y", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://mine")
    assert setup.environment(tmp_path)["UV_DEFAULT_INDEX"] == "http://mine"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://uv")
    assert setup.environment(tmp_path)["UV_DEFAULT_INDEX"] == "http://uv"
    monkeypatch.setattr(setup, "pip_option", lambda venv, name: "")
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    assert not {"UV_DEFAULT_INDEX", "SSL_CERT_FILE"} & set(setup.environment(tmp_path))


@pytest.mark.parametrize(
    ("packages", "bytes_free", "writable", "own"),
    [(False, 5.6e9, True, False), (False, 5.5e9, True, True), (True, 1.0, True, False), (True, 9e9, False, True)],
)
def test_a_cache_of_its_own_is_for_where_the_users_has_no_room(
    setup, monkeypatch, tmp_path, packages, bytes_free, writable, own
):
    monkeypatch.setattr(setup, "pip_option", lambda venv, name: "")
    monkeypatch.setattr(setup, "has_packages", lambda cache: packages)
    monkeypatch.setattr(setup, "is_writable", lambda folder: writable)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=bytes_free))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    found = setup.environment(tmp_path / ".venv")["UV_CACHE_DIR"]
    assert found == str(tmp_path / (".venv/.cache" if own else "cache"))


def test_where_uv_keeps_packages(setup, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/u")
    for cache, config, found in (
        ("a/b", "/x", tmp_path / "a/b"), ("", "/x", Path("/x/uv")), ("", "relative", Path("/home/u/.cache/uv")),
        ("", "", Path("/home/u/.cache/uv")),
    ):  # fmt: skip
        monkeypatch.setenv("UV_CACHE_DIR", cache)
        monkeypatch.setenv("XDG_CACHE_HOME", config)
        assert setup.uv_cache() == found
    assert setup.same_disk(tmp_path / "none/x", tmp_path) and not setup.same_disk(tmp_path, Path("/proc/none"))
    assert (
        not setup.has_packages(tmp_path) and setup.free(tmp_path / "a/b/c") > 0 and setup.is_writable(tmp_path / "a/b")
    )


def test_a_program_that_fails_is_said_with_its_reason_of_this_time(setup, tmp_path):
    with open(tmp_path / "setup.log", "w+b") as log:
        setup.run(log, "first", [sys.executable, "-c", "print('error: of the first')"])
        with pytest.raises(setup.Missing) as error:
            setup.run(
                log, "second", [sys.executable, "-c", "import sys; print('error: of mine'); sys.exit(3)"], {"A": "1"}
            )
        assert str(error.value) == f"second failed (error: of mine); all of it is in {log.name}"
        with pytest.raises(setup.Missing, match=r"third failed \(status 4\)"):
            setup.run(log, "third", [sys.executable, "-c", "import sys; sys.exit(4)"])
    assert "error: of the first" in (tmp_path / "setup.log").read_text()


def test_the_environment_is_made_in_order_and_its_cache_goes(setup, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(setup, "check_room", lambda venv: ran.append("room"))
    monkeypatch.setattr(setup, "check_python", lambda *_: ran.append("python"))
    monkeypatch.setattr(setup, "environment", lambda venv: {"PYTHONDONTWRITEBYTECODE": "1", "X": "y"})
    monkeypatch.setattr(setup, "run", lambda log, what, words, own=None: ran.append((what, words[1:], dict(own or {}))))
    venv = tmp_path / ".venv"
    (venv / ".cache").mkdir(parents=True)
    setup.make(venv)
    own = {"PYTHONDONTWRITEBYTECODE": "1", "X": "y"}
    uv = ["-m", "uv", "pip", "install", "--python", str(venv / "bin/python")]
    assert ran[:3] == ["python", "room", ("python -m venv", ["-m", "venv", str(venv)], {})]
    assert ran[3:7] == [
        (
            "pip install -r requirements/uv.txt",
            ["-m", "pip", "install", "--retries", "2", "-r", "requirements/uv.txt"],
            {},
        ),
        ("uv pip install -r requirements/lock.txt", [*uv, "-r", "requirements/lock.txt"], own),
        (
            "uv pip install --no-deps -r requirements/no-deps.txt",
            [*uv, "--no-deps", "-r", "requirements/no-deps.txt"],
            own,
        ),
        ("uv pip install --no-deps --editable .", [*uv, "--no-deps", "--editable", "."], own),
    ]
    assert (
        ran[7] == ("compiling what commands import", ["-c", setup.IMPORT_ONCE], {"X": "y"})
        and not (venv / ".cache").exists()
    )
