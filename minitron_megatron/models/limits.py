"""What the sizes of a model allow: layouts, sequences and FP8, found by numbers alone.

Nothing heavy is imported: commands ask this before torch and Megatron are there. What depends on a device is asked in build.py
and fp8.py; options that a machine decides in automatic.py.
"""

import math
import re

from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import auto_dtype

# What sizes of FP8 products, and tokens of a rank, must be multiples of.
FP8_MULTIPLE, FP8_MULTIPLE_OF_BLOCKS = 16, 128
# Megatron's notation of pipeline layouts.
_LETTERS = {"E": "embedding", "L": "loss", "t": "decoder", "m": "mtp"}
# Signs of a layout that is written out, and digits of a count in it: more than any model has layers.
_LONGEST_NOTATION, _DIGITS = 2**22, 9

# Bytes of a number.
ITEMSIZES = {"float32": 4, "bfloat16": 2}


def computing_dtype(shape: ModelShape, precision: str) -> str:
    """Name of the dtype to compute in: `precision` is bf16, fp32, or auto.

    `auto` is what the job has settled (parallel/precision.py): on GPUs, and before a job, the folder's own dtype.
    """
    return auto_dtype(shape.dtype) if precision == "auto" else {"bf16": "bfloat16", "fp32": "float32"}[precision]


# Tensor-parallel sizes that are looked at where those that fit are listed.
_LARGEST_TENSOR = 64


def tensor_sizes(shape: ModelShape) -> list[int]:
    """Tensor-parallel sizes, up to 64, that a model divides by."""
    common = math.gcd(*(size for _, size in _sharded(shape)))
    return [n for n in range(1, min(common, _LARGEST_TENSOR) + 1) if common % n == 0]


def _sharded(shape: ModelShape) -> list[tuple[str, int]]:
    """Sizes that tensor parallelism divides."""
    return [
        ("num_query_groups", shape.num_query_groups),
        *(("ffn_hidden_size", size) for size in sorted(set(shape.ffn_of_layers))),
        ("padded vocabulary", shape.padded_vocab_size),
    ]


def check_layout(shape: ModelShape, layout: Layout, what: str = "the model", *, resizing: str | None = None) -> None:
    """Raise UserError when the model's sizes do not divide over the layout.

    `resizing` is the option whose sizes make the model, as in "target", where another size may be given instead.
    """
    for name, size in _sharded(shape):
        if size % layout.tensor:
            fits = tensor_sizes(shape)
            other = f", or {resizing}.{name}={-(-size // layout.tensor) * layout.tensor}" if resizing else ""
            raise UserError(
                f"{layout.option}.tensor={layout.tensor} does not divide {name}={size} of {what}: "
                f"use {'1' if fits == [1] else 'one of ' + ', '.join(map(str, fits))}{other}"
            )
    if shape.num_layers < layout.stages:
        names = f"{layout.option}.pipeline" + (
            f" × {layout.option}.virtual_pipeline" if layout.virtual_pipeline else ""
        )
        raise UserError(
            f"{names}={layout.stages} is more than num_layers={shape.num_layers} of {what}: every stage needs a layer"
        )
    layers = layers_of_stages(shape.num_layers, layout)
    if min(layers) < 1:
        raise UserError(
            f"{shape.num_layers} layers of {what} over {layout.stages} stages would be {layers}: every stage needs a layer; do "
            "without parallel.account_for_embedding or parallel.account_for_loss"
        )


def layers_of_stages(num_layers: int, layout: Layout) -> list[int]:
    """Layers of each pipeline stage, in the order of the data flow. Raises UserError for an explicit layout that is no such.

    As even as can be, the last stages (the head) fewer; embedding and loss may count as a layer of the stages that have them.
    """
    if layout.pipeline_layout is not None:
        return _explicit_stages(num_layers, layout)
    first = int(layout.account_for_embedding)
    last = int(layout.account_for_loss)
    share, more = divmod(num_layers + first + last, layout.stages)
    layers = [share + (stage < more) for stage in range(layout.stages)]
    layers[0] -= first
    layers[-1] -= last
    return layers


