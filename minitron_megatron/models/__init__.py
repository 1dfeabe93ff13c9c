"""Architectures as data: sizes (shape), the named-axis table (axes), families, and the real Megatron model (build)."""
