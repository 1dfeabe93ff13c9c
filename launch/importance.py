"""Activation importance of every axis of a model. `python launch/importance.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("importance")
