"""A measurement that the documentation quotes. `python launch/benchmark.py --help` lists the options."""

from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.launcher import command


def main(cfg: BenchmarkConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.benchmark.run import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    command(main, "benchmark")
