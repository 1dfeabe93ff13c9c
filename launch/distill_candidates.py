"""A short distillation of each shape that search found. `python launch/distill_candidates.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("distill_candidates")