def _explicit_stages(num_layers: int, layout: Layout) -> list[int]:
    """Layers of each stage by the one of the given layouts that is for a model of that depth."""
    for given in layout.pipeline_layout.split(";"):
        stages = stages_of_notation(given.strip())
        if stages is None:
            continue
        layers = [stage.count("decoder") for stage in stages]
        in_order = stages == _with_ends([["decoder"] * count for count in layers])
        if in_order and sum(layers) == num_layers and len(layers) == layout.stages:
            return layers
    raise UserError(
        f"parallel.pipeline_layout={layout.pipeline_layout} does not lay out {num_layers} layers over {layout.stages} stages: "
        "write E and L once, at both ends, and a t for each layer, as in 'Et*3|t*5L', and one such for each model's depth, "
        "separated by ;"
    )


def stages_of_notation(notation: str) -> list[list[str]] | None:
    """Stages in Megatron's notation, as its PipelineParallelLayerLayout.parse_str_to_list reads it; None where it cannot.

    x*3 is xxx, (t|)*3 is t|t|t|, and commas are for the eye. Megatron itself takes seconds to import.
    """
    written = notation.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        # Counted before it is written out: a number may be of any size.
        counts = re.findall(repeated, written)
        if any(len(count) > _DIGITS for _, count in counts):
            return None
        if len(written) + sum(len(part) * int(count) for part, count in counts) > _LONGEST_NOTATION:
            return None
        written = re.sub(repeated, lambda found: found[1] * int(found[2]), written)
    if not set(written) <= {*_LETTERS, "|"}:
        return None
    return [[_LETTERS[letter] for letter in stage] for stage in written.split("|")]


def pipeline_layout(num_layers: int, layout: Layout) -> list[list[str]] | None:
    """What Megatron's `pipeline_model_parallel_layout` says where stages differ; None where they are equal."""
    layers = layers_of_stages(num_layers, layout)
    if len(set(layers)) == 1:
        return None
    return _with_ends([["decoder"] * count for count in layers])


def _with_ends(stages: list[list[str]]) -> list[list[str]]:
    """Embedding and loss on the first and the last of the stages."""
    stages = [list(stage) for stage in stages]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def sequence_parts(layout: Layout) -> int:
    """What the length of a sequence must be a multiple of, to be split over the ranks that share it."""
    return (layout.tensor if layout.sequence else 1) * layout.context * (2 if layout.context > 1 else 1)


def check_sequence(sequence_length: int, layout: Layout) -> None:
    """Raise UserError when a sequence cannot be split over the ranks that share it."""
    shares = sequence_parts(layout)
    if sequence_length % shares:
        fits = max(shares, sequence_length // shares * shares)
        raise UserError(
            f"data.sequence_length={sequence_length} is not a multiple of the {shares} parts that sequence and context "
            f"parallelism ({layout.option}.sequence, {layout.option}.context) split it into: use data.sequence_length={fits}"
        )


def check_fp8(option: str, scaling: str, shape: ModelShape, layout: Layout, tokens: int, bf16_layers: int = 0) -> None:
    """Raise UserError where a model, a layout or a batch does not go with FP8: before any GPU is asked.

    Args:
        option: the one that says `scaling`.
        scaling: one of config.FP8_SCALINGS.
        shape: the model.
        layout: of the model.
        tokens: of a micro-batch on a rank, before sequence parallelism.
        bf16_layers: layers at either end that stay in bfloat16.
    """
    if scaling == "none":
        if bf16_layers:
            raise UserError("trainer.fp8_bf16_layers is for FP8: set trainer.fp8= too")
        return
    if scaling == "delayed" and bf16_layers:
        raise UserError(
            f"{option}=delayed cannot leave layers in bf16 (trainer.fp8_bf16_layers): use tensorwise or blockwise"
        )
    if 2 * bf16_layers >= shape.num_layers:
        raise UserError(
            f"trainer.fp8_bf16_layers={bf16_layers} at either end leaves none of {shape.num_layers} layers in FP8"
        )
    multiple = FP8_MULTIPLE_OF_BLOCKS if scaling == "blockwise" else FP8_MULTIPLE
    queries = shape.num_attention_heads * shape.head_dim
    mixed = queries + 2 * shape.num_query_groups * shape.head_dim
    sizes = {
        **{f"ffn_hidden_size={ffn} / tensor": ffn // layout.tensor for ffn in sorted(set(shape.ffn_of_layers))},
        "hidden_size": shape.hidden_size,
        "num_attention_heads × head_dim / tensor": queries // layout.tensor,
        "query, key and value channels / tensor": mixed // layout.tensor,
        "tokens of a micro-batch on a rank": tokens // (layout.tensor if layout.sequence else 1),
    }
    for name, size in sizes.items():
        if size % multiple:
            raise UserError(f"{option}={scaling} needs multiples of {multiple}: {name} is {size}")
