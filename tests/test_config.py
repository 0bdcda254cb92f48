"""The command line: choices, keys, types and ranges are checked without torch, and the answer names what would work."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.conftest import slow_unless
from tests.processes import run_module
from toolkit import ConfigError, GRPOLossConfig
from toolkit.compose.build import build_config, build_loss
from toolkit.compose.overrides import LOSS_GROUPS
from toolkit.compose.plugins import load_plugins
from toolkit.compose.schemas import BEHAVIOUR, SCHEMAS, conf_dir
from toolkit.compose.tree import check_command_line, compose_config, load_loss
from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.policy import registry
from toolkit.training.config import TRAINING_HAS
from toolkit.training.run_config import RunConfig

CONF = Path(conf_dir())
EXPERIMENTS = [
    f"{group}={path.stem}" for group in ("experiment", "debug") for path in sorted((CONF / group).glob("*.yaml"))
]


def test_no_overrides() -> None:
    config = build_config(compose_config([]))
    assert isinstance(config, RunConfig)
    assert config.loss == GRPOLossConfig(use_entropy_metric=True, mode="chunk", chunk_size="auto")


def test_the_documented_command_line() -> None:
    overrides = ["loss=grpo", "policy_loss=vanilla", "kl=k3", "mode=chunk", "loss.chunk_size=256"]
    loss = build_config(compose_config(overrides)).loss
    assert isinstance(loss, GRPOLossConfig)
    assert (loss.use_kl_loss, loss.kl_loss_type, loss.mode, loss.chunk_size) == (True, "k3", "chunk", 256)


FOR_OWN_LOOPS = (
    *("kl=top_k", "kl=full", "policy_loss=opd", "policy_loss=sdar", "loss=opd"),
    *(f"advantage={name}" for name in advantage_names() if not set(advantage(name).needs) <= set(TRAINING_HAS)),
)
"""Choices that read what the training command does not make: a teacher, whole distributions, a critic."""


@pytest.fixture(scope="module")
def usual() -> RunConfig:
    return build_config(compose_config([]))


@pytest.mark.parametrize(
    "group",
    slow_unless(
        lambda _, group: group not in ("policy_loss", "advantage", "kl", "correction"),
        sorted({path.name for path in CONF.iterdir() if path.is_dir()} - {"bench", "launch"}),
    ),
)
def test_every_choice_of_every_group_composes(group: str, usual: RunConfig) -> None:
    extra = {
        "pretrained": ["model.path=x"],
        "adaptive": ["kl=k2"],
        "jsonl": ["task.path=x", "task.reward=numeric"],
        "sft": ["task.path=x", "loss=ce"],
        "reasoning_gym": ["task.name=gcd"],
    }
    if group == "aggregation":
        extra = {"constant": ["loss.aggregation.length=5"]}
    if group == "experiment":
        extra = {"lora": ["model.path=x"], "sft": ["task.path=x", "model.path=x"]}
    for path in (CONF / group).glob("*.yaml"):
        choice = f"{group}={path.stem}"
        overrides = [choice, *extra.get(path.stem, [])]
        if group in LOSS_GROUPS and not path.stem.endswith("_in_reward"):
            built = functools.partial(RunConfig, **{**dict(usual), "loss": load_loss(overrides)})
        else:
            built = functools.partial(build_config, compose_config(overrides))
        if choice not in FOR_OWN_LOOPS:
            built()
            continue
        with pytest.raises(ConfigError, match="in your training loop"):
            built()


@pytest.mark.parametrize("preset", EXPERIMENTS)
def test_presets_name_the_command_that_runs_them(preset: str) -> None:
    group, name = preset.split("=")
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    assert lines[:2] == ["# @package _global_", f"# toolkit-train {preset}"]


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        (
            "grpo",
            {"loss.kl_loss_coef": 0.04, "loss.aggregation.name": "seq_mean_token_mean", "training.minibatches": 1},
        ),
        ("dapo", {"loss.policy_loss_cfg.cliprange_low": 0.2, "loss.policy_loss_cfg.cliprange_high": 0.28}),
        ("dapo", {"loss.aggregation.name": "token_mean", "loss.use_kl_loss": False, "training.minibatches": 16}),
        ("gspo", {"loss.policy_loss_cfg.cliprange_low": 3e-4, "loss.policy_loss_cfg.cliprange_high": 4e-4}),
        ("gspo", {"loss.aggregation.name": "seq_mean_token_mean", "training.minibatches": 4}),
        ("cispo", {"loss.policy_loss_cfg.loss_type": "cispo", "optimizer.betas": [0.9, 0.95]}),
        ("rloo", {"advantage.estimator": "rloo", "kl_control.reward_type": "k1", "loss.use_kl_loss": False}),
        ("reinforce_pp", {"advantage.estimator": "reinforce_pp", "kl_control.reward_type": "k1"}),
        ("dr_grpo", {"advantage.estimator": "dr_grpo"}),
    ],
)
def test_recipes_have_the_published_numbers(recipe: str, published: dict[str, Any]) -> None:
    cfg = compose_config([f"experiment={recipe}"])
    build_config(cfg)
    assert {key: OmegaConf.select(cfg, key) for key in published} == published


def test_every_yaml_starts_with_a_title() -> None:
    for path in CONF.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), path


def test_defaults_live_in_the_classes_only() -> None:
    """A choice named like its class's default adds nothing; no value of a class stands in a YAML file again."""
    for schema in SCHEMAS:
        defaults = schema.defaults()
        for path in CONF.glob("[!ed]*/*.yaml"):
            text = path.read_text()
            if f"/schema/{schema.__name__}@" in text:
                stated = OmegaConf.to_container(OmegaConf.load(path))
                assert isinstance(stated, dict)
                repeated = {k for k, v in stated.items() if k in defaults and v == defaults[k]}
                assert not repeated, (path, repeated)


