"""Readers of dumps, derived signals, filters, order, worst tokens, colours; no browser, no widgets."""

from __future__ import annotations

import io
import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.notebook.made import token_samples
from tests.report.made import made_samples, make_run
from toolkit import DataError, RLLossContextInputItem
from toolkit.notebook.readers import trl
from toolkit.notebook.token_model import TokenModel, bin_of, edges_of
from toolkit.notebook.token_picture import DOWN, UP, color_of, picture_layout, scale_words, token_picture
from toolkit.notebook.token_records import SIGNALS, TokenRecord, record_of, record_of_text
from toolkit.notebook.token_source import records_from


def records() -> list[TokenRecord]:
    """Two groups of two completions with hand-made ratios."""
    rows = [("0", 1.0, [1.0, 1.5]), ("0", 0.0, [0.5, 1.1]), ("1", 0.5, [1.0, 1.0]), ("1", 1.0, [4.0, 0.9])]
    return [
        record_of(
            {
                "text": [f"w{index}", " end"], "ratio": ratio,
                "status": ["clipped_high" if ratio[0] > 2 else None, None],
            },
            prompt=f"question {group}", reward=reward, step=int(group), group=group, sample=index % 2,
        )
        for index, (group, reward, ratio) in enumerate(rows)
    ]  # fmt: skip


def test_signals_that_follow_from_others() -> None:
    record = record_of({"text": ["a", "b"], "old": [-1.0, -2.0], "current": [-0.5, None], "ref": [-1.5, -2.0],
                        "rollout": [-1.25, -2.0]})  # fmt: skip
    assert record.tokens["logprob"] == [-0.5, None]
    assert record.tokens["ratio"] == [pytest.approx(math.exp(0.5)), None]
    assert record.tokens["kl"] == [pytest.approx(math.exp(-1) - 1 + 1), None]  # d = -0.5 + 1.5
    assert record.tokens["mismatch"] == [0.25, 0.0]
    kept = record_of({"text": ["a"], "old": [-1.0], "current": [-0.5], "ratio": [9.0]})
    assert kept.tokens["ratio"] == [9.0]  # what the file says is not computed again
    with pytest.raises(DataError, match="differ in length"):
        record_of({"text": ["a", "b"], "old": [-1.0]})
    with pytest.raises(DataError, match="no text"):
        record_of({"old": [-1.0]})


def test_filters_and_order() -> None:
    model = TokenModel(records(), signal="ratio")
    assert model.chosen() == [0, 1, 2, 3]
    model.text = "W1"
    assert model.chosen() == [1]
    model.text, model.step = "", 1
    assert model.chosen() == [2, 3]
    model.step, model.only_marked = None, True
    assert model.chosen() == [3]
    model.only_marked, model.order = False, "lowest reward first"
    assert model.chosen() == [1, 2, 0, 3]
    model.is_grouped = True
    assert model.chosen() == [1, 0, 2, 3]  # the group of the first stays together
    model.is_grouped, model.order = False, "largest signal first"
    assert model.chosen() == [3, 1, 0, 2]  # log 4 > log 2 > log 1.5 > 0


def test_bins_of_the_histogram() -> None:
    model = TokenModel(records(), signal="ratio")
    bars = model.charts().charts[0].bars
    assert [(bar.label, bar.value) for bar in bars] == [("0", 1), ("0.5", 1), ("1", 2)]
    model.bins = frozenset({2})
    assert model.chosen() == [0, 3]
    edges = edges_of([index / 100 for index in range(101)])
    assert len(edges) == 13
    assert (bin_of(0.0, edges), bin_of(0.99, edges), bin_of(1.0, edges)) == (0, 11, 11)


def test_the_worst_tokens() -> None:
    model = TokenModel(records(), signal="ratio")
    assert model.worst(3) == [(3, 0), (1, 0), (0, 1)]
    model.signal = "status"
    assert model.worst() == [(3, 0)]
    model.step = 0
    assert model.worst() == []


def test_positions_are_averaged() -> None:
    chart = TokenModel(records(), signal="ratio").charts().charts[1]
    (line,) = chart.lines
    assert line.x == [0, 1]
    assert line.y == [pytest.approx((1 + 0.5 + 1 + 4) / 4), pytest.approx((1.5 + 1.1 + 1 + 0.9) / 4)]
    (line,) = TokenModel(records(), signal="status").charts().charts[1].lines
    assert line.y == [25, 0]


