"""A measurement that the documentation quotes. `python launch/benchmark.py --help` lists the options."""

from minitron_megatron.launcher import command

if __name__ == "__main__":
    command("benchmark")
