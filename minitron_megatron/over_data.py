"""What commands that run a model over data have checked before torch is there (measuring.py is their frame)."""

from dataclasses import dataclass

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.data.folder import Data
from minitron_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class OverData:
    """A model, its layout and the data that run through it, checked; `inputs` are their digests, for the manifest."""

    layout: Layout
    folder: ModelFolder
    data: Data
    inputs: dict[str, str]
