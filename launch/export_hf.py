"""A model folder into a Hugging Face folder. `python launch/export_hf.py --help` lists the options."""

from minitron_megatron.config import ExportHfConfig
from minitron_megatron.launcher import command


def main(cfg: ExportHfConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.hf import export_hf

    export_hf(cfg)


if __name__ == "__main__":
    command(main, "export_hf")
