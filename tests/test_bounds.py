"""Both sides of bounds: the last value that is taken, and the first that is not."""
# ruff: noqa: F811 (fixtures of other files)

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron import choosing
from minitron_megatron.automatic import memory_obstacle, tokenising_processes
from minitron_megatron.checkpoints import stamps
from minitron_megatron.checkpoints.hf_folder import hf_tensors, plan_shards
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.config import (
    DistillOptions,
    GuardConfig,
    OptimConfig,
    PruneOptions,
    TrainerConfig,
    TrainingDataConfig,
    check,
)
from minitron_megatron.data import datasets
from minitron_megatron.data.folder import check_enough, open_data
from minitron_megatron.data.indexed import SplitWriter, token_dtype
from minitron_megatron.data.windows import WindowPlan
from minitron_megatron.demo_plan import Plan
from minitron_megatron.distill.intermediate import SMALLEST, IntermediateLoss
from minitron_megatron.errors import UserError
from minitron_megatron.importance.statistics import BatchStatistic, finish_batch, finish_sequence
from minitron_megatron.lengths import check_positions
from minitron_megatron.models.axes import slots
from minitron_megatron.models.limits import check_fp8, check_layout, check_sequence, sequence_parts
from minitron_megatron.models.shape import SIZES, padded_size
from minitron_megatron.models.vocab_parallel import block_rows
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import CLEARLY_FASTER, PRODUCTS, Products
from minitron_megatron.prune.select import target_shape
from minitron_megatron.train.foresee import RESERVED_GIB, Forecast
from minitron_megatron.train.guard import SMALLEST_MEDIAN, SpikeGuard
from minitron_megatron.train.schedule import Schedule
from tests.test_axes import shape
from tests.test_cache import SMALL
from tests.test_data import data, model  # noqa: F401 (fixtures)

SMALL_SHAPE = shape(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, head_dim=4
)


def refused(function, *given, **more) -> bool:
    """Whether it raises UserError."""
    try:
        function(*given, **more)
    except UserError:
        return True
    return False


# Options


@pytest.mark.parametrize(
    ("options", "least", "below"),
    [
        (TrainerConfig, {"tokens": 1.0}, {"tokens": 0.5}),
        (OptimConfig, {"decay_tokens": 1.0}, {"decay_tokens": 0.5}),
        (DistillOptions, {"temperature": 0.01}, {"temperature": 1e-30}),
        (DistillOptions, {"temperature": 1000.0}, {"temperature": 1001.0}),
        (TrainingDataConfig, {"max_epochs": 1e-9}, {"max_epochs": 0.0}),
        (TrainingDataConfig, {"max_epochs": 1e-9}, {"max_epochs": -1.0}),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, least, below):
    assert not refused(check, options(**least)) and refused(check, options(**below))


# Data


def test_data_have_a_sample_and_one_token(data, model):
    """A sample of n tokens has n labels, the last of which is the token after it."""
    wide = SMALL_SHAPE.resized(max_position_embeddings=10**6, vocab_size=300)
    tokens = open_data(str(data), "validation", wide, 16).tokens("validation")
    assert not refused(open_data, str(data), "validation", wide, tokens - 1)
    with pytest.raises(UserError, match=rf"has {tokens} tokens, fewer than one .*data\.sequence_length={tokens - 1}$"):
        open_data(str(data), "validation", wide, tokens)


def test_data_have_no_more_tokens_than_the_model(data):
    assert not refused(open_data, str(data), "train", SMALL_SHAPE.resized(vocab_size=300), 16)
    assert refused(open_data, str(data), "train", SMALL_SHAPE.resized(vocab_size=299), 16)


def test_as_many_epochs_as_allowed(data):
    opened = open_data(str(data), "train", SMALL_SHAPE.resized(vocab_size=300), 16)
    tokens = opened.tokens("train")
    assert not refused(check_enough, opened, 3 * tokens, 3.0)
    assert refused(check_enough, opened, 3 * tokens + 1, 3.0)


@pytest.mark.parametrize("tokens", [17, 18, 32, 33, 34, 48, 49])
def test_windows_are_as_many_as_labels_need(tmp_path, tokens):
    """Of 16 tokens; each token but the first is a label once."""
    with SplitWriter(tmp_path / "validation", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(tokens, dtype=np.uint16))
        writer.finish()
    folder = SimpleNamespace(path=tmp_path)
    masks = SimpleNamespace(end_of_document=False, reset_attention=False)
    of = SimpleNamespace(folders=[folder], weights=[1.0], masks=masks, end_of_document=1)
    assert len(WindowPlan(of, "validation", 16)) == math.ceil((tokens - 1) / 16)
    windows = datasets.Windows(of, "validation", 16)
    labels = [windows[i]["labels"][windows[i]["loss_mask"] > 0].tolist() for i in range(len(windows))]
    assert [label for one in labels for label in one] == list(range(1, tokens))


def test_token_ids_have_16_bits_below_65500():
    """Megatron's readers take the same rule."""
    assert [token_dtype(size).name for size in (2, 65499, 65500, 10**6)] == ["uint16", "uint16", "int32", "int32"]


def test_files_are_told_by_contents_up_to_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "LARGEST_READ", 5)
    for size in (5, 6):
        (tmp_path / str(size)).write_bytes(b"x" * size)
    found = file_stamps(tmp_path, [tmp_path / "5", tmp_path / "6", tmp_path / "none"])
    assert found.keys() == {"file 5", "file 6"}
    assert found["file 5"].startswith("sha256:") and found["file 6"].startswith("6 bytes of ")


