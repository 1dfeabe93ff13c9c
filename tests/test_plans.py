"""Plans as files: each axis as it is written, read back as it was, and every entry that cannot be refused by its key."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from minitron_megatron.errors import UserError
from minitron_megatron.prune.plan import FILE, kept_digest, ranges_to_list, read_plan, write_plan
from minitron_megatron.prune.select import Kept
from tests.test_axes import shape

SOURCE = shape(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=4,
    vocab_size=20,
)
SIZES = {
    "num_layers": 3,
    "hidden_size": 6,
    "ffn_hidden_size": 4,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": 20,
}
# Layer 1 goes; groups are averaged in pairs; of the four heads of each new group three stay, and some take up a residual.
HEADS = {0: [[0, 1, 2], [4, 5, 6]], 2: [[0, 1, 3], [4, 5, 7]], 3: [[1, 2, 3], [5, 6, 7]]}
PARTNERS = {0: [[-1, -1, 3], [7, -1, -1]], 2: [[-1] * 3] * 2, 3: [[0, -1, -1], [-1, 4, -1]]}
NEURONS = {0: [0, 1, 2, 5], 2: [1, 2, 3, 4], 3: [0, 3, 4, 5]}


def over_layers(found: dict[int, list]) -> np.ndarray:
    """An array over the source's layers."""
    return np.array([found.get(layer, np.zeros_like(found[0])) for layer in range(4)])


KEPT = Kept(
    layers=np.array([0, 2, 3]),
    hidden=np.array([0, 1, 2, 3, 5, 7]),
    ffn={layer: np.array(neurons) for layer, neurons in NEURONS.items()},
    kv_groups=over_layers({key: [[0, 1], [2, 3]] for key in HEADS}),
    heads=over_layers(HEADS),
    partners=over_layers(PARTNERS),
)
PLAN = {
    "model": "blake3:m",
    "target": SIZES,
    "digest": kept_digest(KEPT),
    "layers": "0 2-3",
    "hidden": "0-3 5 7",
    "vocab": "all",
    "ffn": {0: "0-2 5", 2: "1-4", 3: "0 3-5"},
    "kv_groups": {0: "0+1 2+3", 2: "0+1 2+3", 3: "0+1 2+3"},
    "q_heads": {0: "0-2, 4-6", 2: "0-1 3, 4-5 7", 3: "1-3, 5-7"},
    "merged_heads": {0: "2<3 4<7", 2: "", 3: "1<0 6<4"},
}


def read(folder, **change) -> Kept:
    """What a plan keeps, with some entries changed: those of layers one by one."""
    plan = {**PLAN, **change}
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(PLAN.get(key), dict):
            plan[key] = {**PLAN[key], **value}
    (folder / FILE).write_text(yaml.safe_dump(plan))
    return read_plan(folder / FILE, SOURCE, "blake3:m")[1]


def test_a_plan_says_what_stays_of_every_axis_and_is_read_as_it_was_written(tmp_path):
    write_plan(tmp_path / FILE, "blake3:m", SOURCE.resized(**SIZES), KEPT)
    written = yaml.safe_load((tmp_path / FILE).read_text())
    assert written == PLAN and list(written) == list(PLAN)
    target, kept = read_plan(tmp_path / FILE, SOURCE, "blake3:m")
    assert target == SOURCE.resized(**SIZES) and kept_digest(kept) == PLAN["digest"]
    for name in ("layers", "hidden", "kv_groups", "heads", "partners"):
        assert getattr(kept, name).tolist() == getattr(KEPT, name).tolist(), name
    assert kept.vocab is None and {i: n.tolist() for i, n in kept.ffn.items()} == NEURONS


def test_axes_that_are_whole_are_said_to_be(tmp_path):
    """And sizes of layers are a list; tokens are named by id."""
    target = SOURCE.resized(num_layers=2, ffn_hidden_size=(6, 5), vocab_size=3)
    kept = Kept(np.array([1, 3]), vocab=np.array([0, 4, 19]), ffn={1: np.arange(6), 3: np.arange(5)})
    write_plan(tmp_path / FILE, "m", target, kept)
    written = yaml.safe_load((tmp_path / FILE).read_text())
    assert written["target"]["ffn_hidden_size"] == [6, 5]
    said = {"layers": "1 3", "vocab": "0 4 19", "ffn": {1: "0-5", 3: "0-4"}, "merged_heads": "none"}
    assert written | said | dict.fromkeys(("hidden", "kv_groups", "q_heads"), "all") == written
    assert kept_digest(read_plan(tmp_path / FILE, SOURCE, "m")[1]) == written["digest"]


