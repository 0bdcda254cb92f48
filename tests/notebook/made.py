"""Completions with records of their tokens, made up."""

from __future__ import annotations

import math
from random import Random
from typing import Any

WORDS = (
    "the",
    "answer",
    "is",
    "so",
    "we",
    "add",
    "both",
    "terms",
    "and",
    "divide",
    "by",
    "two",
    "hence",
    "x",
    "=",
    "7",
)


def token_samples(number: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: groups of four, five prompts a step; a ratio outside 0.8 to 1.2 is clipped as in PPO."""
    draw = Random(seed)
    lines = []
    for index in range(number):
        advantage = draw.choice([1.2, -0.7, 0.3])
        old = [-abs(draw.gauss(0, 1.2)) for _ in range(length)]
        current = [value + draw.gauss(0, 0.15) for value in old]
        ratio = [math.exp(new - value) for new, value in zip(current, old, strict=True)]
        status = [
            "clipped_high" if r > 1.2 and advantage > 0 else "clipped_low" if r < 0.8 and advantage < 0 else "learns"
            for r in ratio
        ]
        tokens = {
            "text": [("\n" if k % 23 == 22 else " ") + draw.choice(WORDS) for k in range(length)],
            "id": [draw.randrange(1000) for _ in range(length)],
            "advantage": [advantage] * length,
            "ratio": ratio,
            "coefficient": [advantage * r if s == "learns" else 0.0 for s, r in zip(status, ratio, strict=True)],
            "weight": [1 / length / number] * length,
            "entropy": [abs(draw.gauss(1, 0.5)) for _ in range(length)],
            "old": old,
            "current": current,
            "rollout": [value + draw.gauss(0, 0.02) for value in old],
            "ref": [value + draw.gauss(0, 0.1) for value in old],
            "status": status,
        }
        lines.append({
            "phase": "main", "step": index // 20, "prompt_index": index // 4 % 5, "sample": index % 4,
            "prompt": f"prompt {index // 4}", "completion": "".join(tokens["text"]), "reward": round(draw.random(), 2),
            "parts": {}, "advantage": advantage, "num_tokens": length, "stop": "end", "tokens": tokens,
        })  # fmt: skip
    return lines
