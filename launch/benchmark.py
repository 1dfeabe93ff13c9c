"""A measurement that the documentation quotes. `python launch/benchmark.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("benchmark")
