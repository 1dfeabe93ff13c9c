"""Small figures worked out by hand, of functions of numbers in many rooms: every term, every condition, both sides of each."""

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron import compress_plan, pace
from minitron_megatron.asked import Asked
from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.chosen import Choices, Pair
from minitron_megatron.cli import main
from minitron_megatron.config import BudgetConfig, DistillOptions, HardwareConfig, LoggerConfig, PruneOptions
from minitron_megatron.data.folder import parse_blend
from minitron_megatron.data.vocabulary import _renumbered
from minitron_megatron.distill.choices import chosen_pairs
from minitron_megatron.distill.offload import _Layer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import checks as evaluate_checks
from minitron_megatron.importance.scores import Scores, check_scores
from minitron_megatron.importance.sums import Statistics, finish_scores
from minitron_megatron.launcher import check_processes
from minitron_megatron.models.axes import PROBES, cached_values, count_parameters, flops_per_token
from minitron_megatron.models.generation import Sampling, _evaluating, draw, generate
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.report import cutting
from minitron_megatron.report.layers import _cell
from minitron_megatron.report.models import same_measure
from minitron_megatron.search import found as search_folder
from minitron_megatron.search.budget import Budget, _ceil
from minitron_megatron.search.found import Source
from minitron_megatron.search.latency import read_latency
from minitron_megatron.search.predict import lost
from minitron_megatron.search.space import SIZES
from minitron_megatron.starts import born, seconds_left
from minitron_megatron.throughput import sources, work
from minitron_megatron.throughput.sources import check_sources
from minitron_megatron.train import distill_checks
from minitron_megatron.train.loop import StepResult
from minitron_megatron.train.metrics import Metrics, StepMetrics
from tests.test_bounds import SMALL_SHAPE, refused
from tests.test_throughput import WORK

STUDENT = SMALL_SHAPE.resized(num_layers=3)


# Time


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_pass_takes_from_an_idle_device_to_an_idle_device(monkeypatch, warmup):
    """Work that is queued before belongs to no pass, and those of the warm-up count nowhere."""
    now, queued, passes = [0.0], [1000.0], iter([*[100.0] * warmup, 1.0, 5.0, 2.0])

    def wait():
        now[0], queued[0] = now[0] + queued[0], 0.0

    def answer(prompts):
        queued[0] += next(passes)
        return 5 * len(prompts)

    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = []
    asked = replace(WORK, batches=[2], repeats=3, warmup=warmup)
    work.measure(asked, work.Engine(answer, lambda: None, wait), rows.append)
    assert rows[0]["seconds_of_repeats"] == [1.0, 5.0, 2.0]
    assert rows[0]["seconds"] == 2.0 and rows[0]["tokens_per_second"] == 2 * 5 / 2.0


def test_stages_take_their_operations_their_micro_batches_and_their_start():
    pair = Pair(SMALL_SHAPE, STUDENT)
    asked = pace.Work(length=8, calibration=5, windows=9, steps=3, batch=6, micro=2, data=2, validated=5)
    big, small = (8 * flops_per_token(shape, 8) for shape in (SMALL_SHAPE, STUDENT))
    arithmetic = pace.seconds_of_stages(pair, asked, pace.Pace(flops=2e6, operation=0.0, start=0.0), 1)
    assert arithmetic == pytest.approx(
        {
            "importance": 5 * big / 1e6,
            "distill": ((18 + 5) * big + (3 * 18 + 5) * small) / 1e6,
            "evaluate": 9 * (big + small) / 1e6,
        }
    )
    # 5, 9, 18 and 23 samples are 2, 3, 5 and 6 micro-batches of 2 on 2 ranks.
    small_ones = pace.seconds_of_stages(pair, asked, pace.Pace(flops=math.inf, operation=1.0, start=0.0), 1)
    layer, trained = pace._LAYER, pace._LAYER_TRAINED
    assert small_ones == {
        "importance": 2 * 4 * layer,
        "distill": 6 * 4 * layer + 5 * 3 * trained + 2 * 3 * layer + 3 * pace._STEP,
        "evaluate": 3 * 4 * layer + 3 * 3 * layer,
    }
    idle = pace.Pace(flops=math.inf, operation=0.0, start=2.0)
    for processes, start in ((1, 2 * pace.START), (2, 2 * pace.START_OF_SEVERAL)):
        assert set(pace.seconds_of_stages(pair, asked, idle, processes).values()) == {start}


