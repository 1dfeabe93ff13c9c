"""What `precision=auto` is decided by, part by part: products that are counted, processors, what is kept and what is told."""

import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.automatic import Choice
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import precision
from minitron_megatron.parallel.precision import DTYPES, PRODUCTS, Products, asks_machine, auto_dtype, keep, recalled


def choice(dtype: str, why: str = "since") -> Choice:
    return Choice("precision", dtype, why)


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name, value in (("choice", None), ("used", None), ("ahead", False)):
        monkeypatch.setattr(precision._Job, name, value)


def rates(gain: float) -> dict[str, dict[str, float]]:
    return {"float32": dict.fromkeys(PRODUCTS, 50.0), "bfloat16": dict.fromkeys(PRODUCTS, 50.0 * gain)}


# Products


def test_a_gain_is_of_the_time_of_all_three_products():
    """4, 5 and 1 in float32, 2, 2.5 and 4 in bfloat16: 10 to 8.5."""
    seconds = {"float32": (4.0, 5.0, 1.0), "bfloat16": (2.0, 2.5, 4.0)}
    given = {dtype: {n: 1 / s for n, s in zip(PRODUCTS, of, strict=True)} for dtype, of in seconds.items()}
    assert Products(given, "m").gain == pytest.approx(10 / 8.5)
    assert str(Products(rates(1.5), "a CPU")) == (
        "products in bfloat16 are 1.5 times as fast as in float32 on this machine (a CPU)"
    )


def test_products_are_timed_by_one_thread_and_counted_in_gflops(monkeypatch):
    set_threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    seconds = {"float32": dict(zip(PRODUCTS, (1.0, 2.0, 4.0), strict=True)), "bfloat16": dict.fromkeys(PRODUCTS, 0.5)}
    monkeypatch.setattr(precision, "_least_seconds", lambda sizes: seconds)
    found = precision.measure((1000, 2000, 500))
    assert list(found["float32"].values()) == [2.0, 1.0, 0.5] and set(found["bfloat16"].values()) == {4.0}
    assert set_threads == [1, 5]
    monkeypatch.setattr(precision, "_least_seconds", lambda sizes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        precision.measure((1, 1, 1))
    assert set_threads == [1, 5, 1, 5]


@pytest.mark.parametrize(("limit", "turns"), [(0.0, 2), (12.0, 3), (1e9, 6)])
def test_the_least_times_count_of_two_turns_at_least_and_six_at_most(monkeypatch, limit, turns):
    """Dtypes take turns; it ends when it has taken long."""
    now, ran = [0.0], []

    def seconds(work):
        ran.append(work)
        now[0] += 1.0
        return {0: 5.0, 1: 3.0}.get((len(ran) - 1) // 6, 4.0)

    monkeypatch.setattr(precision, "_SECONDS", limit)
    monkeypatch.setattr(precision, "_products", lambda sizes, dtype: [(dtype, name) for name in PRODUCTS])
    monkeypatch.setattr(precision, "_seconds", seconds)
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: 100.0 + now[0]))
    found = precision._least_seconds((1, 1, 1))
    assert found == {dtype: dict.fromkeys(PRODUCTS, 3.0) for dtype in DTYPES}
    assert ran == [(dtype, name) for name in PRODUCTS for dtype in DTYPES] * turns


def test_products_are_those_of_a_linear_layer(monkeypatch):
    found = [work() for work in precision._products((3, 5, 2), "float32")]
    assert [tuple(one.shape) for one in found] == [(3, 2), (3, 5), (2, 5)]
    again = [work() for work in precision._products((3, 5, 2), "float32")]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert {work().dtype for work in precision._products((3, 5, 2), "bfloat16")} == {torch.bfloat16}
    clock, done = iter([2.0, 2.5, 3.0, 3.0]), []
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert [precision._seconds(lambda: done.append(1)) for _ in range(2)] == [0.5, 1e-9] and done == [1, 1]


@pytest.mark.parametrize(("small", "asked"), [(0.5, 1), (0.51, 2), (1.99, 2), (2.0, 1)])
def test_larger_products_are_asked_where_small_ones_say_no_clear_word(tmp_path, monkeypatch, small, asked):
    measured = []
    monkeypatch.setattr(precision, "_UNCLEAR", (0.5, 2.0))
    monkeypatch.setattr(precision, "measure", lambda sizes: measured.append(sizes) or rates(small))
    monkeypatch.setattr(precision, "_cache_folder", lambda: tmp_path / "a" / "b")
    monkeypatch.setattr(precision, "_machine", lambda: ("a CPU", "all of it"))
    found = precision.products()
    assert measured == [precision.SMALL, precision.LARGE][:asked] and found == Products(rates(small), "a CPU")
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert file.name == f"products-{hashlib.sha256(b'all of it').hexdigest()[:16]}.json"
    wanted = {"of": "all of it", "gflops": rates(small), "machine": "a CPU"}
    assert file.read_text() == json.dumps(wanted, indent=1) + "\n"
    assert precision.products() == found and len(measured) == asked


@pytest.mark.parametrize(("rate", "sound"), [(1e9, False), (9e8, True), (0, False), (1e-9, True)])
def test_rates_that_cannot_be_are_no_rates(tmp_path, rate, sound):
    """Each one of them."""
    given = rates(1.0)
    given["bfloat16"]["forward"] = rate
    (tmp_path / "f").write_text(json.dumps({"of": "k", "gflops": given, "machine": "m"}))
    assert precision._read(tmp_path / "f", "k") == (Products(given, "m") if sound else None)
    assert precision._read(tmp_path / "f", "other") is None and precision._read(None, "k") is None


# The machine

