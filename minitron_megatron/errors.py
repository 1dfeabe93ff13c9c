"""The one exception that a user's mistake raises: its message is one line that says what, where and what to do.

The launcher prints it as ``error: …`` on rank 0 and exits with status 2 on every rank, without a traceback.
"""

import contextlib
from collections.abc import Iterator

from minitron_megatron.plain_text import one_line


class UserError(Exception):
    """Something the user can put right: a wrong option, a missing file, a layout that does not divide.

    `of_folders` says of what a command's check raises that it may show on one machine alone: folders were looked at.
    """

    of_folders = False


@contextlib.contextmanager
def of_folders() -> Iterator[None]:
    """Within it folders are looked at: a mistake may be this machine's alone."""
    try:
        yield
    except UserError as error:
        error.of_folders = True
        raise


class Diverged(UserError):
    """A run that ended because its loss or its gradients only spike, or are no numbers any more."""


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """What another program says, as part of such a message: no line breaks, at most so many characters."""
    return one_line(" ".join(str(error).split()))[:most]
