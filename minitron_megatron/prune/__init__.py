"""Pruning: choose which indices of which axis to keep, write them down as a plan, cut the sharded weights by it."""
