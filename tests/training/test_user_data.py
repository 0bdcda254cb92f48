"""A user's prompts and rewards in the training command: metrics, failures, several rewards, dry run."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("reasoning_gym")

import toolkit
from tests.tasks.models import CHAT, save_model, tokenizer_of
from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from tests.training.made_up import a_checkpoint
from tests.training.test_data_to_model import two_digit_sums
from tests.training.test_train import lines, summary, train
from toolkit.compose.build import build_config
from toolkit.compose.overrides import parse
from toolkit.compose.tree import compose_config
from toolkit.errors import ConfigError, DataError
from toolkit.tasks.base import Example
from toolkit.training.dry_run import _quoted, show_dry_run
from toolkit.training.evaluation import Evaluation
from toolkit.training.experience import IGNORED, rows_from_answers
from toolkit.training.resume_command import command_to_continue
from toolkit.training.startup import identity, read_state

pytestmark = pytest.mark.usefixtures("_fresh_state")

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(4)]
REWARDS = """
def digits(prompt, completion, answer):
    return sum(a == b for a, b in zip(completion, answer)) / max(len(completion), len(answer))
def length(completion): return len(completion) / 8
def parts(completion): return {"even": float(len(completion) % 2 == 0), "long": None if len(completion) < 3 else 1.0}
def raises(completion): raise RuntimeError("out of order")
def sometimes(completion): return 1 / (len(completion) % 2)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    Path("my.py").write_text(REWARDS)


def trainer_of(reward: str, *overrides: str) -> Any:
    data = ("task=jsonl", "task.path=sums.jsonl", f"task.reward={reward}", "rollout.max_new_tokens=6")
    return trainer_with(None, *data, "rollout.skip_uniform_groups=false", *overrides)


def test_a_step_on_data_of_a_user_reports_each_reward() -> None:
    trainer = trainer_of("[my.py:digits,my.py:parts]", "task.reward_weights=[1,0.5]")
    assert trainer.config.warmup_steps == 0  # there is nothing to imitate
    metrics = trainer.run_step(trainer.main_phase())
    assert {"reward", "reward/digits", "reward/parts", "reward/parts/even", "reward_failures"} <= metrics.keys()
    assert metrics["reward"] == pytest.approx(metrics["reward/digits"] + 0.5 * metrics["reward/parts"], rel=1e-6)
    assert metrics["reward_failures"] == 0
    assert "num_rewarded" not in metrics
    evaluation = trainer.evaluate()
    assert evaluation.accuracy is None
    assert evaluation.reward is not None
    assert len(evaluation.completions) == 3


def test_the_standard_error_is_that_of_the_mean() -> None:
    trainer = trainer_of("my.py:length", "task.heldout=0.5")
    texts = trainer.generator.greedy(trainer.task.heldout).texts
    rewards = torch.tensor([len(text) / 8 for text in texts], dtype=torch.float64)
    evaluation = trainer.evaluate()
    assert evaluation.reward == pytest.approx(float(rewards.mean()), rel=1e-6)
    assert evaluation.reward_se == pytest.approx(float(rewards.std()) / math.sqrt(len(rewards)), rel=1e-5)


def test_several_rewards_reach_the_advantages_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("[my.py:digits,my.py:parts]", "advantage=gdpo", "task.reward_weights=[1,0.5]")
    seen: list[Any] = []
    compute = type(trainer.config.advantage).compute
    monkeypatch.setattr(
        type(trainer.config.advantage), "compute", lambda self, terms: seen.append(terms) or compute(self, terms)
    )
    trainer.run_step(trainer.main_phase())
    (terms,) = seen
    assert terms.rewards_multi.shape == (32, 3)
    assert terms.reward_weights.tolist() == [1.0, 0.5, 0.5]  # digits, parts/even, parts/long
    total = (terms.rewards_multi * terms.reward_weights).nansum(-1)
    torch.testing.assert_close(total, terms.rewards)
    assert terms.rewards_multi[:, 2].isnan().any()


def test_failures_are_counted_and_more_than_a_share_ends_the_run() -> None:
    metrics = trainer_of("my.py:sometimes", "task.max_reward_failures=1")
    metrics = metrics.run_step(metrics.main_phase())
    assert 0 < metrics["reward_failures"] < 32
    trainer = trainer_of("[my.py:length,my.py:raises]")
    message = r"reward 'raises' failed for 32 of 32 completions: it raised RuntimeError: out of order; fix it, or raise"
    with pytest.raises(DataError, match=message):
        trainer.run_step(trainer.main_phase())
    with pytest.raises(DataError, match="reward 'raises' failed for 4 of 4 completions"):
        trainer.evaluate()


