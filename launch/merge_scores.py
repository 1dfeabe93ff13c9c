"""Scores of parts of the data into the scores of the whole. `python launch/merge_scores.py --help` lists the options."""

from minitron_megatron.config import MergeScoresConfig
from minitron_megatron.launcher import command


def main(cfg: MergeScoresConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.importance.merge import merge_scores

    merge_scores(cfg)


if __name__ == "__main__":
    command(main, "merge_scores")
