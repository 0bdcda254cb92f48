"""From hidden states to log-probabilities, without ever holding the logits of all tokens at once.

Knows nothing of RL, configs or ranks: a loss cannot tell which pass served it. `token_logprobs` serves any training
loop; `fused_loss` computes a loss with the head in 3 matrix products; `explain` says what either will cost.
"""

from toolkit.head.engine import explain, fused_loss, token_logprobs
from toolkit.head.plan import HeadPlan
from toolkit.head.scores import TokenScores

__all__ = ["HeadPlan", "TokenScores", "explain", "fused_loss", "token_logprobs"]