def test_time_that_is_left_is_at_the_pace_since_the_last_start():
    assert seconds_left(4, 10, 2, 40.0) == 120.0 and seconds_left(10, 10, 2, 40.0) == 0.0
    assert seconds_left(2, 10, 2, 40.0) == 320.0


def test_a_process_that_has_ended_does_not_run_though_nobody_has_asked_how():
    assert born(os.getpid()) > 0
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert born(ended.pid) is None
    ended.wait()


# Metrics of a run

RESULT = StepResult({"loss": 2.0}, 1.5, 1e-3, tokens=800, seconds=2.0, data_seconds=0.5, taken=True, stop=False)


def test_rates_of_a_step_are_of_the_job_and_of_each_of_its_gpus():
    made = StepMetrics(1e9, 4, torch.float32, torch.device("cpu"), HardwareConfig())
    values = made.values(7, RESULT, 3)
    assert values.pop("resident_gib") > 0 and "mfu" not in values
    assert values == {
        "step": 7,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "skipped": 3,
        "tokens": 800,
        "tokens_per_second": 400.0,
        "tokens_per_second_per_gpu": 100.0,
        "tflops_per_gpu": 0.1,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
    }
    made.peak = 4e11
    assert made.values(7, RESULT, 3)["mfu"] == 0.25


def test_lines_are_kept_on_the_interval_with_validations_and_at_the_end_and_cut_back_to_the_restored_step(tmp_path):
    file = tmp_path / "metrics.jsonl"

    def run(start: int, *steps: int, validated: tuple[int, ...] = ()) -> list[int]:
        metrics = Metrics(tmp_path, LoggerConfig(wandb="disabled", interval=3), {}, 8, start, "a run")
        for step in steps:
            metrics.add({"step": step, "loss": 1.0, "tokens_per_second": 2.0})
            if step in validated:
                metrics.add({"step": step, "validation_loss": 1.0})
        metrics.close()
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    assert run(0, *range(1, 9), validated=(5,)) == [3, 5, 6, 8]
    for start, left in ((8, [3, 5, 6, 8]), (7, [3, 5, 6]), (6, [3, 5, 6]), (5, [3, 5]), (2, [])):
        file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (3, 5, 6, 8)) + '{"step": 1')
        assert run(start) == left


# What a search counts


@pytest.mark.parametrize(
    ("value", "taken"), [("1e-9", True), ("0", False), ("-1", False), ("inf", False), ("nan", False)]
)
def test_measurements_are_above_zero_and_five_at_least(tmp_path, value, taken):
    file = tmp_path / "table.csv"
    rows = [f"{layers},{layers}" for layers in (1, 2, 3, 4)]
    file.write_text("\n".join(["num_layers,latency_ms", *rows, f"2,{value}"]))
    assert refused(read_latency, file, SMALL_SHAPE) != taken
    file.write_text("\n".join(["num_layers,latency_ms", *rows]))
    with pytest.raises(UserError, match="has 4 shapes: measure 5 or more"):
        read_latency(file, SMALL_SHAPE)


def test_memory_is_of_weights_and_of_the_cache_of_every_sequence():
    options = BudgetConfig(memory_gib=1.0, batch=3, context=7, weight_bytes=0.5, cache_bytes=2.0)
    found = Budget.of(SMALL_SHAPE, options).cost_of("memory_gib", SMALL_SHAPE) * 2**30
    assert cached_values(SMALL_SHAPE, {}) == 2 * 4 * 4 * 4
    assert found == pytest.approx(0.5 * count_parameters(SMALL_SHAPE) + 2 * 128 * 3 * 7)


