"""Packed micro-batches: who lies where in a row, and loss and gradient as in padded rows, in every layout."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("peft")

from torch import Tensor

from tests.models.saved import save_tiny_model
from tests.models.test_policy import ARCHITECTURES, build
from tests.processes import run_processes
from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit import CELossConfig
from toolkit.errors import ConfigError, DataError
from toolkit.metrics import Metric, to_floats, unsharded
from toolkit.models import policy as policy_module
from toolkit.models.config import TinyLlamaConfig
from toolkit.models.packed import why_not_packed
from toolkit.models.policy import Policy
from toolkit.tasks.base import Example
from toolkit.training.dry_run import _size, expected_memory
from toolkit.training.experience import IGNORED, Rows, rows_from_answers
from toolkit.training.packing import PackedPlan, PaddedPlan, pack, tokens_of, unscored
from toolkit.training.packing_checks import NUM_COMPARED, compare_with_single
from toolkit.training.step import router_weights

GROUP = 4
WIDTH = 14


def made_up_rows(number: int, dtype: torch.dtype = torch.float64) -> Rows:
    """Prompts padded on the left and completions on the right, of very different lengths; one has no new token.

    Old and reference log-probabilities are noise, to be added to scores.
    """
    draw = torch.Generator().manual_seed(3)
    before = torch.randint(0, 5, (number, 1), generator=draw)
    prompt = before + torch.randint(1, 3, (number, 1), generator=draw)
    end = torch.maximum(prompt, torch.randint(2, WIDTH + 1, (number, 1), generator=draw))
    end[1], end[2] = WIDTH, prompt[2]
    columns = torch.arange(WIDTH)
    is_token, is_new = (columns >= before) & (columns < end), (columns >= prompt) & (columns < end)
    ids = torch.randint(3, 20, (number, WIDTH), generator=draw).where(is_token, 0)
    shape = (number, WIDTH - 1)
    return Rows(
        input_ids=ids,
        attention_mask=is_token.long(),
        shifted_labels=ids.where(is_new, IGNORED)[:, 1:],
        advantages=torch.randn(number, 1, generator=draw, dtype=dtype).expand(shape),
        old_logprobs=torch.randn(shape, generator=draw, dtype=dtype) / 4,
        ref_logprobs=torch.randn(shape, generator=draw, dtype=dtype) / 4,
        rollout_logprobs=(-3 + torch.randn(shape, generator=draw, dtype=dtype) / 4).where(is_new[:, 1:], torch.nan),
        group_ids=torch.arange(number).div(GROUP, rounding_mode="floor").unsqueeze(-1).expand(shape),
    )


# ---------------------------------------------------------------- where tokens lie


def test_a_packed_row_by_hand() -> None:
    rows = Rows(
        input_ids=torch.tensor([[0, 11, 12, 13, 0], [21, 0, 0, 0, 0], [31, 32, 33, 34, 35]]),
        attention_mask=torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
        shifted_labels=torch.tensor([[IGNORED, 12, 13, IGNORED], [IGNORED] * 4, [32, 33, 34, 35]]),
        old_logprobs=torch.tensor([[9.0, 1.2, 1.3, 9.0], [9.0] * 4, [3.2, 3.3, 3.4, 3.5]]),
        group_ids=torch.tensor([[7] * 4, [7] * 4, [8] * 4]),
    )
    batch = pack(rows, [0, 1, 2])
    assert batch.rows.input_ids.tolist() == [[11, 12, 13, 21, 31, 32, 33, 34, 35]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert batch.cu_seq_lens.tolist() == [0, 3, 4, 8]
    assert batch.rows.shifted_labels.tolist() == [[12, 13, IGNORED, IGNORED, 32, 33, 34, 35]]
    scored = batch.rows.shifted_labels != IGNORED
    assert batch.rows.old_logprobs[scored].tolist() == pytest.approx([1.2, 1.3, 3.2, 3.3, 3.4, 3.5])
    assert batch.rows.group_ids.tolist() == [[7, 7, 7, 7, 8, 8, 8, 8]]
    assert pack(rows, [0, 1]).cu_seq_lens.tolist() == [0, 3, 3]  # the last sequence has no position left
    first = pack(rows, [2, 0])  # a sequence that fills its padded row has no position left after it
    assert first.rows.shifted_labels.tolist() == [[32, 33, 34, 35, IGNORED, 12, 13]]
    assert first.cu_seq_lens.tolist() == [0, 5, 7]
    alone = pack(rows, [1])
    assert alone.position_ids.tolist() == [[0, 1]], "a single token predicts nothing, and a forward needs one that does"
    assert (alone.rows.shifted_labels == IGNORED).all()


def test_values_return_to_the_token_that_they_are_about() -> None:
    rows = made_up_rows(12)
    plan = PackedPlan.agreed(rows, 16)
    assert [sum(rows.attention_mask[numbers].sum().tolist() for numbers in pack) for pack in plan.packs] == [
        int(rows.attention_mask[pack].sum()) for pack in plan.packs
    ]
    assert all(int(rows.attention_mask[pack].sum()) <= 16 for pack in plan.packs)
    assert sorted(number for pack in plan.packs for number in pack) == list(range(12))
    assert len(plan.packs) < 12
    batches = plan.cut(rows)
    placed = plan.put_back([batch.rows.input_ids[:, 1:] for batch in batches], rows)
    is_about = (rows.attention_mask[:, 1:] * rows.attention_mask[:, :-1]).bool()
    assert torch.equal(placed, rows.input_ids[:, 1:].where(is_about, 0))
    again = plan.put_back([batch.rows.old_logprobs for batch in batches], rows)
    assert torch.equal(again, rows.old_logprobs.where(is_about, 0)), "to the bit"


def test_rows_without_sequences_score_nothing() -> None:
    rows = made_up_rows(GROUP)
    none = rows.select(slice(0, 0))
    plan = PackedPlan.agreed(none, 16)
    assert (plan.packs, plan.number, plan.most_together) == ([], 1, 0)
    (batch,) = plan.cut(none)
    assert batch.rows.input_ids.shape == (1, 2)
    assert (batch.rows.shifted_labels == IGNORED).all()
    assert (batch.rows.group_ids < 0).all()
    assert plan.put_back([torch.ones(1, 1)], none).shape == (0, WIDTH - 1)
    assert unscored(rows).cu_seq_lens.tolist() == [0, 1]


def test_a_sequence_longer_than_the_budget_is_alone() -> None:
    rows = made_up_rows(GROUP)
    with pytest.warns(UserWarning, match=r"a sequence of \d+ tokens is longer than training\.micro_batch_tokens=9"):
        plan = PackedPlan.agreed(rows, 9)
    longest = int(rows.attention_mask.sum(-1).argmax())
    assert [longest] in plan.packs


# ---------------------------------------------------------------- loss and gradient

KL = ["kl=k3", "loss.kl_loss_coef=0.1"]
RUNS: dict[str, list[str]] = {
    "vanilla": [],
    "gspo": ["policy_loss=gspo", "aggregation=seq_mean_token_mean", *KL],
    "sequence means": ["aggregation=seq_mean_token_mean", "correction=mis", "loss.entropy_coef=0.01"],
    "of groups": ["policy_loss=real", "aggregation=seq_mean_token_mean"],
    "of the step": ["policy_loss=clip_cov", "policy_loss.clip_cov_ratio=0.1", "policy_loss.cov_low=-5"],
    "of prompts": ["aggregation=prompt_mean", "mode=eager", *KL],
    "ce": ["loss=ce"],
}
PADDED, PACKED = ["training.micro_batch_size=4"], ["training.micro_batch_tokens=16"]
WIDE = ["model.dtype=float64", "optimizer.max_grad_norm=1e9", f"rollout.group_size={GROUP}"]


def one_step(trainer: Any, rows: Rows, most: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients and the metrics of one step on these rows of this process."""
    found: dict[str, Tensor] = {}

    def keep(optimizer: Any, **_: Any) -> bool:
        found.update({n: unsharded(p.grad).clone() for n, p in trainer.policy.named_parameters() if p.requires_grad})
        return True

    trainer.updater._apply = keep
    phase = trainer.main_phase()
    loss_cfg = trainer.config.loss
    if isinstance(loss_cfg, CELossConfig):
        rows = Rows(rows.input_ids, rows.attention_mask, rows.shifted_labels)
    else:
        rows = replace(rows, old_logprobs=trainer.updater.score(rows, most) + rows.old_logprobs)
        scores = None if trainer.reference is None else trainer.updater.score(rows, most, trainer.reference)
        rows = replace(rows, ref_logprobs=None if scores is None else scores + rows.ref_logprobs)
    metrics: dict[str, Metric] = trainer.updater.step(phase, rows, loss_cfg, most)
    return {name.removeprefix("module."): value for name, value in found.items()}, to_floats(metrics)


