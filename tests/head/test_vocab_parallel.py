"""A head whose vocabulary is split over processes gives what the whole one gives: really spawned, joined by gloo."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import random_head, random_item
from tests.head.cases import Case, Draw, Outcome, draw, evaluate, relative
from tests.head.peaked import Exact, Peaked, probed, worst
from tests.processes import run_processes
from toolkit import CELossConfig, DataError, GRPOLossConfig, OPDLossConfig, RLLossContextInputItem
from toolkit.distributed import counting_over
from toolkit.head import explain, fused_loss, token_logprobs
from toolkit.head.logits import LogitTransform
from toolkit.head.scores import eager_scores
from toolkit.losses.items import CELossContextInputItem
from toolkit.metrics import to_floats

SCOPES = [None, "token", "sequence", "batch"]
CASES = [Case(scope, leaves, entropy) for scope, leaves, entropy in product(SCOPES, ["all", "hidden"], [False, True])]
CASES += [Case(scope, "hidden", "metric", has_bias=False) for scope in SCOPES]
CASES += [Case(scope, leaves, "metric", chunk=100) for scope, leaves in product(SCOPES, ["none", "head", "bias"])]
CASES += [
    Case(scope, "all", True, softcap=3.0, scale=1.3, temperature=temperature, is_masked=True, retained=retained)
    for scope, temperature, retained in zip(SCOPES, ["token", 0.7, "token", 1.0], [0, 0, 2, 1], strict=True)
]
CASES += [Case(None, "hidden", "metric", softcap=3.0, temperature="token"), Case("token", "weight", is_masked=True)]

BIASES = ["sharded", "plain"]


def split(data: Draw, mesh: DeviceMesh, bias: str) -> Draw:
    """The same tensors, the vocabulary rows of the head over the ranks."""
    return replace(
        data,
        hidden=data.hidden.detach().requires_grad_(data.hidden.requires_grad),
        weight=sharded(data.weight, mesh),
        bias=None if data.bias is None else sharded(data.bias, mesh) if bias == "sharded" else copy(data.bias),
    )


def sharded(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(tensor.detach(), mesh, [Shard(0)]).requires_grad_(tensor.requires_grad)


def copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def whole(tensor: Tensor) -> Tensor:
    """The gradient of a rank's own rows, gathered from all."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.placements == (Shard(0),)
    return tensor.full_tensor()


def gathered(found: Outcome) -> Outcome:
    return replace(found, grads=[whole(grad) for grad in found.grads])


def check_every_option(mesh: DeviceMesh, step: int) -> None:
    for number, case in enumerate(CASES[mesh.size() % step :: step]):
        for vocabulary in (11, 5):  # over 4 ranks: 3, 3, 3, 2 and 2, 2, 1, 0 rows
            torch.manual_seed(number)
            data = draw(case, vocabulary=vocabulary)
            found = gathered(evaluate(case, split(data, mesh, BIASES[number % 2])))
            assert found.error(evaluate(case, data)) <= 1e-12, (case, vocabulary)
            assert found.plan is not None
            assert found.plan.name == case.passes


def check_low_precision(mesh: DeviceMesh) -> None:
    for number, case in enumerate(CASES[:: 3 * mesh.size()]):
        torch.manual_seed(number)
        data = draw(case, vocabulary=50, width=16)
        exact = evaluate(case, data)
        narrow = gathered(evaluate(case, split(data.to(torch.float32), mesh, "sharded")))
        assert narrow.error(exact) <= 1e-6, case
        # In bf16 each rank rounds its part of the hidden gradient, where the whole head rounds once.
        coarse = data.to(torch.bfloat16)
        exact = evaluate(case, coarse.to(torch.float64))
        found = gathered(evaluate(case, split(coarse, mesh, "sharded")))
        assert found.error(exact) <= 2 * evaluate(case, coarse).error(exact), case


def check_peaked_and_remote_labels(mesh: DeviceMesh) -> None:
    """Probabilities near 1 and far below the smallest number, logits of 80: nothing under- or overflows."""
    torch.manual_seed(0)
    weight = torch.randn(11, 4)
    weight[2] *= 30
    hidden, labels = 3 * torch.randn(20, 4), torch.arange(20) % 11
    exact = eager_scores(hidden.double(), weight.double(), labels, None, LogitTransform(), entropy=True)
    found = token_logprobs(hidden, sharded(weight, mesh), labels, entropy=True)
    assert exact.logprobs.min() < -150
    # The products of fp32 are off by 1e-7 of the largest logit.
    assert (found.logprobs - exact.logprobs).abs().max() <= 2e-7 * exact.logprobs.abs().max()
    assert (found.entropy - exact.entropy).abs().max() <= 1e-5


