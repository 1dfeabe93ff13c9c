"""How long a step of a planned job takes, by arithmetic: operations, bytes over links and the pipeline's bubble.

    step = (micro-batches + (stages - 1) / chunks) × slowest stage's pass over a micro-batch        bubble: Narayanan et al.,
         + teacher's, likewise, + data-parallel collectives + optimizer                             arXiv 2104.04473, section 2.2

Nothing is taken to overlap, but an offloaded teacher's copies with its arithmetic. What one GPU makes of its peak is measured
(`efficiency`); links give LINK_EFFICIENCY of their data sheet's bandwidth, and collectives are rings: an all-reduce sends
2·(n-1)/n of its bytes, a reduce-scatter or all-gather half of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_megatron.config import HardwareConfig
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.hardware import peak_flops
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import Chunk, Stage
from minitron_megatron.train.memory import GRADIENT_BYTES, Arithmetic, Plan, layers_in_cpu_memory

LINK_EFFICIENCY = 0.8
# Tensor-parallel all-reduces of a layer's forward pass; its backward pass has as many. With sequence parallelism each is a
# reduce-scatter and an all-gather, and backward gathers the linears' inputs once more (arXiv 2205.05198, section 4.2.2).
REDUCES_OF_A_LAYER = 2
# How much faster layers' matrix products are in FP8, casts included: from profiles of a step in both (docs/benchmarks.md).
FP8_GAIN = 1.6
# How much longer a host takes to launch a layer that has tensor-parallel transfers too (docs/benchmarks.md).
LAUNCHES_WITH_TRANSFERS = 1.2


@dataclass(frozen=True)
class Links:
    """Bytes a second that a rank gets in the groups of a layout."""

    tensor: float
    data: float
    pipeline: float

    @classmethod
    def of(cls, plan: Plan, gpu: HardwareConfig) -> "Links":
        """Ranks of a tensor group are neighbours, then come context and data ranks, then pipeline stages (parallel/layout.py)."""
        layout, domain = plan.layout, gpu.nvlink_gpus
        nvlink, network = (LINK_EFFICIENCY * 1e9 * speed for speed in (gpu.nvlink_gb_s, gpu.network_gb_s))
        replicas = layout.tensor * layout.context * layout.data
        # A ring through several nodes crosses between two of them once, by as many adapters as it has members on one.
        members = max(1, domain // layout.tensor)
        return cls(
            tensor=nvlink if layout.tensor <= domain else network,
            data=nvlink if replicas <= domain else min(nvlink, members * network),
            pipeline=nvlink if layout.world_size <= domain else network,
        )


def forward_flops(shape: ModelShape, chunks: Sequence[Chunk], plan: Plan, how: Arithmetic) -> float:
    """Operations of a rank's forward pass over a micro-batch: 2 a matrix weight, and causal attention's two products.

    Those in FP8 count for the bf16 ones that take as long.
    """
    matrices = sum(chunk.layer_matrices for chunk in chunks) / (FP8_GAIN if how.fp8 else 1)
    layers = sum(len(chunk.layers) for chunk in chunks)
    head = 2 * shape.padded_vocab_size * shape.hidden_size if chunks[-1].head else 0
    head /= FP8_GAIN if how.fp8_head else 1
    return plan.batch.tokens * (2 * matrices + (layers * _attention_flops(shape, plan) + head) / plan.layout.tensor)


def _attention_flops(shape: ModelShape, plan: Plan) -> int:
    """Operations of a layer's attention for a token, over all its ranks: half of both products, which are causal."""
    return 2 * shape.num_attention_heads * shape.head_dim * plan.batch.sequence_length


