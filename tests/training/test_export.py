"""A run's model as a folder that transformers and PEFT load, and a run that goes on from it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")
pytest.importorskip("peft")

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.conftest import slow_unless
from tests.models.saved import edit_json, save_tiny_model
from tests.processes import free_port, start
from tests.test_mixed_precision import trainer_with
from tests.training.test_train import lines, summary
from toolkit import ConfigError
from toolkit import train as command
from toolkit.tasks import spell_backward
from toolkit.training import checkpoint, report, run
from toolkit.training.export import check_export, export_model
from toolkit.training.full_state import load_weights, read_optimizer_state
from toolkit.training.reference import SharedReference, refresh_reference

SMALL = [
    *("debug=smoke", "warmup.steps=2", "warmup.stop_accuracy=null", "training.steps=2", "task.num_heldout=4"),
    *("rollout.prompts_per_step=2", "rollout.group_size=4", "training.minibatches=2", "optimizer.lr=1e-2"),
]
LORA = ["model.lora.r=4"]
IDS = torch.arange(3, 13).unsqueeze(0)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.tasks.spell_backward.POOL_SIZE", 100)
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def small(*overrides: str) -> list[str]:
    """`SMALL` with some of its settings replaced."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(setting for setting in SMALL if setting.partition("=")[0] not in keys), *overrides]


def model(path: Path, *more: str) -> list[str]:
    return ["model=pretrained", f"model.path={path}", *more]


def loaded(folder: Path) -> Any:
    """The exported model, as anyone loads it."""
    from peft import AutoPeftModelForCausalLM

    is_adapter = (folder / "adapter_config.json").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        return (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)


def logits_of(lm: Any) -> Tensor:
    with torch.no_grad():
        return lm.eval()(input_ids=IDS).logits


def one_step(trainer: Any) -> Any:
    """Train a step, so the model is not the one that was loaded; return the phase."""
    phase = trainer.main_phase()
    trainer.run_step(phase)
    return phase


# -------------------------------------------------------------------- a run


@pytest.mark.slow
def test_another_run_goes_on_from_the_model_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(run, "write_report", lambda *a: shown.append([getattr(x, "completions", x) for x in a[3:5]]))
    first, second = tmp_path / "first", tmp_path / "second"
    few = ["warmup.steps=30", "optimizer.lr=1e-4"]
    command.train(small(*few, f"hydra.run.dir={first}"))  # the tiny Llama with random weights
    lm, weights = loaded(first / "model"), load_file(first / "checkpoint/model.safetensors")
    assert {f"lm.{name}" for name in lm.state_dict()} == set(weights)
    assert all(torch.equal(tensor, weights[f"lm.{name}"]) for name, tensor in lm.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(first / "model")
    assert tokenizer.decode(tokenizer("abc=")["input_ids"]) == "abc="
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "<pad>", "left")
    assert GenerationConfig.from_pretrained(first / "model").eos_token_id == tokenizer.eos_token_id
    edit_json(first / "model/generation_config.json", repetition_penalty=1.5)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (first / "model").iterdir()}
    assert len(modes) == 1, "whoever reads one file reads all"
    command.train(small(*model(first / "model"), "warmup.steps=0", f"hydra.run.dir={second}"))
    (_, after), (before, _) = shown
    assert list(before) == list(after)
    assert any(after), "there is something to compare"
    assert GenerationConfig.from_pretrained(second / "model").repetition_penalty == 1.5
    lm_again = loaded(second / "model")
    assert not torch.equal(lm_again.lm_head.weight, lm.lm_head.weight), "and trained it further"


