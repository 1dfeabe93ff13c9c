"""A short distillation of each shape that search found. `python launch/distill_candidates.py --help` lists the options."""

from minitron_megatron.config import DistillCandidatesConfig
from minitron_megatron.launcher import command


def main(cfg: DistillCandidatesConfig) -> None:
    """Heavy imports wait until the options are checked."""

    from minitron_megatron.candidates.run import distill_candidates

    distill_candidates(cfg)


if __name__ == "__main__":
    command(main, "distill_candidates")