def padded_and_packed(trainer: Any, rows: Rows) -> list[Any]:
    """Return gradients and metrics of a step of one trainer, whose weights stay what they are, in either way."""
    padded = one_step(trainer, rows, len(rows))
    training = trainer.config.training.model_copy(update={"micro_batch_tokens": 16})
    trainer.updater.config = trainer.config.model_copy(update={"training": training})
    packed = one_step(trainer, rows, len(rows))
    assert trainer.updater.is_packing_checked
    return [packed, padded]


def assert_same(ours: Any, theirs: Any, *, rounding: float, name: str = "") -> None:
    gradients, metrics = ours
    assert gradients.keys() == theirs[0].keys()
    largest = max(float(value.abs().max()) for value in theirs[0].values())
    assert largest > 1e-4, name
    for key, value in theirs[0].items():
        assert float((gradients[key] - value).abs().max()) <= rounding * largest, (name, key)
    assert metrics == pytest.approx(theirs[1], rel=10 * rounding, abs=10 * rounding), name


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_are_those_of_padded_rows(name: str) -> None:
    trainer = trainer_with(None, *WIDE, *RUNS[name], *PADDED)
    assert_same(*padded_and_packed(trainer, made_up_rows(3 * GROUP)), rounding=1e-12)


@pytest.mark.usefixtures("_fresh_state")
def test_in_single_precision_to_its_rounding() -> None:
    trainer = trainer_with(None, *WIDE[1:], *RUNS["gspo"], *PADDED)
    assert_same(*padded_and_packed(trainer, made_up_rows(3 * GROUP, torch.float32)), rounding=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_with_adapters_and_their_reference(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny", dtype=torch.float64)
    model = ["model=pretrained", f"model.path={path}", "model.lora.r=2", "warmup=none", "optimizer.lr=1e-4", *WIDE, *KL]
    trainer = trainer_with(None, *model, *PADDED)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():  # fresh adapters are 0, and so would be most gradients
        for parameter in trainer.policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    assert_same(*padded_and_packed(trainer, made_up_rows(3 * GROUP)), rounding=1e-12)


@pytest.mark.usefixtures("_fresh_state")
def test_scores_return_to_their_rows() -> None:
    rows, updater = made_up_rows(3 * GROUP), trainer_with(None, *WIDE, *PACKED).updater
    packed = updater.score(rows, 12)
    padded = PaddedPlan(3, 4).put_back([b.forward(updater.policy) for b in PaddedPlan(3, 4).cut(rows)], rows)
    is_scored = rows.shifted_labels != IGNORED
    torch.testing.assert_close(packed[is_scored], padded[is_scored], rtol=1e-12, atol=1e-12)
    assert not packed[rows.attention_mask[:, 1:] == 0].any()


def _steps(rank: int, world: int, folder: str) -> None:
    """One step of each loss, twice: the second process has fewer rows, then none."""
    from tests.test_mixed_precision import trainer_with

    warnings.simplefilter("ignore")
    rows, found = made_up_rows(3 * GROUP), {}
    for name, overrides in RUNS.items():
        for sharding in ("none", "fsdp2") if world > 1 and name in ("gspo", "of groups") else ("none",):
            settings = [*WIDE, *overrides, *(PACKED if world > 1 else PADDED), f"training.sharding={sharding}"]
            for first in (2 * GROUP, 3 * GROUP):
                mine = slice(None) if world == 1 else (slice(0, first), slice(first, None))[rank]
                found[name, sharding, first] = one_step(
                    trainer_with(None, *settings), rows.select(mine), 12 if world == 1 else first
                )
    if rank == 0:
        torch.save(found, Path(folder, f"{world}.pt"))


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_packed_are_one_padded(tmp_path: Path) -> None:
    for world in (1, 2):
        run_processes(world, _steps, str(tmp_path))
    alone, both = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert {sharding for _, sharding, _ in both} == {"none", "fsdp2"}
    for (name, sharding, first), found in both.items():
        assert_same(found, alone[name, "none", first], rounding=1e-12, name=f"{name}, {sharding}, {first}")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("overrides", [["loss=grpo", "kl=k1_in_reward"], ["loss=ce"]])
def test_steps_of_both_phases_are_those_of_padded_rows(overrides: list[str]) -> None:
    found = []
    for size in (PADDED, ["training.micro_batch_tokens=40"]):
        trainer = trainer_with(None, *WIDE[:1], "training.minibatches=2", *overrides, *size)
        warmup = trainer.warmup_phase()
        rows = [trainer.run_step(warmup) for _ in range(2)]
        main = trainer.main_phase()
        rows += [trainer.run_step(main) for _ in range(2)]
        found.append([{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows])
        assert trainer.updater.is_packing_checked == (size != PADDED)
    for packed, padded in zip(found[1], found[0], strict=True):
        assert packed == pytest.approx(padded, rel=1e-9, abs=1e-12)


def test_a_router_loss_counts_the_tokens_of_padded_rows() -> None:
    """One micro-batch: its load-balancing loss is that of all tokens together."""
    policy = Policy(build("mixtral", output_router_logits=True, router_aux_loss_coef=3.0)).train()
    rows = rows_from_answers([Example("abc=", "cbacba"), Example("a=", "a"), Example("ab=", "ba")], _tokenizer(), CPU)
    cfg, found = CELossConfig(), []
    for plan in (PaddedPlan(3, 1), PackedPlan.agreed(rows, 40)):
        (batch,) = plan.cut(rows)
        (weight,) = router_weights(policy, [batch.rows], "mean")
        bounds = None if batch.cu_seq_lens is None else [batch.cu_seq_lens]
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([batch.rows.item(-100)], cfg, bounds)
        loss, metrics = batch.forward(policy, cfg.loss_ctx_cls(cfg, kwargs), auxiliary_weight=weight)
        policy.zero_grad()
        loss.backward()
        gate = next(p.grad for name, p in policy.named_parameters() if name.endswith("gate.weight"))
        found.append((loss.item(), float(metrics["router_loss"].value()), gate.clone()))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-6)  # transformers' experts are not made for float64
    torch.testing.assert_close(found[1][2], found[0][2], rtol=0, atol=1e-6 * float(found[0][2].abs().max()))


CPU = torch.device("cpu")


def _tokenizer() -> Any:
    return TinyLlamaConfig(hidden_size=16, intermediate_size=16, num_heads=2).build("abc=")[1]


# ---------------------------------------------------------------- models that can and cannot

CANNOT = {"mamba": "carries a state", "bloom": "takes no position_ids"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    windows = {"sliding_window": 3} if name in ("mistral", "gpt_oss", "gemma2", "gemma3_text") else {}
    policy = Policy(build(name, **windows)).eval()
    reason = why_not_packed(policy.head.trunk)
    if name in CANNOT:
        assert reason is not None
        assert CANNOT[name] in reason
        return
    assert reason is None
    rows = made_up_rows(GROUP)
    plan = PackedPlan.agreed(rows, 64)
    compare_with_single(policy, rows, plan, budget=64, precision="no")
    with torch.no_grad():
        packed = plan.put_back([batch.forward(policy) for batch in plan.cut(rows)], rows)
        padded = policy(rows.input_ids, rows.attention_mask)
    is_scored = rows.shifted_labels != IGNORED
    torch.testing.assert_close(packed[is_scored], padded[is_scored], rtol=0, atol=5e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kinds_of_attention(attention: str) -> None:
    lm = build("qwen2", attn_implementation=attention)
    policy, rows = Policy(lm).eval(), made_up_rows(GROUP)
    compare_with_single(policy, rows, PackedPlan.agreed(rows, 64), budget=64, precision="no")


def test_a_model_that_mixes_sequences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "attention_masks", lambda *_: None)
    rows, policy = made_up_rows(GROUP), Policy(build("gpt_oss"))
    words = r"micro_batch_tokens=64: GptOssForCausalLM does not keep the sequences of a packed row apart, .* nats"
    with pytest.raises(ConfigError, match=words):
        compare_with_single(policy, rows, PackedPlan.agreed(rows, 64), budget=64, precision="no")
    assert PackedPlan.agreed(rows.select(slice(1, 2)), 64).most_together == 1, "nothing can mix, nor be compared"


def test_a_model_that_fails_on_packed_rows_is_found_out() -> None:
    rows, policy = made_up_rows(GROUP), Policy(build("falcon", alibi=True))
    with pytest.raises(ConfigError, match=r"FalconForCausalLM fails on a packed row \(ValueError"):
        compare_with_single(policy, rows, PackedPlan.agreed(rows, 64), budget=64, precision="no")


def test_every_process_runs_the_same_forwards_of_the_comparison() -> None:
    rows, policy = made_up_rows(2 * GROUP), Policy(build("llama"))
    counts = []
    policy.register_forward_hook(lambda *_: counts.append(1))
    single = replace(rows.select(slice(0, 1)), attention_mask=torch.eye(1, WIDTH).long())
    for mine in (rows, rows.select(slice(0, 2)), rows.select(slice(0, 0)), single):
        counts.clear()
        compare_with_single(policy, mine, PackedPlan.agreed(mine, 64), budget=64, precision="no")
        assert len(counts) == 1 + NUM_COMPARED


def test_positions_are_those_of_one_row() -> None:
    policy, rows = Policy(build("llama")), made_up_rows(GROUP)
    positions = torch.arange(WIDTH).expand(GROUP, -1)
    with pytest.raises(DataError, match=r"position_ids has shape \[4, 14\].* end to end in one row"):
        policy(rows.input_ids, rows.attention_mask, position_ids=positions)
    assert tokens_of(rows, [1]).follows.all()


# ---------------------------------------------------------------- what is refused before any work


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.micro_batch_tokens=9"], r"micro_batch_tokens=9 is less than the longest prompt, \d tokens, with a"),
        (["loss=ce", "training.micro_batch_tokens=5"], r"less than the longest demonstration, \d+ tokens with its end"),
        (
            ["training.micro_batch_tokens=64", "training.micro_batch_size=8"],
            r"micro_batch_size=8 has no effect with training\.micro_batch_tokens=64, .* remove one of them",
        ),
    ],
)
def test_settings_that_cannot_work(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer_with(None, *overrides)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_a_dry_run_knows_the_budget() -> None:
    padded, packed = (trainer_with(None, *size) for size in ([], ["training.micro_batch_tokens=64"]))
    lines = _size(packed)
    what = "sequences packed without padding, 64 tokens (training.micro_batch_tokens=64)"
    assert f"a micro-batch on one process: {what}" in lines
    memory = [expected_memory(packed, 64), expected_memory(padded, 8 * 16 * 8)]
    assert any(str(memory[0]) in line for line in lines)
    assert memory[0].activations < memory[1].activations


@pytest.mark.usefixtures("_fresh_state")
def test_a_model_that_cannot_is_refused_before_any_work() -> None:
    from toolkit.training.packing_checks import check_model

    for name, words in CANNOT.items():
        with pytest.raises(ConfigError, match=rf"micro_batch_tokens=64 packs .*ForCausalLM {words}"):
            check_model(Policy(build(name)), 64)
    check_model(Policy(build("mamba")), None)
