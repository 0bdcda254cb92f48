"""Which choice is ahead, by how much, and whether seeds alone could do it; numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.made import curve, make_run, make_sweep
from toolkit.errors import ConfigError
from toolkit.report.comparison import compare, differing_settings
from toolkit.report.runs import read_run, read_runs
from toolkit.report.statistics import difference, t_quantile
from toolkit.report.table import show


def test_quantiles_of_students_t() -> None:
    assert t_quantile(2) == 4.303
    assert t_quantile(30) == 2.042
    assert t_quantile(25) == pytest.approx(2.0595, abs=2e-3)  # between two entries
    assert t_quantile(3.5) == pytest.approx(2.94, abs=0.03)
    assert t_quantile(1e9) == pytest.approx(1.960, abs=1e-3)
    assert t_quantile(0.5) == math.inf


def test_differences_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, half width 4.303 x 0.1 / sqrt(3).
    paired = difference([0.6, 0.8, 1.0], [0.5, 0.6, 0.7], is_paired=True)
    assert paired is not None
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.2, 0.2 - 0.24843, 0.2 + 0.24843), abs=1e-4)
    assert not paired.is_clear
    # Variances 1 and 1 of three values each: standard error sqrt(2/3), 4 degrees of freedom (Welch), 2.776.
    apart = difference([9.0, 10.0, 11.0], [4.0, 5.0, 6.0], is_paired=False)
    assert apart is not None
    assert (apart.low, apart.high) == pytest.approx((5 - 2.26660, 5 + 2.26660), abs=1e-4)
    assert apart.is_clear
    assert difference([1.0], [0.5], is_paired=False) is None
    assert difference([1.0], [0.5], is_paired=True) is None


def test_a_sweep_is_compared_by_what_differs(tmp_path: Path) -> None:
    make_sweep(tmp_path, {"vanilla": 0.95, "gspo": 0.93, "sapo": 0.80})
    found = compare(read_runs([tmp_path]))
    assert [choice.label for choice in found.choices] == [f"policy_loss={name}" for name in ("vanilla", "gspo", "sapo")]
    assert [len(choice.runs) for choice in found.choices] == [3, 3, 3]
    assert list(found.differing) == ["seed", "loss.policy_loss_cfg.loss_type"]
    assert found.measure == "held-out accuracy"
    assert found.behind[0] is None
    assert found.behind[2] is not None
    assert found.behind[2].is_paired
    assert found.behind[2].is_clear
    assert "policy_loss=vanilla is ahead of policy_loss=gspo by 0.02" in found.verdict
    assert "more than the noise of seeds" in found.verdict
    console = Console(width=80, record=True)
    show(found, console)
    text = console.export_text()
    assert all(word in text for word in ("policy_loss", "vanilla", "mean ± spread", "noise", "time", " 41 s"))


def test_a_sweep_over_seeds_alone_is_named_by_what_was_set(tmp_path: Path) -> None:
    make_sweep(tmp_path, {"gspo": 0.93})
    assert [choice.label for choice in compare(read_runs([tmp_path])).choices] == ["policy_loss=gspo"]


def test_equal_choices_may_be_noise_and_one_seed_tells_nothing(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a", {"vanilla": 0.95, "cispo": 0.951})
    assert "may be noise" in compare(read_runs([tmp_path / "a"])).verdict
    make_sweep(tmp_path / "b", {"vanilla": 0.95, "sapo": 0.8}, seeds=[0])
    assert "add seeds (-m seed=0,1,2)" in compare(read_runs([tmp_path / "b"])).verdict


def test_runs_of_the_same_seed_are_paired_whatever_their_order(tmp_path: Path) -> None:
    for name, policy, seed, reached in (
        *(("0", "vanilla", 0, 0.9), ("1", "vanilla", 1, 0.7)),
        *(("2", "gspo", 1, 0.6), ("3", "gspo", 0, 0.8)),
    ):
        make_run(tmp_path / name, rewards=[0.1], seed=seed, policy=policy, summary={"accuracy_after": reached})
    behind = compare(read_runs([tmp_path])).behind[1]
    assert behind is not None  # 0.1 with either seed: the difference has no spread
    assert (behind.value, behind.low, behind.high) == pytest.approx((0.1, 0.1, 0.1))


def test_accuracies_differ_by_at_most_one(tmp_path: Path) -> None:
    """Differences 0, 0 and 0.98: mean 0.327, half width 4.303 x 0.566 / sqrt(3) = 1.406."""
    for index, reached in enumerate((0.99, 0.99, 0.99, 0.99, 0.99, 0.01)):
        policy = "gspo" if index < 3 else "cispo"
        make_run(
            tmp_path / str(index), rewards=[0.1], seed=index % 3, policy=policy, summary={"accuracy_after": reached}
        )
    behind = compare(read_runs([tmp_path])).behind[1]
    assert behind is not None
    assert (behind.value, behind.low, behind.high) == pytest.approx((0.32667, -1.0, 1.0), abs=1e-4)
    assert not behind.is_clear


def test_less_is_better_for_a_likelihood(tmp_path: Path) -> None:
    for name, nll in (("a", 0.5), ("b", 0.7)):
        summary = {"heldout_nll_after": nll, "accuracy_after": None}
        make_run(tmp_path / name, rewards=[0.1], overrides=[f"warmup.lr={nll}"], policy=name, summary=summary)
    found = compare(read_runs([tmp_path]))
    assert [choice.mean for choice in found.choices] == [0.5, 0.7]
    assert "by 0.200 in held-out nll" in found.verdict


def test_unfinished_runs_are_compared_by_their_last_rewards(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rewards=[0.0] * 5 + [0.5] * 10, policy="gspo")
    make_run(tmp_path / "b", rewards=[0.25] * 12)
    found = compare(read_runs([tmp_path]))
    assert found.measure == "mean reward of the last 10 steps"
    assert [choice.mean for choice in found.choices] == [0.5, 0.25]
    assert [choice.label for choice in found.choices] == [
        "loss.policy_loss_cfg.loss_type=gspo",
        "loss.policy_loss_cfg.loss_type=vanilla",
    ]


def test_options_of_a_policy_loss_are_named_once(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, rewards=curve(0.9, 0), policy=name)) for name in ("vanilla", "gspo")]
    for run in runs:
        run.settings["policy_loss.loss_type"] = run.name  # type: ignore[index]
    assert differing_settings(runs) == {"policy_loss.loss_type": ["vanilla", "gspo"]}


def test_equal_results_are_equal(tmp_path: Path) -> None:
    for policy in ("vanilla", "gspo"):
        make_run(tmp_path / policy, rewards=[0.5] * 10, policy=policy, overrides=[f"policy_loss={policy}"])
    verdict = compare(read_runs([tmp_path])).verdict
    assert verdict.endswith("are equal in mean reward of the last 10 steps (0.500).")


@pytest.mark.parametrize(
    ("rates", "labels"),
    [
        (("0.00037671376717424864", "0.0025832390818308314"), ("0.0003767", "0.002583")),
        (("0.00037671", "0.00037672"), ("0.00037671", "0.00037672")),
    ],
)
def test_drawn_numbers_are_short_where_they_still_differ(
    tmp_path: Path, rates: tuple[str, str], labels: tuple[str, str]
) -> None:
    for policy, rate in zip(("vanilla", "gspo"), rates, strict=True):  # the settings differ, too
        make_run(tmp_path / policy, rewards=[0.5], policy=policy, overrides=[f"optimizer.lr={rate}", "kl=k3"])
    assert {choice.label for choice in compare(read_runs([tmp_path])).choices} == {
        f"optimizer.lr={label}" for label in labels
    }


def test_what_changes_no_result_is_not_compared(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, rewards=curve(0.9, 0))) for name in ("a", "b")]
    runs[1].settings["training.resume"] = "a"  # type: ignore[index]
    assert differing_settings(runs) == {}


def test_folders_in_natural_order_and_once(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        make_run(tmp_path / str(number), rewards=[0.1])
    assert [run.folder.name for run in read_runs([tmp_path, tmp_path / "2"])] == ["2", "9", "10"]


def test_a_line_that_is_being_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rewards=[0.1, 0.2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "main", "st')
    with pytest.warns(UserWarning, match="the last line was cut"):
        assert len(read_run(folder).rows) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"phase": "main", "step": 0}\n{\n{}\n', "line 2 of .* cannot be read"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    folder = make_run(tmp_path / "a", rewards=[0.1])
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_run(folder)


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has made a step there"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="is not a folder"):
        read_runs([tmp_path / "nowhere"])
