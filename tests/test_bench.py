"""The benchmark command at a toy shape. Timings are not tested: they belong to the benchmark itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from toolkit import ConfigError
from toolkit.bench import measure, report
from toolkit.bench.config import BENCH, BenchConfig, build_bench
from toolkit.bench.overhead import BUILDERS
from toolkit.bench.peers import PEERS
from toolkit.bench.problem import make_problem
from toolkit.bench.variants import FLOOR, variants
from toolkit.compose.schemas import conf_dir
from toolkit.compose.tree import compose_config
from toolkit.losses import scored


def toy(*overrides: str):
    return build_bench(compose_config(["bench=toy", "bench.rounds=1", *overrides], root=BENCH))


@pytest.mark.parametrize("preset", sorted(path.stem for path in Path(conf_dir(), "bench").glob("*.yaml")))
def test_every_preset_composes(preset: str) -> None:
    config, loss_cfg = build_bench(compose_config([f"bench={preset}"], root=BENCH))
    assert isinstance(config, BenchConfig)
    assert (loss_cfg.mode, loss_cfg.chunk_size) == ("chunk", config.chunk_size)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bench=hed"], "try: bench=head"),
        (["bench.shap=[1,2,3]"], "try: bench.shape="),
        (["bench.shape=[1,2]"], "bench.shape"),
        (["bench.shape=[1000,8,16]"], "do not fill"),
        (["bench.dtype=fp8"], "bench.dtype='fp8' is not one of the choices"),
        (["policy_loss=vanila"], "try: policy_loss=vanilla"),
        (["training.steps=3"], "training.steps is not a setting"),
        (["loss.temperature=0.5"], "loss.temperature=0.5 is not in the benchmark"),
        (["loss.softcap=2"], "the cap of all variants is bench.softcap"),
        (["bench.cases=model"], "add bench.accuracy=false"),
        (["bench.ignored=1.5"], "bench.ignored=1.5 is not allowed"),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_bench(compose_config(overrides, root=BENCH))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "overrides", [[], ["policy_loss=gspo"], ["loss=ce", "bench.softcap=2"], ["kl=k3", "bench.frozen_head=true"]]
)
def test_every_variant_computes_the_same(overrides: list[str]) -> None:
    # In float64, so that a wrong variant cannot hide behind rounding.
    fixed = ["bench.dtype=float64", "bench.memory=false", "bench.peers=false", "bench.cases=all"]
    config, loss_cfg = toy(*fixed, *overrides)
    results = measure.measure_all(config, loss_cfg)
    measured = [result for result in results if result.errors]
    assert len(measured) >= 12
    for result in measured:
        assert max(result.errors.values()) < 1e-9, (result.name, result.errors)


def test_every_way_to_step_a_model_computes_the_same() -> None:
    config, loss_cfg = toy("bench.cases=model", "bench.accuracy=false", "bench.dtype=float64", "bench.peers=false")
    found = []
    for variant in variants(config, loss_cfg)[1:]:
        if variant.why_not is None:
            problem = variant.problem()
            problem.clear()
            loss = variant.build(problem)()
            found.append((variant.name, loss.item(), problem.hidden.grad.clone()))
    assert len(found) >= 6
    (_, loss, grad), *others = found
    assert grad.abs().max() > 1e-5
    for name, other, other_grad in others:
        assert other == pytest.approx(loss, rel=1e-9), name
        torch.testing.assert_close(other_grad, grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_problem_is_the_one_that_was_asked_for() -> None:
    config, loss_cfg = toy("bench.zero_advantage=0.5", "bench.ignored=0.25")
    problem = make_problem(config, loss_cfg)
    fields = dict(problem.item.tensors())
    assert list(fields["shifted_labels"].shape) == [8, 32]
    assert (fields["shifted_labels"] == -100).float().mean() == 0.25
    assert (fields["advantages"][:, 0] == 0).float().mean() == 0.5
    again = make_problem(config, loss_cfg)
    assert torch.equal(problem.hidden, again.hidden)


def test_an_absent_peer_is_named_and_a_failing_one_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(problem):
        raise RuntimeError("out of luck\nand more")

    from toolkit.bench import variants as module
    from toolkit.bench.peers import Peer

    absent = Peer("absent", breaks, lambda config, loss_cfg: "absent-peer is not installed")
    broken = Peer("broken", breaks, lambda config, loss_cfg: None)
    monkeypatch.setattr(module, "PEERS", (absent, broken))
    config, loss_cfg = toy("bench.memory=false")
    results = {r.name: r for r in measure.measure_all(config, loss_cfg)}
    assert results["absent"].skipped == "absent-peer is not installed"
    assert results["broken"].skipped == "failed: RuntimeError: out of luck"
    assert len(results["toolkit"].cpu) == 1


def test_peers_that_are_installed_are_measured() -> None:
    config, loss_cfg = toy()
    names = {variant.name: variant.why_not for variant in variants(config, loss_cfg)}
    assert set(names) > {peer.name for peer in PEERS}
    assert names["torch, linear_cross_entropy"] is None or "has no chunked" in names["torch, linear_cross_entropy"]


def test_the_report_holds_what_was_measured(tmp_path: Path) -> None:
    config, loss_cfg = toy("bench.memory=false", "bench.peers=false")
    results = measure.measure_all(config, loss_cfg)
    results.append(measure.Result("absent", skipped="not installed"))
    paths = report.write(tmp_path / "new", config, loss_cfg.model_dump(), results)
    record = json.loads(paths[0].read_text())
    assert record["bench"]["shape"] == [256, 32, 997]
    assert record["results"][0]["name"] == FLOOR
    assert record["results"][0]["ratio_to_floor"] == 1.0
    assert record["results"][-1]["ratio_to_floor"] is None
    table = paths[1].read_text()
    assert "| toolkit |" in table
    assert "absent" not in table
    assert min(Image.open(paths[2]).size) > 200


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toolkit.bench", "bench=toy", "bench.peers=false", f"hydra.run.dir={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bare products" in done.stdout
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(result["peak_bytes"] is not None for result in record["results"])


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, "-m", "toolkit.bench", "bench.shap=[1,2,3]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    wanted = "error: bench.shap is not a setting (did you mean 'bench.shape'?); try: bench.shape=[1,2,3]"
    assert done.stderr.strip() == wanted


@pytest.mark.slow
def test_peak_memory_is_that_of_the_buffer_and_the_gradients() -> None:
    # In a fresh process, from the system's own counter: what libraries allocate by themselves counts too.
    config, loss_cfg = toy("bench.shape=[512,64,16384]", "bench.chunk_size=128", "bench.sequence_length=512")
    gradients, chunk = 4 * (512 + 16384) * 64, 128 * 16384 * 4
    eager = measure._peak_of(config, loss_cfg, [], "eager PyTorch, all tokens")
    ours = measure._peak_of(config, loss_cfg, [], "toolkit")
    assert ours is not None
    assert eager is not None
    assert gradients < ours < gradients + 1.15 * chunk + 2**24
    assert eager > 3 * 512 * 16384 * 4


def test_overhead_is_measured_over_the_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All five compute the same; chunk mode is the same as eager mode on so small a batch."""
    monkeypatch.setattr(scored, "SMALL_LOGITS", 2**20)
    config, loss_cfg = build_bench(compose_config(["bench=overhead", "bench.rounds=2"], root=BENCH))
    results = {result.name: result for result in measure.measure_all(config, loss_cfg)}
    assert list(results) == list(BUILDERS)
    for result in results.values():
        assert result.skipped is None
        assert max((result.errors or {}).values()) < 1e-5
        assert len(result.cpu) == 2
    report.print_table(config, list(results.values()))


def test_overhead_compares_one_loss_only() -> None:
    config, loss_cfg = build_bench(compose_config(["bench=overhead", "policy_loss=gspo"], root=BENCH))
    with pytest.raises(ConfigError, match="bench=overhead compares with PPO's clipped loss written by hand"):
        measure.measure_all(config, loss_cfg)
