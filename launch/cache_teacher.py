"""The teacher's most probable tokens, written once. `python launch/cache_teacher.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("cache_teacher")
