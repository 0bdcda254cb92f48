"""Our losses in verl; skipped where verl is not installed (.ci/peers installs it).

Legend: B rows, T positions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl")

import verl
from hydra import compose, initialize_config_dir
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

import toolkit.integrations.verl.plugin
from toolkit import ConfigError
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.integrations.verl import options

ROOT = Path(toolkit.__file__).parents[1]
DUAL = "policy_loss.form=score policy_loss.clip_ratio_c=3.0"
PAIRS = {
    "vanilla": ("vanilla", "", "token-mean"),
    "gspo": ("gspo_token", "loss.log_ratio_range=[null,10]", "seq-mean-token-mean"),
    "sapo": ("sapo", "", "seq-mean-token-mean"),
    "gpg": ("gpg", "", "token-mean"),
    "cispo": ("cispo", "", "token-mean"),
    "dro": ("dro", "loss.log_ratio_range=[null,null]", "token-mean"),
    "dppo_tv": ("dppo_tv", DUAL, "token-mean"),
    "dppo_kl": ("dppo_kl", DUAL, "token-mean"),
    "kl_cov": ("kl_cov", "", "token-mean"),
    "clip_cov": ("clip_cov", "", "token-mean"),
    "geo_mean": ("gmpo", "loss.log_ratio_range=[null,null]", "seq-mean-token-mean"),
}
"""verl's loss -> ours, what to set so that they are the same, and verl's aggregation."""
EPSILON_OF_VERL = {"geo_mean": 1e-6}
"""verl adds 1e-8 to numbers of tokens there."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (options.LOSS, options.ADVANTAGE):
        monkeypatch.delenv(name, raising=False)
    options._loss_of.cache_clear()


def actor(loss_mode: str = "vanilla", **settings: Any) -> ActorConfig:
    chosen = PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.1, clip_cov_ratio=1.0, clip_cov_lb=0.1, kl_cov_ratio=0.3)
    basic = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, "clip_ratio_high": 0.28}
    return ActorConfig(**{**basic, "policy_loss": chosen, **settings})


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, width = 4, 9

    def noise(scale: float) -> torch.Tensor:
        return (scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)).to(dtype)

    mask = torch.arange(width) < torch.tensor([9, 5, 1, 7])[:, None]
    mask[0, 3:5] = False  # a tool's result
    old = -1.5 + noise(0.5)
    advantages = torch.tensor([1.0, -0.6, 0.3, -1.4], dtype=dtype)[:, None].expand(rows, width)
    return {
        "old_log_prob": old,
        "log_prob": (old + noise(0.4)).clamp(max=-0.05),
        "advantages": advantages.clone(),
        "response_mask": mask,
        "rollout_is_weights": 1 + noise(0.2),
    }


def result(name: str, mode: str, config: ActorConfig, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    log_prob = given["log_prob"].clone().requires_grad_()
    function = core_algos.get_policy_loss_fn(name)
    loss, metrics = function(**{**given, "log_prob": log_prob}, loss_agg_mode=mode, config=config)
    loss.backward()
    assert all(isinstance(value, float) for value in metrics.values())
    return loss.detach(), log_prob.grad


@pytest.mark.filterwarnings("ignore:policy loss 'kl_cov' compares", "ignore:policy loss 'clip_cov' compares")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("theirs", PAIRS)
def test_loss_and_gradient_equal_those_of_verl(
    monkeypatch: pytest.MonkeyPatch, theirs: str, dtype: torch.dtype
) -> None:
    ours, text, mode = PAIRS[theirs]
    monkeypatch.setenv(options.LOSS, text)
    given = inputs(dtype)
    tolerance = max(1e-9 if dtype == torch.float64 else 1e-6, EPSILON_OF_VERL.get(theirs, 0.0))
    if theirs == "geo_mean":  # its weights are averaged in another way
        given.pop("rollout_is_weights")
    for mine, other in zip(
        result(f"toolkit/{ours}", mode, actor(), given), result(theirs, mode, actor(), given), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 8}])
