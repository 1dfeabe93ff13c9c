"""Parallel layouts, as numbers: which rank is where. Process groups are made of them in job.py.

world = data × pipeline × context × tensor          ranks of one tensor-parallel group are neighbours:
8 ranks, tensor 2, pipeline 2:   stage 0: [0 1] [2 3]     stage 1: [4 5] [6 7]      ([..] is a tensor group)
"""

import math
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.claims import number_of
from minitron_megatron.errors import UserError

# Far above any job there is.
_MOST_PROCESSES = 2**20


@dataclass(frozen=True)
class Layout:
    """How a model is spread over `world_size` processes; Megatron's names without "model_parallel_size".

    `option` is what users set it with: the beginning of names in messages.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    sequence: bool = False
    context: int = 1
    world_size: int = 1
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None
    option: str = field(default="parallel", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out. Raises UserError."""
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{self.option}.{name}={getattr(self, name)} must be at least 1")
        if self.world_size > _MOST_PROCESSES:
            raise UserError(f"{self.option}.world_size={self.world_size} must be at most {_MOST_PROCESSES}")
        part = self.tensor * self.pipeline * self.context
        if self.world_size % part:
            raise UserError(
                f"{self.option}.tensor × pipeline × context = {self.tensor} × {self.pipeline} × {self.context} = {part} does "
                f"not divide the number of processes, {self.world_size}: start a multiple of {part} "
                f"(torchrun --nproc-per-node; parallel.world_size= in a dry run), or use {' or '.join(self._neighbours())}"
            )
        if self.virtual_pipeline is not None and (self.pipeline < 2 or self.virtual_pipeline < 2):
            raise UserError(
                f"{self.option}.virtual_pipeline={self.virtual_pipeline} must be at least 2 and needs "
                f"{self.option}.pipeline of at least 2"
            )

    def _neighbours(self) -> list[str]:
        """The three nearest tensor × pipeline × context that divide the processes."""
        sizes = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
        wanted = (self.tensor, self.pipeline, self.context)
        fits = [
            (sum(abs(math.log2(size / want)) for size, want in zip(found, wanted, strict=True)), found)
            for tensor in sizes
            for pipeline in sizes
            for context in (sizes if self.context > 1 else [1])
            if self.world_size % math.prod(found := (tensor, pipeline, context)) == 0
        ]
        return [" × ".join(map(str, found)) for _, found in sorted(fits)[:3]]

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def rank(self, *, tensor: int, pipeline: int, data: int, context: int = 0) -> int:
        """The rank at a place of the layout, in Megatron's order."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def place(self, rank: int) -> tuple[int, int]:
        """(tensor, pipeline) place of a rank."""
        tensor, _, _, pipeline = self.coordinates(rank)
        return tensor, pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tensor, context, data, pipeline) place of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return tensor, context, data, pipeline

    def __str__(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        chunks = f" in {self.virtual_pipeline} chunks" if self.virtual_pipeline else ""
        return (" × ".join(named) or "one process") + chunks + (", sequence parallel" if self.sequence else "")

    @property
    def stages(self) -> int:
        """Model chunks that follow one another in the data flow: pipeline stages, times the chunks of each."""
        return self.pipeline * (self.virtual_pipeline or 1)

    @classmethod
    def from_config(cls, config: Any, world_size: int | None = None) -> "Layout":
        """From the `parallel` part of a config; `world_size` defaults to the config's, and that to torchrun's."""
        return cls(
            tensor=config.tensor,
            pipeline=config.pipeline,
            virtual_pipeline=config.virtual_pipeline,
            sequence=config.sequence,
            context=config.context,
            account_for_embedding=config.account_for_embedding,
            account_for_loss=config.account_for_loss,
            pipeline_layout=config.pipeline_layout,
            world_size=world_size or config.world_size or world_size_from_env(),
        )


def world_size_from_env() -> int:
    """Processes that torchrun (or srun with its variables) started; 1 for plain python."""
    return number_of("WORLD_SIZE", 1)