@pytest.mark.slow
def test_when_the_model_is_written(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(checkpoint, "export_model", lambda *_: written.append("model"))
    monkeypatch.setattr(run.StopFlag, "agreed", lambda _: False)
    more = ["training.checkpoint_every=1", *model(saved)]
    for export, times in (("end", 1), ("checkpoints", 5), ("never", 0)):  # 2 + 2 steps, and the end
        written.clear()
        command.train(small(*more, f"training.export={export}", f"hydra.run.dir={tmp_path / export}"))
        assert len(written) == times
    written.clear()
    answers = iter([False, True])
    monkeypatch.setattr(run.StopFlag, "agreed", lambda _: next(answers))  # Ctrl-C in the warm-up
    command.train(small(*more, f"hydra.run.dir={tmp_path / 'stopped'}"))
    assert written == ["model"]


def test_a_crash_while_writing_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(None, "loss=ce")
    export_model(tmp_path, trainer)
    before = load_file(tmp_path / "model/model.safetensors")
    one_step(trainer)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.tokenizer), "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            export_model(tmp_path, trainer)
    kept = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    export_model(tmp_path, trainer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    after = load_file(tmp_path / "model/model.safetensors")
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


# -------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_tied_and_bf16_models(tmp_path: Path, is_tied: bool, dtype: str) -> None:
    base = save_tiny_model(tmp_path / "base", tied=is_tied, dtype=getattr(torch, dtype))
    trainer = trainer_with(None, "loss=ce", *model(base, "model.dtype=auto"))
    one_step(trainer)
    export_model(tmp_path, trainer)
    lm = loaded(tmp_path / "model")
    assert lm.dtype == getattr(torch, dtype)
    assert torch.equal(logits_of(lm), logits_of(trainer.policy.lm))
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == is_tied
    names = set(load_file(tmp_path / "model/model.safetensors"))
    assert ("lm_head.weight" in names) == (not is_tied)
    assert not torch.equal(logits_of(lm), logits_of(loaded(base)))


TARGETS = {
    "all": [],
    "head": ["model.lora.target_modules=[q_proj,lm_head]"],
    "saved": ["model.lora.modules_to_save=[lm_head]"],
}


@pytest.mark.parametrize("kind", slow_unless(lambda _, kind: kind == "all", TARGETS))
@pytest.mark.parametrize("is_merged", [False, True])
def test_adapters(tmp_path: Path, saved: Path, kind: str, is_merged: bool) -> None:
    more = [*LORA, *TARGETS[kind], f"training.export_merged={is_merged}"]
    trainer = trainer_with(None, "loss=ce", *model(saved, *more))
    check_export(trainer)
    one_step(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    export_model(tmp_path, trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.policy.state_dict().items())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {"generation_config.json", "tokenizer.json"}
    assert "README.md" not in names
    assert ("adapter_config.json" in names) != is_merged
    lm = loaded(tmp_path / "model")
    assert isinstance(lm, type(AutoModelForCausalLM.from_pretrained(saved))) == is_merged
    # Merged weights are rounded once more, in fp32.
    torch.testing.assert_close(logits_of(lm), logits_of(trainer.policy.lm), rtol=0, atol=2e-5 if is_merged else 0)
    assert float((logits_of(lm) - logits_of(loaded(saved))).abs().max()) > 1e-2


def test_the_base_of_adapters_is_named_by_its_full_path(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    trainer = trainer_with(None, "loss=ce", *model(Path(saved.name), *LORA))
    export_model(tmp_path, trainer)
    settings = json.loads((tmp_path / "model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(saved)


@pytest.mark.slow
def test_what_cannot_be_merged(tmp_path: Path, saved: Path) -> None:
    merged = "training.export_merged=true"
    with pytest.raises(ConfigError, match=r"training\.export_merged has no effect: the model has no adapters"):
        check_export(trainer_with(None, *model(saved, merged)))
    with pytest.raises(ConfigError, match=r"has no effect with training\.export=never"):
        trainer_with(None, *model(saved, merged, "training.export=never", *LORA))
    tied = save_tiny_model(tmp_path / "tied", tied=True)
    for kind in ("head", "saved"):
        with pytest.raises(ConfigError, match="on the head, which shares its weight with the embedding"):
            check_export(trainer_with(None, *model(tied, merged, *LORA, *TARGETS[kind])))
    check_export(trainer_with(None, *model(tied, merged, *LORA)))
    with pytest.raises(ConfigError, match="no effect: the model has no adapters"):
        command.train(small(*model(saved, merged), f"hydra.run.dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run/metrics.jsonl").exists(), "before any work"


# -------------------------------------------------------------------- the reference, and resuming


def test_the_reference_is_the_policy_as_it_was(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_with(None, "kl=k2", *model(saved, *LORA))
    policy, mask = trainer.policy.eval(), torch.ones_like(IDS)
    with torch.no_grad():
        untouched = policy(IDS, mask)
        for name, parameter in policy.named_parameters():  # a warm-up, or an earlier run, has trained the adapters
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        at_start = policy(IDS, mask)
        trainer.main_phase()
        reference = trainer.reference
        assert isinstance(reference, SharedReference)
        assert not torch.equal(at_start, untouched), "the model without adapters is not the reference"
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        now = policy(IDS, mask)
        assert torch.equal(reference.eval()(IDS, mask), at_start)
        assert torch.equal(policy(IDS, mask), now), "the policy is as before"
        reference.save(str(tmp_path / "reference"))
        assert torch.equal(policy(IDS, mask), now)
        refresh_reference(reference, policy)
        assert torch.equal(reference(IDS, mask), now)
        kept = [each.clone() for each in reference._kept]
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
        refresh_reference(reference, policy, 0.5)
        for ours, before in zip(reference._kept, kept, strict=True):
            torch.testing.assert_close(ours, before + 0.25, rtol=0, atol=1e-6)
        now = policy(IDS, mask)
        other = SharedReference(policy)
        assert torch.equal(other(IDS, mask), now)
        other.load(str(tmp_path / "reference"))
        assert torch.equal(other(IDS, mask), at_start)
        assert torch.equal(policy(IDS, mask), now)
    assert sum(kept.numel() for kept in reference._kept) == sum(
        p.numel() for p in policy.parameters() if p.requires_grad
    )


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_alone(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_with(None, "loss=ce", *model(saved, *LORA))
    phase = one_step(trainer)
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    stored = load_file(tmp_path / "checkpoint/model.safetensors")
    assert stored
    assert all(".lora_" in name for name in stored)
    state = read_optimizer_state(str(tmp_path / "checkpoint/optimizer.safetensors"))
    assert len(state["state"]) == len(stored) == len(state["param_groups"][0]["params"])
    other = trainer_with(None, "loss=ce", *model(saved, *LORA, "model.lora.target_modules=[q_proj]"))
    with pytest.raises(ConfigError, match=r"do not fit .* weights are not those that this policy trains"):
        checkpoint.load_weights(tmp_path / "checkpoint", other)
    same = trainer_with(None, "loss=ce", *model(saved, *LORA))
    load_weights(same.policy, str(tmp_path / "checkpoint/model.safetensors"), trained_only=True)
    assert torch.equal(logits_of(same.policy.lm), logits_of(trainer.policy.lm))


@pytest.mark.slow
def test_a_run_with_adapters_is_resumed(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(*model(saved, *LORA), "kl=k2")
    whole, cut, resumed = (tmp_path / name for name in ("whole", "cut", "resumed"))
    command.train([*settings, f"hydra.run.dir={whole}"])
    answers = iter([False] * 3 + [True])  # after the first step of RL
    with monkeypatch.context() as patch:
        patch.setattr(run.StopFlag, "agreed", lambda _: next(answers))
        command.train([*settings, f"hydra.run.dir={cut}"])
    assert summary(cut)["interrupted"]
    assert (cut / "model/adapter_config.json").is_file()
    command.train([*settings, f"training.resume={cut}", f"hydra.run.dir={resumed}"])
    assert lines(resumed)[-1]["kl_ref"] == lines(whole)[-1]["kl_ref"] > 0
    first, second = (logits_of(loaded(folder / "model")) for folder in (whole, resumed))
    assert torch.equal(first, second)


# -------------------------------------------------------------------- several processes

KINDS: dict[str, list[str]] = {
    "plain": model(Path("base")),
    "tied": model(Path("tied"), "model.freeze_head=true"),
    "bf16": model(Path("bf16"), "model.dtype=auto", *LORA),
    "lora": model(Path("base"), *LORA, *TARGETS["head"], "model.gradient_checkpointing=true"),
    "merged": model(Path("base"), *LORA, "training.export_merged=true"),
    "merged_tied": model(Path("tied"), *LORA, "training.export_merged=true"),
}


def _port_of(run: str, rank: int) -> str:
    """A port that rank 0 chooses just before it is used: one that was free a minute ago may not be."""
    file = Path(f"{run}.port")
    if rank == 0:
        fresh = Path(f"{run}.writing")
        fresh.write_text(str(free_port()))
        fresh.rename(file)
    while not file.exists():
        time.sleep(0.02)
    return file.read_text()


def _run_kinds(rank: int, folder: str, sharding: str, world: int) -> None:
    warnings.simplefilter("ignore")
    spell_backward.POOL_SIZE, report.draw_curves = 100, lambda *_: None
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    for kind, overrides in KINDS.items():
        name = f"{sharding}_{world}_{kind}"
        os.environ["MASTER_PORT"] = _port_of(name, rank)
        more = [f"training.sharding={sharding}", f"hydra.run.dir={name}"]
        with contextlib.redirect_stdout(io.StringIO()):
            command.train(small("kl=k2", *overrides, *more))


@pytest.mark.slow
@pytest.mark.dist
def test_what_processes_train_together_is_exported_as_by_one(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    save_tiny_model(tmp_path / "tied", tied=True)
    save_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    for sharding, world in (("none", 1), ("none", 2), ("fsdp2", 2)):
        start(_run_kinds, (str(tmp_path), sharding, world), world)
    for kind in KINDS:
        alone, both, sharded = (tmp_path / f"{name}_{kind}/model" for name in ("none_1", "none_2", "fsdp2_2"))
        exact = logits_of(loaded(alone))
        base = logits_of(loaded(tmp_path / KINDS[kind][1].removeprefix("model.path=")))
        assert float((exact - base).abs().max()) > 1e-2, kind
        bound = 3e-2 if kind == "bf16" else 1e-3  # one Adam step is 1e-2, and the sign of a tiny gradient may differ
        for folder in (both, sharded):
            assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
            assert float((logits_of(loaded(folder)) - exact).abs().max()) < bound * float(exact.abs().max()), kind


@pytest.mark.slow
def test_a_task_learnt_goes_on_in_the_next_run(tmp_path: Path) -> None:
    """Adapters on a run's model, these adapters trained further, the merged model: each begins where the last ended."""
    first, second, third, fourth = (tmp_path / name for name in ("first", "second", "third", "fourth"))
    learn = ["warmup.steps=150", "warmup.stop_accuracy=null", "training.steps=1", "optimizer.lr=1e-5"]
    more = ["warmup.steps=0", "training.steps=3", "optimizer.lr=1e-4"]

    def trained(run_dir: Path, *overrides: str) -> tuple[float, float]:
        command.train(small("task.num_heldout=64", *overrides, f"hydra.run.dir={run_dir}"))
        return summary(run_dir)["accuracy_before"], summary(run_dir)["accuracy_after"]

    _, reached = trained(first, *learn)
    assert reached > 0.5
    before, after = trained(second, *more, *model(first / "model", *LORA))
    assert before == reached
    before, last = trained(third, *more, *model(second / "model", "training.export_merged=true"))
    assert before == after
    shutil.rmtree(first)
    shutil.rmtree(second)
    before, _ = trained(fourth, *more, *model(third / "model"))
    assert before == last
