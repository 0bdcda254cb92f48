"""However ragged sequences are laid out, loss and gradient of the shared head are the same (R10, R12c, R34)."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from toolkit import BaseLossConfig, CELossConfig, CELossContextInputItem, GRPOLossConfig, RLLossContextInputItem
from toolkit.functional.policy.registry import policy_loss, policy_loss_names

WIDTH, VOCABULARY = 3, 7
CONFIGS: list[BaseLossConfig] = [
    *[
        GRPOLossConfig(policy_loss_cfg={"loss_type": name}, use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1)
        for name in policy_loss_names()
        if policy_loss(name).scope != "batch"  # those look at a whole micro-batch by definition
    ],
    *[CELossConfig(loss_reduction=reduction) for reduction in ("token", "sample", "square")],
]
Sequence = dict[str, Tensor]
Layout = tuple[list[Sequence], list[Tensor] | None]


def make_sequences(lengths: list[int], seed: int) -> list[Sequence]:
    """One dict of [1, T] fields and hidden states for each sequence; about half of the tokens are not scored."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sequences = []
    for length in lengths:
        labels = torch.randint(0, VOCABULARY, (1, length), generator=draw)
        labels = labels.masked_fill(torch.rand(1, length, generator=draw) < 0.5, -100)
        sequences.append(
            {
                "shifted_labels": labels,
                "advantages": normal(1, length),
                "old_logprobs": (-2 + 0.5 * normal(1, length)).clamp(max=0),
                "ref_logprobs": (-2 + 0.5 * normal(1, length)).clamp(max=0),
                "rollout_logprobs": (-2 + 0.5 * normal(1, length)).clamp(max=0),
                "teacher_logprobs": (-2 + 0.5 * normal(1, length)).clamp(max=0),
                # A group of its own: a loss over groups needs each whole in one micro-batch.
                "group_ids": torch.full((1, length), len(sequences)),
                "hidden": normal(1, length, WIDTH),
            }
        )
    return sequences


def padded(sequences: list[Sequence], *, on_the_left: bool) -> Layout:
    """All sequences as rows of one batch; the padding holds garbage."""
    width = max(s["shifted_labels"].shape[1] for s in sequences)
    rows: dict[str, list[Tensor]] = {name: [] for name in sequences[0]}
    for sequence in sequences:
        for name, value in sequence.items():
            shape = (1, width - value.shape[1], *value.shape[2:])
            padding = {"shifted_labels": -100, "group_ids": int(value.max()) if name == "group_ids" else 0}
            filling = value.new_full(shape, padding.get(name, torch.nan))
            rows[name].append(torch.cat([filling, value] if on_the_left else [value, filling], 1))
    return [{name: torch.cat(values) for name, values in rows.items()}], None


def packed(sequences: list[Sequence], cuts: list[int]) -> Layout:
    """The sequences side by side, cut into micro-batches before the given sequences."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(sequences)}), len(sequences)]
    batches, bounds = [], []
    for start, stop in itertools.pairwise(edges):
        part = sequences[start:stop]
        batches.append({name: torch.cat([s[name] for s in part], 1) for name in part[0]})
        lengths = torch.tensor([0] + [s["shifted_labels"].shape[1] for s in part])
        bounds.append(lengths.cumsum(0))
    return batches, bounds


def evaluate(cfg: BaseLossConfig, layout: Layout, head: Tensor) -> tuple[Tensor, Tensor]:
    batches, bounds = layout
    weight = head.clone().requires_grad_()
    items = []
    for batch in batches:
        fields = {name: value for name, value in batch.items() if name != "hidden"}
        if isinstance(cfg, CELossConfig):
            items.append(CELossContextInputItem(shifted_labels=fields["shifted_labels"]))
        else:
            items.append(RLLossContextInputItem(**fields))
    context = cfg.loss_ctx_cls
    loss = torch.zeros((), dtype=torch.float64)
    for batch, kwargs in zip(batches, context.build_batches_loss_kwargs(items, cfg, bounds), strict=True):
        loss = loss + context(cfg, kwargs).forward(batch["hidden"], weight)[0]
    (grad,) = torch.autograd.grad(loss, weight)
    return loss.detach(), grad


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: f"{type(cfg).__name__}-{getattr(cfg, 'loss_reduction', '')}")
@settings(max_examples=4, deadline=None)
@given(
    mode=st.sampled_from(["eager", "chunk"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 5), max_size=4),
    chunk_size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_layout_does_not_matter(
    cfg: BaseLossConfig, mode: str, lengths: list[int], cuts: list[int], chunk_size: int, seed: int
) -> None:
    sequences = make_sequences(lengths, seed)
    head = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    one_by_one = packed(sequences, list(range(len(sequences))))
    loss, grad = evaluate(cfg, one_by_one, head)
    own = cfg.model_copy(update={"mode": mode, "chunk_size": chunk_size})
    for layout in (
        packed(sequences, cuts),
        padded(sequences, on_the_left=True),
        padded(sequences, on_the_left=False),
    ):
        other_loss, other_grad = evaluate(own, layout, head)
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-14)


def test_ragged_lengths_by_hand() -> None:
    # R34: 10 and 1000 tokens with token losses 1 and 0: 10 / 1010 by token, 1 / 2 by sample.
    labels = torch.zeros(1, 1010, dtype=torch.int64)
    hidden = torch.tensor([1.0] * 10 + [0.0] * 1000, dtype=torch.float64).reshape(1, -1, 1)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    scale = torch.tensor(torch.e - 1, dtype=torch.float64).log()  # logits (0, scale): -log p_0 = log(1 + e - 1) = 1
    for reduction, expected in (("token", 10 / 1010), ("sample", 0.5)):
        cfg = CELossConfig(loss_reduction=reduction)
        item = CELossContextInputItem(shifted_labels=labels)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, [torch.tensor([0, 10, 1010])])
        states = torch.where(hidden > 0, scale, -60.0)
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(states, weight)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
