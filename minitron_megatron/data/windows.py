"""The windows that a split is measured in, counted without torch; datasets.py makes samples of them."""

import logging
import math
from collections.abc import Sequence

import numpy as np

from minitron_megatron.data.folder import Data
from minitron_megatron.data.indexed import open_split

log = logging.getLogger(__name__)
# The option of trainings that says how many windows are validated on.
VALIDATED = "trainer.validation_samples"


def taken(option: str, asked: int | None, there: int, split: str) -> int:
    """How many of the windows of a split are taken: as many as are asked for, or all; that there are fewer is said."""
    if asked is not None and asked > there:
        log.info("%s=%d, and the %s split has %d windows: all of them are taken", option, asked, split, there)
    return there if asked is None else min(asked, there)


class WindowPlan:
    """Which windows of a split there are: every token once, in consecutive windows, of which the last is padded.

    Of a blend: whole windows of each folder in the proportion of the weights, until one has no more. To measure a folder of a
    blend by itself, or every token of it, name it alone.
    """

    def __init__(self, data: Data, split: str, sequence_length: int) -> None:
        self.length, self.masks, self.end_of_document = sequence_length, data.masks, data.end_of_document
        self.parts = [open_split(folder.path / split, f"data.path={folder.path}").ids for folder in data.folders]
        whole = [(len(part) - 1) // sequence_length for part in self.parts]
        # How many windows have no padding.
        self.whole = whole[0]
        self.order: tuple[np.ndarray, np.ndarray] | None = None
        if len(self.parts) > 1:
            part, window = _blend_order(data.weights, sum(whole))
            exhausted = np.flatnonzero(window >= np.array(whole)[part])
            self.whole = int(exhausted[0]) if len(exhausted) else len(part)
            self.order = part, window

    def __len__(self) -> int:
        return self.whole if self.order else math.ceil((len(self.parts[0]) - 1) / self.length)


def _blend_order(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `size` samples of a blend its folder and its number in that folder, as Megatron mixes them."""
    from megatron.core.datasets import helpers

    part, number = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(part, number, np.array(weights), len(weights), size, False)
    return part, number
