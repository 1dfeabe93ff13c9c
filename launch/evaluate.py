"""Perplexity, distance to a teacher, tasks of lm-evaluation-harness. `python launch/evaluate.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("evaluate")
