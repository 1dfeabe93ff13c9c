"""Search: shapes that fit a budget, ordered by what importance scores say each would lose."""
