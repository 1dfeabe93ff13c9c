"""Text to Megatron's indexed datasets, and from those to micro-batches whose order depends on the seed alone."""
