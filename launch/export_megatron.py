"""A model folder into a Megatron-LM checkpoint. `python launch/export_megatron.py --help` lists the options."""

from minitron_megatron.config import ExportMegatronConfig
from minitron_megatron.launcher import command


def main(cfg: ExportMegatronConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.megatron_lm import export_megatron

    export_megatron(cfg)


if __name__ == "__main__":
    command(main, "export_megatron")
