"""A setting that nothing reads is a lie: each changes the loss, its gradient or its metrics (R28)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import random_head, random_item
from toolkit import GRPOLossConfig, GRPOLossContext, OrealLossConfig
from toolkit.metrics import to_floats

KL = {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.3}
FULL = {"use_kl_loss": True, "kl_loss_type": "full", "kl_loss_coef": 0.3}
TIS = {"action": "clamp_upper", "upper": 1.1}
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    # field: (settings beside it, another value than the default)
    "ignore_idx": ({}, 3),
    "logit_scale": ({}, 0.5),
    "softcap": ({}, 2.0),
    "temperature": ({}, 0.7),
    "policy_loss_cfg": ({}, {"loss_type": "gspo"}),
    "log_ratio_range": ({}, (-0.01, 0.01)),
    "aggregation": ({}, "seq_mean_token_mean"),
    "correction": ({}, [TIS]),
    "correction_on_kl": ({**KL, "correction": [TIS]}, True),
    "use_kl_loss": ({"kl_loss_type": "k2"}, True),
    "kl_loss_coef": ({"use_kl_loss": True, "kl_loss_type": "k3"}, 0.7),
    "kl_aggregation": (KL, "seq_mean_token_mean"),
    "kl_loss_type": ({"use_kl_loss": True, "kl_loss_coef": 0.3}, ("k2", "k3")),
    "kl_gradient": (KL, "straight_through"),
    "kl_anchor": ({**KL, "kl_gradient": "is_corrected"}, "rollout"),
    "kl_ratio_level": ({**KL, "kl_gradient": "is_corrected"}, "sequence"),
    "kl_input_clamp": (KL, 0.1),
    "kl_output_clamp": (KL, 0.01),
    "kl_direction": (FULL, "forward"),
    "kl_tail": ({**FULL, "kl_loss_type": "top_k"}, "drop"),
    "positive_nll_coef": ({}, 0.3),
    "use_entropy_metric": ({}, True),
    "entropy_coef": ({}, 0.3),
    "drop_zero_advantage": ({}, True),
}
ELSEWHERE = {
    "mode": "the same loss by definition; tests/losses/test_head_modes.py",
    "chunk_size": "the same loss by definition",
    "retain_bytes": "the same loss by definition; tests/head",
    "gradient_reduction": "differs over several processes; tests/test_distributed.py",
    "missing_rollout": "differs in what is refused; tests/losses/test_missing_rollout.py",
    "accept_mismatch": "differs in what is refused; tests/losses/test_terms_and_weights.py",
}


def outcome(**settings: Any) -> tuple[Any, ...]:
    torch.manual_seed(1)
    item, head = random_item(), random_head()
    rows, width, vocabulary = 2, 13, 11
    everything = torch.randn(rows, width, vocabulary, dtype=torch.float64).log_softmax(-1)
    advantages = item.advantages.clone()
    advantages[:, ::4] = 0
    item = item.replace(advantages=advantages)
    kind = settings.get("kl_loss_type")
    if kind == "full":
        item = item.replace(ref_topk_logprobs=everything)
    if kind == "top_k":
        ids = torch.arange(3).expand(rows, width, 3)
        item = item.replace(ref_topk_ids=ids, ref_topk_logprobs=everything[..., :3])
    cfg = GRPOLossConfig(**settings)
    if cfg.ignore_idx != -100:
        item = item.replace(shifted_labels=item.shifted_labels.clip(min=0))
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    loss, metrics = GRPOLossContext(cfg, kwargs).forward(*head)
    grads = torch.autograd.grad(loss, head)
    return (loss.item(), *(grad.double().sum().item() for grad in grads), sorted(to_floats(metrics).items()))


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_it_changes_something(field: str) -> None:
    beside, value = CHANGES[field]
    first, second = value if isinstance(value, tuple) and field == "kl_loss_type" else (None, value)
    base = outcome(**beside, **({field: first} if first else {}))
    if field == "ignore_idx":
        base = outcome(ignore_idx=4)
    assert str(outcome(**beside, **{field: second})) != str(base)


def test_no_field_is_forgotten() -> None:
    assert set(GRPOLossConfig.model_fields) == {*CHANGES, *ELSEWHERE}
    own = {"positive_loss_factor", "pos_sft_loss_weight", "pos_policy_loss_weight", "negative_loss_factor"}
    assert set(OrealLossConfig.model_fields) - set(GRPOLossConfig.model_fields) == own  # tests/losses/test_oreal.py
