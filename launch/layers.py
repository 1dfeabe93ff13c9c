"""Which layers a model can lose, by three judges. `python launch/layers.py --help` lists the options."""

from minitron_megatron.config import LayersConfig
from minitron_megatron.launcher import command


def main(cfg: LayersConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.layer_analysis import analyse_layers

    analyse_layers(cfg)


if __name__ == "__main__":
    command(main, "layers")