def test_unknown_rewards_teach_nothing_and_do_not_count() -> None:
    Path("my.py").write_text("def half(completion): return None if len(completion) < 4 else len(completion) / 8\n")
    trainer = trainer_of("my.py:half")
    metrics = trainer.run_step(trainer.main_phase())
    assert metrics["reward"] >= 0.5
    assert math.isfinite(metrics["loss"])


def test_a_process_without_completions_and_a_reward_that_never_applies(tmp_path: Path) -> None:
    trainer = trainer_of("my.py:parts")
    nothing = trainer.generator.greedy([Example("1+1=", "2")]).first(0)
    rewarded = trainer.rewarder([], nothing, [])
    assert rewarded.totals.shape == (0,)
    assert rewarded.metrics["reward_failures"].value() == 0
    Path("my.py").write_text("def never(completion): return None\n")
    trainer = trainer_of("my.py:never", "rollout.skip_uniform_groups=true")
    evaluation = trainer.evaluate()
    assert (evaluation.reward, evaluation.reward_se, evaluation.shown()) == (None, None, "")
    assert trainer.run_step(trainer.main_phase())["reward_failures"] == 0
    assert trainer.updater.num_skipped == 4  # minibatches, none of which has anything to learn from


def test_nothing_held_out_is_nothing_measured() -> None:
    trainer = trainer_of("my.py:digits", "task.heldout=0")
    assert trainer.evaluate() == Evaluation()


def test_rows_with_completions_can_be_imitated_before_rl() -> None:
    rows = [{**row, "completion": row["answer"]} for row in SUMS]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = trainer_of("my.py:digits", "warmup.steps=4", "warmup.stop_accuracy=0.01", "warmup.batch_size=36")
    phase = trainer.warmup_phase()
    assert phase.num_steps == 4
    first = trainer.run_step(phase)
    assert first["active_tokens"] == sum(
        len(example.answer) + 1 for example in trainer.task.train
    )  # an epoch, with ends
    trainer.run_step(phase)
    assert trainer.is_warm(phase) == (trainer.accuracy(trainer.task.train) >= 0.01)


def test_a_run_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    config = build_config(compose_config(["task=jsonl", "task.path=sums.jsonl", "task.reward=my.py:digits"]))
    a_checkpoint(tmp_path / "checkpoint", identity=identity(config))
    assert read_state(str(tmp_path), config)[0] == tmp_path / "checkpoint"
    longer = config.model_copy(update={"task": config.task.model_copy(update={"reward_timeout_s": 99.0})})
    read_state(str(tmp_path), longer)
    Path("sums.jsonl").write_text(Path("sums.jsonl").read_text().replace("3+3=", "3+ 3="))
    with pytest.raises(ConfigError, match=r"the rows of task\.path are not those of the earlier run"):
        read_state(str(tmp_path), config)


def test_a_run_does_not_go_on_with_another_reward_in_the_same_file(tmp_path: Path) -> None:
    config = build_config(compose_config(["task=jsonl", "task.path=sums.jsonl", "task.reward=my.py:digits"]))
    config.task.check_data(0, with_completions=False)
    earlier = identity(config)
    a_checkpoint(tmp_path / "checkpoint", identity=earlier)
    Path("my.py").write_text(REWARDS.replace("a == b", "a != b"))
    assert identity(config) == earlier  # a run keeps what it has loaded
    config.task.check_data(0, with_completions=False)
    with pytest.raises(ConfigError, match=r"task\.reward is in my\.py, which has changed since the earlier run"):
        read_state(str(tmp_path), config)
    a_checkpoint(tmp_path / "checkpoint", identity={**earlier, "reward_files": {}})
    read_state(str(tmp_path), config)


def test_the_command_that_continues_a_run_has_its_overrides(tmp_path: Path) -> None:
    run_dir = tmp_path / "it's run=9"
    assert command_to_continue(run_dir) is None
    overrides = ["task=jsonl", "task.path=my sums.jsonl", "+training.resume=old", "training.overwrite=true", "seed=1"]
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra/overrides.yaml").write_text(json.dumps(overrides))
    of_hydra = ["hydra.run.dir=there", "hydra.searchpath=['file:///conf']"]
    (run_dir / ".hydra/hydra.yaml").write_text(json.dumps({"hydra": {"overrides": {"hydra": of_hydra}}}))
    command = shlex.split(command_to_continue(run_dir) or "")
    assert command[:-1] == ["toolkit-train", "task=jsonl", "task.path=my sums.jsonl", "seed=1", of_hydra[1]]
    (resume,) = parse(command[-1:])
    assert (resume.key_or_group, resume.value()) == ("training.resume", str(run_dir))