def test_every_field_of_every_config_is_explained() -> None:
    for schema in (*SCHEMAS,):
        for name, field in schema.model_fields.items():
            assert field.description, f"{schema.__name__}.{name}"


def test_oreal_takes_the_bypass_too() -> None:
    cfg = build_loss(compose_config(["loss=oreal", "correction=bypass"]))
    assert cfg.policy_loss_cfg["anchor"] == "rollout"  # type: ignore[attr-defined]


def test_a_preset_gives_way_to_what_is_said_beside_it() -> None:
    plain = build_loss(compose_config(["loss=preset/liger/grpo", "kl=none"]))
    assert not plain.use_kl_loss  # type: ignore[attr-defined]
    assert not build_loss(compose_config(["loss=preset/verl/reinforce", "correction=none"])).correction  # type: ignore[attr-defined]
    other = build_loss(compose_config(["loss=preset/verl/vanilla", "loss.policy_loss_cfg.anchor=rollout"]))
    assert other.policy_loss_cfg["anchor"] == "rollout"  # type: ignore[attr-defined]


WRONG = [
    (
        ["loss=grop"],
        "loss=grop is not a choice of loss: choose 'ce', 'grpo', 'opd', 'oreal' or 'preset/<peer>/<name>'; "
        "try: loss=grpo",
    ),
    (["loss.chunk_sz=3"], "try: loss.chunk_size=3"),
    (["loss=preset/trl/grpo", "correction=bypass"], "write loss.policy_loss_cfg.anchor=rollout"),
    (["correction=bypass", "policy_loss=reinforce"], "policy loss 'reinforce' has no option 'anchor'"),
    (["correction=[tis,tis]"], "name each correction once"),
    (["loss=preset/verl/vanilla", "policy_loss.delta=4"], "change its options with loss.policy_loss_cfg.delta=..."),
    (["loss=preset/verl/vanilla", "loss.policy_loss_cfg.anchr=rollout"], "did you mean 'anchor'?"),
    (["aggregation=constant"], "aggregation=constant loss.aggregation.length=1024"),
    (["loss=opd", "loss.teacher=reference", "advantage=rloo"], "OPDLossConfig does not read advantages"),
    (
        ["loss.mode=chnk"],
        "loss.mode='chnk' is not one of the choices; choose 'eager' or 'chunk' (did you mean 'chunk'?)",
    ),
    (["policy_loss.cliprange_low=-1"], "policy_loss.cliprange_low=-1 is not allowed"),
    (["training.steps=abc"], "training.steps='abc' is not allowed"),
    (["training.steps=2.5"], "training.steps=2.5 is not allowed"),
    (["trainng.steps=3"], "try: training.steps=3"),
    (["chunk_size=3"], "try: loss.chunk_size=3"),
    (["los=ce"], "try: loss=ce"),
    (["policy_loss=vanila"], "try: policy_loss=vanilla"),
    (["policy_loss.cliprange_lo=0.1"], "try: policy_loss.cliprange_low=0.1"),
    (["policy_loss.clip_ratio_c=0.5"], "policy_loss.clip_ratio_c=0.5 is not allowed"),
    (["experiment=grpokl"], "try: experiment=grpo_kl"),
    (["model=pretrained"], "model.path has no default; set it: model.path=..."),
    (["loss=ce", "policy_loss.cliprange_low=0.1"], "has no effect"),
    (["loss=ce", "kl=k3"], "kl=k3 has no effect"),
    (["loss=ce", "advantage=rloo"], "CELossConfig does not read advantages"),
    (["+loss.new=1"], "loss.new is not a setting of loss"),
    (["seed=-1"], "seed"),
    (["task=3"], "task=3 is not a choice of task"),
    (["plugins=[nothing.py]"], "nothing.py"),
    (["foo"], "key.subkey=value or group=choice"),
    (["loss=null"], "loss=null is not a choice of loss"),
    (["kl=null"], "kl=null: leave it out"),
    (["+foo=1"], "foo is not a setting"),
    (["loss._target_=os.system"], "loss._target_='os.system' is not a class"),
    (["loss._target_=foo.Bar"], "loss._target_='foo.Bar' is not a class"),
    (["loss.policy_loss_cfg.clip_low=3"], "write policy_loss=<name> and policy_loss.clip_low=..."),
    (["experiment=grpo_kl,dr_grpo"], "add -m"),
    (["model.num_heads=3"], "must be an even number"),
    (["optimizer.betas=[2,3]"], "optimizer.betas"),
    (["rollout.group_size=0"], "rollout.group_size=0 is not allowed"),
    (["rollout.group_size=1"], "advantage=grpo compares the completions of one prompt, but rollout.group_size=1"),
    (["advantage=gae"], "advantage=gae needs 'values', which the training command does not provide"),
    (["advantage=grop"], "try: advantage=grpo"),
    (["advantage.stdd=none"], "try: advantage.std=none"),
    (["advantage.std=non"], "try: advantage.std=none"),
    (["advantage=pass_at_k", "advantage.k=0"], "advantage.k=0 is not allowed"),
    (["+advantage.new=1"], "advantage.new is not a setting of advantage"),
    (["loss.ignore_idx=5"], "is the id of a token"),
    (["loss.softcap=30"], "loss.logit_scale and loss.softcap are for your training loops"),
    (["loss.chunk_size=big"], "loss.chunk_size='big' is not allowed: it must be a number of tokens above 0, or 'auto'"),
    (["loss.temperature=0.5"], "rollout.temperature=1.0 but loss.temperature=0.5"),
    (["steps=3"], "try: training.steps=3"),
    (["experiment=null"], "leave it out"),
    (["optimizer.lr=inf"], "optimizer.lr=inf is not allowed"),
    (["seed=99999999999"], "seed"),
    (["loss.mode=chnk"], "try: loss.mode=chunk"),
    (["policy_loss.cliprange_low=2"], "policy_loss.cliprange_low=2 is not allowed"),
    (["training.micro_batch_size=0"], "training.micro_batch_size=0 is not allowed"),
    (["loss.loss_reduction=token"], "loss.loss_reduction is not a setting"),
]


