"""The start-up probe lets right loops pass, and names what is wrong with others."""

import contextlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from toolkit import CELossConfig, ConfigError, GRPOLossConfig, LaunchError
from toolkit.distributed import check_world_size
from toolkit.losses.ce import CELossContext
from toolkit.training.probe import FIRST, MEAN_TOKENS, _lengths, _probe_cfg, check_gradient_scale


class MeanOfMeansContext(CELossContext):
    """A loss that is calibrated for each micro-batch by itself: the classic mistake."""

    @classmethod
    def build_batches_loss_kwargs(cls, items: Any, loss_cfg: Any, bounds: Any = None, sp_mesh: Any = None) -> Any:
        build = super().build_batches_loss_kwargs
        kwargs = [build([item], loss_cfg, sp_mesh=sp_mesh)[0] for item in items]
        return [own.replace(loss_weight=own.loss_weight / len(kwargs)) for own in kwargs]


class MeanOfMeans(CELossConfig):
    @property
    def loss_ctx_cls(self) -> type[CELossContext]:
        return MeanOfMeansContext


def refused(**given: Any) -> str:
    with pytest.raises(LaunchError) as caught:
        check_gradient_scale(**given)
    return str(caught.value)


def test_tokens_are_uneven_and_add_up() -> None:
    assert _lengths(0, 1) == [3, 1, 12]
    assert [_lengths(place, 3) for place in range(3)] == [[3, 1, 20], [3, 1, 4], [3, 1, 12]]
    for number in range(1, 9):
        assert sum(sum(_lengths(place, number)) for place in range(number)) == MEAN_TOKENS * number
    assert len(FIRST) == 2


def test_a_right_loop_passes() -> None:
    assert check_gradient_scale() == 1.0
    assert check_gradient_scale(lambda loss: loss.backward(), lambda module: module) == 1.0


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.25, "gradients are 0.25 times what they should be: every loss is divided by 4, as by gradient accumulation"),
        (1 / 3, "divided by 3, as by gradient accumulation .accelerate's gradient_accumulation_steps=3, DeepSpeed's"),
        (2.0, "gradients are 2 times what they should be: something between"),
        (65536.0, "GradScaler's loss scale is left in"),
        (0.0, "none arrives"),
        (1.00001, "gradients are 1.00001 times"),
        (float("nan"), "not finite"),
    ],
)
def test_a_factor_in_backward(factor: float, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        check_gradient_scale(lambda loss: (loss * factor).backward())


def test_accumulation_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert "gradient_accumulation_steps=4" in refused(backward=accelerator.backward, wrap=accelerator.prepare_model)
    right = accelerate.Accelerator(cpu=True)
    assert check_gradient_scale(right.backward, right.prepare_model, no_sync=right.no_sync) == 1.0


class Engine(nn.Module):
    """What DeepSpeed does: its own backward, divided by the accumulation steps, and gradients in a place of its own."""

    def __init__(self, module: nn.Module, *, scale_wrt_gas: bool) -> None:
        super().__init__()
        self.module, self.factor = module, 1 / 8 if scale_wrt_gas else 1.0
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss * self.factor).backward()
        for parameter in self.parameters():
            assert parameter.grad is not None
            self.gradients[parameter] = self.gradients.get(parameter, 0) + parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("scale_wrt_gas", [False, True])
def test_an_engine_with_its_own_gradients(scale_wrt_gas: bool) -> None:
    engines: list[Engine] = []

    def wrap(module: nn.Module) -> Engine:
        engines.append(Engine(module, scale_wrt_gas=scale_wrt_gas))
        return engines[0]

    loop = {
        "backward": lambda loss: engines[0].backward(loss),
        "wrap": wrap,
        "gradient": lambda parameter: engines[0].gradients[parameter],
    }
    if scale_wrt_gas:
        assert "gradients are 0.125 times what they should be: every loss is divided by 8" in refused(**loop)
        assert "scale_wrt_gas" in refused(**{**loop, "wrap": lambda module: engines.clear() or wrap(module)})
    else:
        assert check_gradient_scale(**loop) == 1.0


def test_means_of_means() -> None:
    words = refused(loss_cfg=MeanOfMeans())
    assert "every micro-batch weighs the same, a mean of means" in words
    assert "between 0.4444 and 5.333 times" in words  # 16 / (3 * 12) and 16 / (3 * 1)


