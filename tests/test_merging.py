"""What pruning does beyond copying: averaged groups, merged heads, layers of different width, a smaller vocabulary."""

import json

import numpy as np
import pytest
import torch
import yaml

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.config import (
    BatchConfig,
    CalibrationConfig,
    ExportHfConfig,
    ParallelConfig,
    PruneConfig,
    PruneOptions,
    TargetConfig,
)
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.prune.select import choose, target_shape
from tests import jobs
from tests.test_prune import exported, random_scores, write_scores
from tests.tiny import TEXT, data_folder, hf_model, imported, model_option


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merging")


@pytest.fixture(scope="module")
def source(folder):
    """8 heads in 4 groups."""
    return imported(hf_model(), folder / "grouped")


@pytest.fixture(scope="module")
def plain(folder):
    """8 plain heads."""
    return imported(hf_model(num_key_value_heads=8), folder / "plain")


def pruned(source, tmp_path, name="pruned", **options):
    where = tmp_path / f"{name}_by"
    if not where.exists():
        write_scores(random_scores(source), where)
    cfg = PruneConfig(model=model_option(source), scores=str(where), output=str(tmp_path / name), **options)
    prune_model(cfg)
    return tmp_path / name


def heads_of(weights, name, d=8):
    return weights[f"model.layers.1.self_attn.{name}_proj.weight"].double().unflatten(0, (-1, d))


def test_groups_are_averaged_and_their_heads_regrouped(source, tmp_path):
    """All 8 heads stay, 4 in each of 2 groups; k and v are the means of neighbours; queries and outputs as they were."""
    out = pruned(source, tmp_path, target=TargetConfig(num_query_groups=2), prune=PruneOptions(groups="mean"))
    before, after = exported(source, tmp_path / "a"), exported(out, tmp_path / "b")
    for name in "kv":
        wanted = heads_of(before, name).unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(heads_of(after, name), wanted, rtol=1e-6, atol=0)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert torch.equal(after[name], before[name])


def test_equal_groups_average_to_the_same_model(gloo, tmp_path):
    model = hf_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                pairs = projection.weight.unflatten(0, (2, 2, 8))
                pairs[:, 1] = pairs[:, 0]
    path = imported(model, tmp_path)
    out = pruned(path, tmp_path, target=TargetConfig(num_query_groups=2), prune=PruneOptions(groups="mean"))
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    (found,) = gloo(1, jobs.logits, str(out), tokens, {}, layout={})
    with torch.no_grad():
        wanted = model(tokens).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_of_averaged_groups_the_best_heads_stay(source, tmp_path):
    target = TargetConfig(num_query_groups=2, num_attention_heads=6)
    out = pruned(source, tmp_path, target=target, prune=PruneOptions(groups="mean"))
    scores = random_scores(source).heads[1].reshape(2, 4)
    wanted = [sorted((4 * g + np.argsort(-scores[g])[:3]).tolist()) for g in range(2)]
    before, after = exported(source, tmp_path / "a"), exported(out, tmp_path / "b")
    assert torch.equal(heads_of(after, "q"), heads_of(before, "q")[np.concatenate(wanted)])


def residual(weights, name, order, kept):
    """[A], section 2.3, as it is written: heads sorted by importance and counted from 1."""
    whole = len(order)
    heads = {i: heads_of(weights, name)[order[i - 1]] for i in range(1, whole + 1)}
    new = {i: heads[i] for i in range(1, kept + 1)}
    for i in range(2 * kept - whole + 1, kept + 1):
        new[i] = heads[i] + (heads[i] - heads[2 * kept - i + 1])
    return torch.stack([new[i] for i in sorted(new, key=lambda i: order[i - 1])])


def test_plain_heads_take_up_the_residual_of_what_goes(plain, tmp_path):
    target = TargetConfig(num_attention_heads=5, num_query_groups=5)
    out = pruned(plain, tmp_path, target=target, prune=PruneOptions(heads="merge"))
    order = np.argsort(-random_scores(plain).heads[1]).tolist()
    before, after = exported(plain, tmp_path / "a"), exported(out, tmp_path / "b")
    for name in "qkv":
        torch.testing.assert_close(heads_of(after, name), residual(before, name, order, 5), rtol=1e-6, atol=1e-7)
    columns = before["model.layers.1.self_attn.o_proj.weight"].unflatten(1, (8, 8))[:, sorted(order[:5])].flatten(1)
    assert torch.equal(after["model.layers.1.self_attn.o_proj.weight"], columns)


