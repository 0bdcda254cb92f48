"""Our policy losses and advantage estimators in verl, as ``toolkit/<name>``; tested with verl 0.9.1.

verl imports `toolkit.integrations.verl.plugin` itself, because it is the package's entry point ``verl.plugins``.
"""
