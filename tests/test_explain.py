"""``toolkit.explain``: what a loss computes, in words; what is known to be wrong with it; tables made from the code."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toolkit
from tests.processes import run_module
from toolkit import errors
from toolkit.compose.schemas import conf_dir
from toolkit.compose.tree import load_loss
from toolkit.errors import ConfigError, DataError
from toolkit.explain.__main__ import main
from toolkit.explain.catalogue import BEGIN, END, listing, with_markdown
from toolkit.explain.facts import LARGEST_LOG_RATIO, equation, filled, title_of
from toolkit.explain.formula import explain_loss
from toolkit.functional.policy import registry
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import policy_loss, policy_loss_names, register_policy_loss
from toolkit.functional.ratios import bounded
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.opd import OPDLossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.losses.config.policy import GRPOLossConfig
from toolkit.losses.items import RLLossContextInputItem

PAGE = Path(toolkit.__file__).parents[1] / "tutorials/reference/losses.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def config(loss_type: str = "vanilla", *, options: dict[str, Any] | None = None, **fields: Any) -> GRPOLossConfig:
    return GRPOLossConfig(policy_loss_cfg={"loss_type": loss_type, **(options or {})}, **fields)


def explained(*overrides: str) -> str:
    """The text on one line, however it was wrapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return " ".join(explain_loss(load_loss(overrides)).split())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("toolkit.explain", *arguments)


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that is given once in a process stays to be given to other tests."""
    monkeypatch.setattr(errors, "_warned", set(errors._warned))


# -------------------------------------------------------------------- formulas


def test_clauses_of_a_formula() -> None:
    formula = "clip(r, [{low} // 0], [{cap} // 1 + {high} // inf])[, at most {c}] A [x]"
    options = {"low": None, "cap": None, "high": 0.2, "c": None}
    assert filled(formula, options) == "clip(r, 0, 1 + 0.2) A x"
    assert filled(formula, {**options, "cap": 5.0, "c": 3.0}) == "clip(r, 0, 5), at most 3 A x"
    assert filled(formula, {**options, "low": 0.0, "high": None}) == "clip(r, 0, inf) A x"
    flags = "[<?on>yes[, {c}] // no][<!c=1>, c is not 1][<?mode=a><?on>; both]"
    assert filled(flags, {"on": True, "c": 1.0, "mode": "a"}) == "yes, 1; both"
    assert filled(flags, {"on": False, "c": None, "mode": "a"}) == "no, c is not 1"
    with pytest.raises(KeyError):
        filled("[<?of>x]", {"on": True})


@pytest.mark.parametrize("name", policy_loss_names())
def test_every_built_in_loss_is_explained(name: str) -> None:
    loss = policy_loss(name)
    assert loss.formula
    assert title_of(loss.function)
    assert loss.facts.ratio
    assert loss.facts.gradient
    assert f"Source: {loss.facts.source}" in (loss.function.__doc__ or "")
    options = loss.options({})
    nothing = {key: None if _may_be_none(loss, key) else value for key, value in options.items()}
    for chosen in (options, nothing):
        text = equation(loss, chosen)
        assert not re.search(r"None|null|[\[\]{}]|//", text), text
    text = explain_loss(config(name))
    assert all(len(line) <= 112 for line in text.splitlines())


def _may_be_none(loss: registry.PolicyLoss, option: str) -> bool:
    try:
        return loss.options({option: None})[option] is None
    except ConfigError:
        return False


def test_another_name_is_marked_wherever_names_are_shown() -> None:
    aliases = {name: alias for name in policy_loss_names() if (alias := policy_loss(name).alias_of) is not None}
    assert aliases == {"dro": "kimi", "gpg": "reinforce"}
    for name, original in aliases.items():
        assert replace(policy_loss(name), name=original, alias_of=None) == policy_loss(original)
        assert f"Another name for {original}" in listing()
        assert f"{name} (another name for {original})" in explained(f"policy_loss={name}")
        assert f"| `policy_loss={name}` | Another name for {original} |" in PAGE.read_text()


def test_a_user_registers_facts_of_a_loss() -> None:

    @register_policy_loss(
        "mine",
        aliases=("ours",),
        facts=LossFacts(ratio="{eps} is read", gradient="-A", source="Us 2026", differs="No r"),
    )
    def mine(t: PolicyTerms, *, eps: float = 0.25) -> Tensor:
        """Do nothing in particular."""
        return -t.advantages * t.logprobs * eps

    assert (mine.__doc__ or "").endswith("Source: Us 2026. No r.\n")
    for name in ("mine", "ours"):
        text = explain_loss(config(name))
        assert "ratio: 0.25 is read" in text
        assert "source       Us 2026. No r" in text


def test_the_documented_example() -> None:
    text = explained("loss=grpo", "policy_loss=gspo", "kl=k3", "correction=[tis,geo_rs]", "mode=chunk")
    for words in (
        "loss = sum over scored tokens of weight x (importance x policy + 0.001 x KL)",
        "max(-A s, -A clip(s, 1 - 0.0003, 1 + 0.0004)); s = exp(mean over the sequence of log(pi / pi_old))",
        "+ 0.001 x k3: exp(-d) - 1 + d, d = log pi - log pi_ref",
        "value unbiased, gradient of the forward KL(reference || policy)",
        "|d| at most 20 nats, no gradient beyond; |the estimate| at most 10 nats",
        "each token is weighted by pi_old / pi_rollout, at most 2",
        "each sequence is dropped unless the geometric mean over its tokens of pi_old / pi_rollout is at least 0.999 "
        "and at most 1.001; dropped tokens are removed from the denominator",
        "multiplies the policy term only",
        "token_mean: weight = 1 / N: the mean over all N scored tokens",
        "over all micro-batches and ranks",
        "Tokens rejected by a correction with denominator=survivors are not counted.",
        "ratio: s, one per sequence, is clipped and carries the gradient; it divides by pi_old",
        "pi_rollout (as the sampler reported it): corrections (a weight, never clipped in the policy term)",
        "flows through the mean",
        "log ratios are held in [-20, 20] nats before exp; the gradient is 0 outside",
        "ref_logprobs: for the KL term",
        "Zheng et al. 2025, arXiv 2507.18071, eq. 5-7",
        "scope=sequence",
        "! policy loss 'gspo' under aggregation 'token_mean'",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy_loss=vanilla", "policy_loss.clip_ratio_c=null"], "-A clip(r, 1 - 0.2, 1 + 0.2)); r = pi / pi_old"),
        (["policy_loss=vanilla"], "1 + 0.2)), where A < 0 at most -3 A;"),
        (["policy_loss=cispo", "policy_loss.weight_max=5"], "-sg(clip(r, 1 - 0.2, 5)) A log pi"),
        (
            ["policy_loss=is_reinforce", "policy_loss.anchor=rollout"],
            "rollout_logprobs: for policy loss",
        ),
        (["aggregation=constant", "loss.aggregation.length=100"], "weight = 1 / (S 100)"),
        (["aggregation=token_sum"], "not divided: its scale grows"),
        (["aggregation=prompt_mean"], "group_ids: for aggregation 'prompt_mean'"),
        (
            ["aggregation=seq_mean_token_mean", "loss.aggregation.count_empty=true"],
            "without scored tokens are counted, too",
        ),
        (["loss.entropy_coef=0.01"], "- 0.01 x the policy's entropy"),
        (["loss.positive_nll_coef=0.1"], "+ 0.1 x the mean of -log pi over the N+ tokens with A > 0"),
        (
            ["loss.log_ratio_range=[null,null]"],
            "[-inf, 68.7] nats (the ceiling is what fp32 can hold)",
        ),
        (["loss.log_ratio_range=[null,10]"], "[-inf, 10] nats"),
        (["kl=k1_is_corrected"], "reweighted by the ratio to pi_old"),
        (
            ["policy_loss=gspo", "kl=k3_is_corrected", "loss.kl_ratio_level=sequence"],
            "through the geometric mean of the sequence's ratios to pi_old, which multiplies the value",
        ),
        (["policy_loss=gspo", "policy_loss.delta=4"], "log(pi / pi_old)), at most 4 where it is not clipped"),
        (["kl=full"], "KL(policy || reference) over the whole vocabulary"),
        (
            ["correction=opsm"],
            "each sequence with A < 0 is dropped unless the mean over its tokens of log(pi_rollout / pi) is",
        ),
        (["correction=tis"], "old_logprobs: for a correction rollout_logprobs: for a correction"),
        (["correction=veto"], "at least 0.0001 and at most 100 for every token in it"),
        (["correction=decoupled"], "weighted by pi_old / pi_rollout, unbounded"),
        (["loss=ce"], "weight x (-log pi)"),
        (["loss=oreal"], "1 x NLL+"),
        (["loss=oreal"], "1 / N+ where A > 0, 1 / N- elsewhere"),
        (["loss=opd"], "teacher_logprobs: for policy loss 'opd'"),
        (["loss=opd", "loss.variant=top_k"], "divergence between policy and teacher"),
        (["loss=preset/verl/gspo"], "[-inf, 10] nats"),
        (["policy_loss=nll", "policy_loss.only_positive=false"], "-log pi options"),
        (["policy_loss=nll"], "-log pi, 0 where A <= 0 options"),
        (["policy_loss=real", "policy_loss.only_mixed=true"], "; 0 for a group without both kinds"),
        (["policy_loss=topr_sequence"], "-A log pi where A > 0, else -sg(clip(R, 0, 1)) A log pi; R = product over"),
        (["policy_loss=topr_sequence", "policy_loss.token_ratio=true"], "R = pi / pi_old of the token alone;"),
        (["policy_loss=topr", "policy_loss.negative_weight=0"], "-A log pi where A > 0, else 0;"),
        (["policy_loss=topr", "policy_loss.positive_weight=0.5"], "-0.5 A log pi where A > 0"),
        (["policy_loss=cispo", "policy_loss.use_unified_mask=true"], "0 where r is above that range with A > 0"),
        (["policy_loss=vespo", "policy_loss.use_rollout_weight=true"], "pi / pi_old x min(pi_old / pi_rollout, 2);"),
        (["policy_loss=vespo", "policy_loss.use_rollout_weight=true"], "reported it): a factor of the weight"),
        (["policy_loss=vespo"], "log w between -18.4 and 20"),
        (["policy_loss=gspo", "policy_loss.average_advantages=true"], "; A is the mean of the sequence's"),
        (["policy_loss=fipo"], "kept in 1 to 1 + 0.2, in 0.8 to 1 where A < 0 and r > 4"),
        (["policy_loss=fipo", "policy_loss.only_raise=false"], "kept in 1 - 0.2 to 1 + 0.2"),
        (["policy_loss=dppo_tv"], "-r A unless"),
        (["policy_loss=dppo_tv", "policy_loss.clip_ratio_c=20"], "-min(r, 20) A unless"),
        (
            ["policy_loss=dppo_kl", "policy_loss.form=score", "policy_loss.clip_ratio_c=20"],
            "-sg(min(r, 20)) A log pi unless",
        ),
        (["policy_loss=dppo_kl", "policy_loss.form=score"], "the weight is computed from log ratios held in [-20, 20]"),
        (["policy_loss=aspo"], "-A sg(min(1 / r, 3)) pi / sg(pi)"),
        (["policy_loss=kimi"], "outside it has no gradient, and -A grad log pi stays"),
        (["kl=k1_in_reward", "mode=chunk"], "one pass over the tokens"),
        (["loss=opd", "loss.variant=top_k", "mode=chunk"], "the general path"),
        (["rollout.temperature=0.7"], "logits are divided by temperature 0.7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_each_choice_adds(overrides: list[str], words: str) -> None:
    assert words in explained(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy_loss=reinforce"], "log ratio"),
        (["policy_loss=nll"], "log ratio"),
        (["policy_loss=cispo"], "the gradient is 0 outside"),
        (["policy_loss=kimi", "policy_loss.tau=0"], "(0 / 2)"),
        (["policy_loss=ipo", "policy_loss.log_ratio_sq_coef=0"], "(log r)^2"),
        (["loss=opd"], "(log r)^2"),
        (["loss=opd", "loss.variant=top_k"], "pi_old"),
        (["loss=opd", "loss.variant=top_k"], "|log r|"),
        (["kl=full", "mode=chunk"], "one pass"),
        (["policy_loss=vespo"], "factor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_hold_is_not_said(overrides: list[str], words: str) -> None:
    assert words not in explained(*overrides)


@pytest.mark.parametrize("name", sorted(set(policy_loss_names()) - {"vespo"}))
def test_the_usual_bounds_are_not_named_where_others_hold(name: str) -> None:
    text = " ".join(explain_loss(config(name, log_ratio_range=(None, 10.0))).split())
    assert not re.search(r"20 nats|Differs\.|\band head|in head", text), text


def test_the_largest_log_ratio_is_that_of_the_code() -> None:
    assert bounded(torch.tensor([1e3]), None, None).item() == pytest.approx(LARGEST_LOG_RATIO, abs=0.05)


def test_the_run_around_the_loss() -> None:
    done = run("kl=k1_in_reward", "kl_control=adaptive", "advantage=rloo")
    text = " ".join(done.stdout.split())
    assert "reward R - 0.001 x the sum over the completion of k1" in text
    assert "kl control adaptive: the coefficient rises while the KL of a completion is above 1 nats" in text
    assert "advantage rloo: " in text
    done = run("advantage=gae")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: advantage=gae needs 'values'")


def test_a_plugin_without_a_formula() -> None:
    @register_policy_loss("mine")
    def mine(t, *, eps: float = 0.2):
        return -t.ratio() * t.advantages

    text = explain_loss(config("mine", options={"eps": 0.3}))
    assert "mine(t, eps=0.3) (no formula registered)" in text
    assert "(no source)" in text


NEEDY: list[Any] = [
    config(),
    config(use_kl_loss=True, kl_loss_type="k2"),
    config("is_reinforce", options={"anchor": "rollout"}),
    config(use_kl_loss=True, kl_loss_type="k1", kl_gradient="is_corrected", kl_anchor="rollout"),
    config(correction=[{"action": "clamp_upper", "upper": 2.0}]),
    config(correction=[{"action": "clamp_upper", "between": "current_rollout"}]),
    config("vespo", options={"use_rollout_weight": True}),
    config("opd"),
    config("real", aggregation="prompt_mean"),
    config(aggregation="prompt_mean"),
    config(use_kl_loss=True, kl_loss_type="full"),
    OrealLossConfig(),
    OPDLossConfig(),
    OPDLossConfig(teacher="reference"),
    OPDLossConfig(variant="top_k"),
]


@pytest.mark.parametrize("cfg", NEEDY, ids=range(len(NEEDY)))
def test_what_the_items_need_is_what_the_loss_asks_for(cfg: Any) -> None:
    given = {name: -torch.ones(2, 3) for name in cfg.required_fields}
    labels = torch.ones(2, 3, dtype=torch.int64)
    for name in given:
        if "topk" in name:
            given[name] = torch.full((2, 3, 4), 0.25).log()
    if "group_ids" in given:
        given["group_ids"] = torch.zeros(2, 1, dtype=torch.int64)

    def build(fields: dict[str, torch.Tensor]) -> None:
        cfg.loss_ctx_cls.build_batches_loss_kwargs([RLLossContextInputItem(shifted_labels=labels, **fields)], cfg)

    build(given)
    for name in given:
        with pytest.raises(DataError, match=name):
            build({key: value for key, value in given.items() if key != name})


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy_loss=cispo", "policy_loss.clip_ratio_c=3"], "policy_loss.clip_ratio_c"),
        (["loss.aggregation.length=5"], "length=5.0 has no effect on aggregation 'token_mean'"),
        (["loss.kl_gradient=straight_through"], "has no effect without use_kl_loss=True"),
        (["loss=ce", "policy_loss=gspo"], "policy_loss=gspo has no effect"),
        (["loss=preset/verl/gspo", "policy_loss=gspo"], "defines its policy loss"),
        (["policy_loss=gsop"], "try: policy_loss=gspo"),
    ],
)
def test_settings_that_nothing_reads_end_in_one_line(
    overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["toolkit-explain", *overrides])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert words in said.err


# -------------------------------------------------------------------- the command and the tables


@pytest.mark.slow
def test_the_command_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['explain', 'policy_loss=gspo', 'kl=k1']\n"
        "from toolkit.explain.__main__ import main; main(); sys.stderr.write(str('torch' in sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "False"
    assert done.stdout.count("zero expected gradient") == 1  # the library's own warning is not said again
    assert after.ru_utime - before.ru_utime < 3  # seconds of a CPU; 1 on an idle machine


def test_settings_around_the_loss_are_seen() -> None:
    done = run("aggregation=constant", "loss.aggregation.length=1024", "advantage=grpo", "rollout.max_new_tokens=2000")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "use advantage=dr_grpo" in text
    assert "set loss.aggregation.length=2000" in text


def test_an_option_without_effect_is_noted() -> None:
    done = run("loss.kl_loss_type=k3")
    assert "kl_loss_type='k3' has no effect with use_kl_loss=False" in done.stdout + done.stderr


def test_the_list_has_everything() -> None:
    text = listing()
    for name in policy_loss_names():
        assert f"policy_loss={name} " in text
    for group in ("kl", "aggregation", "correction", "loss"):
        for path in Path(conf_dir(), group).glob("*.yaml"):
            assert f"{group}={path.stem} " in text
    for path in Path(conf_dir(), "loss/preset").glob("*/*.yaml"):
        assert re.search(rf"^  {path.parent.name} .*\b{path.stem}\b", text, flags=re.MULTILINE)


def test_the_page_has_the_tables_that_the_code_makes() -> None:
    made = run("--markdown").stdout.strip()
    assert made.count("`policy_loss=") == len(policy_loss_names())
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == made, "run: python -m toolkit.explain --markdown tutorials/reference/losses.md"


def test_writing_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert run("--markdown", str(page)).returncode == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old\n" not in text.splitlines()
    assert with_markdown(text) == text
    page.write_text("nothing")
    done = run("--markdown", str(page))
    assert done.returncode == 1
    assert f"--markdown {page}: it has no <!-- losses:begin -->" in done.stderr


MY_PPO = """import torch
from toolkit import register_policy_loss

