"""A command's output folder: at its `output=`, with its options and what was typed in the manifest."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from minitron_megatron.changing import free_options
from minitron_megatron.checkpoints.folder import Output, check_output, output_folder
from minitron_megatron.cli.spelling import command_line
from minitron_megatron.config import CommandConfig
from minitron_megatron.launcher import resolved_config


def command_output(
    cfg: CommandConfig, inputs: Mapping[str, str], *, continues: bool = False
) -> AbstractContextManager[Output]:
    """The folder to write, as `output_folder` makes it, of a command with these options that reads `inputs` (digests by name)."""
    return output_folder(
        cfg.output,
        command=command_line(),
        config=resolved_config(cfg),
        inputs=inputs,
        resume=cfg.resume,
        free=free_options(type(cfg)),
        continues=continues,
    )


def check_command_output(cfg: CommandConfig, inputs: Mapping[str, str]) -> None:
    """Raise the UserError that `command_output` would, before the work begins; `inputs` are those that are known by then."""
    free = free_options(type(cfg))
    check_output(cfg.output, config=resolved_config(cfg), inputs=inputs, resume=cfg.resume, free=free)
