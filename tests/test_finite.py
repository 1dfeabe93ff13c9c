"""NaN and infinity in weights are noticed wherever weights are copied, and named by tensor and row."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints import weights
from minitron_megatron.checkpoints.finite import first_odd, has_odd
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.nemo import export_nemo
from minitron_megatron.checkpoints.reading import as_bits
from minitron_megatron.checkpoints.weights import verify_digest
from minitron_megatron.config import (
    ExportHfConfig,
    ExportNemoConfig,
    ImportHfConfig,
    PruneConfig,
    TargetConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.train.run import publish
from tests.test_prune import random_scores, write_scores
from tests.tiny import hf_model, model_option, save_hf


def test_every_bfloat16_is_told_from_nan_and_infinity():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    odd = ~torch.isfinite(numbers)
    assert int(odd.sum()) == 2 * 128
    found = torch.tensor([has_odd(as_bits(numbers[i : i + 1])) for i in range(2**16)])
    assert torch.equal(found, odd)
    assert not has_odd(as_bits(numbers[~odd].contiguous())) and not has_odd(as_bits(numbers[:0]))
    assert first_odd(as_bits(numbers)) == int(odd.nonzero()[0])


@pytest.mark.parametrize("exponent", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_by_its_exponent(exponent, dtype):
    """Of every sign and some fractions, among numbers that are finite."""
    for sign in (0, 1):
        for fraction in (0, 1 << 16, 0x7F << 16):
            number = np.array([sign << 31 | exponent << 23 | fraction], np.uint32).view(np.float32)
            tensor = torch.cat([torch.ones(5), torch.from_numpy(number), -torch.ones(5)]).to(dtype)
            assert has_odd(as_bits(tensor)) is not bool(torch.isfinite(tensor).all()), (sign, fraction)


BAD = [float("nan"), float("inf"), -float("inf")]
PLACES = [("model.layers.1.self_attn.k_proj.weight", 13), ("model.embed_tokens.weight", 299), ("model.norm.weight", 5)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return save_hf(hf_model(num_hidden_layers=2), tmp_path_factory.mktemp("hf") / "hf")


def damaged(hf, target, name, row, value, dtype=torch.float32):
    target.mkdir()
    for file in hf.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(hf / "model.safetensors").items()}
    tensors[name][row] = value
    save_file(tensors, target / "model.safetensors")
    if dtype is torch.bfloat16:
        config = (target / "config.json").read_text().replace('"float32"', '"bfloat16"')
        (target / "config.json").write_text(config)
    return target


@pytest.mark.parametrize("block", [64, 2**18])
@pytest.mark.parametrize(("place", "value"), zip(PLACES, BAD, strict=True))
def test_an_import_names_tensor_and_row(hf, tmp_path, monkeypatch, place, value, block):
    monkeypatch.setattr(weights, "BLOCK_OF_CACHE", block)
    (name, row), dtype = place, torch.bfloat16 if block == 64 else torch.float32
    source = damaged(hf, tmp_path / "bad", name, row, value, dtype)
    with pytest.raises(UserError, match=rf"import: {name}, row {row}, has a NaN or an infinity") as refused:
        import_hf(ImportHfConfig(hf=str(source), output=str(tmp_path / "model")))
    assert "\n" not in str(refused.value) and not (tmp_path / "model").exists()


@pytest.fixture
def spoiled(hf, tmp_path, monkeypatch):
    """A model folder with a NaN, as an older version would have let pass."""
    with monkeypatch.context() as older:
        older.setattr(weights, "has_odd", lambda numbers: False)
        source = damaged(hf, tmp_path / "bad", "model.layers.0.mlp.up_proj.weight", 7, float("nan"))
        import_hf(ImportHfConfig(hf=str(source), output=str(tmp_path / "model")))
    return tmp_path / "model"


def test_whatever_copies_weights_notices(spoiled, tmp_path):
    """Cuts, exports of every kind, publishing, and reading all of it by verify=true."""
    model, output = model_option(spoiled), str(tmp_path / "out")
    scores = write_scores(random_scores(spoiled), tmp_path / "scores")
    folder = open_model_folder(spoiled)
    says = r"model\.layers\.0\.mlp\.up_proj\.weight.* has a NaN or an infinity"
    for copy in (
        lambda: prune_model(
            PruneConfig(model=model, scores=str(scores), target=TargetConfig(hidden_size=24), output=output)
        ),
        lambda: export_hf(ExportHfConfig(model=model, output=output)),
        lambda: export_nemo(ExportNemoConfig(model=model, output=output)),
        lambda: publish(tmp_path / "published", folder.shape, folder.weights),
        lambda: verify_digest(folder),
    ):
        with pytest.raises(UserError, match=says) as refused:
            copy()
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
