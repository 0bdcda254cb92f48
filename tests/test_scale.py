"""What a step communicates and what the head holds: by hand, as the engine plans, and as real processes count."""

from __future__ import annotations

import inspect

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.head import explain
from toolkit.scale import step, table
from toolkit.scale.__main__ import main
from toolkit.scale.collectives import Collective, total_calls, total_payload, total_sent
from toolkit.scale.counters import AllocationCounter
from toolkit.scale.head import MODELS, head_memory, weightless
from toolkit.scale.measure import measure
from toolkit.training.sharding import accumulating


class TestCollectives:
    def test_a_ring_of_four(self) -> None:
        # 1200 bytes in 4 parts of 300: 3 rounds of adding up and 3 of handing round.
        assert Collective("", "all_reduce", 1200, 4).sent == 6 * 300
        assert Collective("", "reduce_scatter", 1200, 4).sent == 3 * 300
        assert Collective("", "all_gather", 300, 4).sent == 3 * 300

    def test_alone_nothing_is_sent(self) -> None:
        alone = [Collective("", kind, 1200, 1, calls=5) for kind in ("all_reduce", "all_gather", "reduce_scatter")]  # type: ignore[arg-type]
        assert (total_sent(alone), total_calls(alone), sum(own.messages for own in alone)) == (0, 0, 0)

    @pytest.mark.parametrize(("ranks", "steps"), [(1, 0), (2, 2), (8, 6), (9, 8), (1024, 20), (10_000, 28)])
    def test_messages_grow_with_the_logarithm(self, ranks: int, steps: int) -> None:
        assert Collective("", "all_reduce", 1200, ranks).messages == steps
        assert Collective("", "all_gather", 1200, ranks).messages == steps // 2

    def test_seconds(self) -> None:
        # Each of 3 calls: 4 messages of 1 ms, and 1500 bytes at 1500 a second.
        own = Collective("", "all_reduce", 1000, 4, calls=3)
        assert own.seconds(bandwidth=1500, latency=0.001) == pytest.approx(3 * (0.004 + 1))

    def test_sums(self) -> None:
        two = [Collective("", "all_reduce", 10, 2, calls=3), Collective("", "all_gather", 7, 2)]
        assert (total_calls(two), total_payload(two), total_sent(two)) == (4, 37, 37)


class TestStep:
    def test_a_count_is_that_of_one_token_or_of_a_billion(self) -> None:
        # 4 flags, 3 heads, 1 number for the only term, filled up to 16 of 8 bytes.
        (own,) = step.counting(10_000, numbers=step.numbers_counted())
        assert (own.calls, own.payload) == (1, 128)
        assert own.sent == pytest.approx(256, rel=1e-3)
        assert step.numbers_counted(terms=3, corrections=1) == 3 + 3 + 2

    def test_metrics_beyond_a_packet_take_a_second_call(self) -> None:
        assert [own.payload for own in step.metrics(4, numbers=126)] == [1024]
        assert [own.payload for own in step.metrics(4, numbers=130)] == [1024, 4 * 8]

    def test_fields_are_gathered_once_for_all_micro_batches(self) -> None:
        # 10 positions over 4 ranks: 3 on each, of 2 fields in 5 micro-batches.
        assert [own.payload for own in step.small_fields(4, positions=10, fields=2, micro_batches=5)] == [
            24,
            5 * 2 * 24,
        ]

    def test_vocabulary_parallelism_moves_no_logits(self) -> None:
        # N 100, D 7: 5 numbers a token in 2 chunks, fp32, and the gradient in bf16; for each of 3 micro-batches.
        calls = step.vocabulary_parallel(8, tokens=100, width=7, chunks=2, micro_batches=3)
        assert total_calls(calls) == 3 * (1 + 2 + 2 + 1)
        assert total_payload(calls) == 3 * (144 + 100 * 5 * 4 + 100 * 7 * 2)
        frozen = step.vocabulary_parallel(8, tokens=100, width=7, is_trunk_trained=False, with_entropy=False)
        assert total_payload(frozen) == 144 + 100 * 4 * 4

    def test_fsdp_moves_what_ddp_does_and_gathers_the_weights(self) -> None:
        ddp = step.data_parallel_gradient(8, parameters=800)
        fsdp = step.sharded_gradient(8, parameters=800, itemsize=4)
        assert total_sent(ddp) == 2 * 7 / 8 * 3200
        assert [own.sent for own in fsdp] == [2 * 7 * 400, 7 / 8 * 3200]

    def test_only_one_cause_grows_with_the_whole_batch(self) -> None:
        few, many = (total_sent(table.causes(table.Setup(ranks, sequence_parallel=8))) for ranks in (1024, 8192))
        assert many < 1.001 * few + 8 * 2**20  # the packets of the metrics, 1 KiB a rank
        gathered = [total_sent(step.gathered_tokens(ranks, tokens=1000, bytes_per_token=60)) for ranks in (101, 1001)]
        assert gathered == [100 * 60_008, 1000 * 60_008]


