"""A teacher in CPU memory on a GPU: the same states bit for bit, whichever stream is late, and its layers' memory given back."""

import gc

import pytest
import torch

from minitron_megatron.distill.offload import offload_layers
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout

pytest.importorskip("transformer_engine", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Layers of 13 to 31 MB.
SHAPE = ModelShape(
    family="llama", num_layers=6, hidden_size=1024, ffn_hidden_size=(4096, 1024, 4096, 2048, 4096, 2048),
    num_attention_heads=8, num_query_groups=4, head_dim=128, vocab_size=1000, max_position_embeddings=1024,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False, dtype="bfloat16",
)  # fmt: skip
SAMPLES, LENGTH, BATCHES = 2, 512, 5
# Some ten milliseconds: more than a layer, and more than its copy.
CYCLES = 20_000_000


def states(late: str | None) -> tuple[list[torch.Tensor], int, int]:
    """Final hidden states of micro-batches, bytes that the teacher then holds on the GPU, and those that it should not.

    `late` is the stream that is held up at every layer's turn, none, copies or compute; None for a teacher that stays there.
    """
    gc.collect()
    before = torch.cuda.memory_allocated()
    chunks = build_model_chunks(SHAPE, Layout(), torch.bfloat16, "te")
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in chunks[0].decoder.layers]
    offloaded = offload_layers(chunks) if late else None
    draw = torch.Generator("cuda").manual_seed(1)
    for parameter in chunks[0].parameters():
        drawn = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda", generator=draw)
        parameter.data.copy_(0.02 * drawn + (parameter.ndim == 1))
        del drawn
    streams = {"copies": offloaded.copies, "compute": torch.cuda.current_stream()} if offloaded else {}
    for layer in chunks[0].decoder.layers if late in streams else []:
        layer.register_forward_pre_hook(lambda *_: hold_up(streams[late]))
    beside, place = Teacher(chunks, pipelined=False), torch.arange(LENGTH, device="cuda").expand(SAMPLES, LENGTH)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCHES, SAMPLES, LENGTH), device="cuda", generator=draw)
    for some in tokens:
        beside.run({"tokens": some, "position_ids": place})
    found = [beside.states.popleft().cpu() for _ in range(BATCHES)]
    del tokens, some, place
    return found, torch.cuda.memory_allocated() - before, sum(layers) - 2 * max(layers)


def hold_up(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)


def test_states_are_the_same_and_the_layers_memory_is_free():
    with parallel_job(Layout(), seed=1, device="cuda"):
        states(None)  # the first pass leaves workspaces behind
        wanted, whole, _ = states(None)
        for late in ("none", "copies", "compute"):
            found, held, saved = states(late)
            assert all(state.isfinite().all() and torch.equal(state, w) for state, w in zip(found, wanted, strict=True))
            assert whole - held == pytest.approx(saved, rel=0.05)
    assert not torch.equal(wanted[0], wanted[1])
