"""CUDA graphs and overlapped transfers as far as a CPU can tell: what is refused before a GPU is asked."""

from dataclasses import replace

import pytest
import torch

from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.graphs import graph_fields
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import check_overlap
from minitron_megatron.train.distill import distill
from minitron_megatron.train.optimizer import training_fields
from minitron_megatron.train.overlap import check_overlap_device
from tests.test_teachers import options, sources  # noqa: F401 (fixture)

SEQUENCE = Layout(tensor=2, sequence=True, world_size=2)


def test_fields_are_megatrons():
    from megatron.core.transformer import TransformerConfig

    given = training_fields(TrainerConfig(cuda_graphs=True, tp_comm_overlap=True))
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        bf16=True,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        **given,
    )
    assert config.cuda_graph_impl == "transformer_engine" and not config.cuda_graph_modules and config.tp_comm_overlap
    assert training_fields(TrainerConfig()) == graph_fields(False) == {}


@pytest.mark.parametrize(
    ("trainer", "loss", "length", "says"),
    [
        ({"recompute": "full"}, {}, 128, "trainer.recompute=full computes whole layers again"),
        ({}, {"intermediate": 0.5}, 128, "distill.intermediate"),
        ({}, {"teacher_offload": True}, 128, "distill.teacher_offload"),
        ({}, {}, 64, "data.sequence_length=64 is no multiple of 128"),
        ({}, {}, 128, "graphs need Transformer Engine's layers in bf16 on a GPU"),
    ],
)
def test_what_graphs_cannot_do_is_refused_where_they_are_asked_for(sources, tmp_path, trainer, loss, length, says):  # noqa: F811
    cfg = options(sources, tmp_path / "run", **loss)
    cfg = replace(cfg, data=replace(cfg.data, sequence_length=length, max_epochs=100.0))
    with pytest.raises(UserError, match=r"^trainer\.cuda_graphs=true, but ") as error:
        distill(replace(cfg, trainer=replace(cfg.trainer, cuda_graphs=True, **trainer)))
    assert says in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trainer", "layout", "says"),
    [
        ({}, Layout(tensor=2, world_size=2), "is for sequence parallelism"),
        ({}, Layout(), "is for sequence parallelism"),
        ({"cuda_graphs": True}, SEQUENCE, "does not go with trainer.cuda_graphs"),
        ({"fp8": "blockwise"}, SEQUENCE, "does not go with trainer.fp8=blockwise"),
    ],
)
def test_where_transfers_cannot_overlap(trainer, layout, says):
    with pytest.raises(UserError) as error:
        check_overlap(TrainerConfig(tp_comm_overlap=True, **trainer), layout)
    assert says in str(error.value)


def test_overlapped_transfers_need_transformer_engine_and_an_environment(monkeypatch):
    check_overlap(TrainerConfig(tp_comm_overlap=True), SEQUENCE)
    check_overlap_device(False, "local", torch.float32)
    with pytest.raises(UserError, match=r"tp_comm_overlap=true needs Transformer Engine"):
        check_overlap_device(True, "local", torch.bfloat16)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=1"):
        check_overlap_device(True, "te", torch.bfloat16)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    check_overlap_device(True, "te", torch.bfloat16)
