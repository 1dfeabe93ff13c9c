"""One page about output folders, and a model card. `python launch/report.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("report")
