"""Blocks of consecutive layers that a model can be run without, as numbers."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Consecutive layers `start` … `end - 1`, numbered from 0."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first layer after it."""
        return self.start + self.length


def contiguous_blocks(num_layers: int, lengths: Iterable[int]) -> list[Block]:
    """Every block of these lengths, in the order of their ends."""
    found = [Block(start, n) for n in sorted(set(lengths)) for start in range(num_layers - n + 1)]
    return sorted(found, key=lambda block: (block.end, block.start))


def layer_passes(num_layers: int, blocks: Iterable[Block]) -> int:
    """Layers that run for one sample, the whole model's included."""
    return num_layers + sum(num_layers - block.end for block in blocks)
