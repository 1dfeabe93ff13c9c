"""Which checkpoints a run folder has, and whether a run can go on from them: by their files alone, without torch.

checkpoint.py writes and reads them.
"""

import math
import re
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import check_space
from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.plain_files import read_json

BEST, FORMAT = "best.json", "format.json"
_NAME = re.compile(r"step_(\d{8})")


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def find_best(folder: Path) -> tuple[Path, float] | None:
    """The checkpoint with the lowest validation loss so far, and that loss; None where none with a finite one is marked."""
    try:
        marked = read_json(folder / BEST)
        path, loss = folder / f"step_{marked['step']:08d}", float(marked["validation_loss"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return (path, loss) if path.is_dir() and math.isfinite(loss) else None


def places(layout: Layout) -> dict[str, Any]:
    """What dp_reshardable depends on, by the names of the options."""
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "account_for_embedding": layout.account_for_embedding,
        "account_for_loss": layout.account_for_loss,
        "pipeline_layout": layout.pipeline_layout,
    }


def check_readable(path: Path, layout: Layout) -> None:
    """Raise UserError when a layout cannot go on from a checkpoint: before any model is built."""
    there, now = read_format(path), places(layout)
    kind, scales = there.pop("optimizer"), there.pop("scales", False)
    if (kind != "dp_reshardable" and not scales) or there == now:
        return
    was = " ".join(f"parallel.{name}={value}" for name, value in there.items() if value != now[name])
    why = "trainer.fp8=delayed" if scales else "trainer.checkpoint_format=dp_reshardable"
    raise UserError(
        f"{path} was written with {why}, which another number of data-parallel ranks can read and no other layout: use {was}"
    )


def read_format(path: Path) -> dict[str, Any]:
    """What format.json of a checkpoint says. Raises UserError."""
    try:
        return dict(read_json(path / FORMAT))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """What is said of a checkpoint that cannot be read."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(f"{path} is damaged ({reason}): remove it, the run continues from the one before")


def check_room(folder: Path, parameters: int, bytes_per_weight: int, options: TrainerConfig) -> None:
    """Raise UserError when the checkpoints that the run will hold at once, and one being written, have no room.

    A parameter takes its own bytes and 12 of the optimizer (float32 master weights and both moments of Adam).
    """
    wanted = options.keep_last + 1 + options.keep_best - len(find_checkpoints(folder))
    need = max(1, wanted) * parameters * (bytes_per_weight + 12)
    why = f"trainer.keep_last={options.keep_last} and one being written"
    check_space(folder, need, f"the checkpoints of {folder.parent}", why=why)
