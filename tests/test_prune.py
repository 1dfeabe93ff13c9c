"""Pruning: equal to a NumPy reference, identity at full size, planted truth, plans, and bad targets."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minitron_megatron.checkpoints.folder import open_model_folder, output_folder, read_manifest
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.config import CalibrationConfig, ExportHfConfig, PruneConfig, PruneOptions, TargetConfig
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import Judged, LayerAnalysis
from minitron_megatron.importance.scores import Scores, save_scores
from minitron_megatron.prune.checks import check_prune
from minitron_megatron.prune.plan import ranges
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.prune.select import choose, target_shape, top
from tests import jobs, reference
from tests.test_models import names
from tests.tiny import data_folder, hf_model, imported, model_option

MEAN, BOTH = PruneOptions(groups="mean"), PruneOptions(groups="mean", heads="merge")
LAYOUTS = [(2, {"tensor": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "pipeline": 2})]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return imported(hf_model(), folder)


def random_scores(path, seed=0) -> Scores:
    folder = open_model_folder(path)
    shape, draw = folder.shape, np.random.default_rng(seed)
    layers = shape.num_layers
    tensors = {
        "ffn": draw.random((layers, shape.ffn_hidden_size)),
        "heads": draw.random((layers, shape.num_attention_heads)),
        "hidden.attention_norm": draw.random((layers, shape.hidden_size)),
        "hidden.mlp_norm": draw.random((layers, shape.hidden_size)),
        "layers": draw.random(layers),
        "vocab": draw.integers(0, 100, shape.vocab_size),
    }
    return Scores({k: v.astype(np.float32) for k, v in tensors.items()}, folder.digest)


def write_scores(scores: Scores, path, results=None):
    with output_folder(path, command="test", config={}, inputs={"model": scores.model_digest}, resume=False) as out:
        save_scores(out.path, scores.tensors)
        out.results = results or {}
    return path


def exported(model, folder) -> dict[str, torch.Tensor]:
    export_hf(ExportHfConfig(model=model_option(model), output=str(folder)))
    return load_file(folder / "model.safetensors")


TARGETS = [
    {"hidden_size": 20},
    {"ffn_hidden_size": 17},
    {"num_attention_heads": 4},
    {"num_query_groups": 2, "num_attention_heads": 4},
    {"num_query_groups": 3, "num_attention_heads": 3},
    {"num_layers": 3},
    {"num_layers": 2, "hidden_size": 12, "ffn_hidden_size": 30, "num_attention_heads": 6, "num_query_groups": 3},
]


@pytest.mark.parametrize("target", TARGETS, ids=names)
def test_pruning_equals_cutting_by_hand(source, tmp_path, target):
    scores = random_scores(source)
    folder = open_model_folder(source)
    where = write_scores(scores, tmp_path / "scores")
    cfg = PruneConfig(
        model=model_option(source), scores=str(where), target=TargetConfig(**target), output=str(tmp_path / "pruned")
    )
    prune_model(cfg)
    shape = target_shape(folder.shape, target, [])
    kept = choose(folder.shape, shape, scores, [])
    wanted = reference.cut(exported(source, tmp_path / "whole"), kept, folder.shape)
    found = exported(tmp_path / "pruned", tmp_path / "cut")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def pruned_by_one(gloo, source, tmp_path_factory):
    """(what was asked of one process, tokens, logits of the model that it made)."""
    folder = tmp_path_factory.mktemp("one")
    cfg = PruneConfig(
        model=model_option(source),
        scores=str(write_scores(random_scores(source), folder / "scores")),
        target=TargetConfig(hidden_size=20, ffn_hidden_size=28, num_attention_heads=4),
        output=str(folder / "one"),
    )
    gloo(1, prune_model, cfg)
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    return cfg, tokens, gloo(1, jobs.logits, cfg.output, tokens, {}, layout={})[0]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_the_pruned_model_is_the_same_for_any_number_of_ranks(gloo, pruned_by_one, tmp_path, ranks, layout):
    cfg, tokens, wanted = pruned_by_one
    many = str(tmp_path / "many")
    gloo(ranks, prune_model, replace(cfg, output=many))
    assert open_model_folder(many).digest == open_model_folder(cfg.output).digest
    found = [out for out in gloo(ranks, jobs.logits, many, tokens, layout, layout=layout) if out is not None]
    assert found and all(float((out - wanted).abs().max() / wanted.abs().max()) <= 1e-5 for out in found)


def test_pruning_to_the_same_shape_is_the_identity(source, tmp_path):
    shape = open_model_folder(source).shape
    target = TargetConfig(hidden_size=shape.hidden_size, num_layers=shape.num_layers, num_attention_heads=8)
    prune_model(PruneConfig(model=model_option(source), target=target, output=str(tmp_path / "same")))
    assert open_model_folder(tmp_path / "same").digest == open_model_folder(source).digest


def test_a_plan_repeats_the_pruning_and_can_be_edited(source, tmp_path):
    where = write_scores(random_scores(source), tmp_path / "scores")
    target = TargetConfig(num_layers=3, hidden_size=20, ffn_hidden_size=28, num_attention_heads=3, num_query_groups=3)
    prune_model(PruneConfig(model=model_option(source), scores=str(where), target=target, output=str(tmp_path / "a")))
    plan = tmp_path / "a" / "plan.yaml"
    prune_model(PruneConfig(model=model_option(source), plan=str(plan), output=str(tmp_path / "b")))
    assert open_model_folder(tmp_path / "a").digest == open_model_folder(tmp_path / "b").digest
    edited = yaml.safe_load(plan.read_text())
    edited["hidden"] = "0-19"
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(edited))
    prune_model(PruneConfig(model=model_option(source), plan=str(tmp_path / "edited.yaml"), output=str(tmp_path / "c")))
    embedding = exported(tmp_path / "c", tmp_path / "c_hf")["model.embed_tokens.weight"]
    assert torch.equal(embedding, exported(source, tmp_path / "whole")["model.embed_tokens.weight"][:, :20])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": "0-5"}, "hidden keeps 6 indices, target says 20"),
        ({"hidden": "0-18 18"}, "ascending, without repeats"),
        ({"hidden": "0-18 99"}, "within 0 to 31"),
        ({"hidden": "none"}, "is not a list of indices"),
        ({"hidden": "0-1-19"}, "is not a list of indices"),
        ({"hidden": "0-99999999999"}, "is not a list of indices"),
        ({"hidden": "all"}, "keeps all 32, target says 20"),
        ({"ffn": {0: "0-27"}}, "ffn has no entry 1"),
        ({"model": "sha256:0"}, "another model"),
        ({"extra": 1}, "extra is not a key"),
        ({"target": {"hidden_size": 20}}, "target must give"),
        ({"kv_groups": {i: "0-3" for i in range(4)}}, "go together"),
        ({"merged_heads": {0: "0<1"}}, "merged_heads without q_heads"),
    ],
)
def test_plans_edited_into_nonsense_are_refused(source, tmp_path, change, says):
    where = write_scores(random_scores(source), tmp_path / "scores")
    target = TargetConfig(hidden_size=20, ffn_hidden_size=28)
    prune_model(PruneConfig(model=model_option(source), scores=str(where), target=target, output=str(tmp_path / "a")))
    plan = {**yaml.safe_load((tmp_path / "a" / "plan.yaml").read_text()), **change}
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError, match=says):
        prune_model(
            PruneConfig(model=model_option(source), plan=str(tmp_path / "edited.yaml"), output=str(tmp_path / "b"))
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_groups": {0: "0+1 2"}}, "must give 2 groups, each of as many source groups"),
        ({"kv_groups": {0: "0+1 1+2"}}, "must name groups from 0 to 3, each once"),
        ({"kv_groups": {0: "0+1 2+9"}}, "must name groups from 0 to 3, each once"),
        ({"kv_groups": {0: "2+3 0+1"}}, "must be ascending"),
        ({"kv_groups": {0: "a+b c+d"}}, "is not a list of groups"),
        ({"q_heads": {0: "0-1 4, 5-7"}}, "head 4 is not in group 0.1"),
        ({"q_heads": {0: "0-2"}}, "must give the heads of 2 groups"),
        ({"q_heads": "all"}, "q_heads keeps all, target says 6"),
        ({"merged_heads": {0: "0<1"}}, "must merge a head that goes into one that stays"),
        ({"merged_heads": {0: "0"}}, "is not a list such as"),
    ],
)
def test_plans_of_heads_edited_into_nonsense_are_refused(source, tmp_path, change, says):
    where = write_scores(random_scores(source), tmp_path / "scores")
    target = TargetConfig(num_query_groups=2, num_attention_heads=6)
    options = PruneOptions(groups="mean", heads="merge")
    cfg = PruneConfig(
        model=model_option(source), scores=str(where), target=target, prune=options, output=str(tmp_path / "a")
    )
    prune_model(cfg)
    plan = yaml.safe_load((tmp_path / "a" / "plan.yaml").read_text())
    for key, value in change.items():
        plan[key] = {**plan[key], **value} if isinstance(value, dict) else value
    if "merged_heads" not in change:
        plan["merged_heads"] = "none"
    if "merged_heads" in change and change["merged_heads"] == {0: "0<1"}:
        plan["q_heads"] = {**plan["q_heads"], 0: "0-2, 4-6"}
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError, match=says):
        prune_model(
            PruneConfig(model=model_option(source), plan=str(tmp_path / "edited.yaml"), output=str(tmp_path / "b"))
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"target": TargetConfig(hidden_size=64)},
            "hidden_size=64 must be a whole number from 1 to the source model's 32",
        ),
        ({"target": TargetConfig(num_attention_heads=6)}, "not a multiple of num_query_groups=4"),
        ({"target": TargetConfig(num_query_groups=2)}, "needs 4 heads a group"),
        ({"target": TargetConfig(hidden_size=20), "scores": None}, "scores= is missing"),
        ({"drop_layers": [4]}, "4 is not a layer"),
        ({"drop_layers": [1, 1]}, "named twice"),
        ({"drop_layers": [1], "target": TargetConfig(num_layers=2)}, "leaves 3 layers"),
        ({"plan": "x", "scores": "y"}, "exclude each other"),
        ({"plan": "missing.yaml", "scores": None, "target": TargetConfig()}, "does not exist"),
        ({"plan": "missing.yaml", "scores": None}, "plan= excludes target=, layers= and drop_layers="),
        ({"scores": "missing"}, "does not exist"),
        ({"target": TargetConfig(ffn_hidden_size=[20, 20])}, "has 2 sizes for 4 layers"),
        (
            {"target": TargetConfig(ffn_hidden_size=[20, 20, 20, 49])},
            "ffn_hidden_size=49 must be a whole number from 1",
        ),
        ({"target": TargetConfig(ffn_hidden_size="wide")}, "ffn_hidden_size=wide must be a whole number"),
        ({"target": TargetConfig()}, "nothing to prune: give a size"),
        ({"target": TargetConfig(num_query_groups=3, num_attention_heads=6), "prune": MEAN}, "does not divide"),
        ({"target": TargetConfig(num_query_groups=2, num_attention_heads=2), "prune": BOTH}, "at least half"),
        ({"layers": "x"}, "layers=x needs target.num_layers="),
        ({"loss_samples": 4}, "loss_samples= needs data.path="),
        ({"target": TargetConfig(vocab_size=100)}, "target.vocab_size=100 is too small: 258 special"),
    ],
)
def test_impossible_targets_are_refused(source, tmp_path, options, says):
    where = write_scores(random_scores(source), tmp_path / "scores")
    given = {"target": TargetConfig(hidden_size=20), "scores": str(where), **options}
    with pytest.raises(UserError, match=says):
        prune_model(PruneConfig(model=model_option(source), output=str(tmp_path / "out"), **given))
    assert not (tmp_path / "out").exists()


def test_a_target_as_large_as_the_model_is_said(source, tmp_path, caplog):
    same = TargetConfig(num_layers=open_model_folder(source).shape.num_layers)
    check_prune(PruneConfig(model=model_option(source), output=str(tmp_path / "out"), target=same))
    assert "nothing is cut: the target is as large as model=" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "target", "says"),
    [
        (2, TargetConfig(ffn_hidden_size=21), "parallel.tensor=2 does not divide ffn_hidden_size=21 of the target: use 1, or "
         "target.ffn_hidden_size=22"),
        (4, TargetConfig(ffn_hidden_size=22), "use one of 1, 2, or target.ffn_hidden_size=24"),
        (4, TargetConfig(ffn_hidden_size=[48, 48, 46, 48]), "ffn_hidden_size=46 of the target: use one of 1, 2"),
        (4, TargetConfig(num_query_groups=2, num_attention_heads=4), "use one of 1, 2, or target.num_query_groups=4"),
    ],
)  # fmt: skip
def test_targets_that_the_given_layout_cannot_run_are_refused(source, tmp_path, tensor, target, says):
    where = write_scores(random_scores(source), tmp_path / "scores")
    cfg = PruneConfig(model=model_option(source), scores=str(where), target=target, output=str(tmp_path / "out"))
    cfg.parallel.tensor = cfg.parallel.world_size = tensor
    with pytest.raises(UserError) as refused:
        prune_model(cfg)
    assert says in str(refused.value) and not (tmp_path / "out").exists()


def test_a_cut_says_which_layouts_are_left(source, tmp_path, caplog, capsys):
    where = write_scores(random_scores(source), tmp_path / "scores")
    given = {"model": model_option(source), "scores": str(where)}
    prune_model(PruneConfig(target=TargetConfig(ffn_hidden_size=22), output=str(tmp_path / "out"), **given))
    assert (
        "ffn_hidden_size=22 divides by parallel.tensor=2 at most, the source by 4: target.ffn_hidden_size=24 would too"
        in (caplog.text)
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if "parallel.tensor can be" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["parallel.tensor can be", "1, 2, 4", "1, 2"]


def test_scores_of_another_model_are_refused(source, tmp_path):
    scores = Scores(random_scores(source).tensors, "sha256:another")
    where = write_scores(scores, tmp_path / "scores")
    target = TargetConfig(hidden_size=20)
    with pytest.raises(UserError, match="another model"):
        prune_model(
            PruneConfig(model=model_option(source), scores=str(where), target=target, output=str(tmp_path / "o"))
        )


def test_what_a_cut_by_number_does_not_read_is_said_or_refused(source, tmp_path, caplog):
    """Scores that choose nothing; data that nothing is measured on are there at least."""
    cfg = PruneConfig(model=model_option(source), scores="/no/such", drop_layers=[1], output=str(tmp_path / "o"))
    with caplog.at_level("INFO"):
        assert not check_prune(cfg).scored
    assert "scores=/no/such has no effect: the target leaves nothing for scores to choose" in caplog.messages
    with pytest.raises(UserError, match="/no/such"):
        check_prune(replace(cfg, data=CalibrationConfig(path="/no/such")))


def analysis(path, digest, layers=4):
    """A layer analysis in which the loss is least without layers 1 and 2, but for the last ones."""
    blocks = {2: [Judged(loss=loss, bi=bi) for loss, bi in ((3.0, 0.1), (2.5, 0.3), (2.0, 0.2))]}
    whole = LayerAnalysis(str(path), digest, layers, Judged(loss=1.0), blocks, {})
    with output_folder(path, command="test", config={}, inputs={"model": digest}, resume=False) as out:
        (out.path / "layers.json").write_text(json.dumps(whole.to_json()))
    return str(path)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (PruneOptions(), [0, 3]),
        (PruneOptions(judge="bi"), [2, 3]),
        (PruneOptions(keep_last_layers=0), [0, 1]),
    ],
)
def test_a_layer_analysis_says_which_block_goes(source, tmp_path, options, kept):
    where = analysis(tmp_path / "layers", open_model_folder(source).digest)
    target, out = TargetConfig(num_layers=2), str(tmp_path / "out")
    prune_model(PruneConfig(model=model_option(source), layers=where, target=target, prune=options, output=out))
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["layers"] == ranges(np.array(kept))


def test_analyses_that_do_not_fit_are_refused(source, tmp_path):
    another = analysis(tmp_path / "another", "sha256:0")
    own = analysis(tmp_path / "own", open_model_folder(source).digest)
    for where, layers, says in (
        (another, 2, "another model"),
        (own, 3, "blocks of 2 layers, not 1"),
        (own, 4, "needs target.num_layers= below"),
    ):
        cfg = PruneConfig(
            model=model_option(source), layers=where, target=TargetConfig(num_layers=layers), output=str(tmp_path / "o")
        )
        with pytest.raises(UserError, match=says):
            prune_model(cfg)
    assert not (tmp_path / "o").exists()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_ties_go_to_the_lower_index(values, data):
    count = data.draw(st.integers(1, len(values)))
    by_hand = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert top(np.array(values, float), count).tolist() == by_hand


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_say_every_index(indices):
    text = ranges(np.array(sorted(indices)))
    spans = [list(map(int, span.split("-"))) for span in text.split()]
    assert [i for span in spans for i in range(span[0], span[-1] + 1)] == sorted(indices)


# Planted truth: parts of a model that do nothing are ranked last, and cutting them changes nothing.


def zero_neurons(model, dead):
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight[dead] = 0
        layer.mlp.up_proj.weight[dead] = 0


def zero_groups(model, dead):
    d = model.config.head_dim
    for layer in model.model.layers:
        for g in dead:
            layer.self_attn.v_proj.weight[g * d : (g + 1) * d] = 0


def zero_queries(model, dead):
    """A head without a query averages over all it may see: short, where tokens differ and other heads pick one's value.

    So the others are made to attend sharply, and the residual stream to stay mostly the token's own embedding.
    """
    d = model.config.head_dim
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 30
        layer.self_attn.k_proj.weight *= 30
        layer.self_attn.o_proj.weight *= 0.1
        layer.mlp.down_proj.weight *= 0.1
        for h in dead:
            layer.self_attn.q_proj.weight[h * d : (h + 1) * d] = 0
            layer.self_attn.o_proj.weight[:, h * d : (h + 1) * d] = 0


def zero_channels(model, dead):
    model.model.embed_tokens.weight[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.down_proj.weight[dead] = 0


def planted(gloo, tmp_path, sizes, plant, dead, target):
    """Plant, measure, prune; gives (scores, logits before, logits after, pruned folder)."""
    model = hf_model(**sizes)
    with torch.no_grad():
        plant(model, dead)
    path = imported(model, tmp_path)
    data = data_folder(tmp_path, path)
    layout = {"tensor": 2}
    found = gloo(2, jobs.scores, str(path), str(data), layout, 4, 2, ("mean", "l2"), layout=layout)[0]
    scores = Scores({name: score.numpy() for name, score in found.items()}, open_model_folder(path).digest)
    where = write_scores(scores, tmp_path / "scores")
    prune_model(
        PruneConfig(model=model_option(path), scores=str(where), target=target, output=str(tmp_path / "pruned"))
    )
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens).logits
    (after,) = gloo(1, jobs.logits, str(tmp_path / "pruned"), tokens, {}, layout={})
    return model, scores, before, after


def same(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


def test_dead_neurons_are_cut_and_nothing_changes(gloo, tmp_path):
    dead = [0, 5, 6, 47]
    _, scores, before, after = planted(gloo, tmp_path, {}, zero_neurons, dead, TargetConfig(ffn_hidden_size=44))
    assert (np.sort(np.argsort(scores.ffn, axis=1)[:, :4], axis=1) == dead).all()
    assert same(after, before)


def test_dead_plain_heads_are_cut_and_nothing_changes(gloo, tmp_path):
    dead, sizes = [1, 6], {"num_key_value_heads": 8}
    target = TargetConfig(num_attention_heads=6, num_query_groups=6)
    _, scores, before, after = planted(gloo, tmp_path, sizes, zero_groups, dead, target)
    assert (np.sort(np.argsort(scores.heads, axis=1)[:, :2], axis=1) == dead).all()
    assert same(after, before)


def test_dead_groups_are_cut_and_nothing_changes(gloo, tmp_path):
    target = TargetConfig(num_attention_heads=6, num_query_groups=3)
    _, scores, before, after = planted(gloo, tmp_path, {}, zero_groups, [2], target)
    assert (scores.heads.reshape(4, 4, 2).sum(-1).argmin(1) == 2).all()
    assert same(after, before)


def test_dead_query_heads_inside_groups_are_cut_and_nothing_changes(gloo, tmp_path):
    dead = [0, 3, 5, 6]
    _, scores, before, after = planted(gloo, tmp_path, {}, zero_queries, dead, TargetConfig(num_attention_heads=4))
    assert (scores.heads.reshape(4, 4, 2).argmin(-1) == np.array([h % 2 for h in dead])).all()
    assert same(after, before)


def test_channels_of_the_residual_stream_are_cut_up_to_the_norms_mean(gloo, tmp_path):
    """RMSNorm's mean then runs over fewer channels: gains grow by sqrt(kept/old), epsilon by kept/old is the same model."""
    dead, kept = [0, 3, 4, 11, 17, 25, 30, 31], 24
    model, scores, _, after = planted(gloo, tmp_path, {}, zero_channels, dead, TargetConfig(hidden_size=kept))
    assert sorted(np.argsort(scores.hidden)[:8].tolist()) == dead
    from transformers import LlamaForCausalLM

    export_hf(ExportHfConfig(model=model_option(tmp_path / "pruned"), output=str(tmp_path / "pruned_hf")))
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    # The reference: the whole model, with its norms made to average over the kept channels.
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.weight *= (kept / 32) ** 0.5
                module.variance_epsilon *= kept / 32
        reference = model(tokens).logits
    assert same(after, reference)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "pruned_hf").config.hidden_size == kept


def test_manifest_has_the_parameters(source, tmp_path):
    prune_model(PruneConfig(model=model_option(source), drop_layers=[1], output=str(tmp_path / "o")))
    results = read_manifest(tmp_path / "o")["results"]
    kept = exported(tmp_path / "o", tmp_path / "hf")
    assert results["parameters"] == sum(t.numel() for t in kept.values()) < results["parameters_source"]
