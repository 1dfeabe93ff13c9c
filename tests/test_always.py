"""What the documentation says with always, never, only, zero and same: a test for each such sentence that had none.

Of outputs and weights (docs/architecture.md, *Weights on disk*), of samples (*Data and their order*), of what is cut, of the
search and of a report's curves.
"""
# ruff: noqa: F811 (fixtures of other files)

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blake3 import blake3

from minitron_megatron.benchmark.checks import check_benchmark
from minitron_megatron.candidates.run import check_candidates
from minitron_megatron.changing import as_stored, differences, free_options
from minitron_megatron.checkpoints import weights
from minitron_megatron.checkpoints.folder import check_output, open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.index import _allowed, check_weights
from minitron_megatron.checkpoints.lineage import Step, _line, find_step
from minitron_megatron.checkpoints.random_model import make_random_model
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.stamps import other_inputs, say_others
from minitron_megatron.checkpoints.unpickling import plain_data
from minitron_megatron.checkpoints.weights import _content_digest, chunks
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.compress_plan import check_compress
from minitron_megatron.config import (
    BenchmarkConfig,
    BudgetConfig,
    CompressConfig,
    DistillCandidatesConfig,
    EvaluateConfig,
    EvaluateDataConfig,
    ExportHfConfig,
    ImportHfConfig,
    ModelConfig,
    PruneOptions,
    RandomModelConfig,
    SpaceConfig,
    SubmitConfig,
    ThroughputConfig,
)
from minitron_megatron.data import same_tokenizer
from minitron_megatron.data.datasets import Epochs, RequestSamples, training_samples
from minitron_megatron.data.indexed import SplitWriter, open_split
from minitron_megatron.data.prepare import split_of
from minitron_megatron.data.questions import Request
from minitron_megatron.data.text import find_files
from minitron_megatron.data.vocabulary import choose_tokens
from minitron_megatron.distill.routing import Side
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.checks import check_evaluate
from minitron_megatron.evaluate.scoring import _inputs
from minitron_megatron.models import guessing
from minitron_megatron.models.axes import Selection, count_parameters, slots
from minitron_megatron.models.families import shape_from_hf
from minitron_megatron.models.shape import padded_size
from minitron_megatron.parallel import deciding
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.cut import combine
from minitron_megatron.prune.select import Kept
from minitron_megatron.report import plots
from minitron_megatron.report.folders import read_metrics
from minitron_megatron.search.budget import Budget
from minitron_megatron.search.scan import scan
from minitron_megatron.search.space import make_space
from minitron_megatron.submit import check_submit
from minitron_megatron.throughput.run import check_throughput
from minitron_megatron.train import loop
from minitron_megatron.train.loop import Trainer
from tests.test_checkpoints import random_sizes, source, write  # noqa: F401 (a fixture)
from tests.test_data import data, model, opened  # noqa: F401 (fixtures)
from tests.test_families import config_of
from tests.test_search import TINY, every_number, shape  # noqa: F401 (a fixture)
from tests.tiny import model_option

# Outputs and weights


FREE = frozenset({"parallel.tensor", "device", "trainer.cuda_graphs", "logger.wandb"})


@pytest.mark.parametrize(
    ("changed", "the_same"),
    [
        ({"device": "cuda"}, True),
        ({"parallel": {"tensor": 8}}, True),
        ({"trainer": {"steps": 3, "cuda_graphs": True}}, True),
        ({"logger": {"wandb": "offline"}}, True),
        ({"trainer": {"steps": 4, "cuda_graphs": "auto"}}, False),
        ({"seed": 2}, False),
        ({"model": {"path": "b"}}, False),
    ],
)
def test_what_changes_an_output_and_what_does_not(tmp_path, changed, the_same):
    """What is free does not, before the work begins and when the folder is made; whatever else is asked for does, by name."""
    before = {"seed": 1, "model": {"path": "a"}, "trainer": {"steps": 3, "cuda_graphs": "auto"}, "device": "cpu"}
    before |= {"parallel": {"tensor": 1}, "logger": {"wandb": "auto"}}
    write(tmp_path / "o", before, free=FREE)
    asked = {"config": {**before, **changed}, "inputs": {}, "resume": True, "free": FREE}
    if the_same:
        check_output(tmp_path / "o", **asked)
        assert write(tmp_path / "o", {**before, **changed}, free=FREE) is True
        return
    (name,) = changed
    for ask in (
        partial(check_output, tmp_path / "o", **asked),
        partial(write, tmp_path / "o", asked["config"], free=FREE),
    ):
        with pytest.raises(UserError, match=rf"made with other options or inputs \({name}"):
            ask()


