"""A model folder with random weights of a preset's shape. `python launch/random_model.py --help` lists the options."""

from minitron_megatron.config import RandomModelConfig
from minitron_megatron.launcher import command


def main(cfg: RandomModelConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.random_model import make_random_model

    make_random_model(cfg)


if __name__ == "__main__":
    command(main, "random_model")
