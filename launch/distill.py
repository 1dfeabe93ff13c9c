"""A student learns from its teacher. `python launch/distill.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("distill")
