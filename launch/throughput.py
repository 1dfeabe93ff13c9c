"""Tokens a second of teacher and students in several engines. `python launch/throughput.py --help` lists the options."""

from minitron_megatron.config import ThroughputConfig
from minitron_megatron.launcher import command


def main(cfg: ThroughputConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.throughput.run import throughput

    throughput(cfg)


if __name__ == "__main__":
    command(main, "throughput")