@pytest.mark.parametrize("name", ["evaluate", "distill", "import_hf"])
def test_where_a_command_runs_decides_nothing_and_what_it_reads_does(name):
    free = free_options(COMMANDS[name].config)
    assert {"output", "resume", "verify", "dry_run", "device"} <= free
    assert not {"seed", "model.path", "teacher.path", "hf", "optim.lr", "trainer.global_batch_size"} & free


def padded_rows(path) -> torch.Tensor:
    """Rows of every tensor of the vocabulary that are no token's."""
    folder = open_model_folder(path)
    reader, rows = WeightReader(folder.weights), [s for s in slots(folder.shape) if "vocab" in s.row.axes]
    return torch.cat([reader.read_slot(slot, folder.shape)[folder.shape.vocab_size :] for slot in rows])


@pytest.mark.parametrize("rows", [64, 1024])
def test_padded_rows_are_zero(source, tmp_path, monkeypatch, rows):
    """Of imported and of random models, in whatever chunks: those with no token in them, and the one where tokens end."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", rows * 32 * 2)
    make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes()), output=str(tmp_path / "random")))
    import_hf(ImportHfConfig(hf=str(source.parent / "hf"), output=str(tmp_path / "imported")))
    for name in ("random", "imported"):
        found = padded_rows(tmp_path / name)
        assert len(found) == 2 * (1024 - 300) and (found == 0).all(), name


def test_a_random_model_follows_its_seed(tmp_path):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = str(tmp_path / name)
        make_random_model(RandomModelConfig(model=ModelConfig(**random_sizes()), seed=seed, output=output))
        digests.append(open_model_folder(output).digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "allowed"), [("bfloat16", True), ("float32", True), ("load", False), ("Tensor", False)]
)
def test_an_index_has_names_of_dtypes_alone(name, allowed):
    """Of torch: no class and no function of it."""
    text = f"ctorch\n{name}\n.".encode()
    if allowed:
        assert plain_data(text, _allowed).name == name
    else:
        with pytest.raises(pickle.UnpicklingError, match=f"torch.{name} is not allowed"):
            plain_data(text, _allowed)


def test_a_digest_follows_values_places_and_shape(source, tmp_path):
    """Rows that change places, and a shape whose tensors are the same."""
    folder = open_model_folder(source)
    digests = {str(i): blake3(bytes([i])).hexdigest() for i in range(2)}
    one = {("a", (0,)): digests["0"], ("b", (0,)): digests["1"]}
    other = {("a", (0,)): digests["1"], ("b", (0,)): digests["0"]}
    found = {
        _content_digest(folder.shape, one),
        _content_digest(folder.shape, other),
        _content_digest(folder.shape.resized(rope_theta=1e5), one),
    }
    assert len(found) == 3


def test_an_index_that_is_of_another_size_is_refused(source):
    folder = open_model_folder(source)
    check_weights(folder)
    with pytest.raises(UserError, match=r"model\.yaml says"):
        check_weights(replace(folder, shape=folder.shape.resized(ffn_hidden_size=folder.shape.ffn_hidden_size + 1)))


def test_chunks_lie_in_the_folder_itself(source, tmp_path):
    """An index that names a file elsewhere is not followed."""
    reader = WeightReader(source / "weights")
    for index, info in reader.metadata.storage_data.items():
        reader.metadata.storage_data[index] = replace(info, relative_path=f"../weights/{info.relative_path}")
    with pytest.raises(UserError, match="is not stored as torch_dist does"):
        reader.read_slot(next(chunks(open_model_folder(source).shape)).slot, open_model_folder(source).shape)


def test_an_export_has_the_generation_config_of_its_source(source, tmp_path):
    said = '{"eos_token_id": [1, 5], "temperature": 0.25}'
    hf = shutil.copytree(source.parent / "hf", tmp_path / "hf")
    (hf / "generation_config.json").write_text(said)
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "m")))
    export_hf(ExportHfConfig(model=model_option(tmp_path / "m"), output=str(tmp_path / "back")))
    assert (tmp_path / "back" / "generation_config.json").read_text() == said


def test_files_of_inputs_that_are_gone_or_new_are_named():
    assert other_inputs({"file a": "1", "file b": "2"}, {"file a": "1"}) == ["b"]
    assert other_inputs({"file a": "1"}, {"file a": "1", "file b": "2"}) == ["b"]
    assert other_inputs({"file a": "1", "model": "x"}, {"file a": "2", "model": "y"}) == ["a", "model"]
    assert say_others({"file a": "1", "file b": "2"}, {"file a": "1"}) == "from other files: b changed since"
    assert say_others({"model": "x"}, {"model": "y"}) == "from other inputs: model changed since"
    assert say_others({"file a": "1"}, {"file a": "1"}) == ""


def test_a_line_of_ancestors_ends_where_it_comes_back(tmp_path, monkeypatch):
    """Two folders whose manifests name each other."""
    for name, other in ("ab", "ba"):
        write(tmp_path / name, {"model": {"path": str(tmp_path / other)}, "target": {}, "drop_layers": []}, name)
    digests = {name: read_manifest(tmp_path / name)["digest"] for name in "ab"}
    for name, other in ("ab", "ba"):
        file = tmp_path / name / "manifest.yaml"
        file.write_text(file.read_text().replace("inputs: {}", f"inputs: {{model: '{digests[other]}'}}"))
    source, asked = Step.source, []
    monkeypatch.setattr(Step, "source", lambda self: asked.append(self) or (source(self) if len(asked) < 9 else None))
    assert [step.path.name for step in _line(find_step(tmp_path / "a", digests["a"]))] == ["a", "b"]


def test_a_list_is_the_same_after_it_was_written():
    before, now = {"a": (1, (2, 3)), "b": [1], "c": 1}, {"a": [1, [2, 3]], "b": [2], "d": 1}
    assert list(differences(before, now)) == ["b"] and as_stored((1, [(2,)])) == [1, [[2]]]


# Ranks


def from_rank_zero(fails):
    """What this rank gets of something that rank 0 makes, or what it is refused with."""

    def make():
        if fails:
            raise UserError("as rank 0 sees it")
        return 7

    try:
        return deciding.from_rank_zero(make)
    except UserError as error:
        return str(error)


def test_what_is_wrong_on_rank_zero_is_wrong_on_all(gloo):
    assert gloo(2, from_rank_zero, True) == ["as rank 0 sees it"] * 2
    assert gloo(2, from_rank_zero, False) == [7, None]


def test_a_rank_has_one_place_in_megatrons_order():
    """Tensor-parallel ranks are neighbours, then context, data and pipeline."""
    layout = Layout(tensor=2, context=3, pipeline=2, world_size=24)
    first = {"tensor": 0, "context": 0, "data": 0, "pipeline": 0}
    steps = {name: layout.rank(**{**first, name: 1}) for name in first}
    assert steps == {"tensor": 1, "context": 2, "data": 6, "pipeline": 12}
    for rank in range(24):
        tensor, context, data_rank, pipeline = layout.coordinates(rank)
        assert layout.rank(tensor=tensor, context=context, data=data_rank, pipeline=pipeline) == rank
        assert layout.place(rank) == (tensor, pipeline)


def test_metrics_are_kept_on_the_interval_and_at_the_end():
    this = SimpleNamespace(cfg=SimpleNamespace(logger=SimpleNamespace(interval=3)))
    assert [step + 1 for step in range(8) if Trainer._measures(this, step, 8)] == [3, 6, 8]


# Data


class Numbered:
    """An epoch of samples that are their numbers."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_later_epochs_are_permuted_by_seed_and_epoch(seed):
    """The first is the epoch's own order; sample n depends on seed and n alone, whatever was read before it."""
    epochs = Epochs(Numbered(30), seed=seed, count=100)
    order = [epochs[n] for n in range(100)]
    assert order[:30] == list(range(30)) and len(epochs) == 100
    for number in (1, 2):
        wanted = np.random.RandomState([seed, number]).permutation(30).tolist()
        assert order[30 * number : 30 * number + 30] == wanted
    assert order[30:60] != order[60:90]
    assert order != [Epochs(Numbered(30), seed=seed + 1, count=100)[n] for n in range(100)]
    assert [Epochs(Numbered(30), seed=seed, count=200)[n] for n in (95, 3, 64, 31)] == [
        order[n] for n in (95, 3, 64, 31)
    ]
    for outside in (-1, 100):
        with pytest.raises(IndexError):
            epochs[outside]


