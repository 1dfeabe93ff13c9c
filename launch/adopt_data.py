"""Datasets of Megatron-LM as a data folder. `python launch/adopt_data.py --help` lists the options."""

from minitron_megatron.config import AdoptDataConfig
from minitron_megatron.launcher import command


def main(cfg: AdoptDataConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.data.adopt import adopt_data

    adopt_data(cfg)


if __name__ == "__main__":
    command(main, "adopt_data")
