"""Shapes within a budget, ordered by importance scores. `python launch/search.py --help` lists the options."""

from minitron_megatron.config import SearchConfig
from minitron_megatron.launcher import command


def main(cfg: SearchConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.search.search import search_shapes

    search_shapes(cfg)


if __name__ == "__main__":
    command(main, "search")
