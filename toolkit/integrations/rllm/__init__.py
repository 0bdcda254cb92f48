"""Our policy losses in rLLM, as ``toolkit/<name>``, on each of its back-ends (verl, Tinker, Fireworks).

rLLM imports `toolkit.integrations.rllm.plugin` itself, because it is the package's entry point ``rllm.losses``.
"""
