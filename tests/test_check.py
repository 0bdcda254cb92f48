"""``toolkit.check``: every built-in loss passes, and each kind of broken loss is told what is wrong with it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import slow_unless
from tests.processes import run_module
from toolkit import GRPOLossConfig
from toolkit.check import process_checks as spread
from toolkit.check.__main__ import main
from toolkit.check.outcome import Outcome, report_of
from toolkit.check.subject import Subject, load_subject
from toolkit.check.suite import run_suite
from toolkit.errors import ConfigError
from toolkit.functional import scope_check
from toolkit.functional.policy.registry import policy_loss, policy_loss_names, register_policy_loss
from toolkit.functional.scope_check import undeclared
from toolkit.training.rehearsal import rehearse

NAMES = slow_unless(lambda _, name: name in spread.REPRESENTATIVE, policy_loss_names())
"""All built-in losses; without -m slow one of each scope."""
MY_PPO = """import torch
from toolkit import register_policy_loss


@register_policy_loss("my_ppo")
def my_ppo(t, *, eps: float = 0.2):
    r = t.ratio()
    return -torch.minimum(r * t.advantages, r.clamp(1 - eps, 1 + eps) * t.advantages)


def undecorated(t, *, eps: float = 0.2):
    return -t.ratio().clamp(1 - eps, 1 + eps) * t.advantages


def flipped(t):
    return t.ratio() * t.advantages


def raises(t):
    return t.logprob * t.advantages
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope_check, "_passed", set())


def outcomes_of(function: Callable, **declared) -> dict[str, Outcome]:
    register_policy_loss("mine", **declared)(function)
    return {outcome.name: outcome for outcome in run_suite(load_subject("mine"))}


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_loss_passes(name: str) -> None:
    outcomes = run_suite(load_subject(name))
    assert not [str(outcome) for outcome in outcomes if outcome.status not in ("ok", "not applicable")]
    # What a check leaves out has a reason that the loss declares.
    left_out = {outcome.name for outcome in outcomes if outcome.status == "not applicable"}
    loss = policy_loss(name)
    allowed = set()
    if loss.scope == "batch":
        allowed.add("keeps to the declared scope")
    if "teacher_logprobs" in loss.needs:
        allowed.add("gradient sign")
    if not loss.options_model.model_fields:
        allowed.add("every option matters")
    assert left_out == allowed


# -------------------------------------------------------------------- broken losses


def averaged(t):
    return (-t.ratio() * t.advantages).mean()


def in_place_on_advantages(t):
    t.advantages.mul_(2)
    return -t.ratio() * t.advantages


def in_place_on_logprobs(t):
    return -t.logprobs.sub_(t.old_logprobs).exp() * t.advantages


def of_the_sequence(t):
    return -t.segment_mean(t.ratio()) * t.advantages


def of_the_batch(t):
    return -t.ratio() * (t.advantages - t.advantages.mean())


def averaged_already(t):
    return -t.ratio() * t.advantages / len(t.advantages)


def log_of_a_negative(t):
    return -t.ratio() * t.advantages.log()


def wrong_sign(t):
    return t.ratio() * t.advantages


def swapped(t):
    return -(t.old_logprobs - t.logprobs).exp() * t.advantages


def detached(t):
    return -t.ratio().detach() * t.advantages


def without_advantages(t):
    return -t.ratio()


def with_an_idle_option(t, *, eps: float = 0.2, beta: float = 0.1):
    return -t.ratio().clamp(1 - eps, 1 + eps) * t.advantages


def with_an_idle_switch(t, *, use_it: bool = False):
    return -t.ratio() * t.advantages


def unbounded(t):
    return -(t.logprobs - t.old_logprobs).exp() * t.advantages


def masked_by_a_product(t):
    ratio = (t.logprobs - t.old_logprobs).exp()
    return -t.logprobs * t.advantages + ratio * (ratio < 2) * 0.01 * t.advantages


def half(t):
    return -(t.ratio().half() * t.advantages.half())


def half_inside(t):
    return -(t.ratio().half() * t.advantages).to(t.logprobs.dtype)


def at_random(t):
    return -t.ratio() * t.advantages * (torch.rand(t.advantages.shape) > 0.5)


def whitened(t):
    return -t.ratio() * (t.advantages - t.advantages.mean()) / t.advantages.std()


