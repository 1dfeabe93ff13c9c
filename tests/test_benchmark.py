"""Benchmarks measure what they say: sizes and ratios that hold whatever the machine's speed."""

import gc
import json
import os
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.benchmark import mistakes
from minitron_megatron.benchmark.run import RESULTS, benchmark
from minitron_megatron.benchmark.scaling import Scaling, too_large, with_efficiency
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.index import total_bytes
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import (
    BenchmarkConfig,
    BenchmarkScalingConfig,
    BenchmarkStepConfig,
    HardwareConfig,
    ModelConfig,
    ParallelConfig,
    TargetConfig,
)
from minitron_megatron.errors import UserError
from tests.test_commands import free_port
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


@pytest.mark.parametrize("preset", [False, pytest.param(True, marks=pytest.mark.bf16)], ids=["folder", "preset"])
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
    assert all(found[name] > 0 for name in ("ours_seconds", "ours_into_main_grad_seconds", "products_of_heads_seconds"))
    # In float32 the gradients are those of float64, but for a teacher's head in FP8.
    assert (
        max(found[f"ours_{what}"] for what in ERRORS)
        < 1e-5
        < found["ours_teacher_head_fp8_states_gradient_error"]
        < 0.1
    )
    assert not any(name.startswith(("modelopt", "liger")) for name in found)


ERRORS = ("loss_error", "states_gradient_error", "head_gradient_error")


def test_a_distillation_step(model, tmp_path):
    given = {"model": ModelConfig(**open_model_folder(model).shape.to_dict()), "target": TargetConfig(hidden_size=16)}
    found = results(tmp_path, measure="step", sequence_length=32, step=BenchmarkStepConfig(micro_batches=2), **given)
    assert found["tokens"] == 64
    assert found["tokens_per_second_per_gpu"] == pytest.approx(64 / found["seconds"])


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"fp8": "tensorwise"}, r"trainer.fp8=tensorwise needs multiples of 16"),
        ({"state_precision": "bf16"}, r"optim.state_precision=bf16 is Transformer Engine's"),
        ({"fp8_bf16_layers": 1}, r"trainer.fp8_bf16_layers is for FP8"),
    ],
)
def test_steps_that_cannot_be(model, tmp_path, step, says):
    sizes = {**open_model_folder(model).shape.to_dict(), "ffn_hidden_size": 40}
    with pytest.raises(UserError, match=says):
        results(
            tmp_path, measure="step", model=ModelConfig(**sizes), sequence_length=32, step=BenchmarkStepConfig(**step)
        )


# Of two processes: each kind of layout, and teachers laid out otherwise.
OF_TWO = {
    "data 2": {},
    "data 2; overlapped": {"overlap": True},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence parallel": {"tensor": 2, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "tensor 2, sequence parallel; teacher data 2": {
        "tensor": 2,
        "sequence": True,
        "teacher": {"tensor": 1, "sequence": False},
    },
    "pipeline 2; teacher tensor 2": {"pipeline": 2, "teacher": {"tensor": 2, "pipeline": 1}},
}


def scaling_options(model, layouts, **options) -> dict:
    sizes = ModelConfig(**open_model_folder(model).shape.to_dict())
    given = {"model": sizes, "target": TargetConfig(hidden_size=16), "sequence_length": 32}
    scaling = BenchmarkScalingConfig(layouts=layouts)
    return {**given, "step": BenchmarkStepConfig(micro_batches=2), "scaling": scaling, "measure": "scaling", **options}


def models_held() -> dict[int, str]:
    """What holds each model of this process, by the model's id."""
    from megatron.core.models.gpt import GPTModel

    gc.collect()
    models = [held for held in gc.get_objects() if type(held) is GPTModel]
    return {id(model): ", ".join({type(by).__name__ for by in gc.get_referrers(model)}) for model in models}


def as_torchrun_starts_it(cfg, port) -> list[str]:
    """The command without a process group around it: it makes its own. Gives what holds models that it has not let go of."""
    before = models_held()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        benchmark(cfg)
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        # The pool ends the group that it believes to be there.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return [by for model, by in models_held().items() if model not in before]


@pytest.mark.slow
def test_a_step_in_every_layout(gloo, model, tmp_path):
    """As much work a process in each, the same loss to begin with, nothing kept of one while the next runs."""
    cannot_be = [{"context": 2}, {"tensor": 4, "sequence": True}, {"tensor": 2, "sequence": True, "overlap": True}]
    given = scaling_options(model, [*OF_TWO.values(), *cannot_be], repeats=1)
    cfg = BenchmarkConfig(output=str(tmp_path / "out"), **given)
    assert gloo(2, as_torchrun_starts_it, cfg, free_port()) == [[], []]
    found = json.loads((tmp_path / "out" / RESULTS).read_text())
    alone, *rows = found["rows"].values()
    assert list(found["rows"]) == ["one process", *OF_TWO] and found["relative_to"] == "one process"
    assert (alone["tokens"], alone["efficiency"]) == (2 * 32, 1)
    for row in rows:
        assert row["tokens"] == 2 * alone["tokens"]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens"] / row["seconds"] / 2)
        rates = row["tokens_per_second_per_gpu"], alone["tokens_per_second_per_gpu"]
        assert row["efficiency"] == pytest.approx(rates[0] / rates[1])
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["loss"] > 0


