"""What a loss computes, in words: formula, facts, warnings, and the lists of all choices."""
