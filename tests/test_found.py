"""What a search writes and shows: candidates best first, targets with their commands, plots and tables; its folder read again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from minitron_megatron.config import BudgetConfig, ModelConfig, PruneOptions, SearchConfig, SpaceConfig
from minitron_megatron.errors import UserError
from minitron_megatron.search import found as search_folder
from minitron_megatron.search import search
from minitron_megatron.search.scan import Found
from minitron_megatron.search.search import Candidate, candidates
from minitron_megatron.search.space import SIZES, Space
from tests.test_selecting import SOURCE, scores


def test_the_best_come_first_and_then_what_is_on_a_front_by_its_damage():
    space = SimpleNamespace(lengths=lambda numbers: numbers, target=lambda number: {"num_layers": number})
    damage = {7: 0.9, 3: 0.5, 9: 0.1, 5: 0.2}

    def loss(numbers):
        return np.array([damage[n] for n in numbers.tolist()])

    predictor = SimpleNamespace(
        space=space, loss=loss, parts=lambda n: {"layers": loss(n) / 4, "hidden": 3 * loss(n) / 4}
    )
    budget = SimpleNamespace(
        quantities=["parameters", "memory_gib"], cost=lambda name, n: n * (10 if name == "parameters" else 0.5)
    )
    fronts = {"parameters": np.array([5, 3]), "memory_gib": np.array([9, 3])}
    found = candidates(budget, predictor, Found(best=np.array([7, 3]), fronts=fronts))
    assert [(one.rank, one.target["num_layers"], one.fronts) for one in found] == [
        (1, 7, []), (2, 3, ["parameters", "memory_gib"]), (None, 9, ["memory_gib"]), (None, 5, ["parameters"]),
    ]  # fmt: skip
    assert found[1].costs == {"parameters": 30, "memory_gib": 1.5} and found[1].loss == pytest.approx(0.5)
    assert (
        found[1].lost == pytest.approx({"layers": 0.125, "hidden": 0.375}) and found[1].file == "targets/rank_02.yaml"
    )


ONE = Candidate(
    1,
    dict(zip(SIZES, (3, 24, 8, 6, 3), strict=True)),
    ["parameters"],
    {"parameters": 1234, "memory_gib": 1.23456},
    {"ffn": 0.25, "heads": 0.5},
)
OTHER = Candidate(
    None, dict.fromkeys(SIZES, 2), ["memory_gib"], {"parameters": 99, "memory_gib": 0.5}, {"ffn": 0.0, "heads": 2.0}
)


def test_what_is_written_of_a_search(tmp_path):
    assert ONE.to_yaml() == {
        "rank": 1,
        **ONE.target,
        **ONE.costs,
        "predicted_loss": 0.75,
        "predicted_loss_by_axis": {"ffn": 0.25, "heads": 0.5},
        "on_front_of": ["parameters"],
    }
    assert "rank" not in OTHER.to_yaml()
    budget = SimpleNamespace(limits={"parameters": 5e3}, options=BudgetConfig(at_least=0.25))
    search._write_candidates(tmp_path, "m", budget, {"shapes": 9, "fitting": 4}, [ONE, OTHER])
    assert yaml.safe_load((tmp_path / "candidates.yaml").read_text()) == {
        "model": "m",
        "budget": {"parameters": 5e3, "at_least": 0.25},
        "shapes": 9,
        "fitting": 4,
        "candidates": [ONE.to_yaml(), OTHER.to_yaml()],
    }
    search._write_targets(tmp_path, [ONE], ["prune it"])
    text = (tmp_path / "targets" / "rank_01.yaml").read_text()
    assert text.startswith("# Rank 1: 1,234 parameters, predicted damage 0.7500.\n#") and "prune it\n" in text
    assert yaml.safe_load(text) == ONE.target


def test_a_plot_has_the_front_of_its_quantity_and_what_is_ranked(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(search.plots, "front", lambda *given: drawn.append(given) or "<svg/>")
    cheaper = Candidate(2, OTHER.target, ["parameters"], {"parameters": 9}, {"ffn": 1.5})
    search._plot(tmp_path / "p.svg", "parameters", [ONE, OTHER, cheaper])
    assert drawn == [([(9, 1.5), (1234, 0.75)], [(1234, 0.75), (9, 1.5)], "parameters", "predicted damage")]
    assert (tmp_path / "p.svg").read_text() == "<svg/>"


def config(**options) -> SearchConfig:
    return SearchConfig(**{"output": "o/", "model": ModelConfig(path="m"), "scores": "s", **options})


def test_the_command_of_a_target_names_what_it_is_cut_from(monkeypatch):
    monkeypatch.setattr(search, "line_of", lambda name, words: (name, words))
    plain = ["model=m", "scores=s", "target=o/targets/rank_01.yaml", "output=o_rank_01"]
    assert search.prune_command(config(), ONE, 3) == ("prune", plain)
    own = config(layers="l", prune=PruneOptions(groups="mean", keep_last_layers=0))
    words = [*plain[:2], "prune.groups=mean", "prune.keep_last_layers=0", *plain[2:]]
    assert search.prune_command(own, ONE, 3) == ("prune", words)
    assert search.prune_command(own, ONE, 4) == ("prune", [*words[:2], "layers=l", *words[2:]])


def test_what_is_shown_of_a_search(monkeypatch, caplog):
    caplog.set_level("INFO", "minitron_megatron")
    shown = []
    monkeypatch.setattr(search, "print_table", lambda *table: shown.append(table))
    latency = SimpleNamespace(shapes=6, error=0.0321)
    budget = SimpleNamespace(limits={"memory_gib": 1, "parameters": 2}, latency=latency)
    search._print(config(), budget, {"fitting": 1500, "shapes": 20000}, [ONE])
    ((title, columns, rows),) = shown
    assert title.startswith("o/: the best 1 of 1,500 shapes that fit, of 20,000; ")
    assert columns[:5] == ["rank", "layers × hidden × ffn", "heads/kv", "parameters", "GiB"] and columns[5] == "damage"
    assert rows == [[1, "3 × 24 × 8", "6/3", 1234, "1.235", "0.7500", "0.2500", "0.5000"]]
    assert "fitted to 6 shapes; for one that is left out of the fit they are up to 3.2 % off" in caplog.text


def test_a_dry_run_counts_the_sizes_of_each_axis(monkeypatch, caplog):
    caplog.set_level("INFO", "minitron_megatron")
    shown = []
    monkeypatch.setattr(search, "print_table", lambda *table: shown.append(table))
    monkeypatch.setattr(search, "scan", lambda *_: Found(shapes=12345, fitting=1000))
    space = Space(np.array([4, 3]), np.array([8]), np.array([6, 5, 4]), np.array([[8, 4], [4, 4], [4, 2]]), True)
    search._count(SOURCE, space, None)
    rows = [["num_layers", 2, 3, 4, "4"], ["hidden_size", 1, 8, 8, "8"], ["ffn_hidden_size", 3, 4, 6, "6"]]
    rows += [["num_attention_heads", 2, 4, 8, "8"], ["num_query_groups", 2, 2, 4, "4"]]
    assert shown == [("would be searched", ["axis", "sizes", "from", "to", "source"], rows)]
    assert caplog.messages == ["12,345 shapes, of which 1,000 fit the budget"]


@pytest.mark.parametrize("layers", [None, "l"])
def test_what_a_search_reads_and_which_depths_it_can_judge(monkeypatch, layers):
    """With an analysis of blocks of 1 and 3 layers of four: 4, 3 and 1, of which 1 is below half."""
    given, made = [], []
    folder = SimpleNamespace(shape=SOURCE, digest="of m", path="m")
    analysis = SimpleNamespace(blocks={1: [], 3: []}, check_model=given.append)
    for name, found in (("open_model_folder", folder), ("load_scores", scores()), ("load_layer_analysis", analysis)):
        monkeypatch.setattr(search, name, lambda *_, found=found: found)
    monkeypatch.setattr(search, "check_scores", lambda *words: given.append(words[1:]))
    monkeypatch.setattr(search, "read_manifest", lambda path: {"digest": f"of {path}"})
    monkeypatch.setattr(search, "check_command_output", lambda _, inputs: given.append(inputs))
    monkeypatch.setattr(search, "make_predictor", lambda *words: made.append(words) or "predictor")
    cfg = config(layers=layers, budget=BudgetConfig(parameters=900.0), space=SpaceConfig(multiple=1, tensor=1))
    found = search.check_search(cfg)
    assert found.space.layers.tolist() == ([4, 3] if layers else [4, 3, 2]) and found.predictor == "predictor"
    inputs = {"model": "of m", "scores": "of s"} | ({"layers": "of l"} if layers else {})
    assert given == [*(["of m"] if layers else []), (SOURCE, "of m", "s"), inputs] and found.inputs == inputs
    assert made[0][0] is SOURCE and made[0][-1] is (analysis if layers else None)


def test_a_search_is_read_with_the_analysis_that_it_was_made_by(tmp_path, monkeypatch):
    sizes = dict.fromkeys(SIZES, 4)
    (tmp_path / search_folder.FILE).write_text(
        json.dumps({"candidates": [{**sizes, "rank": 1, "predicted_loss": 0.1}]})
    )
    manifest = {
        "config": {"model": {"path": "m"}, "scores": "s", "layers": "l", "prune": {"groups": "mean"}},
        "inputs": {"model": "a", "scores": "b", "layers": "c", "table": "d"},
        "files": [search_folder.target_file(1)],
        "digest": "whole",
    }
    monkeypatch.setattr(search_folder, "read_output", lambda *_: manifest)
    found = search_folder.read_search(tmp_path)
    assert found.inputs == {"model": "a", "scores": "b", "layers": "c"} and found.digest == "whole"
    assert found.source == search_folder.Source("m", "s", "l", PruneOptions(groups="mean"))
    assert found.ranked[0].options == {f"target.{name}": 4 for name in SIZES} and found.ranked[0].predicted_loss == 0.1
    del manifest["inputs"]["layers"]
    with pytest.raises(UserError, match=r"is damaged \(KeyError: 'layers'\): run search again"):
        search_folder.read_search(tmp_path)
    assert search_folder.target_file(12) == "targets/rank_12.yaml"
