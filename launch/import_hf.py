"""A Hugging Face folder into a Megatron model folder. `python launch/import_hf.py --help` lists the options."""

from minitron_megatron.config import ImportHfConfig
from minitron_megatron.launcher import command


def main(cfg: ImportHfConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.hf import import_hf

    import_hf(cfg)


if __name__ == "__main__":
    command(main, "import_hf")
