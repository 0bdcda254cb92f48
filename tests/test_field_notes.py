"""One test for each bug of the field that a layout can cause: our number, and that the bug's would be another.

`ELSEWHERE` names the tests of those that live beside the code they are about.
"""

import copy
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes, start
from toolkit import CELossConfig, CELossContextInputItem, GRPOLossConfig, LossRunner, RLLossContextInputItem
from toolkit.losses import auxiliary_weights
from toolkit.metrics import Mean, Sum, merge_metrics, to_floats
from toolkit.training.step import per_update

TESTS = Path(__file__).parent
ELSEWHERE = {
    "R1": ["losses/test_grpo.py::test_micro_batches_equal_one_batch"],
    "R8": [
        "functional/test_mismatch.py::test_r8_both_denominators_of_a_token_mask",
        "losses/test_terms_and_weights.py::test_rejected_tokens_and_the_denominator",
    ],
    "R10": ["functional/test_mismatch.py::test_r10_a_vanishing_product_stays_finite_and_is_not_divided_by"],
    "R11": ["functional/test_aggregation.py::test_r11_a_masked_response_adds_no_token"],
    "R12": ["losses/test_items_unshifted.py::test_r12_label_mask_advantage_and_logprob_meet_at_one_position"],
    "R12b": ["losses/test_items_unshifted.py::test_r12b_a_packed_row_keeps_its_sequences_apart"],
    "R12c": [
        "functional/test_segments.py::test_packed_row_with_sequences_of_length_one_and_a_padded_end",
        "losses/test_items_unshifted.py::test_r12c_sequences_of_one_token_stay_sequences",
    ],
    "R12d": [
        "losses/test_items_unshifted.py::test_r12d_padding_on_the_left_moves_and_changes_nothing",
        "models/test_policy.py::test_r12d_padding_changes_no_logprob",
        "losses/test_packing.py::test_layout_does_not_matter",
    ],
    "R19": ["losses/test_grpo.py::test_nothing_scored_gives_zero_with_a_live_graph"],
    "R25": ["losses/test_packing.py::test_r25_values_come_back_to_the_sequence_that_they_belong_to"],
    "R31": ["losses/test_items_unshifted.py::test_r31_a_missing_logprob_is_refused_where_it_counts_and_nowhere_else"],
    "R34": [
        "functional/test_aggregation.py::test_r34_weights_of_10_and_1000_tokens",
        "losses/test_layouts.py::test_ragged_lengths_by_hand",
    ],
}
EXACT = {"rtol": 1e-12, "atol": 1e-15}


@pytest.mark.parametrize("note", ELSEWHERE)
def test_what_is_tested_elsewhere_is(note: str) -> None:
    for place in ELSEWHERE[note]:
        path, _, name = place.partition("::")
        assert f"\ndef {name}(" in (TESTS / path).read_text(), f"{note}: {place}"


def tags_in(text: str) -> set[str]:
    """Return the tags of a text, and of the names of its tests: ``test_r12b_...`` is about R12b."""
    names = re.findall(r"\bdef test_((?:r\d+[a-z]?_)+)", text)
    of_names = {f"R{tag[1:]}" for name in names for tag in name.split("_")[:-1]}
    return {*re.findall(r"\b(?:R\d+[a-z]?|REQ-\d+)\b", text)} | of_names


def test_every_tag_in_use_is_listed_and_every_listed_one_is_used() -> None:
    rows = re.findall(
        r"^\| (R\d+[a-z]?|REQ-\d+) \|.*\|(.*)\|$", (TESTS / "FIELD_NOTES.md").read_text(), flags=re.MULTILINE
    )
    used: dict[str, set[str]] = {}
    for path in sorted([*TESTS.rglob("*.py"), *(TESTS.parent / "toolkit").rglob("*.py")]):
        for tag in tags_in(path.read_text()):
            used.setdefault(tag, set()).add(str(path.relative_to(TESTS)) if path.is_relative_to(TESTS) else "")
    listed = {tag: set(re.findall(r"`([^`]+)`", places)) for tag, places in rows}
    assert len(listed) == len(rows), "a tag is listed twice"
    assert set(listed) == set(used)
    for tag, places in listed.items():
        elsewhere = {place.partition("::")[0] for place in ELSEWHERE.get(tag, [])}
        assert places, f"{tag}: no test is named"
        assert places <= used[tag] | elsewhere, f"{tag}: {places - used[tag] - elsewhere} do not speak of it"


