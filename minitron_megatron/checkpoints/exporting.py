"""A model folder as another program's checkpoint: checked, written whole or not at all, by every process its share."""

import time
from collections.abc import Callable
from pathlib import Path

from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder
from minitron_megatron.checkpoints.hf import print_shape
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.weights import verify_digest
from minitron_megatron.config import ExportMegatronConfig, ExportNemoConfig
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel.tools import tool_job


def export_for(
    program: str,
    cfg: ExportMegatronConfig | ExportNemoConfig,
    check: Callable[[ModelShape, str], object],
    write: Callable[[Path, ModelFolder], None],
) -> None:
    """Export a model folder.

    Args:
        program: whose checkpoint it is.
        cfg: the command's options.
        check: raises UserError for a shape that it cannot express; the second argument is where the shape stands.
        write: fills the output folder, on every rank.
    """
    with tool_job():
        folder = open_model_folder(cfg.model.folder("model"))
        check_weights(folder)
        check(folder.shape, str(folder.path))
        if cfg.verify:
            verify_digest(folder)
        inputs = {"model": folder.digest}
        if cfg.dry_run:
            check_command_output(cfg, inputs)
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
