"""Megatron's models compute what transformers' do, in every layout, and hold what the axis table says they hold."""

import itertools

import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, axis_table
from minitron_megatron.models.build import pick_engine
from minitron_megatron.models.families import hf_config, shape_from_hf
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.parallel.layout import Layout
from tests import jobs
from tests.tiny import LLAMA3, SIZES, hf_model, imported

LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (3, {"pipeline": 3}),
    (4, {"tensor": 4}),
    (2, {}),
]
MODELS = {
    "grouped, untied": {},
    "plain heads": {"num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "head_dim of its own": {"head_dim": 16, "num_attention_heads": 4},
    "five layers": {"num_hidden_layers": 5},
}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def names(value):
    return "-".join(f"{k}{v}" for k, v in value.items()) or "one" if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind of model, its transformers logits on some tokens, and its model folder."""
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    made = {}
    for name, sizes in MODELS.items():
        model = hf_model(**sizes)
        with torch.no_grad():
            wanted = model(tokens).logits
        made[name] = (imported(model, tmp_path_factory.mktemp("model")), wanted)
    return tokens, made


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(gloo, folders, name):
    tokens, made = folders
    path, wanted = made[name]
    (found,) = gloo(1, jobs.logits, str(path), tokens, {}, layout={})
    assert relative(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["grouped, untied", "tied"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS[1:], ids=names)
def test_logits_are_the_same_in_every_layout(gloo, folders, name, ranks, layout):
    tokens, made = folders
    path, wanted = made[name]
    found = [out for out in gloo(ranks, jobs.logits, str(path), tokens, layout, layout=layout) if out is not None]
    assert found and all(relative(out, wanted) <= 1e-5 for out in found)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual_pipeline": 2}), (4, {"pipeline": 4})],
    ids=names,
)
def test_layers_that_do_not_divide_over_the_stages(gloo, folders, ranks, layout):
    tokens, made = folders
    path, wanted = made["five layers"]
    found = [out for out in gloo(ranks, jobs.logits, str(path), tokens, layout, layout=layout) if out is not None]
    assert found and all(relative(out, wanted) <= 1e-5 for out in found)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_every_rank_holds_what_the_table_says(gloo, folders, ranks, layout):
    _, made = folders
    path, _ = made["grouped, untied"]
    folder = open_model_folder(path)
    reader, rows = WeightReader(folder.weights), {row.name: row for row in axis_table(folder.shape)}
    seen = set()
    for held in gloo(ranks, jobs.global_parameters, str(path), layout, layout=layout):
        for name, (indices, values) in held.items():
            row, _, layer = name.partition(".")
            whole = reader.read_slot(Slot(rows[row], int(layer) if layer else None), folder.shape)
            for dim, chosen in enumerate(indices):
                if chosen is not None:
                    whole = whole.index_select(dim, torch.from_numpy(chosen))
            assert torch.equal(values, whole), name
            seen.add(name)
    assert len(seen) == 4 * 6 + 3


def test_layouts_that_do_not_divide_are_refused():
    shape = shape_from_hf(hf_model().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "config.json")
    with pytest.raises(UserError, match=r"tensor=3 does not divide num_query_groups=4 .* use one of 1, 2, 4"):
        check_layout(shape, Layout(tensor=3, world_size=3))
    with pytest.raises(UserError, match=r"pipeline × parallel.virtual_pipeline=6 is more than num_layers=4"):
        check_layout(shape, Layout(pipeline=3, virtual_pipeline=2, world_size=3))
    with pytest.raises(UserError, match=r"sequence_length=33 is not a multiple"):
        check_sequence(33, Layout(tensor=2, sequence=True, world_size=2))


def test_engines_that_cannot_run_are_refused():
    from megatron.core.extensions.transformer_engine import HAVE_TE

    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    split = Layout(context=2, world_size=2)
    assert pick_engine("auto", Layout(), bf16, cpu) == pick_engine("local", Layout(), bf16, cuda) == "local"
    assert pick_engine("auto", Layout(), torch.float32, cuda) == "local"
    assert pick_engine("auto", Layout(), bf16, cuda) == ("te" if HAVE_TE else "local")
    refused = [
        (("te", Layout(), bf16, cpu, "student"), "student.engine=te needs a CUDA device"),
        (("auto", split, bf16, cpu), "context=2 needs Transformer Engine's attention"),
        (("local", split, bf16, cuda), "context=2 needs Transformer Engine's attention"),
    ]
    if HAVE_TE:
        refused.append((("auto", split, torch.float32, cuda), "context=2 needs precision=bf16"))
    else:
        refused.append(
            (("te", Layout(), bf16, cuda), "model.engine=te needs Transformer Engine, which cannot be imported")
        )
    for arguments, says in refused:
        with pytest.raises(UserError, match=says):
            pick_engine(*arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"dtype": "float16"}, "dtype float16 is not supported"),
        ({"num_attention_heads": 9}, "not a multiple of num_query_groups"),
        ({"hidden_size": None}, "whole number"),
    ],
)
def test_other_architectures_are_refused_by_name(change, says):
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], **change}
    with pytest.raises(UserError, match=says):
        shape_from_hf(config, "config.json")


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_configs_survive_the_round_trip(sizes):
    config = hf_model(**sizes).config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    shape = shape_from_hf(config, "config.json")
    assert shape_from_hf(hf_config(shape, config), "again") == shape
    assert shape_from_hf(hf_config(shape, {}), "again") == shape


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pipeline": 2}), (2, {"tensor": 2, "sequence": True})])
def test_documents_in_one_sample_are_as_if_each_were_alone(gloo, tmp_path, ranks, layout):
    path = imported(hf_model(), tmp_path)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ends = [(0, 6, 16), (0, 10, 16)]
    documents = torch.tensor([[sum(i >= end for end in row[1:]) for i in range(16)] for row in ends])
    arguments = (jobs.logits_of_documents, str(path), tokens, documents, layout)
    together, *_ = [out for out in gloo(ranks, *arguments, layout=layout) if out is not None]
    for row, places in enumerate(ends):
        for begin, end in itertools.pairwise(places):
            (alone,) = gloo(1, jobs.logits, str(path), tokens[row : row + 1, begin:end], {}, layout={})
            torch.testing.assert_close(together[row, begin:end], alone[0], atol=1e-5, rtol=1e-5)
