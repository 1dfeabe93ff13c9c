"""A NeMo checkpoint into a Megatron model folder. `python launch/import_nemo.py --help` lists the options."""

from minitron_megatron.config import ImportNemoConfig
from minitron_megatron.launcher import command


def main(cfg: ImportNemoConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.nemo import import_nemo

    import_nemo(cfg)


if __name__ == "__main__":
    command(main, "import_nemo")
