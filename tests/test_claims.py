"""Who of a job's processes speaks: each condition of the claims by itself, in this process."""

import errno
import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron import claims, ending
from minitron_megatron.claims import Claim, Reason, claim_file, looks_for_others, number_of, read_claim, spans_nodes
from minitron_megatron.ending import Stopped, keeping, reason_of
from minitron_megatron.errors import UserError

HOST = socket.gethostname()
VARIABLES = f"""RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_WORLD_SIZE SLURM_STEP_NUM_NODES SLURM_NNODES MASTER_ADDR
    MASTER_PORT SLURM_JOB_ID SLURM_STEP_ID TORCHELASTIC_ERROR_FILE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    {claims.LAUNCHER} {claims.SAID_EARLY}""".split()


@pytest.fixture
def job(monkeypatch):
    """Sets the environment of a rank, which has nothing else of a job."""

    def set_to(**variables: object) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    set_to()
    monkeypatch.setattr(claims, "SECONDS_OF_PATIENCE", 0.0)
    monkeypatch.setattr(claims, "SECONDS_UNTIL_SAID", 0.0)
    monkeypatch.setattr(ending._State, "status", None)
    return set_to


MINE = Claim(1, HOST, 2, os.getpid(), text="why", when=100.0)


# What the environment says


@pytest.mark.parametrize(
    ("value", "number"), [("3", 3), ("-1", -1), ("", 7), ("x", 7), ("1.5", 7), (None, 7), ("0", 0)]
)  # fmt: skip
def test_a_variable_is_a_number_or_the_default(job, value, number):
    job(**({} if value is None else {"LOCAL_RANK": value}))
    assert number_of("LOCAL_RANK", 7) == number


@pytest.mark.parametrize(
    ("variables", "several"),
    [({}, False), ({"RANK": 0}, False), ({"RANK": 0, "WORLD_SIZE": 1}, False), ({"RANK": 0, "WORLD_SIZE": 2}, True),
     ({"WORLD_SIZE": 2}, False)],
)  # fmt: skip
def test_ranks_of_one_are_not_several(job, variables, several):
    job(**variables)
    assert claims.several() is several