@pytest.mark.parametrize(
    ("size", "wanted"), [(2, 1), (255, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24 + 1, 4)]
)
def test_ids_of_a_cache_have_the_bytes_that_they_need(size, wanted):
    contents = replace(SMALL, vocab_size=size)
    assert contents.id_bytes == wanted and 256**contents.id_bytes > size - 1


def test_workers_are_no_more_than_work_and_cores():
    given = [(0, 8), (7_999_999, 8), (16_000_000, 8), (10**9, 8), (10**12, 100)]
    assert [tokenising_processes(*one) for one in given] == [1, 1, 2, 8, 32]


# Models


def test_a_vocabulary_is_padded_to_the_next_multiple():
    assert [padded_size(n) for n in (1, 1023, 1024, 1025, 2048)] == [1024, 1024, 1024, 2048, 2048]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_a_model_have_ends(name):
    """The most of each, and 1 where other sizes allow it."""
    others = {"num_attention_heads": {"num_query_groups": 1}, "num_query_groups": {"num_attention_heads": SIZES[name]}}
    most = {name: SIZES[name], **others.get(name, {})}
    assert not refused(shape, **most)
    for wrong in (SIZES[name] + 1, SIZES[name] * 2, 0, -1, 1.5, "1", True, None):
        assert refused(shape, **{**most, name: wrong}), wrong


@pytest.mark.parametrize("room", [0, -1])
def test_files_of_an_export_are_no_larger_than_asked_for(room):
    """As many tensors of a file as fill it to the byte."""
    model = shape(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=4,
        vocab_size=9,
    )
    sizes = [math.prod(one) * 2 for slot in slots(model) for one in hf_tensors(slot, model).values()]
    most = sum(sizes[:4]) + room
    files = plan_shards(model, most)
    written = [sum(math.prod(one) * 2 for one in tensors.values()) for tensors in files.values()]
    assert sum(written) == sum(sizes) and len(next(iter(files.values()))) == 4 + room
    assert all(size <= most or len(tensors) == 1 for size, tensors in zip(written, files.values(), strict=True))


@pytest.mark.parametrize(("heads", "taken"), [(4, True), (3, False), (8, True)])
def test_heads_are_merged_into_half_of_them_at_least(heads, taken):
    plain = SMALL_SHAPE.resized(num_query_groups=8)
    options, target = PruneOptions(heads="merge"), {"num_attention_heads": heads, "num_query_groups": heads}
    assert refused(target_shape, plain, target, [], options) is not taken


