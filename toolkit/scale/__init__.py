"""Formulas of scale: what one optimizer step communicates because of the loss, and the memory of the head.

They hold for any number of ranks; counters check them against real processes at small sizes. ``python -m
toolkit.scale`` prints the tables.
"""