def check_one_token_leads(mesh: DeviceMesh) -> None:
    """As exact as the whole vocabulary (`test_stable_softmax`), though each rank knows only its part."""
    data = Peaked.draw(1000)
    exact = Exact.of(data.logits, data.labels)
    rows = len(data.labels)
    for is_eager, upstream in product((False, True), ((1.0, 0.0), (1.0, 0.5))):
        hidden, weight = copy(data.hidden).requires_grad_(), sharded(data.weight.requires_grad_(), mesh)
        if is_eager:
            scores = eager_scores(hidden, weight, data.labels, None, LogitTransform(), entropy=True)
        else:
            scores = token_logprobs(hidden, weight, data.labels, entropy=True, chunk_size=4)
        assert worst(scores.logprobs, exact.logprobs) <= 1e-5
        assert worst(scores.entropy, exact.entropy) <= 1e-5
        total = upstream[0] * scores.logprobs.sum() + upstream[1] * scores.entropy.sum()
        grads = torch.autograd.grad(total, [hidden, weight])
        expected = upstream[0] * exact.logprob_grads + upstream[1] * exact.entropy_grads
        sizes = upstream[0] * exact.logprob_grads.abs() + upstream[1] * exact.entropy_sizes
        assert worst(*probed(grads[0], data, expected, sizes)) <= 1e-5
        assert worst(whole(grads[1]).t()[:rows], expected, sizes) <= 1e-5
    # The same largest logit on every rank: all but one count as others.
    scores = token_logprobs(torch.ones(1, 1), sharded(torch.ones(8, 1), mesh), torch.tensor([7]), entropy=True)
    assert scores.logprobs.item() == pytest.approx(-math.log(8), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(math.log(8), rel=1e-6)


def check_no_tokens(mesh: DeviceMesh) -> None:
    case = Case("token", "all", True)
    data = split(draw(case), mesh, "plain")
    data = replace(data, labels=torch.full_like(data.labels, -100), temperature=1.0)
    for scope in (None, "token", "batch"):
        own = replace(case, scope=scope)
        assert all(not whole(grad).any() for grad in evaluate(own, data).grads)
    logprobs = token_logprobs(data.hidden[:0], data.weight, data.labels[:0])
    assert logprobs.shape == (0,)
    # Coefficients of exactly 0 leave all rows out of backward.
    scores = token_logprobs(data.hidden, data.weight, torch.zeros_like(data.labels))
    assert not torch.autograd.grad((scores * 0).sum(), [data.hidden])[0].any()


def grpo_item(with_candidates: bool = False) -> RLLossContextInputItem:
    torch.manual_seed(5)
    item = random_item((3, 8))
    if not with_candidates:
        return item
    logprobs, ids = torch.randn(3, 8, 11, dtype=torch.float64).log_softmax(-1).topk(4)
    ids[..., -1] = -1
    fields = {"ref_topk_ids": ids, "ref_topk_logprobs": logprobs}
    return item.replace(**fields, teacher_topk_ids=ids, teacher_topk_logprobs=logprobs)


def contexts(mode: str) -> dict[str, tuple[Any, RLLossContextInputItem]]:
    own: dict[str, Any] = {"mode": mode, "temperature": 0.8, "softcap": 4.0, "logit_scale": 1.2}
    own |= {"chunk_size": 4} if mode == "chunk" else {}
    kl: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.3}
    return {
        "grpo": (GRPOLossConfig(**own, **kl, kl_loss_type="k3", entropy_coef=0.1), grpo_item()),
        "gspo": (GRPOLossConfig(**own, policy_loss_cfg={"loss_type": "gspo", "cliprange_low": 0.2}), grpo_item()),
        "metric": (GRPOLossConfig(**own, use_entropy_metric=True), grpo_item()),
        "top_k": (GRPOLossConfig(**own, **kl, kl_loss_type="top_k"), grpo_item(True)),
        "opd": (OPDLossConfig(**own, variant="top_k"), grpo_item(True)),
    }


def counting_alone(mesh: DeviceMesh) -> AbstractContextManager[None]:
    """All ranks share the vocabulary, so that each is the only one with its tokens."""
    return counting_over(init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))["dp"].get_group())


def check_contexts(mesh: DeviceMesh) -> None:
    cfg, item = contexts("chunk")["grpo"]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    hidden, weight, _ = random_head((3, 8))
    with pytest.raises(DataError, match="each counts the same tokens"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, sharded(weight, mesh))
    with counting_alone(mesh):
        check_contexts_counted_once(mesh)