@pytest.mark.parametrize("name", ["hidden_size", "ffn_hidden_size", "vocab_size", "num_layers"])
def test_targets_are_from_1_to_the_whole(name):
    whole = getattr(SMALL_SHAPE, name)
    assert [refused(target_shape, SMALL_SHAPE, {name: size}, []) for size in (0, 1, whole, whole + 1)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_layout_has_a_layer_for_each_stage():
    for stages, wrong in ((4, False), (5, True)):
        assert refused(check_layout, SMALL_SHAPE, Layout(pipeline=stages, world_size=stages)) is wrong


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ({}, 1),
        ({"tensor": 2}, 1),
        ({"tensor": 2, "sequence": True}, 2),
        ({"context": 2}, 4),
        ({"context": 3, "tensor": 2, "sequence": True}, 12),
    ],
)
def test_a_sequence_divides_over_those_who_share_it(layout, parts):
    """Context parallelism has two parts a rank, so that causal work is even."""
    made = Layout(**layout, world_size=math.prod(value for value in layout.values() if value is not True))
    assert sequence_parts(made) == parts
    assert not refused(check_sequence, 5 * parts, made)
    assert parts == 1 or refused(check_sequence, 5 * parts + 1, made)


def test_some_layers_compute_in_fp8():
    large = shape(num_layers=4)
    assert not refused(check_fp8, "o", "tensorwise", large, Layout(), 128, 1)
    assert refused(check_fp8, "o", "tensorwise", large, Layout(), 128, 2)


def test_a_sequence_may_be_as_long_as_the_model_takes():
    assert not refused(check_positions, 128, 128, "the model") and refused(check_positions, 129, 128, "the model")


@pytest.mark.parametrize(
    ("times", "dtype"), [(CLEARLY_FASTER, "bfloat16"), (CLEARLY_FASTER - 1e-3, "float32"), (9, "bfloat16")]
)
def test_bfloat16_is_taken_from_a_clear_gain_on(times, dtype):
    rates = {"float32": dict.fromkeys(PRODUCTS, 100.0), "bfloat16": dict.fromkeys(PRODUCTS, 100.0 * times)}
    found = Products(rates, "machine")
    assert found.gain == pytest.approx(times)
    assert (
        Products(
            {**rates, "bfloat16": dict.fromkeys(PRODUCTS, 125.0), "float32": dict.fromkeys(PRODUCTS, 100.0)}, ""
        ).gain
        == 1.25
    )
    assert found.dtype == dtype or times == CLEARLY_FASTER


def test_a_gain_of_just_the_bound_is_clear(monkeypatch):
    monkeypatch.setattr("minitron_megatron.parallel.precision.CLEARLY_FASTER", 2.0)
    rates = {"float32": dict.fromkeys(PRODUCTS, 1.0), "bfloat16": dict.fromkeys(PRODUCTS, 2.0)}
    assert Products(rates, "").gain == 2.0 and Products(rates, "").dtype == "bfloat16"


# Training


def test_a_spike_is_above_its_factor():
    """And not at it; of a median of nearly nothing the smallest counts."""

    def guard(losses):
        made = SpikeGuard(GuardConfig(window=2, loss_factor=4.0, grad_norm_factor=4.0))
        assert all(made.takes(step, loss, loss) for step, loss in enumerate(losses))
        return made

    for value in (0.5, 2.0):
        assert guard([value, value]).takes(2, 4 * value, 4 * value)
        assert not guard([value, value]).takes(2, math.nextafter(4 * value, 9e9), value)
        assert not guard([value, value]).takes(2, value, math.nextafter(4 * value, 9e9))
    tiny = guard([1e-12, 1e-12])
    assert tiny.takes(2, 4 * SMALLEST_MEDIAN, 0.0)
    assert not guard([1e-12, 1e-12]).takes(2, 4.1 * SMALLEST_MEDIAN, 0.0)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_step_is_judged_once_there_is_a_full_window(window):
    """And not one step before."""
    guard = SpikeGuard(GuardConfig(window=window, loss_factor=2.0, grad_norm_factor=2.0))
    for step in range(window):
        assert guard.takes(step, 10.0**step, 10.0**step)
    assert not guard.takes(window, 10.0 ** (window + 1), 1.0) and guard.skipped == 1


def test_warm_up_and_decay_may_take_all_steps():
    def schedule(steps):
        return Schedule.of_run(OptimConfig(schedule="wsd", warmup_steps=4, decay_steps=6), steps, 1)

    assert schedule(10).learning_rate(9) == pytest.approx(OptimConfig().min_lr) and refused(schedule, 9)
    assert not refused(Schedule.of_run, OptimConfig(lr=1e-4, min_lr=1e-4), 5, 1)