class TestHead:
    def test_by_hand(self) -> None:
        # V 1000, D 10, 60 tokens in chunks of 20, fp64: nothing is cast, nothing is kept but Adam's 12 bytes.
        own = head_memory(1000, 10, 60, chunk_size=20, dtype=torch.float64)
        assert own.weight == 1000 * 10 * 8
        assert own.gradients == 1000 * 10 * 8 + 60 * 10 * 8
        assert own.logits == 20 * 1000 * 8
        assert own.kept == 1000 * 10 * 12
        assert own.peak == own.weight + own.kept + own.plan.peak_bytes

    def test_rows_over_ranks(self) -> None:
        # 1001 rows over 4 ranks: 251 on the first.
        whole, part = (head_memory(1001, 10, 60, chunk_size=20, vocab_parallel=ranks) for ranks in (1, 4))
        assert (whole.weight, part.weight) == (1001 * 20, 251 * 20)
        assert (whole.logits, part.logits) == (20 * 1001 * 2, 20 * 251 * 2)

    def test_fsdp_cuts_what_is_kept_and_nothing_else(self) -> None:
        plain, cut = head_memory(1000, 10, 60), head_memory(1000, 10, 60, fsdp=8)
        assert cut.kept == 1000 * 10 * (12 + 2) // 8
        assert plain.peak - plain.kept == cut.peak - cut.kept

    def test_a_frozen_head_has_no_gradient_and_no_optimizer(self) -> None:
        own = head_memory(1000, 10, 60, is_frozen=True)
        assert (own.kept, own.gradients) == (0, 60 * 10 * 2)

    @pytest.mark.parametrize("scope", [None, "token", "sequence", "batch"])
    def test_is_the_plan_of_the_engine(self, scope: str | None) -> None:
        # Not contiguous, as the weightless ones: then no product takes a buffer of its own.
        hidden = torch.randn(60, 10, requires_grad=True)
        weight = torch.randn(10, 500).t().requires_grad_()
        ids = torch.zeros(60, dtype=torch.int64) if scope == "sequence" else None
        labels = torch.zeros(60, dtype=torch.int64)
        plan = explain(hidden, weight, labels, scope=scope, sequence_ids=ids, chunk_size=16)  # type: ignore[arg-type]
        own = head_memory(500, 10, 60, scope=scope, chunk_size=16, dtype=torch.float32)  # type: ignore[arg-type]
        assert own.plan == plan

    @pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
    def test_the_largest_heads_are_planned_without_memory(self, model: object) -> None:
        assert weightless((163_840, 7_168), torch.bfloat16).untyped_storage().nbytes() == 2
        labels = 16_384 * 8
        with AllocationCounter() as seen:
            layouts = table.layouts_of(model, 16_384, 8, 64)  # type: ignore[arg-type]
        assert seen.peak < 16 * labels
        peaks = [own.peak for own in layouts.values()]
        assert peaks == sorted(peaks, reverse=True)

    def test_more_ranks_than_rows(self) -> None:
        with pytest.raises(ConfigError, match="no more than the 5 rows"):
            head_memory(5, 2, 3, vocab_parallel=6)


