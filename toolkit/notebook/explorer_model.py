"""What the explorer shows for a choice, as charts and texts. No widgets here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from toolkit.errors import ToolkitError, first_line
from toolkit.explain.facts import equation
from toolkit.functional.kl_facts import kl_warning
from toolkit.notebook.charts import Bar, Chart, CopyText, Line, View
from toolkit.notebook.choice import LossChoice
from toolkit.notebook.kl_curves import Sampler, kl_curves
from toolkit.notebook.ratio_curves import RatioCurves, SideCurve, Situation, band_words, ratio_curves
from toolkit.notebook.weight_bars import completions_of, token_weights

Page = Literal["policy loss", "KL", "aggregation"]
PAGES: tuple[Page, ...] = ("policy loss", "KL", "aggregation")
RATIO, LOSS, SLOPE = "ratio pi / pi_old (log axis)", "token loss", "d loss / d log pi"
MOST_KEPT = 5
"""Curves that are compared, beside the chosen one."""
MOST_CACHED = 200
"""Curves that are remembered."""


@dataclass
class ExplorerModel:
    """The state of the explorer."""

    choice: LossChoice = field(default_factory=LossChoice)
    kept: list[LossChoice] = field(default_factory=list)
    """Losses to compare with."""
    situation: Situation = field(default_factory=Situation)
    widest: float = 10.0
    """The ratio's axis goes from 1 / widest to widest."""
    page: Page = "policy loss"
    reference: float = 0.3
    """The reference's probability of the token, on the page KL."""
    sampler: Sampler = "current"
    lengths: tuple[int, ...] = (8, 32, 128)
    """Scored tokens of the completions on the page aggregation."""

    _known: dict[Any, RatioCurves] = field(default_factory=dict, repr=False, init=False)

    def keep(self) -> None:
        """Keep the curve of the choice, to compare others with it; the oldest leaves when there are too many."""
        if self.choice.label not in [each.label for each in self.kept]:
            self.kept = [*self.kept, self.choice][-MOST_KEPT:]

    def view(self) -> View:
        """Return charts, remarks and texts for the page; a mistake becomes a remark."""
        try:
            charts, notes = {"policy loss": self._ratio, "KL": self._kl, "aggregation": self._aggregation}[self.page]()
        except ToolkitError as error:
            return View(notes=(str(error),))
        except Exception as error:  # a custom loss may raise anything; the explorer goes on
            return View(notes=(f"{self.choice.name} raised {type(error).__name__}: {first_line(error)}",))
        texts = (
            CopyText(label="Hydra", text=self.choice.command_line()),
            CopyText(label="Python", text=self.choice.python()),
        )
        return View(charts=charts, texts=texts, notes=notes)

    def needed(self) -> set[str]:
        """Return the fields beside old log-probabilities and advantages that the shown losses read."""
        return {name for each in (self.choice, *self.kept) for name in each.loss.fields_read(each.options)}

    # ------------------------------------------------------------------ pages

    def _ratio(self) -> tuple[tuple[Chart, ...], tuple[str, ...]]:
        chosen = [self.choice, *(each for each in self.kept if each.label != self.choice.label)]
        curves = [self._curves(each) for each in chosen]
        labels = [each.label for each in chosen]
        charts = tuple(
            _side_chart(curves, labels, is_positive=is_positive, is_slope=is_slope, size=self.situation.advantage)
            for is_slope in (False, True)
            for is_positive in (True, False)
        )
        notes = [f"{self.choice.name}: {equation(self.choice.loss, self.choice.options)}"]
        first = curves[0]
        notes.append(f"A > 0: {band_words(first.positive.bands)}. A < 0: {band_words(first.negative.bands)}.")
        notes += [note for note in dict.fromkeys(curve.note for curve in curves) if note]
        return charts, tuple(notes)

    def _curves(self, choice: LossChoice) -> RatioCurves:
        """Return the curves of a choice; those that were kept do not change while another one is moved."""
        key = (choice.loss.function, repr(sorted(choice.options.items())), self.situation, self.widest)
        if key not in self._known:
            if len(self._known) > MOST_CACHED:
                self._known.clear()
            self._known[key] = ratio_curves(choice.loss, choice.options, self.situation, widest=self.widest)
        return self._known[key]

    def _kl(self) -> tuple[tuple[Chart, ...], tuple[str, ...]]:
        estimator, gradient = self.choice.kl or "k3", self.choice.kl_gradient
        c = kl_curves(estimator, gradient, reference=self.reference, sampler=self.sampler)
        x = "d = log pi - log pi_ref (nats)"
        p = f"probability of the token under pi (reference: {self.reference:g})"
        name = estimator if gradient == "as_is" else f"{estimator}, {gradient}"
        drawn = "tokens of pi" if self.sampler == "current" else "tokens of the reference"
        charts = (
            Chart(
                title="Estimate at a token", x_label=x, y_label="nats", lines=(Line(label=name, x=c.d, y=c.values),),
                marker=0.0,
            ),
            Chart(
                title="Its gradient at a token", x_label=x, y_label="d / d log pi",
                lines=(Line(label=name, x=c.d, y=c.slopes),), marker=0.0,
            ),
            Chart(
                title=f"Expected value ({drawn})", x_label=p, y_label="nats", marker=self.reference,
                lines=(
                    Line(label=name, x=c.probabilities, y=c.expected_values),
                    Line(label="reverse KL(pi || ref)", x=c.probabilities, y=c.reverse_values, style=1),
                ),
            ),
            Chart(
                title=f"Expected gradient ({drawn})", x_label=p, y_label="d / d logit", marker=self.reference,
                lines=(
                    Line(label=name, x=c.probabilities, y=c.expected_gradients),
                    Line(label="reverse KL(pi || ref)", x=c.probabilities, y=c.reverse_gradients, style=1),
                    Line(label="forward KL(ref || pi)", x=c.probabilities, y=c.forward_gradients, style=2),
                ),
            ),
        )  # fmt: skip
        notes = [c.words]
        if self.choice.kl is None:
            notes.append("The chosen loss has no KL term; k3 is shown.")
        elif (warning := kl_warning(estimator, gradient)) is not None:
            notes.append(f"Careful: {warning}.")
        return charts, tuple(notes)

    def _aggregation(self) -> tuple[tuple[Chart, ...], tuple[str, ...]]:
        from toolkit.explain.facts import AGGREGATIONS

        completions = completions_of(self.lengths)
        chosen = self.choice.aggregation
        weights = token_weights(completions, chosen)
        shares = [weight * each.length for weight, each in zip(weights, completions, strict=True)]
        total = sum(shares) or 1.0
        what = [each.label for each in completions]
        charts = (
            Chart(
                title=f"Weight of one token ({chosen.name})", x_label="", y_label="weight",
                bars=tuple(Bar(label=text, value=weight) for text, weight in zip(what, weights, strict=True)),
            ),
            Chart(
                title="Share of the completion in the loss", x_label="", y_label="% of all weights",
                bars=tuple(
                    Bar(label=text, value=100 * each / total, style=2) for text, each in zip(what, shares, strict=True)
                ),
            ),
        )  # fmt: skip
        numbers = {
            name: f"{value:g}" if isinstance(value, float) else value for name, value in chosen.model_dump().items()
        }
        known = AGGREGATIONS[chosen.name]
        notes = [f"{chosen.name}: weight = {known.weight.format_map(numbers)}: {known.words.format_map(numbers)}."]
        wanted = self.choice.loss.aggregation
        if wanted is not None and wanted != chosen.name:
            notes.append(f"The paper of {self.choice.name} uses {wanted}.")
        return charts, tuple(notes)