# ------------------------------------------------------------------------------------------------ one process


def item_of(token_losses: list[float]) -> RLLossContextInputItem:
    """A row whose REINFORCE loss under a head of one token (log-probability -1) is the given number at each token."""
    return RLLossContextInputItem(
        shifted_labels=torch.zeros(1, len(token_losses), dtype=torch.int64),
        advantages=torch.tensor([token_losses], dtype=torch.float64),
    )


def batch_of(token_losses: list[float]) -> dict[str, Any]:
    return dict(item_of(token_losses).tensors())


class Logits:
    """Two tokens with logits (0, scale) so that token 0 has log-probability -1."""

    def __init__(self) -> None:
        self.weight = torch.tensor([[0.0], [math.log(math.e - 1)]], dtype=torch.float64, requires_grad=True)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        return torch.ones(*batch["shifted_labels"].shape, 1, dtype=torch.float64), self.weight


REINFORCE = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"})


@pytest.mark.parametrize("sizes", [[8], [2, 6], [1] * 8, [3, 5]])
def test_r1_the_mean_is_over_the_step_not_over_micro_batches(sizes: list[int]) -> None:
    rows = torch.tensor([1.0, 1.0, *[3.0] * 6]).split(sizes)
    model = Logits()
    result = LossRunner(REINFORCE).step([batch_of(row.tolist()) for row in rows], model)
    assert result.loss.item() == pytest.approx(2.5)
    assert result.metrics["loss"] == pytest.approx(2.5)
    # d(-log p_0) / d(logit_1) = p_1 = 1 - 1 / e for each token.
    assert model.weight.grad[1].item() == pytest.approx(2.5 * (1 - 1 / math.e))
    if sizes == [2, 6]:
        assert sum(row.mean().item() for row in rows) / 2 == 2.0  # the bug


def test_r3_nothing_is_divided_by_the_number_of_micro_batches_again() -> None:
    whole, split = Logits(), Logits()
    LossRunner(REINFORCE).step([batch_of([1.0, 2.0, 3.0, 4.0])], whole)
    LossRunner(REINFORCE).step([batch_of([value]) for value in (1.0, 2.0, 3.0, 4.0)], split)
    assert split.weight.grad[1].item() == pytest.approx(whole.weight.grad[1].item(), rel=1e-12)
    assert split.weight.grad[1].item() == pytest.approx(2.5 * (1 - 1 / math.e))
    assert abs(split.weight.grad[1].item() / 4 - whole.weight.grad[1].item()) > 1  # the bug: g / 4


def test_r4_steps_per_generation_do_not_scale() -> None:
    # One generation of 8 rows is used in 4 optimizer steps of 2 micro-batches; the bug's factor is 2 / 4.
    rows = [item_of([1.0] * tokens) for tokens in (1, 2, 3, 4, 5, 6, 7, 8)]
    context = REINFORCE.loss_ctx_cls
    for first in range(0, 8, 2):
        batches = context.build_batches_loss_kwargs(rows[first : first + 2], REINFORCE)
        scale = sum(float(kwargs.loss_weight.sum()) for kwargs in batches)
        assert scale == pytest.approx(1.0, rel=1e-12)
        assert scale != pytest.approx(2 / 4)


