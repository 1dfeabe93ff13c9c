"""The mutation run itself: its list follows the code, its table has every file, and a run goes on where it was."""

import ast
import contextlib
import json

import pytest

from tests.mutants import __main__ as command
from tests.mutants.generate import generated
from tests.mutants.mutant import KINDS, Mutant, StaleError, listed, problems
from tests.mutants.rooms import OF_ALL, OF_NONE, ROOMS, ROOT, owner, product
from tests.mutants.workshop import DEFAULT, SLOW, Outcome, Workshop, workshop

PLAIN_TEXT = "minitron_megatron/plain_text.py"


def test_every_listed_mutant_can_be_made():
    """A list that the code has left behind is an error, as in `make mutants`: put the place as it is now, or leave it out."""
    assert problems(listed()) == []


def test_the_list_goes_through_all_rooms_and_kinds():
    mutants = listed()
    assert len(mutants) >= 150 and len({mutant.name for mutant in mutants}) == len(mutants)
    rooms = {mutant.room for mutant in mutants}
    assert set(ROOMS) - rooms <= {"benchmark"}
    assert {mutant.kind for mutant in mutants} == set(KINDS) - {"generated"}
    endings = {mutant.file.rpartition(".")[2] for mutant in mutants}
    assert {"py", "sh", "jinja", "html", "yaml"} <= endings


def test_every_file_of_the_product_has_tests_and_every_test_file_is_somebodys():
    assert [file for file in product() if owner(file) is None] == []
    named = {name for files in ROOMS.values() for tests in files.values() for name in tests.split()} | {
        *OF_ALL,
        *OF_NONE,
    }
    assert named == {file.stem.removeprefix("test_") for file in (ROOT / "tests").glob("test_*.py")}
    files = product()
    unused = [s for room in ROOMS.values() for s in room if s and not any(f.startswith(beginning(s)) for f in files)]
    assert [start for start in unused if start not in ("/conf/", "/docker/")] == []


def beginning(start):
    return start.removeprefix("/") if start.startswith("/") else f"minitron_megatron/{start}"


def test_the_longest_beginning_owns_a_file():
    assert owner("minitron_megatron/prune/live.py").tests[0] == "tests/test_live.py"
    assert owner("minitron_megatron/prune/prune.py").room == owner("minitron_megatron/prune/live.py").room == "prune"
    assert owner("slurm/common.sh").tests == ("tests/test_restarts.py", "tests/test_submit.py", "tests/test_slurm.py")
    assert owner("tests/pool.py") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"before": "no such text"}, "is there 0 times instead of once"),
        ({"before": "text"}, "times instead of once"),
        ({"after": "import re"}, "changes nothing"),
        ({"kind": "odd"}, "odd is not one of block"),
        ({"held_by": "plain_text::test_none"}, "there is no test plain_text::test_none"),
        ({"file": "README.md", "before": "# "}, "instead of once"),
    ],
)
def test_a_stale_entry_is_said(change, says):
    given = {"bug": "b", "file": PLAIN_TEXT, "before": "import re", "after": "import sys", "kind": "bound"}
    assert problems([Mutant(**given)]) == []
    (said,) = problems([Mutant(**{**given, **change})])
    assert says in said


def test_drawn_mutants_follow_the_seed_and_are_programs():
    files = ["minitron_megatron/train/guard.py", "minitron_megatron/candidates/halving.py"]
    drawn = generated(files, 1, 60)
    assert drawn == generated(files, 1, 60) != generated(files, 2, 60)
    assert {mutant.file for mutant in drawn} == set(files) and drawn[:10] == generated(files, 1, 10)
    for mutant in drawn:
        text = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.changed(text))) != ast.dump(ast.parse(text)), mutant
    with pytest.raises(StaleError, match="another now"):
        drawn[0].changed("# shorter")


class Shop:
    """A workshop whose tests notice some bugs: by the bug, (names, marked) to failed tests."""

    def __init__(self, notices, unsound=()):
        self.notices, self.unsound, self.asked, self.bug = notices, list(unsound), [], None

    @contextlib.contextmanager
    def having(self, mutant):
        self.bug = mutant.bug
        yield
        self.bug = None

    def tests(self, names, *, marked, limit, every=False):
        if every:
            return Outcome([name for name in names if name in self.unsound], None, 1.0)
        self.asked.append((self.bug, marked))
        return Outcome(*self.notices.get((self.bug, marked), ([], None)), 1.0)