def index_error(t):
    return -t.ratio() * t.advantages[: t.num_sequences]


@pytest.mark.parametrize(
    ("function", "check", "words"),
    [
        (averaged, "one loss for each token", r"returned \[\] torch\.float64; it must return one loss for each"),
        (index_error, "one loss for each token", r"it raised RuntimeError: .*\(test_check\.py:\d+\)"),
        (in_place_on_advantages, "inputs are left as they were", r"t\.advantages in place.*without the underscore"),
        (in_place_on_logprobs, "inputs are left as they were", r"t\.logprobs in place"),
        (of_the_batch, "keeps to the declared scope", "scope='batch'"),
        (averaged_already, "keeps to the declared scope", r"halve .* divides by their number; .* without / len"),
        (
            log_of_a_negative,
            "the same again when called again",
            "the loss is NaN at . of 13 made-up tokens.*clamp what",
        ),
        (whitened, "keeps to the declared scope", "scope='batch'"),
        (at_random, "the same again when called again", "selected_at_random"),
        (wrong_sign, "gradient sign", r"A > 0 should lower the loss.*\+.*minus sign missing"),
        (swapped, "gradient sign", "policies swapped"),
        (detached, "gradient sign", r"no token has a gradient.*detached"),
        (without_advantages, "gradient sign", r"neither loss nor gradient changes with t\.advantages"),
        (with_an_idle_option, "every option matters", r"'beta' changes neither loss nor gradient.*tried 0\.2, 0\.05"),
        (with_an_idle_switch, "every option matters", r"'use_it' changes neither.*tried True instead of False"),
        (unbounded, "finite at log ratios of +-25 and +-100", r"is -?inf in float32 .*t\.ratio\(\)"),
        (masked_by_a_product, "finite at log ratios of +-25 and +-100", r"nan in float32.*inf x 0 is NaN"),
        (half, "precision", r"losses in torch\.float16; compute in float32"),
        (half_inside, "precision", r"do not change with a step of 1e-06.*half precision; remove \.half\(\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_loss_is_told_what_is_wrong(function: Callable, check: str, words: str) -> None:
    outcomes = outcomes_of(function)
    assert outcomes[check].status == "failed"
    assert re.search(words, outcomes[check].words), outcomes[check].words


@pytest.mark.parametrize("scope", ["token", "sequence", "group"])
def test_the_scope_that_is_needed(scope: str) -> None:
    outcomes = outcomes_of(of_the_sequence, scope=scope)
    if scope == "token":
        # The loss itself refuses to give statistics that it did not ask for, or the comparison finds out.
        assert "scope='sequence'" in outcomes["keeps to the declared scope"].words
    else:
        assert {outcome.status for outcome in outcomes.values()} <= {"ok", "not applicable"}


def test_nothing_runs_after_a_loss_that_cannot_be_called() -> None:
    outcomes = list(outcomes_of(averaged).values())
    assert {outcome.status for outcome in outcomes[1:]} == {"not run"}
    lines = report_of(str(load_subject("mine")), outcomes, 1.0).splitlines()
    assert lines[-2] == "-     12 more checks skipped until this is fixed"
    assert len(lines) == 5


def test_a_random_loss_is_not_told_to_widen_its_scope() -> None:
    outcomes = outcomes_of(at_random)
    assert outcomes["keeps to the declared scope"].status == "not run"
    assert "scope=" not in " ".join(outcome.words for outcome in outcomes.values())


def test_the_same_cause_is_told_once() -> None:
    outcomes = [Outcome("a", "failed", "the cause"), Outcome("b", "failed", "the cause")]
    text = report_of(str(load_subject("vanilla")), outcomes, 1.0)
    assert text.count("the cause") == 1
    assert "the same as: a" in text


@pytest.mark.parametrize("name", ["ref_logprobs", "rollout_logprobs", "teacher_logprobs", "entropies"])
@pytest.mark.parametrize("with_given", [False, True])
def test_a_field_that_is_not_declared(name: str, with_given: bool) -> None:
    def reads(t):
        values = t.require(name) if with_given else getattr(t, name)
        return -t.ratio() * t.advantages + 0.01 * (t.bounded(values) - t.bounded(t.logprobs)).square()

    words = outcomes_of(reads)["one loss for each token"].words
    assert f"t.{name} without declaring it" in words
    assert f"needs=('{name}',)" in words
    register_policy_loss("mine", needs=(name,), overwrite=True)(reads)
    assert run_suite(load_subject("mine"))[0].status == "ok"


def test_groups_are_there_for_wide_scopes_alone() -> None:
    def reads(t):
        return -t.ratio() * t.advantages * (1 + 0 * t.group_ids)

    assert "scope='group'" in outcomes_of(reads)["one loss for each token"].words
    register_policy_loss("mine", scope="group", overwrite=True)(reads)
    assert {outcome.status for outcome in run_suite(load_subject("mine"))} <= {"ok", "not applicable"}


def no_gradient(t):
    with torch.no_grad():
        return -t.ratio() * t.advantages


def typo(t):
    return -t.ratio() * t.advantage


def reads_the_reference(t):
    return -t.ratio() * t.advantages + 0.01 * (t.logprobs - t.ref_logprobs)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_gradient, r"'mine' has no gradient.*no_grad"),
        (typo, r"'mine' \(test_check\.py:\d+\): t\.advantage is not a field.*did you mean 'advantages'"),
        (reads_the_reference, r"'mine': it reads t\.ref_logprobs.*needs=\('ref_logprobs',\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_the_rehearsal_says_it_in_one_line(function: Callable, words: str, mode: str) -> None:
    register_policy_loss("mine")(function)
    with pytest.raises(ConfigError, match=words) as caught:
        rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": "mine"}, mode=mode))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_loss_is_rehearsed(name: str) -> None:
    loss = policy_loss(name)
    assert undeclared(loss, loss.options({})) is None  # and the rehearsal, which gives no more, does not raise
    rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": name}))
    if "anchor" in policy_loss(name).options_model.model_fields:
        rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": name, "anchor": "rollout"}))


def test_an_option_brings_the_sampler() -> None:
    loss = policy_loss("vespo")
    assert undeclared(loss, loss.options({"use_rollout_weight": True})) is None
    rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": "vespo", "use_rollout_weight": True}))


def test_an_error_without_words_is_told_by_its_class() -> None:
    @register_policy_loss("mine")
    def mine(t):
        assert t.logprobs.sum() > 0
        return t.logprobs

    with pytest.raises(ConfigError, match="policy loss 'mine': it raised AssertionError"):
        rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": "mine"}))


def test_options_are_shown_as_people_write_them() -> None:
    def unread(t, *, eps: float = 0.2):
        return -t.ratio() * t.advantages

    register_policy_loss("mine")(unread)
    subject = load_subject("mine", {"eps": 0.1 + 0.2})
    assert str(subject) == "mine (scope token; eps=0.3)"
    (said,) = [outcome.words for outcome in run_suite(subject) if outcome.status == "failed"]
    assert "(tried 0.6, 0.15, 0.4, 3 instead of 0.3)" in said


def test_a_kl_brings_the_reference() -> None:
    register_policy_loss("mine")(reads_the_reference)
    with pytest.raises(ConfigError, match="ref_logprobs"):
        rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": "mine"}))
    rehearse(GRPOLossConfig(policy_loss_cfg={"loss_type": "mine"}, use_kl_loss=True, kl_loss_type="k2"))


@pytest.mark.parametrize(("scope", "is_found"), [("batch", True), ("token", True)])
def test_random_numbers_are_found(scope: str, is_found: bool) -> None:
    outcomes = outcomes_of(at_random, scope=scope)
    assert any(outcome.status == "failed" for outcome in outcomes.values()) == is_found
    if scope == "batch":
        assert "selected_at_random" in outcomes["the same again when called again"].words


def test_a_loss_that_cannot_do_without_tokens_is_found() -> None:
    def against_the_best(t):
        return -t.ratio() * (t.advantages - t.advantages.max())

    outcome = outcomes_of(against_the_best, scope="batch")["nothing to score gives 0"]
    assert outcome.status == "failed"
    assert "fails without tokens" in outcome.words


@pytest.mark.parametrize("check", ["micro-batches and packing do not matter", "eager and chunk mode agree"])
def test_what_the_made_up_tokens_alone_do_not_show(check: str) -> None:
    """A threshold on the number of tokens that only a real batch reaches."""

    def guarded(t):
        return -t.ratio() * t.advantages * (1 if len(t.advantages) < 15 else 2)

    outcomes = outcomes_of(guarded)
    assert outcomes["keeps to the declared scope"].status == "ok"
    assert outcomes[check].status == "failed"
    assert "gradient of the h" in outcomes[check].words or "loss differs" in outcomes[check].words


def test_values_from_outside_of_the_terms_are_found() -> None:
    """A loss that remembers a tensor of its first call."""
    seen = []

    def remembers(t):
        seen.append(t.logprobs)
        return -t.ratio() * t.advantages * (1 + 0.1 * len(seen))

    outcomes = outcomes_of(remembers)
    assert "failed" in {outcome.status for outcome in outcomes.values()}


def test_an_option_that_only_another_one_opens() -> None:
    def gated(t, *, use_cap: bool = False, cap: float = 3.0):
        return -(t.ratio().clamp(max=cap) if use_cap else t.ratio()) * t.advantages

    assert outcomes_of(gated)["every option matters"].status == "ok"


# -------------------------------------------------------------------- the command


@pytest.fixture
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_file.py").write_text(MY_PPO)


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("toolkit.check", *arguments)


@pytest.mark.usefixtures("_plugin")
def test_the_command_on_a_file() -> None:
    done = check("my_file.py:my_ppo", "eps=0.3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "my_ppo (scope token; eps=0.3)"
    assert len([line for line in lines if line.startswith("ok ")]) == 13
    assert re.fullmatch(r"13 checks passed; \d+\.\d s", lines[-1])


@pytest.mark.usefixtures("_plugin")
def test_the_command_on_a_broken_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["toolkit-check", "my_file.py:flipped"])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr()
    assert "FAIL  gradient sign" in said.out
    assert "is a minus sign missing" in said.out
    assert re.search(r"1 failed: gradient sign; \d+\.\d s$", said.out.strip())
    assert not said.err


@pytest.mark.usefixtures("_plugin")
def test_losses_are_found_in_files_modules_and_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_subject("my_file.py:my_ppo").loss.name == "my_ppo"
    assert load_subject("my_file.py:undecorated", {"eps": 0.1}).options == {"eps": 0.1}
    monkeypatch.syspath_prepend(".")
    Path("my_module.py").write_text(MY_PPO.replace("my_ppo", "of_a_module"))
    assert load_subject("my_module:of_a_module").loss.name == "of_a_module"
    assert load_subject("gspo").loss.scope == "sequence"


@pytest.mark.usefixtures("_plugin")
@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("my_file.py:my_pp", {}, r"no function 'my_pp'; it has .*'my_ppo'.*did you mean 'my_ppo'"),
        ("my_file.py", {}, "my_file.py:my_ppo"),
        ("nothing.py:f", {}, "file 'nothing.py' does not exist"),
        ("no_module:f", {}, "no_module"),
        ("vanila", {}, "did you mean 'vanilla'"),
        ("my_file.py:my_ppo", {"epss": 1}, "did you mean 'eps'"),
        ("my_file.py:my_ppo", {"eps": "x"}, "my_ppo.eps='x' is not allowed"),
    ],
)
def test_wrong_arguments(what: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_subject(what, options)


@pytest.mark.usefixtures("_plugin")
def test_an_error_of_the_function_names_its_line() -> None:
    subject = load_subject("my_file.py:raises")
    outcomes = run_suite(subject)
    assert "did you mean 'logprobs'" in outcomes[0].words
    assert "(my_file.py:20)" in outcomes[0].words
    text = report_of(str(subject), outcomes, 1.0)
    assert "FAIL  one loss for each token" in text
    assert text.endswith("1.0 s")


def test_the_command_refuses_words_without_a_value() -> None:
    done = check("vanilla", "eps")
    assert done.returncode == 1
    assert done.stderr == "error: 'eps' is not an option of the loss; write option=value, such as eps=0.3\n"


def test_the_command_without_a_loss() -> None:
    for arguments in ((), ("--wrong",)):
        done = check(*arguments)
        assert done.returncode == 1
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr)


@pytest.mark.slow
def test_a_reader_that_stops_early() -> None:
    command = f"{sys.executable} -m toolkit.explain --list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_subject_is_called_on_copies() -> None:
    register_policy_loss("mine")(in_place_on_advantages)
    terms = scope_check.made_up_terms(0.3)
    before = terms.advantages.clone()
    Subject(policy_loss("mine"), {})(terms)
    assert torch.equal(terms.advantages, before)


# -------------------------------------------------------------------- over processes


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("_plugin")
def test_the_command_over_processes() -> None:
    done = check("--distributed", "2", "my_file.py:my_ppo", "eps=0.3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "my_ppo (scope token; eps=0.3), 2 processes"
    assert [re.sub(r" +\d+\.\d\d s$", "", line) for line in lines[1:-1]] == [
        "ok    processes and micro-batches do not matter",
        "ok    packed rows over processes",
        "ok    sequence parallelism does not matter",
    ]
    assert re.fullmatch(r"3 checks passed; \d+\.\d s", lines[-1])


@pytest.mark.slow
def test_outcomes_over_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the processes do, here in one: a loss that looks beyond its scope, one that needs more, and all scopes."""
    monkeypatch.setattr(spread, "run_processes", lambda number, function, *given: function(*given))
    outcomes = spread.run_spread(2)
    assert [outcome.name for outcome in outcomes] == [
        "cross-entropy",
        "oreal",
        *(f"policy loss {name}" for name in spread.REPRESENTATIVE),
    ]
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert {policy_loss(name).scope for name in spread.REPRESENTATIVE} == {"token", "sequence", "group", "batch"}

    register_policy_loss("mine")(averaged)
    monkeypatch.setattr(sys, "argv", ["toolkit-check", "--distributed", "2", "mine"])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().out
    assert "FAIL  2 processes" in said
    assert "it must return one loss for each of the" in said

    register_policy_loss("mine", overwrite=True)(of_the_batch)
    monkeypatch.setattr("toolkit.losses.step.item_checks.check_scope", lambda *_: None)  # it would be told there
    outcome, *_ = spread.run_spread(2, "mine")
    assert outcome.status == "failed"
    assert "likely cause: " in outcome.words
    assert "gradient of the head: " in outcome.words


@pytest.mark.parametrize("number", ["0", "1", "17", "two", "my_file.py:my_ppo"])
def test_numbers_of_processes_that_cannot_be(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["toolkit-check", "--distributed", number])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == (
        f"error: --distributed {number}: give the number of processes, 2 to 16, before the loss: toolkit-check "
        "--distributed 2 my_file.py:my_loss\n"
    )


@pytest.mark.slow
def test_help_and_wrong_numbers_need_no_torch() -> None:
    for arguments in (["--help"], ["--distributed", "x"], ["--distributed"]):
        code = (
            f"import sys; sys.argv = ['toolkit-check', *{arguments!r}]\nfrom toolkit.check.__main__ import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [[], ["--distributed", "2"]])
def test_a_file_that_cannot_be_read_is_found_before_torch(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def mine(t:\n")
    monkeypatch.setattr("toolkit.check.subject.load_subject", None)
    for source, words in (
        (tmp_path / "nowhere.py", f"error: plugins: file '{tmp_path / 'nowhere.py'}' does not exist (looked for"),
        (broken, f"error: plugins: '{broken}' cannot be loaded: SyntaxError: '(' was never closed"),
    ):
        monkeypatch.setattr(sys, "argv", ["toolkit-check", *flags, f"{source}:mine"])
        with pytest.raises(SystemExit, match="1"):
            main()
        assert capsys.readouterr().err.startswith(words)


def test_a_loss_that_raises_needs_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "run_processes", None)
    register_policy_loss("mine")(typo)
    (outcome,) = spread.run_spread(2, "mine")
    assert outcome.status == "failed"
    assert re.fullmatch(r"policy loss 'mine' \(.*test_check\.py:\d+\): t\.advantage is not a field .*", outcome.words)


def test_the_time_is_that_of_the_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading what is checked, torch included, takes longer than the checks."""
    now = [0.0]
    monkeypatch.setattr("toolkit.check.__main__.time.perf_counter", lambda: now[0])

    def loaded(what: str, options: dict) -> Subject:
        now[0] += 50.0
        return load_subject(what, options)

    def checked(subject: Subject) -> list[Outcome]:
        now[0] += 2.0
        return [Outcome("one", "ok")]

    monkeypatch.setattr("toolkit.check.subject.load_subject", loaded)
    monkeypatch.setattr("toolkit.check.suite.run_suite", checked)
    monkeypatch.setattr(sys, "argv", ["toolkit-check", "vanilla"])
    main()
    assert capsys.readouterr().out.endswith("1 checks passed; 2.0 s\n")
