"""Words people bring along from other projects: what is said of them, and that every hint is right."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import toolkit
from toolkit import ConfigError, DataError, GRPOLossConfig, LossRunner, OPDLossConfig, OrealLossConfig
from toolkit.compose.diagnosis import diagnose, unknown_choice
from toolkit.compose.overrides import parse
from toolkit.compose.schemas import conf_dir
from toolkit.compose.tree import TRAIN, check_command_line, compose_config, groups_of
from toolkit.explain.__main__ import main
from toolkit.explain.words import COMMAND, markdown
from toolkit.functional.advantages import advantage
from toolkit.functional.policy.registry import policy_loss
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.correction import CorrectionConfig
from toolkit.models.config import PretrainedConfig
from toolkit.models.lora_config import LoraConfig
from toolkit.peers import COMPUTED, VALUE, counterpart, in_python, projects, words_of
from toolkit.rollout.config import RolloutConfig
from toolkit.tasks.config import DatasetConfig
from toolkit.training.config import (
    EvaluationConfig,
    KLControlConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrackerConfig,
    TrainingConfig,
    WarmupConfig,
)

PAGE = Path(toolkit.__file__).parents[1] / "tutorials/reference/words.md"
CLIP = "try: policy_loss.cliprange_low=0.2 policy_loss.cliprange_high=0.2"
KL = "kl=k3_is_corrected loss.kl_loss_coef=0.1"
DAPO = "policy_loss=vanilla aggregation=token_mean policy_loss.cliprange_high=0.28 (dapo of papers)"


def said_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_command_line(overrides)
    return str(caught.value)


@functools.cache
def composed() -> DictConfig:
    return compose_config([])


def diagnosis_of(override: str) -> str:
    """What `said_of` returns for a wrong key or choice, without composing for every case."""
    parsed, groups = parse([override]), groups_of(TRAIN)
    return unknown_choice(parsed, groups) or diagnose(parsed, groups, composed()) or "unclear"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("policy_loss=dapo", f"policy_loss=dapo is not a choice of policy_loss; try: {DAPO}; or loss=preset/trl/dapo"),
        ("loss=dapo", f"loss=dapo is not a choice of loss; try: {DAPO}; or loss=preset/trl/dapo (dapo of TRL)"),
        (
            "loss=gspo",
            "try: policy_loss=gspo aggregation=seq_mean_token_mean (gspo of papers); or loss=preset/verl/gspo",
        ),
        ("loss=dr_grpo", "advantage=dr_grpo (dr_grpo of papers); or loss=preset/trl/dr_grpo (dr_grpo of TRL)"),
        ("loss=topr", "loss=topr is not a choice of loss; try: policy_loss=topr"),
        ("policy_loss=ppo", "policy_loss=ppo is not a choice of policy_loss; try: policy_loss=vanilla (ppo of papers)"),
        ("policy_loss=rloo", "try: advantage=rloo (rloo of papers)"),
        (
            "lr=1e-5",
            "lr is not a setting; try: optimizer.lr=1e-5 (lr of papers, verl, OpenRLHF and prime-rl; warmup.lr",
        ),
        ("beta=0.1", f"beta is not a setting; try: {KL}, or kl=k1_in_reward kl_control.reward_coef=0.1 (beta of TRL;"),
        ("loss.beta=0.1", f"loss.beta is not a setting; try: {KL}, or "),
        ("epsilon=0.2", f"epsilon is not a setting; {CLIP} (epsilon of TRL and ms-swift)"),
        ("epsilon_high=0.28", "try: policy_loss.cliprange_high=0.28, or policy_loss=cispo policy_loss.weight_max=0.28"),
        ("clip_ratio=0.2", f"clip_ratio is not a setting; {CLIP} (clip_ratio of verl)"),
        ("actor_rollout_ref.actor.clip_ratio=0.2", f"{CLIP} (clip_ratio of verl)"),
        ("eps_clip=0.2", f"eps_clip is not a setting; {CLIP} (actor.eps_clip of OpenRLHF)"),
        ("policy_loss.eps=0.2", f"policy_loss.eps is not a setting; {CLIP} (eps of papers)"),
        ("num_generations=8", "try: rollout.group_size=8 (num_generations of TRL and ms-swift)"),
        ("n=8", "n is not a setting; try: rollout.group_size=8 (rollout.n of verl)"),
        ("group_size=8", "try: rollout.group_size=8 (group_size of papers and prime-rl)"),
        ("max_completion_length=100", "try: rollout.max_new_tokens=100 (max_completion_length of TRL and ms-swift)"),
        ("model=Qwen/Qwen3-0.6B", "try: model=pretrained model.path=Qwen/Qwen3-0.6B"),
        ("model_name_or_path=Qwen/Qwen3-0.6B", "try: model=pretrained model.path=Qwen/Qwen3-0.6B (model_name_or_path"),
        ("lora_r=8", "lora_r is not a setting; try: model=pretrained model.lora.r=8 (lora_r of TRL)"),
        ("loss_agg_mode=token-mean", "try: aggregation=token_mean (loss_agg_mode of verl"),
        ("aggregation=token-mean", "try: aggregation=token_mean (token-mean of verl and OpenRLHF)"),
        ("loss_type=dapo", "try: loss=preset/trl/dapo, or aggregation=token_mean (loss_type of TRL)"),
        ("loss_type=bnpo", "try: loss=preset/trl/bnpo, or aggregation=token_mean (loss_type of TRL)"),
        ("loss_type=grpo", "try: loss=preset/trl/grpo, or aggregation=seq_mean_token_mean (loss_type of TRL)"),
        ("loss_type=dr_grpo", "or aggregation=constant loss.aggregation.length=512 (loss_type of TRL)"),
        ("importance_sampling_level=sequence", "try: policy_loss=gspo, or loss=preset/trl/gspo"),
        ("kl_loss_type=k3+", "try: kl=k3_straight_through (kl_loss_type of verl)"),
        ("kl=k3+", "kl=k3+ is not a choice of kl; try: kl=k3_straight_through (k3+ of verl)"),
        ("advantage=group_norm", "try: advantage=grpo (group_norm of OpenRLHF)"),
        ("sync_ref_model=true", "try: kl=k3 training.refresh_reference_every=512 training.reference_mixup=0.6"),
        ("loss_type=fipo", "try: loss=preset/ms_swift/fipo, or policy_loss=fipo (loss_type of ms-swift)"),
        ("loss_type=dr_grpo", "or loss=preset/ms_swift/dr_grpo loss.aggregation.length=512 (loss_type of ms-swift;"),
        ("loss_type=cispo", "or loss=preset/ms_swift/cispo loss.policy_loss_cfg.weight_max=... (loss_type of ms-"),
        ("importance_sampling_level=sequence_token", "try: loss=preset/ms_swift/gspo_token, or policy_loss=gspo_token"),
        ("rollout_importance_sampling_mode=token_truncate", "try: correction=tis (rollout_importance_sampling_mode of"),
        ("rollout_importance_sampling_mode=unheard_of", "its value: python -m toolkit.explain --from ms_swift"),
        ("correction=sequence_truncate", "; or loss=preset/ms_swift/grpo_seq_is (sequence_truncate of ms-swift"),
        ("fipo_clip_range=null", "try: policy_loss=fipo policy_loss.weight_range=null (fipo_clip_range of ms-swift)"),
        ("sdar_loss_coef=0.1", "sdar_loss_coef of ms-swift has no counterpart: SDAR is a loss by itself"),
        ("overlong_filter=true", "try: rollout.truncated=mask (overlong_filter of ms-swift"),
        ("loss=preset/ms-swift/gspo", "is not a choice of loss; try: loss=preset/ms_swift/gspo"),
        ("loss=preset/swift/gspo", "is not a choice of loss; try: loss=preset/ms_swift/gspo"),
        ("loss=Prime-RL/ipo", "is not a choice of loss; try: loss=preset/prime_rl/ipo"),
        ("loss=preset/ms-swift/ppo", "is not a choice of loss; try: loss=preset/ms_swift/grpo"),
        ("loss=preset/OpenRLHF/gspoo", "'preset/openrlhf/ppo_tis'; try: loss=preset/openrlhf/gspo"),
        ("loss=preset/mine/gspo", "is not a choice of loss: choose 'ce', 'grpo', 'opd', 'oreal', 'preset/areal/...'"),
        ("loss_type=unheard_of", "it depends on its value: python -m toolkit.explain --from trl"),
    ],
)
def test_what_the_command_line_says(override: str, sentence: str) -> None:
    assert sentence in diagnosis_of(override)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("policy_loss=dapo", f"policy_loss=dapo is not a choice of policy_loss; try: {DAPO}"),
        ("epsilon=0.2", f"epsilon is not a setting; {CLIP} (epsilon of TRL and ms-swift)"),
        ("+epsilon=0.2", f"epsilon is not a setting; {CLIP} (epsilon of TRL and ms-swift)"),
        ("+loss.beta=0.1", f"loss.beta is not a setting of loss; try: {KL}"),
        ("correction=tis,geo_rs", "names several values; write correction=[tis,geo_rs] to apply all, or add -m"),
    ],
)
def test_a_whole_command_line_says_it(override: str, sentence: str) -> None:
    assert sentence in said_of(override)


def test_two_meanings_of_a_word_are_both_named() -> None:
    said = said_of("eps=0.1")
    assert "policy_loss.cliprange_high=0.1 (eps of papers)" in said
    assert "policy_loss=ipo policy_loss.threshold=0.1 (loss.eps of prime-rl" in said
    assert "advantage.eps=0.1 (advantage_estimator_config.eps of XTuner)" in said


def test_a_preset_has_the_options_of_its_policy_loss_inside() -> None:
    assert "try: loss.policy_loss_cfg.cliprange_low=0.2 loss.policy_loss_cfg.cliprange_high=0.2" in said_of(
        "loss=preset/trl/dapo", "epsilon=0.2"
    )


def test_an_option_that_the_chosen_loss_lacks_is_not_suggested() -> None:
    assert "cliprange" not in said_of("policy_loss=reinforce", "epsilon=0.2")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"epsilon": 0.2},
            "epsilon is not a setting of GRPOLossConfig; try: policy_loss_cfg=dict(loss_type='vanilla', "
            "cliprange_low=0.2, cliprange_high=0.2) (epsilon of TRL and ms-swift)",
        ),
        ({"beta": 0.1}, "try: use_kl_loss=True, kl_loss_type='k3', kl_gradient='is_corrected', kl_loss_coef=0.1"),
        ({"lr": 1e-5}, "try: on the command line optimizer.lr=1e-05"),
        ({"num_generations": 8}, "try: on the command line rollout.group_size=8"),
        ({"loss_agg_mode": "token-mean"}, "try: aggregation='token_mean' (loss_agg_mode of verl and OpenRLHF)"),
        ({"loss_type": "dapo"}, "try: LossRunner.from_overrides(['loss=preset/trl/dapo']).loss_cfg, or aggregation="),
        (
            {"top_p": 0.9},
            "top_p of TRL, verl, OpenRLHF and ms-swift has no counterpart: completions are drawn from the whole",
        ),
        (
            {"policy_loss_cfg": {"loss_type": "gspo", "epsilon": 0.2}},
            "policy_loss_cfg.epsilon is not a setting of policy_loss_cfg; try: cliprange_low=0.2, cliprange_high=0.2",
        ),
        (
            {"policy_loss_cfg": {"loss_type": "dapo"}},
            "loss_type='dapo' is not a policy loss; try: policy_loss_cfg=dict(",
        ),
        ({"policy_loss_cfg": {"loss_type": "ppo"}}, "try: policy_loss_cfg=dict(loss_type='vanilla') (ppo of papers)"),
        ({"aggregation": "token-mean"}, "try: aggregation='token_mean' (token-mean of verl and OpenRLHF)"),
        (
            {"use_kl_loss": True, "kl_loss_type": "k3+"},
            "kl_loss_type='k3', kl_gradient='straight_through' (k3+ of verl)",
        ),
    ],
)
def test_what_a_config_class_says(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GRPOLossConfig(**fields)
    assert sentence in str(caught.value)


def test_other_config_classes_and_runner_calls_say_it_too() -> None:
    with pytest.raises(ConfigError, match=r"try: group_size=8 \(num_generations of TRL and ms-swift\)"):
        RolloutConfig(num_generations=8)
    with pytest.raises(ConfigError, match=r"try: lr=1e-05 \(learning_rate of papers, TRL and ms-swift\)"):
        OptimizerConfig(learning_rate=1e-5)
    with pytest.raises(DataError, match=r"'epsilon' is not a field of a batch but a setting .*cliprange_low=0\.2"):
        LossRunner(GRPOLossConfig())(torch.zeros(1, 2, 3), torch.zeros(4, 3), epsilon=0.2)
    with pytest.raises(ConfigError, match=r"try: optimizer\.lr=1e-5"):
        LossRunner.from_overrides(["lr=1e-5"])


# ---------------------------------------------------------------- every hint is right

SECTIONS = {
    "rollout": RolloutConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "tracker": TrackerConfig,
    "warmup": WarmupConfig,
    "kl_control": KLControlConfig,
    "model": PretrainedConfig,
    "task": DatasetConfig,
}
LOSSES = {"grpo": GRPOLossConfig, "oreal": OrealLossConfig, "opd": OPDLossConfig}


def ways() -> Iterator[tuple[str, str, str]]:
    """Every project, word, and way to write it here, with an example of its value."""
    for key, project in projects().items():
        for word in project.words:
            for answer in (word.answer, *word.values.values()):
                for way in answer.ways:
                    yield key, word.name, way.replace(VALUE, word.example).replace(COMPUTED, word.example)


def settings_of(section: str, chosen: dict[str, str]) -> set[str]:
    if section == "policy_loss":
        return {*policy_loss(chosen.get("policy_loss", "vanilla")).options_model.model_fields}
    if section == "advantage":
        return {*advantage(chosen.get("advantage", "grpo")).options_model.model_fields}
    if section == "loss":
        return {*LOSSES[chosen.get("loss", "grpo")].model_fields}
    return {*SECTIONS[section].model_fields}


def assert_exists(way: str, groups: dict[str, list[str]]) -> None:
    pairs = [token.partition("=")[::2] for token in shlex.split(way)]
    chosen = dict(pairs)
    for key, value in pairs:
        section, _, name = key.removeprefix("++").partition(".")
        if not name:
            assert all(choice in groups[key] for choice in value.strip("[]").split(",")), way
        elif key.removeprefix("++").startswith("loss.correction."):
            fields = re.findall(r"(\w+):", value) or [key.rpartition(".")[2]]
            assert {*fields} <= {*CorrectionConfig.model_fields}, way
        elif key.startswith("model.lora."):
            assert key.rpartition(".")[2] in LoraConfig.model_fields, way
        elif key.startswith("loss.policy_loss_cfg."):
            name = OmegaConf.load(f"{conf_dir()}/loss/{chosen['loss']}.yaml").policy_loss_cfg.loss_type
            assert key.rpartition(".")[2] in policy_loss(name).options_model.model_fields, way
        elif key.startswith("loss.aggregation."):
            assert key.rpartition(".")[2] in AggregationConfig.model_fields, way
        else:
            assert key == "hydra.run.dir" or name in settings_of(section, chosen), way


def test_every_counterpart_exists() -> None:
    groups = groups_of(TRAIN)
    every = {way for *_, way in ways()}
    assert len(every) > 150
    for way in every:
        assert_exists(way, groups)


def test_a_wrong_counterpart_is_noticed() -> None:
    groups = groups_of(TRAIN)
    options = ("policy_loss=gspo policy_loss.tau=1", "loss=preset/ms_swift/cispo loss.policy_loss_cfg.tau=1")
    for wrong in ("policy_loss.cliprange=1", *options, "loss=preset/trl/ppo", "kl=k9"):
        with pytest.raises(AssertionError):
            assert_exists(wrong, groups)


def test_what_remarks_name_exists() -> None:
    groups = groups_of(TRAIN)
    for project in projects().values():
        for word in project.words:
            for answer in (word.answer, *word.values.values()):
                text = f"{answer.no} {answer.remark}"
                for group, choice in re.findall(rf"\b({'|'.join(groups)})=([\w/]+)", text):
                    assert choice in groups[group], text
                for section, name in re.findall(rf"\b({'|'.join(SECTIONS)}|loss|policy_loss)\.([a-z_]\w+)", text):
                    known = settings_of(section, {}) | {*OPDLossConfig.model_fields, "dtype"}
                    assert name in known, text


def unset(way: str) -> list[str]:
    """What a way leaves to the user: settings without a default."""
    needed = {"model.path": "model=pretrained", "task.path": "task=jsonl", "task.reward": "task=jsonl"}
    value = {"task.reward": "exact_match"}
    return [f"{key}={value.get(key, 'x')}" for key, choice in needed.items() if choice in way and f"{key}=" not in way]


@pytest.mark.slow
def test_every_counterpart_is_accepted_and_is_the_same_in_python() -> None:
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for way in sorted({way for *_, way in ways()}):
            try:
                (config,) = check_command_line([*shlex.split(way), *unset(way)]).configs
            except ConfigError as error:
                wrong.append(f"{way}: {error}")
                continue
            keywords = in_python(way)
            if keywords.startswith("LossRunner"):
                made = eval(keywords)
            elif keywords.startswith("on the command line"):
                continue
            else:
                made = eval(f"GRPOLossConfig({keywords})")
                usual = {"use_entropy_metric": True, "mode": "chunk"}  # of the command
                usual |= {} if "eager" in keywords else {"chunk_size": "auto"}
                made = made.model_copy(update={k: v for k, v in usual.items() if f"{k}=" not in keywords})
            if made != config.loss:
                wrong.append(f"{way}: {keywords} is another loss")
    assert not wrong


def test_every_keyword_of_the_python_form_is_accepted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {in_python(way) for *_, way in ways()}
        keywords = {each for each in made if not each.startswith(("on the command line", "LossRunner"))}
        assert len(keywords) > 50
        for each in keywords:
            eval(f"GRPOLossConfig({each})")


def test_every_field_of_trls_configs_is_in_the_table() -> None:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    if words_of("trl").version != importlib.metadata.version("trl"):
        pytest.skip("the table is of another version of TRL")
    fields = set()
    for name in ("grpo_config", "rloo_config"):
        text = Path(spec.origin).parent.joinpath("trainer", f"{name}.py").read_text()
        fields |= set(re.findall(r"^    (\w+): .* = field\($", text, flags=re.MULTILINE))
    project = words_of("trl")
    assert len(fields) > 70
    assert not fields - {word.name for word in project.words} - {*project.left_out}


def test_words_and_values_are_listed_once() -> None:
    for project in projects().values():
        names = [word.name for word in project.words]
        assert len(names) == len(set(names))
        for word in project.words:
            assert word.answer.ways or word.answer.no or word.values, word.name
            assert not (word.answer.ways and word.answer.no), word.name


# ---------------------------------------------------------------- the tables


def printed(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["toolkit-explain", *arguments])
    main()
    return capsys.readouterr().out


def test_the_words_of_a_project_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed("--from", "trl", capsys=capsys, monkeypatch=monkeypatch)
    assert text.startswith("TRL 1.16.0: trl/trainer/grpo_config.py")
    assert re.search(r"^  epsilon +policy_loss.cliprange_low=... policy_loss.cliprange_high=...$", text, re.MULTILINE)
    assert re.search(r"^  loss_type=dapo +loss=preset/trl/dapo\n +or aggregation=token_mean$", text, re.MULTILINE)
    assert "(no counterpart: the entropy bonus is a fixed loss.entropy_coef)" in text
    assert printed("--from", "prime-rl", capsys=capsys, monkeypatch=monkeypatch).startswith("prime-rl main")
    assert printed("--from", "ms-swift", capsys=capsys, monkeypatch=monkeypatch).startswith("ms-swift 4.6.0: swift/")
    some = printed("--from", "trl", "epsilon", capsys=capsys, monkeypatch=monkeypatch).splitlines()
    assert [line for line in some if line.startswith("  epsilon ")]
    assert all("epsilon" in line for line in some[1:] if not line.startswith("   "))
    every = printed("--from", "all", capsys=capsys, monkeypatch=monkeypatch)
    for project in projects().values():
        assert f"{project.version}: {project.read}" in every


def test_an_unknown_project_lists_the_known_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["toolkit-explain", "--from", "trk"])
    with pytest.raises(SystemExit):
        main()
    assert (
        "--from trk: no such project; choose 'papers', 'trl', 'verl', 'openrlhf', 'prime_rl', 'xtuner', 'ms_swift' "
        "or 'all' (did you mean 'trl'?)"
    ) in capsys.readouterr().err


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == markdown(), f"run: {COMMAND}"


def test_writing_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "words.md"
    printed("--from", "all", "--markdown", str(path), capsys=capsys, monkeypatch=monkeypatch)
    assert path.read_text() == markdown()
    page = printed("--from", "verl", "--markdown", capsys=capsys, monkeypatch=monkeypatch)
    assert "| `clip_ratio` | `policy_loss.cliprange_low=... policy_loss.cliprange_high=...` | - |" in page
    assert "TRL" not in page


@pytest.mark.slow
def test_a_configuration_without_a_mistake_does_not_load_the_table() -> None:
    code = (
        "import sys\nfrom toolkit.compose.tree import check_command_line\nfrom toolkit import GRPOLossConfig\n"
        "check_command_line(['policy_loss=gspo', 'kl=k3'])\nGRPOLossConfig(policy_loss_cfg=dict(loss_type='sapo'))\n"
        "assert 'toolkit.peers' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", ["it's", "a b", 'a"', "\\", "x" * 100])
def test_a_value_that_a_shell_would_cut_is_not_repeated(value: str) -> None:
    assert counterpart("num_generations", value) == "try: rollout.group_size=... (num_generations of TRL and ms-swift)"
    with pytest.raises(ConfigError, match=r"try: on the command line rollout\.group_size=\.\.\. "):
        GRPOLossConfig(num_generations=value)


def test_nothing_is_said_of_a_word_that_nobody_uses() -> None:
    assert counterpart("unheard_of", "1") is None