def test_any_config_of_a_loss_says_how_gradients_are_reduced() -> None:
    assert check_gradient_scale(loss_cfg=GRPOLossConfig()) == 1.0
    assert _probe_cfg(GRPOLossConfig(gradient_reduction="sum")) == CELossConfig(gradient_reduction="sum")
    own = CELossConfig(gradient_reduction="sum", softcap=3.0)
    assert _probe_cfg(own) is own
    with pytest.raises(ConfigError, match=r"loss_cfg of type dict is not a loss config; give the config of your loss"):
        check_gradient_scale(loss_cfg={"gradient_reduction": "sum"})  # type: ignore[arg-type]


def test_a_spread_without_a_known_cause_is_listed() -> None:
    factors = iter((1.0, 0.5, 3.0))
    words = refused(backward=lambda loss: (next(factors) * loss).backward())
    assert "micro-batch 0, even ranks: 1, micro-batch 1, even ranks: 0.5, micro-batch 2, even ranks: 3; look" in words


def test_a_zero_grad_too_many() -> None:
    kept: list[nn.Module] = []

    def backward(loss: Tensor) -> None:
        kept[0].zero_grad()
        loss.backward()

    words = refused(backward=backward, wrap=lambda module: kept.append(module) or module)
    assert "only the last micro-batch counts" in words


def test_a_loss_scale_is_taken_out_and_the_scaler_left_as_it_was() -> None:
    scaler = torch.amp.GradScaler("cpu")
    before = None
    for _ in range(2):
        assert check_gradient_scale(lambda loss: scaler.scale(loss).backward(), scaler=scaler) == 1.0
        assert before in (None, scaler.state_dict())
        before = scaler.state_dict()
    assert "loss scale is left in" in refused(backward=lambda loss: scaler.scale(loss).backward())
    huge = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    words = refused(backward=lambda loss: huge.scale(100 * loss).backward(), scaler=huge)
    assert "not finite under a loss scale of" in words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype):
        assert check_gradient_scale() == 1.0
        assert check_gradient_scale(lambda loss: scaler.scale(loss).backward(), scaler=scaler) == 1.0


class Summing(nn.Module):
    """A back-end that sums gradients over ranks in the last backward."""

    def __init__(self, module: nn.Module, *, sum_every_time: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        self.module, self.is_held, self.sum_every_time = module, False, sum_every_time
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda own: self.exchange(own, factor))

    def exchange(self, parameter: Tensor, factor: float) -> None:
        if not self.is_held or self.sum_every_time:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad *= factor

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)

    @contextlib.contextmanager
    def no_sync(self) -> Any:
        self.is_held = True
        yield
        self.is_held = False


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)
    return module


@contextlib.contextmanager
def held_back(module: Any) -> Any:
    module.set_requires_gradient_sync(False)
    yield
    module.set_requires_gradient_sync(True)


def loops_of_several(rank: int, world: int) -> None:
    of_sum = CELossConfig(gradient_reduction="sum")
    assert check_gradient_scale(wrap=DistributedDataParallel) == pytest.approx(1, abs=1e-6)
    assert check_gradient_scale(wrap=Summing, loss_cfg=of_sum) == pytest.approx(1, abs=1e-6)
    assert check_gradient_scale(wrap=sharded) == pytest.approx(1, abs=1e-6)
    assert check_gradient_scale(wrap=sharded, no_sync=held_back) == pytest.approx(1, abs=1e-6)
    words = refused(wrap=Summing)
    assert f"gradients are {world} times what they should be: {world} is the number of processes: the back-end" in words
    words = refused(wrap=DistributedDataParallel, loss_cfg=of_sum)
    assert f"{world} is the number of processes: the back-end averages" in words
    assert "set loss.gradient_reduction=mean" in words
    for wrap, no_sync in ((None, None), (DistributedDataParallel, lambda ddp: ddp.no_sync())):
        inner = (lambda ddp: ddp.module) if wrap else (lambda module: module)
        call = None if wrap is None else lambda module, own=wrap, take=inner: take(own(module))
        assert "those of other processes are missing" in refused(wrap=call, no_sync=no_sync and contextlib.nullcontext)
    words = refused(wrap=lambda module: Summing(module, sum_every_time=True), loss_cfg=of_sum)
    assert "earlier micro-batches are exchanged again" in words
    words = refused(wrap=DistributedDataParallel, loss_cfg=MeanOfMeans())
    assert "every micro-batch weighs the same, a mean of means" in words
    words = refused(wrap=DistributedDataParallel, backward=lambda loss: (loss / 4 if rank else loss).backward())
    assert "gradients are not the gradient of one loss" in words


