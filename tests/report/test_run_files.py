"""tutorials/reference/run_files.md names what a run writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit.errors import ConfigError
from toolkit.losses.token_records import STATUSES
from toolkit.training.config import TrackerConfig
from toolkit.training.metrics_file import SCHEMA, as_line, read_rows
from toolkit.training.sample_log import SAMPLES, SampleLog
from toolkit.training.token_log import NO_UPDATE

PAGE = Path(__file__).parents[2] / "tutorials/reference/run_files.md"
pytestmark = pytest.mark.usefixtures("_fresh_state")


def test_every_metric_and_every_field_of_a_run_is_on_the_page(tmp_path: Path) -> None:
    named = set(re.findall(r"`([\w/@]+)`", PAGE.read_text()))
    loss = ("kl=k3", "loss.entropy_coef=0.01", "loss.use_entropy_metric=true", "loss.positive_nll_coef=0.1")
    loop = ("training.minibatches=2", "rollout.max_sampling_rounds=2")
    trainer = trainer_with(None, *loss, *loop)
    trainer.rollouts.samples = SampleLog(TrackerConfig(), tmp_path, trainer.tokenizer, is_main=True)
    measured: set[str] = set()
    for phase in (trainer.warmup_phase(), trainer.main_phase()):
        measured |= set(trainer.run_step(phase))
    measured |= {name.removesuffix("_low").removesuffix("_high") for name in trainer.evaluate().metrics()}
    sample: dict[str, Any] = json.loads((tmp_path / SAMPLES).read_text().splitlines()[0])
    assert len(measured) > 30
    missing = (measured | set(sample) | set(sample["tokens"]) | set(STATUSES) | {NO_UPDATE}) - named
    assert not missing


def test_a_line_has_its_version_and_later_ones_are_refused(tmp_path: Path) -> None:
    file, row = tmp_path / "metrics.jsonl", {"phase": "main", "step": 0, "reward": 0.5}
    file.write_text(as_line(row) + json.dumps(row) + "\n")
    assert json.loads(file.read_text().splitlines()[0])["schema"] == SCHEMA
    assert read_rows(file) == [row, row]
    file.write_text(json.dumps({"schema": SCHEMA + 1, **row}) + "\n")
    with pytest.raises(ConfigError, match=f"a later version: schema {SCHEMA + 1}, this one reads {SCHEMA}"):
        read_rows(file)
