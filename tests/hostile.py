"""Names that a shell, a page, a table or a path might take for something else: what fixtures use by default.

`from tests.hostile import tmp_path  # noqa: F401` makes a file of tests work in a folder of such a name.
"""

import pytest

# In paths, so without a slash; without a line break, which not every kind of file can say.
NAME = """it's <b>a & "b"<b> $(touch PWNED) `x` | é #1"""
# In texts.
TEXT = f"{NAME}\n<script>alert(1)</script> {{{{ x }}}} {{% x %}} \x1b[31m; rm -rf x"


@pytest.fixture
def tmp_path(tmp_path):
    """A folder of a hostile name."""
    folder = tmp_path / NAME
    folder.mkdir()
    return folder
