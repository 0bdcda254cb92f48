"""prime-rl's ``traces.jsonl``: an episode a line, with ``traces`` of ``nodes`` that each hold a message.

Token ids, log-probabilities and masks of a node are read where they are lists of one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.notebook.readers.trl import text_of
from toolkit.notebook.token_records import TEXT, WORD, TokenRecord, is_number, record_of


def is_line(line: Mapping[str, Any]) -> bool:
    """Whether a line is an episode of prime-rl."""
    return isinstance(line.get("traces"), list)


def of_lines(lines: Iterable[Mapping[str, Any]]) -> list[TokenRecord]:
    """Return one record for each trace; the texts of the assistant are its tokens."""
    records, seen = [], dict[str, int]()
    for line in lines:
        group = str((line.get("group") or {}).get("id") or line.get("id") or "")
        for trace in line["traces"]:
            seen[group] = seen.get(group, -1) + 1
            records.append(_record(trace, group, seen[group]))
    return records


def _record(trace: Mapping[str, Any], group: str, sample: int) -> TokenRecord:
    info = trace.get("info") or {}
    advantage = info.get("advantage")
    parts = {
        name: each["score"]
        for name, each in (trace.get("rewards") or {}).items()
        if isinstance(each, Mapping) and is_number(each.get("score"))
    }
    weights = {name: each.get("weight") for name, each in (trace.get("rewards") or {}).items() if name in parts}
    reward = sum(score * (1.0 if weights[name] is None else weights[name]) for name, score in parts.items())
    prompt, tokens = [], dict[str, list[Any]]()
    tokens = {TEXT: [], "rollout": [], "advantage": []}
    for node in trace.get("nodes") or []:
        message = node.get("message") or {}
        if message.get("role") == "assistant":
            texts, logprobs = _pieces(node, text_of(message.get("content")))
            tokens[TEXT] += texts
            tokens["rollout"] += logprobs
            tokens["advantage"] += [advantage] * len(texts)
        elif not tokens[TEXT]:
            prompt.append(text_of(message.get("content")))
    known = {name: values for name, values in tokens.items() if name == TEXT or any(v is not None for v in values)}
    step = (info.get("train") or {}).get("logged_at_step", info.get("step"))
    return record_of(
        known,
        prompt="\n".join(prompt),
        reward=reward if parts else None,
        advantage=advantage,
        step=step,
        group=group,
        sample=sample,
        details={"stopped by": trace.get("stop_condition"), **(parts if len(parts) > 1 else {})},
    )


def _pieces(node: Mapping[str, Any], text: str) -> tuple[list[str], list[float | None]]:
    """Return texts and log-probabilities of the tokens of a node; words without any where they are not kept."""
    texts, logprobs = node.get("tokens"), node.get("logprobs")
    if isinstance(texts, list) and texts and all(isinstance(each, str) for each in texts):
        known = isinstance(logprobs, list) and len(logprobs) == len(texts)
        return texts, list(logprobs) if known and logprobs is not None else [None] * len(texts)
    words = WORD.findall(text) or [text]
    return words, [None] * len(words)
