"""A model folder into a NeMo 2 checkpoint folder. `python launch/export_nemo.py --help` lists the options."""

from minitron_megatron.config import ExportNemoConfig
from minitron_megatron.launcher import command


def main(cfg: ExportNemoConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.nemo import export_nemo

    export_nemo(cfg)


if __name__ == "__main__":
    command(main, "export_nemo")
