"""What a call allocates: never the logits of all tokens, and what `explain` predicts, in bytes and in FLOPs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from toolkit.head import TokenScores, explain, fused_loss, products, token_logprobs
from toolkit.head.logits import LogitTransform
from toolkit.head.plan import autograd_plan
from toolkit.head.scores import eager_scores, logit_copies


class Allocations(TorchDispatchMode):
    """Follow every storage that an operator brings into being, from its first sight to its end."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known if tensor is not None}
        self.live = self.peak = self.largest = 0
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.sizes.append(size)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_the_tracker_itself() -> None:
    given = torch.zeros(1000)
    with Allocations(given) as seen:
        first = given + 1
        view = first[:10].view(2, 5)
        assert seen.live == 4000
        second = first * 2
        del first
        assert seen.live == 8000  # the view holds the storage
        del view
        assert seen.live == 4000
        del second
    assert (seen.live, seen.peak, seen.largest) == (0, 8000, 4000)


def negated(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
    total = -scores.logprobs.sum()
    return (total if scores.entropy is None else total + scores.entropy.sum()), None


# name: (what is trained, scope; None is token_logprobs)
PASSES: dict[str, tuple[str, Any]] = {
    "no-grad": ("", None),
    "frozen": ("h", None),
    "two-pass": ("hwb", None),
    "fused no-grad": ("", "token"),
    "fused frozen token": ("h", "token"),
    "fused frozen batch": ("h", "batch"),
    "one-pass": ("hwb", "token"),
    "one-pass sequence": ("hwb", "sequence"),
    "fused two-pass": ("hwb", "batch"),
    "frozen trunk": ("wb", "token"),
}
NAMES = {name: name.removeprefix("fused ").split()[0] for name in PASSES} | {"frozen trunk": "one-pass"}
EAGER: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.5, "temperature": 0.7},
    {"scale": 0.5, "softcap": 30.0},
    {"softcap": 30.0},
    {"softcap": 30.0, "temperature": 0.7, "vocab_mask": True},
    {"candidate_ids": 20},
    {"candidate_ids": "all", "softcap": 30.0},
]
"""Options of the scores from all logits; as candidates a number K, or all."""
ALL_PASSES = pytest.mark.parametrize("name", list(PASSES))


class Call:
    """A call of a pass at some size, to be run or explained."""

    def __init__(
        self,
        name: str,
        *,
        tokens: int = 300,
        positions: int | None = None,
        width: int = 64,
        vocabulary: int = 2500,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        has_bias: bool = True,
        upstream: float = 1.0,
        loss: Any = negated,
        **options: Any,
    ) -> None:
        trained, self.scope = PASSES[name]
        positions = positions or tokens
        self.hidden = torch.randn(positions, width).to(dtype).requires_grad_("h" in trained)
        self.weight = (torch.randn(vocabulary, width) / width**0.5).to(weight_dtype or dtype)
        self.weight.requires_grad_("w" in trained)
        self.bias = torch.randn(vocabulary).to(dtype).requires_grad_("b" in trained) if has_bias else None
        self.labels = torch.randint(0, vocabulary, (positions,))
        self.labels[torch.randperm(positions)[tokens:]] = -100
        self.options = {"chunk_size": 64, **options}
        self.of_scope = {} if self.scope is None else {"scope": self.scope}
        if self.scope == "sequence":
            self.of_scope["sequence_ids"] = torch.arange(positions) // 40
        self.upstream, self.loss = upstream, loss

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def plan(self) -> Any:
        return explain(*self.head, **self.of_scope, **self.options)

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        if self.scope is None:
            scores = token_logprobs(*self.head, **self.options)
            scores = scores if isinstance(scores, TokenScores) else TokenScores(scores, None)
            loss, _ = self.loss(scores, torch.arange(len(self.labels)))
        else:
            loss, _ = fused_loss(self.loss, *self.head, **self.of_scope, **self.options)
        leaves = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None and leaf.requires_grad]
        return loss, list(torch.autograd.grad(loss * self.upstream, leaves)) if leaves else []

    def allocations(self) -> Allocations:
        with Allocations(*self.head, self.of_scope.get("sequence_ids")) as seen:
            kept = self()
        del kept
        return seen


