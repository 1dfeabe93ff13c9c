"""How commands end before their time: one line, from the rank that failed first, and the exit status that is documented.

The first half tries the claims with processes that do nothing else; the second with real training under torchrun, by itself,
by the launcher, and by two launchers that stand for two nodes.
"""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from minitron_megatron import claims, ending, stages
from minitron_megatron.cli import main
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import torchrun
from minitron_megatron.parallel.torchrun import children
from tests.test_commands import ROOT, TORCHRUN, distill_words, environment, free_port
from tests.tiny import data_folder, hf_model, imported

HOST = socket.gethostname()
LAUNCHER = [sys.executable, "-m", "minitron_megatron.parallel.torchrun"]
DAMAGED = "this rank's folder is damaged: copy it again"

# --- Claims, without torch --------------------------------------------------------------------------------------------

RANK = """
import os, sys, time
from minitron_megatron import claims, ending
from minitron_megatron.errors import UserError
claims.SECONDS_OF_PATIENCE = 2.0
ending.handle_signals()
what, wait = os.environ["FAILS"].rsplit(" ", 1)
wait = float(wait)
time.sleep(wait)
error = {
    "mistake": UserError("a mistake"), "bug": ValueError("a bug"),
    "peer": RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
    "other": UserError("another mistake"),
}.get(what) or RuntimeError(what)
try:
    raise error
except Exception:
    pass  # whichever it is: raised once so that it has a traceback, as what ends a command has
status = ending.report(error)
assert "torch" not in sys.modules
sys.exit(status)
"""