@pytest.mark.parametrize(
    ("distance", "alpha"), [(SMALLEST, 0.0), (2 * SMALLEST, 1 / (2 * SMALLEST)), (0.0, 0.0), (4.0, 0.25)]
)
def test_alpha_of_nearly_equal_states_is_zero(distance, alpha):
    """It is the ratio of the means; the step before it gets none."""
    loss = IntermediateLoss([], [], 1.0, 0)
    assert loss.next_alpha(1.0, distance) == 0.0
    assert loss.alpha == alpha
    for logits, states in ((math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)):
        assert loss.next_alpha(logits, states) == alpha and loss.alpha == alpha


@pytest.mark.parametrize(("room", "fits"), [(0.0, True), (-0.01, False)])
def test_a_layout_fits_with_what_is_reserved(monkeypatch, room, fits):
    monkeypatch.setattr(Forecast, "gib", property(lambda self: 74.0))
    gpu = SimpleNamespace(memory_gib=74.0 + RESERVED_GIB + room)
    assert Forecast(None, [], None, gpu, None).fits is fits


def test_graphs_fit_into_just_as_much_memory():
    assert list(memory_obstacle(80.0, 80.0)) == [] and len(list(memory_obstacle(80.1, 80.0))) == 1


# Importance


def test_a_variance_is_never_below_zero():
    """Of values that are all the same, whatever rounding says; over the sequence and over the samples."""
    for value in (0.1, 1e4 + 0.1, 3e-8):
        x = torch.full((7, 3), value, dtype=torch.float64)
        statistic = BatchStatistic.zeros(x[0])
        statistic.add(x, torch.ones(7))
        found = finish_batch(statistic, "variance")
        sums = torch.stack((x.float().sum(0), x.float().square().sum(0)))[:, None]
        of_sequence = finish_sequence(sums, 7, "variance")
        assert (found >= 0).all() and (of_sequence >= 0).all()
    below = BatchStatistic(torch.tensor([3.0]).double(), torch.tensor([2.9]).double(), torch.tensor(3.0).double())
    assert finish_batch(below, "variance").item() == 0
    assert finish_sequence(torch.tensor([[[3.0]], [[2.9]]]), 3, "variance").item() == 0


def test_rates_go_by_the_size_of_the_student(monkeypatch):
    """Each up to and with its size; the published one for all that are larger."""
    sizes = {10: 1e-3, 10**8: 1e-3, 10**8 + 1: 5e-4, 5 * 10**8 + 1: 2e-4, 2 * 10**9: 2e-4, 2 * 10**9 + 1: 1e-4}
    monkeypatch.setattr(choosing, "count_parameters", lambda parameters: parameters)
    assert {size: choosing._rate(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("tokens", "given", "steps"), [(300, True, 3), (301, True, 4), (399, False, 3), (99, False, 1)]
)
def test_steps_of_tokens(tokens, given, steps):
    """All that were given are trained on; of a text no more than there are, and one step at least."""
    assert choosing._steps_of({"trainer.tokens": tokens} if given else {}, tokens, 100) == steps


@pytest.mark.parametrize("slower", [1.0, 1.001, 3.0])
def test_a_plan_is_made_again_where_stages_were_slower_at_all(slower):
    seconds = {"importance": 10.0, "distill": 100.0, "evaluate pruned": 20.0}
    plan = Plan("lean", 20, 1, seconds)
    again = plan.fewer(slower, 10.0, 100.0)
    assert again.seconds == pytest.approx({"importance": 10.0, "distill": 100 * slower, "evaluate pruned": 20 * slower})
    late = plan.fewer(slower, 10.0, 3.0)
    assert (late.steps < plan.steps) == (slower == 3.0)


def test_blocks_are_as_large_as_a_core_keeps_on_cpus_and_larger_elsewhere():
    """At least a row; docs/benchmarks.md has what the other size costs."""
    for device, elements in (("cpu", 2**19), ("meta", 2**24)):
        for width in (1024, 2**25):
            rows = block_rows(torch.empty(1, width, device=device))
            assert rows == max(1, elements // width)