def tensor_bytes(shape: ModelShape, chunks: Sequence[Chunk], plan: Plan, how: Arithmetic, *, backward: bool) -> float:
    """Bytes that a rank sends within its tensor-parallel group for a micro-batch."""
    layout = plan.layout
    layers = sum(len(chunk.layers) for chunk in chunks)
    gather = (layout.tensor - 1) / layout.tensor * plan.batch.tokens * shape.hidden_size * how.dtype.itemsize
    passes = 2 + (how.recompute == "full") if backward else 1
    reduces = passes * REDUCES_OF_A_LAYER * layers
    # The embedding's reduction forward, and the head's backward.
    reduces += chunks[0].embedding + (chunks[-1].head and backward)
    again = REDUCES_OF_A_LAYER * layers if backward and layout.sequence else 0
    return gather * (2 * reduces + again)


def stage_bytes(shape: ModelShape, plan: Plan, how: Arithmetic) -> float:
    """Bytes of a micro-batch's residual stream that a rank sends to the next stage (and back, as gradients)."""
    if plan.layout.pipeline == 1:
        return 0.0
    share = plan.layout.tensor if plan.layout.sequence else 1
    return plan.batch.tokens * shape.hidden_size * how.dtype.itemsize / share * (plan.layout.virtual_pipeline or 1)


@dataclass(frozen=True)
class Pass:
    """A model's passes over a micro-batch on one stage: seconds of arithmetic, bytes sent, seconds of the host's launches."""

    compute: float = 0.0
    tensor_bytes: float = 0.0
    pipeline_bytes: float = 0.0
    launches: float = 0.0

    def seconds(self, links: Links) -> float:
        """The GPU's work, one after another."""
        return self.compute + self.tensor_bytes / links.tensor + self.pipeline_bytes / links.pipeline


def pass_of_stage(
    shape: ModelShape, chunks: Sequence[Chunk], plan: Plan, how: Arithmetic, gpu: HardwareConfig, *, backward: bool
) -> Pass:
    """Forward alone, or forward and backward (twice the operations) with what is recomputed for it."""
    times = 3 + (how.recompute == "full") if backward else 1
    flops = times * forward_flops(shape, chunks, plan, how)
    layers = sum(len(chunk.layers) for chunk in chunks)
    if backward and how.recompute == "selective":
        flops += plan.batch.tokens * layers * _attention_flops(shape, plan) / plan.layout.tensor
    return Pass(
        compute=flops / (gpu.efficiency * peak_flops(gpu, how.dtype)),
        tensor_bytes=tensor_bytes(shape, chunks, plan, how, backward=backward),
        pipeline_bytes=stage_bytes(shape, plan, how) * (2 if backward else 1),
        launches=0.0 if plan.cuda_graphs else _launches(times * layers, plan, gpu),
    )


def _launches(passes_of_layers: int, plan: Plan, gpu: HardwareConfig) -> float:
    # Overlapped transfers are part of the products' launches.
    overlapped = plan.tp_comm_overlap and plan.layout.sequence
    more = LAUNCHES_WITH_TRANSFERS if plan.layout.tensor > 1 and not overlapped else 1
    return passes_of_layers * more * gpu.launch_ms / 1e3


@dataclass(frozen=True)
class Step:
    """A step of the job: seconds by kind, bytes that a rank sends by kind, and the tokens of all ranks."""

    seconds: dict[str, float]
    sent: dict[str, float]
    bubble: float  # idle time in the pipeline over working time
    tokens: int

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