class TestAllocationCounter:
    def test_views_and_ends(self) -> None:
        given = torch.zeros(1000)
        with AllocationCounter(given) as seen:
            first = given + 1
            view = first[:10]
            del first
            assert (seen.live, seen.peak) == (4000, 4000)  # the view holds the storage
            second = given * 2
            del view, second
        assert (seen.live, seen.peak) == (0, 8000)


class TestTable:
    def test_says_what_dominates(self) -> None:
        text = table.step_table(table.Setup(ranks=512, sequence_parallel=8, vocab_parallel=4))
        for words in ("512 ranks", "counts of the step", "256 B", "gradient of hidden states", "because of the loss"):
            assert words in text

    def test_a_mesh_divides_the_ranks(self) -> None:
        with pytest.raises(ConfigError, match="sequence_parallel=8 must divide ranks=10"):
            table.Setup(ranks=10, sequence_parallel=8)
        with pytest.raises(ConfigError, match=r"vocab_parallel=3 must .*; change --vocab-parallel"):
            table.Setup(ranks=10, vocab_parallel=3)
        with pytest.raises(ConfigError, match="ranks=0 must be 1 or more"):
            table.Setup(ranks=0)

    @pytest.mark.parametrize(("ranks", "mesh"), [(1, 1), (2, 2), (7, 7), (10, 5), (12, 6), (1024, 8), (11, 1)])
    def test_nobody_is_told_of_flags_that_were_not_given(
        self, ranks: int, mesh: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert table.usual_mesh(ranks) == mesh
        monkeypatch.setattr("sys.argv", ["toolkit.scale", "--ranks", str(ranks)])
        main()
        said = capsys.readouterr().out
        assert f"sequence parallel {mesh}, vocabulary parallel {mesh}" in said
        assert "The gradient is sent once a step, as in the training command" in said

    def test_the_gradient_travels_as_in_the_training_command(self) -> None:
        exchange = inspect.signature(accumulating).parameters["exchange"].default
        assert exchange == inspect.signature(step.sharded_gradient).parameters["exchange"].default == "step"
        once, often = (
            step.sharded_gradient(8, parameters=800, micro_batches=5, exchange=own)  # type: ignore[arg-type]
            for own in ("step", "micro_batch")
        )
        assert [own.calls for own in once] == [10, 1]
        assert [own.calls for own in often] == [10, 5]

    @pytest.mark.parametrize(
        ("size", "words"),
        [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (200 * 2**30, "200 GiB"), (2**60, "1,048,576 TiB")],
    )
    def test_units(self, size: int, words: str) -> None:
        assert table.in_words(size) == words

    def test_the_command(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("sys.argv", ["toolkit.scale", "--ranks", "64", "--model", "70B", "--vocab-parallel", "4"])
        main()
        said = capsys.readouterr().out
        assert "One step of a 70B model on 64 ranks" in said
        assert "chunks, vocabulary over 4" in said

    def test_a_mistake_is_one_line(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("sys.argv", ["toolkit.scale", "--ranks", "10", "--sequence-parallel", "8"])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert said.err.startswith("error: sequence_parallel=8 must divide ranks=10")


@pytest.mark.dist
@pytest.mark.slow  # the tutorial 202 runs and asserts the same
def test_formulas_are_what_two_and_four_processes_count() -> None:
    (counted, held), (more_counted, more_held) = measure(2), measure(4)
    counted, held = counted + more_counted, held + more_held
    wrong = [own for own in (*counted, *held) if not own.agrees]
    assert not wrong
    assert len(counted) == 2 * 13
    assert {(own.ranks, own.shared_by) for own in held} == {(2, 1), (2, 2), (4, 1), (4, 4)}
    exact = [own for own in counted if own.tolerance == 0]
    assert len(exact) == 2 * 12
    assert all(own.counted_payload == own.payload > 0 for own in exact)
