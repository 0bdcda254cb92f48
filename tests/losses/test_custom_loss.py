"""Losses of one's own: unreduced values by term, the interface's skeleton filled in, and one registered function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.conftest import random_head, random_item
from toolkit import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossKwargs,
    ConfigError,
    DataError,
    GRPOLossConfig,
    LossRunner,
    LossTerm,
    PerToken,
    RLLossContextInputItem,
    ScoredLossContext,
    register_policy_loss,
)
from toolkit.explain.formula import explain_loss
from toolkit.testing import assert_layout_invariant, random_batch
from toolkit.training.rehearsal import rehearse

# ------------------------------------------------------------------------ the example of tutorials/reference/losses.md


class FocalContext(BaseLossContext):
    def losses_from_logits(self, logits, loss_kwargs):
        labels = loss_kwargs.shifted_labels.unsqueeze(-1)
        logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        return -((1 - logprobs.exp()) ** self.loss_cfg.gamma) * logprobs


class FocalLossConfig(BaseLossConfig):
    """Focal loss: tokens that are predicted well already count less; its gradient goes through the logits."""

    context = FocalContext
    gamma: float = 2.0
    """How much less."""


# ------------------------------------------------------------------------------------------------ two terms


class ToolItem(RLLossContextInputItem):
    is_tool: Annotated[Tensor | None, PerToken(pad=0, kind="bool")] = None
    """Which tokens a tool wrote."""


class ToolKwargs(BaseLossKwargs):
    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor, PerToken(pad=0.0)]


class ToolContext(ScoredLossContext):
    item_cls, kwargs_cls = ToolItem, ToolKwargs

    def token_losses(self, scores, loss_kwargs):
        ratio = (scores.logprobs - loss_kwargs.old_logprobs).exp()
        clipped = ratio.clamp(0.8, 1.2) * loss_kwargs.advantages
        return {"policy": -torch.minimum(ratio * loss_kwargs.advantages, clipped), "tools": -scores.logprobs}


class ToolLossConfig(BaseLossConfig):
    """A policy loss by token, and cross-entropy of what tools wrote by sequence."""

    context = ToolContext
    tool_coef: float = 0.5
    """Factor of the latter."""

    @property
    def terms(self):
        by_sequence = {"aggregation": "seq_mean_token_mean", "token_filter": lambda item: item.is_tool}
        return (
            LossTerm(name="policy", token_filter=lambda item: ~item.is_tool),
            LossTerm(name="tools", coef=self.tool_coef, **by_sequence),
        )


LOSSES = {
    "focal": FocalLossConfig(gamma=1.5, temperature=1.3, softcap=4.0, logit_scale=0.7),
    "tools": ToolLossConfig(temperature=1.3, softcap=4.0, logit_scale=0.7),
}


def logprobs_of(batch: Any, cfg: Any) -> Tensor:
    """[B, T], by hand: scale, soft cap, temperature."""
    logits = (batch.hidden_states @ batch.head_weight.T + batch.head_bias) * cfg.logit_scale
    capped = cfg.softcap * torch.tanh(logits / cfg.softcap) / cfg.temperature
    return capped.log_softmax(-1).gather(-1, batch.item.shifted_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def loss_of(cfg: Any, batch: Any) -> Tensor:
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([batch.item], cfg)
    loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(batch.hidden_states, batch.head_weight, batch.head_bias)
    return loss


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_focal_is_its_formula(mode: str) -> None:
    cfg = LOSSES["focal"].model_copy(update={"mode": mode, "chunk_size": 3})
    batch = random_batch(cfg)
    logprobs, is_scored = logprobs_of(batch, cfg), batch.item.shifted_labels != -100
    by_hand = ((1 - logprobs.exp()) ** 1.5 * -logprobs)[is_scored].mean()
    torch.testing.assert_close(loss_of(cfg, batch), by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_two_terms_are_their_formula(mode: str) -> None:
    cfg = LOSSES["tools"].model_copy(update={"mode": mode, "chunk_size": 3})
    batch = random_batch(cfg)
    item, logprobs = batch.item, logprobs_of(batch, cfg)
    ratio = (logprobs - item.old_logprobs).exp()
    policy = -torch.minimum(ratio * item.advantages, ratio.clamp(0.8, 1.2) * item.advantages)
    is_scored = item.shifted_labels != -100
    is_tool, is_policy = is_scored & item.is_tool, is_scored & ~item.is_tool
    assert is_tool.any()
    assert is_policy.any()
    by_sequence = [-own[chosen].mean() for own, chosen in zip(logprobs, is_tool, strict=True) if chosen.any()]
    by_hand = policy[is_policy].mean() + 0.5 * torch.stack(by_sequence).mean()
    torch.testing.assert_close(loss_of(cfg, batch), by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", list(LOSSES))
def test_own_losses_have_one_gradient_in_every_layout(name: str) -> None:
    assert_layout_invariant(LOSSES[name], processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", list(LOSSES))
def test_own_losses_have_one_gradient_over_processes(name: str, processes: int) -> None:
    assert_layout_invariant(LOSSES[name], processes=processes, sequence_parallel=(1, 2, 4))


@pytest.mark.parametrize(
    ("classes", "limit"), [((FocalContext, FocalLossConfig), 20), ((ToolItem, ToolLossConfig), 25)]
)
def test_they_are_short(classes: tuple[type, type], limit: int) -> None:
    lines = Path(__file__).read_text().splitlines()
    first, last = (lines.index(next(s for s in lines if s.startswith(f"class {own.__name__}("))) for own in classes)
    end = next(i for i, line in enumerate(lines) if i > last and line and not line.startswith(" "))
    own = [line for line in lines[first:end] if line.strip() and not line.strip().startswith('"""')]
    assert len(own) <= limit


