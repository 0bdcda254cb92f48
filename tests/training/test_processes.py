"""The same run on 1, 2 and 4 processes: what is drawn, which rows a minibatch holds, losses, gradients, metrics."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.processes import run_processes
from toolkit.training.layout import minibatches, share_of

UNEVEN = [
    "rollout.prompts_per_step=10",
    "rollout.group_size=4",
    "training.minibatches=3",
    "training.micro_batch_size=7",
]
WIDE = ["model.dtype=float64", *UNEVEN]
RUNS: dict[str, list[str]] = {
    "grpo": WIDE,
    "all at once": [*WIDE, "policy_loss=gspo", "correction=mis", "kl=k3", "aggregation=prompt_mean"],
    "fewer prompts than processes": [*WIDE, "rollout.prompts_per_step=3", "warmup.batch_size=3"],
    "whole groups": [*WIDE, "policy_loss=real", "aggregation=seq_mean_token_mean"],
    "whole minibatch": [*WIDE, "policy_loss=clip_cov", "policy_loss.clip_cov_ratio=0.1", "policy_loss.cov_low=-5"],
    "rewards with KL": [*WIDE, "kl=k1_in_reward", "advantage=reinforce_pp", "rollout.skip_uniform_groups=false"],
    "order of prompts": [*WIDE, "advantage=pass_at_k", "advantage.k=2", "kl=k2", "kl_control=adaptive"],
    "nothing to learn": [*WIDE, "advantage=pass_at_k", "loss.temperature=0.7", "rollout.temperature=0.7"],
    "refilled": [
        *WIDE,
        *("rollout.prompts_per_step=7", "rollout.group_size=2", "rollout.max_sampling_rounds=3", "training.epochs=2"),
        *("advantage.level=batch", "kl=k3", "training.refresh_reference_every=2", "training.reference_mixup=0.5"),
    ],
    "refilled groups": [
        *WIDE,
        *("policy_loss=real", "aggregation=seq_mean_token_mean", "rollout.group_size=2", "training.micro_batch_size=2"),
        *(
            "rollout.max_sampling_rounds=2",
            "rollout.truncated=mask",
            "rollout.overlong_buffer=2",
            "rollout.max_new_tokens=6",
        ),
    ],
    "packed": [*WIDE[:-1], "training.micro_batch_tokens=40", "policy_loss=real", "aggregation=prompt_mean", "kl=k3"],
    "per_component": [*WIDE, "aggregation=per_component", "loss.entropy_coef=0.01"],
    "float32": UNEVEN,
}
TIMED = ("seconds", "tokens_per_second")


def test_shares_by_hand() -> None:
    assert [share_of(10, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
    assert [len(range(3)[share_of(3, rank, 4)]) for rank in range(4)] == [0, 1, 1, 1]


@pytest.mark.parametrize("unit", [1, 2])
def test_minibatches_are_those_of_one_process(unit: int) -> None:
    rows_of = [6, 0, 8, 2]
    owners = torch.arange(4).repeat_interleave(torch.tensor(rows_of))
    alone = minibatches(torch.zeros(16, dtype=torch.int64), 0, 3, Random(5), unit=unit)
    cuts = [minibatches(owners, rank, 3, Random(5), unit=unit) for rank in range(4)]
    starts = [0, 6, 6, 14]
    for number, whole in enumerate(alone):
        own = [(cuts[rank][number].local_rows + starts[rank]).tolist() for rank in range(4)]
        assert sorted(row for part in own for row in part) == sorted(whole.local_rows.tolist())
        assert all(bool((cuts[rank][number].local_rows < rows_of[rank]).all()) for rank in range(4))
        assert {cut[number].largest for cut in cuts} == {max(map(len, own))}
        assert whole.local_rows.view(-1, unit)[:, 0].remainder(unit).eq(0).all()
    assert sorted(torch.cat([cut.local_rows for cut in alone]).tolist()) == list(range(16))
    assert [cut.local_rows.tolist() for cut in minibatches(torch.arange(0), 1, 2, Random(0))] == [[], []]


def close(ours: dict[str, float], theirs: dict[str, float], *, rel: float, abs_: float) -> None:
    """Compare the metrics of one step; the same ones must be there."""
    kept = [{k: v for k, v in row.items() if k not in TIMED} for row in (ours, theirs)]
    assert kept[0] == pytest.approx(kept[1], rel=rel, abs=abs_, nan_ok=True)


def _train(rank: int, world: int, folder: str, names: list[str], steps: int) -> None:
    """Run a few steps of each of `RUNS`; the first process writes the metrics."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from toolkit.compose.build import build_config
    from toolkit.compose.tree import compose_config
    from toolkit.training.trainer import Trainer

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in names:
        config = build_config(compose_config(["task.reward=coin_flip", "task.num_heldout=11", *RUNS[name]]))
        set_seed(config.seed)
        task = config.task.build(config.seed)
        policy, tokenizer = config.model.build(task.alphabet)
        trainer = Trainer(config, Accelerator(cpu=True), task, policy, tokenizer)
        rows: list[dict[str, float]] = []
        for make in (trainer.warmup_phase, trainer.main_phase):
            phase = make()
            rows += [trainer.run_step(phase) for _ in range(steps)]
        size = sum(float(p.detach().double().square().sum()) for p in policy.parameters())
        accuracy = trainer.accuracy(task.heldout, batch_size=2)
        found[name] = [*rows, {"accuracy": accuracy, "size": size, "skipped": float(trainer.updater.num_skipped)}]
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_is_the_same_on_1_2_and_4_processes(tmp_path: Path) -> None:
    """float64: to 1e-6, and 1e-12 beside it for metrics that measure nothing but rounding, around 0.

    float32: 1e-6, and beside it 5e-7, two roundings of a log-probability between 2 and 4, in the first steps of both
    phases. Gradients differ in their last bits, and Adam divides by their size: where a gradient is rounding alone, its
    sign, and so a whole step of that weight, is chance. After 25 steps of warm-up the losses still agree to 1e-6, in
    the steps of RL that follow to 1e-5, and 20 steps later another token is drawn.
    """
    names = list(RUNS)
    steps = 3
    for world in (1, 2, 4):
        run_processes(world, _train, str(tmp_path), names, steps)
    alone, *others = [json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2, 4)]
    for found in others:
        for name in names:
            noise = 1e-12 if name != "float32" else 5e-7
            for ours, theirs in zip(found[name], alone[name], strict=True):
                close(ours, theirs, rel=1e-6, abs_=noise)
    skipped = {name: alone[name][-1]["skipped"] for name in names}
    assert skipped["nothing to learn"] == 3 * steps
    assert sum(skipped.values()) < 4 * steps
    assert alone["whole minibatch"][-1]["size"] != alone["grpo"][-1]["size"]
    assert all(row["reward"] != row["uniform_groups"] for row in alone["grpo"] if "reward" in row)
