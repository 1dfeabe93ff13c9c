"""Perplexity, distance to a teacher, tasks of lm-evaluation-harness. `python launch/evaluate.py --help` lists the options."""

from minitron_megatron.config import EvaluateConfig
from minitron_megatron.launcher import command


def main(cfg: EvaluateConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.evaluate.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    command(main, "evaluate")