def test_what_is_kept_has_a_digest_of_each_axis_and_of_kept_layers_alone():
    others = [replace(KEPT, **{name: None}) for name in ("hidden", "ffn", "kv_groups", "heads", "partners")]
    others += [
        replace(KEPT, layers=np.array([0, 1, 3]), ffn={**KEPT.ffn, 1: KEPT.ffn[2]}),
        replace(KEPT, vocab=np.arange(20)),
        replace(KEPT, hidden=KEPT.hidden[::-1]),
        replace(KEPT, ffn={**KEPT.ffn, 3: np.array([0, 3, 4])}),
        replace(KEPT, heads=KEPT.partners, partners=KEPT.heads),
    ]
    assert len({kept_digest(one) for one in (KEPT, *others)}) == 1 + len(others)
    of_no_layer = {name: getattr(KEPT, name).copy() for name in ("kv_groups", "heads", "partners")}
    for array in of_no_layer.values():
        array[1] = 9
    assert kept_digest(replace(KEPT, **of_no_layer, ffn={**KEPT.ffn, 1: np.arange(3)})) == kept_digest(KEPT)
    # Where one layer's neurons end and the next one's begin counts.
    two = [Kept(np.arange(2), ffn={0: np.arange(n), 1: np.arange(n, 3)}) for n in (1, 2)]
    assert kept_digest(two[0]) != kept_digest(two[1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": "0-3 5 8"}, "hidden must stay within 0 to 7"),
        ({"hidden": f"0-4 {2**31 - 1}"}, "hidden must stay within 0 to 7"),
        ({"hidden": f"0-4 {2**31}"}, "hidden is not a list of indices such as '0-3 5 7-9'"),
        ({"hidden": "0-4 6-7"}, "hidden keeps 7 indices, target says 6"),
        ({"hidden": "0-3 7 5"}, "hidden must be ascending, without repeats, from 0 to 7"),
        ({"hidden": "0-3 3 5"}, "hidden must be ascending, without repeats"),
        ({"hidden": "0-3 5 x"}, "hidden is not a list of indices"),
        ({"hidden": ""}, "hidden is not a list of indices"),
        ({"hidden": "-1 0-4"}, "hidden is not a list of indices"),
        ({"hidden": "0-1-5"}, "hidden is not a list of indices"),
        ({"hidden": "all"}, "hidden keeps all 8, target says 6"),
        ({"layers": "0-2 4"}, "layers must stay within 0 to 3"),
        ({"layers": "0-1"}, "layers keeps 2 indices, target says 3"),
        ({"vocab": "0-18"}, "vocab keeps 19 indices, target says 20"),
        ({"vocab": "0-18 20"}, "vocab must stay within 0 to 19"),
        ({"ffn": "all"}, "ffn keeps all 6 of layer 0, target says 4"),
        ({"ffn": "0-3"}, "ffn has no entry 0"),
        ({"layers": "0-1 3"}, "kv_groups has no entry 1"),
        ({"ffn": {0: "0-2 6"}}, "ffn.0 must stay within 0 to 5"),
        ({"ffn": {3: "0-2"}}, "ffn.3 keeps 3 indices, target says 4"),
        ({"kv_groups": "all", "target": {"num_attention_heads": 4}}, "kv_groups keeps all 4, target says 2"),
        ({"kv_groups": {3: "0+1"}}, "kv_groups.3 must give 2 groups, each of as many source groups"),
        ({"kv_groups": {3: "0+1 2"}}, "kv_groups.3 must give 2 groups, each of as many source groups"),
        ({"kv_groups": {3: "0+1 2+4"}}, "kv_groups.3 must name groups from 0 to 3, each once"),
        ({"kv_groups": {3: "0+1 2+-1"}}, "kv_groups.3 must name groups from 0 to 3, each once"),
        ({"kv_groups": {3: "0+1 1+2"}}, "kv_groups.3 must name groups from 0 to 3, each once"),
        ({"kv_groups": {3: "2+3 0+1"}}, "kv_groups.3 must be ascending"),
        ({"kv_groups": {3: "a+b c+d"}}, "kv_groups.3 is not a list of groups such as '0 2' or '0+1 2+3'"),
        ({"kv_groups": {3: "0 2"}}, "kv_groups must average as many groups in every layer"),
        ({"q_heads": "all"}, "q_heads keeps all, target says 6"),
        ({"q_heads": {0: "0-2, 4-6, 7"}}, "q_heads.0 must give the heads of 2 groups, with commas between them"),
        ({"q_heads": {0: "0-1 4, 5-7"}}, "q_heads.0: head 4 is not in group 0+1"),
        ({"q_heads": {2: "0-2, 3-5"}}, "q_heads.2: head 3 is not in group 2+3"),
        ({"q_heads": {0: "0-3, 4-6"}}, "q_heads.0 keeps 4 indices, target says 3"),
        ({"q_heads": {0: "0-2, 6-8"}}, "q_heads.0 must stay within 0 to 7"),
        ({"merged_heads": {0: "2"}}, "merged_heads.0 is not a list such as '1<2 5<6'"),
        ({"merged_heads": {0: "2<1"}}, "merged_heads.0: 2<1 must merge a head that goes into one that stays"),
        ({"merged_heads": {0: "2<3 7<3"}}, "merged_heads.0: 7<3 must merge a head that goes into one that stays"),
        ({"merged_heads": {0: "2<8"}}, "merged_heads.0: 2<8 must merge"),
        ({"merged_heads": {0: "2<-3"}}, "merged_heads.0: 2<-3 must merge"),
        ({"merged_heads": "all"}, "merged_heads has no entry 0"),
        ({"other": 1}, "other is not a key of a plan"),
        ({"model": "blake3:n"}, "was made for another model (digest differs)"),
        ({"target": [1]}, "target must give num_layers, hidden_size, ffn_hidden_size, num_attention_heads, "),
        ({"target": {"depth": 2}}, "target must give num_layers"),
        ({"target": {"hidden_size": 9}}, "target.hidden_size=9 must be a whole number from 1"),
    ],
)
def test_entries_that_cannot_be_are_refused_by_their_key(tmp_path, change, says):
    read(tmp_path)
    with pytest.raises(UserError) as refused:
        read(tmp_path, **change)
    assert f"plan={tmp_path / FILE}" in str(refused.value) and says in str(refused.value)


