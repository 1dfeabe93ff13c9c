"""Measurements that the documentation quotes, each a command (launch/benchmark.py)."""