@pytest.mark.parametrize(
    ("variables", "spans"),
    [
        ({}, False), ({"MASTER_ADDR": "localhost"}, False), ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({"MASTER_ADDR": "::1"}, False),
        ({"MASTER_ADDR": "node1"}, True), ({"GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "node1"}, False),
        ({"GROUP_WORLD_SIZE": 2}, True), ({"GROUP_WORLD_SIZE": 1, "SLURM_NNODES": 4}, False), ({"SLURM_NNODES": 2}, True),
        ({"SLURM_NNODES": 1, "MASTER_ADDR": "node1"}, False), ({"SLURM_STEP_NUM_NODES": 1, "SLURM_NNODES": 4}, False),
        ({"GROUP_WORLD_SIZE": "x"}, True),
    ],
)  # fmt: skip
def test_whether_a_job_is_on_several_nodes(job, variables, spans):
    job(**variables)
    assert spans_nodes() is spans


@pytest.mark.parametrize(
    ("variables", "looks"),
    [
        ({}, True), ({"LOCAL_RANK": 1}, True), ({"TORCHELASTIC_ERROR_FILE": "x"}, False),
        ({"TORCHELASTIC_ERROR_FILE": "x", "GROUP_WORLD_SIZE": 2}, True),
        ({"TORCHELASTIC_ERROR_FILE": "x", "GROUP_WORLD_SIZE": 2, "LOCAL_RANK": 1}, False),
        ({"TORCHELASTIC_ERROR_FILE": "x", "GROUP_WORLD_SIZE": 1, "LOCAL_RANK": 0}, False),
    ],
)  # fmt: skip
def test_of_a_node_with_torchrun_one_process_looks_for_others(job, variables, looks):
    job(**variables)
    assert looks_for_others() is looks


def test_the_file_of_a_claim_is_the_starts_or_the_jobs(job, tmp_path, monkeypatch):
    job(TORCHELASTIC_ERROR_FILE=tmp_path / "attempt_0" / "3" / "error.json")
    assert claim_file() == tmp_path / "attempt_0" / "first_failure.json"
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    names = set()
    for variables in (
        {}, {"MASTER_ADDR": "a.b"}, {"MASTER_PORT": 1}, {"WORLD_SIZE": 1}, {"SLURM_JOB_ID": 1}, {"SLURM_STEP_ID": 1},
    ):  # fmt: skip
        for folder in ("/a", "/b"):
            for words in (["x"], ["y"]):
                job(**variables)
                monkeypatch.setattr(claims, "_FOLDER", folder)
                monkeypatch.setattr(claims.sys, "orig_argv", words)
                assert claim_file() == claim_file()
                names.add(claim_file())
    assert len(names) == 6 * 4 and {one.parent for one in names} == {tmp_path / f"minitron-{os.getuid()}"}
    assert (tmp_path / f"minitron-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path / "none"))
    assert claim_file() is None


# Claims


@pytest.mark.parametrize(
    ("claim", "follows", "torchrun", "left"),
    [
        ({}, False, True, True),
        ({"text": "other", "when": 0.0, "rank": 1}, False, True, True),
        ({}, False, False, True),
        ({"text": "other"}, False, False, False),
        ({"rank": 1}, False, False, False),
        ({"silent": (0, 1)}, False, False, False),
        ({"silent": (0, 2)}, False, False, True),
        ({"when": 970.0}, False, False, True),
        ({"when": 969.9}, False, False, False),
        ({"when": 1000.0, "text": "other"}, True, False, True),
        ({"when": 999.9}, True, False, False),
        ({"rank": 1}, True, False, False),
    ],
)
def test_to_which_claim_a_rank_leaves_the_word(job, monkeypatch, claim, follows, torchrun, left):
    """With torchrun to any; without it to one of the same reason, or that it follows from, of its own time, and once."""
    monkeypatch.setattr(claims, "_BEGAN", 1000.0)
    job(**({"TORCHELASTIC_ERROR_FILE": "x"} if torchrun else {}))
    found = Claim(**{"rank": 0, "host": HOST, "status": 2, "pid": 1, "text": "why", "when": 1000.0, **claim})
    assert claims._is_of_my_job(found, Reason("why", 2, follows=follows), MINE) is left


def test_a_claim_is_written_once_and_says_who_was_silent_for_it(job, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEGAN", 100.0)
    file, why = tmp_path / "claim.json", Reason("why", 2)
    assert read_claim(file) is None and read_claim(None) is None
    assert claims._claim(file, why, MINE) and read_claim(file) == MINE
    other = replace(MINE, rank=2, pid=5)
    assert not claims._claim(file, why, other) and read_claim(file) == replace(MINE, silent=(2,))
    # Again: an earlier start of the job, or a reason of one's own.
    assert claims._claim(file, why, other) and read_claim(file) == other
    assert claims._claim(file, Reason("another", 1), replace(MINE, rank=3, text="another"))
    assert read_claim(file).rank == 3
    for text in ("", "{", "[]", json.dumps({**asdict(MINE), "more": 1}), '{"silent": 3}'):
        file.write_text(text)
        assert read_claim(file) is None
    job(TORCHELASTIC_ERROR_FILE="x")
    file.unlink()
    assert claims._claim(file, why, MINE) and not claims._claim(file, why, other) and read_claim(file) == MINE


def test_who_marks_a_claim_as_said_is_who_has_it(job, tmp_path):
    file = tmp_path / "claim.json"
    file.write_text(json.dumps(asdict(replace(MINE, silent=(4,)))))
    first = Claim(7, "far", 3, 9, text="first", when=5.0)
    for other in (replace(MINE, rank=2), replace(MINE, pid=MINE.pid + 1)):
        claims._mark_as_said(file, other, first)
        assert not read_claim(file).said
    claims._mark_as_said(file, MINE, first)
    assert read_claim(file) == replace(first, said=True, when=MINE.when, silent=(4,))
    claims._mark_as_said(None, MINE, first)
    file.unlink()
    claims._mark_as_said(file, MINE, MINE)
    assert read_claim(file) == replace(MINE, said=True)


@pytest.mark.parametrize(
    ("there", "first", "status", "speaks"),
    [
        ({"said": True, "status": 5}, None, 5, False),
        ({"said": False, "status": 5}, None, 2, True),
        (None, {"said": True, "status": 7}, 2, True),
        (None, None, 2, True),
    ],
)
def test_who_leaves_the_word_ends_with_the_firsts_status_once_it_is_said(
    job, tmp_path, capsys, there, first, status, speaks
):
    file = tmp_path / "claim.json"
    if there:
        file.write_text(json.dumps(asdict(replace(MINE, rank=0, **there))))
    first = replace(MINE, **first) if first else None
    assert claims._wait_until_said(file, first, Reason("why", 2), MINE) == status
    assert capsys.readouterr().err == (f"error: rank 1 on {HOST}: why\n" if speaks else "")


def test_a_first_one_that_is_gone_is_not_waited_for(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "SECONDS_UNTIL_SAID", 10.0)
    file = tmp_path / "claim.json"
    file.write_text(json.dumps(asdict(replace(MINE, rank=0, pid=2**22 + 1))))
    began = time.monotonic()
    assert claims._wait_until_said(file, None, Reason("why", 2), MINE) == 2 and "why" in capsys.readouterr().err
    assert time.monotonic() - began < 8
    said = threading.Timer(0.2, lambda: file.write_text(json.dumps(asdict(replace(MINE, rank=0, status=9, said=True)))))
    file.write_text(json.dumps(asdict(replace(MINE, rank=0))))
    said.start()
    assert claims._wait_until_said(file, None, Reason("why", 2), MINE) == 9 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (Reason("why", 2), f"error: rank 1 on {HOST}: why\n"),
        (Reason("why", 1, trace="Traceback\n"), f"error: rank 1 on {HOST}: why\nTraceback\n"),
        (Reason("by SIGTERM: kept", 143, "stopped"), f"stopped by SIGTERM: kept (rank 1 on {HOST})\n"),
    ],
)
def test_a_rank_says_who_it_is(job, capsys, reason, says):
    claims._speak(reason, MINE)
    assert capsys.readouterr().err == says


def test_one_of_several_speaks_and_the_next_is_silent(job, tmp_path, capsys):
    """On one node, whose first rank has taken the claim and said its reason."""
    job(RANK=1, WORLD_SIZE=2, TORCHELASTIC_ERROR_FILE=tmp_path / "attempt_0" / "1" / "error.json")
    (tmp_path / "attempt_0").mkdir()
    assert claims.as_one_of_several(Reason("why", 2)) == 2
    assert capsys.readouterr().err == f"error: rank 1 on {HOST}: why\n"
    found = read_claim(tmp_path / "attempt_0" / claims.CLAIM)
    assert (found.rank, found.said, found.status, found.text, found.pid) == (1, True, 2, "why", os.getpid())
    for follows in (False, True):
        assert claims.as_one_of_several(Reason("another", 1, follows=follows)) == 2
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("launcher", "says"), [(True, ""), (False, "another process of this node was killed")])
def test_who_follows_one_that_is_gone_says_so_unless_the_launcher_does(
    job, tmp_path, monkeypatch, capsys, launcher, says
):
    file = tmp_path / "attempt_0" / "1" / "error.json"
    job(RANK=1, WORLD_SIZE=2, TORCHELASTIC_ERROR_FILE=file, **({claims.LAUNCHER: tmp_path} if launcher else {}))
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setattr(claims, "_a_neighbour_is_gone", lambda: True)
    assert claims.as_one_of_several(Reason("lost a peer", 3, follows=True)) == (3 if launcher else 1)
    assert says in (said := capsys.readouterr().err) and bool(said) is not launcher


@pytest.mark.parametrize(
    ("variables", "there", "gone"),
    [({}, 0, False), ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2}, 2, False),
     ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2}, 1, True), ({"LOCAL_WORLD_SIZE": 2}, 1, False),
     ({"TORCHELASTIC_RUN_ID": "x"}, 1, False), ({"TORCHELASTIC_RUN_ID": "x"}, 0, True)],
)  # fmt: skip
def test_a_neighbour_is_gone_where_torchrun_has_fewer_than_it_started(job, monkeypatch, variables, there, gone):
    from minitron_megatron.parallel import torchrun

    job(**variables)
    monkeypatch.setattr(torchrun, "children", lambda of: [0] * there if of == os.getppid() else [])
    assert claims._a_neighbour_is_gone() is gone


