"""Episodes of several turns: rows with holes, limits, rewards of turns, the same on any number of processes."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("reasoning_gym")

from tests.processes import run_processes
from tests.tasks.models import CHAT, save_model, tokenizer_of
from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit.errors import ConfigError, DataError
from toolkit.functional.advantages import register_advantage
from toolkit.models.tiny import character_tokenizer
from toolkit.rollout.sampler import Completions, row_uniforms
from toolkit.rollout.turns import play, read_text
from toolkit.tasks import chat
from toolkit.tasks.base import Example
from toolkit.tasks.environment import load_environment
from toolkit.tasks.episodes import Environment
from toolkit.training import generation
from toolkit.training.config import AdvantageConfig
from toolkit.training.dry_run import show_dry_run
from toolkit.training.experience import IGNORED, joined_terms, reward_terms, rows_from_completions

pytestmark = pytest.mark.usefixtures("_fresh_state")

STEPS = """
def hint(completion, turn, secret):
    if completion == secret:
        return {"reward": 1.0, "done": True}
    return {"reward": 0.0, "done": True} if turn == 2 else f"no:{secret}"
def again(completion, turn, secret):
    return f"no:{secret}" if turn == 1 else {"reward": float(completion == secret), "done": True}
def rewards(completion, turn):
    return {"observation": "no:", "reward": 0.25 * turn}
def raises(completion, turn):
    if turn == 2:
        raise RuntimeError("the server is gone")
    return {"observation": "no:", "reward": 5.0}
def long(completion): return "no:" * 20
def more(completion): return [{"role": "user", "content": "no"}, {"role": "user", "content": "1"}]
def messages(completion): return [{"role": "tool", "content": "no"}]
def length(completion, turns, observations): return 10 * len(turns) + len(observations)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()


