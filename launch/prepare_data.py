"""Text into Megatron's indexed datasets. `python launch/prepare_data.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("prepare_data")