@register_policy_loss("my_ppo")
def my_ppo(t, *, eps: float = 0.2):
    r = t.ratio()
    return -torch.minimum(r * t.advantages, r.clamp(1 - eps, 1 + eps) * t.advantages)
"""


OWN = ["plugins=[my_file.py]", "policy_loss=my_ppo", "policy_loss.eps=0.3"]
SMALL = ["training.steps=1", "warmup.steps=1", "task.num_heldout=16", "rollout.prompts_per_step=4", "hydra.run.dir=out"]


@pytest.fixture
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_file.py").write_text(MY_PPO)
    assert len([line for line in MY_PPO.splitlines() if line]) <= 8


@pytest.mark.usefixtures("_plugin")
def test_a_loss_in_eight_lines_is_explained() -> None:
    assert "my_ppo(t, eps=0.3)" in explained(*OWN)
    with pytest.raises(ConfigError, match=r"try: policy_loss\.eps=0\.3"):
        explained(*OWN[:2], "policy_loss.epss=0.3")


@pytest.mark.slow
@pytest.mark.usefixtures("_plugin")
def test_a_loss_in_eight_lines_trains() -> None:
    done = run_module("toolkit.train", *OWN, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stderr
    assert Path("out/summary.json").is_file()


def test_training_says_what_is_known_to_be_wrong(capsys: Any) -> None:
    from toolkit.train import _say_notes

    class Run:
        loss = config("gspo", entropy_coef=-0.5)
        advantage = type("A", (), {"estimator": "grpo", "options": {}})
        rollout = type("R", (), {"max_new_tokens": None})

    _say_notes([Run, Run])  # type: ignore[list-item]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["note", "note"]


@pytest.mark.parametrize(("kl", "is_theirs"), [("kl=k3", False), ("kl=k3_is_corrected", True)])
def test_a_preset_of_trl_says_which_kl_is_trls(kl: str, is_theirs: bool) -> None:
    text = " ".join(run("loss=preset/trl/dapo", kl).stdout.split())
    assert "kl of TRL with beta > 0 and without clamps: kl_loss_type=k3, kl_gradient=is_corrected" in text
    assert ("the KL term is not TRL's" in text) != is_theirs