def test_query_heads_take_up_the_residual_inside_their_group(source, tmp_path):
    """One of two heads stays in each group: it becomes twice itself less the other; k and v are untouched."""
    out = pruned(source, tmp_path, target=TargetConfig(num_attention_heads=4), prune=PruneOptions(heads="merge"))
    scores = random_scores(source).heads[1].reshape(4, 2)
    before, after = exported(source, tmp_path / "a"), exported(out, tmp_path / "b")
    best, rest = 2 * np.arange(4) + scores.argmax(1), 2 * np.arange(4) + scores.argmin(1)
    q = heads_of(before, "q")
    torch.testing.assert_close(heads_of(after, "q"), 2 * q[best] - q[rest], rtol=1e-6, atol=1e-7)
    for name in "kv":
        assert torch.equal(heads_of(after, name), heads_of(before, name))


def test_merged_plans_repeat_bit_for_bit_and_read_well(source, tmp_path):
    options = PruneOptions(heads="merge", groups="mean")
    target = TargetConfig(num_query_groups=2, num_attention_heads=6, ffn_hidden_size=[40, 30, 20, 48], vocab_size=280)
    out = pruned(source, tmp_path, target=target, prune=options)
    plan = yaml.safe_load((out / "plan.yaml").read_text())
    assert plan["kv_groups"][0] == "0+1 2+3" and plan["target"]["ffn_hidden_size"] == [40, 30, 20, 48]
    again = PruneConfig(model=model_option(source), plan=str(out / "plan.yaml"), output=str(tmp_path / "again"))
    prune_model(again)
    assert open_model_folder(tmp_path / "again").digest == open_model_folder(out).digest


def test_layers_of_different_width(gloo, source, tmp_path):
    """The same logits in every layout; equal to the source's where what goes are dead neurons; refused by the export."""
    model, sizes = hf_model(), [48, 40, 36, 44]
    with torch.no_grad():
        for layer, size in zip(model.model.layers, sizes, strict=True):
            layer.mlp.gate_proj.weight[size:] = 0
    path = imported(model, tmp_path)
    scores = random_scores(path)
    ffn = np.tile(np.arange(48, 0, -1, dtype=np.float32), (4, 1))
    where = write_scores(type(scores)({**scores.tensors, "ffn": ffn}, scores.model_digest), tmp_path / "by")
    cfg = PruneConfig(
        model=model_option(path),
        scores=str(where),
        target=TargetConfig(ffn_hidden_size=sizes),
        output=str(tmp_path / "out"),
    )
    prune_model(cfg)
    assert open_model_folder(tmp_path / "out").shape.ffn_of_layers == tuple(sizes)
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
    for ranks, layout in ((1, {}), (2, {"tensor": 2, "sequence": True}), (3, {"pipeline": 3})):
        found = gloo(ranks, jobs.logits, str(tmp_path / "out"), tokens, layout, layout=layout)[-1]
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    with pytest.raises(UserError, match="one intermediate_size for all"):
        export_hf(ExportHfConfig(model=model_option(tmp_path / "out"), output=str(tmp_path / "hf")))
    # And on from there: layers of one width again.
    data = data_folder(tmp_path, path)
    cfg = PruneConfig(
        model=model_option(tmp_path / "out"),
        target=TargetConfig(ffn_hidden_size=36, num_layers=3),
        data=CalibrationConfig(path=str(data), sequence_length=32),
        samples=4,
        output=str(tmp_path / "next"),
    )
    prune_model(cfg)
    assert open_model_folder(tmp_path / "next").shape.ffn_hidden_size == 36


