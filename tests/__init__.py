"""Tests state properties; those that need several processes run in one pool of gloo workers (pool.py)."""
