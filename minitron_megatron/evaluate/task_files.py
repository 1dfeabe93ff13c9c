"""Task files of strangers: their templates run in a sandbox, and functions that they name only where that is confirmed.

lm-evaluation-harness renders a task's templates with all of Python in reach, and imports the functions that a task file names
(`!function`) from beside it. Its own tasks come with the package and are trusted as the package is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron_megatron.errors import UserError


def sandbox_templates() -> None:
    """Have the harness render templates without attributes that begin with an underscore, through which programs are reached."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandboxed = SandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=utils.env.keep_trailing_newline
        )
        sandboxed.filters.update(utils.env.filters)
        utils.env = sandboxed


@contextmanager
def functions_of(trusted: Path, unsafe: bool) -> Iterator[None]:
    """Within it, task files of the harness and of the folder `trusted` name functions; others only where `unsafe`."""
    import lm_eval
    from lm_eval.tasks import _yaml_loader

    known = (Path(lm_eval.__file__).parent, trusted.resolve())
    import_function = _yaml_loader._import_func_in_yml

    def import_known(name: str, folder: Path) -> Any:
        if not unsafe and not any(folder.resolve().is_relative_to(path) for path in known):
            raise UserError(
                f"a task file in {folder} names the function {name}, which is code of its own: set "
                "confirm_run_unsafe_code=true where you trust it, or leave the task out"
            )
        return import_function(name, folder)

    _yaml_loader._import_func_in_yml = import_known
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = import_function
