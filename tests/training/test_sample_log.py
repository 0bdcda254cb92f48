"""samples.jsonl: which completions are kept, what a line says, after a resume, and how large it grows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from tests.training.test_train import train
from toolkit.errors import ConfigError
from toolkit.report.samples import SCHEMA as READ
from toolkit.training.config import TrackerConfig
from toolkit.training.sample_log import SAMPLES, SCHEMA, SOME, SampleLog, mean_advantages
from toolkit.training.token_log import NO_UPDATE

pytestmark = pytest.mark.usefixtures("_fresh_state")
SMALL = ("rollout.prompts_per_step=4", "rollout.group_size=3", "rollout.skip_uniform_groups=false")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def sampled(folder: Path, *overrides: str, steps: int = 3, **settings: Any) -> Any:
    trainer = trainer_with(None, *SMALL, *overrides)
    trainer.rollouts.samples = SampleLog(TrackerConfig(**settings), folder, trainer.tokenizer, is_main=True)
    phase = trainer.main_phase()
    for _ in range(steps):
        trainer.run_step(phase)
    return trainer


def test_some_are_the_first_prompts_of_every_few_steps(tmp_path: Path) -> None:
    sampled(tmp_path, samples="some", samples_every=2, tokens_every=0)
    found = [(line["step"], line["prompt_index"], line["sample"]) for line in lines(tmp_path)]
    assert found == [(step, prompt, sample) for step in (0, 2) for prompt in range(SOME) for sample in range(3)]


def test_a_line_says_what_was_sampled_and_what_it_was_worth(tmp_path: Path) -> None:
    trainer = sampled(tmp_path, steps=1, samples="all")
    prompts = trainer.task.draw_at(0, 4, trainer.draws.rng("main", 0, "data"))
    completions = trainer_with(None, *SMALL).generator.sample(prompts, range(4), 0, group_size=3)
    found = lines(tmp_path)
    assert len(found) == 12
    for row, line in enumerate(found):
        assert (line["schema"], line["phase"], line["prompt"]) == (SCHEMA, "main", prompts[row // 3].prompt)
        assert (line["completion"], line["answer"]) == (completions.texts[row], prompts[row // 3].answer)
        assert line["num_tokens"] == int(completions.is_new[row].sum())
        assert line["stop"] == ("end" if completions.finished[row] else "length")
    for group in (found[at : at + 3] for at in range(0, 12, 3)):  # GRPO: they add up to 0, and follow the rewards
        assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-5)
        best = max(group, key=lambda line: line["reward"])
        assert all(line["advantage"] <= best["advantage"] for line in group)
    assert READ == SCHEMA


def test_the_mean_advantage_of_the_scored_tokens_by_hand() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, False], [False, False, False, True]])
    of_tokens = torch.tensor([[1.0, 9.0, 3.0], [3.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    assert mean_advantages(of_tokens, mask).tolist() == [2.0, 3.0, 0.0]
    assert mean_advantages(of_tokens[:, :1], mask).tolist() == [1.0, 3.0, 5.0]


def test_a_resumed_run_has_every_sample_once(tmp_path: Path) -> None:
    earlier, later = tmp_path / "a", tmp_path / "b"
    for folder in (earlier, later):
        folder.mkdir()
    sampled(earlier, samples="all")
    whole = (earlier / SAMPLES).read_text()
    with (earlier / SAMPLES).open("a") as file:
        file.write('{"schema": 1, "step": 1, "pro')  # the process was killed
    for folder in (later, earlier):
        log = SampleLog(TrackerConfig(samples="all"), folder, is_main=True)
        log.restore(earlier, 2)
        assert [line["step"] for line in lines(folder)] == [0] * 12 + [1] * 12
        assert whole.startswith((folder / SAMPLES).read_text())


def test_the_file_stays_below_its_size(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"samples\.jsonl has reached tracker\.samples_mb=0\.005, so no more samples"):
        sampled(tmp_path, samples="all", samples_mb=0.005, tokens_every=0)
    assert len(lines(tmp_path)) % 12 == 0
    assert 0 < (tmp_path / SAMPLES).stat().st_size <= 5000


def test_settings_without_an_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.samples_every=2 has no effect with tracker\.samples=all"):
        TrackerConfig(samples="all", samples_every=2)
    with pytest.raises(ConfigError, match=r"tracker\.samples_mb=2 has no effect with tracker\.samples=none"):
        TrackerConfig(samples="none", samples_mb=2)
    with pytest.raises(ConfigError, match=r"tracker\.tokens_every=2 has no effect with tracker\.samples=none"):
        TrackerConfig(samples="none", tokens_every=2)


OFF_POLICY = ("optimizer.lr=0.05", "training.minibatches=2", "training.epochs=2", "kl=k3")


@pytest.mark.parametrize("packed", [False, True])
def test_records_of_tokens_are_what_the_last_update_saw(tmp_path: Path, packed: bool) -> None:
    overrides = [*OFF_POLICY, *(["training.micro_batch_tokens=64"] if packed else [])]
    sampled(tmp_path, *overrides, steps=1, samples="all")
    ratios = []
    for line in lines(tmp_path):
        tokens = line["tokens"]
        assert {len(values) for values in tokens.values()} == {line["num_tokens"]}
        is_special = [text.startswith("<") and len(text) > 1 for text in tokens["text"]]
        plain = [text for text, special in zip(tokens["text"], is_special, strict=True) if not special]
        assert "".join(plain) == line["completion"]
        for at in range(line["num_tokens"]):
            assert tokens["current"][at] <= 0
            assert tokens["ratio"][at] == pytest.approx(math.exp(tokens["current"][at] - tokens["old"][at]), rel=1e-4)
            assert tokens["advantage"][at] == pytest.approx(line["advantage"], abs=1e-5)
            assert tokens["entropy"][at] >= 0
            is_clipped = tokens["status"][at].startswith("clipped")
            is_outside = tokens["ratio"][at] > 1.2 if line["advantage"] > 0 else tokens["ratio"][at] < 0.8
            assert is_clipped == (is_outside and line["advantage"] != 0)
        ratios += tokens["ratio"]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.01  # other updates of the step came before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rloo", "reinforce_pp", "grpo", "dapo", "gspo", "cispo"])
def test_recipes_have_records(tmp_path: Path, recipe: str) -> None:
    """With the KL in the reward rows have lost the sampler's log-probabilities when records begin."""
    skips = "rollout.skip_uniform_groups=true"
    sampled(tmp_path, f"experiment={recipe}", "rollout.prompts_per_step=16", skips, steps=1, samples="all")
    for line in lines(tmp_path):
        assert {len(values) for values in line["tokens"].values()} == {line["num_tokens"]}
        assert None not in line["tokens"]["rollout"]


