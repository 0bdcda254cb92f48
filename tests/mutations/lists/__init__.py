"""Breakages by part of the package; each module has a tuple ``MUTATIONS``."""
