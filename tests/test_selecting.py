"""What stays, by numbers alone: targets that can and cannot be, what needs scores, and indices worked out by hand."""

import numpy as np
import pytest

from minitron_megatron.config import PruneOptions
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import Scores
from minitron_megatron.prune.select import choose, needs_scores, target_shape
from tests.test_plans import SOURCE

PLAIN = SOURCE.resized(num_query_groups=8)
UNEVEN = SOURCE.resized(ffn_hidden_size=(6, 4, 5, 6))
MEAN, MERGE, BOTH = (
    PruneOptions(groups=g, heads=h) for g, h in (("mean", "drop"), ("drop", "merge"), ("mean", "merge"))
)


@pytest.mark.parametrize(
    ("source", "target", "options", "says"),
    [
        (SOURCE, {"hidden_size": True}, None, "target.hidden_size=True must be a whole number from 1 to the source model's 8"),
        (SOURCE, {"hidden_size": 4.0}, None, "target.hidden_size=4.0 must be a whole number"),
        (SOURCE, {"ffn_hidden_size": [6, 6, 6]}, None, "has 3 sizes for 4 layers: give one, or one a layer"),
        (SOURCE, {"ffn_hidden_size": [6, 6, 6, 7]}, None, "target.ffn_hidden_size=7 must be a whole number from 1 to"),
        (SOURCE, {"ffn_hidden_size": [0, 6, 6, 6]}, None, "target.ffn_hidden_size=0 must be a whole number from 1 to"),
        (SOURCE, {"ffn_hidden_size": (1, 6, 2, 3)}, None, None),
        (SOURCE, {"ffn_hidden_size": [6, 5], "num_layers": 2}, None, None),
        (UNEVEN, {"num_layers": 3}, None, "target.ffn_hidden_size is needed: the source's layers have sizes of their own"),
        (UNEVEN, {"num_layers": 4}, None, None),
        (UNEVEN, {"num_layers": 3, "ffn_hidden_size": 4}, None, None),
        (UNEVEN, {"ffn_hidden_size": 7}, None, "target.ffn_hidden_size=7 must be a whole number from 1 to the source model's 6"),
        (SOURCE, {"num_attention_heads": 6}, None, "num_attention_heads=6 is not a multiple of num_query_groups=4"),
        (SOURCE, {"num_attention_heads": 4}, None, None),
        (SOURCE, {"num_query_groups": 2}, None, "needs 4 heads a group, the source has 2: lower target.num_attention_heads, "
         "raise target.num_query_groups, or merge groups (prune.groups=mean)"),
        (SOURCE, {"num_query_groups": 2}, MEAN, None),
        (SOURCE, {"num_query_groups": 3, "num_attention_heads": 6}, None, None),
        (SOURCE, {"num_query_groups": 3, "num_attention_heads": 6}, MEAN, "num_query_groups=3 does not divide the source's 4"),
        (SOURCE, {"num_query_groups": 1, "num_attention_heads": 8}, MEAN, None),
        # All groups stay: nothing is averaged, and a group has its own heads alone.
        (SOURCE, {"num_attention_heads": 8}, MEAN, None),
        (SOURCE, {"num_attention_heads": 4}, MERGE, None),
        (SOURCE, {"num_query_groups": 2, "num_attention_heads": 2}, BOTH, "the target keeps 1 of 4 in each group"),
        (SOURCE, {"num_query_groups": 2, "num_attention_heads": 4}, BOTH, None),
        (PLAIN, {"num_query_groups": 3, "num_attention_heads": 3}, MERGE, "the target keeps 3 of 8"),
        (PLAIN, {"num_query_groups": 4, "num_attention_heads": 4}, MERGE, None),
        (PLAIN, {"num_query_groups": 2, "num_attention_heads": 2}, BOTH, "the target keeps 1 of 4"),
        (PLAIN, {"num_query_groups": 2, "num_attention_heads": 4}, BOTH, None),
    ],
)  # fmt: skip
def test_targets_that_can_be(source, target, options, says):
    if says is None:
        found = target_shape(source, target, [], options)
        wanted = {k: tuple(v) if isinstance(v, list) else v for k, v in target.items()}
        assert found == source.resized(**wanted)
        return
    with pytest.raises(UserError) as refused:
        target_shape(source, target, [], options)
    assert says in str(refused.value)
    # Plain heads are the model's, not a group's.
    assert ("in each group" in str(refused.value)) == (says.endswith("in each group"))


