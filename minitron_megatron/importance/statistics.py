"""Streaming statistics of activations: over the sequence of each sample first, then over the samples (the batch).

[A] (arXiv 2407.14679, section 2.2) aggregates activations by mean of absolute value, L2 norm or variance, one for the
sequence and one for the batch; best was mean, then L2. Memory is O(channels), whatever the number of samples:

    a [s, b, c] ──sums over s (and over the ranks that share a sequence)──▶ x [b, c] ──sums over b──▶ score [c]

Both kinds of sums are additive: over ranks that share a sequence, over data-parallel ranks, and over runs on parts of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

AGGREGATIONS = ("mean", "l2", "variance")
# Elements that a reduction on a CPU takes at once: they stay in its cache between the steps of the reduction.
_BLOCK = 2**18


def partial_sums(activations: torch.Tensor, how: str) -> torch.Tensor:
    """What a rank adds up over its part of a sequence: float32 [k, parts, b, c] from activations [s, b, c].

    k is 2 for the variance (Σx and Σx²), else 1. Sums over `parts`, over the ranks that share a sequence, and only then
    anything else: they are additive before anything is squared.
    """
    if activations.is_cuda:
        out = _buffer(activations, how, activations.shape[2])
        _kernels().column_sums(activations, how, out)
        return out
    kinds = {"mean": [1], "l2": [2], "variance": [0, 2]}[how]
    return torch.stack([_power_sum(activations, power) for power in kinds])[:, None]


def partial_head_sums(activations: torch.Tensor, head_dim: int, how: str) -> torch.Tensor:
    """The same for the L2 norm of every head of every token: activations [s, b, heads · head_dim], c is heads."""
    if activations.is_cuda:
        out = _buffer(activations, how, activations.shape[2] // head_dim)
        _kernels().head_sums(activations, head_dim, how, out)
        return out
    return partial_sums(activations.unflatten(-1, (-1, head_dim)).float().norm(dim=-1), how)


def _kernels() -> Any:
    """Imported where there is a GPU: Triton is not needed elsewhere."""
    from minitron_megatron.importance import kernels

    return kernels


def _buffer(like: torch.Tensor, how: str, width: int) -> torch.Tensor:
    kinds = 2 if how == "variance" else 1
    return torch.empty(kinds, _kernels().SPLITS, like.shape[1], width, dtype=torch.float32, device=like.device)


def _power_sum(a: torch.Tensor, power: int) -> torch.Tensor:
    """Σ a, Σ |a| or Σ a² (power 0, 1, 2) over the sequence: float32 [b, c]; one read of the activations, no copy of all."""
    total = torch.zeros(a.shape[1:], dtype=torch.float32)
    for block, memory in _blocks(a):
        if power:
            block = (torch.abs if power == 1 else torch.square)(block, out=memory)
        total += block.sum(0)
    return total


def cosine_sums(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Σ over the sequence of cos(before, after): float32 [b] from two [s, b, hidden]; a zero vector counts as 0."""
    if before.is_cuda:
        return _kernels().cosines(before, after).sum(0)
    total = torch.zeros(before.shape[1], dtype=torch.float32)
    for (x, _), (y, _) in zip(_blocks(before), _blocks(after), strict=True):
        lengths = x.norm(dim=-1).clamp_min(1e-8) * y.norm(dim=-1).clamp_min(1e-8)
        total += (torch.linalg.vecdot(x, y) / lengths).sum(0)
    return total


def _blocks(a: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Runs of tokens of a [s, …], in float32, with memory of their size for what is made of them: small enough for a cache."""
    rows = max(1, _BLOCK // max(1, a[0].numel()))
    memory = torch.empty(min(rows, len(a)), *a.shape[1:], dtype=torch.float32)
    for part in a.split(rows):
        space = memory[: len(part)]
        yield part if part.dtype is torch.float32 else space.copy_(part), space


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
    """Sums over samples: Σx and Σx², float64 [c], and how many samples; two of them merge by addition."""

    total: torch.Tensor
    squares: torch.Tensor
    count: torch.Tensor

    @classmethod
    def zeros(cls, like: torch.Tensor) -> "BatchStatistic":
        """Nothing seen yet; `like` is a sample's x [c]."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        return cls(zeros, zeros.clone(), zeros.new_zeros(()))

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add samples x [b, c] with weight [b] 1, or 0 for those that only fill up a round."""
        weight = weight.to(x)
        self.total += weight @ x
        self.squares += weight @ x.square()
        self.count += weight.sum()

    def packed(self) -> torch.Tensor:
        """Everything that ranks add up, in one tensor: float64 [2 c + 1]."""
        return torch.cat((self.total, self.squares, self.count[None]))

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> "BatchStatistic":
        """The reverse of `packed`."""
        channels = (packed.numel() - 1) // 2
        return cls(packed[:channels], packed[channels:-1], packed[-1])


def finish_batch(statistic: BatchStatistic, how: str) -> torch.Tensor:
    """Aggregate over the samples: float64 of the shape of `total`; `count` may be anything that divides it."""
    if how == "mean":
        return statistic.total / statistic.count
    if how == "l2":
        return statistic.squares.sqrt()
    mean = statistic.total / statistic.count
    return (statistic.squares / statistic.count - mean.square()).clamp(min=0)