@pytest.mark.parametrize("figures", [3, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, 1.234, 1.2345, 99.95, 999.9, 1234.5, 3.0001e-7, -1.234, -1234.5])
def test_what_is_typed_is_the_least_of_so_many_figures_that_is_not_below(value, figures):
    found = _ceil(value, figures)
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - figures + 1) if value else 1.0
    assert value <= found < value + unit * (1 + 1e-9) and float(f"{found:.{figures}g}") == found


@pytest.mark.parametrize(("power", "shares"), [(1, [0.5, 1 / 6, 0]), (2, [5 / 14, 1 / 14, 0])])
def test_what_is_lost_is_what_the_best_do_not_carry(power, shares):
    found = lost(np.array([[1.0, 3.0, -2.0], [0.0, 0.0, 0.0]]), np.array([1, 2, 3]), power)
    np.testing.assert_allclose(found, [shares, [1, 1, 1]], atol=1e-12)


def test_a_layer_analysis_goes_with_shapes_that_lose_layers_alone():
    for analysis, layers, given in (("a", 3, True), ("a", 4, False), (None, 3, False)):
        source = Source("m", "s", analysis, PruneOptions())
        assert ("layers" in source.options({"num_layers": layers}, 4)) == given


# What a chain takes


def test_room_is_for_models_and_checkpoints_of_every_round(monkeypatch):
    """A student twice, before and after its training, and each checkpoint with 12 bytes of optimizer a weight."""
    asked = []
    monkeypatch.setattr(compress_plan, "check_space", lambda place, need, *_, **__: asked.append(need))
    n, m = count_parameters(SMALL_SHAPE), count_parameters(STUDENT)
    config = SimpleNamespace(trainer=SimpleNamespace(keep_last=2))
    one = SimpleNamespace(target=STUDENT, stages={"distill": SimpleNamespace(config=config)})
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        source = SimpleNamespace(shape=replace(SMALL_SHAPE, dtype=dtype))
        for hf, export, extra in ((None, False, 0), ("h", False, n * item), (None, True, m * item)):
            cfg = SimpleNamespace(hf=hf, export=export, output="x")
            compress_plan._check_room(cfg, source, [one, one])
            assert asked.pop() == 2 * m * (2 * item + 3 * (item + 12)) + extra


def test_what_was_given_stands_and_its_other_unit_does_not():
    chosen = {"trainer.steps": 5, "optim.warmup_steps": 2, "optim.lr": 1.0}
    choices = Choices({"distill": chosen})
    assert choices.of("distill", {}) == chosen and choices.of("prune", {"a": 1}) == {"a": 1}
    assert choices.of("distill", {"optim.lr": 2.0}) == chosen | {"optim.lr": 2.0}
    assert choices.of("distill", {"optim.warmup_tokens": 3}) == {
        "trainer.steps": 5,
        "optim.lr": 1.0,
        "optim.warmup_tokens": 3,
    }


# Who may start, and beside whom


@pytest.mark.parametrize(
    ("rank", "size", "taken"), [("0", None, True), ("1", None, False), ("3", "4", True), ("4", "4", False)]
)
def test_ranks_are_below_the_size_of_the_job(monkeypatch, rank, size, taken):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert refused(main.check_environment) != taken


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("--master-port 65535", True),
        ("--master-port 65536", False),
        ("--nnodes 2 --node-rank 1", True),
        ("--nnodes 2 --node-rank 2", False),
        ("--nnodes 2:4 --node-rank 3", True),
        ("--nnodes 2:2", True),
        ("--nnodes 3:2", False),
        ("--node-rank 0", True),
        ("--node-rank 1", False),
        ("--max-restarts 0", True),
        ("--nproc-per-node 0", False),
        ("--nproc-per-node 1", True),
    ],
)
def test_numbers_of_a_start_have_ends(words, taken):
    assert refused(main.check_start, words.split()) != taken