@pytest.mark.parametrize("first", [None, "mine", "other"])
def test_of_several_nodes_the_first_in_the_store_speaks(job, tmp_path, monkeypatch, capsys, first):
    job(RANK=1, WORLD_SIZE=2, GROUP_WORLD_SIZE=2, TORCHELASTIC_ERROR_FILE=tmp_path / "attempt_0" / "1" / "error.json")
    (tmp_path / "attempt_0").mkdir()
    other = Claim(5, "far", 9, 77, text="the first reason", when=3.0)

    def ask(mine: str, found: list[str]) -> None:
        found += [] if first is None else [mine if first == "mine" else json.dumps(asdict(other))]

    monkeypatch.setattr(claims, "_ask_store", ask)
    assert claims.as_one_of_several(Reason("why", 2)) == (9 if first == "other" else 2)
    assert capsys.readouterr().err == ("" if first == "other" else f"error: rank 1 on {HOST}: why\n")
    kept = read_claim(tmp_path / "attempt_0" / claims.CLAIM)
    assert kept.said and (kept.rank, kept.text) == ((5, other.text) if first == "other" else (1, "why"))


def test_the_key_of_a_start_and_the_address_of_the_job(job, tmp_path):
    assert claims._key_of_start().endswith("/0")
    job(TORCHELASTIC_RESTART_COUNT=2)
    assert claims._key_of_start().endswith("/2")
    where = {"MASTER_ADDR": "a", "MASTER_PORT": "5", "TORCHELASTIC_RESTART_COUNT": "1"}
    for variables, left in (
        ({"GROUP_WORLD_SIZE": 2}, True), ({"GROUP_WORLD_SIZE": 2, "LOCAL_RANK": 1}, False), ({"GROUP_WORLD_SIZE": 1}, False),
    ):  # fmt: skip
        job(**where, **variables, **{claims.LAUNCHER: tmp_path}, RANK=0)
        claims.leave_address()
        assert (tmp_path / claims.MEETING).exists() is left
        if left:
            assert json.loads((tmp_path / claims.MEETING).read_text()) == where
            (tmp_path / claims.MEETING).unlink()
    job(**where, GROUP_WORLD_SIZE=2)
    claims.leave_address()


