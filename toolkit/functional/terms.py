"""What a policy loss gets to see: one bundle of per-token tensors of the selected tokens.

N: selected tokens (every scored position of a micro-batch, masked ones already left out), S: sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.ratios import MAX_LOG_RATIO, bounded_log_ratio
from toolkit.functional.segments import segment_mean, segment_sum
from toolkit.metrics import Mean


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """The tensors of a policy loss. Every value is real: masked positions were selected out before."""

    logprobs: Tensor
    """[N] log pi_theta of the sampled tokens, in nats, fp32 or wider, with gradient."""
    old_logprobs: Tensor
    """[N] the same under the policy before this optimizer step (or a detached copy: on-policy)."""
    advantages: Tensor
    """[N] advantage of each token."""
    ref_logprobs: Tensor | None = None
    """[N] under the reference policy, if there is one."""
    rollout_logprobs: Tensor | None = None
    """[N] as reported by the sampler, if it did."""
    sequence_ids: Tensor | None = None
    """[N] int64, the sequence of each token; None for a loss of scope "token"."""
    num_sequences: int = 0
    max_log_ratio: float = MAX_LOG_RATIO
    """Bound on |log ratio| in nats; the gradient is 0 outside."""
    reported: dict[str, Mean] = field(default_factory=dict)
    """What the policy loss reported of itself."""

    def report(self, name: str, values: Tensor) -> None:
        """Show the mean of `values` ([N], over all selected tokens of the step) as metric `name`."""
        self.reported[name] = Mean.of(values)

    def log_ratio(self) -> Tensor:
        """Return log pi_theta - log pi_old, bounded, [N]."""
        return bounded_log_ratio(self.logprobs, self.old_logprobs, bound=self.max_log_ratio)

    def ratio(self) -> Tensor:
        """Return pi_theta / pi_old, bounded, [N]."""
        return self.log_ratio().exp()

    def sequence_ratio(self) -> Tensor:
        """Return the geometric mean of the ratios of each token's own sequence, bounded, [N]."""
        mean = self.segment_mean(self.logprobs - self.old_logprobs)
        return mean.clamp(-self.max_log_ratio, self.max_log_ratio).exp()

    def segment_sum(self, values: Tensor) -> Tensor:
        """Sum over each token's own sequence, given back per token: [N] -> [N]."""
        ids = self._ids()
        return segment_sum(values, ids, self.num_sequences)[ids]

    def segment_mean(self, values: Tensor) -> Tensor:
        """Average over each token's own sequence, given back per token: [N] -> [N]."""
        ids = self._ids()
        return segment_mean(values, ids, self.num_sequences)[ids]

    def _ids(self) -> Tensor:
        if self.sequence_ids is None:
            raise ConfigError(
                "this policy loss uses statistics of whole sequences but is registered with scope='token'; "
                "register it with @register_policy_loss(name, scope='sequence')"
            )
        return self.sequence_ids
