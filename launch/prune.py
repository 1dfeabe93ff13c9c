"""Scores and a target, or a plan, into a smaller model. `python launch/prune.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("prune")
