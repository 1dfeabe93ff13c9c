"""Scores of parts of the data into the scores of the whole. `python launch/merge_scores.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("merge_scores")