def write_files() -> None:
    """Write an environment, and a game: a digit is guessed again after a hint that ends with it."""
    Path("env.py").write_text(STEPS)
    rng = random.Random(0)
    rows = [
        {
            "prompt": "".join(rng.choices("abcdefgh", k=4)) + ":",
            "completion": str(rng.randrange(4)),
            "secret": str(rng.randrange(4)),
            "letters": "no",
        }
        for _ in range(1000)
    ]
    Path("game.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment_of(name: str, *, max_turns: int = 3) -> Environment:
    step = load_environment(f"env.py:{name}", columns=["secret"])
    return Environment(step, max_turns=max_turns, timeout_s=5.0, num_workers=0, columns=["secret"])


def game(step: str, *overrides: str) -> Any:
    """Return a trainer whose policy makes turns of three tokens at most."""
    settings = {"task": "jsonl", "task.path": "game.jsonl", "task.environment": f"env.py:{step}", "task.reward": "null"}
    settings |= {"rollout.max_new_tokens": "3", "task.num_heldout": "6", "rollout.skip_uniform_groups": "false"}
    settings |= dict(override.split("=", 1) for override in overrides)
    return trainer_with(None, *(f"{key}={value}" for key, value in settings.items()))


def ends_often(trainer: Any) -> None:
    """Let the policy end its turns with one chance in two or so."""
    with torch.no_grad():
        lm = trainer.policy.lm
        head = lm.get_output_embeddings().weight
        head.mul_(0.1)
        lm.model.norm.weight.fill_(1)
        lm.generation_config.eos_token_id = list(range(len(trainer.tokenizer) // 2))


# ---------------------------------------------------------------- by hand

TOKENS = character_tokenizer("q=12no:")  # <pad> 0, <eos> 1, <unk> 2, then in order: q 3, = 4, 1 5, 2 6, n 7, o 8, : 9


def by_hand(step: str, *, max_turns: int = 3, longest: int | None = None, second_ends: bool = True) -> Completions:
    """Return the episodes of two prompts: ``q=``, then 1, then 2 after what is read; and ``=``, then 22."""
    first = Completions(
        input_ids=torch.tensor([[3, 4, 5, 1, 0], [0, 4, 6, 6, 1]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
        is_new=torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool(),
        logprobs=torch.tensor(
            [[torch.nan, torch.nan, -0.1, -0.2, torch.nan], [torch.nan, torch.nan, -0.3, -0.4, -0.5]]
        ),
        texts=["1", "22"],
        finished=[True, True],
    )
    seen: list[Any] = []

    def continue_rows(ids: torch.Tensor, mask: torch.Tensor, rows: list[int], turn: int) -> Completions:
        seen.append((ids.tolist(), mask.tolist(), rows, turn))
        number, width = ids.shape
        new = torch.tensor([[6, 1 if second_ends else 6]]).expand(number, 2)
        logprobs = torch.tensor([[-0.6, -0.7]]).expand(number, 2)
        return Completions(
            input_ids=torch.cat([ids, new], -1),
            attention_mask=torch.cat([mask, torch.ones_like(new)], -1),
            is_new=(torch.arange(width + 2) >= width).expand(number, -1),
            logprobs=torch.cat([torch.full((number, width), torch.nan), logprobs], -1),
            texts=["2"] * number,
            finished=[second_ends] * number,
        )

    examples = [Example("q=", "", columns={"secret": "2"}), Example("=", "", columns={"secret": "22"})]
    done = play(first, examples, environment_of(step, max_turns=max_turns), continue_rows, TOKENS, longest=longest)
    by_hand.seen = seen  # type: ignore[attr-defined]
    return done


def test_two_turns_by_hand() -> None:
    found = by_hand("hint")
    assert by_hand.seen == [([[3, 4, 5, 1, 7, 8, 9, 6]], [[1] * 8], [0], 2)]  # type: ignore[attr-defined]
    assert found.input_ids.tolist() == [[3, 4, 5, 1, 7, 8, 9, 6, 6, 1], [0, 4, 6, 6, 1, 0, 0, 0, 0, 0]]
    assert found.attention_mask.tolist() == [[1] * 10, [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert found.is_new.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert found.logprobs.nan_to_num(9).flatten().tolist() == pytest.approx(
        [9, 9, -0.1, -0.2, 9, 9, 9, 9, -0.6, -0.7, 9, 9, -0.3, -0.4, -0.5, 9, 9, 9, 9, 9]
    )
    assert found.texts == ["2", "22"]
    assert found.transcripts == ["1no:22", "22"]
    assert found.episodes is not None
    assert [(each.texts, each.observations, each.rewards, each.end) for each in found.episodes] == [
        (["1", "2"], ["no:2"], [None, 1.0], "done"),
        (["22"], [], [1.0], "done"),
    ]
    rows = rows_from_completions(found, torch.tensor([0, 1]))
    x = IGNORED
    assert rows.shifted_labels.tolist() == [[x, 5, 1, x, x, x, x, 6, 1], [x, 6, 6, 1, x, x, x, x, x]]
    assert rows.rollout_logprobs is not None
    assert rows.rollout_logprobs.isnan().equal(rows.shifted_labels == x)


def test_rewards_of_turns_are_at_their_last_tokens() -> None:
    found = by_hand("rewards", max_turns=2)
    terms = reward_terms(torch.tensor([[2.0, torch.nan]]), found)
    # 0.25 for the first turn, 0.5 for the second, and the rest of 2 (another reward) at the end of the row.
    assert terms.token_rewards is not None
    assert terms.token_rewards[0].tolist() == [0, 0, 0.25, 0, 0, 0, 0, 1.75, 0]
    assert terms.require("num_turns").tolist() == [2, 2]
    assert terms.require("input_lengths").tolist() == [5, 4]
    assert terms.require("lengths").tolist() == [4, 5]
    none = reward_terms(torch.zeros(0, 2), found.first(0))
    together = joined_terms([none, terms])
    torch.testing.assert_close(together.require("token_rewards"), terms.token_rewards, equal_nan=True)
    assert together.require("num_turns").tolist() == [2, 2]
    narrow = by_hand("hint", max_turns=1)
    both = joined_terms([reward_terms(torch.zeros(1, 2), narrow), terms])
    assert both.require("token_rewards").shape == (4, 9)
    assert both.require("num_turns").tolist() == [1, 1, 2, 2]


def test_a_turn_learns_from_its_own_reward() -> None:
    terms = reward_terms(torch.tensor([[0.75, 0.75]]), by_hand("rewards", max_turns=2))
    returns = AdvantageConfig(estimator="reinforce_pp", holes="reset").compute(terms)[0]
    mask = terms.require("mask")[0]
    first, second = returns[mask][:2], returns[mask][2:]
    assert (first[0] == first[1] and second[0] == second[1] and first[0] < second[0]).item()


@pytest.mark.parametrize(
    ("step", "options", "ends", "number"),
    [
        ("rewards", {"max_turns": 1}, ["max_turns", "max_turns"], 1),
        ("rewards", {"max_turns": 2}, ["max_turns", "max_turns"], 2),
        ("rewards", {"second_ends": False}, ["cut", "cut"], 2),
        ("rewards", {"longest": 7}, ["context", "context"], 1),  # the rows have 4 + 3 and 4 + 3 before the next turn
        ("rewards", {"longest": 6}, ["context", "context"], 1),
        ("raises", {}, ["failed", "failed"], 2),
        ("messages", {}, ["failed", "failed"], 1),
    ],
)
def test_why_an_episode_ends(step: str, options: dict[str, Any], ends: list[str], number: int) -> None:
    if options.get("longest") == 7:
        number = 2  # 7 tokens leave room for a second turn, the 12 after it do not
    found = by_hand(step, **options)
    assert found.episodes is not None
    assert [episode.end for episode in found.episodes] == ends
    assert {len(episode.texts) for episode in found.episodes} == {number}
    assert {len(episode.observations) for episode in found.episodes} == {number - 1}
    assert {len(episode.rewards) for episode in found.episodes} == {number}
    if ends[0] == "failed":
        assert [episode.reward for episode in found.episodes] == [0.0, 0.0]


# ---------------------------------------------------------------- chat

QWEN = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('|')[-1] }}{% else %}{{ m['content'] }}{% endif %}<eos>.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_a_template_writes_between_turns() -> None:
    hint = [{"role": "user", "content": "no"}]
    assert chat.between_turns(tokenizer_of(chat_template=CHAT), hint, "<eos>") == "<user>no<eos><assistant>"
    # What the template writes after the end of a turn is read, and an end that it does not write stays.
    assert chat.between_turns(tokenizer_of(chat_template=QWEN), hint, "<eos>") == ".\n<user>no<eos>.\n<assistant>"
    assert chat.between_turns(tokenizer_of(chat_template=QWEN), hint, "2") == "<eos>.\n<user>no<eos>.\n<assistant>"
    refuses = tokenizer_of(chat_template="{{ raise_exception('no tools here') }}")
    with pytest.raises(ValueError, match="the chat template does not accept it: no tools here"):
        chat.between_turns(refuses, hint, "<eos>")
    with pytest.raises(ValueError, match="leaves out the assistant's turn"):
        chat.between_turns(tokenizer_of(chat_template="{{ messages[-1]['content'] }}"), hint, "<eos>")
    with pytest.raises(ValueError, match="it is chat messages, but the prompt is text; return a text"):
        read_text(tokenizer_of(), Example("q=", "", source="q="), hint, 1)


def test_a_conversation_goes_on_in_the_templates_form(tmp_path: Path) -> None:
    save_model(tmp_path / "model", chat_template=CHAT)
    rows = [json.loads(line) for line in Path("game.jsonl").read_text().splitlines()]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"][:-1]}]} for row in rows]
    Path("game.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    trainer = game("more", "model=pretrained", "model.path=model", "task.max_turns=2")
    ends_often(trainer)
    found = trainer.generator.sample(trainer.task.train[:4], range(4), 0, group_size=4)
    assert found.episodes is not None
    rows_of_two = [row for row, each in enumerate(found.episodes) if len(each.texts) == 2]
    assert rows_of_two
    for row in rows_of_two:
        ids, is_new = found.input_ids[row], found.is_new[row]
        first = int(is_new.int().argmax())
        after = first + int((~is_new[first:]).int().argmax())
        read = ids[after : after + int(is_new[after:].int().argmax())]
        last = trainer.tokenizer.decode([int(ids[after - 1])])
        expected = "<user>no<eos><user>1<eos><assistant>"
        assert trainer.tokenizer.decode(read) in (expected, f"<eos>{expected}")
        assert trainer.tokenizer.decode(read).startswith("<eos>") == (last != "<eos>")


# ---------------------------------------------------------------- by a policy


def test_log_probabilities_are_those_of_the_policy_and_first_turns_those_without_an_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = game("rewards", "task.max_turns=3")
    ends_often(trainer)
    keys: list[str] = []
    monkeypatch.setattr(
        generation, "row_uniforms", lambda each, number: keys.extend(each) or row_uniforms(each, number)
    )
    sample: Callable[..., Completions] = trainer.generator.sample
    prompts = trainer.task.train[:3]
    found = sample(prompts, range(3), 0, group_size=8)
    assert found.episodes is not None
    assert {len(episode.texts) for episode in found.episodes} == {1, 2, 3}
    with torch.no_grad():
        again = trainer.policy(found.input_ids, found.attention_mask)
    is_new = found.is_new[:, 1:]
    torch.testing.assert_close(found.logprobs[:, 1:][is_new], again[is_new], rtol=0, atol=1e-5)
    assert found.logprobs[~found.is_new].isnan().all()
    # No two turns are drawn from the same numbers, and the rows beside one do not matter.
    assert len(set(keys)) == len(keys) == sum(len(episode.texts) for episode in found.episodes)
    alone = sample(prompts[1:2], range(1, 2), 0, group_size=8)
    assert [each.texts for each in alone.episodes or ()] == [each.texts for each in found.episodes[8:16]]
    assert len({tuple(each.texts) for each in found.episodes}) > 12
    trainer.generator.environment = None
    plain = sample(prompts, range(3), 0, group_size=8)
    assert plain.episodes is None
    assert plain.texts == [episode.texts[0] for episode in found.episodes]


def test_a_step_reports_turns_and_adds_their_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = game("rewards", "task.max_turns=2", "task.reward_weights=[0.1]", "task.reward=env.py:length")
    ends_often(trainer)
    seen: list[Any] = []
    compute = AdvantageConfig.compute
    monkeypatch.setattr(AdvantageConfig, "compute", lambda self, terms: seen.append(terms) or compute(self, terms))
    metrics = trainer.run_step(trainer.main_phase())
    (terms,) = seen
    turns = terms.require("num_turns")
    assert metrics["num_turns"] == pytest.approx(float(turns.double().mean()))
    assert 1 < metrics["num_turns"] < 2
    assert metrics["reward/environment"] == pytest.approx(float((0.25 * turns * (turns + 1) / 2).mean()))
    assert metrics["reward/length"] == pytest.approx(float((10 * turns + turns - 1).double().mean()))
    assert metrics["reward"] == pytest.approx(metrics["reward/environment"] + 0.1 * metrics["reward/length"], rel=1e-6)
    torch.testing.assert_close(terms.require("token_rewards").sum(-1), terms.rewards)
    assert terms.require("rewards_multi").shape[1] == 2
    assert 0 < metrics["ended_by_max_turns"] < 1
    assert metrics["ended_by_context"] == metrics["environment_failures"] == 0
    evaluation = trainer.evaluate()
    assert evaluation.accuracy is None
    assert evaluation.reward is not None
    assert any("no:" in text for text in evaluation.completions)


@pytest.mark.slow
def test_an_episode_stops_before_the_context_is_full() -> None:
    trainer = game("long", "task.max_turns=9")
    ends_often(trainer)
    metrics = trainer.run_step(trainer.main_phase())
    assert metrics["ended_by_context"] > 0
    completions = trainer.generator.sample(trainer.task.train[:2], range(2), 1, group_size=8)
    assert trainer.context == 256
    assert 200 < int(completions.attention_mask.sum(-1).max()) <= 256


@pytest.mark.slow
def test_failures_of_the_environment_are_counted_and_more_than_a_share_ends_the_run() -> None:
    trainer = game("raises", "task.max_reward_failures=1")
    ends_often(trainer)
    metrics = trainer.run_step(trainer.main_phase())
    assert 0 < metrics["environment_failures"] < 32
    assert metrics["environment_failures"] == metrics["reward_failures"]
    # 5 for a first turn that was cut, nothing for an episode that failed.
    assert metrics["reward"] == pytest.approx(5 * (1 - metrics["environment_failures"] / 32))
    trainer = game("raises", "task.max_reward_failures=0")
    ends_often(trainer)
    message = (
        r"environment 'env\.py:raises' failed for \d+ of 32 completions: it raised RuntimeError: the server is gone; "
        r"fix it, or raise task\.max_reward_failures=0"
    )
    with pytest.raises(DataError, match=message):
        trainer.run_step(trainer.main_phase())
    with pytest.raises(DataError, match=r"environment 'env\.py:raises' failed for \d of 6 completions"):
        trainer.evaluate()


def test_a_dry_run_shows_turns_and_what_is_scored() -> None:
    trainer = game("rewards", "task.max_turns=2")
    ends_often(trainer)
    output = io.StringIO()
    show_dry_run(trainer, Console(file=output, width=200))
    text = output.getvalue()
    assert "  turn 1      '" in text
    assert "  read        'no:'\n  turn 2      '" in text
    assert "(ended by: max_turns)" in text
    assert "8 prompts x 4 episodes of at most 2 turns of at most 3 tokens;" in text
    assert "at most 5; what the environment says is not counted: at most 352 tokens" in text  # 8 x 4 x (5 + 2 x 3)


def test_estimators_that_need_turns_need_an_environment() -> None:
    @register_advantage("fewer_turns", needs=("num_turns",), source="a test")
    def fewer_turns(r: Any) -> Any:
        return r.result(r.residual() - r.require("num_turns"))

    config = AdvantageConfig(estimator="fewer_turns")
    config.check_training(4, with_turns=True)
    with pytest.raises(ConfigError, match=r"needs 'num_turns', which only episodes have; set task\.environment="):
        config.check_training(4)


# ---------------------------------------------------------------- processes, and learning

TIMED = ("seconds", "tokens_per_second")


def _run(rank: int, world: int, folder: str) -> None:
    """Run three steps, with prompts for all processes, for one, and sharded; the first process writes the metrics."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from toolkit.compose.build import build_config
    from toolkit.compose.tree import compose_config
    from toolkit.training.trainer import Trainer

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for number, sharding in ((5, "none"), (1, "none"), (3, "fsdp2" if world > 1 else "none")):
        overrides = [
            *("task=jsonl", f"task.path={folder}/game.jsonl", f"task.environment={folder}/env.py:hint"),
            *(
                "rollout.max_new_tokens=3",
                "task.reward=null",
                "model.dtype=float64",
                "warmup.steps=4",
                "task.num_heldout=7",
            ),
            *(f"rollout.prompts_per_step={number}", "rollout.group_size=4", "advantage=reinforce_pp"),
            f"training.sharding={sharding}",
        ]
        config = build_config(compose_config(["debug=smoke", *overrides]))
        set_seed(config.seed)
        task = config.task.build(config.seed)
        policy, tokenizer = config.model.build(task.alphabet)
        trainer = Trainer(config, Accelerator(cpu=True), task, policy, tokenizer)
        rows = []
        for make in (trainer.warmup_phase, trainer.main_phase):
            phase = make()
            rows += [trainer.run_step(phase) for _ in range(3)]
        evaluation = trainer.evaluate()
        found[str(number)] = [*rows, {"reward": evaluation.reward}]
        assert rows[-1]["num_turns"] >= 1
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.dist
def test_episodes_are_the_same_on_two_processes(tmp_path: Path) -> None:
    for world in (1, 2):
        run_processes(world, _run, str(tmp_path))
    alone, both = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    for number in alone:
        for ours, theirs in zip(both[number], alone[number], strict=True):
            kept = [{k: v for k, v in row.items() if k not in TIMED} for row in (ours, theirs)]
            assert kept[0] == pytest.approx(kept[1], rel=1e-6, abs=1e-12, nan_ok=True)
    assert any(row.get("num_turns", 1) > 1 for row in alone["5"])


@pytest.mark.slow
def test_a_policy_learns_to_use_what_it_reads() -> None:
    """The digits are random, so more than one second guess in four is right only if the hint is read."""
    trainer = game(
        "again",
        *("task.num_heldout=200", "task.heldout=0.3", "rollout.max_new_tokens=2", "rollout.prompts_per_step=32"),
        *("rollout.group_size=8", "training.minibatches=2", "training.steps=40", "warmup.steps=15"),
        *("optimizer.lr=3e-3", "training.micro_batch_size=256"),
    )
    for phase in (trainer.warmup_phase(), trainer.main_phase()):
        before = trainer.evaluate()
        for _ in range(phase.num_steps):
            trainer.run_step(phase)
    after = trainer.evaluate()
    assert after.reward - max(before.reward, 0.25) > 2 * (before.reward_se**2 + after.reward_se**2) ** 0.5
