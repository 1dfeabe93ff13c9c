"""Every option of every command: the dataclasses that Hydra fills, with one line of documentation each.

The one source for options: `--help`, checks and defaults come from here, presets from `conf/`. Nothing heavy is imported.
"""

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from minitron_megatron.effects import (
    ARITHMETIC,
    FREE,
    LENGTH,
    PUBLISHED,
    SAMPLES,
    Effect,
    Need,
    beside,
    including,
    only_with,
    typed,
    without,
)
from minitron_megatron.errors import UserError

REQUIRED = "???"
# The value of an option that the machine and the other options decide (automatic.py).
AUTO = "auto"
# Architectures: a table each in models/axes.py and an entry in models/families.py.
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")
# How FP8 is scaled (models/fp8.py); weights that never change have no past values to take scales from.
FP8_FROZEN = ("none", "tensorwise", "blockwise")
FP8_SCALINGS = ("none", "delayed", "tensorwise", "blockwise")


def option(
    default: Any,
    doc: str,
    choices: tuple[Any, ...] = (),
    *,
    decides: str = ARITHMETIC,
    when: Effect | tuple[Effect, ...] = (),
    path: bool = False,
    whole: bool = False,
) -> Any:
    """A config field with its line of documentation.

    Args:
        default, doc: what it is if not given, and its line.
        choices: its allowed values, where there are some.
        decides: what of the result it decides: whether it may change when a run continues (effects.py, changing.py).
        when: when it has an effect; where it has none, that is said (effects.py, idle.py).
        path: whether it names a file or folder, or several: two spellings of one path are then the same value (changing.py).
        whole: whether its numbers are whole ones, where its type leaves that open.
    """
    effects = when if isinstance(when, tuple) else (when,)
    metadata = {"doc": doc, "choices": choices, "decides": decides, "when": effects, "path": path, "whole": whole}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(doc: str) -> Any:
    """An option that is auto, true or false: on where automatic.py finds nothing against it."""
    return option(AUTO, doc, (AUTO, True, False), decides=FREE)


def group(kind: type, doc: str = "", *, decides: str | None = None, when: Effect | tuple[Effect, ...] = ()) -> Any:
    """A nested config; a model that a command can do without has its line of documentation here.

    `decides` stands for what its options say of themselves, `when` is for each of them besides its own.
    """
    effects = when if isinstance(when, tuple) else (when,)
    return field(default_factory=kind, metadata={"doc": doc, "decides": decides, "when": effects})


def _one_tensor_rank(config: Any) -> str | None:
    return "it splits the tokens over parallel.tensor, which is 1" if config.parallel.tensor == 1 else None


def _one_stage(config: Any) -> str | None:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return "it shares out layers over parallel.pipeline, which is 1"
    return "parallel.pipeline_layout= says the layers of each stage itself" if parallel.pipeline_layout else None


@dataclass
class ParallelConfig:
    """How the model is spread over the processes."""

    tensor: int = option(1, "tensor-parallel size: processes that share each matrix")
    pipeline: int = option(1, "pipeline-parallel size: stages of consecutive layers, as even as they divide")
    virtual_pipeline: int | None = option(None, "model chunks a stage in the interleaved schedule")
    account_for_embedding: bool = option(
        False, "the embedding counts as a layer when layers are shared out over the stages", when=Effect(_one_stage)
    )
    account_for_loss: bool = option(
        False, "the output head and loss count as a layer, likewise", when=Effect(_one_stage)
    )
    pipeline_layout: str | None = option(
        None,
        "layers of each stage, in Megatron's notation, as 'Et*3|t*5L': E embedding, t layer, L loss; for a teacher of another "
        "depth one more, separated by ;",
    )
    sequence: bool = option(
        False,
        "sequence parallelism: tokens of norms are split over the tensor-parallel group",
        when=Effect(_one_tensor_rank),
    )
    context: int = option(1, "context-parallel size: parts of each sequence; above 1 needs model.engine=te and bf16")
    world_size: int | None = option(
        None, "processes of the whole job: those that were started, if not given; a dry run plans for any number"
    )


@dataclass
class ModelConfig:
    """A model: its folder, or the sizes of a preset in conf/model."""

    path: str | None = option(None, "model folder (model=FOLDER sets it)", path=True)
    engine: str = option(
        "auto",
        "layers: te (Transformer Engine), local (Megatron's own), auto: te for bf16 on CUDA if installed, else local",
        ("auto", "te", "local"),
        decides=FREE,
    )
    family: str | None = option(None, "architecture", FAMILY_NAMES)
    num_layers: int | None = option(None, "decoder layers")
    hidden_size: int | None = option(None, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "neurons of a feed-forward block")
    num_attention_heads: int | None = option(None, "query heads")
    num_query_groups: int | None = option(None, "key-value heads")
    head_dim: int | None = option(None, "channels of a head")
    vocab_size: int | None = option(None, "vocabulary without padding")
    max_position_embeddings: int | None = option(None, "longest sequence in tokens")
    rope_theta: float | None = option(None, "base of the rotary frequencies")
    rope_scaling: Any = option(None, "Llama 3 scaling: factor, low, high, original length")
    rotary_percent: float | None = option(None, "share of a head's channels that are rotated; all if not given")
    norm_eps: float | None = option(None, "epsilon of the norms")
    tied_embeddings: bool | None = option(None, "whether output and input embeddings are one tensor")
    dtype: str | None = option(None, "dtype of the weights on disk", ("float32", "bfloat16"))

    def folder(self, name: str) -> str:
        """The model's folder. Raises UserError when only a preset was given; `name` is the option's."""
        if self.path is None:
            raise UserError(f"{name}=… must be a model folder here (the output of import_hf, prune or distill)")
        return self.path

    def sizes(self, name: str) -> dict[str, Any]:
        """The sizes of a preset. Raises UserError when none was given."""
        if self.family is None:
            raise UserError(f"{name}=… must be a preset of conf/model here, such as {name}=llama3_1_8b")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("path", "engine")}


@dataclass
class DataConfig:
    """Tokenised text."""

    path: Any = option(
        REQUIRED,
        "data folder (the output of prepare_data), or a blend: [weight,folder,weight,folder,…]",
        decides=SAMPLES,
        path=True,
    )
    sequence_length: int | None = option(
        None,
        "tokens of a sample; 1024 if not given, or the positions of the model where those are fewer",
        decides=SAMPLES,
    )


@dataclass
class TrainingDataConfig(DataConfig):
    """Tokenised text to train on."""

    reset_attention_mask: bool = option(
        False, "tokens see their own document only, of the several in a sample; needs engine=local", decides=SAMPLES
    )
    eod_mask_loss: bool = option(
        False, "no loss on what follows an end of document: the next one's first token", decides=SAMPLES
    )
    max_epochs: float = option(
        1.0, "how often the data may be read: a run that takes more tokens is refused", decides=FREE
    )


@dataclass
class BatchConfig:
    """How much runs at once, for commands that only run a model forward."""

    micro_batch_size: int = option(1, "samples that run through the model at once", decides=FREE)


def _steps_of(config: Any) -> float:
    """Steps of a run as far as they are known: endless where they are not given, which is said elsewhere."""
    try:
        return number_of_steps(config)
    except (UserError, TypeError):
        return math.inf


def _stops_no_sooner(config: Any) -> str | None:
    steps, asked = _steps_of(config), config.trainer.stop_after
    return f"the run ends with step {steps} in any case" if asked is not None and asked >= steps else None


