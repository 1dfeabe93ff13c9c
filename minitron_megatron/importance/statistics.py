"""Streaming statistics of activations: over the sequence of each sample first, then over the samples (the batch).

[A] (arXiv 2407.14679, section 2.2) aggregates activations by mean of absolute value, L2 norm or variance, one for the
sequence and one for the batch; best was mean, then L2. Memory is O(channels), whatever the number of samples:

    a [s, b, c] ──sums over s (and over the ranks that share a sequence)──▶ x [b, c] ──sums over b──▶ score [c]
"""

from dataclasses import dataclass, field

import torch

AGGREGATIONS = ("mean", "l2", "variance")


def sequence_sums(activations: torch.Tensor, how: str) -> torch.Tensor:
    """What a rank must add up over a sequence: float32 [k, b, c] from activations [s, b, c]; k is 2 for the variance.

    These sums are additive over the parts of a sequence, so ranks that share one add them before anything is squared.
    """
    a = activations.float()
    if how == "mean":
        return a.abs().sum(0, keepdim=True)
    if how == "l2":
        return a.square().sum(0, keepdim=True)
    return torch.stack((a.sum(0), a.square().sum(0)))


def finish_sequence(sums: torch.Tensor, tokens: int, how: str) -> torch.Tensor:
    """Aggregate over `tokens` tokens: [k, b, c] to float64 [b, c]."""
    sums = sums.double()
    if how == "mean":
        return sums[0] / tokens
    if how == "l2":
        return sums[0].sqrt()
    return (sums[1] / tokens - (sums[0] / tokens).square()).clamp(min=0)


@dataclass
class BatchStatistic:
    """Sums over samples: count, Σx and Σx², float64 [c]; two of them merge by addition."""

    count: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    total: torch.Tensor | None = None
    squares: torch.Tensor | None = None

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add samples x [b, c] with weight [b] 1, or 0 for those that only fill up a round."""
        weight = weight.to(x)
        total, squares = (weight[:, None] * x).sum(0), (weight[:, None] * x.square()).sum(0)
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.count = self.count.to(weight.device) + weight.sum()

    def packed(self) -> torch.Tensor:
        """Everything that ranks add up, in one tensor: float64 [2 c + 1]."""
        return torch.cat((self.total, self.squares, self.count[None]))


def finish_batch(packed: torch.Tensor, how: str) -> torch.Tensor:
    """Aggregate over the samples: packed sums to float32 [c]."""
    channels = (packed.numel() - 1) // 2
    total, squares, count = packed[:channels], packed[channels:-1], packed[-1]
    if how == "mean":
        score = total / count
    elif how == "l2":
        score = squares.sqrt()
    else:
        score = (squares / count - (total / count).square()).clamp(min=0)
    return score.float()
