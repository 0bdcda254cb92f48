"""Controls from options, the choice as overrides and as Python, and what the explorer shows; no browser, no widgets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from toolkit import AggregationConfig, GRPOLossConfig, LossRunner
from toolkit.errors import ConfigError
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.notebook.charts import Chart, Line, View, picture
from toolkit.notebook.choice import LossChoice
from toolkit.notebook.controls import Control, controls_of
from toolkit.notebook.explorer_model import PAGES, ExplorerModel, model_of
from toolkit.schema import Config

CHOICES = [
    LossChoice(),
    LossChoice("gspo", {"cliprange_low": 0.001, "clip_ratio_c": 3.0}, aggregation=AggregationConfig(name="token_sum")),
    LossChoice("vanilla", {"clip_ratio_c": None, "anchor": "self"}, kl="k3", kl_gradient="straight_through"),
    LossChoice("sapo", kl="k2", kl_gradient="straight_through", kl_coef=0.02),
    LossChoice("cispo", {"use_unified_mask": True}, aggregation=AggregationConfig(name="constant", length=64)),
    LossChoice(aggregation=AggregationConfig(name="per_component", negative_weight=0.5)),
]


def controls(name: str) -> dict[str, Control]:
    return {control.name: control for control in controls_of(policy_loss(name).options_model)}


def test_controls_of_ppo() -> None:
    known = controls("vanilla")
    low, high, dual, delta, anchor = known.values()
    assert (low.kind, low.low, low.high, low.step, low.default) == ("slider", 0, 1, 0.01, 0.2)
    assert (high.low, high.high) == (0, 1)
    assert dual.is_optional
    assert dual.low == pytest.approx(1.1)  # above 1, as its type says
    assert (delta.default, delta.is_optional) == (None, True)
    assert delta.low < delta.start < delta.high
    assert (anchor.kind, anchor.choices) == ("choice", ("old", "rollout", "self"))
    assert "floor is 1 - cliprange_low" in low.meaning


def test_a_small_default_has_a_slider_of_its_size() -> None:
    low = controls("gspo")["cliprange_low"]
    assert low.high == pytest.approx(0.0015)
    assert low.step == pytest.approx(1e-5)


class Strange(Config):
    """Options without bounds and of other types."""

    name: str = "a"
    """A text."""
    size: int = 3
    """A whole number."""
    shift: float = -2.0
    """May be negative."""
    is_on: bool = True
    """A switch."""
    parts: tuple[float, ...] = (1.0, 2.0)
    """Several numbers."""


def test_controls_of_other_types() -> None:
    name, size, shift, is_on, parts = controls_of(Strange)
    assert (name.kind, size.kind, shift.kind, is_on.kind, parts.kind) == ("text", "integer", "slider", "switch", "text")
    assert shift.low <= -2 <= shift.high
    assert parts.parsed("(1.0, 3.0)") == (1.0, 3.0)
    assert name.parsed("b") == "b"


@pytest.mark.parametrize("name", policy_loss_names())
def test_both_ends_of_every_slider_are_allowed(name: str) -> None:
    loss = policy_loss(name)
    for control in controls(name).values():
        values = list(control.choices) if control.kind == "choice" else [control.default]
        if control.kind in ("slider", "integer"):
            values += [control.low, control.high, control.start] if control.kind == "slider" else [int(control.low)]
            assert control.low < control.high
        for value in values:
            loss.options({control.name: value})


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.command_line())
def test_overrides_and_python_say_the_same(choice: LossChoice) -> None:
    by_override = LossRunner.from_overrides(choice.overrides()).loss_cfg
    names = {"LossRunner": LossRunner, "GRPOLossConfig": GRPOLossConfig}
    by_python = eval(choice.python().removeprefix("runner = "), names)
    for cfg in (by_override, by_python.loss_cfg):
        again = LossChoice.of(cfg)
        assert again.options == choice.options
        assert (again.kl, again.kl_gradient, again.kl_coef) == (choice.kl, choice.kl_gradient, choice.kl_coef)
        assert again.aggregation == choice.aggregation
        assert again.overrides() == choice.overrides()


def test_what_is_written() -> None:
    assert LossChoice("vanilla", {"cliprange_high": 0.28, "clip_ratio_c": None}).command_line() == (
        "policy_loss=vanilla policy_loss.cliprange_high=0.28 policy_loss.clip_ratio_c=null"
    )
    assert LossChoice("vanilla", {"cliprange_low": 0.2}).label == "vanilla"
    assert LossChoice("vanilla", {"cliprange_low": 0.1}).label == "vanilla (cliprange_low=0.1)"


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    view = ExplorerModel(page=page, kept=[LossChoice("sapo")]).view()  # type: ignore[arg-type]
    assert len(view.charts) == {"policy loss": 4, "KL": 4, "aggregation": 2}[page]
    assert [text.label for text in view.texts] == ["Hydra", "Python"]
    assert picture(view).startswith(b"\x89PNG")


def test_kept_curves_and_limits() -> None:
    model = ExplorerModel()
    for name in ("vanilla", "vanilla", "sapo", "gspo", "cispo", "kimi", "tis"):
        model.choice = LossChoice(name)
        model.keep()
    assert [each.name for each in model.kept] == ["sapo", "gspo", "cispo", "kimi", "tis"]
    assert [line.label for line in model.view().charts[0].lines] == ["tis", "sapo", "gspo", "cispo", "kimi"]


def test_a_mistake_becomes_a_remark() -> None:
    view = ExplorerModel(choice=LossChoice("vanilla", {"cliprange_low": 3.0})).view()
    assert view.charts == ()
    assert "cliprange_low" in view.notes[0]


def test_only_what_a_loss_reads_is_asked_for() -> None:
    assert ExplorerModel().needed() == set()
    assert ExplorerModel(choice=LossChoice("opd")).needed() == {"teacher_logprobs"}
    assert ExplorerModel(kept=[LossChoice("ipo")]).needed() == {"rollout_logprobs"}


def test_models_of_runners() -> None:
    runner = LossRunner.from_overrides(["policy_loss=gspo", "aggregation=token_sum"])
    model = model_of(runner, ["sapo"])
    assert (model.choice.name, model.choice.aggregation.name) == ("gspo", "token_sum")
    assert [each.name for each in model.kept] == ["sapo"]
    with pytest.raises(ConfigError, match="CELossConfig is not built on a policy loss"):
        model_of(LossRunner.from_overrides("loss=ce"))
    with pytest.raises(ConfigError, match="sapoo"):
        model_of(None, ["sapoo"])


def test_numbers_that_json_does_not_have() -> None:
    chart = Chart(title="", x_label="", y_label="", lines=(Line(label="", x=[1.0], y=[float("nan")]),))
    assert '"y":[null]' in View(charts=(chart,)).as_json()


@pytest.mark.slow
def test_without_the_extra_the_import_names_it() -> None:
    code = (
        "import sys; sys.modules['anywidget'] = None; sys.modules['ipywidgets'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('ipywidgets', 'anywidget') else real(name, *a)\n"
        "import toolkit.notebook.explorer_model\n"
        "try:\n    from toolkit.notebook import loss_explorer\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        'toolkit.notebook needs ipywidgets and anywidget: pip install "rl-loss-toolkit[notebook]"'
    )