@dataclass
class TrainerConfig:
    """The training loop."""

    steps: int | None = option(None, "optimizer steps (give steps or tokens)", decides=LENGTH)
    tokens: float | None = option(None, "tokens to train on (give steps or tokens)", decides=LENGTH)
    global_batch_size: int = option(8, "samples of an optimizer step, over all processes", decides=SAMPLES)
    micro_batch_size: int = option(1, "samples that run through the model at once", decides=FREE)
    recompute: str = option(
        "none",
        "activations computed again in the backward pass, for memory: those of recompute_modules, or of whole layers",
        ("none", "selective", "full"),
        decides=FREE,
    )
    recompute_modules: list[str] = option(
        ["core_attn"],
        "selective: core_attn, mlp or both; fused attention has no need of core_attn",
        decides=FREE,
        when=only_with("trainer.recompute", "selective"),
    )
    recompute_method: str = option(
        "uniform",
        "full: keep the input of every recompute_num_layers-th layer, or compute the first recompute_num_layers of a stage again",
        ("uniform", "block"),
        decides=FREE,
        when=only_with("trainer.recompute", "full"),
    )
    recompute_num_layers: int = option(
        1, "full: see recompute_method", decides=FREE, when=only_with("trainer.recompute", "full")
    )
    fp8: str = option(
        "none",
        "products of the layers in FP8, by how it is scaled; needs Transformer Engine (docs/distillation.md)",
        FP8_SCALINGS,
    )
    fp8_bf16_layers: int = option(0, "layers at either end of the model that stay in bf16; not with delayed")
    cuda_graphs: Any = switch(
        "launch a layer's kernels as one CUDA graph, of the teacher's too; auto: where they can be, and their memory fits"
    )
    tp_comm_overlap: bool = option(
        False,
        "tensor-parallel transfers of the trained model run beside its products; needs Transformer Engine and "
        "parallel.sequence",
        decides=FREE,
    )
    start_from: str | None = option(
        None,
        "run folder, or one of its checkpoints/step_…, of another output to begin with, with other options "
        "(docs/continuing.md)",
        path=True,
    )
    start_with: str = option(
        "everything",
        "start_from: everything goes on (weights, moments, step) on the same samples, or the weights alone begin with step 1",
        ("everything", "weights"),
        when=beside("trainer.start_from"),
    )
    stop_after: int | None = option(
        None,
        "validate, save and end after so many of the steps; the same command with more, or without it, goes on",
        decides=FREE,
        when=Effect(_stops_no_sooner),
    )
    save_interval: int = option(100, "steps between checkpoints", decides=FREE)
    keep_last: int = option(2, "newest checkpoints to keep", decides=FREE)
    keep_best: bool = option(
        False, "save at the lowest validation loss so far, and keep that checkpoint too", decides=FREE
    )
    publish: str = option(
        "last", "which checkpoint becomes output/model; best needs keep_best=true", ("last", "best"), decides=PUBLISHED
    )
    checkpoint_format: str = option(
        "fully_reshardable",
        "optimizer state: fully_reshardable continues in any layout; dp_reshardable copies nothing to the CPU, for frequent "
        "saves, and continues in the same tensor and pipeline sizes only",
        ("fully_reshardable", "dp_reshardable"),
        decides=FREE,
    )
    async_save: bool = option(
        False, "train on while a checkpoint is written, from a copy of this rank's state in CPU memory", decides=FREE
    )
    parallel_save: bool = option(
        True, "data-parallel ranks share out the writing of what all of them have", decides=FREE
    )
    parallel_load: bool = option(
        False,
        "data-parallel ranks read a share each and exchange it, rather than each of them everything",
        decides=FREE,
    )
    time_limit_minutes: float | None = option(
        None,
        "save and end with exit status 75 once so many minutes have passed since the start of the command",
        decides=FREE,
    )
    validation_interval: int = option(
        100,
        "steps between validations; 0 for none before the end",
        decides=FREE,
        when=beside("trainer.validation_samples"),
    )
    validation_samples: int = option(64, "samples of a validation; 0 for none", decides=SAMPLES)


@dataclass
class DdpConfig:
    """Megatron's data parallelism: when gradients are reduced and weights gathered. The sums are the same."""

    overlap_grad_reduce: Any = switch(
        "reduce gradients bucket by bucket while the backward pass runs; auto: on GPUs with data parallelism"
    )
    overlap_param_gather: Any = switch(
        "gather weights bucket by bucket while the next forward pass runs; auto: with overlap_grad_reduce"
    )
    bucket_size: int | None = option(None, "parameters of a bucket; Megatron's choice if not given", decides=FREE)
    grad_reduce_in_fp32: bool = option(True, "accumulate and reduce gradients in float32, false: in the model's dtype")


# Steps of warm-up, where nobody says, of runs that have twice as many.
WARMUP_STEPS = 40


def _never_warm(config: Any) -> str | None:
    """That a run ends within its warm-up."""
    optim, steps = config.optim, _steps_of(config)
    warmup = optim.warmup_steps or 0
    if optim.warmup_tokens is not None:
        warmup = math.ceil(optim.warmup_tokens / tokens_per_step(config))
    if warmup < steps:
        return None
    rate = "never reaches" if warmup > steps else "has in its last step alone"
    return f"the run ends after {steps} steps, and {warmup} are its warm-up: it {rate} optim.lr={optim.lr:g}"


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = option(1e-4, "peak learning rate")
    min_lr: float = option(
        1e-5, "learning rate at the end", when=only_with("optim.schedule", "cosine", "linear", "wsd")
    )
    warmup_steps: int | None = option(
        None,
        "steps of linear warm-up; 40 if not given, or half of the steps where those are fewer than 80",
        when=(without("optim.warmup_tokens"), Effect(_never_warm)),
    )
    warmup_tokens: float | None = option(
        None, "tokens of linear warm-up, in place of warmup_steps", when=Effect(_never_warm)
    )
    schedule: str = option(
        "cosine",
        "after the warm-up: decay to the end, none, or none but at the end (wsd)",
        ("cosine", "linear", "constant", "wsd"),
    )
    decay_share: float = option(
        0.2,
        "wsd: share of the steps that the last decay takes",
        when=(only_with("optim.schedule", "wsd"), without("optim.decay_steps", "optim.decay_tokens")),
    )
    decay_steps: int | None = option(
        None, "wsd: steps of the last decay, in place of decay_share", when=only_with("optim.schedule", "wsd")
    )
    decay_tokens: float | None = option(
        None, "wsd: tokens of the last decay, in place of decay_share", when=only_with("optim.schedule", "wsd")
    )
    decay_shape: str = option(
        "1-sqrt", "wsd: how the last decay falls", ("1-sqrt", "linear"), when=only_with("optim.schedule", "wsd")
    )
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (norms and biases have none)")
    state_precision: str = option(
        "fp32",
        "both moments: fp32, or of bf16 models bf16, which saves 4 of the optimizer's 12 bytes a parameter and needs Transformer "
        "Engine",
        ("fp32", "bf16"),
    )
    decay_embeddings: bool = option(
        True, "weight decay of the embedding and output matrices too", when=beside("optim.weight_decay")
    )
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    clip_grad: float = option(1.0, "largest gradient norm; 0 for no clipping")


def _window_never_full(config: Any) -> str | None:
    window, steps = config.guard.window, _steps_of(config)
    if window < steps:
        return None
    return f"no step is compared before guard.window={window}, and the run has {steps}"


@dataclass
class GuardConfig:
    """The loss spike guard: steps that are not taken."""

    enabled: bool = option(True, "skip steps that spike; false: take all, and end with a loss that is not finite")
    loss_factor: float = option(
        3.0,
        "skip a loss above so many times the running median; 0: unless not finite",
        when=(beside("guard.enabled"), Effect(_window_never_full)),
    )
    grad_norm_factor: float = option(
        10.0,
        "the same for the gradient norm before clipping",
        when=(beside("guard.enabled"), Effect(_window_never_full)),
    )
    window: int = option(
        64,
        "steps of the running median; no step is compared before there are so many",
        when=(
            beside("guard.enabled"),
            beside("guard.loss_factor", "guard.grad_norm_factor"),
            Effect(_window_never_full),
        ),
    )
    stop_after: int = option(10, "end the run after so many skipped steps in a row", when=beside("guard.enabled"))