@pytest.mark.parametrize(
    ("drop", "target", "says"),
    [
        ([3], {}, None),
        ([0, 1, 2], {}, None),
        ([0, 1, 2], {"num_layers": 1}, None),
        ([0, 1, 2, 3], {}, "drop_layers=[0, 1, 2, 3] leaves no layer"),
        ([4], {}, "drop_layers=[4]: 4 is not a layer of the source (0 to 3)"),
        ([1, -1], {}, "-1 is not a layer of the source"),
        ([1, 1], {}, "drop_layers=[1, 1]: a layer is named twice"),
        ([1], {"num_layers": 4}, "drop_layers leaves 3 layers, target.num_layers is 4: give one of them"),
        ([1], {"ffn_hidden_size": [6, 6, 6, 6]}, "has 4 sizes for 3 layers"),
    ],
)
def test_layers_that_are_named_to_go(drop, target, says):
    if says is None:
        assert target_shape(SOURCE, target, drop) == SOURCE.resized(num_layers=4 - len(drop))
        return
    with pytest.raises(UserError) as refused:
        target_shape(SOURCE, target, drop)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("source", "sizes", "drop", "needed"),
    [
        (SOURCE, {}, [], False),
        (SOURCE, {"num_layers": 3}, [], True),
        (SOURCE, {"num_layers": 3}, [2], False),
        (SOURCE, {"num_layers": 3, "hidden_size": 7}, [2], True),
        (SOURCE, {"ffn_hidden_size": 5}, [], True),
        (SOURCE, {"vocab_size": 19}, [], True),
        (SOURCE, {"num_query_groups": 2, "num_attention_heads": 4}, [], True),
        (UNEVEN, {}, [], False),
        (UNEVEN, {"num_layers": 3, "ffn_hidden_size": 4}, [3], True),
        (UNEVEN, {"num_layers": 3, "ffn_hidden_size": (6, 4, 5)}, [3], False),
        (UNEVEN, {"num_layers": 2, "ffn_hidden_size": 6}, [1, 2], False),
        (UNEVEN, {"num_layers": 2, "ffn_hidden_size": (5, 4)}, [0, 1], True),
    ],
)
def test_scores_are_needed_where_something_is_left_to_choose(source, sizes, drop, needed):
    assert needs_scores(source, source.resized(**sizes), drop) is needed


def scores(**tensors) -> Scores:
    """Scores in which the later is the more important, but for what is given."""
    whole = {
        "ffn": np.tile(np.arange(6.0), (4, 1)),
        "heads": np.tile(np.arange(8.0), (4, 1)),
        "hidden.attention_norm": np.tile(np.arange(8.0), (4, 1)),
        "hidden.mlp_norm": np.zeros((4, 8)),
        "layers": np.arange(4.0),
    }
    return Scores({k: np.asarray(v, np.float32) for k, v in {**whole, **tensors}.items()}, "")


@pytest.mark.parametrize(
    ("influence", "count", "keep_last", "drop", "kept"),
    [
        ([3, 2, 1, 0], 2, 1, [], [0, 3]),
        ([3, 2, 1, 0], 2, 0, [], [0, 1]),
        ([3, 2, 1, 0], 2, 2, [], [2, 3]),
        ([3, 2, 1, 0], 2, 9, [], [2, 3]),
        ([0, 5, 5, 5], 3, 1, [], [1, 2, 3]),
        ([0, 0, 0, 0], 3, 1, [], [0, 1, 3]),
        ([3, 2, 1, 0], 3, 1, [0], [1, 2, 3]),
        ([3, 2, 1, 0], 2, 1, [0, 3], [1, 2]),
        ([3, 2, 1, 0], 4, 0, [], [0, 1, 2, 3]),
    ],
)
def test_layers_go_by_number_or_by_influence_and_the_last_stay(influence, count, keep_last, drop, kept):
    options = PruneOptions(keep_last_layers=keep_last)
    target = SOURCE.resized(num_layers=count)
    assert choose(SOURCE, target, scores(layers=influence), drop, options).layers.tolist() == kept


def test_an_axis_that_stays_as_large_is_kept_whole():
    """Without scores, too; every other one is chosen, channels by the sum over the norms of all layers."""
    whole = choose(SOURCE, SOURCE, None, [])
    assert (whole.hidden, whole.vocab, whole.ffn, whole.kv_groups, whole.heads, whole.partners) == (None,) * 6
    norms = {"hidden.attention_norm": np.eye(4, 8), "hidden.mlp_norm": np.tile([0, 0, 0, 0, 0.5, 0, 0, 0.2], (4, 1))}
    target, vocab = SOURCE.resized(hidden_size=5, ffn_hidden_size=2), np.arange(3)
    found = choose(SOURCE, target, scores(**norms), [], vocab=vocab)
    assert found.hidden.tolist() == [0, 1, 2, 3, 4] and found.vocab is vocab and found.heads is None
    assert {i: neurons.tolist() for i, neurons in found.ffn.items()} == dict.fromkeys(range(4), found.ffn[0].tolist())
    assert found.ffn[0].tolist() == [4, 5]


