"""Text into Megatron's indexed datasets. `python launch/prepare_data.py --help` lists the options."""

from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.launcher import command


def main(cfg: PrepareDataConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.data.prepare import prepare_data

    prepare_data(cfg)


if __name__ == "__main__":
    command(main, "prepare_data")
