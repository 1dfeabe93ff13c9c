"""The frame of commands that run a model over data: what is looked at before, in which order, and what the output is told."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from minitron_megatron import measuring, outputs
from minitron_megatron.config import EvaluateConfig, PruneConfig


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What the frame does, in order; its output is `out`."""
    done = []
    out = SimpleNamespace(path=tmp_path, done=False, precision=None)

    @contextmanager
    def noted(name, *given, **named):
        done.append((name, *given, named))
        yield out
        done.append(f"end of {name}")

    monkeypatch.setattr(measuring, "parallel_job", lambda *given, **named: noted("job", *given, **named))
    monkeypatch.setattr(measuring, "command_output", lambda cfg, inputs, **named: noted("output", inputs, **named))
    for name in ("check_copies", "verify_digest", "verify_data"):
        monkeypatch.setattr(measuring, name, lambda *given, name=name: done.append((name, *given)))
    monkeypatch.setattr(measuring, "keep", lambda file, begun: done.append(("keep", file.name, begun())))
    monkeypatch.setattr(measuring, "has_work", lambda folder: folder == tmp_path)
    monkeypatch.setattr(measuring, "asks_machine", lambda precision, dtype: (precision, dtype) == ("auto", "bfloat16"))
    monkeypatch.setattr(measuring, "record", lambda: "recorded")
    return SimpleNamespace(done=done, out=out)


FOLDER = SimpleNamespace(path="m", shape=SimpleNamespace(dtype="bfloat16"))
DATA = SimpleNamespace(folders=[SimpleNamespace(path="d"), SimpleNamespace(path="e")])


def cfg(**more) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 5, "device": "cpu", "verify": False, "precision": "auto", **more})


def test_copies_are_compared_before_the_output_is_made_and_what_was_computed_in_is_recorded(seen):
    with measuring.measuring(cfg(), "layout", FOLDER, DATA, {"model": "x"}) as out:
        assert out is seen.out and out.precision is None
    assert out.precision == "recorded" and seen.done == [
        ("job", "layout", {"seed": 5, "device": "cpu"}), ("check_copies", "m", "d", "e"),
        ("output", {"model": "x"}, {"continues": False}), "end of output", "end of job",
    ]  # fmt: skip


@pytest.mark.parametrize("data", [DATA, None])
def test_weights_and_data_are_verified_where_that_is_asked(seen, data):
    with measuring.measuring(cfg(verify=True), "layout", FOLDER, data, {}):
        pass
    assert seen.done[1:-3] == [
        ("check_copies", "m", *(["d", "e"] if data else [])), ("verify_digest", FOLDER),
        *([("verify_data", data)] if data else []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("continues", "done", "precision", "kept"),
    [
        (True, False, "auto", True),
        (False, False, "auto", False),
        (True, True, "auto", False),
        (True, False, "fp32", False),
    ],
)
def test_what_goes_on_is_computed_as_it_began(seen, continues, done, precision, kept):
    seen.out.done = done
    with measuring.measuring(cfg(precision=precision), "layout", FOLDER, None, {}, continues=continues):
        pass
    assert [one for one in seen.done if one[0] == "keep"] == ([("keep", measuring.COMPUTED_IN, True)] if kept else [])


def test_an_output_has_the_options_of_its_command_and_what_is_free_of_it(monkeypatch):
    asked = []
    for name in ("output_folder", "check_output"):
        monkeypatch.setattr(outputs, name, lambda path, name=name, **named: asked.append((name, path, named)))
    monkeypatch.setattr(outputs, "command_line", lambda: "the line")
    given = PruneConfig(output="o", resume=False, seed=7)
    outputs.command_output(given, {"model": "x"}, continues=True)
    outputs.command_output(given, {})
    outputs.check_command_output(given, {"model": "x"})
    (_, path, first), (_, _, second), (check, _, third) = asked
    assert (path, first["command"], first["inputs"], first["resume"], first["continues"]) == (
        "o", "the line", {"model": "x"}, False, True,
    )  # fmt: skip
    assert second["continues"] is False and check == "check_output" and third["inputs"] == {"model": "x"}
    for one in (first, third):
        assert (
            one["config"]["seed"] == 7
            and {"output", "resume", "verify", "dry_run"} <= one["free"]
            and one["resume"] is False
        )
        assert "scores" not in one["free"]
    outputs.command_output(EvaluateConfig(output="o"), {})
    assert asked[-1][2]["free"] != first["free"]
