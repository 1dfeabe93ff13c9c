"""What a chain chooses and foresees by sizes alone: time of its stages, room, and options that stand beside given ones."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minitron_megatron import compress_plan, pace
from minitron_megatron.chosen import Choices, Pair
from minitron_megatron.models.axes import count_parameters, flops_per_token
from tests.test_bounds import SMALL_SHAPE

STUDENT = SMALL_SHAPE.resized(num_layers=3)


def test_stages_take_their_operations_their_micro_batches_and_their_start():
    pair = Pair(SMALL_SHAPE, STUDENT)
    asked = pace.Work(length=8, calibration=5, windows=9, steps=3, batch=6, micro=2, data=2, validated=5)
    big, small = (8 * flops_per_token(shape, 8) for shape in (SMALL_SHAPE, STUDENT))
    arithmetic = pace.seconds_of_stages(pair, asked, pace.Pace(flops=2e6, operation=0.0, start=0.0), 1)
    assert arithmetic == pytest.approx(
        {
            "importance": 5 * big / 1e6,
            "distill": ((18 + 5) * big + (3 * 18 + 5) * small) / 1e6,
            "evaluate": 9 * (big + small) / 1e6,
        }
    )
    # 5, 9, 18 and 23 samples are 2, 3, 5 and 6 micro-batches of 2 on 2 ranks.
    small_ones = pace.seconds_of_stages(pair, asked, pace.Pace(flops=math.inf, operation=1.0, start=0.0), 1)
    layer, trained = pace._LAYER, pace._LAYER_TRAINED
    assert small_ones == {
        "importance": 2 * 4 * layer,
        "distill": 6 * 4 * layer + 5 * 3 * trained + 2 * 3 * layer + 3 * pace._STEP,
        "evaluate": 3 * 4 * layer + 3 * 3 * layer,
    }
    idle = pace.Pace(flops=math.inf, operation=0.0, start=2.0)
    for processes, start in ((1, 2 * pace.START), (2, 2 * pace.START_OF_SEVERAL)):
        assert set(pace.seconds_of_stages(pair, asked, idle, processes).values()) == {start}


def test_room_is_for_models_and_checkpoints_of_every_round(monkeypatch):
    """A student twice, before and after its training, and each checkpoint with 12 bytes of optimizer a weight."""
    asked = []
    monkeypatch.setattr(compress_plan, "check_space", lambda place, need, *_, **__: asked.append(need))
    n, m = count_parameters(SMALL_SHAPE), count_parameters(STUDENT)
    config = SimpleNamespace(trainer=SimpleNamespace(keep_last=2))
    one = SimpleNamespace(target=STUDENT, stages={"distill": SimpleNamespace(config=config)})
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        source = SimpleNamespace(shape=replace(SMALL_SHAPE, dtype=dtype))
        for hf, export, extra in ((None, False, 0), ("h", False, n * item), (None, True, m * item)):
            cfg = SimpleNamespace(hf=hf, export=export, output="x")
            compress_plan._check_room(cfg, source, [one, one])
            assert asked.pop() == 2 * m * (2 * item + 3 * (item + 12)) + extra


def test_what_was_given_stands_and_its_other_unit_does_not():
    chosen = {"trainer.steps": 5, "optim.warmup_steps": 2, "optim.lr": 1.0}
    choices = Choices({"distill": chosen})
    assert choices.of("distill", {}) == chosen and choices.of("prune", {"a": 1}) == {"a": 1}
    assert choices.of("distill", {"optim.lr": 2.0}) == chosen | {"optim.lr": 2.0}
    assert choices.of("distill", {"optim.warmup_tokens": 3}) == {
        "trainer.steps": 5,
        "optim.lr": 1.0,
        "optim.warmup_tokens": 3,
    }