def check_contexts_counted_once(mesh: DeviceMesh) -> None:
    for mode in ("chunk", "eager"):
        for name, (cfg, item) in contexts(mode).items():
            torch.manual_seed(1)
            heads = hidden, weight, bias = random_head((3, 8))
            (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
            context = cfg.loss_ctx_cls(cfg, kwargs)
            loss, metrics = context.forward(*heads)
            grads = torch.autograd.grad(loss, heads)
            own = copy(hidden), sharded(weight, mesh), sharded(bias, mesh) if mode == "chunk" else copy(bias)
            assert f"split over {mesh.size()} ranks" in str(context.explain(*own))
            found, found_metrics = context.forward(*own)
            assert relative(found, loss) <= 1e-12, (mode, name)
            for ours, theirs in zip(torch.autograd.grad(found, own), grads, strict=True):
                assert relative(whole(ours), theirs) <= 1e-12, (mode, name)
            ours, theirs = to_floats(found_metrics), to_floats(metrics)
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12), (mode, name)


def check_parameter(mesh: DeviceMesh) -> None:
    """Cross-entropy, and a parameter whose gradient gathers in ``.grad``."""
    hidden, weight, bias = random_head((3, 8))
    cfg = CELossConfig(mode="chunk", chunk_size=4)
    item = CELossContextInputItem(shifted_labels=grpo_item().shifted_labels)
    own = torch.nn.Parameter(sharded(weight.detach(), mesh))
    with counting_alone(mesh):
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        context = cfg.loss_ctx_cls(cfg, kwargs)
        loss, _ = context.forward(hidden, weight, bias)
        loss.backward()
        context.forward(copy(hidden), own, bias.detach())[0].backward()
    assert relative(whole(own.grad), weight.grad) <= 1e-12


