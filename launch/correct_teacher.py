"""A teacher is fine-tuned on the data of the distillation. `python launch/correct_teacher.py --help` lists the options."""

from minitron_megatron.config import CorrectTeacherConfig
from minitron_megatron.launcher import command


def main(cfg: CorrectTeacherConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.train.correct_teacher import correct_teacher

    correct_teacher(cfg)


if __name__ == "__main__":
    command(main, "correct_teacher")
