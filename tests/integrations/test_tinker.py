"""Our losses in Tinker's ``forward_backward_custom``, with its client's code where tinker is installed (.ci/peers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.loops import LOSSES, batch, check_equal, namespace, of_a_trainer, of_our_loop
from toolkit import ConfigError, DataError
from toolkit.integrations import tinker as ours
from toolkit.integrations.tinker import PRESETS, make_loss_fn


@pytest.fixture(autouse=True)
def _any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "check_version", lambda *_: None)


def data_of(given: dict[str, Tensor], *fields: str, lengths: tuple[int, ...] = (9, 6, 4, 9)) -> list[Any]:
    """Return the rows as data of several lengths; what is cut off is not scored."""
    made = []
    for row, length in enumerate(lengths):
        values = {name: given[name][row, :length].float() for name in ("advantages", *fields)}
        values |= {"target_tokens": given["labels"][row, :length], "mask": given["mask"][row, :length].float()}
        values["logprobs"] = given["old_logprobs"][row, :length].float()
        made.append(namespace(loss_fn_inputs=values))
    return made


def run(loss: Any, given: dict[str, Tensor], logprobs: Tensor, *fields: str) -> Tensor:
    data = data_of(given, *fields)
    pieces = [row[: len(datum.loss_fn_inputs["mask"])] for row, datum in zip(logprobs, data, strict=True)]
    total, metrics = make_loss_fn(loss)(data, pieces)
    assert all(isinstance(value, float) for value in metrics.values())
    return total


MEANS = ["token_mean", "token_sum", "seq_mean_token_mean", "constant loss.aggregation.length=9"]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_equals_our_loop(name: str, mean: str) -> None:
    given, loss = batch(torch.float32), f"{LOSSES[name]} aggregation={mean}"
    check_equal(of_a_trainer(given, lambda logprobs: run(loss, given, logprobs)), of_our_loop(given, loss), 2e-6)


@pytest.mark.parametrize(
    "loss",
    [
        "policy_loss=vanilla kl=k2 loss.kl_loss_coef=0.1",
        "policy_loss=vanilla correction=tis loss.correction.tis.upper=1.1",
        "policy_loss=cispo correction=opsm",
    ],
)
def test_kl_terms_and_corrections_are_ours(loss: str) -> None:
    given = batch(torch.float32)
    given["rollout_logprobs"] = given["old_logprobs"]
    mine = of_a_trainer(given, lambda logprobs: run(loss, given, logprobs, "ref_logprobs"))
    fields = ["rollout_logprobs", *(["ref_logprobs"] if "kl=" in loss else [])]
    check_equal(mine, of_our_loop(given, loss, fields=fields), 2e-6)


def gspo(logprobs: Tensor, sampled: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The paper's equation 5 to 7, summed over tokens."""
    kept = mask.to(logprobs.dtype)
    mean = ((logprobs - sampled) * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    ratio = mean.exp().expand_as(logprobs)
    return -torch.min(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages)


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "importance_sampling": lambda p, q, a, _: -(p - q).exp() * a,
    "ppo": lambda p, q, a, _: -torch.min((p - q).exp() * a, (p - q).exp().clamp(0.8, 1.2) * a),
    "cispo": lambda p, q, a, _: -(p - q).exp().clamp(0.0, 4.0).detach() * p * a,
    "dro": lambda p, q, a, _: -(p * a - 0.5 * 0.05 * (p - q) ** 2),
    "gspo": gspo,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_formulas(name: str) -> None:
    """Source: tinker-docs.thinkingmachines.ai/tinker/losses; gspo: the paper's."""
    given = batch(torch.float32)

    def theirs(logprobs: Tensor) -> Tensor:
        values = FORMULAS[name](logprobs, given["old_logprobs"], given["advantages"], given["mask"])
        return values[given["mask"]].sum()

    check_equal(of_a_trainer(given, lambda logprobs: run(name, given, logprobs)), of_a_trainer(given, theirs), 2e-6)


def test_two_calls_of_a_sum_add_up() -> None:
    given = batch(torch.float32)
    whole = run("gspo", given, given["ref_logprobs"])
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: values[rows] for name, values in given.items()}
        data = data_of(part, lengths=(9, 6, 4, 9)[rows])
        pieces = [
            row[: len(datum.loss_fn_inputs["mask"])] for row, datum in zip(part["ref_logprobs"], data, strict=True)
        ]
        parts.append(make_loss_fn("gspo")(data, pieces)[0])
    torch.testing.assert_close(sum(parts), whole)


WRONG = {
    "ppoo": "loss='ppoo' is not a preset; choose importance_sampling, ppo",
    "loss=ce": "CELossConfig has no policy loss; for cross-entropy use Tinker's own",
    "policy_loss=vanilla kl=full": "compares distributions",
    "policy_loss=vanilla loss.entropy_coef=0.1": "reads entropies, which Tinker does not return",
}


@pytest.mark.parametrize("loss", WRONG)
def test_wrong_losses_are_answered_in_one_line(loss: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_loss_fn(loss)
    assert WRONG[loss] in str(error.value)
    with pytest.raises(ConfigError, match="loss is an int; give one of importance_sampling"):
        make_loss_fn(3)


def test_what_is_missing_is_named() -> None:
    given = batch(torch.float32)
    data, pieces = data_of(given), [torch.zeros(length) for length in (9, 6, 4, 9)]
    del data[1].loss_fn_inputs["advantages"]
    with pytest.raises(DataError, match=r"data\[1\]\.loss_fn_inputs\['advantages'\] has none; give 6"):
        make_loss_fn("ppo")(data, pieces)
    data = data_of(given)
    del data[2].loss_fn_inputs["mask"]
    with pytest.raises(DataError, match=r"data\[2\] does not say which positions count; add mask"):
        make_loss_fn("ppo")(data, pieces)
    with pytest.raises(DataError, match=r"has 9 positions, but 8 log-probabilities|has 9 values; give 8"):
        make_loss_fn("ppo")(data_of(given), [torch.zeros(8), *pieces[1:]])


@pytest.mark.parametrize("name", PRESETS)
def test_the_client_of_tinker_sends_our_gradient(name: str) -> None:
    """``_compute_custom_loss`` is what ``forward_backward_custom`` runs between the two requests to the server."""
    types = pytest.importorskip("tinker").types
    from tinker.lib.public_interfaces.training_client import TrainingClient

    given = batch(torch.float32)
    data = [
        types.Datum(model_input=types.ModelInput.from_ints([1] * len(row.loss_fn_inputs["mask"])), **vars(row))
        for row in data_of(given)
    ]
    outputs = [
        {"logprobs": types.TensorData.from_torch(row[: datum.model_input.length].contiguous())}
        for row, datum in zip(given["ref_logprobs"], data, strict=True)
    ]
    result = TrainingClient._compute_custom_loss(data, make_loss_fn(name), namespace(loss_fn_outputs=outputs))
    leaf = given["ref_logprobs"].clone().requires_grad_()
    loss = run(name, given, leaf)
    loss.backward()
    assert leaf.grad is not None
    for index, datum in enumerate(result.data):
        sent = datum.loss_fn_inputs["weights"].to_torch()
        torch.testing.assert_close(sent, -leaf.grad[index, : len(sent)], rtol=1e-6, atol=1e-7)
    assert result.loss_sum == pytest.approx(loss.item(), rel=1e-6)