def test_one_process_alone_and_what_a_dry_run_says(model, tmp_path, capsys):
    given = scaling_options(model, list(OF_TWO.values()))
    planned = BenchmarkConfig(output=str(tmp_path / "x"), dry_run=True, **given)
    benchmark(replace(planned, parallel=ParallelConfig(world_size=2), cluster=HardwareConfig(gpu="h200")))
    said = capsys.readouterr().out
    assert "seconds on h200" in said and all(word in said for word in ("one process", "teacher", "data 2"))
    assert not (tmp_path / "x").exists()
    found = results(tmp_path, **given)
    assert list(found["rows"]) == ["one process"] and found["rows"]["one process"]["efficiency"] == 1
    planned = Scaling(BenchmarkConfig(output="", **given), 2, torch.device("cuda"))
    foreseen = {name: case.foreseen() for name, case in planned.all_cases.items()}
    assert list(foreseen) == ["one process", *OF_TWO]
    gib = {name: figures["foreseen_gib"] for name, figures in foreseen.items()}
    assert gib["tensor 2"] < gib["tensor 2, sequence parallel; teacher data 2"] < gib["one process"]


def test_rows_that_do_not_fit(model):
    assert not too_large(None, 1) and not too_large({"foreseen_gib": 70}, 80)
    assert too_large({"foreseen_gib": 75}, 80) == "does not fit: foreseen 75.0 + 6 of 80.0 GiB"
    rate = "tokens_per_second_per_gpu"
    rows = {"one process": {"skipped": "does not fit"}, "tensor 2": {rate: 8.0}, "data 2": {rate: 10.0}}
    assert with_efficiency(rows, ["one process", "data 2"]) == "data 2"
    assert [row.get("efficiency") for row in rows.values()] == [None, 0.8, 1]


@pytest.mark.parametrize(
    ("layouts", "says"),
    [
        ([{"tensor": 1}, {"tensors": 2}], r"scaling.layouts\[1\] has no 'tensors': use tensor, .*, teacher, overlap$"),
        ([{"overlap": 2}], r"scaling.layouts\[0\].overlap=2 must be true or false"),
        ([2], r"scaling.layouts\[0\]=2 is not a mapping"),
        ([{"teacher": {"data": 2}}], r"scaling.layouts\[0\].teacher has no 'data': use tensor, "),
        ([{"tensor": "two"}], r"scaling.layouts\[0\]: tensor=two must be a whole number"),
        ([{"pipeline": 0}], r"scaling.layouts\[0\].pipeline=0 must be above 0"),
    ],
)
def test_layouts_that_are_none(model, tmp_path, layouts, says):
    with pytest.raises(UserError, match=says):
        results(tmp_path, **scaling_options(model, layouts))
    assert not dist.is_initialized() and not (tmp_path / "out").exists()


def test_scaling_has_its_layouts_from_its_own_option(model, tmp_path):
    with pytest.raises(UserError, match=r"leave out parallel"):
        results(tmp_path, **scaling_options(model, [{}], parallel=ParallelConfig(sequence=True)))


def test_what_the_machine_gives(model, tmp_path):
    found = results(tmp_path, measure="ceilings", model=ModelConfig(**open_model_folder(model).shape.to_dict()))
    assert found["product_tflops"] > 0 and found["copy_gb_s"] > 0


def test_forward_passes_of_a_model_and_its_target(model, tmp_path):
    given = {"model": ModelConfig(**open_model_folder(model).shape.to_dict()), "target": TargetConfig(num_layers=1)}
    found = results(tmp_path, measure="throughput", sequence_length=32, **given)
    rates = [found[f"{name}_tokens_per_second_per_gpu"] for name in ("target", "source")]
    assert found["target_over_source"] == pytest.approx(rates[0] / rates[1])


def test_activations_are_as_many_as_a_dry_run_counts(model, tmp_path):
    found = results(tmp_path, measure="memory", model=model_option(model), sequence_length=32, micro_batch_size=2)
    assert found["planned_over_kept"] == 1 and found["kept_gib"] > 0 and "allocated_gib" not in found


def test_pruning_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="must be a model folder"):
        results(tmp_path, measure="prune")
    assert not (tmp_path / "out").exists()


# First mistakes and starts