def test_a_smaller_vocabulary_has_a_tokenizer_that_reads_every_text(source, tmp_path):
    out = pruned(source, tmp_path, target=TargetConfig(vocab_size=280))
    kept = json.loads((out / "kept_token_ids.json").read_text())
    assert len(kept) == 280 and kept == sorted(kept)
    old, new = load_tokenizer(source), load_tokenizer(out)
    assert len(new) == 280 and new.convert_ids_to_tokens(range(280)) == old.convert_ids_to_tokens(kept)
    for text in (TEXT, "naïve 東京 \\x00 \\n\\t", ""):
        assert new.decode(new(text)["input_ids"]) == text
    before, after = exported(source, tmp_path / "a"), exported(out, tmp_path / "b")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name][kept])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = AutoModelForCausalLM.from_pretrained(tmp_path / "b").config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert config.vocab_size == 280 and config.eos_token_id == tokenizer.eos_token_id == kept.index(old.eos_token_id)


def test_frequent_tokens_stay_with_what_they_are_made_of(source):
    from minitron_megatron.data.vocabulary import BytePairs, choose_tokens

    tokenizer = open_model_folder(source).tokenizer_path
    pairs = BytePairs(tokenizer)
    longest = max(pairs.made_of, key=len)
    counts = np.zeros(300)
    counts[pairs.ids[longest]] = 1
    size = len(pairs.always() | pairs.with_parts(longest))
    kept = choose_tokens(tokenizer, counts, size)
    assert set(kept.tolist()) == pairs.always() | pairs.with_parts(longest)


def test_scores_are_measured_first_where_there_are_none(gloo, source, tmp_path):
    """In two processes, tensor 2; then the losses around the cut, without and with merged heads."""
    data = data_folder(tmp_path, source)
    cfg = PruneConfig(
        model=model_option(source),
        target=TargetConfig(hidden_size=24, num_attention_heads=4),
        data=CalibrationConfig(path=str(data), sequence_length=32),
        samples=4,
        loss_samples=6,
        trainer=BatchConfig(micro_batch_size=2),
        parallel=ParallelConfig(tensor=2),
        output=str(tmp_path / "out"),
    )
    gloo(2, prune_model, cfg)
    assert read_manifest(tmp_path / "out_scores")["results"]["samples"] == 4
    losses = read_manifest(tmp_path / "out")["results"]["loss_around_the_cut"]
    assert set(losses) == {"source", "pruned", "pruned, heads merged"}
    for name, path in (("source", source), ("pruned", tmp_path / "out")):
        (wanted,) = gloo(1, jobs.validation_loss, str(path), str(data), 6, layout={})
        assert losses[name] == pytest.approx(wanted, rel=1e-5)
    assert losses["pruned, heads merged"] != losses["pruned"]


def test_a_dry_run_foresees_sizes_and_problems(source, tmp_path, capsys):
    def shown(**options) -> str:
        data = CalibrationConfig(sequence_length=32)
        prune_model(PruneConfig(dry_run=True, output=str(tmp_path / "out"), data=data, **options))
        return " ".join(capsys.readouterr().out.split())

    sizes = {"ffn_hidden_size": 30, "num_query_groups": 2, "num_attention_heads": 4}
    text = shown(model=model_option(source), target=TargetConfig(**sizes))
    shape = target_shape(open_model_folder(source).shape, sizes, [])
    assert "num_query_groups │ 4 │ 2" in text and "GFLOP a token" in text and "weights of a rank, GiB" in text
    assert "parallel.tensor=4 does not divide num_query_groups=2" in text and shape.ffn_hidden_size == 30
    assert "ffn_hidden_size=30 is no multiple of 64" in text
    assert not (tmp_path / "out").exists()


def test_options_that_do_nothing_are_told(source, tmp_path, caplog):
    pruned(source, tmp_path, target=TargetConfig(ffn_hidden_size=30), prune=PruneOptions(heads="merge", groups="mean"))
    assert "prune.heads=merge does nothing: the target keeps all 8 heads" in caplog.text
    assert "prune.groups=mean does nothing: the target keeps all 4 groups" in caplog.text


def test_the_last_layers_stay(source):
    shape = open_model_folder(source).shape
    scores = random_scores(source)
    lowest_last = type(scores)({**scores.tensors, "layers": np.array([3.0, 2, 1, 0], np.float32)}, "")
    target = target_shape(shape, {"num_layers": 2}, [])
    assert choose(shape, target, lowest_last, []).layers.tolist() == [0, 3]
    free = PruneOptions(keep_last_layers=0)
    assert choose(shape, target, lowest_last, [], free).layers.tolist() == [0, 1]