def test_each_layer_keeps_as_many_neurons_as_the_target_has_there():
    """Of those that it has: what stands behind them in a table of scores is of wider layers."""
    target = UNEVEN.resized(num_layers=3, ffn_hidden_size=(2, 3, 6))
    found = choose(UNEVEN, target, scores(), [0])
    assert {i: neurons.tolist() for i, neurons in found.ffn.items()} == {1: [2, 3], 2: [2, 3, 4], 3: [0, 1, 2, 3, 4, 5]}
    with pytest.raises(UserError, match=r"target\.ffn_hidden_size=5 for source layer 1, which has 4 neurons"):
        choose(UNEVEN, UNEVEN.resized(ffn_hidden_size=5), scores(), [])
    assert choose(UNEVEN, UNEVEN.resized(num_layers=3, ffn_hidden_size=(4, 5, 6)), scores(), [0]).ffn is None


# Heads of a layer by importance; groups of two: 0 1 | 2 3 | 4 5 | 6 7, which sum up to 9, 11, 5 and 11.
WORTH = [9, 0, 4, 7, 3, 2, 5, 6]


@pytest.mark.parametrize(
    ("sizes", "options", "groups", "heads", "partners"),
    [
        ((4, 4), None, [[0], [1], [2], [3]], [[0], [3], [4], [7]], None),
        ((4, 2), None, [[1], [3]], [[2, 3], [6, 7]], None),
        ((2, 2), None, [[1], [3]], [[3], [7]], None),
        ((3, 3), None, [[0], [1], [3]], [[0], [3], [7]], None),
        ((8, 2), MEAN, [[0, 1], [2, 3]], [[0, 1, 2, 3], [4, 5, 6, 7]], None),
        ((4, 2), MEAN, [[0, 1], [2, 3]], [[0, 3], [6, 7]], None),
        ((2, 1), MEAN, [[0, 1, 2, 3]], [[0, 3]], None),
        ((4, 4), MERGE, [[0], [1], [2], [3]], [[0], [3], [4], [7]], [[1], [2], [5], [6]]),
        # Of four heads by falling importance 0 3 2 1 and 7 6 4 5: the last kept takes the first that goes, and so outwards.
        ((6, 2), BOTH, [[0, 1], [2, 3]], [[0, 2, 3], [4, 6, 7]], [[-1, 1, -1], [5, -1, -1]]),
        ((4, 2), BOTH, [[0, 1], [2, 3]], [[0, 3], [6, 7]], [[1, 2], [4, 5]]),
    ],
)
def test_groups_and_heads_by_hand(sizes, options, groups, heads, partners):
    """Every layer by its own scores: the others have theirs the other way round."""
    own = np.array([WORTH, WORTH[::-1], WORTH, WORTH[::-1]], np.float32)
    target = SOURCE.resized(num_attention_heads=sizes[0], num_query_groups=sizes[1])
    found = choose(SOURCE, target, scores(heads=own), [], options)
    for layer in (0, 2):
        assert found.kv_groups[layer].tolist() == groups and found.heads[layer].tolist() == heads
        assert partners is None or found.partners[layer].tolist() == partners
    assert (found.partners is None) == (partners is None)
    mirrored = [[7 - head for head in group[::-1]] for group in heads[::-1]]
    assert found.heads[1].tolist() == mirrored


def test_plain_heads_take_up_the_residual_of_any_other():
    """Of 8 heads by falling importance 0 3 7 6 2 4 5 1, the five best stay: the fifth takes the sixth, the third the last."""
    target = PLAIN.resized(num_attention_heads=5, num_query_groups=5)
    found = choose(PLAIN, target, scores(heads=[WORTH] * 4), [], MERGE)
    assert found.heads[0].tolist() == [[0], [2], [3], [6], [7]] == found.kv_groups[0].tolist()
    assert found.partners[0].tolist() == [[-1], [4], [-1], [5], [1]]
    # Averaged in pairs they are groups like others.
    target = PLAIN.resized(num_attention_heads=4, num_query_groups=4)
    averaged = choose(PLAIN, target, scores(heads=[WORTH] * 4), [], BOTH)
    assert averaged.heads[0].tolist() == [[0], [3], [4], [7]]
    assert averaged.partners[0].tolist() == [[1], [2], [5], [6]]
