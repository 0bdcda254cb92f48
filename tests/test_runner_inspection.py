"""`LossRunner.compare`, `sweep`, `explain`, `check`, and what runner, results and records show."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_runner_models import ADVANTAGES, MASKS, ROWS, causal_lm
from toolkit import BaseLossConfig, CELossConfig, ConfigError, DataError, GRPOLossConfig, LossRunner, errors
from toolkit.functional.policy import registry
from toolkit.runner.comparison import Comparison


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


def batch_of(shape: tuple[int, int] = (2, 6), width: int = 4, size: int = 11) -> tuple[Tensor, Tensor, dict[str, Any]]:
    hidden, weight = torch.randn(*shape, width), torch.randn(size, width, requires_grad=True)
    ids = torch.randint(0, size, shape)
    scores = (hidden @ weight.detach().T)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    old = torch.nn.functional.pad(scores + 0.3 * torch.randn_like(scores), (0, 1))
    advantages = torch.tensor([1.0, -1.0]).repeat(shape[0] // 2).unsqueeze(-1)
    return hidden, weight, {"input_ids": ids, "advantages": advantages, "old_logprobs": old}


def test_compare_gives_what_each_loss_gives_alone() -> None:
    hidden, weight, fields = batch_of()
    runner = LossRunner.from_overrides(["loss=grpo", "mode=eager"])
    names = ["policy_loss=vanilla", "policy_loss=gspo", "aggregation=token_sum"]
    comparison = runner.compare(names, hidden, weight, **fields)
    flat = []
    for name in names:
        leaf = hidden.clone().requires_grad_()
        result = LossRunner.from_overrides(["loss=grpo", "mode=eager", name])(leaf, weight, **fields)
        gradients = torch.autograd.grad(result.loss, [leaf, weight])
        flat.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        assert comparison[name].loss == pytest.approx(result.loss.item(), rel=1e-6)
        assert comparison[name].gradient_norm == pytest.approx(flat[-1].norm().item(), rel=1e-5)
        assert comparison[name].metrics["clip_fraction_low"] == result.metrics["clip_fraction_low"]
        assert comparison[name].seconds > 0
        assert comparison[name].peak_bytes > 0
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1)
    torch.testing.assert_close(comparison.cosines, expected, rtol=1e-5, atol=1e-6)
    assert 0.9 < comparison.cosines[0, 2].item() <= 1  # a sum points where the mean points
    assert comparison.of == "the hidden states and the head's weight"
    assert weight.grad is None
    with pytest.raises(DataError, match="there are policy_loss=vanilla"):
        comparison["policy_loss=cispo"]


def test_compare_on_a_model_is_of_its_parameters() -> None:
    lm, names = causal_lm("tied"), ["policy_loss=vanilla", "policy_loss=cispo"]
    runner = LossRunner.from_overrides(["loss=grpo"])
    batch = {"input_ids": ROWS, "loss_mask": MASKS, "advantages": ADVANTAGES}
    batch["old_logprobs"] = runner.logprobs(lm, batch) + 0.4 * torch.randn(3, 5)
    comparison = runner.compare(names, lm, batch)
    gradients = []
    for name in names:
        lm.zero_grad()
        LossRunner.from_overrides(["loss=grpo", name])(lm, batch).backward()
        gradients.append(torch.cat([p.grad.reshape(-1).float() for p in lm.parameters() if p.grad is not None]))
        assert comparison[name].gradient_norm == pytest.approx(gradients[-1].norm().item(), rel=1e-4)
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert comparison.cosines[0, 1].item() == pytest.approx(expected.item(), abs=1e-5)
    assert comparison.of == "the model's parameters"


def test_a_runner_of_a_config_is_changed_by_overrides_too() -> None:
    hidden, weight, fields = batch_of()
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", "cliprange_low": 0.1}, entropy_coef=0.01)
    comparison = LossRunner(cfg).sweep("policy_loss.cliprange_high", [0.05, 0.28], hidden, weight, **fields)
    for each, high in zip(comparison.losses, (0.05, 0.28), strict=True):
        options = {"loss_type": "vanilla", "cliprange_low": 0.1, "cliprange_high": high}
        alone = LossRunner(GRPOLossConfig(policy_loss_cfg=options, entropy_coef=0.01))(hidden, weight, **fields)
        assert each.name == f"policy_loss.cliprange_high={high}"
        assert each.loss == pytest.approx(alone.loss.item(), rel=1e-6)
    assert comparison.losses[0].metrics["clip_fraction_high"] > comparison.losses[1].metrics["clip_fraction_high"]
    (other,) = LossRunner(cfg).compare(["policy_loss=gspo"], hidden, weight, **fields).losses
    alone = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "gspo"}, entropy_coef=0.01))
    assert other.loss == pytest.approx(alone(hidden, weight, **fields).loss.item(), rel=1e-6)


def test_compare_takes_configs_runners_lists_and_names() -> None:
    hidden, weight, fields = batch_of()
    runner = LossRunner.from_overrides(["loss=grpo", "policy_loss=gspo"])
    comparison = runner.compare(
        {
            "as it is": runner,
            "wide": ["policy_loss=vanilla", "policy_loss.cliprange_high=0.4"],
            "plain": GRPOLossConfig(),
        },
        hidden,
        weight,
        **fields,
    )
    assert [each.name for each in comparison.losses] == ["as it is", "wide", "plain"]
    assert comparison["as it is"].loss == pytest.approx(runner(hidden, weight, **fields).loss.item(), rel=1e-6)


class Custom(BaseLossConfig):
    """A loss that the command line does not know."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, b: r.compare(["policy_loss=gsp"], *b[:2], **b[2]), "gspo"),
        (lambda r, b: r.compare(["training.steps=3"], *b[:2], **b[2]), "LossRunner has no training"),
        (lambda r, b: r.compare("policy_loss=gspo", *b[:2], **b[2]), "losses is a str; give a list"),
        (lambda r, b: r.compare([], *b[:2], **b[2]), "^losses is empty; give at least one"),
        (lambda r, b: r.compare(["kl=k3"]), r"nothing to compare .* write runner\.compare\(losses, model, batch\) or"),
        (lambda r, b: r.sweep("mode", ["chunk"]), r"write runner\.sweep\(key, values, model, batch\) or"),
        (lambda r, b: r.sweep("policy_loss.cliprange_high", [], *b[:2], **b[2]), "^values is empty; give at least one"),
        (lambda r, b: r.sweep("cliprange_high", [0.3], *b[:2], **b[2]), "did you mean 'policy_loss.cliprange_high'"),
        (lambda r, b: r.sweep("temperature", [0.3], *b[:2], **b[2]), r"did you mean 'rollout\.temperature'"),
        (lambda r, b: r.sweep("entropy_coef", [0.3], *b[:2], **b[2]), r"did you mean 'loss\.entropy_coef'"),
        (lambda r, b: r.compare([3], *b[:2], **b[2]), "losses holds an int"),
        (lambda r, b: r.compare(["kl=k3", "kl=k3"], *b[:2], **b[2]), "'kl=k3' twice"),
        (lambda r, b: r.compare(["kl=k3"], *b[:2], **b[2]), "^kl=k3: .*ref_logprobs"),
        (lambda r, b: r.compare(["kl=k3"], *b[:2], b[2]), "head_bias is"),
        (lambda r, b: r.sweep("kl=k3", [1], *b[:2], **b[2]), "a setting without a value"),
        (lambda r, b: r.sweep("policy_loss.cliprange_high", 0.3, *b[:2], **b[2]), r"values is a float; give a list"),
        (lambda r, b: r.sweep("policy_loss.cliprange_hig", [0.3], *b[:2], **b[2]), "cliprange_high"),
        (lambda r, b: LossRunner(Custom()).compare(["mode=chunk"], *b[:2], **b[2]), "not a class of the command line"),
    ],
)  # fmt: skip
def test_wrong_comparisons_are_answered(call: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        call(LossRunner(GRPOLossConfig()), batch_of())


def test_tables_show_units_and_escape() -> None:
    hidden, weight, fields = batch_of()
    losses = {"<a>": GRPOLossConfig(), "b": "policy_loss=gspo"}
    comparison = LossRunner(GRPOLossConfig()).compare(losses, hidden, weight, **fields)
    assert "gradient norm" in repr(comparison)
    assert "time (ms)" in repr(comparison)
    assert "1.000" in repr(comparison)
    html = comparison._repr_html_()
    assert "&lt;a&gt;" in html
    assert "<a>" not in html
    flat = Comparison(comparison.losses, torch.full((2, 2), float("nan")), "nothing")
    assert " nan" not in repr(flat)


def test_runner_result_config_and_records_show_themselves() -> None:
    hidden, weight, fields = batch_of()
    runner = LossRunner.from_overrides(["loss=grpo", "policy_loss.cliprange_high=0.28", "mode=chunk"])
    assert "cliprange_high=0.28 (default 0.2)" in repr(runner)
    assert "mode='chunk' (default 'eager')" in repr(runner)
    assert "softcap" not in repr(runner)  # as by default
    assert "vanilla: " in repr(runner)
    result = runner(hidden, weight, **fields)
    shown = [runner, result, runner.loss_cfg, runner.explain(hidden, weight, **fields), runner.explain()]
    for each in shown:
        html = each._repr_html_()
        assert html.startswith("<div")
        assert html.count("<div") == html.count("</div>")
        assert ":#" not in html  # colours are inherited: light and dark
    html = result._repr_html_()
    assert html.index(">entropy<") < html.index(">kl_old<") < html.index(">policy_loss<")
    assert ">nats<" in html
    lines = repr(result).splitlines()
    assert lines[1:-1] == sorted(lines[1:-1])
    assert any(line.startswith("  entropy=") and line.endswith(" nats") for line in lines)
    assert "cliprange_high" in runner.loss_cfg._repr_html_()
    assert "All settings at their defaults" in LossRunner(GRPOLossConfig())._repr_html_()
    item_html = GRPOLossConfig().loss_ctx_cls.build_batches_loss_kwargs  # kwargs come from items
    assert callable(item_html)
    from toolkit import RLLossContextInputItem

    item = RLLossContextInputItem.from_unshifted(fields["input_ids"], advantages=fields["advantages"])
    (kwargs,) = item_html([item], GRPOLossConfig())
    for record in (item, kwargs):
        assert "[2, 6]" in record._repr_html_()
    assert "loss = sum over scored tokens" in repr(LossRunner(GRPOLossConfig()).explain())


def test_shares_of_tokens_are_shown_as_shares() -> None:
    hidden, weight, fields = batch_of()
    result = LossRunner(GRPOLossConfig())(hidden, weight, **{**fields, "advantages": [0.0, 1.0]})
    lines = [line.strip() for line in repr(result).splitlines()]
    assert "zero_advantage_sequences=0.5 share" in lines
    assert "zero_advantage_tokens=0.5 share" in lines
    assert "active_tokens=10 tokens" in lines


def test_check_runs_the_checks() -> None:
    report = LossRunner(CELossConfig()).check()
    assert report
    assert "every layout" in repr(report)
    assert "every layout" in report._repr_html_()


@pytest.mark.slow
def test_check_finds_a_wrong_loss() -> None:
    from toolkit import register_policy_loss

    @register_policy_loss("upside_down", overwrite=True)
    def upside_down(t: Any) -> Any:
        """A loss with the wrong sign."""
        return t.ratio() * t.advantages

    report = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "upside_down"})).check()
    assert not report
    assert "gradient sign" in repr(report)


@pytest.mark.slow
def test_eight_losses_on_a_batch_take_two_seconds() -> None:
    hidden, weight, fields = batch_of((4, 256), 64, 1000)
    runner = LossRunner.from_overrides(["loss=grpo"])
    names = [f"policy_loss={name}" for name in registry.policy_loss_names() if not registry.policy_loss(name).needs][:8]
    runner.compare(names, hidden, weight, **fields)  # composes the configurations, which are kept
    started = time.perf_counter()
    assert len(runner.compare(names, hidden, weight, **fields).losses) == 8
    assert time.perf_counter() - started < 2