def test_the_launcher_speaks_for_a_process_that_was_killed_where_the_ranks_meet(job, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(claims, "_first_of_job", lambda mine: asked.append((mine, os.environ.get("MASTER_PORT"))))
    claims.speak_for(3, 137, "was killed", tmp_path)
    (tmp_path / claims.MEETING).write_text('{"MASTER_ADDR": "a", "MASTER_PORT": 5, "other": 1}')
    monkeypatch.setenv("MASTER_PORT", "1")
    claims.speak_for(3, 137, "was killed", tmp_path)
    ((mine, port),) = asked
    assert (mine.rank, mine.status, mine.text, mine.said, mine.pid, port) == (
        3,
        137,
        "was killed",
        True,
        os.getpid(),
        "5",
    )
    assert "other" not in os.environ


# Why a process ends


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("a\nmistake"), Reason("a\\nmistake", 2)),
        (OSError(errno.ENOSPC, "No space left"),
         Reason("No space left, where this was writing: free some and run the same command again", 2)),
        (OSError(errno.EDQUOT, "Quota"), Reason("Quota, where this was writing: free some and run the same command again", 2)),
        *(
            (OSError(number, "Odd", "a"), Reason("a: Odd: mend it or choose another place, and run the same command again", 2))
            for number in (
                errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS,
                errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
            )
        ),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_a_line(job, error, reason):
    assert reason_of(error) == reason and not ending.is_a_bug(error)


@pytest.mark.parametrize(
    "error", [ValueError("x" * 300), OSError(errno.EIO, "Odd", "a"), OSError(errno.ENOENT, "Odd"), OSError("odd")]
)
def test_anything_else_is_a_bug_with_its_traceback(job, error):
    found = reason_of(error)
    assert (found.status, found.word, found.follows) == (1, "error", False) and type(error).__name__ in found.trace
    assert found.text == f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" and ending.is_a_bug(error)


PEER = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer"


@pytest.mark.parametrize(
    ("error", "follows", "traced"),
    [
        (RuntimeError(PEER), True, False), (RuntimeError("connection reset by a server of data"), True, True),
        (ConnectionError("Broken pipe"), True, True), (ValueError(PEER), False, True), (RuntimeError("nccl is odd"), False, True),
        (ConnectionResetError("connect() timed out"), True, True), (RuntimeError("NCCL: remote process exited"), True, False),
    ],
)  # fmt: skip
def test_a_connection_that_is_gone_follows_from_another_process(job, error, follows, traced):
    job(RANK=0, WORLD_SIZE=2)
    found = reason_of(error)
    assert (found.follows, bool(found.trace), found.status) == (follows, traced, 1)
    assert found.text.startswith("lost another process of the job: ") is follows
    job()
    assert not reason_of(error).follows


