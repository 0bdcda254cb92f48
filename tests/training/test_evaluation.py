"""Evaluation of held-out prompts: pass@k and intervals by hand, at intervals, on several processes, after a resume."""

from __future__ import annotations

import io
import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.processes import run_processes
from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from tests.training.test_train import all_lines, evaluations, lines, summary
from toolkit import ConfigError
from toolkit import train as command
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.tasks.scoring import Scores
from toolkit.training import run
from toolkit.training.config import EvaluationConfig
from toolkit.training.evaluation import Evaluation, evaluate
from toolkit.training.layout import Shares
from toolkit.training.report import Summary, draw_curves, write_report
from toolkit.training.rewarding import Rewarded

pytestmark = pytest.mark.usefixtures("_fresh_state")

TIMED = ("seconds", "tokens_per_second")
TINY = [
    *("debug=smoke", "warmup.steps=2", "warmup.stop_accuracy=null", "task.num_heldout=6", "model.hidden_size=16"),
    *("model.num_layers=1", "rollout.prompts_per_step=2", "rollout.group_size=2", "training.minibatches=1"),
]


ALONE = Shares(0, 1)


def untimed(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def config_of(*overrides: str) -> Any:
    return build_config(compose_config(["debug=smoke", *overrides]))


# ---------------------------------------------------------------- numbers


def with_rewards(trainer: Any, greedy: list[float], sampled: list[list[float]], shares: Shares = ALONE) -> Any:
    """Give completions of the held-out prompts these rewards, whatever they are; return what was asked for."""
    seen: dict[str, list[Any]] = {"seeds": [], "rewarded": []}
    number = {id(example): index for index, example in enumerate(trainer.task.heldout)}

    def rewarder(examples: Any, completions: Any, seeds: Any, *, by_verifier: bool) -> Rewarded:
        assert by_verifier
        assert len(completions.texts) == len(examples) == len(seeds)
        indices = [number[id(example)] for example in examples]
        seen["rewarded"].append(list(zip(indices, seeds, strict=True)))
        of_samples = {index: iter(sampled[index]) for index in indices if sampled}
        is_greedy = len(set(indices)) == len(indices)
        totals = [greedy[index] if is_greedy else next(of_samples[index]) for index in indices]
        return Rewarded(torch.tensor(totals), {})

    draws = trainer.draws.key
    object.__setattr__(trainer.draws, "key", lambda *parts: seen["seeds"].append(parts) or draws(*parts))
    rewarder.has_rewards = True  # type: ignore[attr-defined]
    rewarder.check_failures = lambda *_: None  # type: ignore[attr-defined]
    trainer.rewarder, trainer.shares = rewarder, shares
    return seen


def test_numbers_by_hand() -> None:
    trainer = trainer_with(None, "task.num_heldout=4", "evaluation.samples=4", "evaluation.ks=[2,1]")
    unknown = math.nan
    seen = with_rewards(
        trainer,
        greedy=[1.0, 0.5, 1.0, unknown],
        sampled=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0.5], [1, unknown, unknown, unknown]],
    )
    found = trainer.evaluate(7)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.intervals["accuracy"] == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert found.reward == pytest.approx(2.5 / 3)
    assert found.reward_se == pytest.approx(math.sqrt(1 / 36))  # deviations 1/6, -1/3, 1/6: variance 1/12 over 3
    assert found.intervals["reward"] == pytest.approx((2.5 / 3 - 1.96 / 6, 2.5 / 3 + 1.96 / 6))
    assert found.rewards == [1.0, 0.5, 1.0]
    # One sample of the last prompt is known: it has a pass@1, but no pass@2.
    assert found.sampled == pytest.approx(
        {"sampled_reward": (0.5 + 1 + 0.125 + 1) / 4, "pass@1": (0.5 + 1 + 0 + 1) / 4, "pass@2": (5 / 6 + 1 + 0) / 3}
    )
    deviations = [5 / 6 - 11 / 18, 1 - 11 / 18, -11 / 18]
    half = 1.96 * math.sqrt(sum(d * d for d in deviations) / 2 / 3)
    assert found.intervals["pass@2"] == pytest.approx((max(11 / 18 - half, 0), min(11 / 18 + half, 1)))
    drawn = [parts for parts in seen["seeds"] if parts[0] == "evaluation"]
    assert drawn == [("evaluation", 7, "sample", prompt, sample) for prompt in range(4) for sample in range(4)]
    assert found.objective == found.accuracy
    assert {"accuracy_low", "pass@1_high", "sampled_reward"} <= found.metrics().keys()
    assert Evaluation.restored(json.loads(json.dumps(found._asdict()))) == found._replace(completions=list(found[1]))


def test_prompts_that_all_fail_have_an_interval() -> None:
    trainer = trainer_with(None, "task.num_heldout=10", "evaluation.samples=2")
    with_rewards(trainer, greedy=[0.0] * 10, sampled=[[0.0, 0.0]] * 10)
    found = trainer.evaluate()
    assert found.sampled["pass@2"] == 0
    assert found.intervals["pass@2"] == found.intervals["accuracy"] == pytest.approx((0, 0.278), abs=6e-4)
    assert "reward" not in found.intervals
    assert found.shown() == "accuracy 0.000 [0.00, 0.28]"
    assert found.shown_samples() == "pass@1 0.000 [0.00, 0.28], pass@2 0.000 [0.00, 0.28]"


