"""A command of launch/ as a Slurm job: `python launch/submit.py cluster=h100 output=… -- distill teacher=… …`."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("submit")
