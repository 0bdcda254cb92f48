"""Tensors in, tensors out: ratios, policy losses, KL estimators, token weights, advantages.

Nothing here knows of configs, contexts, ranks or Hydra, and no function changes its arguments.
"""
