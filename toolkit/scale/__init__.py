"""Scale on paper: what one optimizer step communicates because of the loss, and what the head holds in memory.

Formulas for any number of ranks, and the counters that check them against real processes at small sizes. ``python -m
toolkit.scale`` prints the tables.
"""
