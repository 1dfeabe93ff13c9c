"""A model folder into a Megatron-LM checkpoint. `python launch/export_megatron.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("export_megatron")