class TestNothingLarge:
    """N = 200 tokens, V = 1000: the logits of all are 200,000 elements; V D is 8,000, N D 1,600, a chunk 5,000."""

    @staticmethod
    def call(name: str, **rest: Any) -> Call:
        call = Call(name, tokens=200, positions=300, width=8, vocabulary=1000, chunk_size=5, **rest)
        if name == "one-pass sequence":
            call.of_scope["sequence_ids"] = torch.arange(300) // 5
        assert len(call.plan.chunks) >= 40  # not merged into one either: 200 > 5 + 2 D
        return call

    @ALL_PASSES
    @pytest.mark.parametrize(
        ("dtype", "entropy", "softcap"),
        [
            (torch.float32, False, None),
            (torch.float32, "metric", None),
            (torch.float32, True, 5.0),
            (torch.bfloat16, False, None),
            (torch.bfloat16, True, None),
        ],
    )
    def test_no_tensor_of_all_logits(self, name: str, dtype: torch.dtype, entropy: Any, softcap: float | None) -> None:
        seen = self.call(name, dtype=dtype, entropy=entropy, softcap=softcap).allocations()
        # In bytes. A chunk in fp32, or the weight gradient, and twice that for slack; all together less than the logits
        # of all tokens would be with one byte each.
        assert seen.largest <= 2 * 8 * 1000 * 4
        assert seen.peak < 200 * 1000

    @pytest.mark.parametrize("name", ["frozen", "fused frozen token", "fused frozen batch", "no-grad", "fused no-grad"])
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_frozen_head_gets_nothing_of_its_size(self, name: str, entropy: Any, dtype: torch.dtype) -> None:
        # V D = 128,000 elements, a chunk 2,000.
        call = Call(name, tokens=20, width=64, vocabulary=2000, dtype=dtype, chunk_size=1, entropy=entropy)
        assert call.allocations().largest < 64 * 2000

    @pytest.mark.parametrize("scope", [None, "token", "batch"])
    def test_a_trained_bias_needs_no_weight_gradient(self, scope: Any) -> None:
        call = Call("frozen", tokens=50, width=64, vocabulary=2000, chunk_size=1)
        call.hidden.requires_grad_(False)
        call.bias.requires_grad_()
        call.scope, call.of_scope = scope, {} if scope is None else {"scope": scope}
        _, (grad,) = call()
        assert grad.any()
        # in bytes: 4 * 64 * 2000 is the weight gradient
        assert call.allocations().largest < 64 * 2000

    @ALL_PASSES
    def test_a_trained_weight_without_bias(self, name: str) -> None:
        assert self.call(name, has_bias=False).allocations().largest <= 2 * 8 * 1000 * 4

    def test_a_chunk_is_what_chunk_bytes_hold(self) -> None:
        call = Call("two-pass", tokens=300, width=8, vocabulary=2000, chunk_size="auto", chunk_bytes=15 * 2000 * 4 + 1)
        assert call.plan.largest == 15
        assert call.allocations().largest <= 2 * 15 * 2000 * 4


def assert_predicted(call: Call, limit: float = 0.1) -> None:
    seen, plan = call.allocations(), call.plan
    assert seen.live == 0, "something outlives the call"
    error = plan.peak_bytes / seen.peak - 1
    assert abs(error) <= limit, f"predicted {plan.peak_bytes:,}, measured {seen.peak:,} bytes: {error:+.1%}"


