"""Bytes that a rank of a training job needs, by the kinds of things they hold.

    weights, gradients, optimizer, teacher      counted from the built models (census.py): exact
    activations                                 what backward keeps of a micro-batch, by layer, as in Korthikanti et al.
                                                (arXiv 2205.05198, section 4), for these layers: grouped queries, gated
                                                feed-forward, no dropout, norms in place of LayerNorm where they are
    × in flight                                 micro-batches between their forward and backward pass on this stage
    work                                        what is alive only while one layer, or the loss, runs
    graphs                                      the work of layers again, where nothing else can have it meanwhile

Per layer the paper has s·b·h·(34 + 5·a·s/h) bytes in 16-bit; here every saved tensor is listed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minitron_megatron.models.axes import TRAITS, axis_table
from minitron_megatron.models.head import LOGITS_BYTES
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.models.vocab_parallel import BLOCK_ELEMENTS
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import Chunk, Stage

RECOMPUTE = ("none", "selective", "full")
# Gradients are accumulated in float32; Adam has two float32 moments, and bfloat16 models float32 master weights (optimizer.py).
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {torch.bfloat16: 12, torch.float32: 8}
# What optim.state_precision saves of bfloat16 models' 12: half of the moments.
STATES_SAVE = {"fp32": 0, "bf16": 4}
# Of a matrix that is trained in FP8: it and its transpose, cast once a step.
FP8_COPIES = 2

# Of the optimizer, a parameter in a checkpoint: the float32 weight, of float32 models too, and both moments.
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes, as far as it decides which tensors backward keeps."""

    dtype: torch.dtype
    engine: str  # te or local
    recompute: str = "none"  # none; selective: attention's inside; full: all of a layer but its input
    fused_norms: bool = True  # torch has a fused RMSNorm on GPUs, on CPUs it keeps float32 copies
    fp8: bool = False  # products of the layers; of a teacher its weights too
    fp8_head: bool = False  # of a teacher
    offloaded: bool = False  # of a teacher: its layers are in CPU memory (distill/offload.py)
    fixed_order: bool = True  # fused attention's backward pass adds in one (models/build.py)

    @property
    def input_bytes(self) -> int:
        """Bytes of a number that a linear keeps of its input."""
        return 1 if self.fp8 else self.dtype.itemsize


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as a rank sees it: samples, tokens of each on it, and the whole sequence that they attend to."""

    samples: int
    tokens_of_sample: int
    sequence_length: int

    @classmethod
    def of(cls, samples: int, sequence_length: int, layout: Layout) -> "MicroBatch":
        """A layout's share of samples."""
        return cls(samples, sequence_length // layout.context, sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens on the rank, where a sequence is not split over tensor-parallel ranks."""
        return self.samples * self.tokens_of_sample


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a layer's tensors on a rank."""

    tokens: int
    residual: int  # the residual stream: split over tensor-parallel ranks under sequence parallelism
    queries: int
    keys: int
    ffn: int
    scores: int  # attention's s × s
    own_scores: int  # those of a rank's queries with its own keys, as context parallelism takes them in turn

    @classmethod
    def of(cls, shape: ModelShape, layer: int, layout: Layout, batch: MicroBatch) -> "_Sizes":
        share, n = layout.tensor, batch.tokens
        return cls(
            tokens=n // share if layout.sequence else n,
            residual=(n // share if layout.sequence else n) * shape.hidden_size,
            queries=n * shape.num_attention_heads * shape.head_dim // share,
            keys=n * shape.num_query_groups * shape.head_dim // share,
            ffn=n * shape.ffn_of_layers[layer] // share,
            scores=n * batch.sequence_length * shape.num_attention_heads // share,
            own_scores=n * batch.tokens_of_sample * shape.num_attention_heads // share,
        )


def layer_bytes(shape: ModelShape, layer: int, layout: Layout, batch: MicroBatch, how: Arithmetic) -> int:
    """Bytes that a layer (from 0) keeps of a micro-batch for its backward pass, on each of its ranks."""
    sizes, item = _Sizes.of(shape, layer, layout, batch), how.dtype.itemsize
    if how.recompute == "full":
        return sizes.residual * item
    # Each norm, and its output: a linear's input.
    norms = 2 * (_norm_bytes(shape, sizes, how) + sizes.residual * how.input_bytes)
    return norms + _attention_bytes(shape, batch, sizes, how) + _mlp_bytes(shape, sizes, how)


def _norm_bytes(shape: ModelShape, sizes: _Sizes, how: Arithmetic) -> int:
    """What a norm keeps: its input and a statistic or two a token."""
    traits = TRAITS[shape.family]
    if traits.normalization == "RMSNorm":
        # Unfused: the input and its normalised form in float32, and 1/rms.
        return sizes.residual * (how.dtype.itemsize if how.fused_norms else 8) + 4 * sizes.tokens
    statistics = 2 * sizes.tokens * (4 if how.fused_norms else how.dtype.itemsize)
    gain = shape.hidden_size * how.dtype.itemsize if traits.zero_centered_gain and how.engine == "local" else 0
    return sizes.residual * how.dtype.itemsize + statistics + gain


def _attention_bytes(shape: ModelShape, batch: MicroBatch, sizes: _Sizes, how: Arithmetic) -> int:
    """What attention keeps between the qkv linear and the output linear, whose input it is."""
    item, q, kv = how.dtype.itemsize, sizes.queries, sizes.keys
    mixed, rotated, output = (
        (q + 2 * kv) * item,
        (q + kv) * item,
        q * item,
    )  # v is a view of the qkv linear's mixed output
    if how.engine == "te":
        # Fused attention keeps its inputs, its output and a log-sum-exp a token and head.
        sums = 0 if how.recompute == "selective" else 4 * q // shape.head_dim
        # Its values are a copy; of the mixed output only norms of heads keep their inputs.
        values = mixed if TRAITS[shape.family].qk_norm else kv * item
        # In FP8 the output linear keeps its input as a copy.
        output += q if how.fp8 else 0
        return values + rotated + output + sums + _head_norms_bytes(shape, sizes, how, mixed_is_kept=True)
    rotary = 4 * batch.tokens_of_sample * int(shape.head_dim * shape.rotary_percent) * item  # cos and sin, for q and k
    if how.recompute == "selective":
        return mixed + rotated + output + rotary + _head_norms_bytes(shape, sizes, how, mixed_is_kept=True)
    # Key-value heads are repeated for every query head; the softmax is in float32 and is cast for its product with v.
    repeats = shape.heads_per_group > 1
    inputs = 3 * q * item if repeats else mixed + rotated
    softmax = sizes.scores * (4 + (item if item < 4 else 0)) + batch.sequence_length**2  # and the mask
    return inputs + output + rotary + softmax + _head_norms_bytes(shape, sizes, how, mixed_is_kept=not repeats)


def _head_norms_bytes(shape: ModelShape, sizes: _Sizes, how: Arithmetic, *, mixed_is_kept: bool) -> int:
    """What Qwen3's norms of query and key heads keep."""
    if not TRAITS[shape.family].qk_norm:
        return 0
    numbers, item = sizes.queries + sizes.keys, how.dtype.itemsize
    statistics = 4 * numbers // shape.head_dim
    if not how.fused_norms and item < 4:
        return 8 * numbers + statistics
    # The queries of a group are copied out of the mixed output, where there are several; the keys are a view of it.
    inputs = sizes.queries * item if shape.heads_per_group > 1 else 0
    inputs += 0 if mixed_is_kept else (sizes.queries + 2 * sizes.keys) * item
    return inputs + statistics + (0 if how.fused_norms else item * numbers)


def _mlp_bytes(shape: ModelShape, sizes: _Sizes, how: Arithmetic) -> int:
    """What the feed-forward block keeps between its linears: the first one's output, and the second one's input."""
    if not TRAITS[shape.family].gated:
        return sizes.ffn * (how.dtype.itemsize + how.input_bytes)
    # Unfused: silu(gate), and Megatron's up + offset besides.
    return (2 if how.engine == "te" else 4) * sizes.ffn * how.dtype.itemsize + sizes.ffn * how.input_bytes


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunk passes that a stage keeps at most: 1F1B's warm-up and one more, and the interleaved schedule's.

    Narayanan et al., arXiv 2104.04473, sections 2.2.1 and 2.2.2; as megatron.core.pipeline_parallel.schedules counts.
    """
    behind = layout.pipeline - stage - 1
    if layout.virtual_pipeline is None:
        return min(behind + 1, micro_batches)
    warm_up = 2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warm_up + 1, micro_batches * layout.virtual_pipeline)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how: all that memory and time follow from.

    `teacher_layout` is its own, where it has one; `ahead` how many micro-batches a teacher runs ahead, None for all of a step.
    """

    student: ModelShape
    teacher: ModelShape | None
    layout: Layout
    batch: MicroBatch
    micro_batches: int  # of a rank and step
    how: Arithmetic
    teacher_how: Arithmetic
    teacher_layout: Layout | None = None
    ahead: int | None = None
    state_precision: str = "fp32"
    logits_bytes: int = LOGITS_BYTES
    cuda_graphs: bool = False
    tp_comm_overlap: bool = False

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer for each parameter, over all data-parallel ranks."""
        return OPTIMIZER_BYTES[self.how.dtype] - STATES_SAVE[self.state_precision]

    @property
    def of_teacher(self) -> "Plan":
        """The same as the teacher's ranks see it: its layout, and its share of the micro-batches."""
        if self.teacher_layout is None:
            return self
        own, batch = self.teacher_layout, self.batch
        micro_batch = MicroBatch.of(batch.samples, batch.sequence_length, own)
        return replace(self, layout=own, batch=micro_batch, micro_batches=self._of_teacher(self.micro_batches))

    @property
    def rounds(self) -> int:
        """Rounds that a step is run in (train/rounds.py)."""
        return math.ceil(self.micro_batches / self.at_once)

    @property
    def at_once(self) -> int:
        """Micro-batches of a round."""
        bound = self.ahead if self.teacher and (self.layout.pipeline > 1 or self.teacher_layout) else None
        return min(bound or self.micro_batches, self.micro_batches)

    @property
    def teacher_at_once(self) -> int:
        """Those that a rank of the teacher's layout runs in a round."""
        return self._of_teacher(self.at_once)

    def _of_teacher(self, count: int) -> int:
        return math.ceil(count * self.layout.data / self.teacher_layout.data) if self.teacher_layout else count


def chunk_activations(shape: ModelShape, chunk: Chunk, layout: Layout, batch: MicroBatch, how: Arithmetic) -> int:
    """Bytes that a chunk keeps of a micro-batch: its layers, and on the last stage the final norm with its output."""
    layers = sum(layer_bytes(shape, layer, layout, batch, how) for layer in chunk.layers)
    sizes = _Sizes.of(shape, 0, layout, batch)
    head = _norm_bytes(shape, sizes, how) + sizes.residual * how.dtype.itemsize if chunk.head else 0
    return layers + head + (8 * batch.tokens if chunk.embedding else 0)


def memory_of_stage(stage: Stage, plan: Plan) -> dict[str, int]:
    """Bytes of a rank of a stage, by kind, at the fullest moment of a step."""
    layout, how = plan.layout, plan.how
    trained = sum(chunk.parameters for chunk in stage.student)
    flying = in_flight(layout, stage.number, plan.at_once)
    kept = sum(chunk_activations(plan.student, chunk, layout, plan.batch, how) for chunk in stage.student)
    copies = FP8_COPIES * sum(chunk.layer_matrices for chunk in stage.student) if how.fp8 else 0
    found = {
        "weights": trained * how.dtype.itemsize + copies,
        "gradients": trained * GRADIENT_BYTES,
        "optimizer": trained * plan.optimizer_bytes // (layout.data * layout.context),
        "activations": kept * flying // len(stage.student),
        "loss, or work of a layer": _work(stage, plan),
    }
    if plan.teacher:
        found["teacher weights"] = _teacher_weights(stage, plan)
        found["teacher hidden states"] = _kept_states(stage, plan)
    if plan.cuda_graphs:
        found["what CUDA graphs work in"] = _work_of_graphs(stage, plan, flying)
    return found


def _teacher_weights(stage: Stage, plan: Plan) -> int:
    """Its parameters; in a layout of its own its output matrix is where the student's is, in the student's shards."""
    how, parameters = plan.teacher_how, sum(chunk.parameters for chunk in stage.teacher)
    saved = (how.dtype.itemsize - 1) * sum(chunk.layer_matrices for chunk in stage.teacher) if how.fp8 else 0
    if plan.teacher_layout:
        matrix = plan.teacher.padded_vocab_size * plan.teacher.hidden_size
        if stage.teacher[-1].head and not (plan.teacher.tied_embeddings and stage.teacher[-1].embedding):
            parameters -= matrix // plan.teacher_layout.tensor
        if stage.student[-1].head:
            parameters += matrix // plan.layout.tensor
    if how.fp8_head and stage.student[-1].head:
        matrix = plan.teacher.padded_vocab_size * plan.teacher.hidden_size // plan.layout.tensor
        # A tied one is the embedding too, and stands there beside its copy in FP8.
        tied = plan.teacher.tied_embeddings and not plan.teacher_layout
        saved += -matrix if tied else (how.dtype.itemsize - 1) * matrix
    layers = layers_in_cpu_memory(stage, plan)
    # In their stead two buffers for the largest.
    saved += sum(layers) - 2 * max(layers) if layers else 0
    return parameters * how.dtype.itemsize - saved


def layers_in_cpu_memory(stage: Stage, plan: Plan) -> list[int]:
    """Bytes of each of the teacher's layers that a rank of a stage has in CPU memory: none where they are not offloaded."""
    if not plan.teacher_how.offloaded:
        return []
    own, item = plan.of_teacher.layout, plan.teacher_how.dtype.itemsize
    rows = [row for row in axis_table(plan.teacher) if row.stacked]
    shared = [own.tensor if row.tensor_parallel_axis else 1 for row in rows]
    return [
        item * sum(math.prod(row.shape(plan.teacher, layer)) // n for row, n in zip(rows, shared, strict=True))
        for chunk in stage.teacher
        for layer in chunk.layers
    ]


def _kept_states(stage: Stage, plan: Plan) -> int:
    """Final hidden states: a pipeline's last stage keeps those of a round (distill/teacher.py), without one a micro-batch's.

    In a layout of its own the teacher's last stage has its share of a round when the student's gets theirs.
    """
    numbers = 0
    if stage.teacher[-1].head:
        count = plan.teacher_at_once if plan.layout.pipeline > 1 or plan.teacher_layout else 1
        numbers += count * _Sizes.of(plan.teacher, 0, plan.of_teacher.layout, plan.of_teacher.batch).residual
    if plan.teacher_layout and stage.student[-1].head:
        numbers += plan.at_once * _Sizes.of(plan.teacher, 0, plan.layout, plan.batch).residual
    return numbers * plan.teacher_how.dtype.itemsize


def _work(stage: Stage, plan: Plan) -> int:
    """The largest of what is alive for a moment: the loss, a layer's backward pass, a layer of the teacher.

    Layers that are CUDA graphs work in memory of their own.
    """
    passes = []
    if not plan.cuda_graphs:
        passes.append(_layer_work(plan.student, stage.student, plan, plan.how, backward=True))
        if plan.teacher:
            passes.append(_layer_work(plan.teacher, stage.teacher, plan.of_teacher, plan.teacher_how, backward=False))
    # A matrix's gradient: Transformer Engine's linears add theirs to the float32 one as they make it, of the embedding and
    # of local layers' it is made in the model's dtype first, and of the output matrix autograd wants one to throw away.
    held = [chunk.largest for chunk in stage.student if plan.how.engine == "local" or chunk.embedding or chunk.head]
    matrix = max(held, default=0) * plan.how.dtype.itemsize
    if stage.student[-1].head:
        passes.append(_loss_bytes(plan))
    return max(passes, default=0) + matrix


def _work_of_graphs(stage: Stage, plan: Plan, flying: int) -> int:
    """What captured layers work in, theirs for good; measured on H200s (docs/benchmarks.md).

    Of the student a layer's backward pass, in which what attention works in does not take the place of what the feed-forward
    block has kept; a copy of each layer's input beside the output before it, for the micro-batches in flight; and gradients at
    either end. Of the teacher all that one layer makes, and what goes in and comes out.
    """
    layers, item = sum(len(chunk.layers) for chunk in stage.student), plan.how.dtype.itemsize
    sizes = _Sizes.of(plan.student, 0, plan.layout, plan.batch)
    work = _layer_work(plan.student, stage.student, plan, plan.how, backward=True, captured=True)
    copies = (layers * flying // len(stage.student) + 2) * sizes.residual * item
    if not plan.teacher:
        return work + copies
    own, how = plan.of_teacher, plan.teacher_how
    widest = _widest(plan.teacher, stage.teacher)
    ends = 2 * _Sizes.of(plan.teacher, widest, own.layout, own.batch).residual * how.dtype.itemsize
    made = layer_bytes(plan.teacher, widest, own.layout, own.batch, Arithmetic(how.dtype, how.engine))
    return work + copies + made + _gathered(plan.teacher, own, how) + ends


def _loss_bytes(plan: Plan) -> int:
    """Logits of student and teacher, of as many tokens as there are at once, and of those float32 blocks (models/head.py)."""
    item, width = plan.how.dtype.itemsize, plan.student.padded_vocab_size // plan.layout.tensor
    pieces = math.ceil(plan.batch.tokens * width * item / (plan.logits_bytes // (2 if plan.teacher else 1)))
    logits = math.ceil(plan.batch.tokens / pieces) * width
    states = plan.batch.tokens * (plan.student.hidden_size + (plan.teacher.hidden_size if plan.teacher else 0))
    # The states of all ranks of a sequence, and their gradients.
    return (2 if plan.teacher else 1) * logits * item + 2 * states * item + 3 * 4 * min(BLOCK_ELEMENTS, logits)


def _widest(shape: ModelShape, chunks: Sequence[Chunk]) -> int:
    """The layer of chunks with the widest feed-forward block."""
    return max((layer for chunk in chunks for layer in chunk.layers), key=lambda layer: shape.ffn_of_layers[layer])


def _gathered(shape: ModelShape, plan: Plan, how: Arithmetic) -> int:
    """Bytes of the residual stream, not split, that goes into a layer and of the one that comes out."""
    return 2 * plan.batch.tokens * shape.hidden_size * how.dtype.itemsize


def _layer_work(
    shape: ModelShape, chunks: Sequence[Chunk], plan: Plan, how: Arithmetic, *, backward: bool, captured: bool = False
) -> int:
    """Bytes of the tensors of one layer that are alive at once: in a backward pass gradients, beside a recomputed layer.

    Attention's backward pass begins when what the layer kept of its feed-forward block is gone; `captured` in a graph, each
    of both has memory of its own.
    """
    widest = _widest(shape, chunks)
    sizes, item = _Sizes.of(shape, widest, plan.layout, plan.batch), how.dtype.itemsize
    inner = (3 if TRAITS[shape.family].gated else 2) * sizes.ffn * item
    # Unfused attention makes scores, their masked and float32 forms one after another.
    scores = sizes.scores * (4 + 2 * item) if how.engine == "local" else 0
    attention = _attention_work(shape, sizes, how) if backward else 0
    alive = inner + attention if captured else max(inner, scores, attention - _mlp_bytes(shape, sizes, how))
    gathered = _gathered(shape, plan, how)
    plain = Arithmetic(how.dtype, how.engine, fused_norms=how.fused_norms)
    again = layer_bytes(shape, widest, plan.layout, plan.batch, plain) if backward and how.recompute != "none" else 0
    if how.recompute == "selective":
        again -= layer_bytes(shape, widest, plan.layout, plan.batch, how)
    return alive + gathered + again


def _attention_work(shape: ModelShape, sizes: _Sizes, how: Arithmetic) -> int:
    """What fused attention's backward pass makes: gradients, and cuDNN's workspace, measured on H200s (docs/benchmarks.md).

    The workspace is dq in float32; in a fixed order a part of it for every 256 keys of 128 numbers, 2 bytes a score; and with
    grouped queries dk and dv of every query head.
    """
    if how.engine != "te":
        return 0
    gradients = 2 * (sizes.queries + sizes.keys) * how.dtype.itemsize
    parts = 2 * sizes.own_scores if how.fixed_order else 4 * sizes.queries
    repeated = 4 * sizes.queries if shape.heads_per_group > 1 else 0
    return gradients + parts + repeated
