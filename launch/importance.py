"""Activation importance of every axis of a model. `python launch/importance.py --help` lists the options."""

from minitron_megatron.config import ImportanceConfig
from minitron_megatron.launcher import command


def main(cfg: ImportanceConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.importance.measure import measure_importance

    measure_importance(cfg)


if __name__ == "__main__":
    command(main, "importance")