@dataclass
class LoggerConfig:
    """Where metrics go, beside metrics.jsonl in the output folder."""

    wandb: str = option("auto", "auto: online if logged in, else offline", ("auto", "online", "offline", "disabled"))
    project: str = option("minitron", "wandb project", when=only_with("logger.wandb", "auto", "online", "offline"))
    name: str | None = option(
        None,
        "wandb run name; the output folder's name if not given",
        when=only_with("logger.wandb", "auto", "online", "offline"),
    )
    interval: int = option(1, "steps between lines of metrics, and between measurements that only inform")


@dataclass
class ImportanceOptions:
    """How activations become scores (arXiv 2407.14679, section 2.2)."""

    sequence: str = option("mean", "aggregation over the tokens of a sample", ("mean", "l2", "variance"))
    batch: str = option("l2", "aggregation over the samples", ("mean", "l2", "variance"))
    heads: str = option(
        "per_token",
        "norm of a head's channels: of each token, or of their scores (NVIDIA's code)",
        ("per_token", "per_channel"),
    )


@dataclass
class TargetConfig:
    """The pruned model's sizes; what is not given stays."""

    num_layers: int | None = option(None, "layers to keep, by Block Influence or by layers=")
    hidden_size: int | None = option(None, "hidden channels to keep")
    ffn_hidden_size: Any = option(
        None,
        "feed-forward neurons to keep: one size, or a list with one a kept layer (no Hugging Face export then)",
        whole=True,
    )
    num_attention_heads: int | None = option(None, "query heads to keep in each layer")
    num_query_groups: int | None = option(None, "key-value groups to keep in each layer")
    vocab_size: int | None = option(
        None, "tokens to keep, by frequency in the calibration data; cuts the tokenizer too"
    )


def _no_layer_chosen(config: Any) -> str | None:
    """That a pruning chooses no layers; a search always does."""
    if not hasattr(config, "drop_layers"):
        return None
    if config.drop_layers:
        return "drop_layers= names the layers that go"
    return None if config.target.num_layers is not None else "no layers go: it is for target.num_layers="


@dataclass
class PruneOptions:
    """How heads, groups and layers go."""

    heads: str = option(
        "drop",
        "query heads: drop the rest, or merge its residual into what stays (arXiv 2407.14679, section 2.3)",
        ("drop", "merge"),
    )
    groups: str = option(
        "drop", "key-value groups: keep the best, or average neighbours and regroup their heads", ("drop", "mean")
    )
    judge: str = option(
        "loss", "which judge of layers= names the block that goes", ("bi", "loss", "task"), when=beside("layers")
    )
    keep_last_layers: int = option(
        1, "last layers that stay whatever their score (arXiv 2408.11796)", when=Effect(_no_layer_chosen)
    )


@dataclass
class CalibrationConfig:
    """Tokenised text where a command can do without."""

    path: Any = option(
        None,
        "data folder or blend: to measure scores where none are given, and for the loss right after the cut",
        path=True,
    )
    sequence_length: int | None = option(
        None,
        "tokens of a sample; 1024 if not given, or the positions of the model where those are fewer",
        decides=SAMPLES,
    )


@dataclass
class TeacherParallelConfig:
    """How the teacher is spread over the student's processes, where it is spread otherwise."""

    tensor: int | None = option(None, "tensor-parallel size of the teacher; the student's if not given")
    pipeline: int | None = option(None, "its pipeline stages; the student's if not given")
    sequence: bool | None = option(None, "its sequence parallelism; the student's if not given")
    context: int | None = option(None, "its context-parallel size; the student's if not given")


def _teacher_not_ahead(config: Any) -> str | None:
    """That nothing runs ahead of the student."""
    own = config.distill.teacher_parallel
    if config.parallel.pipeline > 1 or any(getattr(own, f.name) is not None for f in fields(own)):
        return None
    return "it is for parallel.pipeline above 1 or distill.teacher_parallel, and here the teacher runs with each micro-batch"


@dataclass
class DistillOptions:
    """The distillation loss: forward KL of the full softmax unless told otherwise (docs/distillation.md)."""

    loss: str = option(
        "forward_kl",
        "distance of the student's distribution from the teacher's, per token",
        ("forward_kl", "reverse_kl", "jsd", "topk_kl"),
    )
    temperature: float = option(1.0, "softmax temperature of teacher and student")
    jsd_beta: float = option(
        0.5,
        "jsd: the teacher's share of the mixture, between 0 (as forward KL) and 1 (as reverse)",
        when=only_with("distill.loss", "jsd"),
    )
    top_k: int = option(
        1000, "topk_kl: how many of the teacher's most probable tokens", when=only_with("distill.loss", "topk_kl")
    )
    top_k_rest: str = option(
        "bucket",
        "topk_kl: the teacher's other tokens are one class (bucket), or left out and the K scaled up (renormalize)",
        ("bucket", "renormalize"),
        when=only_with("distill.loss", "topk_kl"),
    )
    cross_entropy: float = option(0.0, "weight of the labels' cross entropy, added to the distance")
    teacher_fp8: str = option(
        "none",
        "teacher's layers in FP8, its weights in nothing else; tensorwise is per-tensor, blockwise finer",
        FP8_FROZEN,
    )
    teacher_head_fp8: bool = option(False, "teacher's logits by an FP8 product, its output matrix in FP8 too")
    teacher_offload: bool = option(
        False, "teacher's layers in CPU memory, each copied to the GPU while the one before it computes", decides=FREE
    )
    logits_mib: int = option(
        1024,
        "MiB of logits of student and teacher that a rank holds at once; fewer take less memory and more time",
        decides=FREE,
    )
    intermediate: float = option(
        0.0, "weight of the losses on intermediate states, at 1 as large as that on logits: for strong cuts of depth"
    )
    intermediate_layers: Any = option(
        [[-3, -3]],
        "intermediate: layers to compare, [[student,teacher],…], from 0, or from the end with -1",
        when=beside("distill.intermediate"),
        whole=True,
    )
    intermediate_embeddings: bool = option(
        True, "intermediate: compare the embeddings too", when=beside("distill.intermediate")
    )
    cache: str | None = option(
        None,
        "answers of the teacher on disk (the output of cache_teacher), which then need not run; needs topk_kl",
        path=True,
    )
    teacher_ahead: int | None = option(
        None,
        "with a pipeline or teacher_parallel: micro-batches that the teacher runs ahead of the student at most; all of a "
        "step if not given, which is fastest",
        decides=FREE,
        when=Effect(_teacher_not_ahead),
    )
    teacher_parallel: TeacherParallelConfig = group(TeacherParallelConfig, decides=FREE)


@dataclass
class HardwareConfig:
    """The GPUs of a cluster and what connects them (conf/cluster); what is not given is that of the GPU's preset."""

    gpu: str | None = option(None, "kind of its GPUs; this machine's, else h100", ("a100", "h100", "h200", "gb200"))
    gpus_per_node: int | None = option(None, "GPUs of a node; 0 for nodes without")
    nvlink_gpus: int | None = option(None, "GPUs that reach one another over NVLink")
    memory_gib: float | None = option(None, "memory of a GPU, GiB")
    bf16_tflops: float | None = option(None, "peak of dense bfloat16 products, TFLOP/s")
    fp8_tflops: float | None = option(None, "peak of dense FP8 products, TFLOP/s, where there are some")
    fp32_tflops: float | None = option(None, "peak of float32 arithmetic without tensor cores, TFLOP/s")
    memory_gb_s: float | None = option(None, "memory bandwidth of a GPU, GB/s")
    nvlink_gb_s: float | None = option(None, "NVLink bandwidth of a GPU in one direction, GB/s")
    network_gb_s: float | None = option(None, "network bandwidth of a GPU in one direction, GB/s")
    host_gb_s: float | None = option(None, "bandwidth from CPU memory to a GPU, GB/s")
    launch_ms: float | None = option(
        None, "milliseconds that a node's processor takes to launch a layer's forward pass, as measured"
    )
    efficiency: float | None = option(None, "share of the peak that a step reaches on one GPU, as measured")