def ranks(
    folder: Path, whats: Sequence[tuple[str, float]], apart: float = 0.0, **variables: str
) -> list[tuple[int, str]]:
    """(exit status, standard error) of processes that fail so, each after so many seconds, as ranks of a node.

    They start so many seconds `apart`; with variables it is without torchrun.
    """
    started = []
    for rank, (what, wait) in enumerate(whats):
        own = {"RANK": str(rank), "WORLD_SIZE": str(len(whats)), "LOCAL_WORLD_SIZE": str(len(whats)), **variables}
        file = folder / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        own |= {} if variables else {"TORCHELASTIC_ERROR_FILE": str(file), "GROUP_WORLD_SIZE": "1"}
        # The words are the same for all, as those of a job.
        own["FAILS"] = f"{what} {wait}"
        words = [sys.executable, "-c", RANK]
        time.sleep(apart)
        started.append(subprocess.Popen(words, env={**os.environ, **own}, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    return [(process.wait(60), process.communicate()[1]) for process in started]


@pytest.mark.parametrize("count", [2, 5])
def test_of_ranks_that_fail_alike_one_speaks(tmp_path, count):
    ended = ranks(tmp_path, [("mistake", 0.0)] * count)
    assert [status for status, _ in ended] == [2] * count
    (line,) = "".join(said for _, said in ended).splitlines()
    assert re.fullmatch(rf"error: rank \d on {HOST}: a mistake", line)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_first_speaks_and_the_others_end_with_its_status(tmp_path, first):
    whats = [("bug", 1.5)] * 3
    whats[first] = ("mistake", 0.0)
    ended = ranks(tmp_path, whats)
    assert [status for status, _ in ended] == [2, 2, 2]
    assert [said for _, said in ended if said] == [f"error: rank {first} on {HOST}: a mistake\n"]


def test_who_lost_a_peer_leaves_the_word_to_the_peer(tmp_path):
    ended = ranks(tmp_path, [("peer", 0.0), ("mistake", 1.0)])
    assert [status for status, _ in ended] == [2, 2], ended
    assert [said for _, said in ended] == ["", f"error: rank 1 on {HOST}: a mistake\n"]


def test_who_lost_a_peer_that_says_nothing_says_so_in_a_line(tmp_path):
    (status, said), *_ = ranks(tmp_path, [("peer", 0.0), ("peer", 4.0)])
    assert status == 1 and len(said.splitlines()) == 1
    assert "rank 0" in said and "lost another process of the job" in said and "closed by peer [127.0.0.1]:1234" in said


def test_a_bug_of_several_processes_has_its_traceback_once(tmp_path):
    ended = ranks(tmp_path, [("bug", 0.0), ("bug", 1.0)])
    said = "".join(said for _, said in ended)
    assert said.startswith(f"error: rank 0 on {HOST}: ValueError: a bug\n") and said.count("ValueError: a bug") == 2
    assert [status for status, _ in ended] == [1, 1]


def test_without_torchrun_a_job_speaks_every_time(tmp_path):
    for _ in range(2):
        ended = ranks(tmp_path, [("mistake", 0.0), ("mistake", 0.5)], TMPDIR=str(tmp_path))
        assert [status for status, _ in ended] == [2, 2], ended
        # Twice where the second process begins after the first has spoken; never not at all.
        assert "".join(said for _, said in ended).count("a mistake") in (1, 2)


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_without_torchrun_ranks_that_fail_alike_speak_once_however_late_they_begin(tmp_path, apart):
    for _ in range(2):
        ended = ranks(tmp_path, [("mistake", 0.0)] * 3, apart, TMPDIR=str(tmp_path))
        assert [status for status, _ in ended] == [2, 2, 2]
        assert "".join(said for _, said in ended).count("a mistake") == 1


def test_without_torchrun_a_reason_of_ones_own_is_said(tmp_path):
    """Two jobs may look alike from here: the same words, the same place to meet."""
    ended = ranks(tmp_path, [("mistake", 0.0), ("other", 1.0)], TMPDIR=str(tmp_path))
    assert ["another mistake" in said for _, said in ended] == [False, True] and "a mistake" in ended[0][1]
    ended = ranks(tmp_path, [("mistake", 1.0), ("peer", 0.0)], TMPDIR=str(tmp_path))
    assert [said for _, said in ended] == [f"error: rank 0 on {HOST}: a mistake\n", ""]


def test_a_connection_that_is_no_ranks_keeps_its_traceback(tmp_path):
    (status, said), *_ = ranks(tmp_path, [("connection reset by a server of data", 0.0), ("mistake", 4.0)])
    assert status == 1 and "Traceback" in said and 'File "<string>"' in said and said.count("error:") == 1


def test_a_store_that_does_not_answer_keeps_nobody_silent(tmp_path, monkeypatch, capsys):
    unreachable = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "10.255.255.1",
        "MASTER_PORT": "9",
        "TMPDIR": str(tmp_path),
    }
    for name, value in unreachable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ending._State, "status", None)
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(claims, "SECONDS_FOR_THE_STORE", 2.0)
    began = time.monotonic()
    assert ending.report(UserError("a mistake")) == 2
    assert capsys.readouterr().err == f"error: rank 1 on {HOST}: a mistake\n"
    assert time.monotonic() - began < 7


# --- Before the work ----------------------------------------------------------------------------------------------------

FIRST_MOMENTS = """
import os, sys
class Signal:
    def find_spec(self, name, *rest):
        if name == "minitron_megatron.ending":
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Signal())
import minitron_megatron.cli.main
"""


