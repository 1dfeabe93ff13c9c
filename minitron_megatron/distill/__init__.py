"""Distillation: losses over the sharded vocabulary, and the teacher beside the student."""