def test_every_aggregation_of_verl(mode: str, info: dict[str, int]) -> None:
    config, given = actor(), inputs()
    config.global_batch_info.update(info)
    for mine, other in zip(
        result("toolkit/vanilla", mode, config, given), result("vanilla", mode, config, given), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    given, config = inputs(), actor()
    total = int(given["response_mask"].sum())
    config.global_batch_info.update(dp_size=1, batch_num_tokens=total, global_batch_size=4)
    whole, gradient = result("toolkit/gspo", "token-mean", config, given)
    parts = [
        result("toolkit/gspo", "token-mean", config, {key: value[rows] for key, value in given.items()})
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient, rtol=1e-12, atol=1e-12)


def test_masked_positions_may_hold_anything() -> None:
    given = inputs()
    expected = result("toolkit/gspo", "seq-mean-token-mean", actor(), given)
    out = ~given["response_mask"]
    garbage = {name: given[name].masked_fill(out, float("nan")) for name in ("old_log_prob", "log_prob", "advantages")}
    loss, gradient = result("toolkit/gspo", "seq-mean-token-mean", actor(), {**given, **garbage})
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(gradient[~out], expected[1][~out], rtol=0, atol=0)


def test_an_empty_micro_batch_is_zero_with_a_graph() -> None:
    given = inputs()
    given["response_mask"] = torch.zeros_like(given["response_mask"])
    config = actor()
    config.global_batch_info.update(dp_size=1, batch_num_tokens=10, global_batch_size=4)
    loss, gradient = result("toolkit/vanilla", "token-mean", config, given)
    assert loss == 0
    assert not gradient.any()


NEEDS = {
    "ipo": "rollout_logprobs",
    "rollout_is": "rollout_logprobs",
    "opd": "teacher",
    "sdar": "teacher",
    "real": "prompts",
}


@pytest.mark.filterwarnings("ignore:policy loss")
@pytest.mark.parametrize("name", policy_loss_names())
def test_every_policy_loss_is_registered_and_runs_or_says_why_not(name: str) -> None:
    if name in NEEDS:
        with pytest.raises(ConfigError, match=NEEDS[name]):
            result(f"toolkit/{name}", "token-mean", actor(), inputs())
        return
    loss, gradient = result(f"toolkit/{name}", "token-mean", actor(), inputs())
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


def test_options_come_from_the_config_and_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = actor(clip_ratio_low=3e-4)
    assert options.loss_of("gspo", config).policy_options["cliprange_low"] == 3e-4
    assert "policy loss gspo with cliprange_low=0.0003, cliprange_high=0.28" in capsys.readouterr().out
    monkeypatch.setenv(options.LOSS, "policy_loss.cliprange_high=4e-4 loss.log_ratio_range=[null,10]")
    cfg = options.loss_of("gspo", config)
    assert cfg.policy_options["cliprange_high"] == 4e-4
    assert cfg.log_ratio_range == (None, 10)
    monkeypatch.setenv(options.LOSS, "loss=preset/verl/gspo")
    assert options.loss_of(None, config).policy.name == "gspo_token"


def test_the_settings_of_the_page_fit_the_configuration_of_verl() -> None:
    page = (ROOT / "tutorials/reference/trainers/verl.md").read_text()
    settings = re.findall(r"^(actor_rollout_ref\.\S+=\S+)$", page, flags=re.MULTILINE)
    assert len(settings) == 2
    sizes = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "algorithm.adv_estimator=toolkit/maxrl"]
    with initialize_config_dir(str(Path(verl.__file__).with_name("trainer") / "config"), version_base=None):
        cfg = compose("ppo_trainer", overrides=[*settings, *sizes])
    config = omega_conf_to_dataclass(cfg.actor_rollout_ref.actor)
    loss, _ = result(config.policy_loss.loss_mode, config.loss_agg_mode, config, inputs())
    assert loss.isfinite()
    core_algos.get_adv_estimator_fn(omega_conf_to_dataclass(cfg.algorithm).adv_estimator)


