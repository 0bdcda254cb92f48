"""Our losses inside other trainers: ``toolkit.integrations.trl``, ``toolkit.integrations.verl``.

Each module imports its trainer when it is imported itself, so this package needs none of them.
"""
