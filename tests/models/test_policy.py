"""The policy's log-probabilities are the model's own, on every architecture, or the start-up check says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.models.heads import VOCABULARY, head_variant, tiny_lm, with_lora
from toolkit import CELossConfig, GRPOLossConfig
from toolkit.errors import ConfigError, DataError
from toolkit.head.logits import LogitTransform
from toolkit.losses.auxiliary import auxiliary_weights
from toolkit.losses.items import CELossContextInputItem
from toolkit.metrics import to_floats
from toolkit.models.config import PretrainedConfig, TinyLlamaConfig
from toolkit.models.fit import fitted_transform
from toolkit.models.policy import Policy, check_head

SIZES = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
WIDE = {"head_dim": 8}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, head_dim=4,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip
ARCHITECTURES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    **{name: ({}, 1.0, None) for name in ("qwen2", "llama", "mistral", "phi3", "olmo2", "smollm3", "gpt2", "gpt_neox")},
    **{name: ({}, 1.0, None) for name in ("bloom", "falcon", "mamba")},
    "qwen3": (WIDE, 1.0, None),
    "qwen3_moe": ({**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, 1.0, None),
    "mixtral": (MOE, 1.0, None),
    "gpt_oss": ({**WIDE, **MOE}, 1.0, None),
    "deepseek_v3": (DEEPSEEK, 1.0, None),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 8}, 1.0, None),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "granitemoe": ({"logits_scaling": 8.0, **MOE}, 0.125, None),
    "hyperclovax": ({"logits_scaling": 8.0}, 8.0, None),  # the same name, and it multiplies
    "cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "gemma2": ({**WIDE, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "gemma3_text": ({**WIDE, "final_logit_softcapping": 0.5}, 1.0, 0.5),
    "nanochat": ({}, 1.0, 15.0),
}
"""Tiny random models: what their config adds, the scale and the soft cap that the policy must find."""


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name][0], **options}))
    with torch.no_grad():  # large enough for a soft cap to matter
        lm.get_output_embeddings().weight.mul_(30)
    return lm


def ragged(vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def own_logprobs(lm: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Through the model's own logits."""
    options = (
        {} if type(lm).__name__.startswith(("Mamba", "Bloom")) else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    )
    logits = lm(input_ids=ids, attention_mask=mask, **options).logits.double()
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    lm = build(name).eval()
    policy = Policy(lm)
    check_head(policy, 40)
    assert (policy.transform.scale, policy.transform.softcap) == ARCHITECTURES[name][1:]
    ids, mask = ragged()
    scored = mask[:, :-1].bool() & mask[:, 1:].bool()
    cfg = policy.fitted(CELossConfig(mode="chunk", chunk_size=3))
    item = CELossContextInputItem(shifted_labels=ids[:, 1:].masked_fill(~scored, -100))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    with torch.no_grad():
        exact = own_logprobs(lm, ids, mask)[scored]
        loss, _ = policy(ids, mask, cfg.loss_ctx_cls(cfg, kwargs))
        torch.testing.assert_close(policy(ids, mask)[scored].double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(loss.double(), -exact.mean(), rtol=0, atol=2e-5)
    if policy.transform != LogitTransform():
        raw = Policy(lm, LogitTransform())
        with torch.no_grad():
            assert float((raw(ids, mask)[scored] - exact).abs().max()) > 0.05, "what would be wrong without it"


def test_a_loss_config_takes_the_models_transform() -> None:
    policy = Policy(build("granite"))
    assert policy.fitted(GRPOLossConfig()).logit_scale == 0.125
    assert policy.fitted(GRPOLossConfig(logit_scale=0.125)).logit_scale == 0.125
    with pytest.raises(ConfigError, match=r"loss\.logit_scale=0\.25, but GraniteForCausalLM has logit_scale=0\.125"):
        policy.fitted(GRPOLossConfig(logit_scale=0.25))
    with pytest.raises(ConfigError, match=r"loss\.softcap=30"):
        policy.fitted(CELossConfig(softcap=30.0))
    cfg, (ids, mask) = CELossConfig(), ragged()
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=ids[:, 1:])], cfg)
    with pytest.raises(ConfigError, match=r"policy\.fitted"):
        policy(ids, mask, cfg.loss_ctx_cls(cfg, kwargs))


