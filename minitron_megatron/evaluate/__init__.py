"""Judging a model: perplexity, distance to a teacher, tasks of lm-evaluation-harness."""
