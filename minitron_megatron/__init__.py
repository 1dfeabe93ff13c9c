"""Large-scale pruning and distillation of language models on NVIDIA Megatron (the Minitron method)."""

__version__ = "0.1.0"
