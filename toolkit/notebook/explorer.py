"""`loss_explorer`: a loss and its gradient, drawn while its options are moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from toolkit.errors import ConfigError
from toolkit.functional.kl_facts import KL_GRADIENTS
from toolkit.functional.names import check_choice
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.notebook.charts import View, picture
from toolkit.notebook.controls import Control, controls_of
from toolkit.notebook.explorer_model import PAGES, ExplorerModel, Page, model_of
from toolkit.notebook.extra import check_extra
from toolkit.notebook.kl_curves import ESTIMATORS

check_extra()

import ipywidgets as widgets  # noqa: E402

from toolkit.notebook.chart_widget import ChartWidget  # noqa: E402
from toolkit.notebook.option_controls import NONE, STYLE, WIDE, control_widget, lengths_from  # noqa: E402
from toolkit.notebook.static_view import WithPicture  # noqa: E402

WIDTHS = (1.001, 1.01, 1.1, 1.5, 2.0, 5.0, 10.0)
"""How far the ratio's axis goes."""
SITUATION = {
    "old_probability": Control(
        name="pi_old of token", kind="slider", default=0.05, low=0.001, high=0.999, step=0.001,
        meaning="Probability of the token under the policy before the step.",
    ),
    "advantage": Control(
        name="|A|", kind="slider", default=1.0, low=0.1, high=5.0, step=0.1, meaning="Magnitude of the advantage.",
    ),
    "rollout_gap": Control(
        name="to rollout (nats)", kind="slider", default=0.0, low=-2.0, high=2.0, step=0.05,
        meaning="log pi_old - log pi_rollout.",
    ),
    "ref_gap": Control(
        name="to reference (nats)", kind="slider", default=0.0, low=-2.0, high=2.0, step=0.05,
        meaning="log pi_old - log pi_ref.",
    ),
    "teacher_gap": Control(
        name="to teacher (nats)", kind="slider", default=-0.5, low=-3.0, high=3.0, step=0.05,
        meaning="log pi_old - log pi_teacher.",
    ),
    "entropy": Control(
        name="entropy (nats)", kind="slider", default=1.0, low=0.0, high=8.0, step=0.1,
        meaning="Entropy of the policy at the token.",
    ),
}  # fmt: skip
READ_BY = {
    "rollout_gap": "rollout_logprobs",
    "ref_gap": "ref_logprobs",
    "teacher_gap": "teacher_logprobs",
    "entropy": "entropies",
}
"""Controls that are shown only where a loss reads the field."""


def loss_explorer(runner: Any = None, *, compare: Sequence[str] = (), page: Page = "policy loss") -> LossExplorer:
    """Show a policy loss, its KL term and its aggregation, and what the settings do to its gradient.

    Args:
        runner: a `LossRunner` or a config of a policy loss to begin with; None: PPO's clipped surrogate. It is not
            changed.
        compare: names of policy losses whose curves are drawn beside it, each with its defaults.

        page: what is shown first: "policy loss", "KL" or "aggregation".

    Raises:
        ConfigError: the runner's loss is not built on a policy loss, or a name is unknown.
    """
    check_choice(page, PAGES, f"page={page!r} of the explorer is not known")
    return LossExplorer(replace(model_of(runner, compare), page=page))