@pytest.mark.parametrize(
    ("overrides", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_overrides(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command_line(overrides)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
def test_composing_again_and_again() -> None:
    for _ in range(3):
        assert compose_config(["seed=3"]).seed == 3


def test_composing_inside_a_program_that_uses_hydra_itself(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(config_dir=str(tmp_path), **BEHAVIOUR):
        assert compose_config(["seed=3"]).seed == 3
        assert compose("app").x == 1  # and it finds its own Hydra as it was


def test_several_processes_take_one_job_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is above 1; start each job separately"):
        check_command_line(["seed=0,1"], multirun=True)


@pytest.mark.slow
def test_multirun_jobs_are_checked_one_by_one() -> None:
    check_command_line(["seed=0,1", "loss=grpo,ce"], multirun=True)
    with pytest.raises(ConfigError, match="try: loss=grpo"):
        check_command_line(["seed=0,1", "loss=ce,grop"], multirun=True)


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("toolkit.train", *arguments)


@pytest.mark.parametrize(
    "wrong", ["loss=grop", "loss.chunk_sz=3", "loss.mode=chnk", "policy_loss.cliprange_low=-1", "training.steps=abc"]
)
def test_process_ends_with_one_readable_message(wrong: str) -> None:
    done = train(wrong)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_errors_need_no_torch() -> None:
    code = (
        "import sys; from toolkit.compose.tree import check_command_line\n"
        "try: check_command_line(['loss=grpo', 'policy_loss.cliprange_low=-1'])\n"
        "except ValueError: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_help_and_cfg() -> None:
    done = train("--help")
    assert done.returncode == 0
    assert f"policy_loss: {', '.join(registry.policy_loss_names())}" in " ".join(done.stdout.split())
    assert "schema" not in done.stdout.split("== Configuration")[0]
    assert "kl: abs, full, k1, k1_in_reward," in done.stdout
    done = train("--cfg", "job", "--resolve", "kl=k3")
    assert done.returncode == 0
    assert OmegaConf.create(done.stdout).loss.kl_loss_type == "k3"


@pytest.mark.slow
def test_shell_completion_of_the_console_script() -> None:
    script = Path(sys.executable).with_name("toolkit-train")
    installed = subprocess.run([script, "-sc", "install=bash"], capture_output=True, text=True, check=True)
    assert "toolkit-train" in installed.stdout
    query = f'COMP_LINE="{script} loss=" {script} -sc query=bash'
    found = subprocess.run(["bash", "-c", query], capture_output=True, text=True, check=True)
    assert {"loss=grpo", "loss=ce"} <= set(found.stdout.split())


def test_a_plugin_s_loss_is_a_typed_choice(tmp_path: Path) -> None:
    plugin = tmp_path / "my_plugin_loss.py"
    plugin.write_text(
        "import torch\nfrom toolkit import register_policy_loss\n\n"
        "@register_policy_loss('my_plugin_ppo')\ndef f(t, *, eps: float = 0.2):\n    return -t.ratio() * t.advantages\n"
    )
    for overrides, expected in (
        (["policy_loss.eps=0.3", "--cfg", "job", "--resolve"], "eps: 0.3"),
        (["policy_loss.epss=0.3"], "try: policy_loss.eps=0.3"),
        (["policy_loss.eps=x"], "policy_loss.eps='x' is not allowed"),
    ):
        done = train(f"plugins=[{plugin}]", "policy_loss=my_plugin_ppo", *overrides)
        assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import nowhere_to_be_found\n", "No module named 'nowhere_to_be_found'"),
        ("1 / 0\n", "broken_plugin.py:1"),
        ("import sys\nsys.exit(0)\n", "broken_plugin.py' cannot be loaded: SystemExit: 0 ("),
    ],
)
def test_broken_plugins_are_named(tmp_path: Path, source: str, words: str) -> None:
    plugin = tmp_path / "broken_plugin.py"
    plugin.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(plugin)])
    assert words in str(caught.value)


def test_a_plugin_that_changed_is_loaded_again(tmp_path: Path) -> None:
    plugin = tmp_path / "random.py"  # a name that is taken in the standard library
    for option in ("first", "second"):
        plugin.write_text(
            "from toolkit import register_policy_loss\n@register_policy_loss('changing')\n"
            f"def f(t, *, {option}: float = 0.2):\n    return t.logprobs\n"
        )
        os.utime(plugin, ns=(0, len(option)))
        check_command_line([f"plugins=[{plugin}]", "policy_loss=changing", f"policy_loss.{option}=0.5"])


@pytest.mark.slow
def test_own_configuration_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 77\n")
    done = train("--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job")
    assert "seed: 77" in done.stdout
    (tmp_path / "loss").mkdir()
    target = "tests.losses.test_custom_loss.FocalLossConfig"
    (tmp_path / "loss" / "focal.yaml").write_text(f"_target_: {target}\ngamma: 2.0\n")
    own = [f"hydra.searchpath=[file://{tmp_path}]"]
    (config,), _ = check_command_line([*own, "loss=focal", "loss.gamma=1.5"])[:2]
    assert config.loss.model_dump()["gamma"] == 1.5
    for wrong, words in (
        ("loss.gama=1", "try: loss.gamma=1"),
        ("loss.gamma=x", "loss.gamma='x' is not allowed"),
        ("loss=focl", "choose 'ce', 'focal', 'grpo', 'opd', 'oreal' or 'preset/<peer>/<name>'; try: loss=focal"),
        ("kl=k3", "kl=k3 has no effect"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_command_line([*own, *(["loss=focal"] if "loss=" not in wrong else []), wrong])
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tracker=trackio"], "needs the package 'trackio'"),
        (["training.resume=/nowhere"], "holds no checkpoint"),
        (["hydra.run.dir=/proc/x/y"], "hydra.run.dir=/proc/x/y cannot be created"),
        (["--resolve"], "--resolve goes with --cfg job"),
    ],
)
def test_what_this_machine_lacks_is_said_before_torch_is_loaded(arguments: list[str], words: str) -> None:
    done = train(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
