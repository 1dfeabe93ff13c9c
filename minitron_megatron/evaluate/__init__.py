"""Judging a model: perplexity on a data folder."""