# What several commands need.
_MODEL = Need(("model",), "model=… (model folder)")
_STEPS = Need(("trainer.steps", "trainer.tokens"), "trainer.steps=… or trainer.tokens=… (how long)")
# Of commands that run no model.
_RUNS_NO_MODEL = ("parallel", "device", "precision")


@dataclass
class CommandConfig:
    """What every command has."""

    # Without types, so that they are no options. Whether the result is times, which depend on how the command runs; which of
    # the options below the command does not use; and what it needs beside those that are required.
    measures_time = False
    unread = ()
    needs: ClassVar[tuple[Need, ...]] = ()

    output: str = option(REQUIRED, "folder to write; appears whole or not at all", decides=FREE, path=True)
    parallel: ParallelConfig = group(ParallelConfig, decides=FREE)
    seed: int = option(1234, "seed of everything that is drawn", decides=SAMPLES)
    device: str = option(
        "auto", "where models run: auto takes CUDA where there is some", ("auto", "cuda", "cpu"), decides=FREE
    )
    precision: str = option(
        "auto",
        "what models compute in: auto is the model folder's dtype, on CPUs float32 where products in it are faster",
        ("auto", "bf16", "fp32"),
    )
    resume: bool = option(True, "continue, or keep, an output made by the same options; false refuses it", decides=FREE)
    verify: bool = option(
        False,
        "read every weight of the model folders, and all data, first, on every node, and compare with their digests",
        decides=FREE,
    )
    dry_run: bool = option(False, "check everything, say what would be done, write nothing", decides=FREE)


@dataclass
class DemoConfig(CommandConfig):
    """SmolLM2-135M to a student of 60 % of its size, on CPUs, end to end."""

    unread = (*_RUNS_NO_MODEL, "verify")

    output: str = option("outputs/demo", "folder of all stages", decides=FREE, path=True)
    minutes: float = option(15, "most minutes to plan for: a slower machine does less", when=without("short"))
    short: bool = option(False, "a short form that shows that every stage works")


@dataclass
class Smollm2Config(CommandConfig):
    """SmolLM2-135M out of its Python package as a Hugging Face folder."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")


@dataclass
class ImportHfConfig(CommandConfig):
    """A Hugging Face folder into a model folder."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")

    hf: str = option(REQUIRED, "Hugging Face model folder with safetensors weights", path=True)
    ignore_keys: list[str] = option(
        [], "keys of config.json that are not known, and change nothing of what the model computes"
    )


@dataclass
class ImportNemoConfig(CommandConfig):
    """A NeMo 2 checkpoint folder, or a .nemo archive, into a model folder."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")

    nemo: str = option(
        REQUIRED, "NeMo 2 checkpoint folder, .nemo archive, or folder that one was unpacked in", path=True
    )
    tokenizer: str | None = option(
        None, "folder with a Hugging Face tokenizer, instead of the checkpoint's own", path=True
    )
    vocab_size: int | None = option(
        None, "tokens, where further rows of the embedding are padding; all rows if not given"
    )
    ignore_keys: list[str] = option(
        [], "keys of its config that are not known, and change nothing of what the model computes"
    )


@dataclass
class RandomModelConfig(CommandConfig):
    """A model folder with random weights of a preset's shape: for rehearsals and benchmarks."""

    unread = (*_RUNS_NO_MODEL, "verify")
    needs = (Need(("model",), "model=… (a preset of conf/model)"),)

    model: ModelConfig = group(ModelConfig)


@dataclass
class PrepareDataConfig(CommandConfig):
    """Text into Megatron's indexed datasets, with a train and a validation split."""

    unread = (*_RUNS_NO_MODEL, "verify")
    needs = (_MODEL,)

    input: Any = option(
        REQUIRED,
        "text file, .jsonl or .ndjson (also .gz, .bz2, .xz, .zst), .parquet, a folder of them, a pattern in quotes "
        "('texts/*.jsonl'), or a list of those",
        path=True,
    )
    model: ModelConfig = group(ModelConfig)
    validation_fraction: float = option(0.05, "share of the documents that goes to the validation split")
    text_key: str = option("text", "key of the text in each JSON line, or Parquet column")
    end_of_document: str = option(
        "auto",
        "special token that ends each document, as '<|endoftext|>'; auto: the tokenizer's end of sequence, or its end of text "
        "where that ends a turn of a chat",
    )
    begin_of_document: str = option(
        "auto",
        "special token that opens each document, or none; auto: the BOS, where the tokenizer opens a text with it",
    )
    special_tokens: str = option(
        "text",
        "what a special token's string in the text is, such as </s>: text, spelled out, or the token",
        ("text", "token"),
    )
    workers: int | None = option(
        None,
        "processes that tokenise, to the same bytes; if not given, as many as have a core and 8 MB of input, 32 at most",
        decides=FREE,
    )


@dataclass
class AdoptDataConfig(CommandConfig):
    """Datasets that Megatron-LM's tools have written (.bin, .idx), as a data folder; nothing is copied on one file system."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")
    needs = (_MODEL,)

    train: str = option(
        REQUIRED, "prefix of the train split: PREFIX.bin and PREFIX.idx, whole documents with --append-eod", path=True
    )
    validation: str = option(REQUIRED, "prefix of the validation split", path=True)
    model: ModelConfig = group(ModelConfig)


@dataclass
class ImportanceConfig(CommandConfig):
    """Activation importance of ffn neurons, heads, hidden channels and layers."""

    needs = (_MODEL,)

    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    samples: int = option(1024, "calibration samples of data.sequence_length tokens")
    first_sample: int = option(0, "number of the first sample: runs on parts of the data merge with merge_scores")
    trainer: BatchConfig = group(BatchConfig)
    importance: ImportanceOptions = group(ImportanceOptions)


@dataclass
class LayersConfig(CommandConfig):
    """Which layers can go: Block Influence, loss and accuracy without each block of consecutive layers."""

    needs = (_MODEL,)

    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    block: Any = option(
        1, "consecutive layers to remove: a number, or a list such as [1,2,16] measured in one pass", whole=True
    )
    samples: int = option(64, "at most so many samples of data.sequence_length tokens")
    split: str = option("validation", "which split of the data", ("train", "validation"))
    questions: str | None = option(
        None, 'JSONL of {"context": …, "choices": […], "answer": n}; see data/questions.py', path=True
    )
    tasks: list[str] = option(
        [], "multiple-choice tasks of lm-evaluation-harness by name, or paths of task files", path=True
    )
    fewshot: int | None = option(
        None, "examples before each question of tasks=; the task's own number if not given", when=beside("tasks")
    )
    limit: int | None = option(
        None,
        "at most so many questions of questions= and of each task; all if not given",
        when=beside("questions", "tasks"),
    )
    normalization: str = option(
        "none",
        "what a choice's log-likelihood is divided by: its length as in acc_norm, acc_bytes",
        ("none", "characters", "bytes"),
        when=beside("questions", "tasks"),
    )
    rows: int = option(
        1,
        "samples of data.sequence_length tokens that run through a layer at once; more need more memory",
        decides=FREE,
    )
    trainer: BatchConfig = group(BatchConfig)


@dataclass
class MergeScoresConfig(CommandConfig):
    """Scores of several runs on parts of the data into the scores of the whole."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")
    needs = (Need(("scores",), "scores=[…,…] (scores folders, two or more)"),)

    scores: list[str] = option(
        [], "scores folders of the same model, aggregation and sequence length, two or more", path=True
    )


_LIMITS = tuple(
    f"budget.{name}"
    for name in "parameters non_embedding_parameters memory_gib flops_per_token latency_ms tokens_per_second".split()
)
_CACHE = "budget.memory_gib"


