"""Options that are `auto` by default: what each becomes, why, and what an explicit `true` is refused for.

    true    on; an obstacle that cannot be overcome is an error
    false   off
    auto    on where there is no obstacle; else off, and the first obstacle is the reason, said in one line

All reasons are here. An option is `auto` only where on and off give the same result, to rounding. Nothing heavy is imported: what
the options alone can tell is known at once.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minitron_megatron.config import AUTO, DistillConfig, TrainingConfig
from minitron_megatron.errors import UserError

if TYPE_CHECKING:
    from minitron_megatron.parallel.layout import Layout

GRAPHS = "trainer.cuda_graphs"
REDUCE, GATHER = "ddp.overlap_grad_reduce", "ddp.overlap_param_gather"
# What the keys that a fused attention kernel sees at once must be a multiple of, to be captured.
MULTIPLE_OF_KEYS = 128
BYTES_OF_A_WORKER, MOST_WORKERS = 8_000_000, 32


@dataclass(frozen=True)
class Obstacle:
    """What speaks against an option. `remedy` is what to do where it was asked for; without one it can be had for the asking."""

    reason: str
    remedy: str | None = None


@dataclass(frozen=True)
class Choice:
    """What an option that was auto has become, and why: a switch, or a word."""

    option: str
    value: bool | str
    reason: str

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else "on" if self.value else "off"
        return f"{self.option}=auto is {value}: {self.reason}"


@dataclass(frozen=True)
class Built:
    """How a model of a run is built: the option that names it, its engine (te or local), and whether in bfloat16."""

    name: str
    engine: str
    bf16: bool


def is_on(value: Any) -> bool:
    """Whether a switch is on. One that nobody has decided yet is off."""
    return value != AUTO and bool(value)


def check_switch(option: str, given: Any, obstacles: Iterable[Obstacle]) -> None:
    """Raise UserError where an option was asked for and cannot be had."""
    for obstacle in obstacles if is_on(given) else ():
        if obstacle.remedy:
            raise UserError(f"{option}=true, but {obstacle.reason}: {obstacle.remedy}")


def choose(option: str, given: Any, obstacles: Iterable[Obstacle], why: str) -> Choice:
    """What an option becomes; `why` is the reason for on. Raises UserError as `check_switch`."""
    obstacles = list(obstacles)
    check_switch(option, given, obstacles)
    if given != AUTO:
        return Choice(option, bool(given), "asked for")
    first = next(iter(obstacles), None)
    return Choice(option, first is None, why if first is None else first.reason)


WHY = {
    GRAPHS: "a layer's kernels are launched as one",
    REDUCE: "gradients are reduced while the backward pass runs",
    GATHER: "weights are gathered while the next forward pass runs",
}


def graph_obstacles(cfg: TrainingConfig, layout: "Layout") -> Iterator[Obstacle]:
    """What the options and the layout say against CUDA graphs."""
    trainer, length = cfg.trainer, cfg.data.sequence_length
    if trainer.recompute == "full":
        yield Obstacle(
            "trainer.recompute=full computes whole layers again, which graphs cannot",
            "use trainer.recompute=selective or none",
        )
    # cuDNN up to 9.15: without it attention would be unfused in graphs, and with context parallelism not at all.
    multiple = MULTIPLE_OF_KEYS * (2 * layout.context if layout.context > 1 else 1)
    if length % multiple:
        yield Obstacle(
            f"data.sequence_length={length} is no multiple of {multiple}, and fused attention over others cannot be captured",
            f"use a multiple of {multiple}",
        )
    for name in ("intermediate", "teacher_offload") if isinstance(cfg, DistillConfig) else ():
        if getattr(cfg.distill, name):
            yield Obstacle(
                f"distill.{name} has work to do between the teacher's layers, which graphs replay as one",
                "leave one of them out",
            )
    if trainer.tp_comm_overlap:
        yield Obstacle("trainer.tp_comm_overlap=true does not go with graphs", "use one of them")
    if layout.pipeline > 1:
        yield Obstacle(
            f"with {layout.option}.pipeline={layout.pipeline} every micro-batch of a step has graphs of its own, whose memory "
            f"is not counted; {GRAPHS}=true makes them"
        )


def graph_obstacles_of_machine(
    models: Sequence[Built], environment: Mapping[str, str] = os.environ
) -> Iterator[Obstacle]:
    """What the models as they are built here, and the environment, say against CUDA graphs."""
    for model in models:
        if model.engine != "te" or not model.bf16:
            has = "Megatron's local layers" if model.engine != "te" else "float32"
            yield Obstacle(
                f"graphs need Transformer Engine's layers in bf16 on a GPU, and the {model.name} has {has}",
                f"set precision=bf16 on a machine that has both, or {GRAPHS}=false",
            )
    settings = environment.get("PYTORCH_CUDA_ALLOC_CONF", "") + environment.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings and environment.get("NCCL_GRAPH_REGISTER") != "0":
        yield Obstacle(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, with which NCCL would register memory that moves",
            "set NCCL_GRAPH_REGISTER=0, or leave that out",
        )


def memory_obstacle(with_graphs: float, has: float) -> Iterator[Obstacle]:
    """That a rank with graphs is foreseen to take more GiB than its GPU has."""
    if with_graphs > has:
        yield Obstacle(
            f"with them a rank would take {with_graphs:.1f} GiB, and its GPU has {has:.1f}; {GRAPHS}=true tries it"
        )


def overlap_obstacles(layout: "Layout", device: str) -> Iterator[Obstacle]:
    """What speaks against data-parallel transfers beside arithmetic on a device (cuda or cpu)."""
    if layout.data * layout.context == 1:
        yield Obstacle("there is one data-parallel rank, which sends nothing")
    elif device != "cuda":
        yield Obstacle("on CPUs transfers take the cores that compute")


def gather_obstacles(layout: "Layout", device: str, reduce_overlaps: bool) -> Iterator[Obstacle]:
    """The same for gathering weights, which needs gradients to be reduced that way."""
    yield from overlap_obstacles(layout, device)
    if not reduce_overlaps:
        yield Obstacle(f"{REDUCE} is off", f"{GATHER}=true needs {REDUCE}=true")


def began_without(option: str, before: Mapping[str, Any]) -> Iterator[Obstacle]:
    """That the run which continues has been without it so far; `before` are its options by dotted names."""
    if before.get(option) is False:
        yield Obstacle(
            f"this run began without, and goes on to the last digit as it began; {option}=true switches it on"
        )


def check_switches(cfg: TrainingConfig, layout: "Layout") -> None:
    """Raise UserError where an option was asked for that the other options or the layout rule out."""
    check_switch(GRAPHS, cfg.trainer.cuda_graphs, graph_obstacles(cfg, layout))
    if is_on(cfg.ddp.overlap_param_gather) and cfg.ddp.overlap_grad_reduce is False:
        raise UserError(f"{GATHER}=true needs {REDUCE}=true")


def choose_graphs(
    cfg: TrainingConfig,
    layout: "Layout",
    built: Sequence[Built],
    before: Mapping[str, Any],
    foreseen: Callable[[], Choice],
) -> Choice:
    """What `trainer.cuda_graphs` becomes for models that are built so. Raises UserError.

    `foreseen` gives what a dry run says of it, which knows the memory; asked only where nothing else speaks against graphs.
    """
    # The machine first: where there is no GPU, nothing else is worth a word.
    against = [*graph_obstacles_of_machine(built), *graph_obstacles(cfg, layout), *began_without(GRAPHS, before)]
    found = choose(GRAPHS, cfg.trainer.cuda_graphs, against, WHY[GRAPHS])
    return foreseen() if cfg.trainer.cuda_graphs == AUTO and found.value else found


def choose_overlaps(cfg: TrainingConfig, layout: "Layout", device: str, before: Mapping[str, Any]) -> list[Choice]:
    """What `ddp.overlap_grad_reduce` and `ddp.overlap_param_gather` become on a device (cuda or cpu). Raises UserError."""
    ddp, given = cfg.ddp, cfg.ddp.overlap_grad_reduce
    if given == AUTO and is_on(ddp.overlap_param_gather):
        given = True
    against = (*overlap_obstacles(layout, device), *began_without(REDUCE, before))
    reduce = choose(REDUCE, given, against, WHY[REDUCE])
    against = (*gather_obstacles(layout, device, reduce.value), *began_without(GATHER, before))
    return [reduce, choose(GATHER, ddp.overlap_param_gather, against, WHY[GATHER])]


def decided(cfg: TrainingConfig, choices: Iterable[Choice]) -> TrainingConfig:
    """The config with these options as they were chosen."""
    for choice in choices:
        group, name = choice.option.split(".")
        cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{name: choice.value})})
    return cfg


def agreed(of_ranks: Sequence[Sequence[Choice]]) -> list[Choice]:
    """What all ranks take, where each has chosen for itself: an option that is off on one is off on all."""
    found = []
    for choices in zip(*of_ranks, strict=True):
        off = next((rank for rank, choice in enumerate(choices) if not choice.value), None)
        differ = off is not None and any(choice.value for choice in choices)
        found.append(replace(choices[off], reason=f"on rank {off} {choices[off].reason}") if differ else choices[0])
    return found


def reasons_of(cfg: TrainingConfig, choices: Iterable[Choice]) -> dict[str, str]:
    """For a manifest: why each option that is auto in `cfg` has become what it is, by its name."""
    return {c.option: str(c) for c in choices if _value(cfg, c.option) == AUTO}


def said(cfg: TrainingConfig, choices: Iterable[Choice]) -> list[str]:
    """The same for the screen: a line for each reason."""
    grouped: dict[tuple[bool, str], list[str]] = {}
    for choice in choices:
        if _value(cfg, choice.option) == AUTO:
            grouped.setdefault((choice.value, choice.reason), []).append(f"{choice.option}=auto")
    return [
        f"{', '.join(options)} {'is' if len(options) == 1 else 'are'} {'on' if value else 'off'}: {reason}"
        for (value, reason), options in grouped.items()
    ]


def tokenising_processes(size: int, cores: int) -> int:
    """What `workers` of prepare_data is if not given: `size` are the bytes of its input, `cores` those that it may use.

    A process takes seconds to start, in which one that is there tokenises some MB. Reading is done by one process, which more
    than some dozens of workers would wait for.
    """
    return max(1, min(cores, size // BYTES_OF_A_WORKER, MOST_WORKERS))


def _value(cfg: TrainingConfig, option: str) -> Any:
    group, name = option.split(".")
    return getattr(getattr(cfg, group), name)
