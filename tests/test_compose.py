"""The loss-only root, the memo, settings that only a class names, folders and classes of the user's own, and --help."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from tests.conftest import slow_unless
from tests.processes import run_module
from toolkit import ConfigError, LossRunner
from toolkit.bench.config import BENCH
from toolkit.compose.build import build_loss
from toolkit.compose.help_text import help_text
from toolkit.compose.overrides import options_first
from toolkit.compose.plugins import class_at, load_plugins
from toolkit.compose.schemas import conf_dir
from toolkit.compose.settings import settings_in
from toolkit.compose.tree import TRAIN, check_command_line, compose_config, compose_loss, load_loss
from toolkit.explain.__main__ import main as explain
from toolkit.functional.policy import registry

CONF = Path(conf_dir())
GRPO = "toolkit.losses.config.GRPOLossConfig"
PRESETS = sorted(str(path.relative_to(CONF / "loss").with_suffix("")) for path in CONF.glob("loss/preset/*/*.yaml"))
CHOICES = [
    f"{group}={path.stem}"
    for group in ("loss", "policy_loss", "kl", "aggregation", "correction", "mode")
    for path in sorted((CONF / group).glob("*.yaml"))
    if not path.stem.endswith("_in_reward")
]
EXTRA = {
    "aggregation=constant": ["loss.aggregation.length=7"],
    "loss=oreal": ["policy_loss=gspo", "rollout.temperature=0.7"],
    "kl=k3": ["loss.kl_loss_coef=0.3", "correction=[tis,geo_rs]"],
}


@pytest.mark.parametrize(
    "override", slow_unless(lambda index, _: index % 18 == 0, [*(f"loss={name}" for name in PRESETS), *CHOICES])
)
def test_the_loss_alone_is_the_loss_of_the_whole(override: str) -> None:
    overrides = [override, *EXTRA.get(override, [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = compose_loss(overrides)
        assert "training" not in alone
        assert build_loss(alone) == build_loss(compose_config(overrides))


def test_what_is_not_about_the_loss_composes_the_whole() -> None:
    for override in ("training.steps=3", "kl=k1_in_reward", "advantage=rloo"):
        assert "training" in compose_loss([override]), override


def test_settings_of_your_own_for_every_run_are_part_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # conf/local/default.yaml may set anything, so the whole is composed where it is there.
    is_file, local = Path.is_file, CONF / "local" / "default.yaml"
    monkeypatch.setattr(Path, "is_file", lambda path: path == local or is_file(path))
    assert "training" in compose_loss(["kl=k2"])


def test_the_same_overrides_again_are_not_composed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_loss(["kl=k2", "loss.kl_loss_coef=0.125"])
    monkeypatch.setattr("toolkit.compose.tree.compose", None)
    assert load_loss(["kl=k2", "loss.kl_loss_coef=0.125"]) is first
    assert LossRunner.from_overrides(["kl=k2", "loss.kl_loss_coef=0.125"]).loss_cfg is first
    with pytest.raises(TypeError):
        load_loss(["kl=k2", "loss.kl_loss_coef=0.25"])


def test_a_plugin_that_changed_is_composed_again(tmp_path: Path) -> None:
    plugin = tmp_path / "remembered.py"
    for default in (0.2, 0.3):
        plugin.write_text(
            "from toolkit import register_policy_loss\n@register_policy_loss('remembered')\n"
            f"def f(t, *, eps: float = {default}):\n    return t.logprobs\n"
        )
        os.utime(plugin, ns=(0, int(10 * default)))
        loss = load_loss([f"plugins=[{plugin}]", "policy_loss=remembered"])
        assert loss.policy_loss_cfg["eps"] == default  # type: ignore[attr-defined]


def test_an_interpolation_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for coefficient in ("0.5", "0.75"):
        monkeypatch.setenv("MY_COEFFICIENT", coefficient)
        loss = load_loss(["kl=k2", "loss.kl_loss_coef=${oc.env:MY_COEFFICIENT}"])
        assert loss.kl_loss_coef == float(coefficient)  # type: ignore[attr-defined]


# -------------------------------------------------------------------- files and classes of the user's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task class in a Python file, and YAML files that list none or some of the fields."""
    (tmp_path / "own_task.py").write_text(
        "from toolkit.tasks.config import SpellBackwardConfig\n\n\n"
        'class OwnTask(SpellBackwardConfig):\n    """Mine."""\n\n    extra: int = 3\n    """An extra."""\n'
    )
    for group, text in (
        ("task", "_target_: own_task.OwnTask\n"),
        ("loss", "_target_: toolkit.losses.config.GRPOLossConfig\npolicy_loss_cfg: ${policy_loss}\n"),
        ("policy_loss", "loss_type: vanilla\n"),
        ("advantage", "_target_: toolkit.training.config.AdvantageConfig\nestimator: rloo\n"),
        ("optimizer", "_target_: toolkit.training.config.OptimizerConfig\nlr: 0.5\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / "own.yaml").write_text(f"# Mine.\n{text}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_task", None)


@pytest.mark.slow
def test_fields_that_a_file_does_not_list_are_set_without_a_plus(own: Path) -> None:
    overrides = [f"hydra.searchpath=[file://{own}]", "task=own", "task.num_heldout=12", "task.extra=4"]
    (config,), taken = check_command_line(overrides)[:2]
    assert (config.task.num_heldout, config.task.extra) == (12, 4)  # type: ignore[attr-defined]
    assert taken == [*overrides[:2], "++task.num_heldout=12", "++task.extra=4"]
    found = compose_loss(
        ["loss=own", "policy_loss=own", "policy_loss.delta=4", "loss.aggregation.name=token_sum"], config_dir=own
    )
    loss = build_loss(found)
    assert loss.policy_loss_cfg["delta"] == 4  # type: ignore[attr-defined]
    assert loss.aggregation.name == "token_sum"  # type: ignore[attr-defined]
    words = [overrides[0], "advantage=own", "optimizer=own", "optimizer.weight_decay=0.1"]
    (config,) = check_command_line(words).configs
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("task.num_heldot=12", "try: task.num_heldout=12"),
        ("task.extra=x", "task.extra='x' is not allowed"),
        ("task.nothing_like_it=1", "task.nothing_like_it is not a setting; task has: reward, reward_weights"),
        ("policy_loss.delat=1", "try: policy_loss.delta=1"),
    ],
)
def test_and_mistyped_ones_are_named(own: Path, wrong: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command_line([f"hydra.searchpath=[file://{own}]", "task=own", wrong])
    assert words in str(caught.value)


@pytest.mark.slow
def test_jobs_of_a_multirun_set_unlisted_fields_too(own: Path) -> None:
    folder = f"hydra.searchpath=[file://{own}]"
    configs, taken = check_command_line([folder, "task=own", "task.num_heldout=12,13"], multirun=True)[:2]
    assert [config.task.num_heldout for config in configs] == [12, 13]  # type: ignore[attr-defined]
    assert taken[-1] == "++task.num_heldout=12,13"


def test_a_class_of_a_plugin_or_of_the_current_folder(own: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert class_at("own_task.OwnTask").__name__ == "OwnTask"  # of the current folder, which is not on the path
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "own_model.py"
    elsewhere.write_text("class Model:\n    pass\n")
    with pytest.raises(ImportError):
        class_at("own_model.Model")
    load_plugins([str(elsewhere)])
    assert class_at("own_model.Model").__name__ == "Model"
    with pytest.raises(ImportError, match="has no class 'Modle'"):
        class_at("own_model.Modle")


def test_a_file_may_be_imported_and_be_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_loss.py").write_text(
        "from toolkit import register_policy_loss\n\n\n"
        "@register_policy_loss('imported')\ndef f(t):\n    return t.logprobs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import imported_loss  # type: ignore[import-not-found]

    assert registry.policy_loss("imported").function is imported_loss.f
    loss = load_loss([f"plugins=[{tmp_path / 'imported_loss.py'}]", "policy_loss=imported"])
    assert loss.policy_loss_cfg["loss_type"] == "imported"  # type: ignore[attr-defined]
    assert registry.policy_loss("imported").function is not imported_loss.f  # the plugin's own copy, loaded last


@pytest.mark.slow
def test_a_file_of_your_own_says_the_last_word(own: Path) -> None:
    """What it lists holds: its mode, its policy loss with its options; and what has no default can be set."""
    (own / "own_loss.py").write_text(
        "from toolkit import GRPOLossConfig\n\n\nclass OwnLoss(GRPOLossConfig):\n    number: int\n"
    )
    (own / "loss" / "mine.yaml").write_text(
        "_target_: own_loss.OwnLoss\nmode: chunk\npolicy_loss_cfg: {loss_type: cispo, cliprange_high: 0.9}\n"
    )
    loss: Any = load_loss(["loss=mine", "loss.number=3"], config_dir=own)
    assert (loss.mode, loss.number, loss.policy_loss_cfg["cliprange_high"]) == ("chunk", 3, 0.9)
    changed = ["loss.number=3", "mode=eager", "loss.policy_loss_cfg.cliprange_high=0.3"]
    loss = load_loss(["loss=mine", *changed], config_dir=own)
    assert (loss.mode, loss.policy_loss_cfg["cliprange_high"]) == ("eager", 0.3)
    for overrides, words in (
        (["loss=mine"], r"loss\.number is missing: OwnLoss needs a value for it; set it: loss\.number=\.\.\."),
        (["loss=mine", "policy_loss=gspo"], r"change its options with loss\.policy_loss_cfg\.<option>="),
        (["loss=own", "loss.policy_loss_cfg.delta=4"], r"write policy_loss=<name> and policy_loss\.delta="),
    ):
        with pytest.raises(ConfigError, match=words):
            load_loss(overrides, config_dir=own)
    sys.modules.pop("own_loss")


@pytest.mark.slow
def test_a_folder_of_your_own_everywhere(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert LossRunner.from_overrides(["loss=own", "policy_loss=own"], config_dir=own).loss_cfg.mode == "chunk"
    sys_argv, sys.argv = sys.argv, ["explain", "--config-dir", str(own), "loss=own", "loss.entropy_coef=0.25"]
    try:
        explain()
    finally:
        sys.argv = sys_argv
    assert "- 0.25 x the policy's entropy" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mode: !!python/object:os.system x\n", "could not determine a constructor for the tag"),
        ("mode: [eager\n", "loss/wrong.yaml, line 3: "),
        ("mode: {\n", "loss/wrong.yaml, line"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_named(own: Path, text: str, words: str) -> None:
    (own / "loss" / "wrong.yaml").write_text(f"# Mine.\n{text}")
    with pytest.raises(ConfigError) as caught:
        compose_loss(["loss=wrong"], config_dir=own)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"--config-dir=nowhere is not a folder"):
        LossRunner.from_overrides([], config_dir="nowhere")


def test_a_folder_with_signs_that_an_override_reads(tmp_path: Path) -> None:
    folder = tmp_path / "it's a=b, [c]"
    (folder / "loss").mkdir(parents=True)
    (folder / "loss" / "own.yaml").write_text("# Mine.\ndefaults: [/loss/grpo@_here_]\nentropy_coef: 0.5\n")
    assert LossRunner.from_overrides("loss=own", config_dir=folder).loss_cfg.entropy_coef == 0.5  # type: ignore[attr-defined]


@pytest.mark.usefixtures("own")
def test_a_loss_that_lists_no_policy_loss_takes_the_one_that_is_chosen(own: Path) -> None:
    (own / "loss" / "short.yaml").write_text("# Mine.\n_target_: toolkit.losses.config.GRPOLossConfig\n")
    loss = load_loss(["loss=short", "policy_loss=gspo", "policy_loss.cliprange_high=0.5"], config_dir=own)
    assert loss.policy_loss_cfg["loss_type"] == "gspo"  # type: ignore[attr-defined]
    assert loss.policy_loss_cfg["cliprange_high"] == 0.5  # type: ignore[attr-defined]
    text = (own / "loss" / "short.yaml").read_text()
    (own / "loss" / "fixed.yaml").write_text(text + "policy_loss_cfg: {loss_type: cispo}\n")
    assert load_loss(["loss=fixed"], config_dir=own).policy_loss_cfg["loss_type"] == "cispo"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="policy_loss=gspo has no effect: the file of this loss defines"):
        load_loss(["loss=fixed", "policy_loss=gspo"], config_dir=own)


@pytest.mark.parametrize(
    ("group", "text", "overrides", "words"),
    [
        ("policy_loss", "cliprange_low: 0.1\n", [], "policy_loss has no loss_type"),
        (
            "loss",
            "_target_: toolkit.losses.config.GRPOLossConfig\nsoftcap: ${seed\n",
            [],
            "look for a ${ without its }",
        ),
        (
            "loss",
            "_target_: nowhere.Loss\n",
            ["loss.boost=3"],
            "loss._target_='nowhere.Loss' is not a class that can be",
        ),
        ("loss", "_target_: raises.Loss\n", [], "ZeroDivisionError: division by zero ("),
        ("loss", "_target_: exits.Loss\n", [], "SystemExit: 3 ("),
    ],
)
def test_files_of_your_own_that_cannot_work(own: Path, group: str, text: str, overrides: list[str], words: str) -> None:
    (own / "raises.py").write_text("1 / 0\n")
    (own / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (own / group / "wrong.yaml").write_text(f"# Mine.\n{text}")
    with pytest.raises(ConfigError) as caught:
        load_loss([f"{group}=wrong", *overrides], config_dir=own)
    assert words in str(caught.value)


def test_a_mistake_beside_a_part_without_a_class() -> None:
    # The loss-only root and the benchmark have a rollout of one number, which no class stands behind.
    with pytest.raises(ConfigError, match=r"try: loss\.entropy_coef=1"):
        load_loss(["rollout.temperature=0.5", "loss.entropy_cof=1"])
    with pytest.raises(ConfigError, match=r"try: rollout\.temperature=2"):
        compose_config(["rollout.temprature=2"], root=BENCH)


def test_a_module_of_the_current_folder_is_a_plugin(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(own))])
    load_plugins(["own_task"])
    (own / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"plugins: 'leaves' cannot be loaded: SystemExit: 0 \(.*leaves.py:2"):
        load_plugins(["leaves"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a=1 --config-dir own b=2", "--config-dir own a=1 b=2"),
        ("-m a=1 --cfg job b=own --config-dir own", "-m --cfg job --config-dir own a=1 b=own"),
        ("-w a=1", "-w a=1"),
        ("", ""),
    ],
)
def test_options_may_stand_between_overrides(words: str, expected: str) -> None:
    assert options_first(words.split(), get_args_parser()) == expected.split()


@pytest.mark.slow
def test_options_between_overrides_of_the_commands(own: Path) -> None:
    for module, words in (
        ("train", ["debug=smoke", "--cfg", "job", "task=own", "--config-dir", str(own), "task.num_heldout=12"]),
        ("explain", ["loss=own", "--config-dir", str(own), "loss.entropy_coef=12"]),
    ):
        done = run_module(f"toolkit.{module}", *words)
        assert done.returncode == 0, done.stderr
        assert "12" in done.stdout
    done = run_module("toolkit.train", "-m", "--cfg", "job", "seed=1,2")
    assert done.stderr == "error: --cfg prints the configuration of one run; leave out -m\n"


# -------------------------------------------------------------------- --help


def test_help_says_what_each_setting_is() -> None:
    cfg = compose_config([])
    text = help_text(cfg, root=TRAIN, purpose="Train.", examples={"a b": "", "c": "what it does"})
    for every in (cfg, compose_config([], root=BENCH)):
        assert [setting.key for setting in settings_in(every) if not setting.meaning] == []
    assert "None" not in text
    joined = " ".join(text.split())
    assert "loss.kl_loss_coef=0.001 Coefficient of the KL term" in joined
    assert "policy_loss.cliprange_high=0.2 The ratio's ceiling is 1 + cliprange_high" in joined
    assert "training.steps=80 Rollouts in the RL phase" in joined
    assert "optimizer.betas=[0.9,0.999] Decay of" in joined
    assert "loss.kl_loss_type=null An estimate" in joined
    assert "c  # what it does" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "loss.policy_loss_cfg" not in text


def test_help_shows_the_choices_that_were_made(own: Path) -> None:
    preset = help_text(compose_config(["loss=preset/verl/gspo"]), root=TRAIN, purpose="", examples={"a": ""})
    assert "loss.policy_loss_cfg.cliprange_low=0.2" in preset
    assert "loss.policy_loss_cfg.loss_type=gspo_token" in preset
    assert "\npolicy_loss." not in preset
    cfg = compose_config(["task=own"], config_dir=own)
    listed = help_text(cfg, root=TRAIN, purpose="", examples={"a": ""}, folders=[str(own)])
    assert "task: jsonl, own, reasoning_gym, sft, spell_backward" in listed
    assert "task.extra=3" in listed
    assert "loss: ce, grpo, opd, oreal, own, preset/<peer>/<name>" in listed


@pytest.mark.slow
def test_help_of_the_commands() -> None:
    for module, words in (("train", "training.steps=80"), ("bench", "bench.rounds=")):
        done = subprocess.run([sys.executable, "-m", f"toolkit.{module}", "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        assert f"policy_loss: {', '.join(registry.policy_loss_names())}" in " ".join(done.stdout.split())
        assert "schema" not in done.stdout
