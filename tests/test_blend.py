"""A blend of data folders, as it is written."""

import math

import pytest

from minitron_megatron.data.folder import parse_blend
from tests.test_bounds import refused


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", ([1.0], ["a"])),
        (["a", "b"], ([], ["a", "b"])),
        ([1, "a", 2.5, "b"], ([1.0, 2.5], ["a", "b"])),
        ([1, "a", "2", "b"], None),
        ([1, "a", True, "b"], None),
        ([1, "a", 2], None),
        ([1, "a", 2, 3], None),
        ([1, "a", 0, "b"], None),
        ([1, "a", -1, "b"], None),
        ([1, "a", math.inf, "b"], None),
        ([1, "a", math.nan, "b"], None),
        ([1, "a", 2, "a"], None),
        ([], None),
        (None, None),
    ],
)
def test_a_blend_is_a_folder_or_a_list_whose_every_weight_is_a_number(path, found):
    if found is None:
        assert refused(parse_blend, path)
    else:
        assert parse_blend(path) == found
