"""A policy loss with XTuner's signature.

Legend: T positions of a packed row.

Source: XTuner v1, ``xtuner/v1/rl/loss/loss_fn.py``: ``get_policy_loss_fn`` imports a dotted ``loss_type``, and
``GRPOLossContext.loss_fn`` calls it with positional arguments, log-probabilities first. (The alias ``PolicyLossFn``
there has another order.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from toolkit.integrations.policy import Trainer, loss_of, terms_of, token_losses, warn_of_runs

XTUNER = Trainer(
    name="XTuner",
    example='policy_loss_cfg=dict(loss_type="toolkit.integrations.xtuner.gspo")',
    decides=(("aggregation", "use toolkit.integrations.xtuner.ToolkitLossConfig"),),
    aggregation="token_mean",
)
BOUNDS = ("log_prob_diff_min", "log_prob_diff_max")
"""XTuner's names of the bounds of log ratios, -20 and 20 unless set."""
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]


@functools.cache
def policy_loss_fn(name: str) -> LossFn:
    """Return the policy loss `name` as XTuner calls it."""

    def loss_fn(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_weights: Tensor, policy_loss_cfg: Any
    ) -> Tensor:
        """Return the weighted sum of the losses of a row or of a chunk of it, 0-dim.

        Args:
            logprobs: [1, T] in nats, with gradient.
            old_logprobs: [1, T] in nats.
            advantages: [1, T].
            loss_weights: [1, T], 0 where a position does not count.
            policy_loss_cfg: ``loss_type``, and options of the loss by our names.

        Raises:
            ConfigError: an option is not one of this loss, or the loss reads what XTuner does not pass.
        """
        cfg = loss_of(XTUNER, [f"policy_loss={name}", *_overrides(policy_loss_cfg)])
        warn_of_runs(
            cfg,
            XTUNER,
            "train on completions of one turn with mode='eager', because mode='chunk' cuts sequences, and without "
            "rejections, which cut them, too",
        )
        mask = loss_weights != 0
        terms = terms_of(cfg, logprobs, mask, {"old_logprobs": old_logprobs, "advantages": advantages}, runs_of=mask)
        values = token_losses(cfg, terms)
        return (values * loss_weights[mask].to(values.dtype)).sum()

    loss_fn.__name__ = name
    return loss_fn


def _overrides(settings: Mapping[str, Any]) -> Iterator[str]:
    for option, value in settings.items():
        if option not in ("loss_type", *BOUNDS):
            yield f"policy_loss.{option}={'null' if value is None else value}"
    low, high = (settings.get(name, default) for name, default in zip(BOUNDS, (-20.0, 20.0), strict=True))
    yield f"loss.log_ratio_range=[{low},{high}]"