@pytest.mark.parametrize(
    ("planned", "started", "dry_run", "taken"),
    [
        (None, "4", False, True),
        (4, "4", False, True),
        (8, "4", False, False),
        (2, "4", False, False),
        (1, None, False, True),
        (2, None, False, False),
        (8, None, True, True),
        (8, "4", True, False),
    ],
)
def test_a_job_has_the_processes_that_it_was_planned_for(monkeypatch, planned, started, dry_run, taken):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started:
        monkeypatch.setenv("WORLD_SIZE", started)
    config = SimpleNamespace(parallel=SimpleNamespace(world_size=planned), dry_run=dry_run)
    assert refused(check_processes, config) != taken


@pytest.mark.parametrize("vocabulary", [SMALL_SHAPE.vocab_size - 1, SMALL_SHAPE.vocab_size + 1])
def test_a_teacher_has_the_vocabulary_of_its_student(vocabulary):
    teacher = replace(SMALL_SHAPE, vocab_size=vocabulary)
    with pytest.raises(UserError, match="has a vocabulary of"):
        distill_checks.check_pair(teacher, SMALL_SHAPE, None, Layout())
    with pytest.raises(UserError, match="has a vocabulary of"):
        evaluate_checks.check_teacher(teacher, SMALL_SHAPE)
    evaluate_checks.check_teacher(SMALL_SHAPE, STUDENT)


def test_layers_that_are_compared_are_of_the_models():
    for pair, taken in (
        ([-4, 5], True), ([3, -6], True), ([4, 0], False), ([-5, 0], False), ([0, 6], False), ([0, -7], False)
    ):  # fmt: skip
        options = DistillOptions(intermediate=1.0, intermediate_layers=[pair])
        assert refused(chosen_pairs, options, 4, 6) != taken


@pytest.mark.parametrize(("length", "taken"), [(60, True), (61, False)])
def test_a_prompt_and_its_answer_may_take_all_positions(length, taken):
    source = SimpleNamespace(name="m", path="p", shape=replace(SMALL_SHAPE, max_position_embeddings=64))
    cfg = SimpleNamespace(input_length=length, output_length=4, engine=[])
    if not taken:
        with pytest.raises(UserError, match=r"use input_length=60$"):
            check_sources(cfg, [source], Layout())
    else:
        check_sources(cfg, [source], Layout())


# Generated text


@pytest.mark.parametrize(("prompt", "taken"), [([1] * 5, True), ([1] * 6, False), ([], False)])
def test_the_last_token_of_an_answer_needs_no_position(prompt, taken):
    """What fits comes as far as the model, of which there is none here."""
    shape = SimpleNamespace(max_position_embeddings=8)
    with pytest.raises(IndexError if taken else ValueError):
        generate([], Layout(), shape, [prompt], Sampling(4))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_the_mode_that_it_was_in(training):
    model = torch.nn.Dropout().train(training)
    with _evaluating([model]):
        assert not model.training
    assert model.training is training


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_of_the_most_probable_tokens_there_are_k(k):
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    chances = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    found = draw(logits.expand(400, 4), chances, Sampling(1, temperature=1.0, top_k=k))
    assert set(found.tolist()) == set([1, 3, 2, 0][:k])


# Sums and sizes


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


def test_parameters_in_cpu_memory_begin_at_multiples_and_do_not_overlap():
    module = torch.nn.Module()
    for number, size in enumerate((3, 130, 128)):
        module.register_parameter(str(number), torch.nn.Parameter(torch.full((size,), float(number))))
    layer = _Layer(module)
    assert layer.starts == [0, 512, 1536] and layer.bytes == 2048
    assert [set(p.tolist()) for p in module.parameters()] == [{0.0}, {1.0}, {2.0}]
    assert not any(p.requires_grad for p in module.parameters())


# Figures of a report


