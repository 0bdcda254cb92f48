"""What a loss config computes, in plain text: formulas with numbers, normaliser, policies, gradients; no torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from toolkit.explain.facts import (
    AGGREGATIONS,
    KL_EQUATIONS,
    KL_GRADIENT_WORDS,
    equation,
    facts_of,
    range_words,
    shown,
    shown_all,
    title_of,
)
from toolkit.explain.lint import warnings_for
from toolkit.functional.kl_facts import KL_NAMES, MAX_K3, MAX_LOG_DIFF, expected_gradient_facts
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import PolicyLoss
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.correction import CLAMPS, CorrectionConfig
from toolkit.losses.config.policy import BaseRLLossConfig, GRPOLossConfig

Sections = Iterable[tuple[str, list[str]]]
WIDTH, INDENT = 112, 13
UNITS = {"token": "token", "segment": "turn", "sequence": "sequence"}
STATISTICS = {
    "ratio": "pi_{p} / pi_{q}",
    "k1": "log(pi_{q} / pi_{p})",
    "k2": "log(pi_{p} / pi_{q})^2 / 2",
    "k3": "r - 1 - log r, r = pi_{p} / pi_{q},",
    "tv": "|pi_{p} - pi_{q}|",
    "prob_diff": "pi_{p} - pi_{q}",
    "ratio_tv": "|pi_{p} / pi_{q} - 1|",
}
REDUCTIONS = {"sum": "sum", "mean": "mean", "max": "largest"}
RATIO_REDUCTIONS = {"sum": "product", "mean": "geometric mean", "max": "largest"}
_EXACT = LossFacts(
    ratio="none, because distributions are compared",
    gradient="the exact gradient of the divergence at each token",
    bound="",
)
SERVED_BY = {
    "token": "each token's loss is independent: one pass over the tokens in chunks, 3 matrix products",
    "sequence": "a token's loss depends on its sequence: one pass if every sequence fits in a chunk, else two passes "
    "(scores first, then gradients), 3 to 4 matrix products",
    "group": "a token's loss depends on all sequences of its prompt, in one micro-batch unless items have "
    "current_logprobs: two passes if they do not fit in a chunk, up to 4 matrix products",
    "batch": "a token's loss depends on all tokens of the step: items need current_logprobs if there are several "
    "micro-batches or ranks; two passes if a micro-batch does not fit in a chunk, up to 4 matrix products",
}
GENERAL = "full distributions are compared: the general path, autograd on logits in chunks"
UNCUT = "full distributions are compared, and a token's loss depends on its {scope}: all logits at once"


def explain_loss(cfg: BaseLossConfig, about: Sections = (), **context: Any) -> str:
    """Say in plain text what a loss computes.

    The run adds sections (`about`, each has a name and lines), and tells `warnings_for` what it knows (`context`).
    """
    if isinstance(cfg, BaseRLLossConfig):
        sections = _policy_sections(cfg)
    elif isinstance(cfg, CELossConfig):
        sections = _ce_sections(cfg)
    else:
        sections = _custom_sections(cfg)
    lines = [line for name, texts in (*sections, *about) for line in _section(name, texts)]
    lines += _section("head", _head(cfg))
    warnings = warnings_for(cfg, **context)
    lines += _section("warnings", [f"! {text}" for text in warnings] or ["none"])
    return "\n".join(lines)


def _section(name: str, texts: list[str]) -> list[str]:
    lines = [
        line
        for text in texts
        for line in textwrap.wrap(
            text, WIDTH - INDENT, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    ]
    return [f"{name if index == 0 else '':<{INDENT}}{line}" for index, line in enumerate(lines)]


def _custom_sections(cfg: BaseLossConfig) -> Iterator[tuple[str, list[str]]]:
    """Describe a custom loss by what its config lists."""
    has_title = type(cfg).__doc__ not in (None, BaseLossConfig.__doc__)
    yield "loss", [f"{type(cfg).__name__}: {title_of(type(cfg))}" if has_title else type(cfg).__name__]
    lines = []
    for term in cfg.checked_terms:
        chosen = "" if term.token_filter is None else ", over the tokens that its filter selects"
        lines.append(f"{shown(float(term.coef))} x {term.name}{chosen}; {_aggregation_lines(term.average)[0]}")
    yield "terms", lines
    yield "computed by", [f"{cfg.loss_ctx_cls.__module__}.{cfg.loss_ctx_cls.__qualname__}"]


# -------------------------------------------------------------------- policy losses


def _policy_sections(cfg: BaseRLLossConfig) -> Iterator[tuple[str, list[str]]]:
    loss, options = cfg.policy, cfg.policy_options
    yield "loss", _total(cfg)
    yield "policy", _policy_term(cfg, loss, options)
    if cfg.use_kl_loss:
        yield "kl", _kl_term(cfg)
    if cfg.positive_nll_coef:
        yield "nll", [f"+ {shown(cfg.positive_nll_coef)} x the mean of -log pi over the N+ tokens with A > 0"]
    if cfg.entropy_coef:
        yield "entropy", [f"- {shown(cfg.entropy_coef)} x the policy's entropy at each token, with gradient"]
    corrections = [_correction_words(correction) for correction in cfg.correction]
    if corrections:
        what = "the policy and KL terms" if cfg.correction_on_kl else "the policy term only"
        yield "corrections", [*corrections, f"The product of all weights multiplies {what}, without gradient."]
    yield "weight", _normaliser(cfg)
    yield "policies", list(_policies(cfg, loss, options))
    yield "gradient", list(_gradients(cfg, loss, options))
    yield (
        "items need",
        [f"{name}: for {' and '.join(required.readers)}" for name, required in cfg.required_fields.items()],
    )
    yield "source", [". ".join(filter(None, (loss.facts.source, loss.facts.differs))) or "(no source)"]


def _total(cfg: BaseRLLossConfig) -> list[str]:
    terms = ["policy" if not cfg.correction else "importance x policy"]
    if cfg.use_kl_loss:
        terms.append(f"+ {shown(cfg.kl_loss_coef)} x " + ("importance x KL" if cfg.correction_on_kl else "KL"))
    if cfg.entropy_coef:
        terms.append(f"- {shown(cfg.entropy_coef)} x H")
    inside = " ".join(terms)
    nll = f" + {shown(cfg.positive_nll_coef)} x NLL+" if cfg.positive_nll_coef else ""
    lines = [f"loss = sum over scored tokens of weight x {inside if len(terms) == 1 else f'({inside})'}{nll}"]
    known = (*BaseRLLossConfig.model_fields, *GRPOLossConfig.model_fields)
    extra = {name: getattr(cfg, name) for name in type(cfg).model_fields if name not in known}
    if extra:
        lines.append(f"{type(cfg).__name__}: {shown_all(extra)}")
    return lines


def _policy_term(cfg: BaseRLLossConfig, loss: PolicyLoss, options: dict[str, Any]) -> list[str]:
    if cfg.candidates == "teacher":
        return ["the exact divergence between policy and teacher over the teacher's candidates, per token"]
    title = title_of(loss.function)
    name = loss.name if loss.alias_of is None else f"{loss.name} (another name for {loss.alias_of})"
    lines = [f"{name}: {title}" if title else name, equation(loss, options)]
    if options:
        lines.append(f"options: {shown_all(options)}")
    return [*lines, "A: the token's advantage; sg(x): x without gradient; log: the natural logarithm"]


def _kl_term(cfg: BaseRLLossConfig) -> list[str]:
    assert cfg.kl_loss_type is not None
    coefficient = shown(cfg.kl_loss_coef)
    if cfg.kl_loss_type not in KL_NAMES:
        pair = "reference || policy" if cfg.kl_direction == "forward" else "policy || reference"
        over = "the whole vocabulary" if cfg.kl_loss_type == "full" else "the reference's candidates"
        return [f"+ {coefficient} x KL({pair}) over {over}: exact, not estimated; autograd differentiates it"]
    fact = expected_gradient_facts(cfg.kl_loss_type, cfg.kl_gradient)
    is_k3 = fact.estimator == "k3"
    bounds = [
        _bound("d", cfg.kl_input_clamp, MAX_LOG_DIFF if is_k3 else None),
        _bound("the estimate", cfg.kl_output_clamp, MAX_K3 if is_k3 else None),
    ]
    gradient = {
        "reverse": "of the reverse KL(policy || reference)",
        "forward": "of the forward KL(reference || policy)",
        "zero": "zero",
        "neither": f"of neither KL: {fact.note}",
    }[fact.expected_gradient]
    value = "unbiased" if fact.value_unbiased else "biased"
    words = KL_GRADIENT_WORDS[cfg.kl_gradient + (" by sequence" if cfg.is_kl_wide else "")]
    expected = f"value {value}, gradient {gradient}" + ("; off-policy tokens, too" if fact.off_policy else "")
    if cfg.is_kl_wide:
        expected = "value and gradient are biased: the ratio of a sequence is not that of the token"
    return [
        f"+ {coefficient} x {fact.estimator}: {KL_EQUATIONS[fact.estimator]}, d = log pi - log pi_ref",
        f"gradient ({cfg.kl_gradient}): {words.format(anchor=cfg.kl_anchor)}",
        f"in expectation: {expected}",
        "; ".join(bounds),
    ]


def _bound(what: str, clamp: Any, usual: float | None) -> str:
    bound = usual if clamp == "auto" else clamp
    return f"{what} is not bounded" if bound is None else f"|{what}| at most {bound:g} nats, no gradient beyond"


def _normaliser(cfg: BaseRLLossConfig) -> list[str]:
    chosen = cfg.aggregation
    lines = _aggregation_lines(chosen)
    for term in cfg.terms:
        if term.name in ("kl", "entropy") and term.average != chosen:
            lines.append(f"{term.name}: {_aggregation_lines(term.average)[0]}")
    if chosen.count_empty:
        lines.append("Sequences (prompts) without scored tokens are counted, too.")
    if any(correction.denominator == "survivors" for correction in cfg.correction):
        lines.append("Tokens rejected by a correction with denominator=survivors are not counted.")
    return lines


def _aggregation_lines(chosen: AggregationConfig) -> list[str]:
    aggregation = AGGREGATIONS[chosen.name]
    numbers = {name: shown(value) for name, value in chosen.model_dump().items()}
    lines = [f"{chosen.name}: weight = {aggregation.weight}: {aggregation.words}".format_map(numbers)]
    if chosen.name != "token_sum":
        lines.append(
            "Counts are over all micro-batches and ranks of the optimizer step, taken before its first forward."
        )
    return lines


# -------------------------------------------------------------------- policies, gradients


def _policies(cfg: BaseRLLossConfig, loss: PolicyLoss, options: dict[str, Any]) -> Iterator[str]:
    is_exact = cfg.candidates == "teacher"
    fact = _EXACT if is_exact else facts_of(loss, options, cfg.log_ratio_range)
    yield "pi (theta): the policy in training; only it has a gradient"
    anchor = None if is_exact else options.get("anchor")
    factor = "a factor of the weight" if options.get("use_rollout_weight") else ""
    if is_exact:
        pass
    elif fact is not None:
        yield f"ratio: {fact.ratio}" + ("" if anchor is None else f"; it divides by pi_{anchor}")
    elif loss.function.__doc__:
        yield "ratio: as the function computes it (t.ratio() divides by pi_old)"
    weighted = {name for correction in cfg.correction for name in correction.between.split("_")}
    is_kl = cfg.use_kl_loss and cfg.kl_gradient == "is_corrected"
    divides_by = "old" if fact is None and anchor is None else anchor
    roles = {
        name: [
            "the ratio's denominator" if divides_by == name else "",
            factor,
            corrections if name in weighted else "",
            "the KL term's ratio" if is_kl and cfg.kl_anchor == name else "",
        ]
        for name, corrections in (
            ("old", "corrections"),
            ("rollout", "corrections (a weight, never clipped in the policy term)"),
        )
    }
    roles |= {
        "ref": ["the KL term" if cfg.use_kl_loss else "", "the policy loss" if "ref_logprobs" in loss.needs else ""],
        "teacher": ["the policy loss" if "teacher_logprobs" in loss.needs else ""],
    }
    who = {"old": "before the optimizer step", "rollout": "as the sampler reported it", "ref": "reference"}
    for name, roles_of_policy in roles.items():
        uses = " and ".join(filter(None, roles_of_policy))
        if uses or (name in ("old", "rollout") and not is_exact):
            yield f"pi_{name} ({who.get(name, name)}): {uses or 'in metrics only'}"
    if roles["old"][0] or roles["old"][-1]:
        yield "Items without old_logprobs are on-policy: pi_old is then pi without gradient, and every ratio is 1."


def _gradients(cfg: BaseRLLossConfig, loss: PolicyLoss, options: dict[str, Any]) -> Iterator[str]:
    fact = _EXACT if cfg.candidates == "teacher" else facts_of(loss, options, cfg.log_ratio_range)
    if fact is None:
        yield f"t.ratio() and related methods: log ratios are held in {range_words(cfg.log_ratio_range)} before exp"
    else:
        yield f"policy term: {fact.gradient}"
        yield from [fact.bound] if fact.bound else []
    if cfg.drop_zero_advantage:
        yield "tokens with A = 0 are skipped in the forward"


def _correction_words(correction: CorrectionConfig) -> str:
    """Return one correction as a sentence."""
    p, q = correction.between.split("_")
    unit = UNITS[correction.granularity]
    what = STATISTICS[correction.statistic].format(p="pi" if p == "current" else p, q=q).replace("pi_pi", "pi")
    if correction.reduction is not None:
        table = RATIO_REDUCTIONS if correction.statistic == "ratio" else REDUCTIONS
        what = f"the {table[correction.reduction]} over its tokens of {what}"
    ends = (("at least", correction.lower), ("at most", correction.upper))
    bounds = " and ".join(f"{side} {bound:g}" for side, bound in ends if bound is not None)
    if correction.action in CLAMPS:
        sentence = f"each {unit} is weighted by {what}" + (f", {bounds}" if bounds else ", unbounded")
        if correction.normalize:
            sentence += f"; divided by the mean of these weights over the step's {unit}s"
    else:
        signs = {"any": "", "negative": " with A < 0", "positive": " with A > 0"}
        sign = {**signs, "widening": " whose update would widen the gap"}[correction.advantages]
        if correction.action == "mask":
            sentence = f"each {unit}{sign} is dropped unless {what} is {bounds}"
        else:
            sentence = f"each sequence is dropped unless {what} is {bounds} for every {unit}{sign} in it"
        sentence += "; dropped tokens " + (
            "are removed from the denominator and from every term"
            if correction.denominator == "survivors"
            else "still count in the denominator"
        )
    late = "; known only in the forward, unless items have current_logprobs" if correction.needs_current else ""
    return sentence + late


# -------------------------------------------------------------------- cross-entropy, head


def _ce_sections(cfg: CELossConfig) -> Iterator[tuple[str, list[str]]]:
    yield "loss", ["loss = sum over labelled tokens of weight x (-log pi)"]
    yield "weight", _aggregation_lines(cfg.checked_terms[0].average)
    yield "gradient", ["-weight grad log pi of each label; no other policy appears"]
    yield "items need", ["shifted_labels: the tokens to predict"]


def _head(cfg: BaseLossConfig) -> list[str]:
    scope, served_by = "token", ""
    if isinstance(cfg, BaseRLLossConfig):
        scope = cfg.scope
        if cfg.candidates is not None:
            served_by = GENERAL if scope == "token" else UNCUT.format(scope=scope)
    served_by = served_by or SERVED_BY[scope]
    transform = [f"multiplied by {cfg.logit_scale:g}"] if cfg.logit_scale != 1 else []
    transform += [f"soft-capped at {cfg.softcap:g}"] if cfg.softcap is not None else []
    transform += [f"divided by temperature {cfg.temperature:g}"] if cfg.temperature != 1 else []
    size = f"chunks of {cfg.chunk_size} tokens" if cfg.chunk_size != "auto" else "chunks that fit a memory budget"
    how = "the logits of all scored tokens at once" if cfg.mode == "eager" else size
    lines = [f"mode={cfg.mode}: {how}", f"scope={scope}: {served_by}"]
    if cfg.mode == "eager":
        lines[1] = f"scope={scope} (with mode=chunk: {served_by.partition(': ')[2]})"
    return [*lines, f"logits are {', then '.join(transform)}"] if transform else lines