@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)]
)
def test_a_signal_in_the_imports_is_one_line_or_the_launchers_to_say(number, status, rank):
    words = [sys.executable, "-c", FIRST_MOMENTS, str(int(number))]
    own = {} if rank is None else {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(words, env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [f"stopped by {ending.NAMES[number]}: {ending.NOTHING_KEPT}"] if rank is None else []
    assert (done.returncode, done.stderr.splitlines()) == (status if rank is None else -number, said)


def test_importing_the_commands_leaves_signals_alone():
    look = "import signal, minitron_megatron.cli.main; print([signal.getsignal(2), signal.getsignal(15)])"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "default_int_handler" in done.stdout and "SIG_DFL" in done.stdout


IGNORES = """
import os, signal
ignored = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
for number in ignored:
    signal.signal(number, signal.SIG_IGN)
from minitron_megatron import ending, first_moments
first = first_moments.handle_first_signals()
for number in ignored:
    os.kill(os.getpid(), number)
first_moments.give_back(first)
ending.handle_signals()
for number in ignored:
    os.kill(os.getpid(), number)
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_that_who_started_a_command_has_it_ignore_is_ignored():
    """As nohup does with SIGHUP, and a shell with Ctrl-C in the background: before anything is imported, and later."""
    done = subprocess.run([sys.executable, "-c", IGNORES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "goes on\n" and "by SIGTERM" in done.stderr, done.stderr


CLOSES = """
import sys, time
from minitron_megatron import ending
from minitron_megatron.cli.main import ends_in_one_line
from minitron_megatron.console import console
with ends_in_one_line(), ending.keeping(lambda: "a step is saved"):
    try:
        console().print("ready")
        time.sleep(60)
    finally:
        console().print("work that is saved, and said")
        print("and said by others")
        with open(sys.argv[1], "w") as file:
            file.write("saved")
"""


@pytest.mark.parametrize("into", ["terminal", "file"])
def test_a_terminal_that_closes_ends_a_command_as_a_signal_does(into, tmp_path):
    """What was begun is unwound, though all that it prints comes to nothing; where the line goes elsewhere it is one."""
    ours, theirs = pty.openpty()
    take = f"import fcntl, os, termios; os.setsid(); fcntl.ioctl({theirs}, termios.TIOCSCTTY, 0); "
    run = f"os.execv({sys.executable!r}, {[sys.executable, '-c', CLOSES, str(tmp_path / 'saved')]!r})"
    with open(tmp_path / "errors", "w+") as errors:
        running = subprocess.Popen(
            [sys.executable, "-c", take + run], cwd=ROOT, pass_fds=[theirs], stdin=theirs, stdout=theirs,
            stderr=theirs if into == "terminal" else errors,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while b"ready" not in shown:
            shown += os.read(ours, 1024)
        os.close(ours)
        assert running.wait(60) == 129
        errors.seek(0)
        said = ["stopped by SIGHUP (its terminal closed): a step is saved\n"] if into == "file" else []
        assert errors.readlines() == said
    assert (tmp_path / "saved").read_text() == "saved"


def test_work_outlives_who_reads_of_it(tmp_path):
    """As `| tee log`, which the Ctrl-C has ended that asks a run to save: no line after that ends it, or changes its status."""
    work = CLOSES.replace("time.sleep(60)", "sys.stdin.readline()")
    running = subprocess.Popen(
        [sys.executable, "-c", work, str(tmp_path / "saved")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout.readline() == "ready\n"
    running.stdout.close()
    _, said = running.communicate("\n", timeout=60)
    assert (running.returncode, said, (tmp_path / "saved").read_text()) == (0, "", "saved")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_while_the_demo_measures_the_machine_is_one_line_and_ends_the_measuring(number, status):
    measure = "from minitron_megatron.cli.main import ends_in_one_line as e\nwith e():\n    from minitron_megatron"
    running = job([sys.executable, "-c", f"{measure}.demo_plan import measure_machine as m; m()"], [])
    with gone(running):
        while not (measuring := children(running.pid)):
            assert running.poll() is None
            time.sleep(0.01)
        os.killpg(running.pid, number)  # as a terminal does
        said = running.communicate(timeout=60)[1]
    assert (running.returncode, len(said.splitlines())) == (status, 1) and said.startswith("stopped by "), said
    assert not any(Path(f"/proc/{pid}").exists() for pid in measuring)


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "was killed by SIGKILL: "), (signal.SIGSEGV, "was killed by SIGSEGV: a crash")],
)
def test_a_stage_that_was_killed_says_by_what(number, says):
    status, reason, _ = stages.run_program([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"], 1)
    assert status == 128 + number and reason.startswith(says)


def test_a_stage_that_a_signal_ended_says_that_those_before_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "run_program", lambda *_: (143, f"by SIGTERM: {ending.NOTHING_KEPT}"))
    done = stages.Stages(tmp_path / "stages.json")
    for kept in (
        "no stage was done before it; the same command begins with prune",
        "the stages before prune are kept; the same command continues with it",
    ):
        monkeypatch.setattr(ending._State, "status", None)
        with pytest.raises(SystemExit) as raised:
            done.command("prune", tmp_path / "out", "prune")
        assert raised.value.code == 143
        assert capsys.readouterr().err == f"stopped in prune, by SIGTERM: {kept}\n"
        done.run("search", tmp_path, lambda: None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(
            (f"--nproc-per-node {value} prune", f"--nproc-per-node {value}: it takes")
            for value in ("x", "1.5", "-1", "0")
        ),
        ("prune --nproc_per_node=0", "--nproc-per-node 0: it takes"),
        ("--nnodes abc prune", "--nnodes abc: it takes"),
        ("--nnodes 2:x prune", "--nnodes 2:x: it takes"),
        ("--max-restarts -1 prune", "--max-restarts -1: it takes"),
        ("-m", "-m needs a module"),
        ("-m os", "-m os is no module of minitron_megatron"),
        ("--nnodes 4:2 prune", "--nnodes 4:2: the most are fewer"),
        ("--nnodes 2 --node-rank 2 prune", "--node-rank 2 of --nnodes 2: nodes count from 0"),
        ("--nnodes 2:4 --node-rank 4 prune", "--node-rank 4 of --nnodes 4"),
        ("--nnodes 2 --master-port 65536 prune", "--master-port 65536: ports are below 65536"),
    ],
)
def test_how_to_start_is_checked_before_torchrun(words, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minitron", *words.split()])
    monkeypatch.setattr(main, "_start", lambda _: pytest.fail("torchrun was started"))
    monkeypatch.setattr(main, "ends_in_one_line", contextlib.nullcontext)
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
        main.main()


@pytest.mark.parametrize(
    ("words", "start", "rest"),
    [
        ("-- prune a=1", [], ["prune", "a=1"]),
        ("-- -- prune", [], ["prune"]),
        ("--nproc-per-node 2 -- prune", ["--nproc-per-node", "2"], ["prune"]),
        ("--standalone -- submit -- --nnodes 2", ["--standalone"], ["submit", "--", "--nnodes", "2"]),
        ("submit -- -- prune", [], ["submit", "--", "--", "prune"]),
    ],
)
def test_dashes_before_the_commands_name_stand_for_nothing(words, start, rest):
    assert main.split(words.split()) == (start, rest)


@pytest.fixture
def two_nodes(monkeypatch, tmp_path):
    """Run minitron on one of two nodes; gives the words with which torchrun was started there, None where it was not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(claims.SAID_EARLY, raising=False)
    monkeypatch.setattr(main, "ends_in_one_line", contextlib.nullcontext)

    def minitron(*words: str) -> list[str] | None:
        started = []
        monkeypatch.setattr(main, "_start", started.append)
        monkeypatch.setattr(sys, "argv", ["minitron", "--nnodes", "2", "--nproc-per-node", "3", *words])
        try:
            main.main()
        finally:
            said_early = os.environ.pop(claims.SAID_EARLY, None)
        monkeypatch.setenv(claims.SAID_EARLY, said_early or "")
        return started[0] if started else None

    return minitron


PRUNE = ("prune", "model=nowhere", "scores=x", "target.num_layers=1", "output=x")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("prune", "no_option=1"), "unknown option 'no_option'"),
        (("prune",), "prune needs model="),
        ((*PRUNE, "seed=x"), "seed=x must be a whole number"),
        ((*PRUNE, "parallel.world_size=3"), "parallel.world_size=3, but 6 were started"),
    ],
)
def test_a_mistake_in_the_words_ends_each_of_several_nodes_before_they_meet(two_nodes, words, says):
    with pytest.raises(UserError, match=says):
        two_nodes(*words)