def time_of_step(stages: Sequence[Stage], plan: Plan, gpu: HardwareConfig) -> Step:
    """A step on a cluster; `stages` are the distinct ones of the pipeline, of which the slowest sets the pace."""
    layout, links, count = plan.layout, Links.of(plan, gpu), plan.micro_batches
    own, count_of_teacher = plan.of_teacher, plan.of_teacher.micro_batches
    links_of_teacher = Links.of(own, gpu)
    student = max(
        (pass_of_stage(plan.student, s.student, plan, plan.how, gpu, backward=True) for s in stages),
        key=lambda one: one.seconds(links),
    )
    teacher = Pass()
    if plan.teacher:
        teacher = max((_pass_of_teacher(s, plan, gpu) for s in stages), key=lambda one: one.seconds(links_of_teacher))
    bubble = plan.rounds * _idle_passes(layout) / count
    idle = _idle_passes(layout) * student.seconds(links) + _idle_passes(own.layout) * teacher.seconds(links_of_teacher)
    trained = max(sum(chunk.parameters for chunk in stage.student) for stage in stages)
    ours = Pass(0, count * student.tensor_bytes, count * student.pipeline_bytes)
    theirs = Pass(0, count_of_teacher * teacher.tensor_bytes, count_of_teacher * teacher.pipeline_bytes)
    sent = {
        "tensor parallel": ours.tensor_bytes + theirs.tensor_bytes,
        "pipeline parallel": ours.pipeline_bytes + theirs.pipeline_bytes,
        "teacher's states to the student": _routed_bytes(plan),
        "data parallel": _data_bytes(trained, plan),
    }
    working = count * student.seconds(links) + count_of_teacher * teacher.seconds(links_of_teacher)
    launching = count * student.launches + count_of_teacher * teacher.launches
    seconds = {
        "student, forward and backward": count * student.compute,
        "teacher, forward": count_of_teacher * teacher.compute,
        "tensor parallel": ours.tensor_bytes / links.tensor + theirs.tensor_bytes / links_of_teacher.tensor,
        "pipeline parallel": ours.pipeline_bytes / links.pipeline + theirs.pipeline_bytes / links_of_teacher.pipeline,
        "teacher's states to the student": _routed_bytes(plan) / links.pipeline,
        # The host runs ahead where it can, through both models.
        "waiting for launches": max(0.0, launching - working),
        "idle in the pipeline": plan.rounds * idle,
        "data parallel": sent["data parallel"] / links.data,
        "gradients and optimizer": _bytes_through_memory(trained, plan) / (1e9 * gpu.memory_gb_s),
    }
    tokens = count * plan.batch.samples * plan.batch.sequence_length * layout.data
    return Step(seconds, sent, bubble, tokens)


def _pass_of_teacher(stage: Stage, plan: Plan, gpu: HardwareConfig) -> Pass:
    """Forward over a micro-batch; of layers in CPU memory it takes as long as their copies, if those take longer."""
    found = pass_of_stage(plan.teacher, stage.teacher, plan.of_teacher, plan.teacher_how, gpu, backward=False)
    layers = layers_in_cpu_memory(stage, plan)
    # As many as there are buffers stay in them.
    copied = sum(layers) if len(layers) > 2 else 0
    return replace(found, compute=max(found.compute, copied / (LINK_EFFICIENCY * 1e9 * gpu.host_gb_s)))


def _idle_passes(layout: Layout) -> float:
    """Passes over a micro-batch that a stage waits in each call of the schedule, while the pipeline fills and drains."""
    return (layout.pipeline - 1) / (layout.virtual_pipeline or 1)


def _routed_bytes(plan: Plan) -> float:
    """Final hidden states that a rank of the student's last stage gets, where the teacher has a layout of its own."""
    if not plan.teacher_layout:
        return 0.0
    share = plan.layout.tensor if plan.layout.sequence else 1
    numbers = plan.micro_batches * plan.batch.tokens * plan.teacher.hidden_size / share
    return numbers * plan.teacher_how.dtype.itemsize


def _data_bytes(parameters: int, plan: Plan) -> float:
    """Gradients reduced and scattered in float32, then new weights gathered, over data- and context-parallel ranks."""
    ranks = plan.layout.data * plan.layout.context
    return (ranks - 1) / ranks * parameters * (GRADIENT_BYTES + plan.how.dtype.itemsize)


def _bytes_through_memory(parameters: int, plan: Plan) -> float:
    """What is read and written beside the passes: gradients cleared and summed in float32, the optimizer's states updated."""
    item, ranks = plan.how.dtype.itemsize, plan.layout.data * plan.layout.context
    gradients = GRADIENT_BYTES + plan.micro_batches * (item + 2 * GRADIENT_BYTES)
    return parameters * (gradients + (GRADIENT_BYTES + 2 * plan.optimizer_bytes + item) / ranks)