def test_rows_that_no_update_used_say_so(tmp_path: Path) -> None:
    sampled(tmp_path, "rollout.skip_uniform_groups=true", steps=1, samples="all")
    skipped = [line for line in lines(tmp_path) if line["advantage"] == 0]
    for line in skipped:
        assert set(line["tokens"]["status"]) == {NO_UPDATE}
        assert "current" not in line["tokens"]
    assert any("learns" in line["tokens"]["status"] for line in lines(tmp_path) if line["advantage"])


@pytest.mark.slow
def test_records_of_tokens_change_nothing(tmp_path: Path) -> None:
    weights = []
    for every in (0, 1):
        (folder := tmp_path / str(every)).mkdir()
        trainer = sampled(folder, *OFF_POLICY, samples="all", tokens_every=every)
        weights.append([parameter.detach().clone() for parameter in trainer.policy.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    assert ["tokens" in line for line in lines(tmp_path / "0")] == [False] * 36


@pytest.mark.slow
def test_the_command_keeps_them_and_trains_the_same(tmp_path: Path) -> None:
    small = ["debug=smoke", "warmup.steps=2", "warmup.stop_accuracy=null", "training.steps=2", "task.num_heldout=4"]
    rows = []
    for kind in ("all", "none"):
        assert train(tmp_path / kind, *small, f"tracker.samples={kind}").returncode == 0
        text = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "tokens_per_second")
        rows.append([{k: v for k, v in json.loads(line).items() if k not in timed} for line in text])
    assert rows[0] == rows[1]
    assert len({line["step"] for line in lines(tmp_path / "all")}) == 2
    assert not (tmp_path / "none" / SAMPLES).exists()
