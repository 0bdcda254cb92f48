"""Wrong inputs that a person would try, and the sentence that helps: never an error of another library.

The rows are in `tests.wrong_inputs`.
"""

from __future__ import annotations

import re
import shlex
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hydra._internal.utils import get_args_parser

import toolkit
from tests.wrong_inputs import COMMANDS, CONFIGS, FUNCTIONS, ITEMS, RUNNER
from toolkit import ConfigError, GRPOLossConfig, LossRunner
from toolkit.bench.config import BENCH, build_bench
from toolkit.check.__main__ import main as check
from toolkit.check.subject import load_subject
from toolkit.compose.overrides import options_first
from toolkit.compose.tree import check_command_line, compose_run
from toolkit.errors import ToolkitError
from toolkit.explain.__main__ import main as explain
from toolkit.functional.advantages import advantage
from toolkit.functional.policy.registry import POLICY_LOSSES
from toolkit.functional.rewards import RewardTerms
from toolkit.head import token_logprobs
from toolkit.testing import assert_layout_invariant
from toolkit.training.startup import check_environment

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 8, 4, 11
UNIT = "train loss=grop"
LONGEST = 1.3
"""The time that any answer may take, in times of that to `UNIT`."""


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

    def step_of(returned: str, mode: str) -> None:
        """Run a loss of another shape, which returns this expression of ``logits`` or ``scores``."""
        base, method = (
            (toolkit.BaseLossContext, "losses_from_logits")
            if "logits" in returned
            else (toolkit.ScoredLossContext, "token_losses")
        )
        argument = "scores" if method == "token_losses" else "logits"
        context = type("MyContext", (base,), {method: eval(f"lambda self, {argument}, loss_kwargs: {returned}")})
        wide = torch.randn(2**15, WIDTH)  # too many logits for one chunk
        cfg = body("context", context, ClassVar[type])(mode=mode, chunk_size=4)
        LossRunner(cfg).step([{"input_ids": ids}], lambda batch: (hidden, wide))

    def kwargs_with(name: str, annotation: object) -> type:
        members = {"__module__": __name__, "__annotations__": {name: annotation}}
        return type("MyKwargs", (toolkit.BaseLossKwargs,), members)

    def custom(returned: str) -> None:
        """Run a policy loss that returns this expression of ``t``."""
        function = eval(compile(f"lambda t: {returned}", __file__, "eval"), {"torch": torch})
        toolkit.register_policy_loss("my_loss", overwrite=True)(function)
        try:
            LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "my_loss"}))(
                hidden, head, input_ids=ids, advantages=1.0
            )
        finally:
            del POLICY_LOSSES.entries["my_loss"]

    def my_loss(t: Any) -> Any:
        return t.logprobs

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
        **{"step_of": step_of, "kwargs_with": kwargs_with, "body": body, "custom": custom, "my_loss": my_loss},
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
        "train": lambda: check_command_line(
            options_first([each for each in arguments if each != "-m"], get_args_parser()),
            multirun="-m" in arguments,
            check=check_environment,
        ),
        "bench": lambda: build_bench(compose_run(arguments, root=BENCH, build=build_bench).cfg),
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
    if "training.resume=/" in command:
        pytest.importorskip("reasoning_gym")  # packages of the extra are checked first
    said = answer(command, monkeypatch, lambda: capsys.readouterr().err)
    assert re.search(sentence, said, re.DOTALL), said
    assert "Traceback" not in said


@pytest.mark.slow
def test_no_answer_takes_much_longer_than_that_to_a_misspelt_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CPU seconds in one process, medians; an answer that is too slow is measured again, in turns with the unit."""

    def ratio(command: str, number: int) -> float:
        times: dict[str, list[float]] = {command: [], UNIT: []}
        for each in (command, UNIT) * number:
            started = time.process_time()
            answer(each, monkeypatch, lambda: capsys.readouterr().err)
            times[each].append(time.process_time() - started)
        return statistics.median(times[command]) / statistics.median(times[UNIT])

    ratio(UNIT, 1)  # imports
    slow = [command for command, _ in COMMANDS if command != UNIT and ratio(command, 1) > LONGEST]
    assert {command: taken for command in slow if (taken := ratio(command, 9)) > LONGEST} == {}
