"""A NeMo checkpoint into a Megatron model folder. `python launch/import_nemo.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("import_nemo")