def test_what_is_not_one_value_a_token_is_refused() -> None:
    class Averaged(FocalContext):
        def losses_from_logits(self, logits, loss_kwargs):
            return super().losses_from_logits(logits, loss_kwargs).mean()

    class Unnamed(ToolContext):
        def token_losses(self, scores, loss_kwargs):
            return {"policy": scores.logprobs}

    for context, name, words in (
        (Averaged, "focal", r"returned torch.float64 \[\] for term 'loss'; return the value of each token"),
        (Unnamed, "tools", r"values of \['policy'\], but its terms are \['policy', 'tools'\]"),
    ):
        cfg = LOSSES[name]
        batch = random_batch(cfg)
        (kwargs,) = context.build_batches_loss_kwargs([batch.item], cfg)
        with pytest.raises(DataError, match=words):
            context(cfg, kwargs).forward(batch.hidden_states, batch.head_weight, batch.head_bias)


def broken(context: Any, name: str = "focal", **changes: Any) -> None:
    """Build and run a context that somebody got wrong."""
    cfg = LOSSES[name]
    batch = random_batch(cfg)
    (kwargs,) = context.build_batches_loss_kwargs([batch.item.replace(**changes)], cfg)
    context(cfg, kwargs).forward(batch.hidden_states, batch.head_weight, batch.head_bias)


def test_slips_are_named() -> None:
    class WithMetrics(FocalContext):
        def losses_from_logits(self, logits, loss_kwargs):
            return super().losses_from_logits(logits, loss_kwargs), {}

    class Whole(FocalContext):
        def losses_from_logits(self, logits, loss_kwargs):
            return loss_kwargs.shifted_labels

    class Undeclared(FocalContext):
        def losses_from_logits(self, logits, loss_kwargs):
            return loss_kwargs.advantages

    class Stray(FocalContext):
        kwargs_cls = ToolKwargs  # its items have no advantages

    for context, error, words in (
        (WithMetrics, DataError, r"WithMetrics returned tuple for its values; return a tensor \[n\], or a dict"),
        (Whole, DataError, r"Whole returned torch.int64 \[12\] for term 'loss'"),
        (Undeclared, AttributeError, "no field 'advantages'; if it is your own, declare advantages: Annotated"),
        (Stray, ConfigError, "ToolKwargs.advantages stays empty: LossContextInputItem, the item_cls of Stray, has no"),
    ):
        with pytest.raises(error, match=words):
            broken(context)
    with pytest.raises(
        DataError, match=r"the token_filter of term 'policy' failed on .*; do all items have the fields"
    ):
        broken(ToolContext, "tools", is_tool=None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": None}, "must be an identifier"),
        ({"coef": float("nan")}, "coef must be a finite number"),
        ({"coef": "0.5"}, "coef must be a finite number"),
        ({"coef": True}, "coef must be a finite number"),
        ({"token_filter": "is_tool"}, "token_filter is a str; give a function"),
        ({"aggregation": "token_meen"}, "did you mean 'token_mean'"),
    ],
)
def test_wrong_terms_are_refused_at_once(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LossTerm(**wrong)


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(
        ConfigError,
        match=r"PerToken\(kind='int', .*: kind must be 'any', 'float', 'number', 'integer' or 'bool'",
    ):
        PerToken(pad=0, kind="int")  # type: ignore[arg-type]


def test_a_card_lists_the_terms() -> None:
    card = " ".join(explain_loss(LOSSES["tools"]).split())
    assert "A policy loss by token, and cross-entropy of what tools wrote by sequence" in card
    assert "1 x policy, over the tokens that its filter selects; token_mean: weight = 1 / N" in card
    assert "0.5 x tools, over the tokens that its filter selects; seq_mean_token_mean: weight = 1 / (S n)" in card
    assert "What every loss can be told" not in explain_loss(BaseLossConfigOfNobody())


class BaseLossConfigOfNobody(BaseLossConfig):
    context = FocalContext


def test_a_loss_of_one_s_own_is_rehearsed_before_a_run() -> None:
    rehearse(LOSSES["focal"])
    with pytest.raises(DataError, match="is a RLLossContextInputItem; this loss takes ToolItem"):
        rehearse(LOSSES["tools"])  # the trainer makes no such items

    class Broken(FocalContext):
        def losses_from_logits(self, logits, loss_kwargs):
            raise ValueError("oh")

    class Config(BaseLossConfig):
        context = Broken

    with pytest.raises(ConfigError, match="loss Config: it raised ValueError: oh"):
        rehearse(Config())


# ------------------------------------------------------------------------------------------------ the document's way


class SkeletonConfig(BaseLossConfig):
    """Focal loss weighted by advantages, with kwargs that the class builds itself."""

    gamma: float = 2.0

    @property
    def loss_ctx_cls(self) -> type[SkeletonContext]:
        return SkeletonContext


class SkeletonKwargs(BaseLossKwargs):
    shifted_labels: torch.Tensor
    loss_weight: torch.Tensor
    gamma: Any


class SkeletonContext(BaseLossContext[RLLossContextInputItem]):
    loss_cfg: SkeletonConfig
    loss_kwargs: SkeletonKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[RLLossContextInputItem],
        loss_cfg: SkeletonConfig,
        cu_seq_lens_list: list[torch.Tensor] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[SkeletonKwargs]:
        tokens = sum(int((item.shifted_labels != loss_cfg.ignore_idx).sum()) for item in data_batches)
        return [
            SkeletonKwargs(
                shifted_labels=item.shifted_labels, loss_weight=item.advantages / tokens, gamma=loss_cfg.gamma
            )
            for item in data_batches
        ]

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: SkeletonKwargs
    ) -> tuple[Tensor, Tensor | None]:
        labels = loss_kwargs.shifted_labels
        logits = F.linear(hidden_states, head_weight, head_bias)
        logprobs = -F.cross_entropy(logits.flatten(0, -2), labels.flatten().clamp(min=0), reduction="none")
        token_losses = (1 - logprobs.exp()) ** loss_kwargs.gamma * -logprobs
        weights = (loss_kwargs.loss_weight * (labels != self.loss_cfg.ignore_idx)).flatten()
        return (weights * token_losses).sum(), logits


