"""What is fixed before the first forward of a step: totals over all ranks, and a weight for each token and term."""
