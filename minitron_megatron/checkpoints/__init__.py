"""Models on disk: whole-or-nothing folders, Megatron distributed weights, Hugging Face folders."""
