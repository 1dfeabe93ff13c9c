"""A command of launch/ as a Slurm job: `python launch/submit.py cluster=h100 output=… -- distill teacher=… …`."""

import sys

from minitron_megatron.config import SubmitConfig
from minitron_megatron.launcher import command, words_after_dashes


def main(cfg: SubmitConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.submit import submit

    submit(cfg)


if __name__ == "__main__":
    sys.argv[1:] = words_after_dashes(sys.argv[1:], "command")
    command(main, "submit")
