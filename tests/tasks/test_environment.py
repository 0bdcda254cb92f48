"""Environments of a user: what is refused before any work, what a step may return, and whatever it may do."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.schema import located
from toolkit.tasks.base import Example
from toolkit.tasks.calls import Failure
from toolkit.tasks.config import DatasetConfig, SpellBackwardConfig
from toolkit.tasks.environment import Reply, checked_reply, load_environment
from toolkit.tasks.episodes import Environment, Episode, Turn

STEPS = """
    import asyncio, sys, time

    def step(prompt, completion, turn, answer): return f"{prompt}{turn}{completion}{answer}"
    def everything(completion, **rest): return ",".join(sorted(rest))
    async def waits(completion, turns, observations):
        await asyncio.sleep(0.05)
        return {"observation": f"{turns}{observations}", "reward": 0.5}
    def raises(completion): raise KeyError("no such guess")
    def hangs(completion):
        while True:
            try: time.sleep(1)
            except Exception: pass
        return "never"
    def exits(completion): return sys.exit(3)
    def changes(completion, words):
        words.append("x")
        return str(len(words))
    class Counter:
        def __init__(self, answer): self.seen = [answer]
        def step(self, completion):
            self.seen.append(completion)
            return "".join(self.seen)
    class Waiting:
        number = 0
        async def step(self, completion):
            self.number += 1
            return str(self.number)
    class Broken:
        def __init__(self): raise OSError("no server")
        def step(self, completion): return None

    def yields(completion): yield "a"
    def forgets(completion): x = 1
    def batched(completions): return []
    def misspelt(completion, answr): return None
    def no_completion(prompt): return None
    def by_position(completion, /): return None
    class NoStep: pass
    class Static:
        @staticmethod
        def step(completion): return None
    class Asks:
        def __init__(self, port): pass
        def step(self, completion): return None
    number = 3
    def environment(completion): return 1.0
    """
COLUMNS = ["answer", "words"]


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("env.py").write_text(textwrap.dedent(STEPS))


def environment_of(name: str, *, timeout_s: float = 20.0, num_workers: int = 0) -> Environment:
    step = load_environment(f"env.py:{name}", columns=COLUMNS)
    return Environment(step, max_turns=3, timeout_s=timeout_s, num_workers=num_workers, columns=COLUMNS)


def turn_of(*texts: str, observations: tuple[str, ...] = ()) -> Turn:
    example = Example("<s>q", "7", None, "q", {"answer": "7", "words": ["a"]})
    return Turn(Episode(example, list(texts), list(observations), [None] * (len(texts) - 1)), len(texts[-1]), True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_step_gets_what_its_signature_names(num_workers: int) -> None:
    environment = environment_of("step", num_workers=num_workers)
    try:
        assert environment.step([turn_of("3"), turn_of("3", "5")]) == [Reply("q137"), Reply("q257")]
    finally:
        environment.close()
    (reply,) = environment_of("everything").step([turn_of("3")])
    assert reply == Reply("answer,finished,num_tokens,observations,prompt,turn,turns,words")


def test_async_steps_wait_together_and_see_the_turns() -> None:
    replies = environment_of("waits").step([turn_of("3", "5", observations=("low",))] * 40)
    assert replies == [Reply("['3', '5']['low']", 0.5)] * 40


def test_each_episode_has_its_own_instance_and_copies() -> None:
    one, two = turn_of("a"), turn_of("b")
    counter = environment_of("Counter")
    assert counter.step([one, two]) == [Reply("7a"), Reply("7b")]
    one.episode.texts.append("c")
    assert counter.step([one]) == [Reply("7ac")]
    waiting, again = environment_of("Waiting"), turn_of("a")
    assert waiting.step([again]) == [Reply("1")]
    assert waiting.step([again, turn_of("b")]) == [Reply("2"), Reply("1")]
    assert environment_of("changes").step([one, one]) == [Reply("2"), Reply("2")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "it raised KeyError: 'no such guess'"),
        ("hangs", "it ran longer than task.reward_timeout_s=0.2"),
        ("Broken", "it raised OSError: no server"),
        ("exits", "it raised SystemExit: 3"),
    ],
)
def test_failures_are_one_line_and_the_first_is_shown(name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    environment = environment_of(name, timeout_s=0.2)
    replies = environment.step([turn_of("3"), turn_of("4")])
    assert [isinstance(reply, Failure) and reply.reason for reply in replies] == [reason] * 2
    (record,) = caplog.records
    assert f"environment 'env.py:{name}' failed, which ends an episode with reward 0: {reason}" in record.getMessage()
    assert "episodes.py" not in record.getMessage()
    environment.step([turn_of("3")])
    assert len(caplog.records) == 1


def test_a_worker_survives_a_step_that_ends_it() -> None:
    environment = environment_of("exits", num_workers=1)
    try:
        (reply,) = environment.step([turn_of("3")])
        assert isinstance(reply, Failure)
        assert reply.reason == "it ended its worker process with exit code 3"
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, Reply()),
        ("low", Reply("low")),
        ({"observation": "low", "reward": 1}, Reply("low", 1.0)),
        ({"observation": "low", "reward": None, "done": False}, Reply("low")),
        ({"observation": "low", "reward": True, "done": True}, Reply(None, 1.0)),
        ({"reward": 0.5}, Reply(None, 0.5)),
        ({}, Reply()),
        ([{"role": "tool", "content": "4"}], Reply([{"role": "tool", "content": "4"}])),
        ("", "its observation is empty; return None when the episode is over"),
        (0.5, "it returned a float; return a text for the policy to read, None when it is over, or"),
        (("low", 1.0, False), "it returned a tuple; return a text"),
        ({"obs": "low"}, "it returned a dict with 'obs' (did you mean 'observation'?); its keys are 'observation',"),
        ({"rewrd": 1}, "it returned a dict with 'rewrd' (did you mean 'reward'?)"),
        ({"reward": "1"}, "its reward is the text '1'; return a number"),
        ({"reward": float("nan")}, "its reward is nan; return a finite number, or None"),
        ({"reward": {"a": 1.0}}, "its reward is a dict; return a number"),
        ({"observation": "low", "done": 1}, "its done is an int; write True or False"),
        ({"reward": 1.0, "done": False}, "it is not done and has no observation"),
        ({"observation": 4}, "its observation is an int; it is a text or a list of chat messages"),
        ([], "its observation: the list of messages is empty"),
        (["low"], 'its observation: message 1 is not {"role": ..., "content": ...}'),
        ([{"role": "assistant", "content": "4"}], "a message has the role 'assistant', which is the policy's"),
    ],
)
def test_what_a_step_may_return(result: Any, expected: Reply | str) -> None:
    reply = checked_reply(result)
    if isinstance(expected, Reply):
        assert reply == expected
    else:
        assert isinstance(reply, Failure)
        assert expected in reply.reason
        assert "\n" not in reply.reason


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"environment": "step"}, r"task\.environment=step names no file; write task\.environment=my_environment\.py:"),
        ({"environment": "nev.py:step"}, r"there is no file 'nev\.py' .*did you mean 'env\.py'\?"),
        ({"environment": "env.py"}, r"also name the function in it: task\.environment=env\.py:step"),
        ({"environment": "env.py:steps"}, r"env\.py has no function 'steps' \(did you mean 'step'\?\)"),
        ({"environment": "env.py:number"}, "number is an int, not a function; an environment is def step"),
        ({"environment": "no_such_package.env:step"}, r"there is no module 'no_such_package'"),
        ({"environment": "env.py:yields"}, "yields; return a text for the policy"),
        ({"environment": "env.py:forgets"}, "has no return, so every episode would have one turn"),
        ({"environment": "env.py:batched"}, "takes 'completions'; an environment gets one 'completion' at a time"),
        ({"environment": "env.py:misspelt"}, r"it needs 'answr', which is not a column \(did you mean 'answer'\?\)"),
        ({"environment": "env.py:no_completion"}, "does not take the completion: its parameters are 'prompt'"),
        ({"environment": "env.py:by_position"}, "'completion' can only be given by position"),
        ({"environment": "env.py:NoStep"}, "the class has no method step"),
        ({"environment": "env.py:Static"}, "the class has no method step"),
        ({"environment": "env.py:Asks"}, "its class needs 'port', which is not a column"),
        (
            {"environment": "env.py:Waiting", "reward_workers": 1},
            r"env\.py:Waiting is a class, whose instances stay .*; set task\.reward_workers=0",
        ),
        ({"max_turns": 3}, r"task\.max_turns=3 has no effect without an environment; set task\.environment="),
        (
            {"environment": "env.py:step", "reward": "env.py:environment"},
            "task.reward has a function named 'environment', as the reward of the turns is named; rename it",
        ),
    ],
)
def test_what_is_refused_before_any_work(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught, located("task"):
        SpellBackwardConfig(num_heldout=10, **fields).check_data(0, with_completions=False)
    assert re.search(sentence, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_columns_of_the_data_and_the_file_of_the_environment() -> None:
    Path("data.jsonl").write_text("".join(f'{{"prompt": "{i}", "secret": "{i}"}}\n' for i in range(20)))
    Path("other.py").write_text("def step(completion, secret): return None if completion == secret else 'no'\n")
    config = DatasetConfig(path="data.jsonl", environment="other.py:step")
    config.check_data(0, with_completions=False)
    assert [*config.reward_digests()] == ["other.py"]
    environment = config.build_environment(0)
    assert environment is not None
    assert environment.max_turns == 8
    assert environment.step([Turn(Episode(Example("1", "", columns={"secret": "1"}), ["1"]), 1, True)]) == [Reply()]
