"""Processes and their groups: layouts, starting and ending a parallel job, the CPU adapter, collectives with names."""
