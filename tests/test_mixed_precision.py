"""Autocast and a loss scale leave the gradient of a step what it is, in micro-batches and over processes."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from tests.test_distributed import SHAPE, Wrapped, alone, data, take
from toolkit import CELossConfig, ConfigError, GRPOLossConfig, LaunchError
from toolkit.distributed import reduce_metrics
from toolkit.metrics import merge_metrics, to_floats

CONFIGS = {
    "grpo": GRPOLossConfig(use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1),
    "grpo_chunk": GRPOLossConfig(mode="chunk", chunk_size=4, aggregation="seq_mean_token_mean"),
    "ce": CELossConfig(),
}
BFLOAT16 = 2**-8
"""Rounding of one number; a gradient adds up a few tens of them."""


def step(
    name: str, rows: list[slice], wrap: Any, precision: Any, scaler: torch.amp.GradScaler | None
) -> tuple[Tensor, dict[str, float], float]:
    """Return gradient, metrics and loss of a step in micro-batches, under `precision`, unscaled before it is read."""
    cfg = CONFIGS[name]
    item, (hidden, weight, bias) = data(name, torch.float32)
    model = wrap(Wrapped(weight, bias))
    context = cfg.loss_ctx_cls
    batches = context.build_batches_loss_kwargs([take(item, r) for r in rows], cfg)
    parts, total = [], 0.0
    for index, (r, kwargs) in enumerate(zip(rows, batches, strict=True)):
        is_last = index == len(rows) - 1
        hold = contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()
        with hold:
            with precision():
                loss, metrics = model(hidden[r], context(cfg, kwargs))
            (loss if scaler is None else scaler.scale(loss)).backward()
        total += float(loss)
        parts.append(metrics)
    if scaler is not None:
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=1.0))
    grads = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat(grads), to_floats(reduce_metrics(merge_metrics(parts))), total


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def every_precision(rank: int, world: int) -> None:
    """Two micro-batches on each of two processes against one batch in one process, in fp32 and without a scale."""
    mine = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]
    whole = [slice(0, SHAPE[0])]
    for name in CONFIGS:
        with alone():
            expected, metrics, _ = step(name, whole, lambda model: model, contextlib.nullcontext, None)
        size = float(expected.abs().max())
        for precision, tolerance in ((contextlib.nullcontext, 2e-6), (bfloat16, 8 * BFLOAT16)):
            plain, ours, loss = step(name, mine, DistributedDataParallel, precision, None)
            scaler = torch.amp.GradScaler("cpu")
            scaled, same, same_loss = step(name, mine, DistributedDataParallel, precision, scaler)
            assert (plain - expected).abs().max() <= tolerance * size, (name, precision)
            # 65,536 is a power of two: scaling and unscaling are exact, also in half precision.
            torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-9)
            assert same == ours
            assert same_loss == loss
            assert ours["loss"] == pytest.approx(metrics["loss"], rel=tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_under_autocast_and_a_loss_scale() -> None:
    run_processes(2, every_precision)


# ---------------------------------------------------------------- the training command


def trainer_with(scaler: torch.amp.GradScaler | None, *overrides: str) -> Any:
    """A trainer on the CPU; accelerate scales losses on a GPU only, so the scaler is put in by hand."""
    pytest.importorskip("reasoning_gym")
    from accelerate import Accelerator

    from toolkit.compose.build import build_config
    from toolkit.compose.tree import compose_config
    from toolkit.training.trainer import Trainer

    config = build_config(compose_config(["debug=smoke", *overrides]))
    accelerator = Accelerator(cpu=True)
    if scaler is not None:
        accelerator.scaler, accelerator.native_amp = scaler, True
        accelerator.state._mixed_precision = "fp16"
    torch.manual_seed(0)
    task = config.task.build(config.seed)
    policy, tokenizer = config.model.build(task.alphabet)
    if scaler is not None:
        accelerator.native_amp = False  # no autocast: numbers are to be those of fp32
    trainer = Trainer(config, accelerator, task, policy, tokenizer)
    accelerator.native_amp = scaler is not None
    return trainer


def first_steps(trainer: Any) -> list[dict[str, float]]:
    """One step of each phase, and the second of the main one."""
    warmup = trainer.warmup_phase()
    found = [trainer.run_step(warmup)]
    main = trainer.main_phase()
    return [*found, trainer.run_step(main), trainer.run_step(main)]


@pytest.fixture
def _fresh_state() -> Any:
    yield
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_the_trainer_takes_the_loss_scale_out_once() -> None:
    settings = ["loss=ce", "training.micro_batch_size=8"]
    expected = first_steps(trainer_with(None, *settings))
    scaled = first_steps(trainer_with(torch.amp.GradScaler("cpu"), *settings))
    for ours, theirs in zip(scaled, expected, strict=True):
        for name in ("loss", "nll", "grad_norm", "active_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["grad_norm"] > 0.01


@pytest.mark.usefixtures("_fresh_state")
def test_an_overflow_is_counted_and_moves_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    trainer = trainer_with(scaler, "loss=ce")
    trainer.accelerator.backward = lambda loss: scaler.scale(1e4 * loss).backward()
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    metrics = trainer.run_step(trainer.warmup_phase())
    assert trainer.updater.num_overflows == 1
    assert "grad_norm" not in metrics
    assert metrics["nll"] > 0
    assert scaler.get_scale() == 2.0**126
    for parameter, old in zip(trainer.policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.usefixtures("_fresh_state")
def test_the_reference_is_not_the_policy_under_autocast() -> None:
    """accelerate replaces the forward of a module; a copy must not call that of the original."""
    pytest.importorskip("reasoning_gym")
    from accelerate import Accelerator

    from toolkit.compose.build import build_config
    from toolkit.compose.tree import compose_config
    from toolkit.training.sharding import unwrapped
    from toolkit.training.trainer import Trainer

    config = build_config(compose_config(["debug=smoke", "kl=k3"]))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    task = config.task.build(config.seed)
    trainer = Trainer(config, accelerator, task, *config.model.build(task.alphabet))
    trainer.main_phase()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert trainer.reference is not None
    before = trainer.reference(ids, torch.ones_like(ids))
    with torch.no_grad():
        for parameter in unwrapped(trainer.policy).parameters():
            parameter.mul_(0.5)
    assert torch.equal(trainer.reference(ids, torch.ones_like(ids)), before)
    assert not torch.equal(unwrapped(trainer.policy)(ids, torch.ones_like(ids)), before)


def test_settings_that_would_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from toolkit.training.config import TrainingConfig
    from toolkit.training.devices import _mixed_precision

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with pytest.raises(ConfigError, match="fp16 needs a GPU; choose bf16 or no"):
        _mixed_precision(TrainingConfig(mixed_precision="fp16"), on_cpu=True)
    assert _mixed_precision(TrainingConfig(mixed_precision="fp16"), on_cpu=False) == "fp16"
    assert _mixed_precision(TrainingConfig(), on_cpu=True) is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert _mixed_precision(TrainingConfig(), on_cpu=True) is None  # accelerate reads it itself
    assert _mixed_precision(TrainingConfig(mixed_precision="bf16"), on_cpu=True) == "bf16"
    with pytest.raises(LaunchError, match=r"launched with mixed_precision=bf16, but training.mixed_precision=no"):
        _mixed_precision(TrainingConfig(mixed_precision="no"), on_cpu=True)
