"""Figures, tables and names of a report, worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.importance.scores import Scores
from minitron_megatron.report import cutting
from minitron_megatron.report.layers import _cell
from minitron_megatron.report.models import same_measure
from tests.test_bounds import SMALL_SHAPE

STUDENT = SMALL_SHAPE.resized(num_layers=3)


def test_maps_have_the_most_important_neurons_of_each_layer_first_and_fronts_what_is_on_them(monkeypatch):
    shown = {}

    def note(name):
        return lambda *given: shown.update({(name, given[1] if name == "heat_map" else ""): given}) or ""

    for name in ("heat_map", "importance_over_layers", "bars", "front"):
        monkeypatch.setattr(cutting.plots, name, note(name))
    tensors = {
        "ffn": np.array([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]]),
        "heads": np.array([[1.0], [2.0]]),
        "layers": np.array([0.1, 0.2]),
        "hidden.attention_norm": np.array([[1.0], [2.0]]),
        "hidden.mlp_norm": np.array([[10.0], [20.0]]),
    }
    cutting._importance(SimpleNamespace(results={}, name="s"), Scores(tensors, "d"))
    assert shown["heat_map", "neurons by importance"][0].tolist() == [[3, 2, 1], [6, 5, 4]]
    assert shown["heat_map", "hidden channel"][0].tolist() == [[11], [22]]
    listed = [
        {"parameters": 3, "predicted_loss": 0.1, "on_front_of": ["parameters"], "rank": 1},
        {"parameters": 2, "predicted_loss": 0.4, "on_front_of": ["latency_ms"], "rank": 2},
        {"parameters": 1, "predicted_loss": 0.3, "on_front_of": ["parameters"]},
    ]
    cutting._front(listed, "parameters")
    points, ranked, *_ = shown["front", ""]
    assert points == [(1, 0.3), (3, 0.1)] and ranked == [(3, 0.1), (2, 0.4)]


def test_shares_of_what_was_cut():
    assert cutting._stays(np.array([1.0, 2.0, 3.0]), np.array([2]), 1) == pytest.approx(0.5)
    assert cutting._stays(np.array([1.0, 2.0, 3.0]), np.array([2]), 2) == pytest.approx(9 / 14)
    assert cutting._mask(4, np.array([1, 3])).tolist() == [False, True, False, True]
    assert cutting._share(SMALL_SHAPE, STUDENT, "num_layers") == "75.0 %"
    assert (cutting._size(1234), cutting._size((5, 1234))) == ("1,234", "5 to 1,234")


def test_published_figures_are_those_of_the_papers():
    """Sums of each model's row, added up by hand: a digit that is another one is another sum."""
    found = {one["name"]: one for one in load_yaml(Path(cutting.__file__).with_name("published.yaml"))["models"]}
    assert {name: round(sum(one["scores"].values()), 1) for name, one in found.items()} == {
        "Llama-3.1 8B": 418.2,
        "Llama-3.1-Minitron 4B width": 382.2,
        "Llama-3.1-Minitron 4B depth": 342.3,
        "Minitron 4B": 325.5,
        "Mistral NeMo 12B": 450.3,
        "MN-Minitron 8B": 447.2,
    }
    tokens = {name: one["tokens"] for name, one in found.items() if "tokens" in one}
    minitrons = {"Llama-3.1-Minitron 4B width": 94e9, "Llama-3.1-Minitron 4B depth": 94e9, "MN-Minitron 8B": 380e9}
    assert tokens == minitrons


def test_evaluations_are_of_one_measure_whatever_model_they_are_of():
    def measure(config: dict, **inputs: str) -> str:
        return same_measure(SimpleNamespace(config=config, inputs=inputs))

    plain = {"model": {"path": "m"}, "output": "o", "samples": 8, "tasks": ["t"]}
    first = measure(plain, model="1", data="d")
    assert measure({**plain, "model": {"path": "n"}, "output": "p"}, model="2", data="d") == first
    assert measure({**plain, "seed": 5, "device": "cpu"}, hf="2", data="d") == measure({**plain}, model="1", data="d")
    for config, data in (({**plain, "samples": 9}, "d"), ({**plain, "tasks": ["u"]}, "d"), (plain, "e")):
        assert measure(config, model="1", data=data) != first


@pytest.mark.parametrize(("length", "named"), [(1, "3"), (2, "3 to 4"), (3, "3 to 5")])
def test_a_block_is_named_by_its_first_and_its_last_layer(length, named):
    judged = SimpleNamespace(bi=0.25, loss=2.5, accuracy=0.5)
    found = [_cell(judged, judge, 3, length) for judge in ("bi", "loss", "task")]
    assert found == [f"{named} (0.25)", f"{named} (2.5)", f"{named} (50.00%)"]
