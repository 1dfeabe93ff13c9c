"""The sums behind scores (statistics.safetensors): over the samples of a run, in global order; those of several runs add up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.errors import UserError
from minitron_megatron.importance.statistics import BatchStatistic, finish_batch
from minitron_megatron.models.axes import PROBES

STATISTICS_FILE = "statistics.safetensors"


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


def save_statistics(folder: Path, statistics: Statistics) -> None:
    """Write the sums behind the scores beside them."""
    save_tensors({name: t.contiguous() for name, t in statistics.tensors().items()}, folder / STATISTICS_FILE)


def load_statistics(path: Path | str) -> Statistics:
    """Read the sums behind a scores folder. Raises UserError."""
    file = Path(path) / STATISTICS_FILE
    try:
        return Statistics.from_tensors(load_tensors(file))
    except (SafetensorError, OSError, KeyError) as error:
        pass_on_unless_damage(error)
        raise UserError(f"{file} is missing or damaged ({error}): measure the importance again") from None
