"""Cutting, of files and of live sharded models from any layout into any other, gives the very bits of a plain reference."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.config import FAMILY_NAMES, PruneConfig, PruneOptions, TargetConfig
from minitron_megatron.models.axes import slots
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.foresee import bytes_of_ranks
from minitron_megatron.prune.live import Side, _Move
from minitron_megatron.prune.plan import read_plan
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.prune.select import Kept
from tests import jobs, reference
from tests.test_axes import shape
from tests.test_prune import exported, random_scores, write_scores
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
    """`cuts(family, name)` gives (source folder, folder cut from its files and held against the reference), made once."""
    folder = tmp_path_factory.mktemp("live")
    made = {}

    def cut(family: str, name: str):
        if family not in made:
            # Mistral: plain heads. Qwen2 and Llama in bfloat16: sums of merged heads are rounded.
            sizes = {"tie_word_embeddings": family == "qwen2", "num_key_value_heads": 8 if family == "mistral" else 4}
            # transformers' own tokenizer of Qwen2 adds a token.
            sizes |= {"vocab_size": 304} if family == "qwen2" else {}
            dtype = torch.bfloat16 if family in ("llama", "qwen2") else torch.float32
            made[family] = imported(hf_model(family=family, **sizes), folder / family, dtype)
        if (family, name) not in made:
            made[family, name] = _cut(made[family], name, folder / f"{family} {name}")
        return made[family], made[family, name]

    return cut


def _cut(whole, name, folder):
    sizes, options = {**TARGETS, **GROUPS}[name]
    plain = open_model_folder(whole).shape.heads_per_group == 1
    if plain and "num_attention_heads" in sizes and options.get("groups") != "mean":
        sizes = {**sizes, "num_query_groups": sizes["num_attention_heads"]}
    cfg = PruneConfig(
        model=model_option(whole),
        scores=str(write_scores(random_scores(whole), folder / "by")),
        target=TargetConfig(**sizes),
        prune=PruneOptions(**options),
        output=str(folder / "cut"),
    )
    prune_model(cfg)
    source = open_model_folder(whole)
    _, kept = read_plan(folder / "cut" / "plan.yaml", source.shape, source.digest)
    if open_model_folder(cfg.output).shape.uniform:
        wanted = reference.cut(load_file(whole.parent / "hf" / "model.safetensors"), kept, source.shape)
        found = exported(cfg.output, folder / "hf")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    return cfg.output


def check(gloo, cuts, family, name, source, target):
    whole, cut = cuts(family, name)
    wrong = gloo(4, jobs.cut_between, str(whole), cut, source, target)
    assert wrong == [[]] * 4, (name, source, target)


@pytest.mark.bf16
@pytest.mark.parametrize("name", [*TARGETS, *GROUPS])
def test_every_axis_from_one_layout_to_another(gloo, cuts, name):
    """Kept indices lie unevenly over the source's ranks: the tensor-parallel ranks of the target share them anew."""
    check(gloo, cuts, "llama", name, {"tensor": 4}, {"tensor": 2, "pipeline": 2})


@pytest.mark.bf16
def test_a_piece_that_several_replicas_need_is_made_once(gloo, cuts):
    """One rank has the embedding and sends it to three: the bound on what is alive at once does not know how many."""
    check(gloo, cuts, "llama", "vocab", {"pipeline": 4}, {})


@pytest.mark.bf16
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(FAMILY_NAMES),
    st.sampled_from([*TARGETS, *GROUPS]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
)
def test_any_family_and_axis_from_any_layout_to_any_other(gloo, cuts, family, name, source, target):
    # Two groups cannot lie on four ranks, two layers not on four stages.
    target = target if name in TARGETS or 4 not in target.values() else {"tensor": 2}
    target = {"pipeline": 2} if name == "layers" and "virtual_pipeline" in target else target
    check(gloo, cuts, family, name, source, target)


@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 4]), st.sampled_from([None, 2]), st.booleans(), st.data()
)
def test_every_shard_of_every_tensor_has_a_rank(tensor, pipeline, virtual, tied, data):
    """Each layer is on one stage, each position of a sharded dimension on one tensor-parallel rank; replicas are equal."""
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


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, {}),
        ({"pipeline": 2}, {}),
        ({"pipeline": 4}, {"tensor": 2}),
        ({"tensor": 2}, {"tensor": 2, "pipeline": 2}),
        ({"tensor": 4}, {"pipeline": 2}),
        ({"pipeline": 8}, {}),
    ],
)
def test_a_rank_keeps_what_it_has_and_replicas_share_what_others_need(source, target):
    """Each position that a rank needs comes to it once, from a rank that holds it."""
    small = shape(
        num_layers=8,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=4,
        num_query_groups=4,
        head_dim=4,
        vocab_size=9,
    )
    smaller = small.resized(hidden_size=4)
    sides = [Side(one, Layout(**layout, world_size=8)) for one, layout in ((small, source), (smaller, target))]
    for slot in slots(smaller):
        move = _Move(*sides, Kept(np.arange(8), hidden=np.array([0, 3, 5, 7])), slot)
        pieces = [move._pieces(i) for i in range(sides[1].layout.tensor)]
        messages = move._messages(pieces)
        for i, piece in enumerate(pieces):
            for to in sides[1].ranks(slot, i):
                places = [piece.of[j][0] for rank, _, j, _ in messages if rank == to]
                assert sorted(np.concatenate(places)) == list(range(len(piece.needed))), (slot.row.name, to)
        for to, _, j, sender in messages:
            holders = sides[0].ranks(slot, j)
            assert sender == to if to in holders else sender in holders
            # Replicated along the tensor-parallel axis: from the rank of the same number.
            if slot.row.tensor_parallel_axis is None:
                assert j == sides[1].layout.place(to)[0] % sides[0].layout.tensor
        for i, j in {message[1:3] for message in messages}:
            sent = [sender for to, *ij, sender in messages if ij == [i, j] and to != sender]
            counts = [sent.count(rank) for rank in sides[0].ranks(slot, j)]
            assert max(counts) - min(counts) <= 1 or not sent, (slot.row.name, counts)


def test_bytes_of_a_rank_are_those_of_its_parameters(gloo, tmp_path):
    path = imported(hf_model(tie_word_embeddings=True), tmp_path)
    for layout in ({"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}):
        found = gloo(4, jobs.parameter_bytes, str(path), layout, layout=layout)
        full = Layout(**layout, world_size=4)
        wanted = bytes_of_ranks(open_model_folder(path).shape, full)
        assert found == [wanted[full.place(rank)[1]] for rank in range(4)]


def test_bytes_fall_as_ranks_grow():
    """70 B: tensor 8 × pipeline 4 holds about a 32nd of the weights on each rank."""
    large: ModelShape = shape(hidden_size=8192, ffn_hidden_size=28672, num_layers=80, num_attention_heads=64)
    whole = sum(bytes_of_ranks(large, Layout()))
    share = max(bytes_of_ranks(large, Layout(tensor=8, pipeline=4, world_size=32)))
    assert whole / 36 < share < whole / 28
