"""A model folder into a Hugging Face folder. `python launch/export_hf.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("export_hf")