def test_maps_have_the_most_important_neurons_of_each_layer_first_and_fronts_what_is_on_them(monkeypatch):
    shown = {}

    def note(name):
        return lambda *given: shown.update({(name, given[1] if name == "heat_map" else ""): given}) or ""

    for name in ("heat_map", "importance_over_layers", "bars", "front"):
        monkeypatch.setattr(cutting.plots, name, note(name))
    tensors = {
        "ffn": np.array([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]]),
        "heads": np.array([[1.0], [2.0]]),
        "layers": np.array([0.1, 0.2]),
        "hidden.attention_norm": np.array([[1.0], [2.0]]),
        "hidden.mlp_norm": np.array([[10.0], [20.0]]),
    }
    cutting._importance(SimpleNamespace(results={}, name="s"), Scores(tensors, "d"))
    assert shown["heat_map", "neurons by importance"][0].tolist() == [[3, 2, 1], [6, 5, 4]]
    assert shown["heat_map", "hidden channel"][0].tolist() == [[11], [22]]
    listed = [
        {"parameters": 3, "predicted_loss": 0.1, "on_front_of": ["parameters"], "rank": 1},
        {"parameters": 2, "predicted_loss": 0.4, "on_front_of": ["latency_ms"], "rank": 2},
        {"parameters": 1, "predicted_loss": 0.3, "on_front_of": ["parameters"]},
    ]
    cutting._front(listed, "parameters")
    points, ranked, *_ = shown["front", ""]
    assert points == [(1, 0.3), (3, 0.1)] and ranked == [(3, 0.1), (2, 0.4)]


def test_shares_of_what_was_cut():
    assert cutting._stays(np.array([1.0, 2.0, 3.0]), np.array([2]), 1) == pytest.approx(0.5)
    assert cutting._stays(np.array([1.0, 2.0, 3.0]), np.array([2]), 2) == pytest.approx(9 / 14)
    assert cutting._mask(4, np.array([1, 3])).tolist() == [False, True, False, True]
    assert cutting._share(SMALL_SHAPE, STUDENT, "num_layers") == "75.0 %"
    assert (cutting._size(1234), cutting._size((5, 1234))) == ("1,234", "5 to 1,234")


# Published figures, and what belongs together


def test_published_figures_are_those_of_the_papers():
    """Sums of each model's row, added up by hand: a digit that is another one is another sum."""
    found = {one["name"]: one for one in load_yaml(Path(cutting.__file__).with_name("published.yaml"))["models"]}
    assert {name: round(sum(one["scores"].values()), 1) for name, one in found.items()} == {
        "Llama-3.1 8B": 418.2,
        "Llama-3.1-Minitron 4B width": 382.2,
        "Llama-3.1-Minitron 4B depth": 342.3,
        "Minitron 4B": 325.5,
        "Mistral NeMo 12B": 450.3,
        "MN-Minitron 8B": 447.2,
    }
    tokens = {name: one["tokens"] for name, one in found.items() if "tokens" in one}
    minitrons = {"Llama-3.1-Minitron 4B width": 94e9, "Llama-3.1-Minitron 4B depth": 94e9, "MN-Minitron 8B": 380e9}
    assert tokens == minitrons


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


@pytest.mark.parametrize(
    ("ranks", "files", "says"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (1,), "has no targets/rank_02.yaml"),
        ((1, 2), (), "has no targets/rank_01.yaml"),
        ((), (1,), "has no ranked shape"),
    ],
)
def test_every_ranked_shape_has_its_target(tmp_path, monkeypatch, ranks, files, says):
    sizes = dict.fromkeys(SIZES, 4)
    listed = [{**sizes, "predicted_loss": 0.5}, *({**sizes, "rank": rank, "predicted_loss": 0.1} for rank in ranks)]
    (tmp_path / search_folder.FILE).write_text(json.dumps({"candidates": listed}))
    manifest = {
        "config": {"model": {"path": "m"}, "scores": "s", "layers": None, "prune": {}},
        "inputs": {"model": "a", "scores": "b", "data": "c"},
        "files": [search_folder.target_file(rank) for rank in files],
        "digest": "d",
    }
    monkeypatch.setattr(search_folder, "read_output", lambda *_: manifest)
    if says:
        with pytest.raises(UserError, match=f"{says}: run search again"):
            search_folder.read_search(tmp_path)
        return
    read = search_folder.read_search(tmp_path)
    assert [one.rank for one in read.ranked] == [1, 2] and read.inputs == {"model": "a", "scores": "b"}
    assert read.model_digest == "a" and read.target(read.ranked[1]) == tmp_path / "targets/rank_02.yaml"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", ([1.0], ["a"])),
        (["a", "b"], ([], ["a", "b"])),
        ([1, "a", 2.5, "b"], ([1.0, 2.5], ["a", "b"])),
        ([1, "a", "2", "b"], None),
        ([1, "a", True, "b"], None),
        ([1, "a", 2], None),
        ([1, "a", 2, 3], None),
        ([1, "a", 0, "b"], None),
        ([1, "a", -1, "b"], None),
        ([1, "a", math.inf, "b"], None),
        ([1, "a", math.nan, "b"], None),
        ([1, "a", 2, "a"], None),
        ([], None),
        (None, None),
    ],
)
def test_a_blend_is_a_folder_or_a_list_whose_every_weight_is_a_number(path, found):
    if found is None:
        assert refused(parse_blend, path)
    else:
        assert parse_blend(path) == found