def _side_chart(
    curves: Sequence[RatioCurves], labels: Sequence[str], *, is_positive: bool, is_slope: bool, size: float
) -> Chart:
    sides: list[SideCurve] = [curve.positive if is_positive else curve.negative for curve in curves]
    lines = tuple(
        Line(label=label, x=curve.ratios, y=side.gradients if is_slope else side.losses, style=index)
        for index, (label, curve, side) in enumerate(zip(labels, curves, sides, strict=True))
    )
    signed = f"A = {'+' if is_positive else '-'}{size:g}"
    return Chart(
        title=f"{'Gradient' if is_slope else 'Token loss'}, {signed}",
        x_label=RATIO,
        y_label=SLOPE if is_slope else LOSS,
        lines=lines,
        bands=sides[0].bands,
        is_log=True,
        marker=1.0,
    )


def model_of(runner: object | None, compare: Sequence[str] = ()) -> ExplorerModel:
    """Return the model for a runner (None: the default loss), compared with losses by name at their defaults.

    Raises:
        ConfigError: the runner's loss is not built on a policy loss, or a name is unknown.
    """
    choice = LossChoice() if runner is None else LossChoice.of(getattr(runner, "loss_cfg", runner))
    kept = [replace(choice, name=name, changed={}) for name in compare]
    for each in kept:
        _ = each.options  # raises for an unknown name
    return ExplorerModel(choice=choice, kept=kept[-MOST_KEPT:])
