"""Cutting a live sharded model, from any layout into any other, gives the very bits that cutting its files gives."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitron_megatron.config import PruneConfig, PruneOptions, TargetConfig
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.foresee import bytes_of_ranks
from minitron_megatron.prune.live import Side
from minitron_megatron.prune.prune import prune_model
from tests import jobs
from tests.test_axes import shape
from tests.test_prune import random_scores, write_scores
from tests.tiny import hf_model, imported, model_option

LAYOUTS = [
    {},
    {"tensor": 2},
    {"tensor": 4},
    {"pipeline": 2},
    {"pipeline": 4},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
]
# What every layout above still divides.
TARGETS = {
    "hidden": ({"hidden_size": 20}, {}),
    "ffn": ({"ffn_hidden_size": 28}, {}),
    "heads": ({"num_attention_heads": 4}, {}),
    "heads merged": ({"num_attention_heads": 4}, {"heads": "merge"}),
    "vocab": ({"vocab_size": 280}, {}),
    "ffn of layers": ({"ffn_hidden_size": [40, 28, 36, 32]}, {}),
    "all": ({"hidden_size": 24, "ffn_hidden_size": 32, "num_attention_heads": 4, "vocab_size": 270}, {}),
}
# Groups go where tensor parallelism of the target leaves some for each rank.
GROUPS = {
    "groups": ({"num_query_groups": 2, "num_attention_heads": 4}, {}),
    "groups averaged": ({"num_query_groups": 2, "num_attention_heads": 6}, {"groups": "mean", "heads": "merge"}),
    "layers": ({"num_layers": 2, "num_query_groups": 2, "num_attention_heads": 4}, {}),
}


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """`cuts(tied, name)` gives (source folder, folder cut from its files), made when first asked for."""
    folder = tmp_path_factory.mktemp("live")
    made = {}

    def cut(tied: bool, name: str):
        if tied not in made:
            model = hf_model(tie_word_embeddings=tied)
            made[tied] = imported(model, folder / f"tied {tied}", torch.bfloat16 if tied else torch.float32)
        if (tied, name) not in made:
            sizes, options = {**TARGETS, **GROUPS}[name]
            where = write_scores(random_scores(made[tied]), folder / f"by {tied} {name}")
            cfg = PruneConfig(
                model=model_option(made[tied]),
                scores=str(where),
                target=TargetConfig(**sizes),
                prune=PruneOptions(**options),
                output=str(folder / f"cut {tied} {name}"),
            )
            prune_model(cfg)
            made[tied, name] = cfg.output
        return made[tied], made[tied, name]

    return cut


def check(gloo, cuts, tied, name, source, target):
    whole, cut = cuts(tied, name)
    wrong = gloo(4, jobs.cut_between, str(whole), str(whole), cut, source, target)
    assert wrong == [[]] * 4, (name, source, target)


@pytest.mark.parametrize("name", [*TARGETS, *GROUPS])
def test_every_axis_from_one_layout_to_another(gloo, cuts, name):
    """Kept indices lie unevenly over the source's ranks: the tensor-parallel ranks of the target share them anew."""
    check(gloo, cuts, False, name, {"tensor": 4}, {"tensor": 2, "pipeline": 2})


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.sampled_from([*TARGETS]), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_any_layout_to_any_other(gloo, cuts, tied, name, source, target):
    check(gloo, cuts, tied, name, source, target)


@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 4]), st.sampled_from([None, 2]), st.booleans(), st.data()
)
def test_every_shard_of_every_tensor_has_a_rank(tensor, pipeline, virtual, tied, data):
    """Each layer is on one stage, each position of a sharded dimension on one tensor-parallel rank; replicas are equal."""
    from minitron_megatron.models.axes import slots

    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual if pipeline > 1 else None,
        world_size=tensor * pipeline * data.draw(st.sampled_from([1, 2])),
    )
    side = Side(shape(num_layers=9, tied_embeddings=tied), layout)
    held = {rank: 0 for rank in range(layout.world_size)}
    for slot in slots(side.shape):
        for t in range(tensor):
            ranks = side.ranks(slot, t)
            assert len(ranks) == len(set(ranks)) == layout.data * len(side.stages(slot))
            assert all(layout.place(rank)[0] == t for rank in ranks)
            for rank in ranks:
                held[rank] += 1
    assert min(held.values()) > 0


def test_bytes_of_a_rank_are_those_of_its_parameters(gloo, tmp_path):
    path = imported(hf_model(tie_word_embeddings=True), tmp_path)
    for layout in ({"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}):
        found = gloo(4, jobs.parameter_bytes, str(path), layout, layout=layout)
        full = Layout(**layout, world_size=4)
        wanted = bytes_of_ranks(jobs.open_model_folder(path).shape, full)
        assert found == [wanted[full.place(rank)[1]] for rank in range(4)]


def test_bytes_fall_as_ranks_grow():
    """70 B: tensor 8 × pipeline 4 holds about a 32nd of the weights on each rank."""
    large: ModelShape = shape(hidden_size=8192, ffn_hidden_size=28672, num_layers=80, num_attention_heads=64)
    whole = sum(bytes_of_ranks(large, Layout()))
    share = max(bytes_of_ranks(large, Layout(tensor=8, pipeline=4, world_size=32)))
    assert whole / 36 < share < whole / 28