def skeleton(mode: str, chunk_size: int = 4) -> tuple[Tensor, Any, list[Tensor]]:
    torch.manual_seed(1)
    item, (hidden, weight, bias) = random_item(), random_head()
    cfg = SkeletonConfig(gamma=1.5, mode=mode, chunk_size=chunk_size)
    (kwargs,) = SkeletonContext.build_batches_loss_kwargs([item], cfg)
    loss, extra = SkeletonContext(cfg, kwargs).forward(hidden, weight, bias)
    return loss, extra, list(torch.autograd.grad(-1.7 * loss, (hidden, weight, bias)))


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 100])
def test_skeleton_in_both_modes(chunk_size: int) -> None:
    eager, logits, eager_grads = skeleton("eager")
    chunked, extra, chunked_grads = skeleton("chunk", chunk_size)
    assert logits.shape == (2, 13, 11)
    assert extra is None  # the logits of a chunk are not kept
    assert abs(eager.item()) > 1e-3
    torch.testing.assert_close(chunked, eager, rtol=1e-12, atol=0)
    for ours, theirs in zip(chunked_grads, eager_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_tensor_of_unknown_layout_is_refused_by_name() -> None:
    class Kwargs(BaseLossKwargs):
        temperatures: torch.Tensor

    kwargs = Kwargs(shifted_labels=torch.zeros(1, 4, dtype=torch.int64), temperatures=torch.ones(1, 4))
    with pytest.raises(DataError, match=r"Kwargs\.temperatures .* PerToken"):
        kwargs.chunk(2)


def test_one_function_is_a_loss() -> None:
    @register_policy_loss("my_ppo")
    def my_ppo(t, *, eps: float = 0.2):
        r = t.ratio()
        return -torch.minimum(r * t.advantages, r.clamp(1 - eps, 1 + eps) * t.advantages)

    item, head = random_item(), random_head()
    fields = dict(item.tensors())
    mine = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "my_ppo", "eps": 0.3}))(*head, **fields)
    vanilla = {"loss_type": "vanilla", "cliprange_low": 0.3, "cliprange_high": 0.3, "clip_ratio_c": None}
    builtin = LossRunner(GRPOLossConfig(policy_loss_cfg=vanilla))(*head, **fields)
    torch.testing.assert_close(mine.loss, builtin.loss, rtol=1e-12, atol=0)


def test_sequence_statistics_need_the_scope_to_say_so() -> None:
    def centred(t):
        return -t.logprobs * (t.advantages - t.segment_mean(t.advantages))

    register_policy_loss("centred_token")(centred)
    register_policy_loss("centred", scope="sequence", overwrite=True)(centred)
    item, head = random_item(), random_head()
    fields = dict(item.tensors())
    with pytest.raises(ValueError, match="scope='sequence'"):
        LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "centred_token"}))(*head, **fields)
    eager = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "centred"}))(*head, **fields).loss
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "centred"}, mode="chunk", chunk_size=3)
    chunked = LossRunner(cfg)(*head, **fields).loss
    torch.testing.assert_close(chunked, eager, rtol=1e-12, atol=1e-15)


def test_a_loss_that_averages_is_refused() -> None:
    @register_policy_loss("averaged")
    def averaged(t):
        return (t.logprobs * t.advantages).mean()

    with pytest.raises(DataError, match="without a mean"):
        LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "averaged"}))(
            *random_head(), **dict(random_item().tensors())
        )