def test_more_samples_than_there_is_one_epoch_are_told(model, data, caplog):
    folder = opened(str(data), model, 64)
    epoch = (folder.tokens("train") - 1) // 64
    for count, said in ((epoch, 0), (epoch + 1, 1)):
        caplog.clear()
        training_samples(folder, "train", sequence_length=64, seed=1, count=count)
        assert len(caplog.records) == said


def test_the_split_follows_seed_and_text():
    """Of any text with its own share, for any seed; another seed splits otherwise."""
    splits = {seed: [split_of(text, 0.3, seed) for text in map(str, range(400))] for seed in (1, 2)}
    assert splits[1] != splits[2] and splits[1] == [split_of(text, 0.3, 1) for text in map(str, range(400))]
    for found in splits.values():
        assert 0.2 < found.count("validation") / 400 < 0.4
    assert {split_of("a text", 1.0, seed) for seed in range(9)} == {"validation"}


def test_files_are_in_sorted_order(tmp_path, monkeypatch):
    """Below a folder, whatever order the disk gives them in."""
    names = ["b/2.txt", "a.jsonl", "b/10.txt", "c.md"]
    (tmp_path / "b").mkdir()
    for name in names:
        (tmp_path / name).write_text("x")
    plain = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(sorted(plain(self, pattern))))
    assert find_files(str(tmp_path)) == sorted(tmp_path / name for name in names)


