"""A model folder as another program's checkpoint: checked, written whole or not at all, by every process its share."""

import time
from collections.abc import Callable
from pathlib import Path

from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.export_checks import Exporting
from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.hf_folder import print_shape
from minitron_megatron.checkpoints.weights import verify_digest
from minitron_megatron.config import ExportMegatronConfig, ExportNemoConfig
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel.tools import tool_job


def export_for(
    program: str,
    cfg: ExportMegatronConfig | ExportNemoConfig,
    checked: Exporting,
    write: Callable[[Path, ModelFolder], None],
) -> None:
    """Export a model folder.

    Args:
        program: whose checkpoint it is.
        cfg: the command's options.
        checked: the folder, which the program can express.
        write: fills the output folder, on every rank.
    """
    folder, inputs = checked.folder, checked.inputs
    with tool_job():
        check_copies(folder.path)
        if cfg.verify:
            verify_digest(folder)
        if cfg.dry_run:
            print_shape(f"{folder.path} would be exported for {program}", folder.shape)
            return
        with command_output(cfg, inputs) as out:
            if out.done:
                return
            began = time.monotonic()
            write(out.path, folder)
            seconds = round(time.monotonic() - began, 2)
            out.results = {"parameters": count_parameters(folder.shape), "seconds": seconds}
        print_shape(f"{cfg.output}: exported from {folder.path} for {program}", folder.shape, out.results)
