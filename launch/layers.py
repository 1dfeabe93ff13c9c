"""Which layers a model can lose, by three judges. `python launch/layers.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("layers")