@pytest.mark.slow
def test_another_task_is_named_before_its_rows_with_the_command_that_continues(tmp_path: Path) -> None:
    config = build_config(compose_config(["task=jsonl", "task.path=sums.jsonl", "task.reward=my.py:digits"]))
    a_checkpoint(tmp_path / "checkpoint", identity=identity(config))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/overrides.yaml").write_text('["task=jsonl"]')
    (tmp_path / ".hydra/hydra.yaml").write_text("hydra: {}")
    said = rf"had task\.class='DatasetConfig', .*: toolkit-train task=jsonl training\.resume={tmp_path}, or start"
    for given in (tmp_path, tmp_path / "checkpoint"):
        with pytest.raises(ConfigError, match=said):
            read_state(str(given), build_config(compose_config([])))


def test_a_reward_may_change_what_it_gets() -> None:
    rows = [{**row, "tests": [1, 2]} for row in SUMS]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my.py").write_text(
        "def pops(completion, tests): return tests.pop()\n"
        "def batch(completions, tests): return [each.pop() for each in tests]\n"
    )
    trainer = trainer_of("[my.py:pops,my.py:batch]")
    for _ in range(3):
        assert trainer.evaluate().reward == 4
    metrics = trainer.run_step(trainer.main_phase())  # the completions of a group have one row
    assert metrics["reward"] == 4


def test_coin_flips_need_no_reward_of_the_user() -> None:
    trainer = trainer_of("coin_flip")
    assert 0 <= trainer.evaluate().reward <= 1


def test_a_demonstration_scores_what_the_assistant_writes() -> None:
    tokenizer = tokenizer_of(chat_template=CHAT)
    segments = (("<user>1<eos><assistant>", False), ("2<eos>", True), ("<user>3<eos><assistant>", False), ("4", True))
    rows = rows_from_answers([Example("", "", segments=segments), Example("12", "3")], tokenizer, torch.device("cpu"))
    scored = [tokenizer.decode(labels[labels != IGNORED].tolist()) for labels in rows.shifted_labels]
    assert scored == ["2<eos>4<eos>", "3<eos>"]
    whole = tokenizer.decode(rows.input_ids[0][rows.attention_mask[0].bool()].tolist())
    assert whole == "<user>1<eos><assistant>2<eos><user>3<eos><assistant>4<eos>"


def shown(trainer: Any) -> str:
    """Return what a dry run prints."""
    output = io.StringIO()
    show_dry_run(trainer, Console(file=output, width=200))
    return output.getvalue()


def test_a_dry_run_shows_prompts_completions_rewards_tokens_and_memory(tmp_path: Path) -> None:
    save_model(tmp_path / "model", chat_template=CHAT)
    chats = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "completion": row["answer"]} for row in SUMS
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    data = ("task=jsonl", "task.path=chats.jsonl", "task.system_prompt=add", "model=pretrained", "model.path=model")
    text = shown(trainer_with(None, *data, "task.reward=[my.py:digits,my.py:length]", "kl=k3"))
    assert text.count("prompt      '<system>add<eos><user>") == 3
    assert text.count("<eos><assistant>'\n") == 3
    assert len(re.findall(r"reward      \d\.\d{3}  \(digits \d\.\d{3}, length \d\.\d{3}\)", text)) == 3
    assert "a step: 8 prompts x 4 completions of at most 32 tokens; prompts have 12 on average, at most 12: " in text
    assert "at most 1,408 tokens" in text  # 8 x 4 x (12 + 32)
    # 88,000 parameters or so of 4 bytes; as much for the gradients and the reference, twice for Adam
    assert re.search(r"\(weights 0\.3, gradients 0\.3, optimizer 0\.7, reference 0\.3, activations ", text)
    tuning = shown(trainer_with(None, *data, "loss=ce"))
    assert len(re.findall(r"  scored      '\d+<eos>'\n", tuning)) == 3
    assert len(re.findall(r"  read        '<system>add<eos><user>\d\+\d=<eos><assistant>'\n", tuning)) == 3


