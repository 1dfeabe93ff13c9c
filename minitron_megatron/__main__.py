"""`python -m minitron_megatron NAME option=value …`, which torchrun takes too."""

from minitron_megatron.cli.main import main

if __name__ == "__main__":
    main()