def test_a_mistake_in_a_folder_is_said_before_the_nodes_meet_and_once(two_nodes, capsys):
    """Another node may have the folder, and is told by the ranks of this one: they are started, and say nothing again."""
    assert two_nodes(*PRUNE)[-len(PRUNE) :] == list(PRUNE)
    reason = "nowhere does not exist: give the output folder of the command that makes it"
    said = capsys.readouterr().err
    assert said == f"error: {reason} (on {HOST}: the job ends with it once all of its nodes are there)\n"
    mine = claims.Claim(1, HOST, 2, 1)
    claims._speak(claims.Reason(reason, 2), mine)
    assert capsys.readouterr().err == ""
    claims._speak(claims.Reason("another reason", 2), mine)
    assert capsys.readouterr().err == f"error: rank 1 on {HOST}: another reason\n"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x in the environment is no number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK= in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "zwei"}, "WORLD_SIZE=zwei"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=nothing"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
    ],
)
def test_an_environment_of_no_rank_is_said(variables, says, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    main.check_environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(says)):
        main.check_environment()


def test_a_signal_in_the_middle_of_an_import_raises_nothing_there(tmp_path):
    """torch's C++ code imports modules, and ends in an abort where one raises."""
    (tmp_path / "slow_one.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(5)\n"
        "except BaseException:\n    print('raised')\n    os.abort()\n"
    )
    code = "from minitron_megatron import ending; ending.handle_signals(); print('before'); import slow_one"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (143, "before\n") and done.stderr.startswith("stopped by SIGTERM")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("encoding", "advice"), [("ascii", "set LC_ALL=C.UTF-8"), ("utf-8", "rename it")])