def test_a_label_fits_its_axis() -> None:
    assert all(len(label.partition(":")[0]) < 40 for label in SIGNALS.values())
    chart = (
        TokenModel([TokenRecord(tokens={"text": ["a"], "coefficient": [0.5]})], signal="coefficient").charts().charts[0]
    )
    assert (chart.title, chart.y_label) == ("Mean of gradient coefficient", "gradient coefficient")


def test_colours() -> None:
    model = TokenModel(records(), signal="ratio")
    scale = model.scale()
    assert (scale["kind"], scale["center"]) == ("two ways", 1.0)
    assert color_of(1.0, scale) == (1, 1, 1)
    high, low = color_of(4.0, scale), color_of(0.1, scale)
    assert high is not None
    assert low is not None
    assert high[2] > high[0]  # blue
    assert low[0] > low[2]  # orange
    assert scale_words({**scale, "reach": 0.5}) == " (orange 0.5, white 1, blue 1.5)"
    script = (files("toolkit.notebook") / "tokens.js").read_text()
    assert f"const UP = {list(UP)}, DOWN = {list(DOWN)}," in script
    assert color_of(None, scale) is None
    model.signal = "status"
    assert model.scale() == {"kind": "status", "names": ["clipped_high"]}
    least = TokenModel([record_of({"text": ["a", "b", "c"], "logprob": [-9.0, -1.0, 0.0]})]).scale()
    assert least["is_reversed"]  # the unlikely token stands out
    assert token_picture(model).startswith(b"\x89PNG")


def test_what_the_picture_leaves_out_is_said() -> None:
    # A completion of 40 short words takes two lines, one for its title and an empty one: ten in MOST_LINES.
    model = TokenModel([record_of({"text": ["word "] * 40}) for _ in range(96)])
    cells, titles, end, _ = picture_layout(model)
    assert (len(titles), end) == (10, "... and 86 more")
    assert {line + 1 for line, _ in titles} <= {cell[0] for cell in cells}
    for number, left in ((1, ""), (3, ", and 2 more")):
        long = TokenModel([record_of({"text": ["word "] * 1500}) for _ in range(number)])
        assert picture_layout(long)[2] == f"... the last one goes on{left}"
    # One more line fits its title, not its tokens.
    filled = [record_of({"text": ["word "] * 22 * 37}), record_of({"text": ["word "]})]
    assert [line for line, _ in picture_layout(TokenModel(filled))[1]] == [0]
    assert picture_layout(TokenModel(records()))[2] == ""


def test_the_picture_is_as_wide_as_its_texts() -> None:
    record = record_of({"text": ["m" * 100], "coefficient": [1.0]}, details={"words": "w" * 60, "more": "w" * 60})
    pixels = np.asarray(Image.open(io.BytesIO(token_picture(TokenModel([record])))).convert("RGB")).astype(int)
    is_dark, is_blue = pixels.max(axis=2) < 90, pixels[..., 2] - pixels[..., 0] > 90
    rows = is_blue.any(axis=1)
    assert rows.any()
    assert is_dark[rows].any(axis=0).nonzero()[0].max() <= is_blue.any(axis=0).nonzero()[0].max()
    assert (pixels[:, -5:] > 240).all()


def test_a_text_without_tokens() -> None:
    record = record_of_text("two words\n", 0.5, reward=1.0)
    assert record.text == "two words\n"
    assert record.tokens["text"] == ["two", " words", "\n"]
    assert record.tokens["advantage"] == [0.5] * 3


def test_samples_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", rewards=[0.1], samples=[*made_samples(4, with_tokens=True), *made_samples(2)])
    for source in (run, str(run), run / "samples.jsonl"):
        known = records_from(source)
        assert len(known) == 6
        assert known[1].tokens["status"][1] == "clipped_high"
        assert (known[0].step, known[0].group, known[0].reward) == (0, "0", 0.0)
        assert known[5].text == "drow 1"
    assert len(records_from(run, most=3)) == 3
    assert TokenModel(records_from(run)).signals() == ["ratio", "advantage", "status"]


