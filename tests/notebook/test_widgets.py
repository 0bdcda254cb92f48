"""The widgets without a browser: controls change the model, and every output brings a picture along."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")

from tests.notebook.made import token_samples
from tests.notebook.test_watch import add
from toolkit import ConfigError, GRPOLossConfig, LossRunner
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.notebook import batch_view, loss_explorer, token_view, watch

BUDGET = 0.1
"""Seconds that an update of the explorer may take, in the median."""


def controls(box: Any) -> dict[str, Any]:
    """Every control below a box by its description."""
    own = {box.description: box} if getattr(box, "description", "") else {}
    for child in getattr(box, "children", ()):
        own |= controls(child)
    return own


def bundle(widget: Any) -> dict[str, Any]:
    data, _ = widget._repr_mimebundle_()
    return data  # type: ignore[no-any-return]


def test_controls_of_the_explorer() -> None:
    explorer = loss_explorer()
    known = controls(explorer)
    known["cliprange_high"].value = 0.28
    assert explorer.overrides() == ["policy_loss=vanilla", "policy_loss.cliprange_high=0.28"]
    known["on"].value = False  # the last optional one is delta, which is off
    known["policy loss"].value = "opd"
    assert "to teacher (nats)" in controls(explorer)
    assert explorer.overrides() == ["policy_loss=opd"]
    controls(explorer)["keep this curve"].click()
    assert len(json.loads(explorer.charts.view)["charts"][0]["lines"]) == 1  # not twice
    controls(explorer)["policy loss"].value = "sapo"
    assert [line["label"] for line in json.loads(explorer.charts.view)["charts"][0]["lines"]] == ["sapo", "opd"]


def test_pages_of_the_explorer() -> None:
    explorer = loss_explorer(page="KL")
    controls(explorer)["KL estimator"].value = "k3"
    controls(explorer)["gradient"].value = "straight_through"
    assert explorer.overrides() == ["policy_loss=vanilla", "kl=k3_straight_through"]
    explorer._page.value = "aggregation"
    controls(explorer)["aggregation"].value = "constant"
    assert explorer.overrides()[2:] == ["aggregation=constant", "loss.aggregation.length=128.0"]
    controls(explorer)["lengths (tokens)"].value = "3, four"
    assert "must be whole numbers" in explorer.charts.view
    with pytest.raises(ConfigError, match="page='KLL'"):
        loss_explorer(page="KLL")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", policy_loss_names())
def test_every_loss_can_be_explored(name: str) -> None:
    explorer = loss_explorer(LossRunner.from_overrides([f"policy_loss={name}"]))
    assert explorer.overrides()[0] == f"policy_loss={name}"
    assert len(json.loads(explorer.charts.view)["charts"]) == 4


def test_an_update_is_fast() -> None:
    explorer = loss_explorer(compare=["sapo", "cispo"])
    slider = controls(explorer)["cliprange_high"]
    times = []
    for step in range(20):
        started = time.process_time()  # not the wall: other processes may be busy
        slider.value = 0.3 + step / 100
        times.append(time.process_time() - started)
    assert sorted(times)[len(times) // 2] < BUDGET


def test_filters_of_the_token_view() -> None:
    view = token_view(token_samples(8, 10), color="ratio")
    known = controls(view)
    known["search"].value = "prompt 1"
    assert json.loads(view.canvas.view)["chosen"] == [4, 5, 6, 7]
    known["search"].value = ""
    view.charts.clicked = ["0", 1]
    (lowest,) = json.loads(view.canvas.view)["chosen"]
    assert view.model.records[lowest].reward == min(record.reward for record in view.model.records)
    view.charts.clicked = ["0", 2]  # the same bar again
    assert len(json.loads(view.canvas.view)["chosen"]) == 8
    with pytest.raises(ConfigError, match="color='rato' is not known"):
        token_view(token_samples(2, 3), color="rato")


def test_every_output_brings_a_picture(tmp_path: Path) -> None:
    from tests.notebook.test_batch_model import BOUNDS, packed

    add(tmp_path / "run", {"phase": "main", "step": 0, "reward": 0.5})
    shown = [
        loss_explorer(),
        token_view(token_samples(2, 5)),
        watch(tmp_path / "run"),
        watch(tmp_path / "absent"),
        batch_view([packed()], cu_seq_lens_list=BOUNDS),
    ]
    for widget in shown:
        data = bundle(widget)
        assert data["image/png"].startswith("iVBOR")
        assert data["text/plain"] == widget.summary()
        assert "application/vnd.jupyter.widget-view+json" in data


def test_watching_what_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        watch(tmp_path / "a")
    with pytest.raises(ConfigError, match="every=0"):
        watch(tmp_path, every=0)
    for wrong, name in ((3, "an int"), (None, "None"), (LossRunner(GRPOLossConfig()), "a LossRunner")):
        with pytest.raises(ConfigError, match=f"^watch got {name}; give the output folder of a run, such as"):
            watch(wrong)  # type: ignore[arg-type]
    watched = watch(tmp_path)
    watched.show_samples()
    assert "does not exist" in watched._samples.children[0].value