def test_tokens_on_the_disk_are_those_of_the_last_commit(tmp_path):
    """What a killed writer wrote after it goes when the next one begins."""
    dtype = np.dtype(np.uint16)
    with SplitWriter(tmp_path / "train", dtype) as writer:
        for ids in ([1, 2, 3], [4, 5], [6]):
            writer.add(np.array(ids, dtype))
    with SplitWriter(tmp_path / "train", dtype, documents=2, tokens=5) as writer:
        writer.add(np.array([7, 8], dtype))
        writer.finish()
    split = open_split(tmp_path / "train", "train")
    assert split.ids.tolist() == [1, 2, 3, 4, 5, 7, 8] and (split.documents, split.sequences) == (3, 3)


@pytest.mark.parametrize("scored", [1, 2, 3])
def test_the_scored_tokens_of_a_request_are_its_last(scored):
    """Each is a label once; padding is none."""
    sample = RequestSamples([Request([5, 6, 7, 8], scored)], 6)[0]
    assert sample["labels"][sample["loss_mask"] > 0].tolist() == [6, 7, 8][-scored:]
    assert sample["tokens"].tolist() == [5, 6, 7, 8, 0, 0] and sample["position_ids"].tolist() == list(range(6))


def test_requests_of_one_input_are_all_scored():
    requests = [Request([1, 2, 3], 1), Request([1, 5, 3], 1), Request([1, 2, 4], 1), Request([1, 2, 3, 4], 2)]
    assert _inputs(requests) == [[0, 2], [1], [3]]


# What is cut


