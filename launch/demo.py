"""The whole road on a laptop, from a real model to a smaller one. `python launch/demo.py --help` lists the options."""

from minitron_megatron.config import DemoConfig
from minitron_megatron.launcher import command


def main(cfg: DemoConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.demo import run_demo

    run_demo(cfg)


if __name__ == "__main__":
    command(main, "demo")
