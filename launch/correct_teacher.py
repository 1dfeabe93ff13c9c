"""A teacher is fine-tuned on the data of the distillation. `python launch/correct_teacher.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("correct_teacher")