def test_r11_a_masked_response_changes_nothing() -> None:
    # One response of 4 tokens and one that is masked, because it was truncated, say: 4 tokens count, not 5.
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor([[0, 0, 0, 0], [-100] * 4]), advantages=torch.tensor([[1.0], [7.0]])
    )
    (kwargs,) = REINFORCE.loss_ctx_cls.build_batches_loss_kwargs([item], REINFORCE)
    assert kwargs.loss_weight.tolist() == [[0.25] * 4, [0.0] * 4]  # the bug: 0.2
    assert to_floats(kwargs.step_metrics)["denominator"] == 4


def losses_reported(batches: list[list[float]]) -> dict[str, float]:
    return LossRunner(REINFORCE).step([batch_of(own) for own in batches], Logits()).metrics


def test_r22_smaller_micro_batches_report_the_same_loss() -> None:
    # verl#4711: 8 rows at once or in 4 micro-batches of 2; the bug adds 4 means up.
    rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    pairs = [rows[i : i + 2] for i in range(0, 8, 2)]
    whole, split = losses_reported([rows]), losses_reported(pairs)
    assert whole["loss"] == pytest.approx(4.5)
    assert split == pytest.approx(whole, rel=1e-12)
    assert sum(sum(pair) / 2 for pair in pairs) == 4 * 4.5


def test_r22_mini_batches_and_epochs_do_not_inflate_the_loss() -> None:
    # verl#5766: 4 mini-batches, 2 epochs: 8 updates in a step, each with loss 4.5; the bug reports 36.
    update = {"loss": Sum(torch.tensor(4.5)), "ratio": Mean.of(torch.ones(3)), "active_tokens": Sum(torch.tensor(3.0))}
    found = to_floats(merge_metrics([per_update(update)] * 8))
    assert found == {"loss": 4.5, "ratio": 1.0, "active_tokens": 24.0}
    assert to_floats(merge_metrics([update] * 8))["loss"] == 36.0


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_r22_token_metrics_do_not_depend_on_how_the_loss_is_averaged(aggregation: str) -> None:
    # NeMo-RL#2683: two sequences of 256 tokens with ratio e^0.1; the bug reports 256 times that.
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, aggregation=aggregation)
    batch = {**batch_of([1.0] * 256), "old_logprobs": torch.full((1, 256), -1.1, dtype=torch.float64)}
    metrics = LossRunner(cfg).step([batch, batch], Logits()).metrics
    assert metrics["ratio"] == pytest.approx(math.exp(0.1), rel=1e-12)
    assert metrics["active_tokens"] == 512


def test_r22_ragged_windows_report_the_mean_over_tokens() -> None:
    # trl#7047: ratios e^0 on 2 tokens and e^1 on 6; the mean of the means is (1 + e) / 2.
    batches = [
        {**batch_of([1.0] * n), "old_logprobs": torch.full((1, n), -1.0 - far, dtype=torch.float64)}
        for n, far in ((2, 0.0), (6, 1.0))
    ]
    ratio = LossRunner(REINFORCE).step(batches, Logits()).metrics["ratio"]
    assert ratio == pytest.approx((2 + 6 * math.e) / 8, rel=1e-12)
    assert ratio != pytest.approx((1 + math.e) / 2, rel=1e-2)


