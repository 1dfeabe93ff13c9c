"""The teacher's most probable tokens, written once. `python launch/cache_teacher.py --help` lists the options."""

from minitron_megatron.config import CacheTeacherConfig
from minitron_megatron.launcher import command


def main(cfg: CacheTeacherConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.distill.cache_teacher import cache_teacher

    cache_teacher(cfg)


if __name__ == "__main__":
    command(main, "cache_teacher")
