"""A sequence's advantage spread over its tokens by a teacher's log-probabilities. S: sequences, T: positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.names import MAX_LOG_RATIO

if TYPE_CHECKING:
    from torch import Tensor


def rlsd_reweight(
    advantages: Tensor,
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    *,
    lam: float = 0.5,
    clip_range: float = 0.2,
    negative_only: bool = False,
) -> Tensor:
    """Weight each token's share of the advantage by the teacher's log-probability, without changing a sign (RLSD).

    ``A_t = A ((1 - lam) + lam clip(exp(sign(A) (log pi_teacher - log pi)), 1 - clip_range, 1 + clip_range))``: of
    a good sequence the tokens that the teacher likes more are reinforced more, of a bad one those that it likes less.
    The result, [S, T], is 0 where masked and has no gradient.

    Args:
        advantages: [S] one per sequence, of any estimator.
        logprobs: [S, T] of the policy that sampled, in nats; masked positions are ignored.
        teacher_logprobs: [S, T] of the teacher, e.g. the same model that has seen the answer.
        mask: [S, T] bool.
        lam: 0 leaves the advantages as they are, 1 weights in full.
        clip_range: how far a weight may be from 1.
        negative_only: weight only sequences with a negative advantage.

    Source: self-distilled RLVR as in ms-swift. Differs in bounding the log ratio by 20 nats before exp.
    """
    wide = advantages.detach().double() if advantages.device.type != "mps" else advantages.detach().float()
    wide = wide.unsqueeze(-1)
    gap = (teacher_logprobs.detach() - logprobs.detach()).to(wide.dtype).where(mask, 0.0)
    weights = (wide.sign() * gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(1 - clip_range, 1 + clip_range)
    mixed = (1 - lam) + lam * weights
    if negative_only:
        mixed = mixed.where(wide < 0, 1.0)
    token_advantages = (wide * mixed).where(mask, 0.0)
    # fp32 or wider
    return token_advantages.to(advantages.dtype) if advantages.element_size() >= 4 else token_advantages.float()