@pytest.mark.parametrize("key", PLAN)
def test_a_plan_has_every_key(tmp_path, key):
    (tmp_path / FILE).write_text(yaml.safe_dump({k: v for k, v in PLAN.items() if k != key}))
    with pytest.raises(UserError, match=f"{key} is missing"):
        read_plan(tmp_path / FILE, SOURCE, "blake3:m")


def test_groups_that_are_no_averages_may_be_ranges(tmp_path):
    sizes = {**SIZES, "num_attention_heads": 4}
    heads = dict.fromkeys((0, 2, 3), "2-3, 4-5")
    kept = read(tmp_path, target=sizes, kv_groups=dict.fromkeys((0, 2, 3), "1-2"), q_heads=heads, merged_heads="none")
    assert kept.kv_groups.tolist() == over_layers({key: [[1], [2]] for key in (0, 2, 3)}).tolist()
    assert kept.heads[3].tolist() == [[2, 3], [4, 5]] and kept.partners is None


def test_heads_are_whole_with_their_groups_alone(tmp_path):
    whole = {"target": {**SIZES, "num_attention_heads": 8, "num_query_groups": 4}, "merged_heads": "none"}
    kept = read(tmp_path, **whole, kv_groups="all", q_heads="all")
    assert kept.kv_groups is kept.heads is None
    by_layer = dict.fromkeys((0, 2, 3), "0-1, 2-3, 4-5, 6-7")
    for change in (
        {"q_heads": by_layer, "kv_groups": "all"},
        {"q_heads": "all", "kv_groups": {i: "0-3" for i in by_layer}},
    ):
        with pytest.raises(UserError, match="kv_groups and q_heads go together: both all, or both by layer"):
            read(tmp_path, **whole, **change)
    with pytest.raises(UserError, match="merged_heads without q_heads: nothing is cut that could be merged"):
        read(tmp_path, **{**whole, "merged_heads": PLAN["merged_heads"]}, kv_groups="all", q_heads="all")


def test_neurons_are_whole_where_every_kept_layer_has_its_own(tmp_path):
    uneven = SOURCE.resized(ffn_hidden_size=(4, 6, 4, 5))
    (tmp_path / FILE).write_text(
        yaml.safe_dump({**PLAN, "ffn": "all", "target": {**SIZES, "ffn_hidden_size": [4, 4, 5]}})
    )
    assert read_plan(tmp_path / FILE, uneven, "blake3:m")[1].ffn is None
    (tmp_path / FILE).write_text(yaml.safe_dump({**PLAN, "ffn": "all"}))
    with pytest.raises(UserError, match="ffn keeps all 5 of layer 3, target says 4"):
        read_plan(tmp_path / FILE, uneven, "blake3:m")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0-2 5", ["0", "1", "2", "5"]),
        ("3-3", ["3"]),
        ("5-3", []),
        ("a-b -1 2-", ["a-b", "-1", "2-"]),
        (f"{2**20 - 1}-{2**20 - 1}", [str(2**20 - 1)]),
        (f"{2**20}-{2**20}", [f"{2**20}-{2**20}"]),
    ],
)
def test_ranges_are_written_out_and_what_is_none_stays(text, found):
    assert ranges_to_list(text) == found
