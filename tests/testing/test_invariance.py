"""Tests of the test: right loops pass, and every kind of broken one is told what is wrong with it."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException

from tests.processes import run_processes as run_in_group
from tests.testing import loops
from toolkit import (
    BaseLossConfig,
    CELossConfig,
    GRPOLossConfig,
    GRPOLossContext,
    RLLossContextInputItem,
    register_policy_loss,
)
from toolkit.errors import ConfigError, DataError, LaunchError
from toolkit.functional.policy import registry
from toolkit.testing import Batch, Finding, Layout, LayoutError, assert_layout_invariant, differences, random_batch
from toolkit.testing.evaluation import BIAS, HEAD, HIDDEN, Result
from toolkit.testing.layout import layouts_of
from toolkit.testing.processes import NESTED, _failure, check_can_start
from toolkit.testing.verdict import compare, likely_cause, missing_metrics, verdict

GRPO = GRPOLossConfig(use_entropy_metric=True)


@register_policy_loss("mine_elsewhere")
def mine_elsewhere(t: Any, *, eps: float = 0.2) -> Tensor:
    """A loss that a new process knows only if it is told where it is."""
    return -t.ratio().clamp(1 - eps, 1 + eps) * t.advantages


registry.POLICY_LOSSES.entries.pop("mine_elsewhere")


def refused(loop: Any, cfg: BaseLossConfig = GRPO, **settings: Any) -> LayoutError:
    with pytest.raises(LayoutError) as caught:
        assert_layout_invariant(cfg, loop=loop, **settings)
    return caught.value


# -------------------------------------------------------------------- the batch


def test_random_batch_has_everything_that_breaks_a_layout() -> None:
    for seed in range(20):
        batch = random_batch(seed=seed)
        labels, lengths = batch.item.shifted_labels, batch.row_lengths
        assert labels.shape == (6, 5)
        assert lengths[:2] == (5, 1)
        is_scored = labels != -100
        assert is_scored.sum(1)[[1, 5]].tolist() == [1, 0]
        assert is_scored[0].tolist() == [True, False, True, True, True]
        assert torch.equal(labels[1], labels[3])
        assert lengths[3] == 1
        for own in (batch.hidden_states[:, 0], batch.item.advantages[:, 0]):  # type: ignore[attr-defined]
            assert (own[1] != own[3]).all()
        for row, length in enumerate(lengths):
            assert not is_scored[row, length:].any()
        item = batch.item
        assert isinstance(item, RLLossContextInputItem)
        assert item.group_ids is not None
        assert item.group_ids[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        without = {name for name in type(item).model_fields if getattr(item, name) is None}
        assert without == {"current_logprobs", "rollout_spec"}
        assert item.old_logprobs is not None
        assert (item.old_logprobs[~is_scored] == 3.0).all()
        assert (item.old_logprobs[is_scored] < 0).all()


def test_random_batch_is_the_same_again_and_another_with_another_seed() -> None:
    first, again, other = random_batch(seed=1), random_batch(seed=1), random_batch(seed=2)
    assert torch.equal(first.hidden_states, again.hidden_states)
    assert not torch.equal(first.hidden_states, other.hidden_states)
    assert random_batch(dtype=torch.float32).item.advantages.dtype == torch.float32  # type: ignore[attr-defined]


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        random_batch(num_sequences=2)
    batch = random_batch()
    with pytest.raises(DataError, match=r"labels \[6, 5\] and hidden states \[6, 4, 3\]"):
        Batch(batch.item, batch.hidden_states[:, :4], batch.head_weight)
    with pytest.raises(DataError, match="must hold the length of each of 6 rows"):
        Batch(batch.item, batch.hidden_states, batch.head_weight, lengths=(5, 5))


# -------------------------------------------------------------------- one process


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cfg", [GRPO, CELossConfig(loss_reduction="sample")], ids=["grpo", "ce"])
def test_a_right_loop_passes(cfg: BaseLossConfig, dtype: torch.dtype) -> None:
    for loop in (None, loops.right, loops.with_a_mean):
        assert_layout_invariant(cfg, loop=loop, dtype=dtype)


def test_a_batch_of_ones_own() -> None:
    made = random_batch(num_sequences=4)
    item = RLLossContextInputItem(shifted_labels=made.item.shifted_labels, advantages=torch.ones(4, 1).double())
    assert_layout_invariant(GRPO, Batch(item, made.hidden_states, made.head_weight))
    idle = Batch(item.replace(advantages=torch.zeros(4, 1).double()), made.hidden_states, made.head_weight)
    with pytest.raises(ConfigError, match="all gradients of this batch are 0"):
        assert_layout_invariant(GRPO, idle)


def test_factor_two() -> None:
    error = refused(loops.factor_two)
    assert "layout: 1 process, 1 micro-batch, padded, eager" in str(error)
    assert "gradient of the head: 2.000 times the reference" in str(error)
    assert "gradients are 2.000 times what they should be in every layout" in str(error)
    assert "12 of 12 layouts differ" in str(error)
    assert {round(own.factor or 0, 9) for own in error.findings} == {2.0}


def test_a_mean_for_each_micro_batch() -> None:
    error = refused(loops.mean_of_micro_batches)
    assert "layout: 1 process, 2 micro-batches, padded, eager" in str(error)
    assert "8 of 12 layouts differ" in str(error)
    assert "only several micro-batches differ: each is normalised by its tokens alone" in str(error)


def test_divided_by_the_accumulation_steps_again() -> None:
    error = refused(loops.divided_again)
    assert "gradient of the head: 0.500 times the reference" in str(error)
    assert "the factor is one over the number of micro-batches" in str(error)
    assert "set gradient accumulation of the back-end to 1" in str(error)


def test_boundaries_that_are_not_read() -> None:
    cfg = GRPOLossConfig(aggregation="seq_mean_token_mean")
    error = refused(loops.without_boundaries, cfg)
    assert "1 process, 1 micro-batch, packed, eager" in str(error)
    assert "only packed rows differ" in str(error)


def test_a_micro_batch_that_is_forgotten() -> None:
    assert "only several micro-batches differ" in str(refused(loops.forgets_a_micro_batch))


def test_metrics_that_are_means_of_means() -> None:
    error = refused(loops.mean_of_metrics)
    assert "gradients agree, but metric" in str(error)
    assert "a Mean keeps" in str(error)
    assert not [own for own in error.findings if "gradient" in own.quantity]
    # What only the loop reports is compared between its own layouts.
    assert "metric 'tokens'" in str(refused(loops.own_metric))


def test_a_loop_that_returns_nothing() -> None:
    with pytest.raises(ConfigError, match=r"the loop returned NoneType; return \(loss, metrics\)") as caught:
        assert_layout_invariant(GRPO, loop=loops.says_nothing)
    assert caught.value.__notes__ == ["in the layout: 1 process, 1 micro-batch, padded, eager"]


def test_a_loss_that_looks_beyond_its_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.losses.step.item_checks.check_scope", lambda *_: None)  # it would be told there
    register_policy_loss("shared")(lambda t: -t.ratio() * (t.advantages - t.advantages.mean()))
    error = refused(None, GRPOLossConfig(policy_loss_cfg={"loss_type": "shared"}))
    assert "1 process, 1 micro-batch, padded, chunk" in str(error)
    error = refused(None, GRPOLossConfig(policy_loss_cfg={"loss_type": "shared"}), micro_batches=(1,), packed=(False,))
    assert "only chunks differ" in str(error)


def test_positions_that_are_not_scored_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(part: Any) -> Any:
        found = loops.right(part)
        part.head_weight.grad += sum(own.detach().sum() for own in part.hidden_states)
        return found

    error = refused(leaks, batch=random_batch(GRPO, garbage=float("nan")))
    assert "nan instead of a number" in str(error)
    assert "something reads positions that are not scored" in str(error)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"processes": 0}, r"processes=\(0,\) must be integers of at least 1"),
        ({"micro_batches": ()}, r"micro_batches=\(\) must be integers of at least 1"),
        ({"sequence_parallel": (1.5,)}, r"sequence_parallel=\(1.5,\) must be integers"),
        ({"sequence_parallel": (2,)}, "no layout is left to compare"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16 has no default tolerance"),
        ({"modes": ("chnk",)}, "mode='chnk' is not one of the choices"),
        ({"modes": 3}, r"modes=\(3,\) must be 'eager', 'chunk' or both"),
        ({"modes": ()}, r"modes=\(\) must be 'eager'"),
        ({"packed": ()}, r"packed=\(\) must be True, False or both"),
        ({"packed": 1}, r"packed=\(1,\) must be True, False"),
        ({"micro_batches": True}, r"micro_batches=\(True,\) must be integers of at least 1"),
        ({"micro_batches": "2"}, r"micro_batches=\('2',\) must be integers of at least 1"),
        ({"batch": 3}, r"batch=3 is not a toolkit\.testing\.Batch; make one with random_batch"),
        ({"loop": 3}, r"loop=3 is not callable; pass a function, loop\(part\) -> \(loss, metrics\)"),
        ({"loop": lambda part: (None, {"x": torch.ones(3)})}, r"the metric 'x' that .* of type Tensor of shape \[3\]"),
        ({"loop": lambda part: (None, {"x": "much"})}, r"the metric 'x' that the loop returned is of type str; return"),
        ({"loop": lambda part: (torch.ones(2), None)}, r"the loss that the loop returned is .* of shape \[2\]"),
        ({"loop": lambda part: (None, 3)}, r"metrics of type int; return a dict by name, or None"),
        ({"loss_cfg": "grpo"}, r"loss_cfg='grpo' is not a loss config; pass e\.g\. GRPOLossConfig"),
        ({"loss_cfg": None}, "loss_cfg=None is not a loss config"),
        ({"loss_cfg": {"loss_type": "gspo"}}, "is not a loss config"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assert_layout_invariant(**{"loss_cfg": GRPO, **settings})


def test_one_value_is_as_good_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Layout] = []
    monkeypatch.setattr("toolkit.testing.differences", lambda cfg, batch, layouts, *rest: seen.extend(layouts) or [])
    assert_layout_invariant(GRPO, micro_batches=2, sequence_parallel=1, packed=True, modes="chunk")
    assert seen == [Layout(micro_batches=2, is_packed=True, mode="chunk")]


# -------------------------------------------------------------------- what a pattern says


def found(factors: dict[Layout, float | None], quantity: str = HEAD) -> str:
    wrong = {layout: factor for layout, factor in factors.items() if factor != 1}
    findings = [Finding(layout, quantity, 1.0, factor, "wrong") for layout, factor in wrong.items()]
    assert "wrong" in verdict("the loss", findings, list(factors))
    return likely_cause(findings, list(factors))


@pytest.mark.parametrize(
    ("factor_of", "words"),
    [
        (lambda own: own.processes, "the factor is the number of processes: gradients are added"),
        (lambda own: 1 / own.processes, "the factor is one over the number of processes"),
        (lambda own: own.micro_batches, "the factor is the number of micro-batches: "),
        (lambda own: 1 / own.micro_batches, "the factor is one over the number of micro-batches"),
        (lambda own: own.sequence_parallel, "the factor is the number of shards of a sequence"),
        (lambda own: 1 / own.sequence_parallel, "the factor is one over the number of shards"),
        (lambda own: 3.0, "gradients are 3.000 times what they should be in every layout"),
        (lambda own: None if own.mode == "chunk" else 1, "only chunks differ"),
        (lambda own: None if own.is_packed else 1, "only packed rows differ"),
        (lambda own: None if own.sequence_parallel > 1 else 1, "only sequence parallelism differs"),
        (lambda own: None if own.micro_batches > 1 else 1, "only several micro-batches differ"),
        (lambda own: None if own.slots > 1 else 1, "only a batch that is cut differs"),
        (lambda own: 0.0, "no gradient arrives at the head: backward was not called, or the leaf was replaced"),
        (lambda own: 0.0 if own.is_packed else 1, "no gradient arrives at the head in 20 of 40 layouts"),
        (lambda own: None if own.processes > 1 else 1, "gradients are not exchanged over processes"),
        (lambda own: None, "even the simplest layout differs"),
    ],
)
def test_causes_by_hand(factor_of: Any, words: str) -> None:
    layouts = [
        own for number in (1, 2, 4) for own in layouts_of(number, (1, 2), (1, 2), (False, True), ("eager", "chunk"))
    ]
    assert found({own: factor_of(own) for own in layouts}).startswith(words)


@pytest.mark.parametrize(("dtype", "rtol", "off"), [(torch.float64, 1e-12, 4e-12), (torch.float32, 1e-6, 4e-6)])
@pytest.mark.parametrize("size", [1.0, 0.004])
def test_how_much_may_differ(dtype: torch.dtype, rtol: float, off: float, size: float) -> None:
    """Everything is held to `rtol`, metrics too; what is nearly 0 to the rounding of terms of size 1."""
    gradients = {HEAD: torch.tensor([size, 0.0], dtype=dtype)}
    known = Result(torch.tensor(size, dtype=torch.float64), gradients, {"share": size})
    layout, factor = Layout(), 1 + off

    def told(found: Result) -> list[str]:
        return [own.quantity for own in compare(found, known, layout, rtol)]

    assert told(known) == []
    wrong = Result(known.loss * factor, {HEAD: gradients[HEAD] * factor}, {"share": size * factor})
    is_seen = size == 1.0 or dtype == torch.float64
    assert told(wrong) == (["loss", HEAD, "metric 'share'"] if is_seen else [])
    assert told(Result(known.loss, gradients, {"share": size + 0.5 * rtol * size})) == []
    twice = {HEAD: 2 * gradients[HEAD]}
    assert told(Result(known.loss, twice, {"share": float("nan")})) == [HEAD, "metric 'share'"]


def test_a_metric_that_gets_lost() -> None:
    known = Result(None, {HEAD: torch.ones(2)}, {"share": 1.0})
    (finding,) = missing_metrics(Result(None, known.gradients, {}), known, Layout())
    assert str(finding) == "metric 'share': not reported"

    class Forgetful(GRPOLossContext):
        def loss_from_scores(self, scores: Any, loss_kwargs: Any) -> Any:
            loss, metrics = super().loss_from_scores(scores, loss_kwargs)
            if len(loss_kwargs.shifted_labels) < 12:  # of the whole batch
                del metrics["ratio"]
            return loss, metrics

    class ForgetfulConfig(GRPOLossConfig):
        @property
        def loss_ctx_cls(self) -> Any:
            return Forgetful

    with pytest.raises(LayoutError, match="metric 'ratio': not reported"):
        assert_layout_invariant(ForgetfulConfig(), sequence_parallel=1, packed=False, modes="eager")


def test_two_causes_that_cannot_be_told_apart_are_both_named() -> None:
    cause = found({Layout(processes=2): 2.0})
    assert cause.startswith("2.000 is the number of processes")
    assert "; or gradients are 2.000 times" in cause


def test_gradients_that_are_not_exchanged() -> None:
    """The head's differ, on each process by something else; the hidden states' are right, and one process alone is."""
    layouts = [own for number in (1, 2) for own in layouts_of(number, (1, 2), (1,), (False,), ("eager",))]
    several = [own for own in layouts if own.processes > 1]
    of_head = [Finding(own, HEAD, 1.0, factor, "wrong", rank) for own in several for rank, factor in enumerate((2, 0))]
    words = "gradients are not exchanged over processes"
    assert likely_cause(of_head, layouts).startswith(words)
    assert likely_cause(of_head, several).startswith(words)  # as inside torchrun
    assert "use the wrapper (DDP, FSDP), or part.reduce_gradients()" in likely_cause(of_head, layouts)
    of_bias = [Finding(own, BIAS, 1.0, None, "wrong", rank) for own in several for rank in (0, 1)]
    assert likely_cause(of_bias, layouts).startswith(words)
    of_hidden = [Finding(own, HIDDEN, 1.0, None, "wrong") for own in several]
    for wrong in (of_hidden, [*of_hidden, *of_head]):
        assert likely_cause(wrong, layouts).startswith("only several processes differ: something is counted by each")
        assert "is counted by each process for itself" in likely_cause(wrong, several)
    # Both processes see twice the gradient: that is a count.
    twice = [Finding(own, HEAD, 1.0, 2.0, "wrong", rank) for own in several for rank in (0, 1)]
    assert likely_cause(twice, layouts).startswith("the factor is the number of processes")


def test_no_gradient_arrives() -> None:
    for loop in (loops.no_gradient, loops.loses_gradients):
        assert "likely cause: no gradient arrives: backward was not called, or the leaf was repl" in str(refused(loop))
    assert "likely cause: no gradient arrives at the head: backward" in str(refused(loops.detached_head))


# -------------------------------------------------------------------- several processes


def in_group(rank: int, world: int) -> None:
    """Everything that needs processes, in one start of them."""
    assert_layout_invariant(GRPO)
    assert_layout_invariant(GRPO, loop=loops.right, processes=world, dtype=torch.float32)
    assert_layout_invariant(GRPOLossConfig(gradient_reduction="sum", aggregation="square"), micro_batches=(1, 2))
    expected = {
        loops.adds_over_processes: "2.000 is the number of processes: gradients are added over processes",
        loops.divides_by_processes_again: "0.500 is one over the number of processes",
        loops.shards_counted_twice: "the factor is the number of shards of a sequence: a sequence is counted once for",
        loops.counts_alone: "counted by each process for itself",
        loops.mean_of_micro_batches: "only several micro-batches differ",
        loops.metrics_of_one_process: "that of one process, or a mean of means",
        loops.never_reduces: "gradients are not exchanged over processes",
        loops.no_gradient: "no gradient arrives: backward was not called",
    }
    layouts = layouts_of(world, (1, 2), (1, 2), (False, True), ("eager",))
    batch = random_batch(GRPO, num_sequences=5)
    for loop, words in expected.items():
        findings = differences(GRPO, batch, layouts, loop)
        assert words in likely_cause(findings, layouts), (loop.__name__, likely_cause(findings, layouts))
    with pytest.raises(LayoutError, match="2 processes, 1 micro-batch, 2 of them share each sequence, padded, eager"):
        assert_layout_invariant(GRPO, loop=loops.shards_counted_twice, modes=("eager",))
    with pytest.raises(ConfigError, match="processes=3 differs from the 2 processes of this group"):
        assert_layout_invariant(GRPO, processes=3)
    error = refused(loops.metrics_of_one_process, micro_batches=(1,), sequence_parallel=(1,))
    assert {own.rank for own in error.findings} == {0, 1}  # both processes know what both saw


@pytest.mark.slow
@pytest.mark.dist
def test_in_a_process_group() -> None:
    run_in_group(2, in_group)


@pytest.mark.dist
def test_processes_of_its_own() -> None:
    register_policy_loss("mine_elsewhere")(mine_elsewhere)
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "mine_elsewhere", "eps": 0.3})
    # A loop that cannot do without a group is not tried in one process.
    error = refused(loops.adds_in_a_group, cfg, processes=2, micro_batches=(1, 2), packed=(False,))
    assert "GRPOLossConfig(policy loss 'mine_elsewhere', aggregation token_mean)" in str(error)
    assert "likely cause: 2.000 is the number of processes: gradients are added over processes" in str(error)
    assert "8 of 8 layouts differ" in str(error)


def test_what_differs_in_one_process_needs_no_others() -> None:
    started = time.perf_counter()
    assert "in every layout" in str(refused(loops.factor_two, processes=2))
    assert time.perf_counter() - started < 5
    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        assert_layout_invariant(GRPO, loop=lambda part: loops.right(part), processes=2)


SCRIPT = """
import torch
from toolkit import GRPOLossConfig
from toolkit.testing import assert_layout_invariant
torch.set_num_threads(1)
assert_layout_invariant(GRPOLossConfig(), processes=2, micro_batches=1, packed=False, modes="eager")
"""


@pytest.mark.dist
@pytest.mark.slow
def test_a_script_without_a_main(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert "ConfigError: new processes import the script again: put the call under `if __name__ ==" in done.stderr
    assert done.stderr.count("Traceback") == 1


def test_who_may_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    check_can_start()
    main.__file__ = "<stdin>"
    with pytest.raises(ConfigError, match=r"put the call under `if __name__ .* this one is <stdin>"):
        check_can_start()
    main.__file__ = __file__
    check_can_start()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit) as caught:
        assert_layout_invariant(GRPO, processes=2)
    assert caught.value.code == NESTED


def test_how_processes_ended_in_words(tmp_path: Path) -> None:
    def told(first: int, *codes: int) -> str:
        return str(_failure(tmp_path, ProcessExitedException("", first, 0, codes[first]), list(codes)))

    assert told(1, -15, -9) == "process 1 was killed by signal 9 (SIGKILL, often because memory ran out)"
    assert told(1, -15, -15) == "process 1 was killed by signal 15 (SIGTERM)"
    assert told(0, 1, -11) == "process 1 was killed by signal 11 (SIGSEGV)"  # process 0 lost its peer, and was faster
    assert told(0, NESTED, -15).startswith("new processes import the script again")
    assert told(0, 3, -15).startswith("process 0 ended with code 3 before it called the function; new processes import")
    (tmp_path / "started-0").touch()
    assert told(0, 3, -15) == "process 0 ended with code 3 without an error message"
    for words, is_ours, kind, start in (
        ("DataError", True, DataError, "process 1: no such luck"),
        ("ValueError", False, LaunchError, "process 1 raised ValueError: no such luck"),
    ):
        (tmp_path / "error-1").write_bytes(pickle.dumps((words, "no such luck", "Traceback", is_ours)))
        error = _failure(tmp_path, ProcessExitedException("", 1, 0, 1), [-15, 1])
        assert type(error) is kind
        assert str(error).startswith(start)


@pytest.mark.dist
@pytest.mark.slow
def test_a_process_that_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        assert_layout_invariant(GRPO, loop=loops.dies_on_one, processes=2)
    assert str(caught.value) == "process 1 was killed by signal 9 (SIGKILL, often because memory ran out)"
    assert "Terminating" not in capfd.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_a_process_that_fails_ends_the_others() -> None:
    with pytest.raises(LaunchError, match="process 1 raised ValueError: no such luck"):
        assert_layout_invariant(GRPO, loop=loops.raises_on_one, processes=2, timeout_s=60)
    with pytest.raises((LaunchError, LayoutError)):
        assert_layout_invariant(GRPO, loop=loops.waits_for_nobody, processes=2, timeout_s=5)