def test_what_was_asked_is_the_same_in_any_order():
    one = Asked({"a": 1, "b": [2]}, {"x": "1", "y": "2"}, None)
    other = Asked({"b": [2], "a": 1}, {"y": "2", "x": "1"}, "elsewhere")
    assert one.fingerprint() == other.fingerprint() and one.same_options(other)
    for odd in (replace(one, options={"a": 2, "b": [2]}), replace(one, inputs={"x": "1", "y": "3"})):
        assert odd.fingerprint() != one.fingerprint()


def test_evaluations_are_of_one_measure_whatever_model_they_are_of():
    def measure(config: dict, **inputs: str) -> str:
        return same_measure(SimpleNamespace(config=config, inputs=inputs))

    plain = {"model": {"path": "m"}, "output": "o", "samples": 8, "tasks": ["t"]}
    first = measure(plain, model="1", data="d")
    assert measure({**plain, "model": {"path": "n"}, "output": "p"}, model="2", data="d") == first
    assert measure({**plain, "seed": 5, "device": "cpu"}, hf="2", data="d") == measure({**plain}, model="1", data="d")
    for config, data in (({**plain, "samples": 9}, "d"), ({**plain, "tasks": ["u"]}, "d"), (plain, "e")):
        assert measure(config, model="1", data=data) != first


@pytest.mark.parametrize("order", [1, -1])
def test_room_is_for_the_largest_model_that_takes_another_form(monkeypatch, order):
    asked = []
    monkeypatch.setattr(sources, "check_space", lambda place, need, *_: asked.append(need))
    monkeypatch.setattr(sources, "total_bytes", lambda shape: shape)
    models = [SimpleNamespace(shape=size, fits=lambda engine, fits=fits: engine in fits) for size, fits in (
        (5, ["a"]), (7, ["b"]), (9, ["a", "b"])
    )][::order]  # fmt: skip
    for engine, need in ((["a", "b"], 7), (["a"], 7), (["b"], 5)):
        sources.check_room(SimpleNamespace(output="o", engine=engine), models)
        assert asked.pop() == need
    sources.check_room(SimpleNamespace(output="o", engine=["a"]), [])
    assert asked == [0]


@pytest.mark.parametrize(("length", "named"), [(1, "3"), (2, "3 to 4"), (3, "3 to 5")])
def test_a_block_is_named_by_its_first_and_its_last_layer(length, named):
    judged = SimpleNamespace(bi=0.25, loss=2.5, accuracy=0.5)
    found = [_cell(judged, judge, 3, length) for judge in ("bi", "loss", "task")]
    assert found == [f"{named} (0.25)", f"{named} (2.5)", f"{named} (50.00%)"]


def test_special_tokens_keep_their_names_and_have_their_new_numbers():
    ids = {"<s>": 7, "</s>": 9}
    before = {"sep": ["</s>", 2], "cls": ["<s>", 1], "special": [{"ids": [1, 2], "tokens": ["<s>", "</s>"]}, "more", 4]}
    assert _renumbered(before, ids) == {
        "sep": ["</s>", 9],
        "cls": ["<s>", 7],
        "special": [{"ids": [7, 9], "tokens": ["<s>", "</s>"]}, "more", 4],
    }
