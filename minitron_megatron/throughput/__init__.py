"""How fast models generate, in Megatron, transformers, vLLM and TensorRT-LLM."""