class Traffic(TorchDispatchMode):
    """Numbers in every collective, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[int] = []
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append(sum(leaf.numel() for leaf in own))
            self.bytes += sum(leaf.nbytes for leaf in own)
        made = [leaf for leaf in tree_leaves(result) if type(leaf) is Tensor]
        self.largest = max(self.largest, *(leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in made), 0, 0)
        return result


CHECKED = 24
"""Numbers that a call may send to compare labels and options, whatever its tokens."""


def check_traffic(mesh: DeviceMesh) -> None:
    positions, tokens, width, vocabulary = 40, 24, 5, 400
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (positions,))
    labels[tokens:] = -100
    weight = sharded(torch.randn(vocabulary, width, requires_grad=True), mesh)
    rows = -(-vocabulary // mesh.size())
    for chunk, entropy, is_frozen in product((8, 100), (False, "metric", True), (False, True)):
        own = weight.detach() if is_frozen else weight
        options: dict[str, Any] = {"chunk_size": chunk, "entropy": entropy}
        with Traffic() as forward:
            found = token_logprobs(hidden, own, labels, **options)
            total = found.sum() if isinstance(found, Tensor) else found.logprobs.sum()
            if entropy is True:
                total = total + found.entropy.sum()
        with Traffic() as backward:
            torch.autograd.grad(total, [hidden] if is_frozen else [hidden, weight])
        scored = 4 + bool(entropy)
        assert sum(forward.collectives) <= tokens * scored + CHECKED
        assert backward.collectives == [tokens * width]  # of the scored rows alone, once
        assert explain(hidden, own, labels, **options).sent_bytes == pytest.approx(
            forward.bytes + backward.bytes, abs=8 * CHECKED
        )
        assert max(forward.collectives + backward.collectives) < tokens * width + CHECKED
        for seen in (forward, backward):
            assert seen.largest <= max(min(chunk, tokens) * rows, rows * width, positions * width)
        with Traffic() as fused:
            fused_loss(lambda scores, _: (scores.logprobs.sum(), None), hidden, own, labels, **options)
        chunks = -(-tokens // chunk)
        assert len(fused.collectives) == 2 + chunks * 2
        assert sum(fused.collectives) <= tokens * (scored + width) + CHECKED
    with Traffic() as eager:
        scores = eager_scores(
            hidden[:tokens], weight, labels[:tokens], None, LogitTransform(), candidate_ids=labels[:tokens, None]
        )
    assert sum(eager.collectives) <= tokens * 5 + CHECKED
    with Traffic() as backward:
        torch.autograd.grad(scores.logprobs.sum(), [hidden, weight])
    assert backward.collectives == [tokens * width]
    assert max(eager.largest, backward.largest) <= tokens * rows


def check_plan(mesh: DeviceMesh) -> None:
    hidden, labels = torch.randn(64, 8, requires_grad=True), torch.randint(0, 1000, (64,))
    weight = torch.randn(1000, 8, requires_grad=True)
    plain, own = explain(hidden, weight, labels), explain(hidden, sharded(weight, mesh), labels)
    assert own.ranks == mesh.size()
    assert own.flops == plain.flops // mesh.size()
    assert own.gradient_bytes - hidden.nbytes == weight.nbytes // mesh.size()
    assert own.peak_bytes < plain.peak_bytes
    assert f"vocabulary split over {mesh.size()} ranks" in str(own)
    assert "split" not in str(plain)
    # Chunks are cut by the largest part, the same on all ranks: 5 rows are 3 and 2.
    odd = sharded(torch.randn(5, 8), mesh)
    budget = 20 * 4 * -(-5 // mesh.size())
    assert explain(hidden, odd, labels % 5, chunk_bytes=budget).largest == 16  # 64 tokens in chunks of at most 20


def check_replicated(mesh: DeviceMesh) -> None:
    hidden, weight, _ = random_head((3, 8))
    labels = torch.randint(0, 11, (3, 8))
    own = distribute_tensor(weight.detach(), mesh, [Replicate()]).requires_grad_()
    everywhere = distribute_tensor(hidden.detach(), mesh, [Replicate()]).requires_grad_()
    exact = torch.autograd.grad(token_logprobs(hidden, weight, labels).sum(), [hidden, weight])
    found = torch.autograd.grad(token_logprobs(everywhere, own, labels).sum(), [everywhere, own])
    for ours, theirs in zip(found, exact, strict=True):
        assert relative(ours.full_tensor(), theirs) <= 1e-12


def check_one_rank(world: int) -> None:
    """A mesh of one rank is the whole vocabulary."""
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "vocabulary"))["vocabulary"]
    hidden, weight, _ = random_head((3, 8))
    labels = torch.randint(0, 11, (3, 8))
    assert explain(hidden, sharded(weight, mesh), labels) == explain(hidden, weight, labels)
    assert torch.equal(token_logprobs(hidden, sharded(weight, mesh), labels), token_logprobs(hidden, weight, labels))


def check_refusals(mesh: DeviceMesh) -> None:
    hidden, weight, _ = random_head((3, 8))
    labels = torch.full((3, 8), 1)
    columns = distribute_tensor(weight.detach()[:, :4], mesh, [Shard(1)])
    refused(
        r"placements \(Shard\(dim=1\),\).*Shard\(0\) on a one-dim", token_logprobs, hidden[..., :4], columns, labels
    )
    grid = init_device_mesh("cpu", (1, mesh.size()))
    both = distribute_tensor(weight.detach(), grid, [Shard(0), Shard(0)])
    refused("If FSDP sharded the head, it was not gathered", token_logprobs, hidden, both, labels)
    own = sharded(weight, mesh)
    cut = distribute_tensor(hidden.detach(), mesh, [Shard(0)])
    refused(r"redistribute it to Replicate\(\)", token_logprobs, cut, own, labels)
    uneven = DTensor.from_local(torch.randn(20, 5).double(), mesh, [Shard(0)], shape=(14, 5), stride=(5, 1))
    refused("vocabulary rows on rank", explain, hidden, uneven, labels)
    bias = distribute_tensor(torch.randn(11).double(), grid, [Shard(0), Replicate()])
    if mesh.size() > 1:
        refused("a mesh of", token_logprobs, hidden, own, labels, bias)
    # Data-parallel ranks, as under FSDP: other labels, or even another number of them.
    refused("their labels differ. If FSDP", token_logprobs, hidden, own, labels + dist.get_rank())
    length = 2 + (dist.get_rank() == 0)
    refused("labels differ", token_logprobs, hidden[:length], own, labels[:length])
    refused("different options", token_logprobs, hidden, own, labels, entropy=dist.get_rank() == 0)
    refused("chunk_size", token_logprobs, hidden, own, labels, chunk_size=3 + dist.get_rank() * 9)
    rows, flat = hidden.reshape(-1, 5), labels.reshape(-1)
    refused("all 11 tokens", eager_scores, rows, own, flat, None, LogitTransform(), candidate_ids="all")
    refused(
        "labels differ",
        eager_scores,
        rows[: 5 + dist.get_rank()],
        own,
        flat[: 5 + dist.get_rank()],
        None,
        LogitTransform(),
    )


def refused(words: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(DataError, match=words):
        function(*args, **options)


def everything(rank: int, world: int, step: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    check_every_option(mesh, step)
    if world == 2 or step == 1:
        check_low_precision(mesh)
        check_peaked_and_remote_labels(mesh)
        check_one_token_leads(mesh)
        check_contexts(mesh)
        check_parameter(mesh)
    check_no_tokens(mesh)
    check_traffic(mesh)
    check_plan(mesh)
    check_replicated(mesh)
    check_one_rank(world)
    check_refusals(mesh)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("world", "step"), [(2, 7), (2, 1), (4, 1), (4, 7)])
def test_a_split_vocabulary_gives_what_the_whole_one_gives(world: int, step: int) -> None:
    run_processes(world, everything, step)