@dataclass
class BudgetConfig:
    """What a pruned model may cost at most; one of the six limits, or several at once."""

    parameters: float | None = option(None, "parameters, embeddings included")
    non_embedding_parameters: float | None = option(None, "parameters without embeddings and output matrix")
    memory_gib: float | None = option(None, "GiB of weights, and of the key-value cache of budget.batch full sequences")
    flops_per_token: float | None = option(None, "operations of a token's forward pass in budget.context tokens")
    latency_ms: float | None = option(None, "milliseconds, estimated from the shapes of budget.table")
    tokens_per_second: float | None = option(
        None, "at least so many tokens a second, estimated likewise; in place of latency_ms"
    )
    table: str | None = option(
        None,
        "CSV of measured shapes of this architecture: the sizes that vary, and latency_ms or tokens_per_second (docs/search.md)",
        path=True,
    )
    at_least: float = option(
        0.9, "share of a limit that a shape must use, so that small ones are not listed", when=beside(*_LIMITS)
    )
    batch: int = option(1, "memory_gib: sequences in the key-value cache", when=beside(_CACHE))
    context: int = option(
        4096,
        "tokens of a sequence in the key-value cache, and that a token attends over at most",
        when=beside(_CACHE, "budget.flops_per_token"),
    )
    weight_bytes: float = option(
        2.0, "memory_gib: bytes of a weight: 2 in bf16, 1 in FP8, 0.5 in 4 bits", when=beside(_CACHE)
    )
    cache_bytes: float = option(2.0, "memory_gib: bytes of a number in the key-value cache", when=beside(_CACHE))


@dataclass
class SpaceConfig:
    """The sizes to try, each a list or {from,to,step}; if not given, from the model's own down to half of it."""

    num_layers: Any = option(None, "layers; by default every number, with layers= those that it can judge", whole=True)
    hidden_size: Any = option(None, "hidden channels; by default multiples of space.multiple", whole=True)
    ffn_hidden_size: Any = option(
        None, "feed-forward neurons; by default multiples of space.multiple and space.tensor", whole=True
    )
    num_attention_heads: Any = option(None, "query heads; by default multiples of space.tensor", whole=True)
    num_query_groups: Any = option(None, "key-value groups; by default multiples of space.tensor", whole=True)
    multiple: int | None = option(
        None,
        "hidden_size and ffn_hidden_size must be multiples of it, as tensor cores like; if not given the largest power of two, "
        "up to 128, with 8 steps from the model's sizes to half of them",
    )
    tensor: int | None = option(
        None,
        "tensor-parallel size that the pruned model must divide by: neurons, heads and groups; if not given the largest of 8, 4, "
        "2 and 1 that the model itself divides by",
    )
    exportable: bool = option(
        True,
        "leave out what transformers 5 refuses to load as a Llama: a hidden_size that is no multiple of the query heads; it "
        "would be exported as a Mistral, which computes the same",
    )


@dataclass
class RankWeightsConfig:
    """How much what is cut of an axis counts."""

    layers: float = option(1.0, "weight of what the cut layers are worth")
    hidden: float = option(1.0, "weight of what the cut hidden channels are worth")
    ffn: float = option(1.0, "weight of what the cut neurons are worth")
    heads: float = option(1.0, "weight of what the cut query heads and key-value groups are worth")


@dataclass
class RankConfig:
    """How scores become an order of shapes (docs/search.md)."""

    weights: RankWeightsConfig = group(RankWeightsConfig)
    power: float = option(
        2.0, "channels and heads are worth their score to this power: 2 for activations, 1 if importance.batch=variance"
    )


@dataclass
class SearchConfig(CommandConfig):
    """Shapes within a budget, ordered by the importance of what each would cut; targets for prune."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")
    needs = (
        _MODEL,
        Need(("scores", "dry_run"), "scores=… (scores folder, the output of importance)"),
        Need(("budget",), "budget.parameters=… (or another limit)"),
    )

    model: ModelConfig = group(ModelConfig)
    scores: str | None = option(None, "scores folder (the output of importance); a dry run can do without", path=True)
    layers: str | None = option(
        None, "layer analysis (the output of layers): prices blocks by it, rather than by scores", path=True
    )
    budget: BudgetConfig = group(BudgetConfig)
    space: SpaceConfig = group(SpaceConfig)
    rank: RankConfig = group(RankConfig)
    prune: PruneOptions = group(PruneOptions)
    keep: int = option(10, "best shapes to write targets for")


@dataclass
class PruneConfig(CommandConfig):
    """Scores and a target, or a plan, into a smaller model."""

    needs = (
        _MODEL,
        Need(
            ("scores", "data.path", "plan", "drop_layers", "layers"),
            "scores=… (the output of importance) or data.path=… (to measure them first)",
            always=False,
        ),
        Need(
            ("target", "plan", "drop_layers"),
            "target=… (a preset, a file, or target.hidden_size=… and its like)",
            always=False,
        ),
    )

    model: ModelConfig = group(ModelConfig)
    scores: str | None = option(
        None, "scores folder (the output of importance); measured first if not given", path=True
    )
    layers: str | None = option(
        None,
        "layer analysis (the output of layers): target.num_layers drops its best block",
        when=without("drop_layers", refused=True),
        path=True,
    )
    plan: str | None = option(
        None, "plan.yaml of an earlier pruning, perhaps edited; stands for scores and target", path=True
    )
    target: TargetConfig = group(TargetConfig)
    prune: PruneOptions = group(PruneOptions, when=without("plan"))
    drop_layers: list[int] = option([], "layers to drop by number, from 0, rather than by importance")
    data: CalibrationConfig = group(CalibrationConfig)
    samples: int = option(
        1024, "calibration samples, where scores are measured first", when=(without("scores"), without("plan"))
    )
    loss_samples: int = option(
        0, "validation samples for the loss before and right after the cut, with and without merged heads"
    )
    trainer: BatchConfig = group(BatchConfig)
    importance: ImportanceOptions = group(ImportanceOptions, when=(without("scores"), without("plan")))


@dataclass
class TrainingConfig(CommandConfig):
    """What every command that trains has."""

    data: TrainingDataConfig = group(TrainingDataConfig)
    trainer: TrainerConfig = group(TrainerConfig)
    optim: OptimConfig = group(OptimConfig)
    guard: GuardConfig = group(GuardConfig)
    ddp: DdpConfig = group(DdpConfig)
    logger: LoggerConfig = group(LoggerConfig, decides=FREE)
    cluster: HardwareConfig = group(HardwareConfig, decides=FREE)


@dataclass
class CorrectTeacherConfig(TrainingConfig):
    """The teacher is fine-tuned on the data of the distillation first (arXiv 2408.11796, section 2)."""

    needs = (_MODEL, _STEPS)

    model: ModelConfig = group(ModelConfig)


@dataclass
class DistillConfig(TrainingConfig):
    """A student learns from its teacher."""

    needs = (
        Need(("teacher", "distill.cache"), "teacher=… (model folder)"),
        Need(("student",), "student=… (model folder)"),
        _STEPS,
    )

    teacher: ModelConfig = group(ModelConfig)
    student: ModelConfig = group(ModelConfig)
    distill: DistillOptions = group(DistillOptions)


@dataclass
class CacheDataConfig(DataConfig):
    """Tokenised text that a student is going to learn from."""

    reset_attention_mask: bool = option(False, "as in the distillation: tokens see their own document only")
    max_epochs: float = option(1.0, "as in the distillation: how often the data may be read", decides=FREE)


@dataclass
class CacheRunConfig:
    """Which samples: those of a distillation with the same options."""

    steps: int | None = option(None, "optimizer steps of the distillation (give steps or tokens)")
    tokens: float | None = option(None, "tokens of the distillation (give steps or tokens)")
    global_batch_size: int = option(8, "samples of an optimizer step of the distillation", decides=SAMPLES)
    validation_samples: int = option(64, "samples of its validation; 0 for none", decides=SAMPLES)
    micro_batch_size: int = option(1, "samples that run through the teacher at once", decides=FREE)


@dataclass
class CacheOptions:
    """What is kept of the teacher's answer to each token."""

    top_k: int = option(1000, "log probabilities of so many of the most probable tokens, and the mass of the rest")
    temperature: float = option(1.0, "softmax temperature of the distillation")


