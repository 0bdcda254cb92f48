"""Data of a user: formats, columns, templates, chat messages, the held-out part, and what the model sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.tasks.models import CHAT, tokenizer_of
from toolkit.errors import ConfigError
from toolkit.tasks import split
from toolkit.tasks.base import Example
from toolkit.tasks.config import DatasetConfig, ReasoningGymConfig, SFTConfig


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts_of(examples: Sequence[Example]) -> list[str]:
    return sorted(example.prompt for example in examples)


SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


# ---------------------------------------------------------------- formats


def test_what_the_tokenizer_does_not_know_is_said(recwarn: pytest.WarningsRecorder) -> None:
    write([{"prompt": "1+1="}, {"prompt": "\u03c0+1="}])
    DatasetConfig(path="data.jsonl", heldout=0).build(0).prepare(tokenizer_of(), context=64, max_new_tokens=4)
    (said,) = [str(warning.message) for warning in recwarn]
    assert said == (
        "1 of 2 prompts have characters that the tokenizer does not know (<unk>); the first is data.jsonl, line 2"
    )


def test_all_formats_hold_the_same_rows(tmp_path: Path) -> None:
    write(SUMS)
    Path("data.json").write_text(json.dumps(SUMS))
    Path("data.csv").write_text("\ufeffprompt,answer\n" + "".join(f'"{r["prompt"]}",{r["answer"]}\n\n' for r in SUMS))
    (tmp_path / "folder").mkdir()
    write(SUMS[:50], "folder/b.jsonl")
    write(SUMS[50:], "folder/a.jsonl")
    expected = DatasetConfig(path="data.jsonl", heldout=0).build(0).train
    assert len(expected) == 100
    Path("UPPER.JSONL").write_bytes(b"\xef\xbb\xbf" + Path("data.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for path in ("data.json", "data.csv", "folder", "UPPER.JSONL"):
        train = DatasetConfig(path=path, heldout=0).build(0).train
        assert sorted(train, key=lambda e: e.prompt) == sorted(expected, key=lambda e: e.prompt), path


def test_parquet_and_a_repository_hold_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(SUMS), "data.parquet")
    assert len(DatasetConfig(path="data.parquet", heldout=0).build(0).train) == 100
    asked: list[Any] = []

    def rows_of(split: str) -> list[dict[str, str]]:
        return SUMS[:7] if split.startswith("test") else SUMS[7:]

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **named: asked.append((args, named)) or rows_of(**named))
    task = DatasetConfig(path="owner/sums", subset="easy", split="test", heldout=0).build(0)
    assert len(task.train) == 7
    assert asked == [(("owner/sums", "easy"), {"split": "test"})]
    DatasetConfig(path="owner/sums", heldout_path="owner/sums:test[:5]").check_data(0, with_completions=False)
    assert asked[1:] == [(("owner/sums", None), {"split": "train"}), (("owner/sums", None), {"split": "test[:5]"})]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **named: 1 / 0)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(ZeroDivisionError: .*task\.subset and the network"):
        DatasetConfig(path="owner/none").build(0)


def test_a_file_that_has_changed_is_read_again() -> None:
    write(SUMS[:10])
    config = DatasetConfig(path="data.jsonl", heldout=0)
    assert len(config.build(0).train) == 10
    write(SUMS[:20])
    assert len(config.build(0).train) == 20


# ---------------------------------------------------------------- the held-out part


def test_a_share_is_held_out_by_seed_and_prompts_stay_together() -> None:
    write([row for row in SUMS for _ in range(3)])
    first = DatasetConfig(path="data.jsonl").build(0)
    assert len(first.heldout) == 30
    assert len(first.train) == 270
    assert not {*prompts_of(first.heldout)} & {*prompts_of(first.train)}
    assert prompts_of(DatasetConfig(path="data.jsonl").build(0).heldout) == prompts_of(first.heldout)
    assert prompts_of(DatasetConfig(path="data.jsonl").build(1).heldout) != prompts_of(first.heldout)
    assert len(DatasetConfig(path="data.jsonl", num_heldout=5).build(0).heldout) == 5
    none = DatasetConfig(path="data.jsonl", heldout=0).build(0)
    assert (len(none.heldout), len(none.train)) == (0, 300)


@pytest.mark.filterwarnings("ignore:10 rows are not trained on")
def test_a_file_or_a_column_holds_out() -> None:
    write(SUMS)
    write(SUMS[:10], "test.jsonl")
    task = DatasetConfig(path="data.jsonl", heldout_path="test.jsonl").build(0)
    assert prompts_of(task.heldout) == sorted(row["prompt"] for row in SUMS[:10])
    assert len(task.train) == 90  # the ten are in both
    write([{**row, "side": "test" if index < 7 else "train"} for index, row in enumerate(SUMS)])
    task = DatasetConfig(path="data.jsonl", heldout_column="side", num_heldout=5).build(0)
    assert len(task.heldout) == 5
    assert len(task.train) == 93
    assert {*prompts_of(task.heldout)} <= {row["prompt"] for row in SUMS[:7]}


def test_one_prompt_is_left_for_training() -> None:
    train, heldout = split.by_share(["a", "a"], 0.9, 10, 0, str)
    assert (train, heldout) == (["a", "a"], [])
    train, heldout = split.by_share(["a", "b"], 0.99, 10, 0, str)
    assert len(train) == len(heldout) == 1


def test_an_epoch_takes_every_row_once() -> None:
    write(SUMS)
    task = DatasetConfig(path="data.jsonl", heldout=0).build(0)
    steps = [task.draw_at(step, 25, Random(0)) for step in range(8)]
    epochs = [[e for step in part for e in step] for part in (steps[:4], steps[4:])]
    assert prompts_of(epochs[0]) == prompts_of(epochs[1]) == sorted(row["prompt"] for row in SUMS)
    assert [e.prompt for e in epochs[0]] != [e.prompt for e in epochs[1]]
    assert len(task.draw_at(3, 130, Random(0))) == 130


# ---------------------------------------------------------------- what the model sees


def test_templates_and_columns_for_rewards() -> None:
    write([{"question": "1+1", "gold": 2, "level": {"a": [1]}}] * 2)
    config = DatasetConfig(path="data.jsonl", prompt_template="Q: {question}\nA:", answer_column="gold", heldout=0)
    example = config.build(0).train[0]
    assert (example.prompt, example.answer) == ("Q: 1+1\nA:", "2")
    assert example.columns == {"question": "1+1", "gold": 2, "level": {"a": [1]}, "answer": 2}


def prepared(config: DatasetConfig, **options: Any) -> Any:
    task = config.build(0)
    settings = {"context": 64, "max_new_tokens": None, **options}
    task.prepare(settings.pop("tokenizer", tokenizer_of(chat_template=CHAT)), **settings)
    return task


def test_messages_go_through_the_chat_template_with_system_prompt_and_tools() -> None:
    user = [{"role": "user", "content": "1+1="}]
    write([{"prompt": user, "tools": [{"name": "add"}]}])
    config = DatasetConfig(path="data.jsonl", system_prompt="Think.", heldout=0)
    example = prepared(config).train[0]
    assert example.prompt == "<system>Think.<eos><user>add|1+1=<eos><assistant>"
    assert example.source == [{"role": "system", "content": "Think."}, *user]
    write([{"prompt": "1+1="}])
    example = prepared(DatasetConfig(path="data.jsonl", as_chat=True, heldout=0)).train[0]
    assert example.prompt == "<user>1+1=<eos><assistant>"


def test_text_gets_the_start_of_text_of_a_tokenizer_that_has_one() -> None:
    write(SUMS[:2])
    config = DatasetConfig(path="data.jsonl", heldout=0)
    assert prompts_of(prepared(config, tokenizer=tokenizer_of(adds_bos=True)).train) == ["<bos>0+0=", "<bos>0+1="]
    assert prompts_of(prepared(config, tokenizer=tokenizer_of()).train) == ["0+0=", "0+1="]


def test_what_the_assistant_writes_is_scored() -> None:
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    write([{"messages": turns}])
    example = prepared(SFTConfig(path="data.jsonl", heldout=0)).train[0]
    assert example.segments == (
        ("<user>a<eos><assistant>", False), ("b<eos>", True), ("<user>c<eos><assistant>", False), ("d<eos>", True),
    )  # fmt: skip
    assert example.prompt == "<user>a<eos><assistant>b<eos><user>c<eos><assistant>"
    write([{"prompt": [turns[0]], "completion": "b"}])
    example = prepared(SFTConfig(path="data.jsonl", heldout=0)).train[0]
    assert example.segments == (("<user>a<eos><assistant>", False), ("b<eos>", True))
    write([{"prompt": "1+1=", "completion": 2}])
    example = prepared(SFTConfig(path="data.jsonl", heldout=0)).train[0]
    assert (example.segments, example.answer) == ((("1+1=", False), ("2", True)), "2")


def test_what_the_template_writes_after_a_turn_is_read_but_not_scored() -> None:
    template = CHAT.replace("<eos>{% endfor %}", "<eos>. {% endfor %}")
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    write([{"messages": turns}])
    tokenizer = tokenizer_of(chat_template=template)
    example = prepared(SFTConfig(path="data.jsonl", heldout=0), tokenizer=tokenizer).train[0]
    assert [text for text, scored in example.segments if scored] == ["b<eos>", "d<eos>"]
    assert example.segments[2][0] == ". <user>c<eos>. <assistant>"


def test_tokenizers_and_prompts_that_do_not_fit_are_named() -> None:
    write([{"prompt": [{"role": "user", "content": "1+1="}]}])
    config = DatasetConfig(path="data.jsonl", heldout=0)
    with pytest.raises(ConfigError, match=r"the prompts are chat messages, but the tokenizer has no chat template"):
        prepared(config, tokenizer=tokenizer_of())
    with pytest.raises(ConfigError, match=r"line 1: the chat template does not accept it: no user, please"):
        prepared(config, tokenizer=tokenizer_of(chat_template="{{ raise_exception('no user, please') }}"))
    with pytest.raises(ConfigError, match=r"the tokenizer has no eos token, so a completion cannot end"):
        prepared(config, tokenizer=tokenizer_of(eos=None))
    with pytest.raises(ConfigError, match=r"no pad token; set it: tokenizer\.pad_token = tokenizer\.eos_token"):
        prepared(config, tokenizer=tokenizer_of(pad=None))
    write([{"prompt": "1+1="}, {"prompt": "1+" * 20}])
    with pytest.raises(ConfigError, match=r"line 2: its prompt has 40 tokens, which with 32 of the completion is more"):
        prepared(config)
    with pytest.raises(ConfigError, match=r"with 61 of the completion is more than the 64 .* \(and 1 more bad row\)"):
        prepared(config, max_new_tokens=61)
    write([{"prompt": "1+1=", "completion": "2" * 60}])
    with pytest.raises(ConfigError, match=r"line 1: it has 65 tokens with its end, but the model reads 64"):
        prepared(SFTConfig(path="data.jsonl", heldout=0))


def test_a_prompt_that_is_too_long_can_be_skipped() -> None:
    write([{"prompt": "1+1="}, {"prompt": "1+" * 20}])
    with pytest.warns(UserWarning, match="skipped 1 bad row: data.jsonl, line 2: its prompt has 40 tokens"):
        task = prepared(DatasetConfig(path="data.jsonl", heldout=0, on_bad_row="skip"))
    assert prompts_of(task.train) == ["1+1="]
    assert task.longest_completion(64) == 32
    assert task.longest_completion(4096) == task.longest_completion(None) == 256


# ---------------------------------------------------------------- reasoning-gym


def test_solved_examples_come_before_a_question_and_are_not_asked() -> None:
    pytest.importorskip("reasoning_gym")
    few = {"name": "gcd", "size": 60, "num_heldout": 5, "options": {"max_value": 9}}
    plain, asked = (ReasoningGymConfig(**few, num_shots=shots).build(0) for shots in (0, 2))
    example = asked.train[0]
    assert isinstance(example.source, str)
    first, second, question = example.source.split("\n\n")
    assert question.endswith("\n")
    assert question[:-1] in prompts_of((*plain.train, *plain.heldout))
    for shot in (first, second):
        text, answer = shot.rsplit("\n", 1)
        entry = next((e.entry for e in plain.train if e.prompt == text), None)
        assert entry is None or plain.score(Example(text, answer, entry), answer) == 1.0
        assert not [e for e in (*asked.train, *asked.heldout) if e.source.endswith(f"\n\n{text}\n")]
    chat = ReasoningGymConfig(**few, num_shots=1, as_chat=True, system_prompt="think").build(0).train[0].source
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert f"{chat[1]['content']}\n{chat[2]['content']}" in (first, second)
    with pytest.raises(ConfigError, match=r"task\.num_shots=50: 'gcd' has only \d+ different questions to show"):
        ReasoningGymConfig(**{**few, "options": {"max_value": 3}}, num_shots=50).build(0)


def test_a_mixture_of_reasoning_gym_with_its_verifiers() -> None:
    pytest.importorskip("reasoning_gym")
    config = ReasoningGymConfig(names=("gcd", "chain_sum"), size=40, num_heldout=10)
    task = config.build(0)
    assert {example.columns["task"] for example in task.train} == {"gcd", "chain_sum"}
    assert len(task.heldout) == 10
    assert not {*prompts_of(task.heldout)} & {*prompts_of(task.train)}
    for example in task.train[:20]:
        assert task.reward(example, example.answer, finished=True) == 1.0
        assert task.reward(example, example.answer, finished=False) == 0.0
        assert task.reward(example, "no", finished=True) < 1.0
    assert prompts_of(config.build(0).train) == prompts_of(task.train)
    with pytest.raises(ConfigError, match=r"task\.num_heldout=70 of \d+ different prompts leaves too few"):
        ReasoningGymConfig(name="gcd", size=80, num_heldout=70).build(0)
    with pytest.raises(ConfigError, match=r"task\.options=\{'digits': 3\} do not fit 'gcd': .*unexpected keyword"):
        ReasoningGymConfig(name="gcd", size=80, num_heldout=5, options={"digits": 3}).build(0)
