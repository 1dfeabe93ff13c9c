"""What is logged, and what the libraries are not to say."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from minitron_megatron.console import console, speaks
from minitron_megatron.plain_text import escaped

# Chatter of the libraries that says nothing to a user of these commands.
_HARMLESS = (
    ".*[Aa]pex is not installed.*",
    ".*absl.logging is not installed.*",
    ".*[Tt]ransformer.?[Ee]ngine.*",
    ".*GPTModel IS DEPRECATED.*",
    ".*cuda.*not available.*",
    ".*CUDA is not available.*",
    ".*_all_gather_base.*",
    ".*_reduce_scatter_base.*",
    ".*torch.distributed.reduce_op.*",
    ".*TypedStorage is deprecated.*",
    ".*no current CUDA stream.*",
    ".*ShardedTensor.*deprecated.*",
    ".*CPU random generator seem to be failing.*",
    ".*using the device under current context.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ".*full scope is deprecated.*",
    ".*argument order of load has been changed.*",
    ".*deprecating ShardedTensor.*",
    ".*invalid escape sequence.*",
    ".*grad attribute of a Tensor that is not a leaf.*",
    ".*is experimental and still under active development.*",
)


def be_quiet() -> None:
    """Silence what the libraries say of themselves; before they are imported."""
    # Progress is shown by one bar of our own (console.py); read when tqdm is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    for library in (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.utils",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.dist_checkpointing.strategies.torch",
        "torch.utils.cpp_extension",
        # Without a home that can be written it makes itself a folder, and says so in six lines.
        "matplotlib",
    ):
        logging.getLogger(library).setLevel(logging.ERROR)


class _PlainLines(logging.Formatter):
    """What is logged, as text."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def start_logging() -> None:
    """Lines of the program by rich from rank 0; warnings and errors from the others."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console(), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    handler.setFormatter(_PlainLines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minitron_megatron").setLevel(logging.INFO if speaks() else logging.WARNING)
    # Hydra's own set-up silences every logger that was there before it.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("minitron_megatron") and isinstance(logger, logging.Logger):
            logger.disabled = False


@contextmanager
def left_unsaid() -> Iterator[None]:
    """Within it nothing is logged: of what the ranks are going to check and say themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
