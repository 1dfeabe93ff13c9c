"""CUDA graphs, with stand-ins for the GPU: in which order layers are captured, and when a frozen stage runs as a graph."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core import num_microbatches_calculator

from minitron_megatron.models import graphs
from minitron_megatron.models.graphs import FrozenStage, capture_layers, graph_safe_wrapping, peak_memory
from minitron_megatron.parallel.layout import Layout


@pytest.mark.parametrize(
    ("before", "wanted", "peak"), [(0, False, 100), (0, True, 124), (200, True, 200), (200, False, 100)]
)
def test_what_graphs_work_in_counts_though_it_is_called_free(monkeypatch, before, wanted, peak):
    """Of their own pools alone; and what was taken until they were captured."""
    sizes = {(0, 0): (50, 10), (1, 0): (30, 10), (0, 2): (7, 3)}
    segments = [
        {"segment_pool_id": list(pool), "total_size": total, "allocated_size": used}
        for pool, (total, used) in sizes.items()
    ]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(graphs, "_UNTIL_CAPTURED", [before])
    assert peak_memory(wanted) == peak


@pytest.mark.parametrize("implementation", ["none", "transformer_engine"])
def test_a_model_is_wrapped_on_a_stream_that_waits_and_is_waited_for(monkeypatch, implementation):
    said = []

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield
        said.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(name="own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(name="first"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", said.append)
    with graph_safe_wrapping(SimpleNamespace(cuda_graph_impl=implementation)):
        said.append("wrapped")
    around = [False, "own waits for first", "on own", "wrapped", "off", "first waits for own"]
    assert said == (["wrapped"] if implementation == "none" else around)


@pytest.fixture
def said(monkeypatch):
    """What capturing does, in order; `create_cudagraphs` fails where the list begins with "fails"."""
    seen = []

    class Helper:
        def __init__(self, *given):
            seen.append(("helper", *given))

        def create_cudagraphs(self):
            seen.append("create")
            if seen[0] == "fails":
                raise RuntimeError

        def delete_cuda_graphs(self):
            seen.append("delete")

        def cuda_graph_set_manual_hooks(self):
            seen.append("hooks")

    monkeypatch.setattr(graphs, "_helper", lambda: Helper)
    monkeypatch.setattr(graphs, "before_groups_end", lambda release: seen.append(("at the end", release.__name__)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    for name in ("init", "destroy"):
        whole = f"{name}_num_microbatches_calculator"
        monkeypatch.setattr(num_microbatches_calculator, whole, lambda *given, n=name: seen.append((n, *given)))
    monkeypatch.setattr(graphs, "_UNTIL_CAPTURED", [0])
    return seen


class Wrapper:
    """A data-parallel wrapper."""

    def __init__(self, said, gathers):
        self.config, self.ddp_config = "config", SimpleNamespace(overlap_param_gather=gathers)
        self.train = lambda: said.append("train")
        self.disable_forward_pre_hook = lambda *, param_sync: said.append(("disable", param_sync))
        self.enable_forward_pre_hook = lambda: said.append("enable")


SIZES = {"micro_batches": 3, "micro_batch_size": 5, "sequence_length": 64}


@pytest.mark.parametrize("gathers", [False, True])
def test_layers_are_captured_in_training_mode_while_nothing_is_gathered(said, gathers):
    chunk = Wrapper(said, gathers)
    capture_layers([chunk], "optimizer", Layout(world_size=2), **SIZES)
    assert said == [
        "train",
        *([("disable", False)] * gathers),
        ("init", 0, None, 3 * 5 * 2, 5, 2),
        ("helper", [chunk], "config", 64, 5, ["optimizer"]),
        "create",
        "reset",
        ("at the end", "delete_cuda_graphs"),
        ("destroy",),
        *(["enable", "hooks"] * gathers),
    ]
    assert graphs._UNTIL_CAPTURED == [77]


def test_the_calculator_goes_where_capturing_fails_too(said):
    said.append("fails")
    with pytest.raises(RuntimeError):
        capture_layers([Wrapper(said, False)], None, Layout(), **SIZES)
    assert said[-1] == ("destroy",)


def test_no_mask_and_no_gradient_is_copied_for_nothing(monkeypatch):
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    given = [{"attention_mask": 1, "x": 2}, {"x": 3}]
    monkeypatch.setattr(
        TECudaGraphHelper, "_get_cuda_graph_input_data", lambda self: ((1,), {"sample_kwargs": given, "other": 4})
    )
    kind = graphs._helper()
    arguments, options = object.__new__(kind)._get_cuda_graph_input_data()
    assert arguments == (1,)
    assert options == {"sample_kwargs": [{"x": 2}, {"x": 3}], "other": 4, "clone_param_grads_on_return": False}


class Block(torch.nn.Module):
    """Layers that add the rotary embedding to what they are given, or to what the stage before has sent."""

    def __init__(self, first):
        super().__init__()
        self.pre_process, self.input_tensor, self.ran, self.told = first, None, 0, 0

    def set_input_tensor(self, states):
        self.input_tensor, self.told = states, self.told + 1

    def forward(self, states, mask, *, rotary_pos_emb):
        self.ran += 1
        return (states if self.pre_process else self.input_tensor) + rotary_pos_emb


@pytest.fixture
def captured(monkeypatch):
    """Graphs that were made: each as the layers, what they were captured with, and whether they are in evaluation mode."""
    made = []

    def make_graphed_callables(layers, given, sample_kwargs):
        made.append((given[0].clone(), sample_kwargs["rotary_pos_emb"].clone(), layers.training))
        kept = torch.empty_like(given[0])

        def graph(states, rotary_pos_emb):
            return kept.copy_(layers(states, rotary_pos_emb))

        graph.reset = lambda: None
        return graph

    whole = SimpleNamespace(make_graphed_callables=make_graphed_callables)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=whole))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", whole)
    made_to_end = []
    monkeypatch.setattr(graphs, "before_groups_end", made_to_end.append)
    return made, made_to_end


@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_stage_is_captured_once_and_used_for_its_shape_alone(captured, first):
    """What it gives stays as it is when the next micro-batch runs."""
    made, to_end = captured
    block = Block(first)
    stage = FrozenStage(SimpleNamespace(decoder=block))
    rotary = torch.ones(2, 1, 3)

    def run(states, mask=None):
        if not first:
            block.input_tensor = states
        return block.forward(states if first else None, mask, rotary_pos_emb=rotary)

    assert block.forward is stage
    masked = run(torch.full((2, 1, 3), 5.0), mask="mask")
    assert not made and (masked == 6).all()
    one, other = (run(torch.full((2, 1, 3), value)) for value in (1.0, 2.0))
    assert (one == 2).all() and (other == 3).all() and len(made) == len(to_end) == 1
    states, emb, training = made[0]
    assert (states == 1).all() and (emb == 1).all() and not training and to_end == [stage.graph.reset]
    # Of a stage that is not the first, what the graph was given stands in the place of what was sent.
    assert block.told == (0 if first else 2)
    graph, stage.graph = stage.graph, None
    stage.graph = lambda *_, **__: pytest.fail("another shape runs without the graph")
    assert (run(torch.full((1, 1, 3), 4.0)) == 5).all()
    stage.graph = graph
    before = block.ran
    run(torch.full((2, 1, 3), 1.0), mask="mask")
    assert block.ran == before + 1 and len(made) == 1
