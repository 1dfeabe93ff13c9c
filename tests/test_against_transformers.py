"""Held against transformers: a folder in any spelling that people have is imported and exported as the same model, or refused.

    transformers writes ──twists──▶ folder ──import──▶ model ──export──▶ folder again
                                      └── transformers' logits  ==  transformers' logits ──┘

Twists are what versions, programs and hands make of a folder: keys moved, left out, null or unknown, weights sharded, saved over,
tied with a head. They come in any combination, from a seed: AGAINST_TRANSFORMERS_SEED tries others.
"""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.config import FAMILY_NAMES, ExportHfConfig, ImportHfConfig
from minitron_megatron.errors import UserError
from tests.tiny import model_option

SEED = int(os.environ.get("AGAINST_TRANSFORMERS_SEED", "18"))
EXAMPLES = 260
TOKENS = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(5))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 16}


class Folder:
    """A Hugging Face folder on its way: config and tensors, and how they are going to be stored."""

    def __init__(self, path: Path, family: str) -> None:
        self.path, self.family = path, family
        self.config = json.loads((path / "config.json").read_text())
        self.tensors = load_file(path / SINGLE)
        self.sharded = self.index_beside = self.misplaced = False

    def like_transformers_4(self) -> None:
        rope = self.config.pop("rope_parameters")
        self.config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            self.config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        self.config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        self.config["torch_dtype"] = self.config.pop("dtype")

    @property
    def rope(self) -> dict:
        """Where this folder says its rotary embeddings."""
        if "rope_parameters" in self.config:
            return self.config["rope_parameters"]
        if not self.config.get("rope_scaling"):
            self.config["rope_scaling"] = {"rope_type": "default"}
        return self.config["rope_scaling"]

    def write(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        if not self.sharded or self.index_beside:
            save_file(self.tensors, self.path / SINGLE, {"format": "pt"})
        if self.sharded or self.index_beside:
            # What an index beside the single file names is of an older model.
            older = 2.0 if self.index_beside else 1.0
            where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
            for file in set(where.values()):
                shard = {name: self.tensors[name] * older for name in names if where[name] == file}
                save_file(shard, self.path / file, {"format": "pt"})
            if self.misplaced:
                where[names[0]] = next(file for file in where.values() if file != where[names[0]])
            (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        if self.sharded and not self.index_beside:
            (self.path / SINGLE).unlink()


# Twists


def put(**values):
    return lambda folder: folder.config.update(values)


def leave_out(*keys: str):
    return lambda folder: [folder.config.pop(key, None) for key in keys]


def in_rope(**values):
    return lambda folder: folder.rope.update(values)


def theta_inside_alone(folder: Folder) -> None:
    folder.rope["rope_theta"] = folder.config.pop("rope_theta", folder.rope.get("rope_theta", 10000.0))


def both_ropes(folder: Folder) -> None:
    rope = dict(folder.rope)
    folder.config["rope_scaling"], folder.config["rope_parameters"] = rope, dict(rope)


def named_type(folder: Folder) -> None:
    folder.rope["type"] = folder.rope.pop("rope_type")


def length_at_the_top(folder: Folder) -> None:
    if (length := folder.rope.pop("original_max_position_embeddings", None)) is not None:
        folder.config["original_max_position_embeddings"] = length


def add_head(change: float):
    def add(folder: Folder) -> None:
        head = folder.tensors["model.embed_tokens.weight"].clone()
        head[3, 1] += change
        folder.tensors.setdefault("lm_head.weight", head)

    return add


def set_tensor(name: str, value):
    def change(folder: Folder) -> None:
        folder.tensors[name] = value(folder.tensors.get(name))

    return change


def first_is(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def store(**how):
    return lambda folder: vars(folder).update(how)


LAYER = "model.layers.0."
TWISTS = {
    # Rotary embeddings, in all the places where they are said
    "theta inside alone": theta_inside_alone,
    "another theta inside": in_rope(rope_theta=777.0),
    "another theta at the top": put(rope_theta=888.0),
    "both ropes": both_ropes,
    "both ropes, differing": lambda f: (both_ropes(f), f.config["rope_parameters"].update(rope_theta=999.0)),
    "type for rope_type": named_type,
    "no rope_type": lambda f: f.rope.pop("rope_type", None),
    "linear": in_rope(rope_type="linear", factor=2.0),
    "dynamic": in_rope(rope_type="dynamic", factor=2.0),
    "yarn": in_rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
    "llama3": in_rope(rope_type="llama3", **LLAMA3),
    "length at the top": length_at_the_top,
    "no length": lambda f: f.rope.pop("original_max_position_embeddings", None),
    "another length at the top": put(original_max_position_embeddings=24),
    "part of the head": put(partial_rotary_factor=0.5),
    "all of the head": put(partial_rotary_factor=1.0),
    "part, inside": in_rope(partial_rotary_factor=0.25),
    "no rope at all": leave_out("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    "null rope": put(rope_scaling=None),
    # Keys that are left out or null
    "no head_dim": leave_out("head_dim"),
    "null head_dim": put(head_dim=None),
    "no groups": leave_out("num_key_value_heads"),
    "null groups": put(num_key_value_heads=None),
    "no tie": leave_out("tie_word_embeddings"),
    "no activation": leave_out("hidden_act"),
    "no epsilon": leave_out("rms_norm_eps", "norm_eps"),
    "no biases": leave_out("attention_bias", "mlp_bias"),
    "null biases": put(attention_bias=None, mlp_bias=None),
    "no window": leave_out("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    "no dtype": leave_out("dtype", "torch_dtype"),
    "no architectures": leave_out("architectures"),
    # Keys that change something, or do not
    "swish": put(hidden_act="swish"),
    "gelu": put(hidden_act="gelu"),
    "a window": put(sliding_window=4),
    "a window that is used": put(sliding_window=4, use_sliding_window=True, max_window_layers=0, layer_types=None),
    "layer types": lambda f: f.config.update(layer_types=["full_attention"] * f.config["num_hidden_layers"]),
    "layer types of a window": lambda f: f.config.update(
        layer_types=["sliding_attention"] * f.config["num_hidden_layers"]
    ),
    "layer types too many": put(layer_types=["full_attention"] * 9),
    "harmless": put(
        pretraining_tp=1, use_cache=False, bos_token_id=1, eos_token_id=[2, 3], top_p=0.9, is_llama_config=True
    ),
    "multiplier": put(attention_multiplier=0.5),
    "soft cap": put(logits_soft_cap=30.0, final_logit_softcapping=30.0),
    "not causal": put(is_causal=False),
    "own code": put(auto_map={"AutoModelForCausalLM": "modeling.Model"}),
    "another model_type": put(model_type="qwen3"),
    "dtypes that differ": put(dtype="float32", torch_dtype="bfloat16"),
    "biases asked for": put(attention_bias=True),
    "no heads": put(num_attention_heads=0),
    "a string": put(hidden_size="16"),
    "a half epsilon": put(rms_norm_eps=0.5, norm_eps=0.5),
    # Weights
    "sharded": store(sharded=True),
    "saved over": store(index_beside=True),
    "an index that is wrong": store(sharded=True, misplaced=True),
    "the same head": add_head(0.0),
    "another head": add_head(1.0),
    "frequencies stored": set_tensor(LAYER + "self_attn.rotary_emb.inv_freq", lambda _: torch.ones(2)),
    "another tensor": set_tensor(LAYER + "self_attn.rotary_emb.scale", lambda _: torch.ones(2)),
    "NaN": set_tensor(LAYER + "mlp.up_proj.weight", first_is(float("nan"))),
    "infinity": set_tensor("model.embed_tokens.weight", first_is(float("-inf"))),
    "a norm in half": set_tensor("model.norm.weight", lambda tensor: tensor.half()),
    "a tensor less": lambda f: f.tensors.pop(LAYER + "mlp.down_proj.weight"),
    "a query bias": set_tensor(
        LAYER + "self_attn.q_proj.bias", lambda tensor: torch.ones(16) if tensor is None else tensor
    ),
}
# What must never be imported, whatever else there is.
NEVER = {
    "multiplier",
    "soft cap",
    "not causal",
    "own code",
    "no heads",
    "a string",
    "another tensor",
    "NaN",
    "infinity",
    "a norm in half",
    "a tensor less",
}

sizes = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 2),
        "hidden_size": st.sampled_from([16, 24]),
        "intermediate_size": st.sampled_from([12, 20]),
        "num_attention_heads": st.sampled_from([2, 4]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([4, 8]),
        "tie_word_embeddings": st.booleans(),
    }
)
examples = st.tuples(
    st.sampled_from(FAMILY_NAMES),
    sizes,
    st.sampled_from([None, "llama3"]),
    st.sampled_from([4, 5]),
    st.lists(st.sampled_from(sorted(TWISTS)), max_size=4, unique=True),
)


def written(path: Path, family: str, sizes: dict, rope: str | None, version: int, twists: list[str]) -> Folder:
    """A folder that transformers wrote, and twists changed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters = {"rope_type": "default", "rope_theta": 1000.0}
    if rope:
        parameters |= {"rope_type": rope, **LLAMA3}
    if family == "nemotron":
        parameters["partial_rotary_factor"] = 0.5
    own = {"sliding_window": None} if family == "mistral" else {}
    torch.manual_seed(len(twists))
    config = AutoConfig.for_model(
        family, **sizes, **own, vocab_size=40, max_position_embeddings=64, rope_parameters=parameters
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(path)
    folder = Folder(path, family)
    if version == 4:
        folder.like_transformers_4()
    for twist in twists:
        TWISTS[twist](folder)
    folder.write()
    return folder


def logits_of(path: Path) -> torch.Tensor | None:
    """What transformers computes with a folder; None where it cannot load it."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            return model(TOKENS).logits
    except Exception:
        return None


def outcome(root: Path, family: str, sizes: dict, rope: str | None, version: int, twists: list[str]) -> str:
    """refused, equal, or alone where transformers itself cannot load the folder. Anything else fails."""
    hf = written(root / "hf", family, sizes, rope, version, twists).path
    try:
        import_hf(ImportHfConfig(hf=str(hf), output=str(root / "model")))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error
        return "refused"
    assert not NEVER & set(twists), twists
    export_hf(ExportHfConfig(model=model_option(root / "model"), output=str(root / "back")))
    found, wanted = logits_of(root / "back"), logits_of(hf)
    assert found is not None, "the export cannot be loaded"
    if wanted is None:
        return "alone"
    assert torch.equal(found, wanted), f"logits are off by {float((found - wanted).abs().max())}"
    return "equal"


@pytest.mark.slow
def test_every_spelling_is_the_same_model_or_refused():
    outcomes, seen = Counter(), set()

    @seed(SEED)
    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(examples)
    def check(example):
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "hf").mkdir()
            outcomes[outcome(Path(root), *example)] += 1
        seen.add(repr(example))

    check()
    print(f"{len(seen)} combinations: {dict(outcomes)}")
    assert len(seen) >= 200
    # Neither refuses everything, nor meets only what is plain.
    assert outcomes["equal"] >= 60 and outcomes["refused"] >= 40


PLAIN = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("twists", "wanted"),
    [
        ([], "equal"),
        (["saved over"], "equal"),
        (["sharded", "frequencies stored", "harmless"], "equal"),
        (["theta inside alone", "type for rope_type"], "equal"),
        (["llama3", "length at the top", "no epsilon", "swish"], "equal"),
        (["another theta inside"], "refused"),
        (["multiplier"], "refused"),
        (["NaN"], "refused"),
        (["an index that is wrong"], "refused"),
    ],
    ids=" + ".join,
)
def test_single_twists(tmp_path, twists, wanted):
    (tmp_path / "hf").mkdir()
    assert outcome(tmp_path, "llama", PLAIN, None, 4, twists) == wanted


@pytest.mark.parametrize(
    ("twist", "wanted"), [("another head", "equal"), ("the same head", "equal"), ("no tie", "refused")]
)
def test_tied_embeddings(tmp_path, twist, wanted):
    (tmp_path / "hf").mkdir()
    assert outcome(tmp_path, "llama", {**PLAIN, "tie_word_embeddings": True}, None, 5, [twist]) == wanted
