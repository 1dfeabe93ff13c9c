"""Scores equal a plain reference on transformers' own modules, in every layout and aggregation."""

import copy
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import yaml

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import ImportanceConfig, ImportanceOptions, MergeScoresConfig
from minitron_megatron.data.datasets import training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.errors import UserError
from minitron_megatron.importance import hooks
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.importance.merge import check_merge, merge_scores
from minitron_megatron.importance.scores import Scores, check_scores, load_scores
from minitron_megatron.importance.statistics import AGGREGATIONS
from minitron_megatron.importance.sums import Statistics, finish_scores
from minitron_megatron.models.axes import PROBES
from tests import jobs, reference
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_models import LAYOUTS, names
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

SAMPLES = 5


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(transformers model, model folder, data folder, the calibration samples)."""
    folder = tmp_path_factory.mktemp("importance")
    model = hf_model()
    path = imported(model, folder)
    data = data_folder(folder, path)
    shape = open_model_folder(path).shape
    samples = training_samples(
        open_data(str(data), "train", shape, 32), "train", sequence_length=32, seed=1234, count=SAMPLES
    )
    return model, path, data, [samples[i]["tokens"] for i in range(SAMPLES)]


def compare(found: dict[str, torch.Tensor], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, score in wanted.items():
        error = np.abs(found[name].numpy() - score).max() / np.abs(score).max()
        assert error <= 1e-5, (name, error)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_scores_are_the_same_in_every_layout(gloo, measured, ranks, layout):
    """Five samples in micro-batches of two: the last round is filled up, on every data-parallel rank."""
    model, path, data, samples = measured
    found = gloo(ranks, jobs.scores, str(path), str(data), layout, SAMPLES, 2, ("mean", "l2"), layout=layout)
    assert all(rest is None for rest in found[1:])
    compare(found[0], reference.importance(model, samples, "mean", "l2"))


@pytest.mark.parametrize(("sequence", "batch"), list(itertools.product(AGGREGATIONS, AGGREGATIONS)))
def test_every_aggregation(gloo, measured, sequence, batch):
    model, path, data, samples = measured
    layout = {"tensor": 2, "sequence": True}
    found = gloo(2, jobs.scores, str(path), str(data), layout, SAMPLES, 1, (sequence, batch), layout=layout)
    compare(found[0], reference.importance(model, samples, sequence, batch))


@pytest.mark.parametrize("batch", ["l2", "variance"])
@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"tensor": 2}), (2, {})], ids=names)
def test_norms_of_channel_scores_as_nvidia_takes_them(gloo, measured, ranks, layout, batch):
    model, path, data, samples = measured
    how = ("mean", batch, "per_channel")
    found = gloo(ranks, jobs.scores, str(path), str(data), layout, SAMPLES, 2, how, layout=layout)
    compare(found[0], reference.importance(model, samples, *how))


@pytest.fixture(scope="module")
def parts(measured, tmp_path_factory):
    """Scores folders of samples 0 and 1, of 2 to 4, and of all five; and a function that measures one more."""
    _, path, data, _ = measured
    folder = tmp_path_factory.mktemp("parts")

    def measure(name: str, samples: int, first_sample: int = 0, **options):
        cfg = ImportanceConfig(
            output=str(folder / name),
            model=model_option(path),
            data=data_option(data, 32),
            samples=samples,
            first_sample=first_sample,
            importance=ImportanceOptions(**options),
        )
        measure_importance(cfg)
        return folder / name

    return measure, measure("a", 2), measure("b", 3, first_sample=2), measure("whole", 5)


def test_scores_of_parts_merge_into_the_score_of_the_whole(parts, tmp_path):
    _, a, b, whole = parts
    merge_scores(MergeScoresConfig(scores=[str(b), str(a)], output=str(tmp_path / "merged")))
    merged, wanted = load_scores(tmp_path / "merged"), load_scores(whole)
    assert merged.model_digest == wanted.model_digest and set(merged.tensors) == set(wanted.tensors)
    for name, score in wanted.tensors.items():
        np.testing.assert_allclose(merged.tensors[name], score, rtol=1e-6, err_msg=name)
    results, of_b, of_a = (read_manifest(one)["results"] for one in (tmp_path / "merged", b, a))
    assert (results["samples"], results["tokens"], results["parts"]) == (5, 5 * 32, of_b["parts"] + of_a["parts"])
    assert results["sequence_length"] == 32 and list(read_manifest(tmp_path / "merged")["inputs"]) == [
        "model",
        "scores 1",
        "scores 2",
    ]
    # What was merged can be merged on.
    with pytest.raises(UserError, match="sample 0 was measured twice"):
        merge_scores(MergeScoresConfig(scores=[str(tmp_path / "merged"), str(a)], output=str(tmp_path / "again")))


def test_scores_that_do_not_belong_together_are_not_merged(parts, tmp_path):
    measure, a, b, whole = parts
    other = measure("other", 2, first_sample=5, batch="mean")
    for folders, says in (
        ([a], "needs two scores folders"),
        ([a, whole], "sample 0 was measured twice"),
        ([a, other], "have batch_aggregation=mean, .* has l2: they do not add up"),
        ([a, tmp_path / "nowhere"], "does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            merge_scores(MergeScoresConfig(scores=[str(f) for f in folders], output=str(tmp_path / "merged")))
    file = b / "statistics.safetensors"
    whole_file = file.read_bytes()
    file.write_bytes(b"\xff" * len(whole_file))
    with pytest.raises(UserError, match=r"b is damaged: its files differ from the digest"):
        merge_scores(MergeScoresConfig(scores=[str(a), str(b)], output=str(tmp_path / "merged")))
    file.write_bytes(whole_file)
    assert not list(tmp_path.iterdir())


def test_one_sample_has_no_variance(parts):
    measure, *_ = parts
    with pytest.raises(UserError, match="variance needs samples= of at least 2"):
        measure("one", 1, batch="variance")


@pytest.mark.parametrize(("first_sample", "samples"), [(0, 10**6), (10**6, 1)])
def test_more_samples_than_there_is_data(parts, first_sample, samples):
    measure, *_ = parts
    with pytest.raises(UserError, match="are more than the train split's"):
        measure("many", samples, first_sample=first_sample)


def test_non_finite_activations_name_their_layer(measured, tmp_path):
    model, _, data, _ = measured
    broken = copy.deepcopy(model).float()
    with torch.no_grad():
        # An infinity in the file itself would be refused when it is imported.
        broken.model.layers[2].mlp.up_proj.weight[3] = 3e38
    cfg = ImportanceConfig(
        output=str(tmp_path / "scores"),
        model=model_option(imported(broken, tmp_path)),
        data=data_option(data, 32),
        samples=4,
    )
    with pytest.raises(UserError, match="layer 2: non-finite activations at ffn"):
        measure_importance(cfg)
    assert not (tmp_path / "scores").exists()


def test_parts_that_share_one_sample_are_not_merged(parts, tmp_path):
    """Samples 0 and 1, and from 1 on; of another seed they are others."""
    measure, a, *_ = parts
    shares = measure("shares", 3, first_sample=1)
    with pytest.raises(UserError, match="sample 1 was measured twice"):
        merge_scores(MergeScoresConfig(scores=[str(shares), str(a)], output=str(tmp_path / "merged")))
    check_merge(MergeScoresConfig(scores=[str(parts[2]), str(a)], output=str(tmp_path / "merged")))


def test_scores_of_another_model_are_not_merged(parts, tmp_path):
    _, a, b, _ = parts
    other = tmp_path / "other"
    shutil.copytree(b, other)
    manifest = yaml.safe_load((other / "manifest.yaml").read_text())
    manifest["inputs"]["model"] = "blake3:another"
    (other / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(UserError, match="measured on another model"):
        check_merge(MergeScoresConfig(scores=[str(a), str(other)], output=str(tmp_path / "merged")))


def test_recorders_of_a_process_share_the_stream_of_their_sums(monkeypatch):
    """Each stream has memory of its own, which the driver is asked for when it is first used."""
    monkeypatch.setattr(hooks.ps, "get_context_parallel_world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    how = {"head_dim": 8, "sequence": "mean", "heads": "per_token", "sequence_parallel": False}
    try:
        first, second = (hooks.Recorder([], **how) for _ in range(2))
    finally:
        hooks._side_stream.cache_clear()
    assert first.side is second.side and first.side == [7]


def test_sums_of_two_runs_add_up_in_every_part():
    def statistics(factor: float) -> Statistics:
        sums = {name: (torch.full((1, 2), factor), torch.full((1, 2), 10 * factor)) for name in ("ffn", "heads")}
        return Statistics(sums, torch.tensor(factor), torch.tensor([factor, 2 * factor]))

    found, wanted = (statistics(1.0) + statistics(2.0)).tensors(), statistics(3.0).tensors()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("batch", ["mean", "l2", "variance"])
def test_block_influence_is_a_mean_and_a_heads_channels_are_a_vector(batch):
    heads = torch.tensor([[-6.0, 8.0, 0.0, -2.0]])
    sums = {"heads": (heads, heads.square() / 2 + 1), "layers": (torch.tensor([[3.0]]), torch.tensor([[49.0]]))}
    how = {"batch_aggregation": batch, "heads": "per_channel", "head_dim": 2}
    found = finish_scores(Statistics(sums, torch.tensor(2.0)), how)
    assert found["layers"].tolist() == [1.5]
    each = finish_scores(Statistics(sums, torch.tensor(2.0)), how | {"heads": "per_token"})["heads"]
    np.testing.assert_allclose(found["heads"], [[np.hypot(*each[0, :2]), np.hypot(*each[0, 2:])]], rtol=1e-6)
    if batch == "mean":
        assert each.tolist() == [[-3.0, 4.0, 0.0, -1.0]]


def whole_scores() -> dict[str, np.ndarray]:
    """Scores of every kind, of SMALL_SHAPE."""
    lengths = {"ffn": 48, "kv_groups": 8, "hidden": 32}
    found = {probe.score: np.ones((4, lengths[probe.axis]), np.float32) for probe in PROBES}
    return found | {"layers": np.ones(4, np.float32), "vocab": np.ones(SMALL_SHAPE.vocab_size, np.float32)}


def test_scores_are_whole_finite_and_of_this_model():
    whole = whole_scores()
    check_scores(Scores(whole, "m"), SMALL_SHAPE, "m", "s")
    for digest in ("l", "n"):
        with pytest.raises(UserError, match="measured on another model"):
            check_scores(Scores(whole, "m"), SMALL_SHAPE, digest, "s")
    for name, values in whole.items():
        for odd in (math.nan, math.inf):
            one = values.copy()
            one.flat[-1] = odd
            assert refused(check_scores, Scores(whole | {name: one}, "m"), SMALL_SHAPE, "m", "s"), name
        short = {"a shape": values[1:], "none": None}
        for one in short.values():
            assert refused(check_scores, Scores(whole | {name: one}, "m"), SMALL_SHAPE, "m", "s"), name


def test_results_say_what_was_measured_and_how(parts):
    _, _, b, _ = parts
    results = read_manifest(b)["results"]
    data = read_manifest(b)["inputs"]["data"]
    assert results.pop("parts") == [{"data": data, "seed": 1234, "first_sample": 2, "samples": 3}]
    rate, seconds = results.pop("tokens_per_second"), results.pop("seconds")
    assert 96 / (seconds + 0.01) - 1 <= rate <= 96 / max(seconds - 0.01, 1e-6) + 1
    assert results == {
        "sequence_length": 32,
        "sequence_aggregation": "mean",
        "batch_aggregation": "l2",
        "heads": "per_token",
        "head_dim": 8,
        "samples": 3,
        "tokens": 96,
    }