def a_shared_sequence(rank: int, world: int) -> None:
    """Data 2 x sequence 2; the tokens of a rank do not divide by 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    own = mesh["sequence"]
    assert check_gradient_scale(wrap=DistributedDataParallel, sp_mesh=own) == pytest.approx(1, abs=1e-6)
    twice = refused(wrap=DistributedDataParallel, sp_mesh=own, backward=lambda loss: (2 * loss).backward())
    assert "2 ranks share a sequence (sp_mesh): their parts are counted twice" in twice
    only_mesh = refused(wrap=lambda module: DistributedDataParallel(module, process_group=own.get_group()), sp_mesh=own)
    assert "those of other processes are missing" in only_mesh


def through_accelerate(rank: int, world: int) -> None:
    from accelerate import Accelerator

    right = Accelerator(cpu=True, mixed_precision="bf16")
    assert right.num_processes == world
    loop = {"backward": right.backward, "wrap": right.prepare_model, "no_sync": right.no_sync}
    assert check_gradient_scale(**loop) == pytest.approx(1, abs=1e-6)
    right.gradient_accumulation_steps = 4
    assert "gradient_accumulation_steps=4" in refused(**loop)


def two(rank: int, world: int) -> None:
    loops_of_several(rank, world)
    through_accelerate(rank, world)


def four(rank: int, world: int) -> None:
    loops_of_several(rank, world)
    a_shared_sequence(rank, world)


@pytest.mark.dist
def test_two_processes() -> None:
    run_processes(2, two)


@pytest.mark.dist
@pytest.mark.slow
def test_four_processes() -> None:
    run_processes(4, four)


def test_the_loss_of_the_run_decides_the_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    from toolkit.training import devices

    seen: list[CELossConfig] = []
    monkeypatch.setattr(devices, "check_gradient_scale", lambda *args, loss_cfg, **rest: seen.append(loss_cfg))
    devices.probe_accelerator(Accelerator(cpu=True), GRPOLossConfig(gradient_reduction="sum"))
    assert seen[0].gradient_reduction == "sum"


def under_the_sharding_of_the_run(rank: int, world: int) -> None:
    from accelerate import Accelerator

    from toolkit.training import devices, sharding

    accelerator, cfg = Accelerator(cpu=True), GRPOLossConfig()
    for kind in ("none", "fsdp2"):
        devices.probe_accelerator(accelerator, cfg, kind)
    kept = sharding.fully_shard

    def adding(module: Any, **options: Any) -> Any:
        found = kept(module, **options)
        found.set_force_sum_reduction_for_comms(True)
        found.set_gradient_divide_factor(1.0)
        return found

    sharding.fully_shard = adding  # type: ignore[assignment]
    with pytest.raises(LaunchError, match="2 is the number of processes: the back-end sums"):
        devices.probe_accelerator(accelerator, cfg, "fsdp2")
    devices.probe_accelerator(accelerator, GRPOLossConfig(gradient_reduction="sum"), "fsdp2")
    sharding.fully_shard = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            devices, "no_sync", lambda module: sharding.accumulating(module, is_last=False)
        )  # and never after it
        with pytest.raises(LaunchError):
            devices.probe_accelerator(accelerator, cfg, "fsdp2")


@pytest.mark.slow
@pytest.mark.dist
def test_under_the_sharding_of_the_run() -> None:
    pytest.importorskip("accelerate")
    run_processes(2, under_the_sharding_of_the_run)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE asks for 4 processes, but 1 work together"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE asks for 2"),
        ({"RANK": "1"}, "RANK=1 asks for 2"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 asks for 4"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE asks for 8"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS asks for 2"),
    ],
)
def test_processes_that_did_not_find_each_other(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=words):
        check_world_size(1)


def test_fewer_on_each_machine_than_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    check_world_size(4)
    assert os.environ["RANK"] == "3"
