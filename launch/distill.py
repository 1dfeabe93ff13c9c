"""A student learns from its teacher. `python launch/distill.py --help` lists the options."""

from minitron_megatron.config import DistillConfig
from minitron_megatron.launcher import command


def main(cfg: DistillConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.train.distill import distill

    distill(cfg)


if __name__ == "__main__":
    command(main, "distill")