def test_words_that_the_locale_has_no_letters_for_are_said(encoding, advice, monkeypatch):
    """As Python has them: bytes of an ü in a locale of ASCII, or a name that is not UTF-8."""
    monkeypatch.setattr(sys, "argv", ["prune", "model=ü"])
    main.check_environment()
    monkeypatch.setattr(sys, "argv", ["prune", "model=\udcc3\udcbc"])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(
        UserError,
        match=re.escape(rf"'model=\udcc3\udcbc' has bytes that are no letters in this locale ({encoding})")
        + f".*{advice}",
    ):
        main.check_environment()


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        (signal.SIGHUP, ending.NAMES[signal.SIGHUP], 129),
        (signal.SIGTERM, "SIGTERM", 143),
    ],
)
def test_a_launcher_without_processes_says_how_to_go_on(number, name, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchrun, "children", lambda _: [])
    with pytest.raises(SystemExit) as raised:
        torchrun.Launcher(tmp_path).pass_on(number, None)
    assert raised.value.code == status
    assert capsys.readouterr().err == f"stopped by {name}: no process was at work; {torchrun.SAVED_BEFORE}\n"


@pytest.mark.parametrize("value", ["gpu", "cpu", "auto"])
def test_torchruns_words_for_how_many_are_left_to_it(value):
    main.check_start(["--nproc-per-node", value, "--nnodes", "1:4"])


# --- Real jobs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Options of a distillation of tiny models, without its output."""
    folder = tmp_path_factory.mktemp("ending")
    teacher = imported(hf_model(), folder)
    student = imported(hf_model(1, hidden_size=16), folder / "student")
    data = data_folder(folder, teacher)
    return [str(word) for word in distill_words(teacher, student, data, "", steps=400)[1:-1]] + ["data.max_epochs=99"]


def failing(rank: int, where: str | int, what: str, words: list[str], output: Path) -> list[str]:
    script = str(ROOT / "tests" / "failing.py")
    return [script, "distill", str(rank), str(where), what, *words, f"output={output}"]