def test_the_reason_is_looked_for_in_what_an_error_came_from(job):
    job(RANK=0, WORLD_SIZE=2)
    for kind, found in (("cause", True), ("context", True), ("none", False)):
        try:
            try:
                raise RuntimeError(PEER)
            except RuntimeError as first:
                if kind == "cause":
                    raise ValueError("second") from first
                if kind == "none":
                    raise ValueError("second") from None
                raise ValueError("second")  # noqa: B904
        except ValueError as error:
            assert reason_of(error).follows is found
    circle = ValueError("a")
    circle.__context__ = other = ValueError("b")
    other.__context__ = circle
    assert reason_of(circle).text == "ValueError: a"


@pytest.mark.parametrize(
    ("number", "variables", "told", "status", "follows"),
    [
        (signal.SIGTERM, {"RANK": 0, "WORLD_SIZE": 2}, False, 143, True),
        (signal.SIGTERM, {"RANK": 0, "WORLD_SIZE": 2}, True, 143, False),
        (signal.SIGTERM, {}, False, 143, False),
        (signal.SIGINT, {"RANK": 0, "WORLD_SIZE": 2}, False, 130, False),
        (signal.SIGUSR1, {"RANK": 0, "WORLD_SIZE": 2}, False, 75, False),
    ],
)
def test_a_signal_says_what_is_kept_and_may_be_torchruns(job, tmp_path, number, variables, told, status, follows):
    job(**variables, **{claims.LAUNCHER: tmp_path})
    if told:
        (tmp_path / claims.TOLD).touch()
    with keeping(lambda: "outer"), keeping(lambda: "inner is kept"):
        stopped = Stopped(number)
    assert ending._State.kept[-1]() == ending.NOTHING_KEPT
    wrapped = RuntimeError("in a library")
    wrapped.__cause__ = stopped
    found = reason_of(wrapped)
    assert found == Reason(f"by {ending.NAMES[number]}: inner is kept", status, "stopped", follows=follows)


def test_what_was_kept_first_is_said_again_once_the_inner_work_is_over(job):
    with keeping(outer := lambda: "outer"):
        with keeping(lambda: "inner"):
            assert "inner" in str(Stopped(signal.SIGINT))
        assert "outer" in str(Stopped(signal.SIGINT)) and ending._State.kept[-1] is outer


def test_a_reason_is_said_once_and_its_status_stays(job, capsys):
    assert ending.report(UserError("first")) == 2 and ending.report(ValueError("second")) == 2
    assert capsys.readouterr().err == "error: first\n" and ending._State.status == 2
    ending._State.status = None
    ending.report(Stopped(signal.SIGINT))
    assert capsys.readouterr().err == f"stopped by Ctrl-C: {ending.NOTHING_KEPT}\n" and ending._State.status == 130


@pytest.mark.parametrize(("rank", "says"), [(None, "stopped here\n"), (0, "stopped here\n"), (1, "")])
def test_ranks_that_stop_together_say_so_once(job, capsys, rank, says):
    job(**({} if rank is None else {"RANK": rank, "WORLD_SIZE": 2}))
    with pytest.raises(SystemExit) as raised:
        ending.stop_together("here", 75)
    assert (raised.value.code, ending._State.status, capsys.readouterr().err) == (75, 75, says)


@pytest.mark.parametrize(("handles", "ranks", "said"), [(True, 2, True), (False, 2, False), (True, 1, False)])
def test_a_rank_says_its_reason_before_its_groups_end(job, monkeypatch, handles, ranks, said):
    reported = []
    monkeypatch.setattr(ending._State, "handles", handles)
    monkeypatch.setattr(ending, "report", reported.append)
    job(RANK=0, WORLD_SIZE=ranks)
    error = UserError("x")
    with pytest.raises(UserError), ending.said_at_once():
        raise error
    assert reported == [error] * said


def test_the_last_line_of_our_own_is_named(job):
    job(RANK=0, WORLD_SIZE=2)
    try:
        number_of(SimpleNamespace(), 1)
    except TypeError as error:
        line = ending._last_own_line(error)
    assert line.startswith(" in claims.py, line ") and ending._last_own_line(ValueError()) == ""
    where = int(line.rpartition(" ")[2])
    assert Path(claims.__file__).read_text().splitlines()[where - 1].strip() == "return int(os.environ[variable])"
