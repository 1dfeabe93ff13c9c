"""The frame of a command that runs a model over data and writes what it finds: importance, layers, evaluate, cache_teacher.

processes in their layout ─▶ the same files on all ranks; verify=true: against their digests ─▶ output folder, whole or not there
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.folder import ModelFolder, Output
from minitron_megatron.checkpoints.unfinished import COMPUTED_IN, has_work
from minitron_megatron.checkpoints.weights import verify_digest
from minitron_megatron.config import CommandConfig
from minitron_megatron.data.folder import Data, verify_data
from minitron_megatron.outputs import command_output
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import asks_machine, keep, record


@contextmanager
def measuring(
    cfg: CommandConfig,
    layout: Layout,
    folder: ModelFolder,
    data: Data | None,
    inputs: Mapping[str, str],
    *,
    continues: bool = False,
) -> Iterator[Output]:
    """This process as a rank of a layout, and the output folder of the command within it.

    Args:
        cfg: the command's options.
        layout: of the model.
        folder, data: what is read; None where there are no data.
        inputs: digests of it, for the manifest.
        continues: whether a killed command's folder is continued (checkpoints/folder.py).

    Raises:
        UserError: the output cannot be written, or with verify=true, weights or data are not what they were.
    """
    with parallel_job(layout, seed=cfg.seed, device=cfg.device):
        check_copies(folder.path, *(one.path for one in (data.folders if data else ())))
        if cfg.verify:
            verify_digest(folder)
            if data is not None:
                verify_data(data)
        with command_output(cfg, inputs, continues=continues) as out:
            if continues and not out.done and asks_machine(cfg.precision, folder.shape.dtype):
                keep(out.path / COMPUTED_IN, begun=lambda: has_work(out.path))
            yield out
            out.precision = record()