@pytest.fixture
def trying(tmp_path, monkeypatch):
    """`trying(shop, *words)`: the command's exit status, and the results by bug."""
    given = {"file": PLAIN_TEXT, "before": "import re", "kind": "bound"}
    mutants = [Mutant(bug=bug, after=f"import {bug}", **given) for bug in "abcd"]
    monkeypatch.setattr(command, "listed", lambda: mutants)

    def run(shop, *words):
        monkeypatch.setattr(command, "workshop", lambda: contextlib.nullcontext(shop))
        file = tmp_path / "results.jsonl"
        status = command.run(command.parse([f"results={file}", *words]))
        lines = map(json.loads, file.read_text().splitlines())
        return status, {line["bug"]: (line["by"], line["slow"]) for line in lines if "bug" in line}

    return run


NOTICES = {
    ("a", DEFAULT): (["test_a"], None),
    ("b", SLOW): (["test_b"], None),
    ("c", DEFAULT): ([], "no end after 1 s"),
}


def test_a_run_goes_on_from_its_results(trying, capsys):
    """Survivors are tried again where it is asked for, or where slow tests had not been; a hang is noticed."""
    shop = Shop(NOTICES)
    status, found = trying(shop)
    assert status == 0 and found["a"] == ("test_a", False) and found["b"] == found["d"] == (None, False)
    assert found["c"] == ("no end: no end after 1 s", False)
    assert "2 noticed by default tests (50.0 %); 2 survived" in capsys.readouterr().out
    again = Shop(NOTICES)
    assert trying(again)[1] == found and again.asked == []
    slow = Shop(NOTICES)
    _, found = trying(slow, "slow=true")
    assert slow.asked == [("b", DEFAULT), ("b", SLOW), ("d", DEFAULT), ("d", SLOW)]
    assert found["b"] == ("test_b", True) and found["d"] == (None, True)
    assert "1 more by slow ones; 1 survived (75.0 % noticed)" in capsys.readouterr().out
    survivors = Shop({})
    trying(survivors, "again=true")
    assert survivors.asked == [("d", DEFAULT)]


def test_a_test_that_fails_without_a_bug_is_told(trying, capsys):
    status, _ = trying(Shop(NOTICES, unsound=["test_a"]))
    assert status == 1 and "test_a fails without a bug too" in capsys.readouterr().err


def test_options_that_are_none_are_told(trying):
    for word in ("rooms=prune", "slow"):
        with pytest.raises(SystemExit, match=f"{word} is not an option"):
            command.parse([word])
    assert command.parse(["room=prune", "seed=3", "slow=true", "limit=9"]) == command.Options(
        "prune", seed=3, slow=True, limit=9.0
    )


@pytest.mark.slow
def test_a_bug_in_the_copy_is_noticed_there(tmp_path):
    """By a test, by a file that cannot be read, or by the time; the same tests pass before and afterwards."""
    given = {"file": PLAIN_TEXT, "kind": "bound"}
    tests = {"marked": DEFAULT, "limit": 120.0}
    escaping = Mutant("b", before="if odd[0] in keep else", after="if True else", **given)
    broken = Mutant("b", before='"""The text in one line, whatever is in it."""', after='"""', **given)
    hangs = Mutant("b", before="import re\n", after="import re, time\ntime.sleep(99)\n", **given)
    file = ["tests/test_plain_text.py"]
    with workshop() as shop:
        assert isinstance(shop, Workshop) and shop.tests(file, **tests)[:2] == ([], None)
        with shop.having(escaping):
            assert shop.tests(file, **tests).failed[0].startswith("tests/test_plain_text.py::test_text_is_text")
        with shop.having(broken):
            assert shop.tests(file, **tests)[:2] != ([], None)
        with shop.having(hangs):
            assert shop.tests(file, marked=DEFAULT, limit=5.0)[:2] == ([], "no end after 5 s")
        assert shop.tests([f"{file[0]}::test_text_is_text_in_progress_and_logs"], **tests, every=True)[:2] == ([], None)
