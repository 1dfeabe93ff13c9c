"""A model folder into a NeMo 2 checkpoint folder. `python launch/export_nemo.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("export_nemo")