def byte_pairs(folder):
    """A tokenizer of letters and words made of them, one of which is special."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "cc": 5, "ca": 6}
    merges = [["a", "b"], ["ab", "c"], ["c", "c"], ["c", "a"]]
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    special = [{"content": "cc", "id": 5, **how}, {"content": "<end>", "id": 7, **how}]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": special}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.parametrize(
    ("size", "counts", "kept"),
    [
        (5, {4: 9, 6: 1}, [0, 1, 2, 5, 7]),  # letters and special tokens alone
        (6, {4: 9, 6: 1}, [0, 1, 2, 5, 6, 7]),  # no room for abc, which needs ab
        (7, {4: 9, 6: 1}, [0, 1, 2, 3, 4, 5, 7]),
        (8, {4: 9, 6: 1}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (6, {6: 1}, [0, 1, 2, 5, 6, 7]),
        (6, {}, [0, 1, 2, 3, 5, 7]),  # ties go to the lower id
    ],
)
def test_a_token_stays_only_with_what_it_is_made_of(tmp_path, size, counts, kept):
    """Special tokens always, and never one more than asked for."""
    often = np.zeros(8)
    often[list(counts)] = list(counts.values())
    assert choose_tokens(byte_pairs(tmp_path), often, size).tolist() == kept
    with pytest.raises(UserError, match="is too small: 5 special"):
        choose_tokens(tmp_path, often, 4)


@pytest.mark.parametrize("count", [1, 5, 1024, 1030])
def test_padded_rows_of_a_cut_vocabulary_are_zero(source, count):
    """Kept tokens are copies, and every row after them nothing, up to the padded size."""
    shape = open_model_folder(source).shape.resized(vocab_size=2000)
    tokens = np.arange(0, 2000)[-count:]
    chosen = Kept(np.arange(4), vocab=tokens).of_layer(shape, None)["vocab"]
    assert chosen.weights.shape[-1] == padded_size(count)
    assert (chosen.sources[0, :count] == tokens).all() and (chosen.weights[0, :count] == 1).all()
    assert (chosen.weights[0, count:] == 0).all()
    rows = combine(
        lambda sources: torch.from_numpy(sources + 1.0)[:, None], chosen, torch.empty(0, 1, dtype=torch.float64)
    )
    assert rows[:count, 0].tolist() == (tokens + 1).tolist() and (rows[count:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_entries_are_rounded_once(dtype):
    """Three averaged rows of which two steps on the way would be rounded otherwise; a copy keeps its bits."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 4, generator=generator).to(dtype)
    sources = np.arange(300).reshape(3, 100)
    read = lambda wanted: rows[torch.from_numpy(wanted)]  # noqa: E731
    found = combine(read, Selection(sources, np.full((3, 100), 1 / 3)), rows[:0])
    exact = sum(rows[100 * i : 100 * i + 100].double() for i in range(3)) / 3
    nearest = exact.to(dtype)
    off = (found.double() - exact).abs() > (nearest.double() - exact).abs() * (1 + 1e-4) + 5e-7
    assert found.dtype is dtype and not off.any()
    assert torch.equal(combine(read, Selection.of(np.arange(5)), rows[:0]), rows[:5])


# Searches and reports


def test_a_shape_of_just_the_limits_fits(shape):
    """At the limit, and at the share of it that a shape must use."""
    one = SpaceConfig(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        multiple=4,
        tensor=1,
    )
    space = make_space(shape, one, PruneOptions())
    cost = count_parameters(shape.resized(**space.target(0)))
    for limit, at_least, fits in (
        (cost, 1.0, True), (cost - 1, 0.0, False), (2 * cost, 0.5, True), (2 * cost + 1, 0.5, False), (4 * cost, 0.25, True),
    ):  # fmt: skip
        budget = Budget.of(shape, BudgetConfig(parameters=limit, at_least=at_least))
        if fits:
            assert scan(space, budget).fitting == 1
        else:
            with pytest.raises(UserError, match="nothing fits"):
                scan(space, budget)


def test_a_range_has_both_ends(shape):
    layers = {"from": 1, "to": 3, "step": 1}
    assert make_space(shape, SpaceConfig(num_layers=layers, multiple=4, tensor=1), PruneOptions()).layers.tolist() == [
        3,
        2,
        1,
    ]
    with pytest.raises(UserError, match="from 1 to the model's 4"):
        make_space(shape, SpaceConfig(num_layers={**layers, "to": 5}, multiple=4, tensor=1), PruneOptions())


def test_the_smallest_cost_is_that_of_all_shapes(shape, monkeypatch):
    """Whichever block it is in; as a space is counted, it would be the last."""
    monkeypatch.setattr("minitron_megatron.search.space._TOGETHER", 7)
    space, budget = (
        make_space(shape, TINY, PruneOptions()),
        Budget.of(shape, BudgetConfig(parameters=1e9, at_least=0.0)),
    )
    blocks = list(space.numbers())
    monkeypatch.setattr(type(space), "numbers", lambda _: reversed(blocks))
    found = scan(space, budget)
    costs = budget.cost("parameters", space.lengths(every_number(space)))
    assert found.smallest["parameters"] == costs.min() and found.within == len(costs)


@pytest.mark.parametrize("points", [399, 400, 401, 1000, 100_003])
def test_long_curves_are_means_of_stretches(points):
    values = np.arange(points, dtype=float)
    found = plots._thin(values)
    assert len(found) == min(points, 400)
    assert found[0] < points / 400 and found[-1] > points - 1 - points / 400
    np.testing.assert_allclose(found.mean(), values.mean(), rtol=5e-3)
    two = plots._thin(np.stack([values, -values], 1))
    np.testing.assert_allclose(two, np.stack([found, -found], 1))


