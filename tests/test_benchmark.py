"""Benchmarks measure what they say: sizes and ratios that hold whatever the machine's speed."""

import json

import pytest

from minitron_megatron.benchmark.run import RESULTS, benchmark
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.weights import total_bytes
from minitron_megatron.config import BenchmarkConfig, ModelConfig, TargetConfig
from minitron_megatron.errors import UserError
from tests.tiny import hf_model, imported, model_option


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return imported(hf_model(), tmp_path_factory.mktemp("model"))


def results(tmp_path, **options) -> dict:
    benchmark(BenchmarkConfig(output=str(tmp_path / "out"), repeats=2, **options))
    return json.loads((tmp_path / "out" / RESULTS).read_text())


def test_pruning_is_compared_with_copying(model, tmp_path):
    found = results(tmp_path, measure="prune", model=model_option(model), target=TargetConfig(hidden_size=16))
    shape = open_model_folder(model).shape
    assert found["source_bytes"] == total_bytes(shape)
    assert found["target_bytes"] == total_bytes(shape.resized(hidden_size=16)) < found["source_bytes"]
    assert found["prune_over_copy"] == pytest.approx(found["prune_seconds"] / found["copy_seconds"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("preset", [False, True], ids=["folder", "preset"])
def test_importance_is_compared_with_a_plain_forward(model, tmp_path, preset):
    sizes = {**open_model_folder(model).shape.to_dict(), "dtype": "bfloat16"}
    given = ModelConfig(**sizes) if preset else model_option(model)
    found = results(tmp_path, measure="importance", model=given, sequence_length=32, micro_batch_size=2)
    assert found["tokens"] == 64
    assert found["ratio_of_medians"] == pytest.approx(
        found["forward_with_hooks_seconds"] / found["forward_seconds"], rel=1e-6
    )


def test_a_layer_analysis_is_compared_with_a_pass_for_each_block(model, tmp_path):
    found = results(tmp_path, measure="layers", model=model_option(model), sequence_length=32, micro_batch_size=2)
    assert found["blocks"] == 4 and found["layers_run_over_passes"] == (4 + 3 + 2 + 1) / (5 * 4)
    for what in ("samples", "questions"):
        passes = 5 * found[f"{what}_pass_seconds"]
        assert found[f"{what}_over_passes"] == pytest.approx(found[f"{what}_all_blocks_seconds"] / passes, rel=1e-6)


def test_cutting_in_memory(model, tmp_path):
    found = results(tmp_path, measure="cut", model=model_option(model), target=TargetConfig(hidden_size=16))
    shape = open_model_folder(model).shape.resized(hidden_size=16)
    assert found["target_bytes_of_a_rank"] == total_bytes(shape) and found["cut_seconds"] > 0


def test_the_loss_with_its_heads(model, tmp_path):
    given = ModelConfig(**open_model_folder(model).shape.to_dict())
    found = results(tmp_path, measure="loss", model=given, target=TargetConfig(hidden_size=16), sequence_length=32)
    assert found["tokens"] == 32
    assert all(
        found[name] > 0 for name in ("loss_alone_seconds", "loss_with_heads_seconds", "products_of_heads_seconds")
    )


def test_activations_are_as_many_as_a_dry_run_counts(model, tmp_path):
    found = results(tmp_path, measure="memory", model=model_option(model), sequence_length=32, micro_batch_size=2)
    assert found["planned_over_kept"] == 1 and found["kept_gib"] > 0 and "allocated_gib" not in found


def test_pruning_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="must be a model folder"):
        results(tmp_path, measure="prune")
    assert not (tmp_path / "out").exists()
