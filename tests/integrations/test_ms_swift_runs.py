"""``swift rlhf`` with our losses, live; skipped where ms-swift is not installed (.ci/peers installs it)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift.rlhf_trainers.grpo_trainer", exc_type=ImportError)

import swift.utils
from accelerate.state import PartialState
from swift.trainers import TrainerFactory

import toolkit
from tests.integrations.swift_runs import prepare, run
from tests.processes import run_processes
from toolkit import ConfigError, GRPOLossConfig
from toolkit.integrations.ms_swift import register

FIVE_DIGITS = 2e-5
PAGE = Path(toolkit.__file__).parents[1] / "tutorials/reference/trainers/ms_swift.md"
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "dapo": ({"loss_type": "dapo", "beta": 0.04}, "loss=preset/ms_swift/dapo kl=k3 loss.kl_loss_coef=0.04"),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon": 0.02, "beta": 0},
        "policy_loss=gspo aggregation=seq_mean_token_mean policy_loss.cliprange_low=0.02 "
        "policy_loss.cliprange_high=0.02 loss.log_ratio_range=[null,null]",
    ),
    "grpo, adapters": (
        {"beta": 0.04, "overlong_filter": True, "tuner_type": "lora", "gradient_checkpointing": True},
        "loss=preset/ms_swift/grpo kl=k3 loss.kl_loss_coef=0.04",
    ),
}
"""Arguments of ms-swift, and our loss."""
OF_LOSS = ("loss_type", "importance_sampling_level", "epsilon")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prepare(tmp_path_factory.mktemp("swift"))


@pytest.fixture(autouse=True)
def _their_trainer_afterwards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for mapping in (TrainerFactory.TRAINER_MAPPING, TrainerFactory.TRAINING_ARGS_MAPPING):
            patched.setitem(mapping, "grpo", mapping["grpo"])
        yield


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Whether loss and gradient norm of every step are the same."""
    mine, others = ([(entry["loss"], entry["grad_norm"]) for entry in entries] for entries in (ours, theirs))
    return mine == [pytest.approx(pair, rel=FIVE_DIGITS, abs=1e-6) for pair in others]


@pytest.mark.parametrize("name", LOSSES)
def test_four_steps_equal_those_of_ms_swift(prepared: dict[str, Any], name: str) -> None:
    """Two micro-batches a step, each batch used twice."""
    check_equal_runs(prepared, name)


def check_equal_runs(prepared: dict[str, Any], name: str, **settings: Any) -> None:
    arguments, loss = LOSSES[name]
    theirs = run(prepared, **arguments, **settings)
    assert len(theirs) == 4
    register(loss)
    beside = {key: value for key, value in arguments.items() if key not in OF_LOSS}
    ours = run(prepared, **beside, **settings)
    assert close(ours, theirs)
    assert {*MEANS, "toolkit/policy_loss" if beside["beta"] else "toolkit/loss"} <= ours[1].keys()
    if "tuner_type" not in beside:  # adapters move too little in one step
        assert all(0 < ours[1][name] < 1 for name in MEANS if name.startswith("clip"))


MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy/mean")


def test_dr_grpo_divides_by_the_longest_completion(prepared: dict[str, Any]) -> None:
    theirs = run(prepared, loss_type="dr_grpo", beta=0)
    register("loss=preset/ms_swift/dr_grpo")
    assert close(run(prepared, beta=0), theirs)


def test_cispo_of_their_default_cap_and_its_metric(prepared: dict[str, Any]) -> None:
    # One micro-batch: of several theirs is the mean of their means, ours one over all tokens.
    settings = {"beta": 0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    theirs = run(prepared, loss_type="cispo", **settings)
    register("loss=preset/ms_swift/cispo loss.policy_loss_cfg.weight_max=0.2")
    ours = run(prepared, **settings)
    assert close(ours, theirs)
    ratios = [entry["cispo_clip_ratio"] for entry in theirs]
    assert any(0 < ratio < 1 for ratio in ratios)
    assert [entry["cispo_clip_ratio"] for entry in ours] == pytest.approx(ratios, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("policy_loss=cipso", {"beta": 0}, "try: policy_loss=cispo"),
        ("policy_loss=cispo", {}, "beta=0.04, and the loss has no KL term; set --beta 0"),
        ("policy_loss=cispo", {"beta": 0, "epsilon": 0.1}, "epsilon=0.1 has no effect"),
        ("policy_loss=rollout_is", {"beta": 0}, "set --use_vllm true"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    prepared: dict[str, Any], tmp_path: Path, loss: str, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "my_loss.py"
    path.write_text(f"from toolkit.integrations.ms_swift import register\n\nregister({loss!r})\n")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # no weights: loading them would fail
        (tmp_path / "model" / name).write_bytes((Path(prepared["model"]) / name).read_bytes())
    with pytest.raises(ConfigError) as error:
        run({**prepared, "model": str(tmp_path / "model")}, external_plugins=str(path), **settings)
    assert message in str(error.value)


def test_the_log_says_which_loss_trains(
    prepared: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swift.utils.get_logger(), "propagate", True)
    register(GRPOLossConfig(aggregation="seq_mean_token_mean"))
    (entry, *_) = run(prepared, beta=0, max_steps=1)
    line = "The loss of toolkit: policy_loss=vanilla (cliprange_low=0.2, cliprange_high=0.2, clip_ratio_c=3.0, anc"
    assert line in caplog.text
    assert "entropy/mean" in entry  # a config does not ask for it


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_ms_swift(prepared: dict[str, Any]) -> None:
    run_processes(2, _two_processes, prepared)


def _two_processes(rank: int, world: int, prepared: dict[str, Any]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), ACCELERATE_USE_CPU="1")
    check_equal_runs(prepared, "dapo", per_device_train_batch_size=2)
    assert PartialState().num_processes == world


def test_two_micro_batches_are_one_batch_and_the_file_of_the_page_is_enough(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    """A mean over tokens of sequences of unequal length, by the square root of theirs."""
    plugin = re.search(r"```py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert plugin is not None
    path = tmp_path / "my_loss.py"
    path.write_text(plugin[1])
    settings = {"beta": 0, "max_steps": 2, "external_plugins": str(path)}
    two = run(prepared, **settings)
    assert TrainerFactory.TRAINER_MAPPING["grpo"].startswith("toolkit.")
    register("policy_loss=cispo policy_loss.weight_max=5 aggregation=square")
    square = run(prepared, beta=0, max_steps=2)
    assert not close(square, two)
    one = run(prepared, beta=0, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    assert close(square, one)
