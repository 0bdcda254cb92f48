"""Heads as models and PEFT have them: the product is the model's own, and every weight gets its gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor, nn

from tests.models.heads import KINDS, VOCABULARY, head_variant, tiny_lm, with_lora
from toolkit.errors import ConfigError
from toolkit.head import token_logprobs
from toolkit.head.adapters import find_head, refuse_wrappers, transforms_of
from toolkit.models.policy import Policy

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 2, 3]])


def product(lm: Any) -> Tensor:
    head = find_head(lm)
    return nn.functional.linear(*head.inputs(head.trunk(input_ids=IDS).last_hidden_state))


def assert_own_logits(lm: Any) -> None:
    torch.testing.assert_close(product(lm), lm(input_ids=IDS).logits, rtol=1e-10, atol=1e-12)


def test_lora_by_hand() -> None:
    """Logits W h + s B A h with W = [[1, 0], [0, 1]], A = [[1, 1]], B = [[2], [0]], s = 0.5, h = (3, 4)."""
    weight, down, up = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
    for module, values in ((weight, [[1.0, 0.0], [0.0, 1.0]]), (down, [[1.0, 1.0]]), (up, [[2.0], [0.0]])):
        module.weight.data = torch.tensor(values)
    lora = nn.Module()
    lora.base_layer, lora.merged, lora.disable_adapters, lora.active_adapters = weight, False, False, ["x"]
    lora.lora_A, lora.lora_B = nn.ModuleDict({"x": down}), nn.ModuleDict({"x": up})
    lora.scaling, lora.lora_dropout = {"x": 0.5}, nn.ModuleDict({"x": nn.Identity()})
    lm = SimpleNamespace(base_model=len, get_output_embeddings=lambda: lora)
    hidden, wide, bias = find_head(lm).inputs(torch.tensor([[3.0, 4.0]]))
    assert hidden.tolist() == [[3.0, 4.0, 3.5]]
    assert wide.tolist() == [[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]
    assert bias is None
    assert (hidden @ wide.t()).tolist() == [[10.0, 4.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_the_models_own(kind: str) -> None:
    assert_own_logits(head_variant(kind))


def test_adapters_come_and_go() -> None:
    lm = with_lora(tiny_lm(biased=True), "one", "two", use_rslora=True)
    plain = tiny_lm(biased=True)(input_ids=IDS).logits
    assert_own_logits(lm)
    lm.base_model.set_adapter(["one", "two"])
    assert find_head(lm).inputs(torch.zeros(1, 12, dtype=torch.float64))[0].shape == (1, 12 + 3 + 2)
    assert_own_logits(lm)
    both = product(lm)
    with lm.disable_adapter():
        assert_own_logits(lm)
        torch.testing.assert_close(product(lm), plain)
    lm.set_adapter("two")
    assert not torch.allclose(product(lm), both)
    assert_own_logits(lm)
    lm.merge_adapter()
    assert_own_logits(lm)
    with lm.disable_adapter():  # unmerges, as PEFT itself does
        torch.testing.assert_close(product(lm), plain)
    assert_own_logits(lm)
    assert_own_logits(lm.merge_and_unload())
    whole = head_variant("whole")
    whole.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    assert_own_logits(whole)
    with whole.disable_adapter():
        assert_own_logits(whole)
        assert find_head(whole).inputs(torch.zeros(1, 12))[1] is whole.base_model.model.lm_head.original_module.weight


def test_lora_with_a_bias_of_its_own() -> None:
    for biased in (False, True):
        lm = with_lora(tiny_lm(biased=biased), lora_bias=True, target_modules=["lm_head"])
        assert_own_logits(lm)


def test_dropout_of_the_adapter() -> None:
    lm = with_lora(tiny_lm(), target_modules=["lm_head"], lora_dropout=0.5).train()
    torch.manual_seed(5)
    ours = product(lm)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, lm(input_ids=IDS).logits)
    assert_own_logits(lm.eval())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [3, 100])
def test_gradients_are_those_of_the_models_own_logits(kind: str, chunk: int) -> None:
    found = []
    for is_ours in (True, False):
        lm = head_variant(kind).eval()
        if is_ours:
            head = find_head(lm)
            hidden, weight, bias = head.inputs(head.trunk(input_ids=IDS[:, :-1]).last_hidden_state)
            logprobs = token_logprobs(hidden, weight, IDS[:, 1:], bias, chunk_size=chunk)
        else:
            all_logprobs = lm(input_ids=IDS[:, :-1]).logits.log_softmax(-1)
            logprobs = all_logprobs.gather(-1, IDS[:, 1:, None]).squeeze(-1)
        logprobs.square().sum().backward()
        found.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    ours, exact = found
    assert ours.keys() == exact.keys()
    for name, grad in exact.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)
    assert any("embed" in name or "lora" in name or "lm_head" in name for name in exact)
    frozen = {"frozen": "lm_head.weight", "lora": "base_model.model.lm_head.base_layer.weight"}.get(kind)
    assert frozen is None or frozen not in ours


def test_a_small_update_survives_bf16() -> None:
    """Rounded to bf16, W + s B A forgets much of a B A of one percent of W; two products side by side do not."""
    torch.manual_seed(0)
    lm = with_lora(tiny_lm(), target_modules=["lm_head"]).float()
    layer = lm.base_model.model.lm_head
    layer.lora_B["default"].weight.data.mul_(1e-4)
    layer.base_layer.bfloat16()
    hidden = torch.randn(500, 12).bfloat16()
    head = find_head(lm)
    exact = hidden.double() @ layer.get_delta_weight("default").double().t()
    base = hidden.double() @ layer.base_layer.weight.double().t()
    wide_hidden, wide, _ = head.inputs(hidden)
    assert wide_hidden.dtype == wide.dtype == torch.bfloat16
    kept = {}
    for name, logits in {
        "side by side": wide_hidden.double() @ wide.double().t(),
        "rounded": hidden.double()
        @ (layer.base_layer.weight + layer.get_delta_weight("default").bfloat16()).double().t(),
    }.items():
        kept[name] = float(((logits - base) * exact).sum() / exact.square().sum())
    assert kept["side by side"] == pytest.approx(1, abs=0.01)
    assert abs(kept["rounded"] - 1) > 0.2, kept


def refused(lm: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_head(lm).inputs(torch.zeros(1, 12, dtype=torch.float64))


def test_adapters_that_are_refused() -> None:
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    refused(with_lora(tiny_lm(), use_dora=True), "DoRA.*not a plain LoRA")
    ia3 = IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    refused(get_peft_model(tiny_lm(), ia3), "modules_to_save")
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    refused(get_peft_model(tiny_lm(), prompt), "virtual tokens")
    tokens = with_lora(tiny_lm(tied=True), target_modules=["q_proj"], trainable_token_indices=[1, 2])
    refused(tokens, "trainable_token_indices")


def test_heads_and_wrappers_that_are_refused() -> None:
    packed = tiny_lm()
    packed.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 6, dtype=torch.uint8), requires_grad=False)
    refused(packed, "quantization")
    whole = tiny_lm()
    whole.set_output_embeddings(nn.Sequential(nn.Linear(12, VOCABULARY)))
    refused(whole, "linear layer")
    refused(tiny_lm().model, "no head")
    refused(SimpleNamespace(), "no head")
    partitioned = tiny_lm()
    partitioned.lm_head.weight.ds_id, partitioned.lm_head.weight.ds_status = 0, "NOT_AVAILABLE"
    refused(partitioned, "ZeRO-3.*fsdp2")
    flattened = tiny_lm()
    flattened.lm_head.weight._fsdp_flattened = True
    refused(flattened, "FSDP 1")

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    for lm in (FullyShardedDataParallel(tiny_lm()), nn.DataParallel(tiny_lm())):
        words = "fsdp2" if isinstance(lm, FullyShardedDataParallel) else "torchrun"
        refused(lm, words)
        with pytest.raises(ConfigError, match=words):
            refuse_wrappers(nn.ModuleList([lm]))
    replica = Policy(tiny_lm())
    replica._is_replica = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="torchrun"):
        replica(IDS, torch.ones_like(IDS))


def test_what_configs_say_of_logits() -> None:
    def first(**names: Any) -> Any:
        found = list(transforms_of(SimpleNamespace(config=SimpleNamespace(**names))))
        return [(t.scale, t.softcap) for t in found]

    assert first() == first(logit_scale=1.0, final_logit_softcapping=None) == []
    assert first(logits_scaling=8.0) == [(0.125, None), (8.0, None)]
    assert first(logit_scale=0.0625) == [(0.0625, None), (16.0, None)]
    assert first(final_logit_softcapping=30.0) == [(1.0, 30.0)]
    assert first(logits_scaling=2.0, final_logit_softcapping=30.0) == [(0.5, 30.0), (2.0, 30.0), (1.0, 30.0)]
    assert list(transforms_of(SimpleNamespace())) == []