class Changed(LlamaForCausalLM):
    """A Llama that does something to its logits which its config does not name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x / 8, r"divides its logits by 8; set model\.logit_scale=0\.125.*loss\.logit_scale=0\.125"),
        (lambda x: x * 2.5, r"scales them by 2\.5; set model\.logit_scale=2\.5"),
        (lambda x: 3 * torch.tanh(x / 3), r"caps its logits at 3\.0; set model\.softcap=3\.0 "),
        (
            lambda x: 3 * torch.tanh(x * 0.25 / 3),
            r"by 4 and caps its logits at 3\.0; set model\.logit_scale=0\.25 and model\.softcap=3\.0",
        ),
        (lambda x: x + x.square(), "neither a scale nor a soft cap"),
    ],
)
def test_an_unnamed_transform_is_named(change: Any, words: str) -> None:
    lm = tiny_lm()
    lm.__class__, lm.change = Changed, change
    for given in (lm, with_lora(lm, target_modules=["q_proj"])):
        with pytest.raises(ConfigError, match=words):
            check_head(Policy(given), VOCABULARY)


def test_a_transform_that_is_given_is_checked() -> None:
    lm = tiny_lm()
    lm.__class__, lm.change = Changed, lambda x: x / 8
    policy = Policy(lm, LogitTransform(0.125))
    check_head(policy, VOCABULARY)
    assert policy.transform.scale == 0.125
    with pytest.raises(ConfigError, match=r"unlike transform=.* of Policy"):
        check_head(Policy(build("granite"), LogitTransform(0.5)), 40)
    lm.change = lambda x: x[..., :-1]
    with pytest.raises(DataError, match="same shape"):
        check_head(policy, VOCABULARY)


@pytest.mark.parametrize("kind", ["tied", "biased", "lora", "whole"])
def test_the_check_passes_what_is_right(kind: str) -> None:
    policy = Policy(head_variant(kind)).train()
    check_head(policy, VOCABULARY)
    assert policy.training
    assert policy.transform == LogitTransform()
    ids, mask = ragged(VOCABULARY)
    scored = mask[:, :-1].bool() & mask[:, 1:].bool()
    torch.testing.assert_close(policy(ids, mask)[scored], own_logprobs(policy.lm, ids, mask)[scored])


def test_a_fit_by_hand() -> None:
    raw = torch.tensor([[1.0, -2.0, 4.0]])
    assert fitted_transform(raw, raw * 0.5, 1e-6) == LogitTransform(0.5)
    assert fitted_transform(raw, 5 * torch.tanh(raw * 2 / 5), 1e-5) == LogitTransform(2.0, 5.0)
    assert fitted_transform(raw, raw + 1, 1e-3) is None


def test_a_pretrained_model_may_be_told_of_its_transform(tmp_path: Any) -> None:
    _, tokenizer = TinyLlamaConfig(hidden_size=16, intermediate_size=16, num_heads=2).build("abc=")
    build("granite").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert PretrainedConfig(path=str(tmp_path)).build("")[0].transform.scale == 0.125
    assert PretrainedConfig(path=str(tmp_path), logit_scale=0.125).build("")[0].transform.scale == 0.125
    with pytest.raises(ConfigError, match=r"set model\.logit_scale=0\.125"):
        PretrainedConfig(path=str(tmp_path), softcap=30.0).build("")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_router_loss_is_the_models_own(name: str) -> None:
    lm = build(name, output_router_logits=True, router_aux_loss_coef=0.3)
    ids, mask = ragged()
    policy = Policy(lm).eval()
    cfg = CELossConfig()
    item = CELossContextInputItem(shifted_labels=ids[:, 1:].masked_fill(mask[:, :-1] == 0, -100))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    context = cfg.loss_ctx_cls(cfg, kwargs)
    alone, _ = policy(ids, mask, context)  # no router loss in evaluation
    policy.train()
    (weight,) = auxiliary_weights([mask[:, :-1].sum()])
    both, metrics = policy(ids, mask, context, auxiliary_weight=weight)
    positions = (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)
    own = lm(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions).aux_loss
    torch.testing.assert_close(both - alone, 0.3 * own, rtol=1e-4, atol=1e-5)
    assert to_floats(metrics)["router_loss"] == pytest.approx(float(own.detach()), rel=1e-5)
    both.backward()
    assert all(bool(p.grad.any()) for n, p in lm.named_parameters() if n.endswith(("gate.weight", "router.weight")))
    empty, _ = policy(ids, torch.zeros_like(mask), context, auxiliary_weight=0.0)
    assert bool(empty.isfinite())
    with pytest.warns(UserWarning, match="is skipped"):
        left_out, _ = policy(ids, mask, context)
    torch.testing.assert_close(left_out, alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "bloom", "opt"])
def test_r12d_padding_changes_no_logprob(name: str) -> None:
    """unsloth-zoo#840: with padding on the left log-probabilities were off by 3.62, for positions counted it."""
    policy = Policy(build(name)).eval()
    ids = torch.randint(2, 40, (1, 6), generator=torch.Generator().manual_seed(2))
    padding, is_text = torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)
    with torch.no_grad():
        alone = policy(ids, is_text)
        left = policy(torch.cat([padding, ids], 1), torch.cat([padding, is_text], 1))[:, 3:]
        right = policy(torch.cat([ids, padding], 1), torch.cat([is_text, padding], 1))[:, :5]
        wrong = policy(torch.cat([padding, ids], 1), torch.ones(1, 9, dtype=torch.int64))[:, 3:]
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right, alone, rtol=1e-5, atol=1e-5)
    assert float((wrong - alone).abs().max()) > 1e-3
