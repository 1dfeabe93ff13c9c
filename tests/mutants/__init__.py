"""Which bugs the tests would notice: small bugs, put into a copy of the repository one at a time, and the tests that see them.

    places/ROOM.yaml ─┐
    generate.py ──────┴─▶ mutants ─▶ copy of the tree, one bug in it ─▶ the test that is to hold it, then those of rooms.py
                                                                          │
                                 results, a line each ◀── noticed by …, or survived

`make mutants`, or `python -m tests.mutants room=prune slow=true`; `python -m tests.mutants help` has every option. A run goes on
from the results that are there. A survivor is a sentence of the documentation that no test holds: write that test.
"""
