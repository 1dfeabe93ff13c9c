"""Scores and a target, or a plan, into a smaller model. `python launch/prune.py --help` lists the options."""

from minitron_megatron.config import PruneConfig
from minitron_megatron.launcher import command


def main(cfg: PruneConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.prune.prune import prune_model

    prune_model(cfg)


if __name__ == "__main__":
    command(main, "prune")
