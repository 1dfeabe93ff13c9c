"""Rounds of importance, prune, distill and evaluate. `python launch/compress.py --help` lists the options."""

from minitron_megatron.config import CompressConfig
from minitron_megatron.launcher import command


def main(cfg: CompressConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.compress import compress

    compress(cfg)


if __name__ == "__main__":
    command(main, "compress")