def test_a_process_completes_its_share_and_has_the_rewards_of_its_prompts() -> None:
    trainer = trainer_with(None, "task.num_heldout=5", "evaluation.samples=2")
    seen = with_rewards(trainer, [0.0] * 5, [[0.0, 1.0]] * 5, Shares(rank=1, world=2))
    trainer.evaluate(3)
    greedy, sampled = seen["rewarded"]
    assert greedy == [(index, f"heldout/{index}") for index in (2, 3, 4)]
    assert sampled == [(index, f"heldout/{2 * index + sample}") for index in (2, 3, 4) for sample in (0, 1)]
    drawn = [parts[3:] for parts in seen["seeds"] if parts[0] == "evaluation"]
    assert drawn == [(prompt, sample) for prompt in (2, 3, 4) for sample in (0, 1)]


def test_a_reward_at_the_bound_passes() -> None:
    """Rewards are rounded to float32, in which 0.7 is less than 0.7."""
    trainer = trainer_with(None, "task.num_heldout=2", "evaluation.passing_reward=0.7")
    with_rewards(trainer, [0.7, 0.69], [])
    evaluation = trainer.evaluate()
    assert evaluation.accuracy == 0.5
    assert evaluation.shown_reward().startswith("reward 0.695")
    with_rewards(trainer, [1.0, 0.0], [])  # an accuracy and a reward of 0.5 are one number
    assert trainer.evaluate().shown_reward() == ""


@pytest.mark.slow
def test_fewer_prompts_and_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(None, "task.num_heldout=5", "evaluation.max_prompts=2", "evaluation.samples=3",
                           "evaluation.temperature=0.5")  # fmt: skip
    asked: list[Any] = []
    generate = type(trainer.generator)._generate
    monkeypatch.setattr(
        type(trainer.generator), "_generate", lambda self, f, p, **o: asked.append((p, o)) or generate(self, f, p, **o)
    )
    trainer.evaluate()
    prompts = [example.prompt for example in trainer.task.heldout[:2]]
    assert [each for each, _ in asked] == [prompts, prompts]
    assert (asked[1][1]["temperature"], asked[1][1]["group_size"]) == (0.5, 3)
    assert "temperature" not in asked[0][1]


