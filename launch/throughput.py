"""Tokens a second of teacher and students in several engines. `python launch/throughput.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("throughput")
