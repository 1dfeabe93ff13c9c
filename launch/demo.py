"""The whole road on a laptop, from a real model to a smaller one. `python launch/demo.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("demo")
