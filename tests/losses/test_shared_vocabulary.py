"""Two ranks share the vocabulary, two such pairs share the batch: what is counted is counted once."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.conftest import random_head, random_item
from tests.processes import run_processes
from tests.test_distributed import alone, take
from toolkit import GRPOLossConfig, GRPOLossContext
from toolkit.distributed import counting_over, reduce_metrics, world_size
from toolkit.metrics import to_floats

CONFIGS = [
    GRPOLossConfig(aggregation=aggregation, policy_loss_cfg={"loss_type": loss}, mode=mode, chunk_size=4, **options)
    for loss, aggregation, mode, options in (
        ("vanilla", "token_mean", "eager", {}),
        ("gspo", "seq_mean_token_mean", "chunk", {"use_entropy_metric": True}),
        ("vanilla", "token_sum", "chunk", {}),
        ("vanilla", "prompt_mean", "chunk", {}),
        ("kl_cov", "token_mean", "chunk", {"gradient_reduction": "sum"}),
    )
]


def data_and_vocabulary(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for cfg in CONFIGS:
        one(mesh, cfg)


def one(mesh: DeviceMesh, cfg: GRPOLossConfig) -> None:
    torch.manual_seed(4)
    item = random_item((4, 6))
    hidden, weight, _ = random_head((4, 6))
    logprobs = (hidden @ weight.T).log_softmax(-1)
    current = logprobs.gather(-1, item.shifted_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).detach()
    item = item.replace(current_logprobs=current) if cfg.policy_loss_cfg["loss_type"] == "kl_cov" else item
    with alone():
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        loss, metrics = GRPOLossContext(cfg, kwargs).forward(hidden, weight)
        expected, expected_metrics = torch.autograd.grad(loss, (hidden, weight)), to_floats(metrics)
    pair = mesh.get_local_rank("dp")
    rows = slice(2 * pair, 2 * pair + 2)
    own, head = hidden.detach()[rows].requires_grad_(), distribute_tensor(weight.detach(), mesh["tp"], [Shard(0)])
    head.requires_grad_()
    with counting_over(mesh["dp"].get_group()):
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([take(item, rows)], cfg)
        part, metrics = GRPOLossContext(cfg, kwargs).forward(own, head)
        part.backward()
        found = to_floats(reduce_metrics(metrics))
    assert world_size() == 4  # all again
    # As autograd does in its own thread for a checkpointed region: the group travels with the kwargs.
    again, metrics = GRPOLossContext(cfg, kwargs).forward(own, head)
    assert again.item() == part.item()
    assert metrics["loss"].number([float(metrics["loss"].total)]) == pytest.approx(part.item() / ranks_of(cfg))
    assert found == pytest.approx(expected_metrics, rel=1e-12, nan_ok=True)
    factor = ranks_of(cfg)
    grad = head.grad.full_tensor()
    dist.all_reduce(grad, group=mesh["dp"].get_group())
    torch.testing.assert_close(grad / factor, expected[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.grad / factor, expected[0][rows], rtol=1e-12, atol=1e-14)


def ranks_of(cfg: GRPOLossConfig) -> int:
    return 2 if cfg.gradient_reduction == "mean" else 1


@pytest.mark.slow
@pytest.mark.dist
def test_a_batch_and_a_vocabulary_over_four_ranks() -> None:
    run_processes(4, data_and_vocabulary)
