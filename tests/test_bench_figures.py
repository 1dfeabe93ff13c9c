"""Figures of benchmarks by hand: what warms up and what counts, ratios and errors, rows that are planned and shown."""

from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.benchmark import common, cut, layers, peers, prune, scaling, step, throughput, weights
from minitron_megatron.benchmark import importance as hooks
from minitron_megatron.benchmark.checks import check_benchmark
from minitron_megatron.config import (
    BenchmarkConfig,
    BenchmarkStepConfig,
    ModelConfig,
    ParallelConfig,
    TargetConfig,
    TeacherParallelConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import check_scores
from minitron_megatron.models.axes import Slot, axis_table, flops_per_token, tensor_parallel_keep
from minitron_megatron.parallel.layout import Layout
from tests.test_axes import shape

SMALL = shape(
    num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, head_dim=4, vocab_size=9,
    dtype="float32",
)  # fmt: skip


def config(measure: str = "importance", **options) -> BenchmarkConfig:
    given = {"output": "out", "model": ModelConfig(**SMALL.to_dict()), "sequence_length": 16, "micro_batch_size": 3}
    return BenchmarkConfig(**{**given, "measure": measure, **options})


class Clock:
    """Time that passes as it is told to."""

    def __init__(self, *durations: float) -> None:
        self.now, self.durations = 0.0, iter(durations)

    def perf_counter(self) -> float:
        return self.now

    def work(self, *_, **__) -> None:
        self.now += next(self.durations)


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """A processor without anybody to wait for."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    for module in (common, cut, hooks, layers, prune):
        monkeypatch.setattr(module.collectives, "barrier", lambda: None)


# What is checked


@pytest.mark.parametrize(
    ("measure", "options", "says"),
    [
        ("importance", {"tensor": 2}, None),
        ("importance", {"tensor": 4}, "parallel.tensor=4 does not divide num_query_groups=2 of the model"),
        ("layers", {"tensor": 4}, "does not divide num_query_groups=2 of the model"),
        ("memory", {"tensor": 2}, None),
        ("memory", {"pipeline": 2}, "parallel.pipeline=2: measure=memory takes one stage, use parallel.tensor"),
        ("importance", {"pipeline": 2}, None),
        ("importance", {"tensor": 2, "sequence": True, "length": 15}, "data.sequence_length=15 is not a multiple of the 2 parts"),
        ("cut", {"tensor": 2}, None),
        ("cut", {"tensor": 2, "ffn": 7}, "does not divide ffn_hidden_size=7 of the target"),
        ("importance", {"tensor": 2, "ffn": 7}, None),
        ("loss", {"tensor": 2, "ffn": 7}, "does not divide ffn_hidden_size=7 of the target"),
        ("step", {"tensor": 4}, "does not divide num_query_groups=2 of the model"),
        ("throughput", {"tensor": 2, "ffn": 7}, "does not divide ffn_hidden_size=7 of the target"),
        ("ceilings", {"tensor": 4}, None),
        ("mistakes", {}, None),
        ("prune", {}, "must be a model folder"),
    ],
)  # fmt: skip
def test_a_measure_asks_of_its_models_what_it_needs(tmp_path, measure, options, says):
    length, ffn = options.pop("length", 16), options.pop("ffn", None)
    size = options.get("tensor", 1) * options.get("pipeline", 1)
    cfg = config(
        measure,
        output=str(tmp_path / "out"),
        sequence_length=length,
        target=TargetConfig(ffn_hidden_size=ffn),
        parallel=ParallelConfig(**options, world_size=size),
    )
    if says is None:
        assert check_benchmark(cfg).world_size == size
        return
    with pytest.raises(UserError) as refused:
        check_benchmark(cfg)
    assert says in str(refused.value)


# Time


def test_two_runs_warm_up_and_the_median_of_the_others_counts(monkeypatch):
    clock = Clock(100, 100, 1, 9, 2)
    monkeypatch.setattr(common, "time", clock)
    assert common.seconds(clock.work, 3) == 2 and list(clock.durations) == []


def test_hooks_are_over_a_plain_pass_on_the_same_tokens(monkeypatch):
    """The first pair warms up; ratios are of medians and of the fastest."""
    found, batches = iter([50, 90, 4, 6, 1, 2, 3, 9]), iter(range(4))
    seen = []
    monkeypatch.setattr(hooks, "live_model", lambda *_: (SMALL, ["chunk"]))
    monkeypatch.setattr(hooks, "random_batch", lambda *_: next(batches))
    monkeypatch.setattr(
        hooks, "_seconds", lambda chunks, batch, cfg, layout, shape, on: seen.append((batch, on)) or next(found)
    )
    assert hooks.hooks_over_forward(config(repeats=3), Layout()) == {
        "tokens": 48,
        "forward_seconds": 3,
        "forward_with_hooks_seconds": 6,
        "ratio_of_medians": 2.0,
        "ratio_of_fastest": 2.0,
    }
    assert seen == [(batch, on) for batch in range(4) for on in (False, True)]


def test_blocks_are_over_as_many_passes_as_there_are_models(monkeypatch):
    """Of four layers five models; the last four tokens of a choice are scored, all of a sample's."""
    found, masks = iter([9, 9, 2, 10, 4, 30, 9, 9, 1, 5, 3, 5]), []

    def batch(*_):
        masks.append(torch.ones(3, 16))
        return {"loss_mask": masks[-1]}

    monkeypatch.setattr(layers, "live_model", lambda *_: (SMALL, ["chunk"]))
    monkeypatch.setattr(layers, "random_batch", batch)
    monkeypatch.setattr(layers, "_seconds", lambda *given: next(found))
    assert layers.blocks_over_passes(config(repeats=2), Layout()) == {
        "tokens": 48, "blocks": 4, "layers_run_over_passes": (4 + 3 + 2 + 1) / 20,
        "samples_pass_seconds": 3, "samples_all_blocks_seconds": 20, "samples_over_passes": 20 / 15,
        "questions_pass_seconds": 2, "questions_all_blocks_seconds": 5, "questions_over_passes": 5 / 10,
    }  # fmt: skip
    assert [mask.sum(1).tolist() for mask in masks] == [[16] * 3] * 3 + [[4] * 3] * 3 and masks[-1][:, -4:].all()


def test_the_first_cut_in_memory_warms_up(monkeypatch):
    clock = Clock(50, 1, 7, 2)
    monkeypatch.setattr(cut, "time", clock)
    monkeypatch.setattr(cut, "live_model", lambda *_: (SMALL, "chunks"))
    monkeypatch.setattr(cut, "build_model_chunks", lambda *_: "smaller")
    monkeypatch.setattr(
        cut, "local_tensors", lambda *_: {"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16)}
    )
    monkeypatch.setattr(cut, "cut_live", clock.work)
    found = cut.cutting_in_memory(config("cut", repeats=3, target=TargetConfig(hidden_size=4)), Layout())
    assert found == {"target_bytes_of_a_rank": 24 + 10, "cut_seconds": 2}


def test_cuts_are_over_copies_in_turn(monkeypatch, tmp_path):
    timed = iter([4, 8, 1, 6, 2, 30])
    monkeypatch.setattr(prune, "open_model_folder", lambda path: SimpleNamespace(shape=SMALL, weights=tmp_path))
    monkeypatch.setattr(prune, "_timed", lambda *_: next(timed))
    monkeypatch.setattr(prune.collectives, "all_gather_objects", lambda mine: [(7, 3), (9, 2)])
    cfg = config("prune", repeats=3, model=ModelConfig(path=str(tmp_path)), target=TargetConfig(num_layers=2))
    found = prune.pruning_over_copying(cfg, Layout())
    assert (found["copy_seconds"], found["prune_seconds"], found["prune_over_copy"]) == (2, 8, 4)
    assert (found["peak_resident_bytes_of_a_rank"], found["of_it_above_the_libraries"]) == (9, 3)
    assert found["source_bytes"] > found["target_bytes"] and list(timed) == []


def test_scores_that_say_nothing_are_of_every_axis_and_follow_the_seed():
    found = prune.random_scores(SMALL, 1)
    check_scores(found.__class__({**found.tensors, "vocab": torch.ones(9).numpy()}, "m"), SMALL, "m", "s")
    again, other = prune.random_scores(SMALL, 1), prune.random_scores(SMALL, 2)
    assert all((again.tensors[n] == t).all() and (other.tensors[n] != t).any() for n, t in found.tensors.items())


def test_throughput_is_of_a_gpu_and_of_all_micro_batches(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        throughput, "_seconds", lambda cfg, shape, layout: shapes.append(shape) or (4.0, 2.0)[len(shapes) - 1]
    )
    cfg = config("throughput", target=TargetConfig(num_layers=2))
    found = throughput.forward_throughput(cfg, Layout(pipeline=2, world_size=8))
    assert shapes == [SMALL, SMALL.resized(num_layers=2)]
    assert found == {
        "tokens": 96,
        "source_tokens_per_second_per_gpu": 3.0,
        "target_tokens_per_second_per_gpu": 6.0,
        "target_over_source": 2.0,
    }


# A step


def test_figures_of_a_step_are_of_all_processes_and_of_each_gpu():
    layout = Layout(tensor=2, world_size=8)
    case = step.Case(config("step", step=BenchmarkStepConfig(cuda_graphs=False)), layout, micro_batches=5)
    # 5 micro-batches of 3 samples of 16 tokens on 4 data-parallel ranks.
    assert step.figures(case, step.Timed(2.0, 7.0, 1.5)) == {
        "tokens": 960, "seconds": 2.0, "tokens_per_second_per_gpu": 60.0, "loss": 1.5, "cuda_graphs": False
    }  # fmt: skip


def test_the_work_of_a_step_is_three_passes_of_the_student_and_one_of_the_teacher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "x")
    for name, found in (("gpu_of", "h100"), ("hardware", None), ("peak_flops", 1e6)):
        monkeypatch.setattr(step, name, lambda *_, found=found: found)
    case = step.Case(
        config("step", target=TargetConfig(num_layers=2), step=BenchmarkStepConfig(cuda_graphs=False)), Layout(), 1
    )
    found = step.figures(case, step.Timed(2.0, 7.0, 1.5))
    student = SMALL.resized(num_layers=2)
    assert found["peak_gib"] == 7.0 and found["tokens_per_second_per_gpu"] == 24.0
    assert found["mfu"] == pytest.approx(24.0 * (3 * flops_per_token(student, 16) + flops_per_token(SMALL, 16)) / 1e6)


@pytest.mark.parametrize("optimizer", [True, False])
def test_three_steps_warm_up_and_the_loss_is_the_firsts(monkeypatch, optimizer):
    """A step lasts until the next one can begin."""
    clock, losses = Clock(100, 100, 100, 1, 9, 2), iter([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    calls = []

    def work(kind, *given):
        calls.append((kind, *given))
        clock.work()
        return next(losses)

    trainer = SimpleNamespace(
        cfg=SimpleNamespace(optim=step.OptimConfig()),
        train_step=lambda number, *_: SimpleNamespace(loss=work("train", number)),
        batches_of_step=lambda number, samples: (number, len(samples[0]["tokens"])),
        forward_backward=lambda batches: ({"loss": work("pass", *batches)}, 0, False),
    )
    monkeypatch.setattr(step, "time", clock)
    case = step.Case(config("step", repeats=3, step=BenchmarkStepConfig(optimizer=optimizer)), Layout(), 1)
    assert step.timed(case, trainer) == step.Timed(2, 0.0, 5.0)
    assert calls == ([("train", n) for n in range(6)] if optimizer else [("pass", 0, 16)] * 6)


def test_random_samples_are_told_by_their_numbers_and_the_seed():
    samples = step.RandomTokens(9, 5, seed=3)
    one = samples[4]
    assert torch.equal(one["tokens"][1:], one["labels"][:-1]) and one["position_ids"].tolist() == list(range(5))
    assert one["loss_mask"].sum() == 5 and int(torch.cat([samples[n]["tokens"] for n in range(50)]).max()) == 8
    assert torch.equal(samples[4]["tokens"], one["tokens"]) and not torch.equal(samples[5]["tokens"], one["tokens"])
    assert not torch.equal(step.RandomTokens(9, 5, seed=4)[4]["tokens"], one["tokens"])


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_drawn_weights_are_those_of_the_whole(size):
    """Each tensor of its own, by seed, name and layer; gains lie around 1."""
    drawn = []
    for row in axis_table(SMALL):
        slot = Slot(row, 1 if row.stacked else None)
        whole = weights._whole(slot, SMALL, 5)
        drawn.append(whole)
        assert whole.shape == slot.shape(SMALL) and whole.float().mean() == pytest.approx(row.mean, abs=0.05)
        assert whole.float().std() == pytest.approx(0.02, rel=0.7)
        assert not torch.equal(weights._whole(slot, SMALL, 6), whole)
        assert row.stacked is False or not torch.equal(weights._whole(Slot(row, 2), SMALL, 5), whole)
        axis = row.tensor_parallel_axis
        for rank in range(size):
            part = weights._part(slot, SMALL, 5, rank, size)
            held = (
                row.indices(SMALL, {axis: tensor_parallel_keep(SMALL, rank, size, slot.layer)[axis]}, slot.layer)
                if axis
                else ()
            )
            for dim, places in enumerate(held):
                expected = whole.index_select(dim, torch.as_tensor(places)) if places is not None else None
                assert expected is None or torch.equal(part, expected)
            assert axis is not None or torch.equal(part, whole)
            assert axis is None or part.numel() * size == whole.numel()
    assert len({tuple(one.flatten()[:4].tolist()) for one in drawn}) == len(drawn)


def test_a_peer_is_measured_where_there_is_a_gpu_for_it(monkeypatch):
    assert peers.Peer(None).exists() and not peers.Peer(None, "torch").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peers.Peer(None, "torch").exists() and not peers.Peer(None, "no_such_package").exists()
    p, q = (torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])[:, order] for order in ([0, 1, 2], [2, 0, 1]))
    wanted = float((p * (p / q).log()).sum())
    assert float(peers.plain_kl(q.log() + 3, p.log() - 1)) == pytest.approx(wanted, rel=1e-5)


# Layouts one after another


@pytest.mark.parametrize(
    ("gib", "memory", "fits"), [(74.0, 80.0, True), (74.1, 80.0, False), (10.0, 16.0, True), (10.0, 15.9, False)]
)
def test_a_row_fits_with_what_is_left_for_cuda(gib, memory, fits):
    assert (scaling.too_large({"foreseen_gib": gib}, memory) == "") == fits


@pytest.mark.parametrize(("sizes", "teacher", "size", "overlap", "device", "possible"), [
    ({}, {}, 3, False, "cpu", True),
    ({"tensor": 2}, {}, 3, False, "cpu", False),
    ({"tensor": 2, "pipeline": 2}, {}, 4, False, "cpu", True),
    ({"tensor": 2, "pipeline": 2}, {}, 6, False, "cpu", False),
    ({"pipeline": 2}, {"tensor": 4}, 4, False, "cpu", False),
    ({"pipeline": 2}, {"tensor": 4, "pipeline": 1}, 4, False, "cpu", True),
    ({"context": 2}, {}, 2, False, "cuda", True),
    ({"context": 2}, {}, 2, False, "cpu", False),
    ({}, {"context": 2}, 2, False, "cpu", False),
    ({"tensor": 2, "sequence": True}, {}, 2, True, "cpu", False),
    ({"tensor": 2, "sequence": True}, {}, 2, True, "cuda", True),
    ({"tensor": 2, "sequence": True}, {}, 2, False, "cpu", True),
    ({"tensor": 2}, {}, 2, True, "cpu", True),
])  # fmt: skip
def test_layouts_divide_the_processes_and_are_of_this_device(sizes, teacher, size, overlap, device, possible):
    given = ParallelConfig(**sizes), TeacherParallelConfig(**teacher), size, SimpleNamespace(type=device), overlap
    assert scaling._possible(*given) is possible


def test_a_gpu_has_as_much_to_do_in_every_row():
    cfg = config("scaling", step=BenchmarkStepConfig(micro_batches=3))
    for layout, count in (
        (Layout(world_size=8), 3),
        (Layout(tensor=4, world_size=8), 12),
        (Layout(tensor=8, world_size=8), 24),
    ):
        case = scaling._case(cfg, layout, TeacherParallelConfig(), True)
        assert (case.micro_batches, case.run.trainer.global_batch_size, case.overlap) == (count, 3 * 3 * 8, True)
        assert scaling._name(case) == f"{layout}; overlapped"
    assert (
        scaling._text({"tensor": 2, "teacher": {"tensor": 1, "sequence": False}})
        == "{tensor: 2, teacher: {tensor: 1, sequence: False}}"
    )


def test_a_row_is_of_the_slowest_and_the_fullest_rank_or_why_there_is_none(monkeypatch):
    this = object.__new__(scaling.Scaling)
    everyone = [step.Timed(2.0, 7.0, 1.5), step.Timed(3.0, 5.0, 1.5)]
    monkeypatch.setattr(scaling.collectives, "all_gather_objects", lambda mine: everyone)
    monkeypatch.setattr(scaling, "figures", lambda case, timed: timed)
    assert this._row("case", everyone[0]) == step.Timed(3.0, 7.0, 1.5)
    everyone.append("out of memory")
    assert this._row("case", everyone[0]) == {scaling.SKIPPED: "out of memory"}


def test_what_was_foreseen_is_off_by_a_share_of_what_was():
    row = {"peak_gib": 10.0, "seconds": 4.0}
    assert scaling.with_errors(row, {"foreseen_gib": 11.0, "foreseen_seconds": 3.0}) == pytest.approx(
        {
            "foreseen_gib": 11.0,
            "foreseen_seconds": 3.0,
            "foreseen_gib_error_percent": 10.0,
            "foreseen_seconds_error_percent": -25.0,
        }
    )
    assert scaling.with_errors({"seconds": 4.0}, {"foreseen_gib": 11.0}) == {"foreseen_gib": 11.0}
    assert scaling.with_errors(row, {}) == {}


def test_rows_of_layouts_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(scaling, "print_table", lambda *table: shown.append(table))
    rows = {
        "one process": {"skipped": "does not fit"},
        "tensor 2": {
            "seconds": 1.25, "tokens_per_second_per_gpu": 12345.6, "mfu": 0.4321, "efficiency": 0.5, "peak_gib": 3.14,
            "foreseen_gib": 3.0, "foreseen_gib_error_percent": -4.46, "foreseen_seconds": 2.0,
        },
    }  # fmt: skip
    scaling.show({"rows": rows, "relative_to": "tensor 2", "processes": 2, "device": "x"})
    scaling.show({"rows": {}, "relative_to": "", "processes": 2, "device": "x"})
    assert shown[0][0] == "scaling: 2 × x, efficiency relative to tensor 2" and shown[1][0] == "scaling: 2 × x"
    assert shown[0][2] == [
        ["one process", "does not fit", "", "", "", "", "", ""],
        ["tensor 2", "1.25", "12,346", "43.2%", "50.0%", "3.1", "3 (-4.5 %)", "2"],
    ]
