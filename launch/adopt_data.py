"""Datasets of Megatron-LM as a data folder. `python launch/adopt_data.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("adopt_data")