@dataclass
class CacheTeacherConfig(CommandConfig):
    """The teacher's most probable tokens for every sample of a distillation, written once."""

    needs = (Need(("teacher",), "teacher=… (model folder)"), _STEPS)

    teacher: ModelConfig = group(ModelConfig)
    data: CacheDataConfig = group(CacheDataConfig)
    trainer: CacheRunConfig = group(CacheRunConfig)
    distill: CacheOptions = group(CacheOptions)
    chunk_samples: int = option(64, "samples of a file: what a killed run does again at most, and what a process holds")


def warmup_of(optim: OptimConfig, steps: int) -> int:
    """Steps of warm-up of a run of so many steps, tokens aside."""
    return min(WARMUP_STEPS, steps // 2) if optim.warmup_steps is None else optim.warmup_steps


def number_of_steps(cfg: TrainingConfig | CacheTeacherConfig) -> int:
    """Optimizer steps of a run, or of the one that a cache is for. Raises UserError unless one of steps and tokens is given."""
    trainer = cfg.trainer
    if (trainer.steps is None) == (trainer.tokens is None):
        raise UserError("give either trainer.steps= or trainer.tokens=")
    if trainer.steps is not None:
        return trainer.steps
    return math.ceil(trainer.tokens / tokens_per_step(cfg))


def tokens_per_step(cfg: TrainingConfig | CacheTeacherConfig) -> int:
    """Tokens of an optimizer step."""
    return cfg.trainer.global_batch_size * cfg.data.sequence_length


def tokens_of_run(cfg: TrainingConfig | CacheTeacherConfig) -> int:
    """Tokens that all steps take together. Raises UserError as number_of_steps."""
    return number_of_steps(cfg) * tokens_per_step(cfg)


@dataclass
class EvaluateDataConfig(DataConfig):
    """Tokenised text for the perplexity."""

    path: Any = option(None, "data folder or blend, for loss, perplexity and teacher=", path=True)


@dataclass
class EvaluateConfig(CommandConfig):
    """Perplexity of a model on a data folder, its KL divergence to a teacher there, and tasks of lm-evaluation-harness."""

    needs = (
        Need(("model", "hf"), "model=… (model folder) or hf=… (Hugging Face folder)"),
        Need(("data.path", "tasks"), "data.path=… (for perplexity) or tasks=…, or both"),
    )

    parallel: ParallelConfig = group(ParallelConfig, decides=FREE, when=without("hf"))
    model: ModelConfig = group(ModelConfig)
    hf: str | None = option(
        None,
        "in place of model=: a Hugging Face folder, judged on data.path= and tasks= by transformers, in one process",
        path=True,
    )
    teacher: ModelConfig = group(
        ModelConfig, "model folder that model= is compared with on the data: loss of both, KL divergence, agreement"
    )
    data: EvaluateDataConfig = group(EvaluateDataConfig, when=beside("data.path"))
    split: str = option("validation", "which split", ("train", "validation"), when=beside("data.path"))
    samples: int | None = option(
        None, "at most so many windows of data.sequence_length tokens; all if not given", when=beside("data.path")
    )
    tasks: Any = option(
        None,
        "tasks or groups of lm-evaluation-harness, or paths of task files: [name,…], or with examples {name: 5, …}",
        path=True,
    )
    fewshot: int | None = option(
        None,
        "examples before each question of tasks that tasks= gives no number for; the task's own if not given",
        when=beside("tasks"),
    )
    limit: int | None = option(None, "at most so many questions of each task; all if not given", when=beside("tasks"))
    prompts: int = option(
        16, "tasks that generate: prompts that a data-parallel rank answers at once", decides=FREE, when=beside("tasks")
    )
    confirm_run_unsafe_code: bool = option(
        False,
        "run what the model writes, for tasks that judge it so, such as mbpp, and functions that your own task files name",
        when=beside("tasks"),
    )
    trainer: BatchConfig = group(BatchConfig)


@dataclass
class ExportHfConfig(CommandConfig):
    """A model folder into a Hugging Face folder."""

    unread = (*_RUNS_NO_MODEL, "seed")
    needs = (_MODEL,)

    model: ModelConfig = group(ModelConfig)
    max_shard_gb: float = option(5.0, "largest file of weights, in GB (10^9 bytes)")
    results: list[str] = option([], "evaluations of this model (outputs of evaluate) for its card", path=True)
    base_model: str | None = option(None, "for the card: the source's name on Hugging Face; its cache's if not given")
    license: str | None = option(None, "for the card: Hugging Face's identifier of the license, as llama3.1")


@dataclass
class ExportMegatronConfig(CommandConfig):
    """A model folder into a Megatron-LM checkpoint, with the arguments that its pretrain_gpt.py takes."""

    unread = (*_RUNS_NO_MODEL, "seed")
    needs = (_MODEL,)

    model: ModelConfig = group(ModelConfig)


@dataclass
class ExportNemoConfig(CommandConfig):
    """A model folder into a NeMo 2 checkpoint folder."""

    unread = (*_RUNS_NO_MODEL, "seed")
    needs = (_MODEL,)

    model: ModelConfig = group(ModelConfig)


@dataclass
class VllmConfig:
    """engine=vllm."""

    python: str | None = option(None, "python of an environment that has vLLM; this one if not given")


@dataclass
class TensorrtLlmConfig:
    """engine=tensorrt_llm: trtllm-bench, where it is on the PATH, else in docker."""

    image: str = option("nvcr.io/nvidia/tensorrt-llm/release:1.2.1", "image that has trtllm-bench")


@dataclass
class ThroughputConfig(CommandConfig):
    """Tokens a second of models that generate, in several engines, and over those of the first model."""

    measures_time = True
    unread = ("verify",)
    needs = (Need(("models",), "models={name: …} (folders by name)"),)

    models: Any = option(
        {},
        "what to measure, {name: folder, …}: model folders or Hugging Face ones; the first is the reference",
        path=True,
    )
    engine: list[str] = option(
        ["megatron", "transformers"],
        "engines: megatron, transformers, vllm, tensorrt_llm; forms they need are made on the way",
    )
    input_length: int | None = option(
        None, "tokens of a prompt; 1024 if not given, or what output_length leaves of the models' positions"
    )
    output_length: int = option(128, "tokens that follow it, whatever they are")
    batch: list[int] = option([1, 8, 32], "prompts at once, each number measured on its own")
    repeats: int = option(3, "timed passes, of which the median counts")
    warmup: int = option(1, "passes before them")
    start: str = option("minitron --nproc-per-node {processes}", "what starts Megatron in several processes")
    vllm: VllmConfig = group(VllmConfig, when=including("engine", "vllm"))
    tensorrt_llm: TensorrtLlmConfig = group(TensorrtLlmConfig, when=including("engine", "tensorrt_llm"))


@dataclass
class RoundConfig:
    """A round of a chain: its name and teacher, and each stage's options where they differ from the chain's."""

    name: str = option(REQUIRED, "folder of the round in the chain's output")
    teacher: str = option(
        "source", "who teaches: the model that the round prunes, or the first one", ("source", "first")
    )
    importance: Any = option({}, "options of importance")
    prune: Any = option({}, "options of prune")
    distill: Any = option({}, "options of distill")
    evaluate: Any = option({}, "options of evaluate")


@dataclass
class ChainDataConfig:
    """Tokenised text for every stage of a chain."""

    path: Any = option(
        REQUIRED,
        "data folder (the output of prepare_data), or a blend: [weight,folder,weight,folder,…]",
        decides=SAMPLES,
        path=True,
    )
    sequence_length: int | None = option(
        None,
        "tokens of a sample in every stage; 1024 if not given, or the positions of the model where those are fewer",
    )
    max_epochs: float = option(1.0, "how often a round's distillation may read the data", decides=FREE)


@dataclass
class CompressDataConfig(ChainDataConfig):
    """Tokenised text, unless input= is there to be tokenised."""

    path: Any = option(
        None,
        "data folder (the output of prepare_data), or a blend: [weight,folder,weight,folder,…]; input= in its place",
        path=True,
    )
    max_epochs: float | None = option(
        None, "how often a distillation may read the data; 1 if not given, or 4 where steps are chosen by the text"
    )


@dataclass
class CompressConfig(CommandConfig):
    """A model and text into a smaller model, exported, with a report: in one round to a budget or target, or in given rounds."""

    needs = (
        Need(("hf", "model"), "hf=… (Hugging Face folder) or model=… (model folder)"),
        Need(("input", "data.path", "dry_run"), "input=… (text) or data.path=… (data folder)"),
        Need(
            ("budget", "target", "rounds", "prune"),
            "budget.parameters=… (search finds the shape) or target=… or chain=… (presets, which --help lists)",
        ),
    )

    hf: str | None = option(None, "Hugging Face folder, in place of model=: imported first", path=True)
    input: Any = option(None, "text, in place of data.path=: tokenised first, as input= of prepare_data", path=True)
    model: ModelConfig = group(ModelConfig, "model folder, or a preset in a dry run")
    data: CompressDataConfig = group(CompressDataConfig)
    budget: BudgetConfig = group(BudgetConfig)
    target: TargetConfig = group(TargetConfig)
    rounds: Any = option([], "rounds in order, each {name, teacher, importance, prune, distill, evaluate}; or chain=")
    prepare_data: Any = option({}, "options of prepare_data, such as text_key")
    importance: Any = option({}, "options of importance in every round, and processes")
    search: Any = option({}, "options of search, such as space.num_layers")
    prune: Any = option({}, "options of prune in every round, and processes")
    distill: Any = option({}, "options of distill in every round, and processes")
    evaluate: Any = option({}, "options of evaluate in every round, and processes", when=only_with("perplexity", True))
    export_hf: Any = option({}, "options of export_hf, such as license")
    perplexity: bool = option(True, "evaluate the student of every round, and its teacher beside it")
    export: bool = option(True, "export the last student as a Hugging Face folder, and write a report")
    processes: int | None = option(
        None, "processes of a stage, over all nodes; as many as this machine has GPUs if not given, or one"
    )
    start: str = option("minitron --nproc-per-node {processes}", "what starts a stage of several processes")
    cluster: HardwareConfig = group(HardwareConfig)


@dataclass
class HalvingConfig:
    """Which candidates are trained how long: successive halving (arXiv 1502.07943)."""

    factor: int = option(
        2,
        "of the candidates that are judged together one in so many goes on, rounded up; 1: all are trained to the end",
    )
    steps: Any = option(
        None,
        "steps after which candidates are judged, as [100,200], before the end; if not given the last steps divided by factor, "
        "as often as it takes to leave one",
        whole=True,
    )
    keep_losers: bool = option(False, "keep the checkpoints of candidates that are out")


@dataclass
class DistillCandidatesConfig(CommandConfig):
    """A short distillation of each shape that search found, the hopeless ones stopped early; the best by validation KL."""

    found: str = option(REQUIRED, "shapes to try (the output of search)", path=True)
    ranks: Any = option(None, "which of them, by their rank, as [1,3,7]; all that are ranked if not given", whole=True)
    data: ChainDataConfig = group(ChainDataConfig)
    cache: Any = option(
        True,
        "true: the teacher answers once, on disk, for all candidates; false: it runs beside each; FOLDER: its answers are there "
        "(the output of cache_teacher)",
        path=True,
    )
    cache_teacher: Any = option({}, "options of cache_teacher, and processes", when=only_with("cache", True))
    prune: Any = option({}, "options of prune, and processes")
    distill: Any = option({}, "options of distill, and processes; trainer.steps is the budget of a candidate")
    halving: HalvingConfig = group(HalvingConfig)
    rung: int | None = option(
        None, "one part alone, for jobs side by side: 0 the teacher's cache, n the n-th rung of candidate="
    )
    candidate: int | None = option(
        None,
        "with rung=: the n-th of the candidates that are still in, best first",
        when=Effect(lambda config: None if config.rung is not None else "it is for rung=, which is not set here"),
    )
    processes: int = option(1, "processes of a stage, over all nodes")
    start: str = option(CompressConfig.start, "what starts a stage of several processes")


@dataclass
class ClusterConfig(HardwareConfig):
    """A cluster: its hardware, what a job on it asks Slurm for, and how python is found on its nodes."""

    gpus_per_node: int = option(8, "GPUs of a node; 0 for nodes without")
    processes_per_node: int | None = option(None, "processes of a node; one a GPU if not given")
    partition: str | None = option(None, "partition; Slurm's default if not given")
    account: str | None = option(None, "account that pays")
    time: str = option("24:00:00", "time limit: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    save_seconds: int = option(300, "seconds before the limit at which a training run saves and is requeued")
    container: str | None = option(None, "image for enroot/pyxis; the environment of activate if not given")
    mounts: list[str] = option(
        [],
        "more mounts of the container, FROM:TO; folders of the command's options are mounted",
        when=beside("cluster.container"),
    )
    activate: str | None = option(
        None, "file to source on every node; .venv/bin/activate of this repository if not given"
    )
    setup: list[str] = option(
        [], "shell lines before the command, such as 'module load cuda' or 'export NCCL_IB_HCA=mlx5'"
    )
    sbatch: list[str] = option([], "more options of sbatch, such as --exclude=node7")


@dataclass
class SubmitConfig(CommandConfig):
    """A command as a Slurm job: checked, written as a script, submitted."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")

    command: Any = option(REQUIRED, "command and its options; best written at the end, after --")
    cluster: ClusterConfig = group(ClusterConfig)
    nodes: int = option(1, "nodes of the job")
    name: str | None = option(None, "name of the job; the command's if not given")
    submit: bool = option(True, "give the script to sbatch; false writes and prints it")


@dataclass
class BenchmarkStepConfig:
    """measure=step: how the distillation is set up; the names are those of distill."""

    micro_batches: int = option(1, "micro-batches of a rank in a step")
    optimizer: bool = option(True, "with the optimizer's step, false: forward and backward alone")
    recompute: str = option("none", "trainer.recompute", ("none", "selective", "full"))
    fp8: str = option("none", "trainer.fp8", FP8_SCALINGS)
    fp8_bf16_layers: int = option(0, "trainer.fp8_bf16_layers")
    teacher_fp8: str = option("none", "distill.teacher_fp8", FP8_FROZEN)
    teacher_head_fp8: bool = option(False, "distill.teacher_head_fp8")
    state_precision: str = option("fp32", "optim.state_precision", ("fp32", "bf16"))
    logits_mib: int = option(1024, "distill.logits_mib")
    cuda_graphs: Any = switch("trainer.cuda_graphs")
    overlap: bool = option(
        False, "ddp.overlap_grad_reduce and overlap_param_gather, with parallel.sequence trainer.tp_comm_overlap too"
    )


@dataclass
class BenchmarkScalingConfig:
    """measure=scaling: the step of measure=step in several layouts, with as much work a GPU in each."""

    layouts: list[Any] = option(
        [{}],
        "options of parallel. a layout, as {tensor: 2, sequence: true} ({}: data-parallel), with teacher: {tensor: 1, …} for a "
        "teacher laid out otherwise, and overlap: true as step.overlap; those that do not divide the processes are left out",
    )


def _of_no_batch(config: Any) -> str | None:
    return (
        f"measure={config.measure} runs no batch"
        if config.measure in ("ceilings", "mistakes", "prune", "cut")
        else None
    )


@dataclass
class BenchmarkConfig(CommandConfig):
    """A measurement on this machine: a table and results.json. benchmark=NAME sets what its documented figures were made with."""

    measures_time = True
    unread = ("verify",)

    measure: str = option(
        "importance",
        "ceilings of the machine; the distillation loss with both heads; a distillation step; it in several layouts; hooks over "
        "a forward pass; cutting files over copying them; cutting in memory; a layer analysis over passes; activations as a dry "
        "run counts them over those kept; forward passes of a model and its target; every command's first mistake and start",
        (
            "ceilings",
            "loss",
            "step",
            "scaling",
            "importance",
            "prune",
            "cut",
            "layers",
            "memory",
            "throughput",
            "mistakes",
        ),
    )
    model: ModelConfig = group(ModelConfig)
    target: TargetConfig = group(
        TargetConfig, when=only_with("measure", "loss", "step", "scaling", "prune", "cut", "throughput")
    )
    step: BenchmarkStepConfig = group(
        BenchmarkStepConfig, decides=ARITHMETIC, when=only_with("measure", "step", "scaling")
    )
    scaling: BenchmarkScalingConfig = group(BenchmarkScalingConfig, when=only_with("measure", "scaling"))
    cluster: HardwareConfig = group(HardwareConfig)
    peers: bool = option(
        True,
        "loss and step: measure other software too, where it is installed (ModelOpt, Liger)",
        when=only_with("measure", "loss", "step"),
    )
    repeats: int = option(5, "measurements, of which the median counts")
    sequence_length: int = option(1024, "tokens of a sample", when=Effect(_of_no_batch))
    micro_batch_size: int = option(1, "samples that run through the model at once", when=Effect(_of_no_batch))


@dataclass
class ReportConfig(CommandConfig):
    """One page about a set of output folders: models, results, curves, what was cut, cost, lineage; and a model card."""

    unread = (*_RUNS_NO_MODEL, "seed", "verify")

    output: str = option(
        REQUIRED, "folder for report.html and report.md; or one file, NAME.html or NAME.md", decides=FREE, path=True
    )
    folders: Any = option(
        REQUIRED,
        "an output folder or one that has some in it at any depth, or several: [outputs/a,outputs/b]",
        path=True,
    )
    student: str | None = option(
        None,
        "model that the page is about: its folder, or its name on the page; by default the last distilled, else the last pruned",
    )
    title: str | None = option(
        None, "heading; by default the model's name and how much of the first model of its lineage it is"
    )


@dataclass
class StatusConfig:
    """How outputs stand: done, running, stopped, failed or diverged; steps, losses, time left, and how to go on."""

    folder: Any = option(
        REQUIRED, "an output, or a folder of outputs, or several; its name may stand alone: status FOLDER"
    )


# Options that name a model: by its folder, or by a preset of conf/model.
MODEL_OPTIONS = ("model", "teacher", "student")


def model_options(config: type) -> list[str]:
    """Those of MODEL_OPTIONS that name a model of a command; `student=` of a report is a name on a page."""
    return [one.name for one in fields(config) if one.name in MODEL_OPTIONS and one.type is ModelConfig]


@dataclass(frozen=True)
class Option:
    """One option as `--help` shows it."""

    name: str
    type: str
    default: Any
    doc: str
    choices: tuple[Any, ...]
    decides: str = ARITHMETIC
    when: tuple[Effect, ...] = ()
    path: bool = False
    whole: bool = False


def options(
    config: type, prefix: str = "", decides: str | None = None, when: tuple[Effect, ...] = ()
) -> Iterator[Option]:
    """Every option of a command, nested ones with their dotted names; required ones first.

    `decides` and `when` are those of the group that they are in.
    """
    own = [f for f in fields(config) if not _nested(f)]
    for f in sorted(own, key=lambda f: f.default != REQUIRED):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
        of, told = f.metadata, (decides or f.metadata["decides"], (*when, *f.metadata["when"]))
        whole = of["whole"] or kind in ("int", "int | None", "list[int]")
        yield Option(prefix + f.name, kind, default, of["doc"], of["choices"], *told, of["path"], whole)
    for f in fields(config):
        if _nested(f):
            inner = decides or f.metadata["decides"], (*when, *f.metadata["when"])
            yield from options(f.type, f"{prefix}{f.name}.", *inner)


def free_options(config: type) -> list[str]:
    """Options that are mappings of any keys, such as `distill` in a chain: what is in them is for another command."""
    return [o.name for o in options(config) if isinstance(o.default, dict)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _nested(f: Any) -> bool:
    return isinstance(f.type, type) and is_dataclass(f.type)


# Options that must be above zero wherever they stand, and those that may be zero.
_POSITIVE = frozenset(
    """tensor pipeline context sequence_length micro_batch_size global_batch_size samples steps tokens lr workers temperature
    max_shard_gb save_interval interval repeats rows limit num_layers hidden_size ffn_hidden_size num_attention_heads
    num_query_groups vocab_size adam_eps top_k chunk_samples processes nodes processes_per_node decay_steps decay_tokens
    decay_share window stop_after recompute_num_layers bucket_size keep_last time_limit_minutes world_size nvlink_gpus
    memory_gib bf16_tflops fp8_tflops fp32_tflops memory_gb_s nvlink_gb_s network_gb_s host_gb_s launch_ms efficiency
    teacher_ahead logits_mib micro_batches parameters non_embedding_parameters flops_per_token latency_ms tokens_per_second batch
    weight_bytes cache_bytes multiple power keep factor candidate input_length output_length prompts
    minutes max_epochs""".split()
)
_NOT_NEGATIVE = frozenset(
    """min_lr warmup_steps warmup_tokens loss_factor grad_norm_factor weight_decay clip_grad validation_interval
    validation_samples seed first_sample fewshot keep_last_layers loss_samples gpus_per_node save_seconds
    cross_entropy intermediate fp8_bf16_layers at_least layers hidden ffn heads rung warmup""".split()
)

# From where to where numbers are taken that mean nothing beyond: a run has a token, softmax a temperature that float32 can bear.
_BOUNDS = {"tokens": (1, math.inf), "decay_tokens": (1, math.inf), "temperature": (0.01, 1000)}


def check(config: Any, prefix: str = "") -> None:
    """Check every value on its own: allowed words, signs. Raises UserError naming the option."""
    for f in fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if is_dataclass(value):
            check(value, f"{name}.")
            continue
        choices = f.metadata["choices"]
        if choices and (value, f.default) != (None, None) and value not in choices:
            words = [typed(choice) for choice in choices]
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"{name}={value} is not one of {', '.join(words)}{hint}")
        if isinstance(value, str) and not value:
            raise UserError(f"{name}= is empty")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not -(2.0**63) < value < 2.0**63:  # also refuses nan and inf
                raise UserError(f"{name}={value} must be a finite number")
            if f.name in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
                raise UserError(f"{name}={value} must be at least 0 and below 1")
            if f.name == "seed" and value >= 2**32:
                raise UserError(f"{name}={value} must be below 2**32")
            if f.name == "jsd_beta" and not 0 < value < 1:
                raise UserError(
                    f"{name}={value} must be above 0 and below 1: at either end the loss is 0 for any student"
                )
            if f.name in _POSITIVE and not value > 0:
                raise UserError(f"{name}={value} must be above 0")
            least, most = _BOUNDS.get(f.name, (-math.inf, math.inf))
            if not least <= value <= most:
                to = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
                raise UserError(f"{name}={value} must be {to}")
            if f.name in _NOT_NEGATIVE and not value >= 0:
                raise UserError(f"{name}={value} must not be negative")
