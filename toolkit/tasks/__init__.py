"""Prompts with verifiable rewards."""
