"""A model folder with random weights of a preset's shape. `python launch/random_model.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("random_model")
