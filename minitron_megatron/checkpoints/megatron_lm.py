"""A model folder as a Megatron-LM checkpoint, which its own training continues from.

    release/                              weights as torch_dist, with Megatron-LM's keys; its args in the common state
    latest_checkpointed_iteration.txt     says "release": weights to start from, at iteration 0
    arguments.sh                          the model's arguments for pretrain_gpt.py
    tokenizer/

Megatron-LM reads neither optimizer, random state nor iteration from a `release`, so that plain --load starts training on it.
From an `iter_0000000` it would want all three, unless it is also told --finetune.

The keys are those of the model folder, so its chunks are copied as they are, one at a time, each rank its share.
"""

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.checkpoints.export_checks import Exporting, check_export_megatron
from minitron_megatron.checkpoints.exporting import export_for
from minitron_megatron.checkpoints.folder import TOKENIZER, ModelFolder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.checkpoints.weights import COMMON_STATE, Chunk, write_weights
from minitron_megatron.config import ExportMegatronConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, extra_state_keys
from minitron_megatron.models.megatron_lm import Arguments, model_arguments, words
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives

RELEASE, TRACKER, ARGUMENTS = "release", "latest_checkpointed_iteration.txt", "arguments.sh"
# Where older Megatron-LM looks for what is not a tensor (0.15 does; later ones do, too, where the file is there).
COMMON_FILE = "common.pt"
# What Megatron's loaders are told of the keys: layers are stacked under one.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_TOKENIZER_MODEL = "--tokenizer-model"


def export_megatron(cfg: ExportMegatronConfig, checked: Exporting | None = None) -> None:
    """`launch/export_megatron.py`: a model folder into a checkpoint that Megatron-LM loads."""

    def write(target: Path, folder: ModelFolder) -> None:
        # As Megatron-LM stores it, the tokenizer's path is an absolute one: where the folder will be.
        arguments = all_arguments(folder, Path(cfg.output).absolute())
        _write_release(target / RELEASE, folder, arguments)
        if collectives.is_rank_zero():
            _write_companions(target, folder, arguments)

    export_for("Megatron-LM", cfg, checked or check_export_megatron(cfg), write)


def _write_release(target: Path, folder: ModelFolder, arguments: Arguments) -> None:
    """Copy the weights and write the common state beside them; each rank its share of the chunks."""
    reader = WeightReader(folder.weights)

    def fill(chunk: Chunk, out: torch.Tensor) -> None:
        reader.read_into(out, chunk.slot, folder.shape, chunk.start)

    objects: dict[str, Any] = {}
    if collectives.is_rank_zero():
        objects = {COMMON_STATE: common_state(folder.shape, arguments), **no_extra_state(folder.shape)}
    digest = write_weights(target, folder.shape, fill, "export", objects)
    # It is that of shape and content, and both are to be the same.
    if digest != folder.digest:
        raise UserError(f"{folder.path}: the weights differ from the digest in manifest.yaml; make the folder again")
    if collectives.is_rank_zero():
        torch.save(objects[COMMON_STATE], target / COMMON_FILE)


def no_extra_state(shape: ModelShape, prefix: str = "") -> dict[str, Any]:
    """Empty extra state (FP8 scales) of modules that may have some: Megatron-LM's loader takes none of them for missing."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    places = [
        (key, (layer,), (shape.num_layers,)) if stacked else (key, (0,), (1,))
        for key, stacked in extra_state_keys(shape).items()
        for layer in (range(shape.num_layers) if stacked else (0,))
    ]
    return {ShardedObject(prefix + key, None, total, offset).unique_key: None for key, offset, total in places}


def common_state(shape: ModelShape, arguments: Arguments) -> dict[str, Any]:
    """What Megatron-LM saves beside tensors: its `args`, the version of the format, and where training is."""
    args = parsed(arguments)
    # What Megatron-LM's parse_args, validate_args and train add to what is parsed, as far as its loader reads it.
    args.rank, args.world_size, args.data_parallel_size = 0, 1, 1
    args.params_dtype = getattr(torch, shape.dtype)
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
    args.no_save_optim = args.no_save_rng = True
    # A signal.Signals, the one value at which Megatron-LM 0.15 stops: its class is not in the list that is read safely there.
    args.exit_signal = int(args.exit_signal)
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": CONTENT,
    }


def parsed(arguments: Arguments) -> argparse.Namespace:
    """What Megatron-LM's own parser makes of arguments."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args(words(arguments))


def all_arguments(folder: ModelFolder, output: Path) -> Arguments:
    """Arguments of the model and of its tokenizer, which is to lie in `output`; one without text has Megatron-LM's for none."""
    if not folder.tokenizer_path.is_dir():
        return model_arguments(folder.shape) | {"--tokenizer-type": "NullTokenizer"}
    tokenizer = {"--tokenizer-type": "HuggingFaceTokenizer", _TOKENIZER_MODEL: str(output / TOKENIZER)}
    return model_arguments(folder.shape) | tokenizer


def _write_companions(target: Path, folder: ModelFolder, arguments: Arguments) -> None:
    (target / TRACKER).write_text(RELEASE, encoding="utf-8")
    (target / ARGUMENTS).write_text(arguments_script(folder.shape, arguments), encoding="utf-8")
    if folder.tokenizer_path.is_dir():
        shutil.copytree(folder.tokenizer_path, target / TOKENIZER)


def arguments_script(shape: ModelShape, arguments: Arguments) -> str:
    """arguments.sh: a bash array of the arguments, with the tokenizer beside the script, wherever the folder is."""
    lines = []
    for name, value in arguments.items():
        if name == _TOKENIZER_MODEL:
            lines.append(f'    {name} "$(dirname "$(realpath "${{BASH_SOURCE[0]}}")")/{TOKENIZER}"')
        else:
            lines.append(f"    {name}" if value is None else f"    {name} {shlex.quote(value)}")
    body = "\n".join(lines)
    return (
        f"# A {shape.family} model of {count_parameters(shape):,} parameters, for Megatron-LM 0.19:\n"
        "#   source THIS_FOLDER/arguments.sh\n"
        '#   torchrun … pretrain_gpt.py "${MODEL_ARGS[@]}" --load THIS_FOLDER --save ANOTHER_FOLDER --seq-length … …\n'
        f"MODEL_ARGS=(\n{body}\n)\n"
    )
