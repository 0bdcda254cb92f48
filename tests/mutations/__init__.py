"""One-line breakages of the package, each with the tests that must notice it: what guards the suite while it is cut.

``python -m tests.mutations`` breaks a copy of the repository, one line at a time, and names the test that fails.
"""
