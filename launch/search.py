"""Shapes within a budget, ordered by importance scores. `python launch/search.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("search")
