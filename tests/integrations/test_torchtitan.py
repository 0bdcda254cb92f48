"""Our losses as torchtitan's RL trainer calls them; with torchtitan 0.3.0 where it is installed (.ci/peers).

Elsewhere a stand-in has the signatures of ``torchtitan/components/loss.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.loops import DTYPES, LOSSES, TOLERANCE, batch, check_equal, install, of_our_loop
from toolkit import ConfigError
from toolkit.integrations import versions

HAS_TORCHTITAN = importlib.util.find_spec("torchtitan") is not None


class BaseLoss:
    class Config:
        pass


def compute_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.fixture(scope="module", autouse=True)
def _torchtitan() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        if not HAS_TORCHTITAN:
            install(patched, "torchtitan.components.loss", BaseLoss=BaseLoss, compute_logprobs=compute_logprobs)
            patched.setattr(versions, "version", lambda _: "0.3.0")
        yield
    if not HAS_TORCHTITAN:
        sys.modules.pop("toolkit.integrations.torchtitan.loss", None)


def loss_of(text: str) -> Any:
    module = importlib.import_module("toolkit.integrations.torchtitan")
    return module.ToolkitLoss(module.ToolkitLoss.Config(loss=text))


def step(function: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """Two micro-batches; return loss and gradient of the logits."""
    leaf, total = given["logits"].clone().requires_grad_(), 0.0
    count = int(given["mask"].sum())
    for rows in (slice(0, 1), slice(1, 4)):
        loss, metrics = function(
            leaf[rows],
            given["labels"][rows],
            count,
            generator_logprobs=given["old_logprobs"][rows],
            advantages=given["advantages"][rows],
            loss_mask=given["mask"][rows],
        )
        assert all(name.endswith(("/mean", "/max")) and value.shape == () for name, value in metrics.items())
        total = total + loss
    assert isinstance(total, Tensor)
    total.backward()
    assert leaf.grad is not None
    return [total.detach(), leaf.grad]


def of_dtype(dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Return rows of one turn, and a bound: torchtitan computes log-probabilities in fp32 whatever the logits are."""
    given = batch(dtype)
    given["mask"][0] = torch.arange(given["mask"].shape[1]) > 0
    return given, 2e-6 if HAS_TORCHTITAN else TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:policy loss")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_our_loop(name: str, dtype: torch.dtype) -> None:
    given, tolerance = of_dtype(dtype)
    check_equal(
        step(loss_of(LOSSES[name]), given), of_our_loop(given, f"{LOSSES[name]} aggregation=token_mean"), tolerance
    )


@pytest.mark.filterwarnings("ignore:policy loss")
def test_packed_sequences_of_one_turn_are_told_apart() -> None:
    """Two rows in one, with a prompt between: each run is a sequence."""
    given, tolerance = of_dtype(torch.float32)
    packed = {name: values[[0, 3]].reshape(1, -1, *values.shape[2:]) for name, values in given.items()}
    two = {name: values[[0, 3]] for name, values in given.items()}
    expected = of_our_loop(two, f"{LOSSES['gspo']} aggregation=token_mean")
    leaf = packed["logits"].clone().requires_grad_()
    loss, _ = loss_of(LOSSES["gspo"])(
        leaf,
        packed["labels"],
        float(two["mask"].sum()),
        generator_logprobs=packed["old_logprobs"],
        advantages=packed["advantages"],
        loss_mask=packed["mask"],
    )
    loss.backward()
    assert leaf.grad is not None
    check_equal([loss.detach(), leaf.grad.reshape(expected[1].shape)], expected, tolerance)


def test_tokens_without_a_log_probability_are_skipped() -> None:
    given, _ = of_dtype(torch.float32)
    given["old_logprobs"][0, 2] = float("nan")
    loss, gradient = step(loss_of(LOSSES["vanilla"]), given)
    assert loss.isfinite()
    assert not gradient[0, 2].any()
    assert gradient.isfinite().all()


def test_sequence_losses_warn_of_what_is_a_sequence() -> None:
    with pytest.warns(UserWarning, match=r"'gmpo' looks at whole sequences.*not inside ChunkedLossWrapper"):
        loss_of("policy_loss=gmpo")


WRONG = {
    "policy_loss=vanilla aggregation=square": "every token weighs the same",
    "policy_loss=vanilla kl=k3": "kl=k3 has no effect in torchtitan; it has no reference policy",
    "policy_loss=vanilla mode=chunk": "use ChunkedLossWrapper for chunks",
    "policy_loss=opd": "does not pass a teacher's log-probabilities",
}


@pytest.mark.parametrize("loss", WRONG)
def test_what_torchtitan_does_itself_is_refused_in_one_line(loss: str) -> None:
    with pytest.raises(ConfigError) as error:
        loss_of(loss)
    assert WRONG[loss] in str(error.value)


def test_without_torchtitan_the_import_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchtitan.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    monkeypatch.delitem(sys.modules, "toolkit.integrations.torchtitan.loss", raising=False)
    with pytest.raises(ImportError, match=r"ToolkitLoss needs torchtitan: pip install torchtitan==0\.3\.0"):
        from toolkit.integrations.torchtitan import ToolkitLoss  # noqa: F401


# -------------------------------------------------------------------- with torchtitan itself

needs_torchtitan = pytest.mark.skipif(not HAS_TORCHTITAN, reason="torchtitan is not installed")


@needs_torchtitan
def test_dapo_is_that_of_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package imports vLLM, so its file is loaded alone."""
    import torchtitan

    path = Path(torchtitan.__path__[0], "experiments/rl/losses/dapo.py")
    spec = importlib.util.spec_from_file_location("dapo_of_torchtitan", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    given = batch(torch.float32)
    theirs = module.DAPOLoss.Config(ratio_clip_low=0.1, ratio_clip_high=0.28).build()
    text = "policy_loss=vanilla policy_loss.clip_ratio_c=null loss.log_ratio_range=[-10,10]"
    ours = loss_of(f"{text} policy_loss.cliprange_low=0.1 policy_loss.cliprange_high=0.28")

    def tagged(*arguments: Any, **fields: Any) -> Any:
        return theirs(*arguments, **fields)[0], {}

    check_equal(step(ours, given), step(tagged, given), 2e-6)


@needs_torchtitan
def test_inside_the_chunked_wrapper_of_torchtitan() -> None:
    from torchtitan.components.loss import ChunkedLossWrapper

    from toolkit.integrations.torchtitan import ToolkitLoss

    given, tolerance = of_dtype(torch.float32)
    wrapper = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=ToolkitLoss.Config(loss=LOSSES["cispo"])).build()
    head = torch.nn.Linear(given["logits"].shape[-1], given["logits"].shape[-1], bias=False)
    torch.nn.init.eye_(head.weight)
    wrapper.set_lm_head(head)
    check_equal(step(wrapper, given), of_our_loop(given, f"{LOSSES['cispo']} aggregation=token_mean"), tolerance)
