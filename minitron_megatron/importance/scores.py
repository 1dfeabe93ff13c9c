"""Scores on disk: one vector per axis and layer in global order, float32, the same whatever layout measured them.

scores.safetensors       ffn [L, ffn] · heads [L, heads] · hidden.attention_norm, hidden.mlp_norm [L, hidden] · layers [L]
                         vocab [vocabulary] (how often each token stands in the calibration samples)
statistics.safetensors   the float64 sums behind them: per score NAME.total and NAME.squares, count, and vocab as integers;
                         those of several runs add up to the whole's (launch/merge_scores.py)
manifest.yaml            aggregations, samples, tokens, digest of the model
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.folder import read_output
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import PROBES
from minitron_megatron.models.shape import ModelShape

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Importance of every axis of one model; higher is more important."""

    tensors: Mapping[str, np.ndarray]
    model_digest: str

    @property
    def ffn(self) -> np.ndarray:
        """[layers, ffn]."""
        return self.tensors["ffn"]

    @property
    def heads(self) -> np.ndarray:
        """[layers, query heads]."""
        return self.tensors["heads"]

    @property
    def hidden(self) -> np.ndarray:
        """[hidden], summed over the norms of all layers ([A], section 2.2)."""
        return sum(t.sum(0, dtype=np.float64) for name, t in self.tensors.items() if name.startswith("hidden."))

    @property
    def layers(self) -> np.ndarray:
        """[layers], Block Influence 1 − E[cos(X_l, X_{l+1})]."""
        return self.tensors["layers"]


def save_scores(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write scores.safetensors into a folder that is being made."""
    save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}, folder / FILE)


def load_scores(path: Path | str) -> Scores:
    """Read a whole scores folder. Raises UserError."""
    path = Path(path)
    manifest = read_output(path, FILE, "importance", "scores=")
    try:
        tensors = load_file(path / FILE)
    except (SafetensorError, OSError) as error:
        pass_on_unless_damage(error)
        raise UserError(f"{path / FILE} is damaged ({error}): measure the importance again") from None
    return Scores(tensors, model_digest(manifest, path))


def model_digest(manifest: Mapping[str, Any], path: Path) -> str:
    """The digest of the model that a folder was measured on. Raises UserError."""
    inputs = manifest.get("inputs")
    if not isinstance(inputs, dict) or "model" not in inputs:
        raise UserError(f"{path}: the manifest does not name the model: measure the importance again")
    return str(inputs["model"])


def check_scores(scores: Scores, shape: ModelShape, digest: str, where: str) -> None:
    """Raise UserError unless the scores were measured on this very model."""
    if scores.model_digest != digest:
        raise UserError(f"scores={where} were measured on another model (digest differs): measure this one")
    lengths = {"ffn": max(shape.ffn_of_layers), "kv_groups": shape.num_attention_heads, "hidden": shape.hidden_size}
    expected = {probe.score: (shape.num_layers, lengths[probe.axis]) for probe in PROBES}
    expected |= {"layers": (shape.num_layers,), "vocab": (shape.vocab_size,)}
    for name, size in expected.items():
        found = scores.tensors.get(name)
        if found is None or found.shape != size or not np.isfinite(found).all():
            raise UserError(f"scores={where}: {name} is missing, misshapen or not finite: measure the importance again")
