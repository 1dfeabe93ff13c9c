"""Bars end at their totals: the watch over all of them notices one that does not, and every bar of the product is watched."""

import ast
import io
import json
from pathlib import Path

import pytest

from minitron_megatron import console
from minitron_megatron.config import LoggerConfig
from minitron_megatron.train import metrics
from minitron_megatron.train.metrics import Metrics
from tests.bars import counted

PACKAGE = Path(console.__file__).parent


@pytest.mark.parametrize(("total", "done", "moves", "ends"), [
    (3, 0, [1, 2], True), (3, 1, [2], True), (0, 0, [], True), (3, 3, [], True),
    (3, 0, [1, 1], False), (3, 0, [2, 2], False), (3, 1, [3], False), (3.0, 0, [3], False),
])  # fmt: skip
def test_a_bar_that_ends_elsewhere_is_noticed(total, done, moves, ends):
    def work():
        with counted("w", total, unit="u", done=done) as advance:
            for n in moves:
                advance(n)

    if ends:
        work()
    else:
        with pytest.raises(AssertionError, match="the bar of 'w' ended at"):
            work()


@pytest.mark.parametrize("unit", ["prompts", "micro-batches"])
@pytest.mark.parametrize(
    ("size", "moved", "ends"), [("2", 7, "prompts"), ("2", 8, "any"), ("2", 17, None), ("2", 3, None), ("1", 7, None)]
)
def test_what_ranks_share_out_is_counted_for_all_of_them(monkeypatch, unit, size, moved, ends):
    """There a bar is about right; alone, and of what every rank runs, it is exact."""
    monkeypatch.setenv("WORLD_SIZE", size)
    if ends in (unit, "any"):
        with counted("w", 8, unit=unit) as advance:
            advance(moved)
    else:
        with pytest.raises(AssertionError), counted("w", 8, unit=unit) as advance:
            advance(moved)


def test_work_that_is_given_up_has_no_end():
    with pytest.raises(KeyError), counted("w", 3) as advance:
        advance(1)
        raise KeyError


def test_every_bar_of_the_product_is_watched():
    """Opened by `with progress(…)`, by that name out of console: tests go through it, in this process or in the pool."""
    opened = []
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text if "progress(" in text else "")
        named = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "progress"
        ]
        entered = [item.context_expr for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
        assert all(call in entered for call in named), file
        opened += [file.relative_to(PACKAGE)] * len(named)
        from_console = [
            n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "minitron_megatron.console"
        ]
        names = {alias.name: alias.asname for node in from_console for alias in node.names}
        assert not named or names.get("progress", "none") is None, file
    assert len(opened) >= 15


def test_a_run_moves_from_the_step_it_begins_at_to_its_last(tmp_path, monkeypatch):
    """A terminal's bar, and the log's words."""
    screen = console._Console(width=200)
    screen.file = io.StringIO()
    monkeypatch.setattr(metrics, "console", lambda: screen)
    made = Metrics(tmp_path, LoggerConfig(wandb="disabled"), {}, 8, 3, "a run")
    task = made.bar.tasks[0]
    assert (task.total, task.completed) == (8, 3)
    for step in range(4, 9):
        made.add({"step": step, "loss": 1.0, "tokens_per_second": 2.0})
        assert made.bar.tasks[0].completed == step
    made.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 8
