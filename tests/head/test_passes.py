"""Every pass against plain autograd: losses, scores and gradients, in every dtype."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.head.cases import Case, Draw, draw, eager, evaluate, loss_of, options, relative
from tests.head.rounding import largest_error
from toolkit.head import explain, fused_loss, token_logprobs

STRUCTURES = [
    Case(scope=scope, leaves=leaves, entropy=entropy, chunk=chunk, retained=retained)
    for scope, leaves, entropy, chunk, retained in itertools.product(
        (None, "token", "sequence", "batch"), ("all", "hidden", "head"), (False, "metric", True), (1, 4, 8, 100), (0, 2)
    )
    if chunk != 8 or scope == "sequence"
]
TRANSFORMS = [
    dict(has_bias=bias, softcap=softcap, scale=scale, temperature=temperature, is_masked=mask)
    for bias, softcap, scale, temperature, mask in itertools.product(
        (True, False), (None, 2.0), (1.0, 0.3), (1.0, 0.7, "token"), (False, True)
    )
]


def transforms_for(index: int, number: int) -> list[dict[str, Any]]:
    """A fixed sample of all transforms; over all structures each turns up equally often."""
    shuffled = TRANSFORMS.copy()
    random.Random(0).shuffle(shuffled)
    return [shuffled[(index * number + i) % len(shuffled)] for i in range(number)]


def name_of(case: Case) -> str:
    return f"{case.scope}-{case.leaves}-H={case.entropy}-{case.chunk}-{case.retained}"


def simple(scope: str | None, **rest: Any) -> Case:
    return Case(scope=scope, **rest)


# Each pass by the shortest way to it: (expected name, case).
PASSES = {
    "two-pass": simple(None),
    "two-pass retained": simple(None, retained=2),
    "frozen": simple(None, leaves="hidden"),
    "one-pass": simple("token"),
    "fused frozen": simple("batch", leaves="hidden"),
    "fused two-pass": simple("batch"),
    "fused two-pass retained": simple("batch", retained=2),
    "sequence": simple("sequence"),
}
ALL_PASSES = pytest.mark.parametrize("case", PASSES.values(), ids=list(PASSES))
WITH_ENTROPY = pytest.mark.parametrize("entropy", [False, "metric", True])


@pytest.mark.parametrize(
    ("index", "structure"), list(enumerate(STRUCTURES)), ids=[name_of(case) for case in STRUCTURES]
)
def test_float64_equals_eager(index: int, structure: Case) -> None:
    for transform in transforms_for(index, 1):
        case = replace(structure, **transform)
        data = draw(case)
        ours = evaluate(case, data)
        assert ours.plan is not None
        assert ours.plan.name == case.passes, case
        assert ours.error(eager(case, data)) <= 1e-12, case


@pytest.mark.parametrize(
    ("index", "structure"),
    [(i, case) for i, case in enumerate(STRUCTURES) if i % 7 == 0],
    ids=[name_of(case) for case in STRUCTURES[::7]],
)
def test_float32_is_close_to_float64(index: int, structure: Case) -> None:
    for transform in transforms_for(index // 7 * 5, 3):
        case = replace(structure, **transform)
        data = draw(case).to(torch.float32)
        wide = data.to(torch.float64)  # the reference starts from the same numbers, rounded to fp32
        exact = eager(case, wide)
        allowed = largest_error(
            lambda case=case, wide=wide: eager(case, wide), lambda rounded, exact=exact: rounded.error(exact)
        )
        # Twice: the engine takes probabilities again from rounded logits, and rounds what a chunk adds.
        assert evaluate(case, data).error(exact) <= 2 * allowed, case


@ALL_PASSES
@pytest.mark.parametrize("leaves", ["weight", "bias"])
def test_one_trained_tensor_alone(case: Case, leaves: str) -> None:
    case = replace(case, leaves=leaves, entropy=True)
    data = draw(case)
    ours = evaluate(case, data)
    assert ours.plan is not None
    assert ours.plan.name == case.passes
    assert ours.error(eager(case, data)) <= 1e-12


@pytest.mark.parametrize("scope", [None, "token", "sequence", "batch"])
@WITH_ENTROPY
def test_no_gradient_wanted(scope: str | None, entropy: Any) -> None:
    for transform in transforms_for(3, 6):
        case = Case(scope=scope, leaves="none", entropy=entropy, **transform)
        data = draw(case)
        ours = evaluate(case, data)
        assert ours.plan is not None
        assert ours.plan.name == "no-grad"
        assert not ours.loss.requires_grad
        assert ours.error(eager(case, data)) <= 1e-12, case


@ALL_PASSES
def test_strided_inputs(case: Case) -> None:
    for transform in transforms_for(5, 4):
        for entropy in (False, True):
            strided = replace(case, entropy=entropy, **transform)
            data = draw(strided, is_strided=True)
            assert evaluate(strided, data).error(eager(strided, data)) <= 1e-12, strided


@pytest.mark.parametrize("leaves", ["all", "hidden"])
@WITH_ENTROPY
def test_strided_upstream_gradients(leaves: str, entropy: Any) -> None:
    case = Case(leaves=leaves, entropy=entropy, chunk=5)
    data = draw(case, positions=24)
    hidden, labels = data.hidden.detach().reshape(2, 3, 4, 5).requires_grad_(), data.labels.reshape(2, 3, 4)
    leaves_now = [hidden, *data.leaves[1:]]
    outputs = token_logprobs(hidden, data.weight, labels, data.bias, chunk_size=5, entropy=entropy)
    outputs = [outputs] if isinstance(outputs, Tensor) else [output for output in outputs if output.requires_grad]
    transposed = [torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0) for _ in outputs]
    expanded = [torch.tensor(-0.3, dtype=torch.float64).expand(2, 3, 4) for _ in outputs]
    for upstream in (transposed, expanded):
        assert not upstream[0].is_contiguous()
        ours = torch.autograd.grad(outputs, leaves_now, upstream, retain_graph=True)
        scores = eager_outputs(data, len(outputs))
        flat = [grad.flatten()[data.active] for grad in upstream]
        for mine, theirs in zip(ours, torch.autograd.grad(scores, data.leaves, flat), strict=True):
            assert relative(mine.reshape(theirs.shape), theirs) <= 1e-12


def eager_outputs(data: Draw, number: int) -> list[Tensor]:
    rows = torch.nn.functional.linear(data.hidden[data.active], data.weight, data.bias).log_softmax(-1)
    logprobs = rows.gather(1, data.labels[data.active].unsqueeze(1)).squeeze(1)
    return [logprobs, -(rows.exp() * rows).sum(1)][:number]


@pytest.mark.parametrize("leaves", ["all", "hidden", "head"])
@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(leaves: str, which: int) -> None:
    # The other output's upstream gradient is then not a tensor of zeros but absent.
    case = Case(leaves=leaves, entropy=True)
    data = draw(case)
    scores = token_logprobs(*data.head, chunk_size=4, entropy=True)
    ours = torch.autograd.grad((list(scores)[which] * data.c).sum(), data.leaves)
    theirs = torch.autograd.grad((eager_outputs(data, 2)[which] * data.c[data.active]).sum(), data.leaves)
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative(mine, exact) <= 1e-12


@ALL_PASSES
@WITH_ENTROPY
@pytest.mark.parametrize("live", [0, 1, 2, 11])
def test_few_tokens_with_a_coefficient(case: Case, entropy: Any, live: int) -> None:
    # The rest has coefficient exactly 0, at the start, in the middle and at the end of chunks of 7 of 20 tokens.
    case = replace(case, entropy=entropy, chunk=7)
    data = draw(case)
    chosen = torch.zeros_like(data.c)
    chosen[data.active[torch.randperm(len(data.active))[:live]]] = 1
    shared = torch.randn_like(data.c)
    data = replace(data, c=shared * chosen, d=shared.square() * chosen.roll(3))
    assert evaluate(case, data).error(eager(case, data)) <= 1e-12


@ALL_PASSES
def test_int32_labels(case: Case) -> None:
    data = draw(case)
    narrow = replace(data, labels=data.labels.int())
    exact, ours = evaluate(case, data), evaluate(case, narrow)
    assert torch.equal(ours.loss, exact.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours.grads, exact.grads, strict=True))


@ALL_PASSES
@WITH_ENTROPY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bit_identical(case: Case, entropy: Any, dtype: torch.dtype) -> None:
    case = replace(case, entropy=entropy, chunk=40)
    data = draw(case, positions=120, width=16, vocabulary=3000).to(dtype)
    first, second = evaluate(case, data), evaluate(case, data)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.logprobs, second.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))


@ALL_PASSES
@pytest.mark.parametrize("upstreams", [(1.0, 3.0), (3.0, 1.0), (1.0, 1.0), (-2.0, 3.0)])
@pytest.mark.parametrize("entropy", [False, True])
def test_backward_twice(case: Case, upstreams: tuple[float, float], entropy: bool) -> None:
    case = replace(case, entropy=entropy)
    data = draw(case)
    if case.scope is None:
        scores = token_logprobs(*data.head, **options(case, data))
        loss = (
            (scores.logprobs * data.c).sum() + (scores.entropy * data.d).sum() if entropy else (scores * data.c).sum()
        )
    else:
        ids = {"sequence_ids": data.ids} if case.scope == "sequence" else {}
        loss, _ = fused_loss(loss_of(case, data), *data.head, scope=case.scope, **ids, **options(case, data))
    first, second = upstreams
    once = torch.autograd.grad(first * loss, data.leaves, retain_graph=True)
    copies = [grad.clone() for grad in once]
    twice = torch.autograd.grad(second * loss, data.leaves)
    for one, copy, other in zip(once, copies, twice, strict=True):
        assert torch.equal(one, copy), "the first result changed when the second was taken"
        torch.testing.assert_close(one / first, other / second, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("leaves", ["all", "hidden"])
def test_gradients_belong_to_the_caller(scope: str, leaves: str) -> None:
    # Clipping scales gradients in place; a second backward over a retained graph must not see that.
    case = Case(scope=scope, leaves=leaves)
    data = draw(case)
    loss, _ = fused_loss(loss_of(case, data), *data.head, scope=scope, chunk_size=4)
    loss.backward(retain_graph=True)
    copies = []
    for leaf in data.leaves:
        assert leaf.grad is not None
        copies.append(leaf.grad.clone())
        leaf.grad.zero_()
    for copy, again in zip(copies, torch.autograd.grad(loss, data.leaves), strict=True):
        assert torch.equal(copy, again)


# bf16 keeps 8 bits: rounding once costs at most 2^-9 = 2e-3 of a number, 1.1e-3 in the mean. A gradient is rounded at
# the end, and before that the probabilities and the hidden states (times coefficient) are. The logits are rounded as in
# eager bf16, and 2^-9 of a logit of 2 to 4 are 4e-3 to 8e-3 nats: that dominates, and both have it.
BF16 = 1.2e-2


def draw_for_bf16(case: Case) -> Draw:
    """Logits of order 1, as a head has them; 2^-9 of a logit of 20 would drown everything else."""
    data = draw(case, positions=100, width=24, vocabulary=50)
    return replace(data, weight=(data.weight.detach() / 5).requires_grad_(data.weight.requires_grad))


@ALL_PASSES
@WITH_ENTROPY
@pytest.mark.parametrize("index", range(3))
def test_bf16_is_as_good_as_eager_bf16(case: Case, entropy: Any, index: int) -> None:
    case = replace(case, entropy=entropy, chunk=16, **transforms_for(7 + index, 1)[0])
    data = draw_for_bf16(case).to(torch.bfloat16)
    exact = eager(case, data.to(torch.float64))
    ours, plain = evaluate(case, data), eager(case, data)
    assert [grad.dtype for grad in ours.grads] == [torch.bfloat16] * len(ours.grads)
    assert ours.loss.dtype == ours.logprobs.dtype == torch.float32
    pairs = zip(ours.grads, plain.grads, exact.grads, strict=True)
    for mine, theirs, best in [(ours.logprobs, plain.logprobs, exact.logprobs), *pairs]:
        assert relative(mine, best) <= max(BF16, 1.3 * relative(theirs, best)), case
    if entropy:
        assert ours.entropy is not None
        assert relative(ours.entropy, exact.entropy) <= BF16


@pytest.mark.parametrize("scope", [None, "token", "batch"])
def test_bf16_entropy_of_a_frozen_head_is_not_taken_from_rounded_gradients(scope: Any) -> None:
    # H = -log p - <x, d(-log p)/dx> is free there, and in bf16 off by up to 0.04 nats: by 256 rounded products.
    case = Case(scope=scope, leaves="hidden", entropy="metric", chunk=50, has_bias=False)
    data = draw(case, positions=300, width=256, vocabulary=50)
    data = replace(data, weight=data.weight / 8).to(torch.bfloat16)
    exact = eager(case, data.to(torch.float64))
    ours = evaluate(case, data)
    plain = evaluate(replace(case, leaves="none"), replace(data, hidden=data.hidden.detach()))
    assert ours.plan is not None
    assert ours.plan.name == "frozen"
    worst, usual = (float((found.entropy - exact.entropy).abs().max()) for found in (ours, plain))
    assert worst <= 1.1 * usual


@ALL_PASSES
@WITH_ENTROPY
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_fp16_with_a_loss_scale_keeps_small_gradients(case: Case, entropy: Any, softcap: float | None) -> None:
    # A mean over 1e6 tokens: each coefficient is 1e-6, where fp16 has 4 bits left; times 65536 it has all 11. What the
    # loss scale is for must work in every pass: the factor comes with backward, after the chunks of a fused loss.
    case = replace(case, entropy=entropy, chunk=16, softcap=softcap)
    data = draw(case, positions=100, width=24, vocabulary=50).to(torch.float16)
    data = replace(data, c=1e-6 * data.c, d=1e-6 * data.d)
    exact = eager(case, data.to(torch.float64), upstream=65536)
    ours = evaluate(case, data, upstream=65536)
    for mine, best in zip(ours.grads, exact.grads, strict=True):
        assert mine.dtype == torch.float16
        assert relative(mine, best) <= 4e-3


@ALL_PASSES
@WITH_ENTROPY
def test_autocast_computes_as_bf16_inputs_do(case: Case, entropy: Any) -> None:
    case = replace(case, entropy=entropy, chunk=16)
    data = draw_for_bf16(case).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = evaluate(case, data)
    rounded = data.to(torch.bfloat16)
    # In fp32 the bias is not rounded; everything else is the same number as with inputs in bf16.
    lower = evaluate(case, replace(rounded, bias=data.bias))
    assert torch.equal(ours.logprobs, lower.logprobs)
    assert [grad.dtype for grad in ours.grads] == [torch.float32] * len(ours.grads)
    exact = eager(case, data.to(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        plain = eager(case, data)
    if case.leaves == "all":
        # Of the bias: a sum in fp32, which autocast must not touch.
        assert relative(ours.grads[2], lower.grads[2]) <= 1e-6
    for mine, theirs, other, best in zip(ours.grads, lower.grads, plain.grads, exact.grads, strict=True):
        assert relative(mine, theirs) <= 2.0**-8
        assert relative(mine, best) <= max(BF16, 1.3 * relative(other, best))


def test_autocast_takes_what_a_linear_layer_takes() -> None:
    # A trunk under autocast hands over bf16, the head's weight is fp32.
    case = Case(scope="token")
    data = draw(case, positions=100, width=24, vocabulary=50)
    data = replace(data.to(torch.float32), hidden=data.to(torch.bfloat16).hidden)
    with torch.autocast("cpu", torch.bfloat16):
        ours = evaluate(case, data)
    assert [grad.dtype for grad in ours.grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("scope", [None, "token", "batch"])
def test_weight_gradient_of_many_bf16_chunks_is_summed_in_fp32(scope: Any) -> None:
    # bf16 sums of 64 chunks lose about 1 %; with an fp32 sum each chunk's product is rounded once.
    hidden = torch.randn(2048, 16).bfloat16().requires_grad_()
    weight = torch.randn(32, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 32, (2048,))
    # Up to 32 + 2 D tokens would have been merged into one chunk.
    assert len(explain(hidden, weight, labels, scope=scope, chunk_size=32).chunks) == 64
    if scope is None:
        loss = token_logprobs(hidden, weight, labels, chunk_size=32).sum()
    else:
        loss, _ = fused_loss(
            lambda scores, _: (scores.logprobs.sum(), None), hidden, weight, labels, scope=scope, chunk_size=32
        )
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.detach().double() @ exact.T, labels, reduction="sum").backward()
    assert exact.grad is not None
    assert relative(-grad, exact.grad) < 4e-3


# The temperature's own number must count, in the arithmetic of the logits: 1 / 0.7 rounded to bf16 is off by 2e-3. A
# sampler's temperatures come in any dtype.
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scope", [None, "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(("hidden_dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_per_token_temperatures_of_any_dtype(
    hidden_dtype: torch.dtype, tolerance: float, dtype: torch.dtype, scope: Any, softcap: float | None
) -> None:
    case = Case(scope=scope, softcap=softcap)
    drawn = draw(case)
    temperature = (torch.randint(1, 4, drawn.labels.shape) * 0.7 + 0.4).to(dtype)
    data = replace(drawn.to(hidden_dtype), temperature=temperature)
    exact = replace(data.to(torch.float64), temperature=temperature.double())
    assert evaluate(case, data).error(eager(case, exact)) <= tolerance


def test_retained_chunks_are_what_the_budget_holds() -> None:
    data = draw(Case())
    a_chunk = 4 * 11 * 8
    for budget, retained in ((0, 0), (a_chunk - 1, 0), (a_chunk, 1), (3 * a_chunk + 5, 3)):
        assert explain(*data.head, chunk_size=4, retain_bytes=budget).retained == retained