class LossExplorer(WithPicture):
    """The widget; `model` is its state."""

    def __init__(self, model: ExplorerModel) -> None:
        self.model = model
        self.charts = ChartWidget()
        self._drawn = View()
        self._page = widgets.ToggleButtons(options=list(PAGES), value=model.page, style={"button_width": "130px"})
        self._page.observe(lambda change: self._set_page(change["new"]), names="value")
        self._side = widgets.VBox(layout={"width": "360px", "flex": "0 0 auto"})
        main = widgets.VBox([self._page, self.charts], layout={"flex": "1 1 420px", "min_width": "320px"})
        self.charts.layout = widgets.Layout(width="100%")
        row = widgets.HBox([self._side, main], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        super().__init__([row])
        self._build_side()
        self._draw()

    def picture(self) -> bytes:
        """Return the charts and the texts as a PNG."""
        return picture(self._drawn)

    def summary(self) -> str:
        """Return the remarks and the texts."""
        texts = [f"{text.label}: {text.text}" for text in self._drawn.texts]
        return "\n".join([*self._drawn.notes, *texts])

    def overrides(self) -> list[str]:
        """Return the overrides of what is shown, e.g. for ``LossRunner.from_overrides``."""
        return self.model.choice.overrides()

    # ------------------------------------------------------------------ state

    def _draw(self) -> None:
        self._drawn = self.model.view()
        self.charts.show(self._drawn)

    def _set_page(self, page: Any) -> None:
        self.model.page = page
        self._build_side()
        self._draw()

    def _choose(self, *, rebuild: bool = False, **changes: Any) -> None:
        """Change fields of the choice and draw."""
        needed = self._needed()
        self.model.choice = replace(self.model.choice, **changes)
        if rebuild or self._needed() != needed:
            self._build_side()
        self._draw()

    def _needed(self) -> set[str]:
        try:
            return self.model.needed()
        except ConfigError:  # an option that is out of range; the view shows it
            return set()

    def _set_loss(self, name: str) -> None:
        self._choose(name=name, changed={}, rebuild=True)

    def _set_option(self, name: str, value: Any) -> None:
        self._choose(changed={**self.model.choice.changed, name: value})

    def _set_situation(self, name: str, value: float) -> None:
        self.model.situation = replace(self.model.situation, **{name: value})
        self._draw()

    def _set(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)
        self._draw()

    # ------------------------------------------------------------------ controls

    def _build_side(self) -> None:
        build = {"policy loss": self._policy_side, "KL": self._kl_side, "aggregation": self._aggregation_side}
        self._side.children = build[self.model.page]()

    def _policy_side(self) -> list[widgets.Widget]:
        choice, model = self.model.choice, self.model
        known = policy_loss_names()
        name = _dropdown("policy loss", known, choice.name, self._set_loss)
        options = [
            control_widget(control, choice.options[control.name], _setter(self._set_option, control.name))
            for control in controls_of(choice.loss.options_model, choice.options)
        ]
        keep = widgets.Button(description="keep this curve", tooltip="Draw it beside what is chosen next.")
        clear = widgets.Button(description="remove kept", disabled=not model.kept)

        def kept(action: Callable[[], Any]) -> Callable[[Any], None]:
            def run(_: Any) -> None:
                action()
                clear.disabled = not model.kept
                self._draw()

            return run

        keep.on_click(kept(model.keep))
        clear.on_click(kept(lambda: setattr(model, "kept", [])))
        needed = self._needed()
        token = [
            control_widget(control, getattr(model.situation, field), _setter(self._set_situation, field))
            for field, control in SITUATION.items()
            if field not in READ_BY or READ_BY[field] in needed
        ]
        widest = _dropdown("ratio up to", WIDTHS, model.widest, lambda value: self._set("widest", value))
        return [
            name, *options, widgets.HBox([keep, clear]), widgets.HTML("<b>The token</b>"), *token, widest,
        ]  # fmt: skip

    def _kl_side(self) -> list[widgets.Widget]:
        choice, model = self.model.choice, self.model
        estimator = _dropdown(
            "KL estimator", [("none", NONE), *((each, each) for each in ESTIMATORS)], choice.kl or NONE, self._set_kl
        )  # fmt: skip
        gradient = _dropdown(
            "gradient", KL_GRADIENTS, choice.kl_gradient, lambda value: self._choose(kl_gradient=value)
        )
        coefficient = widgets.FloatLogSlider(
            value=choice.kl_coef, min=-5, max=0, step=0.1, description="coefficient", style=STYLE, layout=WIDE,
            readout_format=".2g",
        )  # fmt: skip
        coefficient.observe(lambda change: self._choose(kl_coef=float(f"{change['new']:.2g}")), names="value")
        gradient.disabled = coefficient.disabled = choice.kl is None
        reference = control_widget(
            Control(name="pi_ref of token", kind="slider", default=0.3, low=0.05, high=0.95, step=0.01),
            model.reference,
            lambda value: self._set("reference", value),
        )
        drawn = [("the current policy", "current"), ("the reference", "reference")]
        sampler = _dropdown("tokens drawn by", drawn, model.sampler, lambda value: self._set("sampler", value))
        return [estimator, gradient, coefficient, widgets.HTML("<b>The two tokens</b>"), reference, sampler]

    def _set_kl(self, name: str) -> None:
        is_on = name != NONE
        gradient = self.model.choice.kl_gradient if is_on else "as_is"
        self._choose(kl=name if is_on else None, kl_gradient=gradient, rebuild=True)

    def _aggregation_side(self) -> list[widgets.Widget]:
        from toolkit.explain.facts import AGGREGATIONS

        chosen, model = self.model.choice.aggregation, self.model

        def renamed(value: str) -> None:
            length = float(max(model.lengths)) if value == "constant" else None
            settings = {"name": value, "length": length}
            self._choose(aggregation=AggregationConfig.model_validate(settings), rebuild=True)

        parts: list[widgets.Widget] = [_dropdown("aggregation", list(AGGREGATIONS), chosen.name, renamed)]
        fields = {"constant": ("length",), "per_component": ("positive_weight", "negative_weight")}
        high = {"length": 2.0 * max(model.lengths), "positive_weight": 5.0, "negative_weight": 5.0}
        for name in fields.get(chosen.name, ()):
            step = 1.0 if name == "length" else 0.1
            control = Control(name=name, kind="slider", default=1.0, low=step, high=high[name], step=step)
            parts.append(control_widget(control, getattr(chosen, name), _setter(self._set_aggregation, name)))
        lengths = widgets.Text(
            value=", ".join(map(str, model.lengths)), description="lengths (tokens)", continuous_update=False,
            style=STYLE, layout=WIDE,
        )  # fmt: skip
        lengths.observe(lambda change: self._set_lengths(change["new"]), names="value")
        return [*parts, widgets.HTML("<b>The completions of a step</b>"), lengths]

    def _set_aggregation(self, name: str, value: float) -> None:
        settings = {**self.model.choice.aggregation.model_dump(), name: value}
        self._choose(aggregation=AggregationConfig(**settings))

    def _set_lengths(self, text: str) -> None:
        try:
            self._set("lengths", lengths_from(text))
        except ConfigError as error:
            self.charts.show(View(notes=(str(error),)))


def _dropdown(label: str, options: Any, value: Any, on_change: Callable[[Any], None]) -> widgets.Dropdown:
    made = widgets.Dropdown(options=options, value=value, description=label, style=STYLE, layout=WIDE)
    made.observe(lambda change: on_change(change["new"]), names="value")
    return made


def _setter(function: Callable[[str, Any], None], name: str) -> Callable[[Any], None]:
    return lambda value: function(name, value)


__all__ = ["LossExplorer", "loss_explorer"]
