"""Against a peer: NVIDIA ModelOpt's `mcore_minitron` keeps the same channels and gives the same weights as ours does.

Ours runs with ModelOpt's convention for heads (importance.heads=per_channel) on the same calibration samples. ModelOpt orders
channels by descending score; ours stay in source order, so its weights are put back into that order before they are compared.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import load_weights
from minitron_megatron.config import ImportanceConfig, ImportanceOptions, PruneConfig, TargetConfig
from minitron_megatron.data.datasets import training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.models.axes import slots
from minitron_megatron.models.build import transformer_config
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.prune import prune_model
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

# The peer needs Transformer Engine, whose float32 products are TF32 ones unless this is set before the first of them.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
TARGET = {"hidden_size": 192, "ffn_hidden_size": 384, "num_attention_heads": 8}
GROUPS, HEAD_DIM, SAMPLES, LENGTH = 4, 16, 16, 32


def spread_model():
    """A random model whose scores lie well apart."""
    model, generator = hf_model(**SIZES), torch.Generator().manual_seed(5)

    def ramp(length: int) -> torch.Tensor:
        return torch.logspace(0, 1, length)[torch.randperm(length, generator=generator)]

    channels = ramp(SIZES["hidden_size"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(ramp(SIZES["intermediate_size"])[:, None])
            layer.input_layernorm.weight.mul_(channels)
            layer.post_attention_layernorm.weight.mul_(channels)
    return model


def peer_pruned(path, samples) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's weights before and after ModelOpt's pruning, by Megatron's Transformer Engine names, on the CPU."""
    import modelopt.torch.prune as mtp
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    folder, layout = open_model_folder(path), Layout()
    shape = folder.shape
    # The peer takes the layers of Megatron's own specification apart, whose activation is Megatron's.
    config = replace(transformer_config(shape, layout, torch.float32, "te"), use_te_activation_func=False)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    ).cuda()
    load_weights([model], folder.weights)

    def weights() -> dict[str, torch.Tensor]:
        return {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}

    def forward_loop(model: torch.nn.Module) -> None:
        for sample in samples:
            model(sample["tokens"][None].cuda(), sample["position_ids"][None].cuda(), None)

    before = weights()
    mode = get_mcore_minitron_config(hidden_size_divisor=64, ffn_hidden_size_divisor=64, num_layers_divisor=1)
    model, _ = mtp.prune(
        model,
        mode=[("mcore_minitron", mode)],
        constraints={"export_config": dict(TARGET)},
        dummy_input=None,
        config={"forward_loop": forward_loop},
    )
    return before, weights()


def places(kept: torch.Tensor, whole: torch.Tensor) -> np.ndarray:
    """Which columns of `whole` the columns of `kept` are, by their exact values."""
    where = {column.numpy().tobytes(): i for i, column in enumerate(whole.t().contiguous())}
    return np.array([where[column.numpy().tobytes()] for column in kept.t().contiguous()])


def in_source_order(name: str, tensor: torch.Tensor, hidden, neurons, heads) -> torch.Tensor:
    """A peer's tensor with its hidden channels, neurons and heads (inside their group) put into ascending source order."""
    by_hidden, by_neuron = np.argsort(hidden), np.argsort(neurons)
    within = np.argsort(heads.reshape(GROUPS, -1), axis=1)
    per_group = within.shape[1]
    if name == "qkv":
        parts = tensor.view(GROUPS, per_group + 2, HEAD_DIM, -1)
        order = np.concatenate([within, np.tile([per_group, per_group + 1], (GROUPS, 1))], axis=1)
        return torch.stack([part[o] for part, o in zip(parts, order, strict=True)]).flatten(0, 2)[:, by_hidden]
    if name == "attention_output":
        parts = tensor.view(-1, GROUPS, per_group, HEAD_DIM)[by_hidden]
        return torch.stack([parts[:, g, o] for g, o in enumerate(within)], dim=1).flatten(1)
    if name == "fc1":
        return tensor.view(2, len(neurons), -1)[:, by_neuron].flatten(0, 1)[:, by_hidden]
    if name == "fc2":
        return tensor[by_hidden][:, by_neuron]
    return tensor[..., by_hidden]


def test_modelopt_keeps_the_same(tmp_path):
    pytest.importorskip("modelopt")
    pytest.importorskip("transformer_engine")
    path = imported(spread_model(), tmp_path)
    data = data_folder(tmp_path, path)
    source = open_model_folder(path).shape
    measure_importance(
        ImportanceConfig(
            model=model_option(path),
            data=data_option(data, LENGTH),
            samples=SAMPLES,
            importance=ImportanceOptions(heads="per_channel"),
            output=str(tmp_path / "scores"),
        )
    )
    prune_model(
        PruneConfig(
            model=model_option(path),
            scores=str(tmp_path / "scores"),
            target=TargetConfig(**TARGET),
            output=str(tmp_path / "ours"),
        )
    )
    with parallel_job(Layout(), seed=1, device="cuda"):
        calibration = training_samples(
            open_data(str(data), "train", source, LENGTH), "train", sequence_length=LENGTH, seed=1234, count=SAMPLES
        )
        before, after = peer_pruned(path, [calibration[i] for i in range(SAMPLES)])

    ours = open_model_folder(tmp_path / "ours")
    reader, embedding = WeightReader(ours.weights), "embedding.word_embeddings.weight"
    hidden = places(after[embedding], before[embedding])
    compared = set()
    for slot in slots(ours.shape):
        layer = f"decoder.layers.{slot.layer or 0}."
        fc2, proj = layer + "mlp.linear_fc2.weight", layer + "self_attention.linear_proj.weight"
        neurons = places(after[fc2], before[fc2][hidden])
        heads = places(after[proj], before[proj][hidden])[::HEAD_DIM] // HEAD_DIM
        peer = after[(slot.row.te_path or slot.row.path).format(layer=slot.layer)]
        wanted = in_source_order(slot.row.name, peer, hidden, neurons, heads)
        assert torch.equal(reader.read_slot(slot, ours.shape), wanted), (slot.row.name, slot.layer)
        compared.add((slot.row.name, slot.layer))
    assert len(compared) == 4 * 6 + 3