def test_r30_survivors_of_a_filter_in_the_loss_are_counted_before_the_loss() -> None:
    # NeMo-RL#4242: the ratio of the current policy to the sampler leaves K = 3 of 6 tokens in [0.5, 2].
    rule = {"action": "mask", "lower": 0.5, "upper": 2.0, "between": "current_rollout", "denominator": "survivors"}
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, correction=[rule])
    far = torch.tensor([[0.1, 1.5, 0.8, 10.0, 0.3, 0.0]], dtype=torch.float64)
    rows = {**batch_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), "rollout_logprobs": -1 - far}
    item = RLLossContextInputItem(**rows, old_logprobs=-1 - far, current_logprobs=torch.full_like(far, -1.0))
    for cuts in ([slice(0, 6)], [slice(0, 1), slice(1, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        items = [type(item)(**{name: value[:, own] for name, value in item.tensors()}) for own in cuts]
        model, context = Logits(), cfg.loss_ctx_cls
        for own, kwargs in zip(items, context.build_batches_loss_kwargs(items, cfg), strict=True):
            context(cfg, kwargs).forward(*model({"shifted_labels": own.shifted_labels}))[0].backward()
        kept = 1.0 + 5.0 + 6.0
        assert model.weight.grad[1].item() == pytest.approx(kept / 3 * (1 - 1 / math.e), rel=1e-12)
        assert model.weight.grad[1].item() != pytest.approx(kept / 6 * (1 - 1 / math.e), rel=0.1)  # the bug


# ------------------------------------------------------------------------------------------------ eight shards


def shard(rank: int, world: int, store: Any, found: list[Any]) -> None:
    """One rank of a mesh that shares a sequence of 100 tokens a rank, each with loss 1."""
    dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
    try:
        mesh, cfg = init_device_mesh("cpu", (world,)), CELossConfig()
        item = CELossContextInputItem(shifted_labels=torch.zeros(1, 100, dtype=torch.int64))
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, None, sp_mesh=mesh)
        model = Logits()
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(*model({"shifted_labels": item.shifted_labels}))
        found[rank] = loss.item()
    except Exception as error:  # shown by the caller; the other threads wait for this one otherwise
        found[rank] = error


def eight_shards(_: int) -> None:
    """Run eight ranks as threads of this process, which is torch's own way of testing many."""
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store, found = dist.HashStore(), [None] * 8
    threads = [threading.Thread(target=shard, args=(rank, 8, store, found), daemon=True) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == pytest.approx([1.0] * 8)  # the bug, a factor of the data-parallel ranks alone: 0.125


@pytest.mark.dist
def test_r2_eight_ranks_that_share_a_sequence() -> None:
    start(eight_shards, (), 1)


# ------------------------------------------------------------------------------------------------ several processes

WIDTH, VOCABULARY, EXPERTS, ROWS, LENGTH = 5, 11, 3, 5, 6
TERMS = {"grpo": (1.0, 0.0), "router": (0.0, 1.0), "both": (1.0, 0.5)}
GRPO = GRPOLossConfig(use_kl_loss=True, kl_loss_type="k2", kl_loss_coef=0.1, mode="chunk", chunk_size=4)


class Routed(nn.Module):
    """A trunk with a router, whose z-loss is the model's own mean over attended tokens, and the loss in its forward."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64))

        self.embedding, self.router, self.head = (
            normal(VOCABULARY, WIDTH),
            normal(EXPERTS, WIDTH),
            normal(VOCABULARY, WIDTH),
        )

    def forward(self, batch: dict[str, Tensor], context: Any) -> tuple[Tensor, Tensor]:
        hidden = self.embedding[batch["input_ids"]].tanh()
        z = (hidden @ self.router.T).logsumexp(-1).square()
        attended = batch["attention_mask"]
        z_loss = (z * attended).sum() / attended.sum().clamp(min=1)
        return context.forward(hidden, self.head)[0], z_loss


def routed_batch() -> dict[str, Tensor]:
    """Five rows of 1 to 6 attended tokens; the last two are not attended at all."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)
    attended = (torch.arange(LENGTH) < torch.tensor([[6], [3], [2], [0], [0]])).long()
    values = {
        name: torch.randn(ROWS, LENGTH, generator=draw, dtype=torch.float64) for name in ("advantages", "old", "ref")
    }
    return {"input_ids": ids, "attention_mask": attended, **values}


def backward(
    model: nn.Module, micro_batches: list[dict[str, Tensor]], scales: tuple[float, float], *, is_naive: bool = False
) -> None:
    items = [
        RLLossContextInputItem.from_unshifted(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            advantages=batch["advantages"],
            old_logprobs=-2.4 + 0.3 * batch["old"],
            ref_logprobs=-2.4 + 0.3 * batch["ref"],
        )
        for batch in micro_batches
    ]
    context = GRPO.loss_ctx_cls
    weights = auxiliary_weights([batch["attention_mask"].sum() for batch in micro_batches])
    batches = context.build_batches_loss_kwargs(items, GRPO)
    for index, (batch, kwargs, weight) in enumerate(zip(micro_batches, batches, weights, strict=True)):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = index == len(items) - 1
        elif hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(index == len(items) - 1)
        loss, z_loss = model(batch, context(GRPO, kwargs))
        world = dist.get_world_size() if dist.is_initialized() else 1
        (scales[0] * loss + scales[1] * (world if is_naive else weight) * z_loss).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]  # type: ignore[union-attr]


def expected_of(scales: tuple[float, float], steps: int = 0) -> list[Tensor]:
    """Gradients of the whole batch in one process, or with `steps` the parameters after so many of SGD."""
    model = Routed()
    for _ in range(max(1, steps)):
        model.zero_grad()
        backward(model, [routed_batch()], scales)
        if steps:
            descend(model)
    return [p.detach() for p in model.parameters()] if steps else gradients(model)


@torch.no_grad()
def descend(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter -= 0.5 * parameter.grad


def own_share(rank: int) -> list[dict[str, Tensor]]:
    """Two micro-batches a rank: row 0 alone; rows 1 and 2; nothing that counts, everywhere else."""
    rows = [[slice(0, 1), slice(3, 4)], [slice(4, 5), slice(1, 3)], *[[slice(3, 4), slice(4, 5)]] * 2][rank]
    return [{name: value[own] for name, value in routed_batch().items()} for own in rows]


def uneven_ranks(rank: int, world: int, expected: dict[str, list[Tensor]]) -> None:
    """R5, R19, R26: uneven tokens, micro-batches and (of four) ranks without any, under DDP and fully sharded."""
    share = own_share(rank)
    for name, scales in TERMS.items():
        model = DistributedDataParallel(Routed(), find_unused_parameters=False)
        backward(model, share, scales)
        for ours, theirs in zip(gradients(model), expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    sharded = fully_shard(Routed())
    backward(sharded, share, TERMS["both"])
    for ours, theirs in zip(gradients(sharded), expected["both"], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    # Ranks of one sequence of 4 tokens, each with the term of the whole row: it counts once, and once only.
    mesh = init_device_mesh("cpu", (world,))
    assert auxiliary_weights([4], sp_mesh=mesh)[0].item() == world
    assert auxiliary_weights([4], gradient_reduction="sum", sp_mesh=mesh)[0].item() == 1
    assert auxiliary_weights([4])[0].item() == 1
    naive = DistributedDataParallel(Routed())
    backward(naive, share, TERMS["router"], is_naive=True)
    assert not torch.allclose(gradients(naive)[1], expected["router"][1], rtol=0.1)  # the bug: it grows with the world
    model = DistributedDataParallel(Routed())
    for _ in range(3):
        model.zero_grad()
        backward(model, share, TERMS["both"])
        descend(model)
    for ours, theirs in zip(model.parameters(), expected["after"], strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-11, atol=1e-14)
        copies = [torch.empty_like(theirs) for _ in range(world)]
        dist.all_gather(copies, ours.detach())
        assert all(torch.equal(own, copies[0]) for own in copies)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_r5_r19_r26_ranks_without_tokens_and_terms_of_the_model(world: int) -> None:
    expected = {name: expected_of(scales) for name, scales in TERMS.items()}
    expected["after"] = expected_of(TERMS["both"], steps=3)
    assert all(grad.abs().max() > 1e-4 for grad in expected["both"])
    assert expected["router"][2].abs().max() == 0  # the head has no part in the router's term
    run_processes(world, uneven_ranks, copy.deepcopy(expected))
