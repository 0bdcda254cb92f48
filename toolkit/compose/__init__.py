"""Composing the Hydra tree, checking it, and what to say of a mistake; no torch here."""
