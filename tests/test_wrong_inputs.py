"""Wrong inputs that a person would try, and the sentence that helps: never an error of another library.

The rows are in `tests.wrong_inputs`.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import toolkit
from tests.wrong_inputs import COMMANDS, CONFIGS, FUNCTIONS, ITEMS, RUNNER
from toolkit import ConfigError, GRPOLossConfig, LossRunner
from toolkit.bench.config import BENCH, build_bench
from toolkit.check.__main__ import main as check
from toolkit.check.subject import load_subject
from toolkit.compose.tree import check_command_line, compose_config
from toolkit.errors import ToolkitError
from toolkit.explain.__main__ import main as explain
from toolkit.functional.advantages import advantage
from toolkit.functional.rewards import RewardTerms
from toolkit.head import token_logprobs
from toolkit.testing import assert_layout_invariant

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 8, 4, 11
FAST = """
train mode=eager,chunk
train loss
train plugins=my_loss.py
train tracker=wanb
train scheduler=cosin
explain loss=grop
explain --from trll
bench bench=foo
check vanila
check vanilla eps=0.3
"""
"""Commands whose answers take no longer than that to ``loss=grop``: what is wrong is known before all is composed."""


def names() -> dict[str, Any]:
    """What the calls use."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    hidden = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    config = GRPOLossConfig()
    runner = LossRunner(config)
    whole_model = torch.nn.Linear(2, 2)
    whole_model.get_output_embeddings = lambda: None  # type: ignore[assignment]

    def body(name: str, value: object, annotation: object = None) -> type:
        annotations = {} if annotation is None else {"__annotations__": {name: annotation}}
        return type("MyConfig", (toolkit.BaseLossConfig,), {"__module__": __name__, name: value, **annotations})

    return {
        **{"toolkit": toolkit, "torch": torch, "ClassVar": ClassVar, "GRPOLossConfig": GRPOLossConfig},
        **{"LossRunner": LossRunner, "RewardTerms": RewardTerms, "advantage": advantage, "load_subject": load_subject},
        **{"token_logprobs": token_logprobs, "assert_layout_invariant": assert_layout_invariant},
        **{"ids": ids, "hidden": hidden, "head": head, "config": config, "runner": runner, "whole_model": whole_model},
        "old": -torch.rand(BATCH, LENGTH) - 0.1,
        "one": torch.ones(BATCH),
        "linear": torch.nn.Linear(WIDTH, VOCABULARY),
        "only_logits": SimpleNamespace(logits=hidden @ head.T, hidden_states=None),
        "forward": lambda batch: (hidden, head),
        "run": lambda **fields: runner(hidden, head, **fields),
        "row": lambda **fields: runner(hidden[:1], head, input_ids=ids[:1], advantages=1.0, **fields),
        "run_with": lambda override, **fields: LossRunner.from_overrides([override])(hidden, head, **fields),
        "step": lambda forward: runner.step([{"input_ids": ids, "advantages": 1.0}], forward),
        "body": body,
        "Item": toolkit.RLLossContextInputItem,
        "item": toolkit.RLLossContextInputItem(shifted_labels=ids, advantages=torch.ones(BATCH, 1)),
        "build": toolkit.GRPOLossContext.build_batches_loss_kwargs,
    }


@pytest.mark.parametrize(("call", "sentence"), [*RUNNER, *CONFIGS, *ITEMS, *FUNCTIONS])
def test_calls(call: str, sentence: str) -> None:
    with pytest.raises(ToolkitError, match=f"(?s){sentence}") as caught:
        eval(call, names())
    assert "Traceback" not in str(caught.value)


def answer(command: str, monkeypatch: pytest.MonkeyPatch, read: Callable[[], str]) -> str:
    """Return what a command says of its mistake."""
    program, *arguments = shlex.split(command)
    composed = {
        "train": lambda: check_command_line(arguments),
        "bench": lambda: build_bench(compose_config(arguments, root=BENCH)),
    }
    if program in composed:
        with pytest.raises(ConfigError) as caught:
            composed[program]()
        return str(caught.value)
    monkeypatch.setattr("sys.argv", [f"toolkit-{program}", *arguments])
    with pytest.raises(SystemExit) as ended:
        {"explain": explain, "check": check}[program]()
    return f"{ended.value.code if isinstance(ended.value.code, str) else ''}{read()}"


@pytest.mark.parametrize(("command", "sentence"), COMMANDS)
def test_commands(
    command: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(command, monkeypatch, lambda: capsys.readouterr().err)
    assert re.search(sentence, said, re.DOTALL), said
    assert "Traceback" not in said


def test_ten_answers_take_no_longer_than_that_to_a_misspelt_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(command: str) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            answer(command, monkeypatch, lambda: capsys.readouterr().err)
            times.append(time.process_time() - started)
        return min(times)

    seconds("train loss=grop")  # imports
    allowed = 1.3 * seconds("train loss=grop")
    assert {command: taken for command in FAST.strip().splitlines() if (taken := seconds(command)) > allowed} == {}