def job(start: list[str], command: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*start, *command], env={**environment(), "PYTHONPATH": str(ROOT), **variables}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def gone(*jobs: subprocess.Popen) -> Iterator[None]:
    """Nothing of them is left behind."""
    try:
        yield
    finally:
        for one in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "rank", "where", "what", "status", "says"),
    [
        (2, 1, "start", "mistake", 2, [f"error: rank 1 on {HOST}: {DAMAGED}"]),
        (2, 1, 3, "mistake", 2, [f"error: rank 1 on {HOST}: {DAMAGED}"]),
        (4, 3, "start", "bug", 1, [f"error: rank 3 on {HOST}: ValueError: a bug of this rank", "Traceback"]),
        (2, 1, 3, "kill", 137, [f"error: rank 1 on {HOST} was killed by SIGKILL: "]),
        (2, 0, 3, "exit", 3, [f"error: rank 0 on {HOST} ended with status 3 and did not say why"]),
    ],
    ids=["mistake at start", "mistake in training", "bug on the last rank", "killed", "without a word"],
)
def test_under_the_launcher_the_reason_is_all_that_is_said(words, tmp_path, processes, rank, where, what, status, says):
    running = job([*LAUNCHER, "--nproc-per-node", str(processes)], failing(rank, where, what, words, tmp_path / "x"))
    with gone(running):
        said = running.communicate(timeout=400)[1].splitlines()
    assert running.returncode == status, said
    assert [line[: len(start)] for line, start in zip(said, says, strict=False)] == says
    assert len(said) == len(says) or (what == "bug" and said[-1] == "ValueError: a bug of this rank"), said