def test_the_lines_of_the_training_command() -> None:
    model = TokenModel(records_from(token_samples(8, 5)))
    assert model.signals() == [
        "logprob", "ratio", "advantage", "entropy", "kl", "coefficient", "weight", "mismatch", "status",
    ]  # fmt: skip
    assert model.status() == "8 of 8 completions, 40 tokens"
    json.dumps(model.as_data(), allow_nan=False)
    json.dumps(model.as_view(), allow_nan=False)


def test_verl(tmp_path: Path) -> None:
    lines = [
        {"input": "1+1=", "output": "two", "gts": "2", "score": score, "step": 3, "acc": score} for score in (0.0, 1.0)
    ]
    (tmp_path / "3.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source in (tmp_path, tmp_path / "3.jsonl"):
        first, second = records_from(source)
        assert (first.prompt, first.text, second.reward, second.step, second.sample) == ("1+1=", "two", 1.0, 3, 1)
        assert dict(second.details) == {"acc": 1.0}


def test_trl() -> None:
    row = {"step": 2, "prompt": [{"role": "user", "content": "1+1="}], "completion": "2 !", "exact": 1.0, "short": 0.5}
    first, second = trl.of_rows([{**row, "advantage": 0.7}, {**row, "advantage": -0.7}])
    assert (first.prompt, first.text, first.reward, first.step) == ("1+1=", "2 !", 1.5, 2)
    assert (second.sample, second.tokens["advantage"]) == (1, [-0.7, -0.7])
    with pytest.raises(DataError, match="no column 'completion'"):
        trl.of_rows([{"prompt": "a"}])


def test_a_file_of_trl(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    table = {"step": [1], "prompt": ["a"], "completion": ["b c"], "reward_len": [2.0], "advantage": [0.0]}
    parquet.write_table(arrow.table(table), tmp_path / "completions_00001.parquet")
    (record,) = records_from(tmp_path)
    assert (record.text, record.reward) == ("b c", 2.0)


def test_prime_rl(tmp_path: Path) -> None:
    nodes = [
        {"message": {"role": "user", "content": "1+1="}},
        {"message": {"role": "assistant", "content": "it is 2"}},
        {"message": {"role": "assistant", "content": "ok"}, "tokens": ["o", "k"], "logprobs": [-0.5, -0.25]},
    ]
    trace = {"nodes": nodes, "info": {"advantage": 0.5}, "rewards": {"right": {"score": 1.0, "weight": 2.0}}}
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"id": "e", "group": {"id": "g"}, "traces": [trace, trace]}) + "\n")
    first, second = records_from(path)
    assert (first.prompt, first.text, first.reward, first.group, second.sample) == ("1+1=", "it is 2ok", 2.0, "g", 1)
    assert first.tokens["logprob"] == [None, None, None, -0.5, -0.25]
    assert first.tokens["advantage"] == [0.5] * 5


def test_items_of_a_batch() -> None:
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor([[5, 6, -100, -100], [7, 8, 9, -100]]),
        advantages=torch.tensor([[1.0], [-1.0]]).expand(2, 4),
        old_logprobs=torch.full((2, 4), -1.0),
    )
    first, second = records_from([item], decode=lambda each: chr(60 + each))
    assert (first.text, second.text) == ("AB", "CDE")
    assert second.tokens["advantage"] == [-1.0, -1.0, -1.0]
    assert second.tokens["logprob"] == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "does not exist; give a run's folder"),
        (lambda path: path, "holds no samples.jsonl and no dump"),
        (lambda path: [], "holds no completions"),
        (lambda path: 3, "token_view got an int"),
        (
            lambda path: [{"foo": 1}],
            "a sample needs the key 'completion', or 'tokens' with the key 'text'; one has foo",
        ),
        (lambda path: [{"tokens": {"id": [1]}}], "a sample needs the key .*; one has tokens"),
        (lambda path: {}, "a sample needs the key .*; one is empty"),
        (lambda path: make_run(path / "a", rewards=[0.1]), "^no samples.jsonl in .*a; tracker.samples=none keeps none"),
        (lambda path: make_run(path / "a") / "samples.jsonl", "^no samples.jsonl in .*a; tracker.samples=none keeps"),
        (lambda path: [3], "token_view got an int among its completions"),
    ],
)
def test_what_is_not_known(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message):
        records_from(make(tmp_path))


def test_a_file_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(DataError, match="its lines have a, b"):
        records_from(path)
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match="line 1 cannot be read"):
        records_from(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        records_from(path)