class TestPeak:
    @ALL_PASSES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    def test_is_predicted(self, name: str, dtype: torch.dtype, entropy: Any) -> None:
        call = Call(name, dtype=dtype, entropy=entropy)
        expected = "two-pass" if name == "fused frozen batch" and entropy is True else NAMES[name]
        if name == "frozen" and entropy is True:
            expected = "two-pass"
        assert call.plan.name == expected
        assert_predicted(call)

    # 9.6 million multiplications a chunk, and 24 million: under and over products.SMALL, whatever CPU this is.
    @ALL_PASSES
    @pytest.mark.parametrize("vocabulary", [2500, 6400])
    @pytest.mark.parametrize("wins", [False, True], ids=["BLAS", "oneDNN"])
    def test_is_predicted_whoever_computes(
        self, name: str, vocabulary: int, wins: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if wins and not torch.backends.mkldnn.is_available():
            pytest.skip("no oneDNN in this build")
        monkeypatch.setattr(products, "onednn_wins", lambda: wins)
        assert_predicted(Call(name, vocabulary=vocabulary))

    @pytest.mark.parametrize("name", ["no-grad", "frozen", "two-pass", "one-pass", "fused two-pass"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_is_predicted_with_a_softcap(self, name: str, dtype: torch.dtype) -> None:
        assert_predicted(Call(name, dtype=dtype, softcap=20.0))

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused frozen token", "frozen"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    def test_is_predicted_in_other_dtypes(self, name: str, dtype: torch.dtype) -> None:
        assert_predicted(Call(name, tokens=128, dtype=dtype))

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused two-pass", "fused frozen batch", "frozen"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_is_predicted_under_a_loss_scale(self, name: str, dtype: torch.dtype) -> None:
        # Gradients of a fused loss are multiplied at the end: in place, or their peak doubles.
        assert_predicted(Call(name, tokens=128 if dtype == torch.float16 else 300, dtype=dtype, upstream=3.0))

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused frozen token", "frozen", "no-grad"])
    def test_is_predicted_under_autocast(self, name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert_predicted(Call(name))

    @pytest.mark.parametrize("name", ["two-pass", "fused two-pass"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("chunks", [1, 2, 50])
    def test_is_predicted_with_retained_chunks(self, name: str, dtype: torch.dtype, chunks: int) -> None:
        assert_predicted(Call(name, dtype=dtype, retain_bytes=chunks * 64 * 2500 * dtype.itemsize))

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused two-pass", "frozen", "fused frozen batch"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_is_predicted_where_the_width_counts(self, name: str, dtype: torch.dtype) -> None:
        # Gradients and hidden states outweigh the logits: T D = V D = 1.0e6 elements, a chunk's logits 64,000.
        assert_predicted(
            Call(name, tokens=900, positions=1000, width=1024, vocabulary=1000, dtype=dtype, chunk_size=64)
        )

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused two-pass"])
    def test_is_predicted_for_a_chunk_that_holds_all_in_bf16(self, name: str) -> None:
        call = Call(name, dtype=torch.bfloat16, chunk_size=250)
        assert len(call.plan.chunks) == 1
        assert_predicted(call)

    @pytest.mark.parametrize("name", ["two-pass", "one-pass", "fused two-pass"])
    def test_few_live_coefficients_need_no_more(self, name: str) -> None:
        # Compacting a chunk costs no second one.
        def half(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
            return (scores.logprobs * (positions % 2)).sum(), None

        call = Call(name, loss=half)
        assert call.allocations().peak <= 1.1 * Call(name).allocations().peak

    @pytest.mark.parametrize("options", EAGER, ids=lambda options: "+".join(options) or "plain")
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    @pytest.mark.parametrize(
        ("dtype", "trained", "shape"),
        [
            (torch.float32, "", (96, 32, 6000)),
            (torch.float32, "hw", (96, 32, 6000)),
            (torch.bfloat16, "hw", (96, 32, 6000)),
            (torch.float32, "hw", (8, 512, 2000)),  # gradients larger than logits
        ],
    )
    def test_is_predicted_for_all_logits_at_once(
        self, options: dict[str, Any], entropy: Any, dtype: torch.dtype, trained: str, shape: tuple[int, int, int]
    ) -> None:
        tokens, width, vocabulary = shape
        hidden = torch.randn(tokens, width).to(dtype).requires_grad_("h" in trained)
        weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_("w" in trained)
        labels, options = torch.randint(0, vocabulary, (tokens,)), dict(options)
        candidates = {"candidate_ids": options.pop("candidate_ids", None)}
        if "vocab_mask" in options:
            options["vocab_mask"] = torch.arange(vocabulary) > 9
        if isinstance(candidates["candidate_ids"], int):
            candidates["candidate_ids"] = torch.randint(0, vocabulary, (tokens, candidates["candidate_ids"]))
        transform = LogitTransform(**options)
        with Allocations(hidden, weight) as seen:
            scores = eager_scores(hidden, weight, labels, None, transform, entropy=entropy, **candidates)
            total = sum(part.sum() for part in (*scores, scores.candidates) if part is not None and part.requires_grad)
            del scores
            grads = torch.autograd.grad(total, [hidden, weight]) if trained else ()
        assert all(grad.any() for grad in grads)
        copies = logit_copies(transform, entropy, *candidates.values(), has_gradient=bool(trained))
        plan = autograd_plan("eager", "", hidden, weight, None, [slice(0, tokens)], copies=copies)
        assert plan.peak_bytes / seen.peak == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("name", ["one-pass", "fused frozen token"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_is_flat_in_the_tokens(self, name: str, dtype: torch.dtype) -> None:
        # One logits buffer serves all chunks: what is needed beside the gradients does not grow with N.
        def beside_gradients(tokens: int) -> int:
            call = Call(name, tokens=tokens, width=32, vocabulary=2500, dtype=dtype)
            return call.allocations().peak - call.plan.gradient_bytes

        assert beside_gradients(1280) == pytest.approx(beside_gradients(384), rel=0.04)
        # 10 chunks whose lengths differ by 1: a buffer must not grow with the old one still there.
        assert beside_gradients(1275) == pytest.approx(beside_gradients(384), rel=0.04)

    def test_nothing_is_left_for_scores_that_are_thrown_away(self) -> None:
        call = Call("two-pass", retain_bytes=10**9)
        with Allocations(*call.head) as seen:
            logprobs = token_logprobs(*call.head, **call.options)
            held = seen.live
            del logprobs
            assert held > 3 * 64 * 2500 * 4  # the retained chunks
            assert seen.live == 0


class TestFlops:
    @pytest.fixture(autouse=True)
    def _countable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The counter knows aten's products; the private oneDNN operator it does not.
        monkeypatch.setattr(products, "onednn_wins", lambda: False)

    @staticmethod
    def counted(call: Call) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    @ALL_PASSES
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_are_predicted(self, name: str, entropy: Any, dtype: torch.dtype) -> None:
        call = Call(name, tokens=120, width=16, vocabulary=500, dtype=dtype, chunk_size=40, entropy=entropy)
        assert call.plan.flops == pytest.approx(self.counted(call), rel=0.1)

    @pytest.mark.parametrize("name", ["two-pass", "fused two-pass"])
    @pytest.mark.parametrize("chunks", [1, 2, 9])
    def test_are_fewer_with_retained_chunks(self, name: str, chunks: int) -> None:
        plain = Call(name, tokens=160, width=16, vocabulary=500, chunk_size=40)
        call = Call(name, tokens=160, width=16, vocabulary=500, chunk_size=40, retain_bytes=chunks * 40 * 500 * 4)
        assert call.plan.flops == pytest.approx(self.counted(call), rel=0.01)
        assert call.plan.flops < plain.plan.flops

    @pytest.mark.parametrize("name", ["two-pass", "fused two-pass", "one-pass"])
    def test_are_those_of_live_tokens(self, name: str) -> None:
        # A quarter of the tokens has a coefficient. All are scored; that quarter is scored again where nothing was kept
        # (the last chunk of a batch was), and it alone enters the two products of the gradient.
        def quarter(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
            return (scores.logprobs * (positions % 4 == 0)).sum(), None

        call = Call(name, tokens=160, width=16, vocabulary=500, chunk_size=40, has_bias=False, loss=quarter)
        again = {"two-pass": 40, "fused two-pass": 30, "one-pass": 0}[name]
        assert self.counted(call) == 2 * 16 * 500 * (160 + again + 2 * 40)

    def test_of_ignored_positions_are_none(self) -> None:
        call = Call("one-pass", tokens=40, positions=400, width=16, vocabulary=500)
        assert self.counted(call) == 3 * 2 * 40 * 16 * 500

    def test_products_are_in_units_of_2ndv(self) -> None:
        counts = {
            name: Call(name, tokens=160, width=16, vocabulary=500, chunk_size=40).plan.products for name in PASSES
        }
        assert counts == {
            "no-grad": 1,
            "frozen": 2,
            "two-pass": 4,
            "fused no-grad": 1,
            "fused frozen token": 2,
            "fused frozen batch": 2,
            "one-pass": 3,
            "one-pass sequence": 3,
            "fused two-pass": 3.75,
            "frozen trunk": 2,
        }


def test_the_plan_in_words() -> None:
    text = str(Call("fused two-pass", tokens=160, positions=200, width=16, vocabulary=500, chunk_size=40).plan)
    for words in ("two-pass", "160 scored of 200", "4 of at most 40", "120 tokens are computed twice", "3.75 x 2NDV"):
        assert words in text