@pytest.mark.slow
def test_under_plain_torchrun_the_reason_is_said_once(words, tmp_path):
    start = [TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port())]
    running = job(start, failing(1, 3, "mistake", words, tmp_path / "x"))
    with gone(running):
        said = running.communicate(timeout=400)[1]
    assert [line for line in said.splitlines() if "error:" in line] == [f"error: rank 1 on {HOST}: {DAMAGED}"]
    assert "gloo" not in said and said.count("Traceback") == 1, "torchrun's own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "where", "what", "status"),
    [(0, 3, "mistake", 2), (0, "start", "mistake", 2), (1, "start", "mistake", 2), (1, "start", "kill", 137)],
)
def test_two_nodes_say_it_once(words, tmp_path, rank, where, what, status):
    """The other one ends with it, although it waits for the rank that failed to come."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x"]
    start = [*LAUNCHER, *meet, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    nodes = [job(start, failing(rank, where, what, words, tmp_path / "x")) for _ in range(2)]
    with gone(*nodes):
        said = [line for node in nodes for line in node.communicate(timeout=400)[1].splitlines()]
    reason = f": {DAMAGED}" if what == "mistake" else " was killed by SIGKILL: "
    assert len(said) == 1 and said[0].startswith(f"error: rank {rank} on {HOST}{reason}"), said
    assert {node.returncode for node in nodes} == {status}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["launcher", "torchrun", "static"])
def test_a_job_that_torchrun_starts_again_goes_on(words, tmp_path, start):
    own = {
        "launcher": LAUNCHER,
        "torchrun": [TORCHRUN, "--standalone", "--local-addr", "127.0.0.1"],
        "static": [TORCHRUN, "--master-port", str(free_port())],
    }[start]
    again = ["--nproc-per-node", "2", "--max-restarts", "1"]
    output = tmp_path / "x"
    running = job(
        [*own, *again], failing(1, 3, "bug,nothing", [word.replace("steps=400", "steps=6") for word in words], output)
    )
    with gone(running):
        said = running.communicate(timeout=400)[1]
    assert running.returncode == 0 and (output / "model" / "manifest.yaml").is_file(), said
    assert said.count(f"error: rank 1 on {HOST}: ValueError: a bug of this rank") == 1


@pytest.mark.slow
def test_a_start_without_a_word_is_told_from_the_one_before_in_a_folder_of_logs(words, tmp_path):
    started = [*LAUNCHER, "--nproc-per-node", "2", "--max-restarts", "1", "--log-dir", str(tmp_path / "logs")]
    for what, status, second in (
        ("mistake,exit", 3, "ended with status 3 and did not say why"),
        ("mistake", 2, DAMAGED),
    ):
        running = job(started, failing(1, "start", what, words, tmp_path / "x"))
        with gone(running):
            said = running.communicate(timeout=400)[1].splitlines()
        assert running.returncode == status
        assert said[0] == f"error: rank 1 on {HOST}: {DAMAGED}" and len(said) == 2 and said[1].endswith(second), said


@pytest.mark.slow
def test_a_job_on_two_nodes_that_torchrun_starts_again_goes_on(words, tmp_path):
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--max-restarts", "1"]
    start = [*LAUNCHER, *meet, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    short = [word.replace("steps=400", "steps=6") for word in words]
    nodes = [job(start, failing(1, 3, "bug,nothing", short, tmp_path / "x")) for _ in range(2)]
    with gone(*nodes):
        said = "".join(node.communicate(timeout=400)[1] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert f"error: rank 1 on {HOST}: ValueError: a bug of this rank" in said


def wait_for_step(running: subprocess.Popen, output: Path, timeout: float = 400.0) -> None:
    deadline = time.monotonic() + timeout
    while not list((output / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 75), (signal.SIGTERM, 75)])
def test_a_signal_in_training_ends_with_what_is_saved(words, tmp_path, processes, number, status):
    output = tmp_path / "x"
    start = [sys.executable, "-m", "minitron_megatron"] + (["--nproc-per-node", "2"] if processes == 2 else [])
    running = job(start, ["distill", *words, f"output={output}"])
    with gone(running):
        wait_for_step(running, output)
        os.killpg(running.pid, number)  # as a terminal does
        said = running.communicate(timeout=400)[1].splitlines()
    assert running.returncode == status, said
    step = max(int(path.name.partition("_")[2]) for path in (output / "checkpoints").glob("step_*"))
    assert said[-1] == f"stopped at step {step} of 400, which is saved: the same command continues it"
    asked = ["Ctrl-C: this step is finished and saved first; a second Ctrl-C ends at once"] * (number == signal.SIGINT)
    assert said[:-1] == asked


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(words, tmp_path):
    output = tmp_path / "x"
    slow = failing(0, 3, "slow", [word.replace("save_interval=2", "save_interval=1") for word in words], output)
    running = job([sys.executable], slow)
    with gone(running):
        assert any(line == "slow\n" for line in running.stdout), running.communicate()
        os.killpg(running.pid, signal.SIGINT)
        assert running.stderr.readline().startswith("Ctrl-C: this step is finished and saved first")
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=120)[1].splitlines()
    assert running.returncode == 130
    assert said == ["stopped by Ctrl-C: step 3 is the last that is saved; the same command continues from there"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_while_a_command_starts_is_one_line(words, tmp_path, delay, number, status):
    running = job([sys.executable, str(ROOT / "launch" / "distill.py")], [*words, f"output={tmp_path / 'x'}"])
    with gone(running):
        # Python itself has to be up.
        while Path(f"/proc/{running.pid}/status").read_text().find("SigCgt:\t0000000000000") >= 0:
            time.sleep(0.005)
        time.sleep(delay)
        running.send_signal(number)
        said = running.communicate(timeout=120)[1]
    assert "Traceback" not in said
    if said:
        assert running.returncode == status
        assert said.startswith("stopped by ") and len(said.splitlines()) == 1 and "the same command" in said
    else:  # before the first line of this software
        assert running.returncode == -number
