"""From hidden states to log-probabilities, without ever holding the logits of all tokens at once.

Knows nothing of RL, configs or ranks: a loss cannot tell which path served it.
"""
