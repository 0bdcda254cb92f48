"""A reference that is another model: a teacher for on-policy distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit import ConfigError
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.models.config import TinyLlamaConfig
from toolkit.training.reference_path import reference_config
from toolkit.training.updates import Updater

OPD = ("loss=opd", "loss.teacher=reference", "rollout.skip_uniform_groups=false", "rollout.prompts_per_step=4")


def saved(folder: Path, alphabet: str, **sizes: Any) -> Any:
    """Write a model with random weights and its tokenizer, and return its policy."""
    torch.manual_seed(5)
    policy, tokenizer = TinyLlamaConfig(hidden_size=32, num_heads=2, num_layers=1, **sizes).build(alphabet)
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return policy


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_the_reference_is_the_model_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another width than the policy, stays as it is, and its log-probabilities are what the loss learns from."""
    alphabet = trainer_with(None).task.alphabet
    teacher = saved(tmp_path, alphabet)
    trainer = trainer_with(None, *OPD, f"training.reference_path={tmp_path}")
    seen: list[Any] = []
    step = Updater.step
    monkeypatch.setattr(
        Updater, "step", lambda self, phase, rows, *rest: (seen.append(rows), step(self, phase, rows, *rest))[1]
    )
    phase = trainer.main_phase()
    before = [parameter.clone() for parameter in trainer.reference.parameters()]
    first = trainer.run_step(phase)
    rows = seen[0]
    with torch.no_grad():
        expected = teacher.eval()(rows.input_ids, rows.attention_mask)
    is_scored = rows.shifted_labels != -100
    torch.testing.assert_close(rows.ref_logprobs[is_scored], expected[is_scored])
    assert first["grad_norm"] > 0  # all rewards are the same: nothing but the teacher teaches
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.reference.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "abc=")
    trainer = trainer_with(None, *OPD, f"training.reference_path={tmp_path}")
    with pytest.raises(ConfigError, match=r"training\.reference_path=.* has another tokenizer \(\d+ tokens\) than"):
        trainer.main_phase()


def test_a_folder_that_does_not_exist_is_refused_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"training\.reference_path=/nowhere"):
        reference_config("/nowhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.reference_path=x"], r"training\.reference_path=x has no effect: nothing reads a reference"),
        (["training.reference_path=x", "loss=ce"], r"training\.reference_path=x has no effect with loss=ce"),
        (["training.reference_path=x", "kl=k3", "training.refresh_reference_every=2"], "would replace the model of"),
        (["training.reference_path=x", "kl=k3", "training.sharding=fsdp2"], "a whole model on each process"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(compose_config(overrides))


def test_the_recipe() -> None:
    loss = build_config(compose_config(["experiment=opd"])).loss
    assert loss.teacher == "reference"  # type: ignore[attr-defined]