def test_a_rope_has_the_base_that_its_config_says():
    """Beside the other options, as transformers 4 writes it, or with the rope's, as 5 does."""
    config = config_of("llama")
    config.pop("rope_theta", None)
    of_5 = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    of_4 = {**config, "rope_parameters": None, "rope_theta": 7e5}
    assert [shape_from_hf(one, "config.json").rope_theta for one in (of_5, of_4)] == [5e5, 7e5]


@pytest.mark.parametrize("context", [0, 1])
def test_a_context_rank_has_the_first_and_the_last_of_its_chunks(context):
    chosen = {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}[context]
    assert Side(Layout(world_size=2, context=2)).positions(context, 8).tolist() == chosen


def test_a_line_that_is_cut_off_is_the_last_of_a_run_that_grows(tmp_path):
    """Anywhere else it is damage, and so it is in a run that does not grow."""
    file, whole = tmp_path / "metrics.jsonl", '{"step": 1}'
    file.write_text(f'{whole}\n{{"st')
    assert read_metrics(file, growing=True) == [{"step": 1}]
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(file)
    file.write_text(f'{whole}\n{{"st\n{whole}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(file, growing=True)


@pytest.mark.parametrize("asked", [False, True])
def test_a_rank_stops_where_any_rank_was_asked_to(asked, monkeypatch):
    """What the sums over all ranks say of a step is what this rank goes by."""
    trainer = object.__new__(Trainer)
    objective = SimpleNamespace(state_dict=dict, load_state_dict=dict, needs_first_pass=False)
    guard = SimpleNamespace(takes=lambda *_: False)
    vars(trainer).update(chunks=[], objective=objective, guard=guard, scales=None, stop_asked=False, optimizer=None)
    for name, found in (
        ("batches_of_step", []),
        ("_drop_gradients", None),
        ("_measures", False),
        ("forward_backward", ({"loss": 1.0}, 5, asked)),
    ):
        monkeypatch.setattr(trainer, name, lambda *_, found=found, **__: found, raising=False)
    monkeypatch.setattr(loop, "gradient_norm", lambda *_: 1.0)
    trainer.train_step(0, SimpleNamespace(steps=2, learning_rate=lambda _: 0.1), None)
    assert trainer.stop_asked is asked


@pytest.mark.parametrize("rank_zero", [True, False])
def test_a_model_that_guesses_is_named_by_rank_zero_alone(rank_zero, monkeypatch, caplog):
    monkeypatch.setattr(guessing.collectives, "is_rank_zero", lambda: rank_zero)
    guessing.warn_of_guessing("model=m", 9.0, 300)
    assert len(caplog.records) == rank_zero


def test_a_rank_that_does_not_see_what_is_made_says_so(tmp_path, monkeypatch):
    """Rank 0 has made it and does not look."""
    monkeypatch.setattr(deciding, "SECONDS_UNTIL_SEEN", 0.0)
    monkeypatch.setattr(deciding.collectives, "is_rank_zero", lambda: False)
    deciding.wait_until_seen(tmp_path)
    with pytest.raises(UserError, match=r"does not see .*none, which rank 0"):
        deciding.wait_until_seen(tmp_path / "none")


def test_every_folder_of_a_blend_is_compared_with_every_model_that_reads_it(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(same_tokenizer, "tokenizer_files", lambda _: ["tokenizer.json"])
    monkeypatch.setattr(same_tokenizer, "_check", lambda folder, option, _: compared.append((folder.path.name, option)))
    blend = SimpleNamespace(folders=[SimpleNamespace(path=tmp_path / name) for name in "ab"])
    same_tokenizer.check_same_tokenizer(blend, {"teacher": tmp_path, "student": tmp_path, "model": None})
    assert compared == [("a", "teacher"), ("b", "teacher"), ("a", "student"), ("b", "student")]


# Who starts processes or runs in one


@pytest.mark.parametrize(
    ("check", "given"),
    [
        (check_compress, CompressConfig(output="x")),
        (check_submit, SubmitConfig(output="x", command="prune")),
        (check_candidates, DistillCandidatesConfig(output="x", found="x")),
        (check_throughput, ThroughputConfig(output="x")),
        (check_benchmark, BenchmarkConfig(measure="mistakes")),
        (check_evaluate, EvaluateConfig(output="x", hf="x", data=EvaluateDataConfig(path="x"))),
    ],
)
def test_what_runs_in_one_process_is_never_started_in_two(monkeypatch, tmp_path, check, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in one process"):
        check(given)
