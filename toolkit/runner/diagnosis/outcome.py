"""The kinds of faults, and the result of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from toolkit.display import html_table

KINDS: Mapping[str, tuple[str, str]] = {
    "shifted": (
        "values of a neighbouring token",
        "shift the sampler's values: value t must be of the same token in both arrays "
        "(RLLossContextInputItem.from_unshifted shifts values by token)",
    ),
    "temperature": (
        "another temperature",
        "set temperature= of the loss to the sampler's, or ask it for processed log-probabilities (see LogprobSpec)",
    ),
    "top_p": (
        "top-p, top-k or min-p: the sampler normalised over part of the vocabulary",
        "sample without it, or ask the sampler for log-probabilities before the cut",
    ),
    "dtype_noise": (
        "values or weights rounded to a low precision",
        "return log-probabilities in fp32 and compute the log-softmax in fp32; a quantized sampler needs a correction",
    ),
    "stale_weights": (
        "the sampler had other weights",
        "check that weights reach the sampler before it samples; for intended lag use a correction",
    ),
    "tokenizer_offset": (
        "the trainer reads other token ids than the sampler wrote",
        "pass the sampler's token ids, never text that is tokenized again; compare tokenizers and added tokens",
    ),
    "dropped_eos": (
        "the last token of a completion has no value",
        "keep the log-probability of the end token, or do not score that token",
    ),
    "duplicated_bos": (
        "a beginning-of-sequence token too many on one side",
        "tokenize the text of a chat template with add_special_tokens=False",
    ),
    "swapped_rows": ("rows in another order", "bring both arrays into one order, e.g. by an index of the sample"),
    "prompt_missing": (
        "one side did not read the prompt",
        "give the model prompt and completion; attention_mask is 1 on the prompt, only loss_mask is 0 there",
    ),
    "negated": ("negative log-likelihoods where log-probabilities are meant", "change the sign: -values"),
    "probabilities": ("probabilities where log-probabilities are meant", "take the logarithm: rollout_logprobs.log()"),
    "padding_scored": ("padding is scored", "mark completions alone by the mask; padding has no value"),
}
"""Kind -> what it is, and what to do."""
FEW = 20
"""Values below which it is not said that there is no fault."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a pair of log-probabilities: `kinds`, and what decided."""

    kinds: tuple[str, ...]
    """The kinds that the evidence allows, the likeliest first; none: no fault was seen."""
    because: str
    """The statistic that decided, with its value."""
    mean_difference: float
    """Mean |sampler - trainer| over the scored tokens, in nats."""
    tokens: int
    """Scored tokens that were compared."""
    unexplained: float
    """Mean difference that the fault leaves, in nats; NaN where the kind cannot be undone."""
    numbers: Mapping[str, float] = field(default_factory=dict, repr=False)
    """The statistics, by name."""
    dropped: int = 0
    """Scored tokens that were left out, because a value is NaN or infinite."""

    def __bool__(self) -> bool:
        """Whether a fault was seen."""
        return bool(self.kinds)

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(kind, *KINDS[kind]) for kind in self.kinds]

    def _head(self) -> str:
        none = "no fault seen" if self.tokens >= FEW else "too few values to judge"
        return " or ".join(self.kinds) or none

    def _summary(self) -> str:
        size = f"mean difference {self.mean_difference:.3g} nats over {self.tokens:,} tokens"
        left = "" if self.unexplained != self.unexplained else f"; {self.unexplained:.2g} nats without the fault"
        dropped = f"; {self.dropped:,} values left out, NaN or infinite" if self.dropped else ""
        return f"{size}{left}{dropped}"

    def __repr__(self) -> str:
        lines = [f"{self._head()}: {self.because}", self._summary()]
        lines += [f"  {kind}: {what}; {remedy}" for kind, what, remedy in self._rows()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(
            self._head(), ("kind", "what", "what to do"), self._rows(), note=f"{self.because}. {self._summary()}."
        )