def test_another_aggregation_is_named_once() -> None:
    with pytest.warns(UserWarning, match="set actor.loss_agg_mode=seq-mean-token-mean"):
        result("toolkit/gmpo", "token-sum", actor(), inputs())


WRONG = {
    "kl=k3": ("gspo", "kl=k3 has no effect in verl; set actor.use_kl_loss"),
    "aggregation=square": ("gspo", "set actor.loss_agg_mode"),
    "policy_loss=sapo": ("gspo", "set loss_mode=toolkit, or give options alone"),
    "policy_loss.cliprnge_low=1": ("gspo", "cliprange_low"),
    "": (None, "loss_mode=toolkit needs TOOLKIT_VERL_LOSS"),
    "loss=ce": (None, "CELossConfig has no policy loss"),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_options_are_answered_in_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    name, message = WRONG[text]
    monkeypatch.setenv(options.LOSS, text)
    with pytest.raises(ConfigError) as error:
        options.loss_of(name, actor())
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# -------------------------------------------------------------------- advantages


def rewards(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]
    scores = torch.zeros(6, 5).scatter(1, mask.sum(-1, keepdim=True) - 1, torch.randn(6, 1, generator=generator))
    import numpy as np

    return {"token_level_rewards": scores, "response_mask": mask, "index": np.array(list("abaabb"))}


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "reinforce_plus_plus_baseline"])
def test_advantages_equal_those_of_verl(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ours = {"reinforce_plus_plus_baseline": "reinforce_pp_baseline"}.get(name, name)
    monkeypatch.setenv(options.ADVANTAGE, "advantage.eps=1e-6" if name == "grpo" else "")
    given = rewards()
    theirs, _ = core_algos.get_adv_estimator_fn(name)(**given, config=None)
    mine, _ = core_algos.get_adv_estimator_fn(f"toolkit/{ours}")(**given, config=None)
    mask = given["response_mask"]
    torch.testing.assert_close(mine[mask], theirs[mask].to(mine.dtype), rtol=1e-5, atol=1e-6)


def test_std_is_off_as_in_the_config_of_verl() -> None:
    from verl.trainer.config import AlgoConfig

    mine, returns = core_algos.get_adv_estimator_fn("toolkit/grpo")(
        **rewards(), config=AlgoConfig(norm_adv_by_std_in_grpo=False)
    )
    theirs, _ = core_algos.get_adv_estimator_fn("grpo")(**rewards(), norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert mine is returns


def test_wrong_options_of_an_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(options.ADVANTAGE, "policy_loss.tau=1")
    function = core_algos.get_adv_estimator_fn("toolkit/grpo")
    with pytest.raises(ConfigError, match="is not an option of an estimator"):
        function(**rewards())
    monkeypatch.delenv(options.ADVANTAGE)
    with pytest.raises(ConfigError, match="the batch has no uid"):
        function(**{**rewards(), "index": None})


# -------------------------------------------------------------------- loading


def in_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this project installed in `folder`, as its entry points say."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    info = folder / "rl_loss_toolkit-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rl-loss-toolkit\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()))
    paths = os.pathsep.join([str(folder), str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        check=False,
    )


def test_importing_verl_is_enough(tmp_path: Path) -> None:
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c; "
        "print('toolkit/gspo' in c.POLICY_LOSS_REGISTRY, 'toolkit/maxrl' in c.ADV_ESTIMATOR_REGISTRY)"
    )
    done = in_process(code, tmp_path)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_what_goes_wrong_is_printed(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise RuntimeError('no hydra here')")
    done = in_process("import verl; print('imported')", tmp_path)
    assert "imported" in done.stdout
    assert "no hydra here" in done.stderr