CPUINFO = """processor : 0
vendor_id : AuthenticAMD
model name : AMD EPYC
flags : avx avx2

processor : 1
model name : another
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [(CPUINFO, "AMD EPYC"), ("Features : fp asimd\n", "arm"), ("", "arm"), (None, "arm")],
)
def test_a_processor_is_known_by_its_name_and_what_it_can_do(monkeypatch, text, name):
    """Of the first of its cores."""

    def read(self, encoding, errors):
        if text is None:
            raise OSError
        assert str(self) == "/proc/cpuinfo"
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(precision.platform, "processor", lambda: "")
    monkeypatch.setattr(precision.platform, "machine", lambda: "arm")
    kind = {CPUINFO: "AuthenticAMD    avx avx2", "Features : fp asimd\n": "    fp asimd"}.get(text, "    ")
    assert precision.processor() == (name, hashlib.sha256(kind.encode()).hexdigest()[:16])
    monkeypatch.setattr(precision.platform, "processor", lambda: "x86_64")
    assert precision.processor()[0] == (name if text == CPUINFO else "x86_64")


@pytest.mark.parametrize(
    ("given", "found"),
    [("/x", "/x/minitron_megatron"), ("x", "/home/.cache/minitron_megatron"), (None, "/home/.cache/minitron_megatron")],
)
def test_what_is_measured_is_kept_in_the_users_cache(monkeypatch, given, found):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setattr(Path, "home", lambda: Path("/home"))
    assert precision._cache_folder() == Path(found)


# What is kept and told

SLOW = "in which {} was begun; since, so another output= with precision=fp32 would be faster"


@pytest.mark.parametrize(
    ("told", "kept", "begun", "machine", "found", "why"),
    [
        (None, None, False, "float32", "float32", "since"),
        (None, None, False, "bfloat16", "bfloat16", "since"),
        (None, None, False, None, None, None),
        (None, None, True, "float32", "bfloat16", SLOW),
        (None, None, True, "bfloat16", "bfloat16", "since"),
        (None, "bfloat16", True, "float32", "bfloat16", SLOW),
        (None, "float32", True, "bfloat16", "float32", "in which {} was begun; since"),
        (None, "float32", True, None, "float32", "in which {} was begun"),
        ("float32", "bfloat16", True, "bfloat16", "float32", "in which {} was begun; since"),
        ("bfloat16", "odd", True, "bfloat16", "bfloat16", "since"),
    ],
)  # fmt: skip
def test_what_goes_on_keeps_what_it_began_with(tmp_path, told, kept, begun, machine, found, why):
    """What it says itself before the file beside it; nothing that can be continued, and the machine decides."""
    file = tmp_path / "precision.json"
    if kept:
        file.write_text(json.dumps({"computed_in": kept}))
    before = file.read_text() if kept else None
    precision._Job.choice = machine and choice(machine)
    keep(file, begun=lambda: begun, told=lambda: told)
    assert precision._Job.choice == (found and choice(found, why.format(tmp_path)))
    if kept is not None or told is not None:
        assert (file.read_text() if file.exists() else None) == before
    elif begun or machine is None:
        assert file.read_text() == '{"computed_in": "bfloat16"}\n'
    else:
        assert file.read_text() == json.dumps({"computed_in": machine, "why": "since"}) + "\n"


def test_a_record_that_cannot_be_is_refused(tmp_path):
    file = tmp_path / "precision.json"
    for text in ('{"computed_in": "float16"}', "{}", "[]", "{"):
        file.write_text(text)
        for read in (lambda: keep(file, begun=lambda: True), lambda: recalled(file).__enter__()):
            with pytest.raises(
                UserError, match=r"precision\.json cannot be read .* which says what this was computed in"
            ):
                read()


@pytest.mark.parametrize(
    ("told", "kept", "found"),
    [
        (None, None, "stored"),
        (None, "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float32", None, "float32"),
    ],
)
def test_before_a_job_auto_is_what_it_goes_on_in_and_nothing_is_said(tmp_path, caplog, told, kept, found):
    file = tmp_path / "precision.json"
    if kept:
        file.write_text(json.dumps({"computed_in": kept}))
    caplog.set_level(logging.INFO)
    with recalled(file, told):
        assert auto_dtype("bfloat16") == ("bfloat16" if found == "stored" else found)
        assert auto_dtype("float32") == "float32" and precision._Job.ahead
    assert not precision._Job.ahead and precision._Job.choice is None and not caplog.records


def test_a_job_says_once_what_it_computes_in_and_notes_it(caplog):
    caplog.set_level(logging.INFO)
    assert precision.record() == {} and precision.of_bfloat16() == "bfloat16"
    precision._Job.choice = choice("float32", "since it is faster")
    assert auto_dtype("float32") == "float32" and precision.record() == {}
    assert [auto_dtype("bfloat16") for _ in range(2)] == ["float32"] * 2 and precision.of_bfloat16() == "float32"
    assert caplog.messages == ["precision=auto: computing in float32, since it is faster"]
    assert precision.record() == {"computed_in": "float32", "why": "since it is faster"}
    assert asks_machine("auto", "float32", "bfloat16") and not asks_machine("auto", "float32")
    assert not asks_machine("bf16", "bfloat16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_job_settles_it_on_cpus_alone_and_what_was_before_comes_back(monkeypatch, device):
    """Threads are set on every rank: whether a rank has measured must not show in its sums."""
    set_threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.setattr(precision, "of_this_machine", lambda: choice("float32"))
    precision._Job.choice, precision._Job.used = choice("bfloat16"), choice("bfloat16")
    with pytest.raises(ZeroDivisionError), precision.settled(device):
        assert precision._Job.choice == (choice("float32") if device == "cpu" else None) and precision._Job.used is None
        raise ZeroDivisionError
    assert precision._Job.choice == choice("bfloat16") and set_threads == [3] * (device == "cpu")