def test_every_command_has_a_mistake_and_starts_are_commands():
    assert set(mistakes.MISTAKES) == set(COMMANDS) and set(mistakes.STARTS) <= set(COMMANDS)
    needed = [word.partition("=")[2] for words in mistakes.STARTS.values() for word in words.split()]
    order = list(mistakes.STARTS)
    for number, name in enumerate(order):
        for word in mistakes.STARTS[name].split():
            value = word.partition("=")[2]
            assert value not in order or order.index(value) < number, (name, word)
    assert {"random_model", "importance", "export_hf", "prune"} <= set(needed)


def test_the_first_run_of_a_mistake_warms_up_and_medians_count(monkeypatch):
    asked = []
    of_mistakes = {name: iter([(99, 99), (1, 10), (5, 20), (2, 30)]) for name in COMMANDS}
    of_starts = {name: iter([7, 1, 4]) for name in mistakes.STARTS}
    monkeypatch.setattr(mistakes, "_mistake", lambda folder, name, words: asked.append(name) or next(of_mistakes[name]))
    monkeypatch.setattr(
        mistakes, "_start", lambda folder, name, words, number: asked.append((name, number)) or next(of_starts[name])
    )
    monkeypatch.setattr(mistakes, "_write_data", lambda path: None)
    loads = iter([0.25, 0.35])
    monkeypatch.setattr(mistakes.os, "getloadavg", lambda: (next(loads), 0, 0))
    found = mistakes.first_mistakes_and_starts(BenchmarkConfig(output="x", measure="mistakes", repeats=3))
    assert asked[:8] == [next(iter(mistakes.MISTAKES))] * 4 + [list(mistakes.MISTAKES)[1]] * 4
    assert asked[-3:] == [(list(mistakes.STARTS)[-1], number) for number in range(3)]
    assert (found["load_before"], found["load_after"]) == (0.25, 0.35)
    for name, row in found["rows"].items():
        own = {"seconds_starting": statistics.median([7, 1, 4])} if name in mistakes.STARTS else {}
        assert row == {"mistake_seconds": 2, "mistake_processor_seconds": 20, **own}


@pytest.mark.parametrize(("load", "warned"), [(0.3, False), (0.31, True)])
def test_other_work_is_warned_of(monkeypatch, caplog, load, warned):
    monkeypatch.setattr(mistakes.os, "getloadavg", lambda: (load, 0, 0))
    for name in ("_mistake", "_start"):
        monkeypatch.setattr(mistakes, name, lambda *_, name=name: (1, 1) if name == "_mistake" else 1)
    monkeypatch.setattr(mistakes, "_write_data", lambda path: None)
    mistakes.first_mistakes_and_starts(BenchmarkConfig(output="x", measure="mistakes", repeats=1))
    assert len(caplog.messages) == warned


@pytest.mark.parametrize(
    ("status", "said", "taken"),
    [(2, "error: no", True), (1, "error: no", False), (2, "Traceback", False), (0, "", False)],
)
def test_a_mistake_is_refused_in_a_line(monkeypatch, tmp_path, status, said, taken):
    asked = []
    done = subprocess.CompletedProcess([], status, "", said)
    monkeypatch.setattr(mistakes, "_run", lambda folder, name, words: asked.append(words) or (done, 1.5, 0.5))
    for words, more in ((["a=1"], ["output=output"]), (["output=other"], []), (["folder=x"], [])):
        if taken:
            assert mistakes._mistake(tmp_path, "n", words) == (1.5, 0.5)
        else:
            with pytest.raises(UserError, match=f"n {words[0]} was to be refused, and ended with {status}"):
                mistakes._mistake(tmp_path, "n", words)
        assert asked[-1] == [*words, *more]


def test_later_commands_start_from_the_first_output(monkeypatch, tmp_path):
    """Whose manifest says how long it took to begin; a training's is its model's."""
    asked = []

    def ran(folder, name, words):
        asked.append(words)
        at = tmp_path / words[-1].partition("=")[2] / ("model" if name == "distill" else "")
        at.mkdir(parents=True)
        (at / "manifest.yaml").write_text("seconds_starting: 1.25\n")
        return subprocess.CompletedProcess([], 0 if name != "search" else 1, "", "why"), 9.0, 9.0

    monkeypatch.setattr(mistakes, "_run", ran)
    assert [mistakes._start(tmp_path, "prune", ["a=1"], number) for number in (0, 1)] == [1.25, 1.25]
    assert asked == [["a=1", f"output={tmp_path / 'prune'}"], ["a=1", f"output={tmp_path / 'prune_1'}"]]
    assert mistakes._start(tmp_path, "distill", [], 0) == 1.25
    with pytest.raises(UserError, match="search a=1 ended with 1: why"):
        mistakes._start(tmp_path, "search", ["a=1"], 0)
