"""The fields that items of a policy loss need, what reads them, and what to do without; no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Requirement:
    """One field that every item must have."""

    readers: tuple[str, ...]
    """What reads it."""
    remedy: str
    """What to do if it is missing."""

    @property
    def why(self) -> str:
        """The readers in one clause."""
        return f"{' and '.join(self.readers)} {'needs' if len(self.readers) == 1 else 'need'} it"


def required_fields(cfg: Any) -> dict[str, Requirement]:
    """Return the fields that every item needs beside labels for a `BaseRLLossConfig`, by name."""
    required: dict[str, Requirement] = {}
    for name, reader, remedy in _readers(cfg):
        known = required.get(name, Requirement((), remedy))
        required[name] = Requirement((*known.readers, reader), known.remedy)
    return required


def _readers(cfg: Any) -> Iterator[tuple[str, str, str]]:
    policy = f"policy loss {cfg.policy.name!r}"
    between = {correction.between for correction in cfg.correction}
    if cfg.reads_advantages:
        yield "advantages", "every policy loss", "give one for each scored token"
    if "old_rollout" in between:
        remedy = "score the batch once before the step, or use anchor='rollout' instead of a correction"
        yield "old_logprobs", "a correction", remedy
    kl_anchored = cfg.use_kl_loss and cfg.kl_gradient == "is_corrected" and cfg.kl_anchor == "rollout"
    for reader, is_read in (
        (policy, "rollout_logprobs" in cfg.policy.fields_read(cfg.policy_options)),
        ("a correction", any("rollout" in pair for pair in between)),
        ("the KL term's ratio", kl_anchored),
    ):
        if is_read:
            remedy = "give the log-probabilities that the sampler reported, or choose anchor='old' and no correction"
            yield "rollout_logprobs", reader, remedy
    if cfg.use_kl_loss and cfg.candidates != "ref":
        remedy = "give the reference's log-probabilities, or set use_kl_loss=False (on the command line: kl=none)"
        yield "ref_logprobs", "the KL term", remedy
    elif cfg.needs_reference:
        yield "ref_logprobs", "teacher='reference'", "give the reference's log-probabilities"
    if "ref_logprobs" in cfg.policy.needs:
        yield "ref_logprobs", policy, "give the reference's log-probabilities"
    if cfg.candidates is not None:
        reader = "the KL term" if cfg.candidates == "ref" else "the divergence from the teacher"
        yield f"{cfg.candidates}_topk_logprobs", reader, "give those of K candidates of each position"
    # If the teacher is the reference, or has candidates, those fields replace its log-probabilities.
    has_other_teacher = cfg.candidates == "teacher" or getattr(cfg, "teacher", None) == "reference"
    if "teacher_logprobs" in cfg.policy.needs and not has_other_teacher:
        yield "teacher_logprobs", policy, "give the teacher's log-probabilities"
    if cfg.needs_current_first:
        reader = "a correction that must know the current policy before the step"
        yield "current_logprobs", reader, "score the batch once before the step, or use denominator='original'"
    groups = (
        "give one integer for each sequence ([B, 1]), the same for completions of the same prompt, which it looks at "
        "together"
    )
    if "prompt_mean" in {term.average.name for term in cfg.terms}:
        yield "group_ids", "aggregation 'prompt_mean'", groups
    if cfg.policy.scope == "group":
        yield "group_ids", policy, groups
