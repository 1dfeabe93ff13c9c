"""Rounds of importance, prune, distill and evaluate. `python launch/compress.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("compress")
