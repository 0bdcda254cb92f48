"""Dumps of completions as `TokenRecord`s, one module for each format."""
