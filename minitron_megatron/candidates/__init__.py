"""Candidates of a search, each distilled for a while: the hopeless ones stop early, the best one is told."""