def test_a_dry_run_says_how_often_prompts_are_seen_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines_of_chat = [{"prompt": f"{a}+1=\\n", "answer": str(a + 1)} for a in range(10)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines_of_chat).replace("\\\\n", "\\n"))
    Path("my.py").write_text("def never(completion): return None\n")
    trainer = trainer_of("my.py:never", "training.micro_batch_size=16")
    text = shown(trainer)
    assert "a run: 3 steps of 8 examples, each 2.7 times on average; learning rate 0.001" in text  # 24 / 9
    assert "sequences, at most 176 tokens (training.micro_batch_size=16)" in text  # 16 x (5 + 6)
    assert text.count("  reward      none applies\n") == 3
    assert "that are free" not in text
    monkeypatch.setattr("toolkit.training.dry_run.free_memory", lambda _: 100 * 2**10)
    assert "that is more than the 0 MiB that are free for each process; lower training.micro_batch_size" in shown(
        trainer
    )


def test_a_dry_run_shows_each_line_of_a_prompt_below_the_other() -> None:
    assert _quoted("a\nb's\n") == "'a\\n'\n" + " " * 14 + '"b\'s\\n"'
    assert _quoted("") == "''"
    long = _quoted("".join(f"{number}\n" for number in range(30))).splitlines()
    assert [line.strip() for line in long[11:14]] == ["'11\\n'", "... 6 lines ...", "'18\\n'"]


@pytest.mark.slow
def test_the_command_of_a_dry_run_leaves_no_run_behind(tmp_path: Path) -> None:
    for _ in range(2):  # the folder is free again
        done = train(tmp_path / "run", "debug=dry_run", "task.num_heldout=20")
        assert done.returncode == 0, done.stderr
        assert "dry run: nothing was trained" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", ".hydra", "dry_run.txt"}
    written = (tmp_path / "run/dry_run.txt").read_text()
    assert written
    assert done.stdout.startswith(written)


# ---------------------------------------------------------------- commands


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_run_of_one_on_chat_messages_with_several_rewards(tmp_path: Path) -> None:
    save_model(tmp_path / "model", chat_template=CHAT)
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in two_digit_sums()]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    settings = [
        "task=jsonl", "task.path=chats.jsonl", "task.reward=[my.py:digits,my.py:parts,my.py:sometimes]",
        "task.max_reward_failures=1", "task.reward_workers=1", "model=pretrained", "model.path=model",
        "model.dtype=float64", "rollout.prompts_per_step=5", "rollout.group_size=4", "rollout.max_new_tokens=4",
        "advantage=gdpo", "training.steps=3", "training.minibatches=2", "rollout.skip_uniform_groups=false",
    ]  # fmt: skip
    one = train(tmp_path / "one", *settings)
    assert one.returncode == 0, one.stderr
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    two = train(tmp_path / "two", *settings, launcher=launcher)
    assert two.returncode == 0, two.stderr
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "tokens_per_second", "phase"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name
    for name in ("heldout_reward_before", "heldout_reward_after", "heldout_reward_se_after"):
        assert summary(tmp_path / "two")[name] == pytest.approx(summary(tmp_path / "one")[name], rel=1e-9), name


@pytest.mark.slow
def test_the_first_commands_of_the_page_run(tmp_path: Path) -> None:
    page = (Path(toolkit.__file__).parents[1] / "tutorials/reference/your_data.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    data = next(text for language, text in blocks if language == "json")
    Path("data.jsonl").write_text(data)
    Path("my_reward.py").write_text(next(text for language, text in blocks if "# my_reward.py" in text))
    save_model(tmp_path / "my-model", chat_template=CHAT)
    commands = [line for language, text in blocks if language == "bash" for line in text.splitlines()]
    ours = [line for line in commands if "my_reward.py:score model=" in line]
    assert len(ours) == 2
    for index, command in enumerate(ours):
        small = ["training.steps=1", "rollout.prompts_per_step=2", "task.heldout=0.3"]
        done = train(tmp_path / f"run{index}", *shlex.split(command)[1:], *small)
        assert done.returncode == 0, done.stderr
    assert "heldout_reward_after" in summary(tmp_path / "run0")
    for index, row in enumerate(text for language, text in blocks if language == "json"):
        Path("data.jsonl").write_text(row)
        has_completion = "completion" in row or "messages" in row
        overrides = ["loss=ce", "task=sft"] if has_completion else ["task=jsonl", "task.reward=my_reward.py:score"]
        model = ["model=pretrained", "model.path=my-model", "debug=dry_run", "task.heldout=0"]
        done = train(tmp_path / f"dry{index}", "task.path=data.jsonl", *overrides, *model)
        assert done.returncode == 0, done.stderr
