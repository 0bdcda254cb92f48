"""Metrics by hand, fetched from the device once, and merged over ranks with one collective (R22)."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import run_processes
from toolkit import DataError
from toolkit.distributed import reduce_metrics
from toolkit.distributed.exchange import PACKET
from toolkit.functional.terms import PolicyTerms
from toolkit.metrics import (
    EffectiveSampleSize,
    Max,
    Mean,
    Metric,
    Min,
    Sum,
    merge_metrics,
    metrics_in,
    to_floats,
    widened,
)

READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__len__", "cpu", "numpy", "equal"}


class CallReads(TorchFunctionMode):
    """Notes the calls of a tensor that hand numbers to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.found += [name] * (name in READS)
        return func(*args, **(kwargs or {}))


class KernelReads(TorchDispatchMode):
    """Notes the kernels that read a number or copy to another device, whoever called them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = "_to_copy" in str(func) and result.device != args[0].device
        self.found += [str(func)] * ("_local_scalar_dense" in str(func) or moved)
        return result


def reads_of(function: Any, *args: Any) -> list[str]:
    # A list made of a CPU tensor passes no kernel, a float made of one does: each is seen by one of the two.
    with CallReads() as calls, KernelReads() as kernels:
        function(*args)
    return calls.found + [name for name in kernels.found if "_to_copy" in name or not calls.found]


def many_metrics() -> dict[str, Metric]:
    """All kinds, float32 and float64, and what a custom loss reported."""
    values = torch.tensor([1.0, 2.0, 6.0])
    terms = PolicyTerms(logprobs=values, old_logprobs=values, advantages=values)
    terms.report("mine", values)
    terms.report("mine_min", values, "min")
    terms.report("mine_max", values, "max")
    return {
        "mean": Mean.of(values),
        "sum": Sum(values.sum()),
        "count": Sum(torch.tensor(3)),
        "low": Min.of(values),
        "high": Max.of(values),
        "ess": EffectiveSampleSize.of(values),
        **terms.reports(),
    }


BY_HAND = {
    "mean": 3.0,
    "sum": 9.0,
    "count": 3.0,
    "low": 1.0,
    "high": 6.0,
    "ess": 81 / (3 * 41),
    "mine": 3.0,
    "mine_min": 1.0,
    "mine_max": 6.0,
}


def test_numbers_by_hand() -> None:
    assert to_floats(many_metrics()) == BY_HAND
    assert {name: metric.value() for name, metric in many_metrics().items()} == BY_HAND
    assert to_floats({}) == {}


def test_values_are_computed_when_their_mean_is_read() -> None:
    calls: list[int] = []
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    terms = PolicyTerms(logprobs=values, old_logprobs=values.detach(), advantages=values.detach())

    def squares() -> torch.Tensor:
        calls.append(1)
        return values.square()

    terms.report("squares", squares)
    terms.report("largest", squares, "max")
    assert len(calls) == 1  # a maximum keeps no values, so it is taken at once
    assert not terms.means()["squares"].requires_grad
    assert to_floats(terms.without_graph().reports()) == {"squares": 41 / 3, "largest": 36.0}
    assert not terms.without_graph().logprobs.requires_grad


def test_nothing_measured_is_nan() -> None:
    empty = torch.tensor([])
    kinds: dict[str, Metric] = {kind.__name__: kind.of(empty) for kind in (Mean, Min, Max, EffectiveSampleSize)}
    assert all(map(math.isnan, to_floats(kinds).values()))
    assert all(math.isnan(metric.value()) for metric in kinds.values())
    assert math.isnan(EffectiveSampleSize.of(torch.zeros(2)).value())
    assert math.isnan(Max.of(torch.tensor([1.0, math.nan])).value())
    assert Sum(torch.tensor(0.0)).value() == 0.0


def test_all_metrics_take_one_read_and_making_them_none() -> None:
    made = many_metrics()
    assert reads_of(to_floats, made) == ["tolist"]
    assert reads_of(to_floats, merge_metrics([made, many_metrics()])) == ["tolist"]
    for metric in made.values():
        assert reads_of(metric.value) == ["tolist"]
    values = torch.tensor([1.0, 2.0])
    for kind in (Mean, Min, Max, EffectiveSampleSize):
        assert reads_of(kind.of, values) == []
    assert len(reads_of(lambda: [float(metric.value()) + float(values[0]) for metric in made.values()])) > len(made)


def test_merging_is_one_pass_over_both() -> None:
    first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0])
    for kind in (Mean, Min, Max, EffectiveSampleSize):
        merged = kind.of(first).merge(kind.of(second))
        assert merged.value() == kind.of(torch.cat([first, second])).value()
        assert kind.of(first).merge(kind.of(torch.tensor([]))).value() == kind.of(first).value()
        for parts in ([1.0, math.nan], [math.nan, 1.0]):  # a NaN of either shows
            assert math.isnan(kind.of(torch.tensor(parts[:1])).merge(kind.of(torch.tensor(parts[1:]))).value())
    with pytest.raises(TypeError, match="cannot merge Mean with Max"):
        Mean.of(first).merge(Max.of(first))


def test_only_metrics_are_taken_from_what_a_loss_returns() -> None:
    assert list(metrics_in({"a": Sum(torch.tensor(1.0)), "logits": torch.zeros(2), "b": 1.0})) == ["a"]
    assert metrics_in(torch.zeros(2)) == {}

    class Product(Metric):
        """A metric of the user's, which is not one of the toolkit's kinds."""

        def __init__(self, *factors: torch.Tensor) -> None:
            self.factors = factors

        @property
        def parts(self) -> tuple[torch.Tensor, ...]:
            return self.factors

        @staticmethod
        def number(parts: Sequence[float]) -> float:
            return math.prod(parts)

    product = Product(torch.tensor(2.0), torch.tensor(3.0))
    assert to_floats(metrics_in({"product": product, "logits": torch.zeros(2)})) == {"product": 6.0}


def test_float32_where_there_is_nothing_wider() -> None:
    assert widened(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float64

    class OnMps:
        device = torch.device("mps")
        requires_grad = True

        def detach(self) -> "OnMps":
            return self

        def to(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

    assert widened(OnMps()) == torch.float32  # type: ignore[arg-type]


def test_one_process_takes_no_collective() -> None:
    assert to_floats(reduce_metrics(many_metrics())) == BY_HAND


# ------------------------------------------------------------------------------------------------ over ranks


def on_two_ranks(rank: int, world: int) -> None:
    calls: list[str] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, objects = getattr(dist, name), dist.all_gather_object
    setattr(dist, name, lambda *args, **kwargs: (calls.append("numbers"), gather(*args, **kwargs)))
    dist.all_gather_object = lambda *args, **kwargs: (calls.append("objects"), objects(*args, **kwargs))  # type: ignore[assignment]

    def check(metrics: dict[str, Metric], expected: dict[str, float], collectives: list[str]) -> None:
        calls.clear()
        reduced = reduce_metrics(metrics)
        assert calls == collectives
        found = to_floats(reduced)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-15, nan_ok=True), name
        assert set(found) == set(expected)

    values = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0])][rank]
    kinds = {"m": Mean.of(values), "lo": Min.of(values), "hi": Max.of(values), "ess": EffectiveSampleSize.of(values)}
    whole = {"m": 13 / 4, "lo": 1.0, "hi": 6.0, "ess": 13**2 / (4 * 57)}
    check({**kinds}, whole, ["numbers"])
    # The same names in another order: by position the mean would have taken numbers of the extremes.
    check(dict(reversed(kinds.items())) if rank else {**kinds}, whole, ["numbers"])
    # A metric that one rank lacks, as a loss that reports only where it has something to say.
    one = {"only": Mean.of(values)} if rank == 0 else {"late": Sum(values.sum())}
    check({**kinds, **one}, {**whole, "only": 3.0, "late": 4.0}, ["numbers", "objects"])
    check({**kinds} if rank else {}, {"m": 4.0, "lo": 4.0, "hi": 4.0, "ess": 1.0}, ["numbers", "objects"])
    # A NaN of either rank shows, whichever comes first; nothing measured anywhere is NaN; somewhere, it is not.
    nan = torch.tensor([math.nan if rank == 0 else 1.0])
    check({"a": Min.of(nan), "b": Max.of(nan)}, {"a": math.nan, "b": math.nan}, ["numbers"])
    nan = torch.tensor([math.nan if rank == 1 else 1.0])
    check({"a": Min.of(nan), "b": Max.of(nan)}, {"a": math.nan, "b": math.nan}, ["numbers"])
    own = torch.tensor([2.0])[rank:]
    check({"a": Mean.of(own), "b": Min.of(own), "c": Max.of(own[1:])}, {"a": 2, "b": 2, "c": math.nan}, ["numbers"])
    # More than one packet holds.
    for count in (PACKET - 2, PACKET - 1, 3 * PACKET):
        many: dict[str, Metric] = {f"s{i}": Sum(torch.tensor(float(i + rank))) for i in range(count)}
        check(many, {f"s{i}": 2.0 * i + 1 for i in range(count)}, ["numbers"] * (1 if count < PACKET - 1 else 2))
    # One name, two kinds: an error on every rank.
    with pytest.raises(DataError, match=r"'x' is a Max on rank 1 and a Mean on rank 0; report it as the same kind"):
        reduce_metrics({"x": Mean.of(values) if rank == 0 else Max.of(values)})
    # Thirds do not add up the same in every order: all ranks have the same bits.
    thirds = reduce_metrics({"t": Sum(torch.tensor(0.1 + 0.2 * rank, dtype=torch.float64))})["t"].value()
    everyone = [None] * world
    objects(everyone, thirds)
    assert len(set(everyone)) == 1


@pytest.mark.dist
def test_over_ranks_by_name_with_one_collective() -> None:
    run_processes(2, on_two_ranks)
