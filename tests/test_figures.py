"""Figures, tables and names of a report, worked out by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import Judged, LayerAnalysis
from minitron_megatron.importance.scores import Scores
from minitron_megatron.prune.select import Kept
from minitron_megatron.report import cutting, layers, page
from minitron_megatron.report.layers import _cell
from minitron_megatron.report.models import same_measure
from minitron_megatron.search.space import SIZES
from tests.report_folders import folder, traced
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


# Sections about cuts


def test_scores_are_mapped_by_every_axis_and_it_is_said_on_what_they_were_measured(monkeypatch):
    for name in ("heat_map", "importance_over_layers", "bars"):
        monkeypatch.setattr(cutting.plots, name, lambda *given, name=name: (name, *given[1:]))
    tensors = {"ffn": np.ones((2, 3)), "heads": np.ones((2, 2)), "layers": np.ones(2), "hidden.x": np.ones((2, 4))}
    results = {"samples": 1024, "tokens": 4194304, "sequence_aggregation": "mean", "batch_aggregation": "l2"}
    section = cutting._importance(SimpleNamespace(results=results, name="s"), Scores(tensors, "d"))
    assert (section.title, section.text) == (
        "Importance: s",
        "Measured on 1,024 samples (4,194,304 tokens); aggregation: mean over tokens, l2 over samples.",
    )
    assert {one.caption: one.svg for one in section.figures} == {
        "Feed-forward neurons: spread of their scores in each layer": ("importance_over_layers", "neurons"),
        "Feed-forward neurons of each layer, the most important lowest": ("heat_map", "neurons by importance"),
        "Attention heads of each layer": ("heat_map", "head"),
        "Hidden channels, as each layer sees them": ("heat_map", "hidden channel"),
        "Layers by Block Influence": ("bars", "layer", "1 − cosine(input, output)"),
    }


def test_a_search_has_a_row_for_each_ranked_shape_and_a_front_for_each_limit(monkeypatch):
    fronts = []
    monkeypatch.setattr(cutting, "_front", lambda listed, name: fronts.append((len(listed), name)) or "<svg>")
    sizes = dict(zip(SIZES, (2, 64, 96, 4, 2), strict=True))
    one = {**sizes, "rank": 1, "parameters": 1500, "latency_ms": 1.23456, "predicted_loss": 0.25,
           "predicted_loss_by_axis": {"ffn": 0.125, "layers": 0.0}}  # fmt: skip
    left = {**one, "parameters": 7}
    del left["rank"]
    values = {
        "candidates": [one, left, {**one, "rank": 2}],
        "budget": {"latency_ms": 3},
        "fitting": 12345,
        "shapes": 67890,
    }
    folder = SimpleNamespace(path=Path("p"), name="found", read_yaml=lambda _: values)
    section = cutting._search(folder)
    (table,) = section.tables
    assert table.columns == [
        "rank", "layers × hidden × ffn", "heads/kv", "parameters", "milliseconds", "damage", "ffn", "layers",
    ]  # fmt: skip
    row = ["2 × 64 × 96", "4/2", "1,500", "1.235", "0.2500", "0.1250", "0.0000"]
    assert table.rows == [["1", *row], ["2", *row]] and fronts == [(3, "latency_ms")]
    assert (
        section.title == "Candidates: found"
        and "The best of 12,345 shapes that fit the budget, of 67,890," in section.text
    )
    assert [one.caption for one in section.figures] == ["Pareto front: predicted damage against milliseconds"]
    values["budget"] = {"memory_gib": 1, "parameters": 2}
    one["memory_gib"] = left["memory_gib"] = values["candidates"][2]["memory_gib"] = 2.5
    assert cutting._search(folder).tables[0].columns[3:5] == ["parameters", "GiB"]
    assert [name for _, name in fronts[1:]] == ["parameters", "memory_gib"]
    for key in ("budget", "fitting", "shapes"):
        odd = SimpleNamespace(path=Path("p"), name="found", read_yaml=lambda _, key=key: {**values, key: None})
        if key == "budget":
            with pytest.raises(UserError, match=r"p/candidates.yaml is damaged .*: search again"):
                cutting._search(odd)


KEPT = Kept(np.array([0, 2]), kv_groups=np.zeros((4, 2, 1), int), heads=np.zeros((4, 2, 2), int))


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (Kept(np.arange(4)), "Every layer stays."),
        (KEPT, "Layers dropped: 1 3."),
        (replace(KEPT, layers=np.array([3])), "Layers dropped: 0-2."),
        (
            replace(KEPT, partners=KEPT.heads),
            "Layers dropped: 1 3. The residual of dropped heads was merged into those that stay.",
        ),
        (
            replace(KEPT, layers=np.arange(4), kv_groups=np.zeros((4, 2, 2), int)),
            "Every layer stays. Key-value groups are averages of neighbours.",
        ),
    ],
)
def test_what_was_done_to_layers_and_heads_is_said(kept, says):
    assert cutting._words(kept, SMALL_SHAPE) == says


def test_each_axis_that_was_cut_is_drawn_with_what_stays(monkeypatch):
    for name in ("kept_curve", "curves", "heat_map", "bars"):
        monkeypatch.setattr(cutting.plots, name, lambda *given: given)
    tensors = {
        "ffn": np.array([[1.0, 2.0, 1.0], [9.0, 9.0, 9.0], [3.0, 1.0, 0.0]]),
        "heads": np.arange(12.0).reshape(3, 4),
        "layers": np.array([0.3, 0.1, 0.2]),
        "hidden.x": np.array([[1.0, 5.0, 3.0]]),
    }
    source = SimpleNamespace(num_layers=3, hidden_size=3)
    heads = np.array([[[0, 1]], [[0, 0]], [[2, 2]]])
    kept = Kept(np.array([0, 2]), hidden=np.array([1, 2]), ffn={0: np.array([1]), 2: np.array([0, 2])}, heads=heads)
    found = {one.caption: one.svg for one in cutting._cut_figures(kept, source, Scores(tensors, "d"))}
    assert list(found) == [
        "Hidden channels: kept and cut",
        "Feed-forward neurons: share of a layer's importance that stays",
        "Attention heads: those that went are crossed out",
        "Layers by Block Influence: kept and cut",
    ]
    curve, stays, map_, bars = found.values()
    assert curve[0].tolist() == [1, 5, 3] and curve[1].tolist() == [False, True, True] and curve[2] == "hidden channels"
    shares = {name: (layers.tolist(), values) for name, (layers, values) in stays[0].items()}
    assert shares == {
        "sum of the scores": ([0, 2], [pytest.approx(0.5), pytest.approx(0.75)]),
        "sum of squares of the scores": ([0, 2], [pytest.approx(4 / 6), pytest.approx(0.9)]),
    }
    assert stays[1:] == ("layer", "share that stays") and map_[1] == "head"
    assert map_[2].tolist() == [[False, False, True, True], [True] * 4, [True, True, False, True]]
    assert bars[0].tolist() == [0.3, 0.1, 0.2] and bars[3].tolist() == [False, True, False]
    assert cutting._cut_figures(Kept(np.arange(3)), source, Scores(tensors, "d")) == []


def test_a_cut_has_every_axis_before_and_after_and_the_loss_around_it(monkeypatch):
    monkeypatch.setattr(cutting, "read_plan", lambda file, shape, digest: (None, Kept(np.arange(3))))
    losses = {"results": {"loss_around_the_cut": {"before": 2.34567, "after": 9.0}}}
    source = folder("teacher", shape=SMALL_SHAPE, made="a")
    target = STUDENT.resized(ffn_hidden_size=(12, 24, 36))
    cut = folder("pruned", shape=target, made="b", files=["plan.yaml"], inputs={"model": "of teacher"}, **losses)
    (section,) = cutting.cut_sections(traced(source, cut))
    table, after = section.tables
    assert section.title == "What was cut: pruned" and section.text == "Layers dropped: 3." and section.figures == []
    assert table.columns == ["axis", "teacher", "pruned", "kept"] and table.rows == [
        ["num layers", "4", "3", "75.0 %"], ["hidden size", "32", "32", "100.0 %"],
        ["ffn hidden size", "48", "12 to 36", "50.0 %"], ["num attention heads", "8", "8", "100.0 %"],
        ["num query groups", "4", "4", "100.0 %"], ["vocab size", "128,256", "128,256", "100.0 %"],
    ]  # fmt: skip
    assert (after.caption, after.rows) == ("Loss right after the cut", [["before", "2.346"], ["after", "9"]])
    (alone,) = cutting.cut_sections(traced(cut))
    assert alone.text == "The model it was cut from is not in the report."
    assert [row[:2] for row in alone.tables[0].rows][:3] == [
        ["num layers", "3"], ["hidden size", "32"], ["ffn hidden size", "12 to 36"],
    ]  # fmt: skip
    assert len(alone.tables) == 2 and cutting.cut_sections(traced(source)) == []


def test_scores_are_those_that_a_model_was_cut_by_and_no_others(monkeypatch):
    read = []
    monkeypatch.setattr(cutting, "load_scores", lambda path: read.append(path.name) or "scores")
    monkeypatch.setattr(cutting, "check_scores", lambda *given: read.append(given[2]))
    source = folder("teacher", shape=SMALL_SHAPE, made="a")
    there = [
        folder(name, files=files, inputs={"model": of}, made=name)
        for name, files, of in (
            ("s1", ["scores.safetensors"], "of teacher"), ("s2", ["scores.safetensors"], "of teacher"),
            ("s3", ["scores.safetensors"], "of another"), ("s4", ["x"], "of teacher"),
        )
    ]  # fmt: skip
    for inputs, found in (
        ({"scores": "of s1"}, "s1"),
        ({"scores": "of s2"}, "s2"),
        ({"scores": "of s3"}, None),
        ({"scores": "of s4"}, None),
        ({"scores": "of replaced ones"}, None),
        ({}, None),
    ):
        cut = folder("pruned", inputs=inputs, made="z")
        assert cutting._scores_of(traced(source, *there, cut), cut, source) == ("scores" if found else None)
        assert read == ([found, "of teacher"] if found else [])
        read.clear()


# The page of a layer analysis


def test_the_page_of_a_layer_analysis_says_what_was_measured_and_lists_the_best(tmp_path, monkeypatch):
    pages, curves = [], []
    monkeypatch.setattr(layers, "write_page", lambda *given: pages.append(given))
    monkeypatch.setattr(layers.plots, "curve_over_blocks", lambda *given: curves.append(given) or "<svg>")
    base = Judged(2.5, 0.0, 0.75, 0.0)
    single = [Judged(3.0 + start / 10, 0.5 - start / 100, 0.5 + start / 100, 0.0) for start in range(7)]
    pairs = [Judged(4.0 - start / 10, 0.9, 0.25, -start) for start in range(6)]
    counts = {"samples": 1500, "tokens": 48000, "split": "train", "questions": {"arc": 2500, "boolq": 7}}
    analysis = LayerAnalysis("p", "d", 7, base, {1: single, 2: pairs}, counts)
    layers.layer_report(tmp_path / "report.html", analysis, "the model", "the command")
    (file, title, subtitle, sections), = pages  # fmt: skip
    assert (file, title) == (tmp_path / "report.html", "Which layers can go: 7 layers")
    assert subtitle == (
        "the model, judged on 1,500 samples (48,000 tokens of the train split) and 2,500 questions of arc, 7 questions of boolq."
    )
    assert [one.title for one in sections] == ["How to read this", "Single layers", "Blocks of 2 layers", "Command"]
    assert sections[0].text.startswith(
        "The whole model: loss 2.5 nats a token (perplexity 12.18), accuracy 75.00%. Each"
    )
    assert (
        sections[-1].commands == ["the command"] and "Blocks with the last layer, 6, are measured" in sections[1].text
    )
    (table,) = sections[1].tables
    assert table.columns == ["best to remove, last layer kept", "by Block Influence", "by loss", "by task"]
    assert table.rows[0] == ["1", "5 (0.45)", "0 (3)", "5 (55.00%)"] and len(table.rows) == 5
    assert table.rows[4] == ["5", "1 (0.49)", "4 (3.4)", "1 (51.00%)"]
    assert sections[2].tables[0].rows[0][:3] == ["1", "0 to 1 (0.9)", "4 to 5 (3.6)"]
    assert curves[:3] == [
        ([one.bi for one in single], None, "Block Influence"),
        ([one.loss for one in single], 2.5, "loss (nats a token)"),
        ([one.accuracy for one in single], 0.75, "accuracy"),
    ]
    plain = replace(analysis, base=replace(base, accuracy=None), counts={**counts, "questions": {}}, blocks={1: single})
    layers.layer_report(tmp_path / "report.html", plain, "the model", "the command")
    _, _, subtitle, sections = pages[1]
    assert subtitle.endswith("of the train split).") and "accuracy" not in sections[0].text
    assert sections[1].tables[0].columns == ["best to remove, last layer kept", "by Block Influence", "by loss"]
    assert [one.title for one in layers.block_sections(plain, "x: ")] == ["x: Single layers"] and len(
        curves
    ) == 6 + 2 + 2


# Pages


def test_a_plot_in_a_page_has_names_of_its_own_and_the_pages_colours():
    svg = (
        '<svg width="5pt" height="6pt" viewBox="0"><!-- x --><style>a{}\n</style><defs>\n</defs><g id="a"/><path id="b" '
        'height="3" stroke="#2f6fab"/><use href="#b" fill="url(#c)"/><rect id="c" fill="#8a8f98 #c8641b"/></svg>'
    )
    found = page.inline(page.Figure("a <b>", svg), "p1-")
    assert found == (
        '<svg viewBox="0" role="img"><title>a &lt;b&gt;</title><g/><path id="p1-b" height="3" stroke="var(--plot-blue)"/>'
        '<use href="#p1-b" fill="url(#p1-c)"/><rect id="p1-c" fill="var(--plot-text) var(--plot-orange)"/></svg>'
    )
    assert page.inline(page.Figure("x", svg, natural=True), "").startswith(
        '<svg width="5pt" height="6pt" viewBox="0" role='
    )


def test_a_card_has_its_sections_in_markdown(tmp_path):
    table = page.Table(["", "n"], [["a|b\nc", "1"], ["d", "–"]], "a caption")
    sections = [
        page.Section(
            "First", "text", [table, page.Table(["x"], [["y"]])], [page.Figure("f", "<svg>")], ["one", "two"], card=True
        ),
        page.Section("Not there", "hidden"),
        page.Section("Last\nline", card=True),
    ]
    page.write_card(tmp_path / "card.md", "T\nt", "sub", sections)
    assert (tmp_path / "card.md").read_text() == (
        "<!-- minitron_megatron report -->\n# T\\nt\n\nsub\n\n## First\n\ntext\n\na caption\n\n|  | n |\n|---|---:|\n"
        "| a\\|b c | 1 |\n| d | – |\n\n| x |\n|---|\n| y |\n\n```\none\ntwo\n```\n\n## Last\\nline\n"
    )


@pytest.mark.parametrize(("length", "kind"), [(26, "short"), (27, "long")])
def test_short_cells_stay_in_a_line(length, kind):
    rows = [["a", "x" * length, "1"], ["b", "", "text"]]
    assert page.Table(["", "x", "y"], rows).classes == ["short", kind, "short"]


@pytest.mark.parametrize(
    ("cell", "numeric"),
    [("1", True), ("1,024.5", True), ("−3e-05", True), ("-3", True), ("0.7 ± 0.1", True), ("5 %", True), ("1.2×", True),
     ("1.2 ×", True), ("–", True), ("", True), ("1 x", False), ("a", False), ("1/2", False), ("1e5 %", True), ("5 % 3", False)],
)  # fmt: skip
def test_what_is_a_number_in_a_table(cell, numeric):
    assert page.Table(["1", "n"], [["1", cell]]).numeric == [False, numeric]
