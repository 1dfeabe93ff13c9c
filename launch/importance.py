"""Activation importance of every axis of a model. `python launch/importance.py --help` lists the options."""

from minitron_megatron.launcher import command

if __name__ == "__main__":
    command("importance")
