"""Scores on disk: one vector per axis and layer in global order, float32, the same whatever layout measured them.

scores.safetensors       ffn [L, ffn] · heads [L, heads] · hidden.attention_norm, hidden.mlp_norm [L, hidden] · layers [L]
                         vocab [vocabulary] (how often each token stands in the calibration samples)
statistics.safetensors   the float64 sums behind them: per score NAME.total and NAME.squares, count, and vocab as integers;
                         those of several runs add up to the whole's (launch/merge_scores.py)
manifest.yaml            aggregations, samples, tokens, digest of the model
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.errors import UserError
from minitron_megatron.importance.statistics import BatchStatistic, finish_batch
from minitron_megatron.models.axes import PROBES
from minitron_megatron.models.shape import ModelShape

FILE, STATISTICS_FILE = "scores.safetensors", "statistics.safetensors"


@dataclass
class Statistics:
    """Sums over samples of every score, in global order: (Σx, Σx²), float64 [layers, channels] each; they add up."""

    sums: dict[str, tuple[torch.Tensor, torch.Tensor]]
    count: torch.Tensor
    vocab: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both runs' samples."""
        sums = {n: (t + other.sums[n][0], q + other.sums[n][1]) for n, (t, q) in self.sums.items()}
        return Statistics(sums, self.count + other.count, self.vocab + other.vocab)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they stand in statistics.safetensors."""
        named = {f"{name}.{part}": t for name, pair in self.sums.items() for part, t in zip(_PARTS, pair, strict=True)}
        return {**named, "count": self.count, "vocab": self.vocab}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Statistics":
        """The reverse of `tensors`. Raises KeyError."""
        names = [key.removesuffix(f".{_PARTS[0]}") for key in tensors if key.endswith(f".{_PARTS[0]}")]
        sums = {name: (tensors[f"{name}.{_PARTS[0]}"], tensors[f"{name}.{_PARTS[1]}"]) for name in names}
        return cls(sums, tensors["count"], tensors["vocab"])


_PARTS = ("total", "squares")


def finish_scores(statistics: Statistics, how: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores out of sums, float32; `how` is the aggregation as manifests have it (importance.measure.aggregation)."""
    scores = {}
    for name, (total, squares) in statistics.sums.items():
        # Block Influence is an expectation over the samples, whatever the aggregation of the other axes.
        batch = "mean" if name == "layers" else how["batch_aggregation"]
        score = finish_batch(BatchStatistic(total, squares, statistics.count), batch)
        if how["heads"] == "per_channel" and any(probe.score == name and probe.heads for probe in PROBES):
            score = score.unflatten(-1, (-1, how["head_dim"])).norm(dim=-1)
        scores[name] = score.float().numpy()
    return {**scores, "layers": scores["layers"][:, 0], "vocab": statistics.vocab.float().numpy()}


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


def save_statistics(folder: Path, statistics: Statistics) -> None:
    """Write the sums behind the scores beside them."""
    save_tensors({name: t.contiguous() for name, t in statistics.tensors().items()}, folder / STATISTICS_FILE)


def load_scores(path: Path | str) -> Scores:
    """Read a whole scores folder. Raises UserError."""
    path = Path(path)
    manifest = read_manifest(path)
    if not (path / FILE).is_file():
        raise UserError(f"scores={path} has no {FILE}: give the output of launch/importance.py")
    try:
        tensors = load_file(path / FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / FILE} is damaged ({error}): measure the importance again") from None
    return Scores(tensors, model_digest(manifest, path))


def load_statistics(path: Path | str) -> Statistics:
    """Read the sums behind a scores folder. Raises UserError."""
    file = Path(path) / STATISTICS_FILE
    try:
        return Statistics.from_tensors(load_tensors(file))
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{file} is missing or damaged ({error}): measure the importance again") from None


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
