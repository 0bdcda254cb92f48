"""Our losses inside other trainers, one module or package for each, such as `toolkit.integrations.trl`.

Each imports its trainer when it is used, so this package needs none of them.
"""
