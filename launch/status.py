"""How a run, a chain or any output stands. `python launch/status.py FOLDER`; `--help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("status")