@pytest.mark.slow
def test_settings_without_an_effect_are_refused() -> None:
    for settings, message in (
        ({"ks": [1, 4]}, r"evaluation\.ks has no effect without sampled completions; set evaluation\.samples=8"),
        ({"temperature": 0.5}, r"evaluation\.temperature has no effect without sampled completions"),
        ({"samples": 3, "ks": [1, 4]}, r"evaluation\.ks=\[1, 4\] needs numbers from 1 to evaluation\.samples=3"),
        ({"samples": 3, "ks": []}, r"evaluation\.ks=\[\] needs numbers"),
        ({"samples": 3, "ks": [0]}, "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluationConfig(**settings)
    assert EvaluationConfig(samples=1).pass_at == (1,)
    assert EvaluationConfig(samples=8, ks=(4, 1)).pass_at == (1, 4)
    by_length = ["task.reward=length", "task.target_length=3"]
    for overrides, message in (
        (["evaluation=sampled", *by_length], r"does not say which completions pass; set evaluation\.passing_reward"),
        (["loss=ce", "task.reward=null", "evaluation.samples=2"], r"samples has no effect without a reward"),
        (["task=jsonl", "task.path=a.jsonl", "task.reward=exact_match", "task.heldout=0", "evaluation.every=2"],
         r"evaluation\.every=2 has no effect with task\.heldout=0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            config_of(*overrides)
    assert config_of(*by_length, "evaluation=sampled", "evaluation.passing_reward=1").tells_right_from_wrong
    assert not config_of(*by_length, "evaluation.samples=2").tells_right_from_wrong


# ---------------------------------------------------------------- in a run


def test_an_evaluation_changes_nothing_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if a reward draws from the global random states."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("import random\ndef chance(completion): return random.random()\n")
    settings = [*TINY, "task.reward=my.py:chance", "evaluation.samples=3"]
    found = []
    for evaluates in (False, True):
        random.seed(3)
        trainer = trainer_with(None, *settings)
        phase = trainer.main_phase()
        rows = []
        for step in range(3):
            rows.append(trainer.run_step(phase))
            if evaluates:
                assert len(trainer.evaluate(step).sampled) == 1
        found.append((untimed(rows), [p.clone() for p in trainer.policy.parameters()], torch.rand(2).tolist()))
    (rows, weights, drawn), (other_rows, other_weights, other_drawn) = found
    assert rows == other_rows
    assert drawn == other_drawn
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


@pytest.mark.slow
def test_a_resumed_run_has_every_evaluation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.tasks.spell_backward.POOL_SIZE", 100)
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)
    settings = [*TINY, "training.steps=5", "evaluation.every=2", "evaluation.samples=2"]
    whole, without = tmp_path / "whole", tmp_path / "without"
    command.train([*settings, f"hydra.run.dir={whole}"])
    command.train([*TINY, "training.steps=5", f"hydra.run.dir={without}"])
    assert untimed(lines(without)) == untimed(lines(whole))
    first, second = (load_file(each / "checkpoint/model.safetensors") for each in (whole, without))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [row["step"] for row in evaluations(without)] == [0, 5]
    expected = [("warmup", 0), ("warmup", 1), ("evaluation", 0), ("main", 0), ("main", 1), ("evaluation", 2),
                ("main", 2), ("main", 3), ("evaluation", 4), ("main", 4), ("evaluation", 5)]  # fmt: skip
    assert [(row["phase"], row["step"]) for row in all_lines(whole)] == expected
    for steps in (1, 2, 4, 5):  # in the warm-up, before the first step, and before and after an evaluation
        cut = tmp_path / f"cut_{steps}"
        answers = iter([False] * steps + [True])
        with monkeypatch.context() as patch:
            patch.setattr(run.StopFlag, "agreed", lambda flag, answers=answers: next(answers))
            command.train([*settings, f"hydra.run.dir={cut}"])
        assert summary(cut)["interrupted"]
        command.train([*settings, f"training.resume={cut}", f"hydra.run.dir={cut}"])
        assert untimed(all_lines(cut)) == untimed(all_lines(whole))
        for key in ("heldout_sampled_before", "heldout_intervals_before", "heldout_intervals_after", "accuracy_before"):
            assert summary(cut)[key] == summary(whole)[key]
    # Nothing is left to do: the evaluation at the end is there already.
    command.train([*settings, f"training.resume={whole}", f"hydra.run.dir={whole}"])
    assert [(row["phase"], row["step"]) for row in all_lines(whole)] == expected


@pytest.mark.slow
def test_the_console_shows_intervals_and_the_figure_every_evaluation(tmp_path: Path) -> None:
    before = Evaluation(0.361, ["a"], 0.361, intervals={"accuracy": (0.32, 0.404)}, sampled={"pass@4": 0.5})
    after = before._replace(
        accuracy=0.977, intervals={"accuracy": (0.953, 0.989), "pass@4": (0.9, 1)}, sampled={"pass@4": 0.98}
    )
    trainer = trainer_with(None)
    done = Summary.of(trainer, before, after, wall_seconds=9.0, output_dir=tmp_path, interrupted=False)
    assert done.objective == 0.977
    rows: list[dict[str, Any]] = [{"phase": "main", "step": step, "reward": 0.1 * step} for step in range(9)]
    measured = {"accuracy": 0.4, "accuracy_low": 0.3, "accuracy_high": 0.5}
    rows += [{"phase": "evaluation", "step": step, **measured} for step in (0, 4, 8)]
    console = Console(file=io.StringIO(), width=60)
    write_report(done, rows, trainer.task.heldout[:1], before, after, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "held-out pass@4 0.500 -> 0.980 [0.90, 1.00]\n" in printed
    assert "held-out accuracy 0.361 -> 0.977 [0.95, 0.99] in 9.0 s (imports included), seed 0\n" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["heldout_intervals_after"]["accuracy"] == [0.953, 0.989]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    draw_curves(done, rows[:10], tmp_path / "before_alone.png")


# ---------------------------------------------------------------- on several processes


def _evaluate(rank: int, world: int, folder: str, sharding: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from toolkit.training.trainer import Trainer

    warnings.simplefilter("ignore")
    config = config_of(
        "model.dtype=float64", "task.num_heldout=5", "evaluation.samples=3", f"training.sharding={sharding}"
    )
    set_seed(config.seed)
    task = config.task.build(config.seed)
    policy, tokenizer = config.model.build(task.alphabet)
    trainer = Trainer(config, Accelerator(cpu=True), task, policy, tokenizer)
    warmup = trainer.warmup_phase()
    trainer.run_step(warmup)
    # What the completions are, as the verifier never passes them: their lengths and letters.
    trainer.rewarder._rewards.score = _by_letters  # type: ignore[method-assign]
    found = evaluate(trainer, list(task.heldout), 2)
    fewer = evaluate(trainer, list(task.heldout)[:1], 2)  # a process has no prompt
    assert len(found.sampled) == 3
    assert found.completions != fewer.completions
    Path(folder, f"{sharding}{world}_{rank}.json").write_text(json.dumps([found._asdict(), fewer._asdict()]))


def _by_letters(task: Any, rows: Any, *, by_verifier: bool) -> Scores:
    return Scores([sum(map(ord, row.text)) % 97 / 48 for row in rows])


@pytest.mark.slow
@pytest.mark.dist
def test_an_evaluation_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    run_processes(1, _evaluate, str(tmp_path), "none")
    alone = (tmp_path / "none1_0.json").read_text()
    for sharding, world in (("none", 2), ("none", 3), ("fsdp2", 2)):
        run_processes(world, _evaluate, str(tmp_path), sharding)
        assert {(tmp_path / f"{sharding}{world}_{rank}.json").read_text() for rank in range(world)} == {alone}
