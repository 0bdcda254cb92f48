"""What happened in runs: one page for a run, and the comparison of several. Reads files alone; no torch here."""
