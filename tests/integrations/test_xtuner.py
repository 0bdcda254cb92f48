"""Our losses as XTuner calls them: a stand-in with its signatures, because no registry has XTuner v1's RL losses.

The stand-in follows ``xtuner/v1/rl/loss`` and ``xtuner/v1/loss/base_loss_ctx.py`` of October 2026: the fields and the
bases of config, kwargs and context, ``get_policy_loss_fn``, and the all-reduce of the loss. XTuner itself was not run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tests.integrations.loops import (
    DTYPES,
    LOSSES,
    VOCABULARY,
    batch,
    check_equal,
    of_a_trainer,
    of_our_loop,
)
from tests.processes import run_processes
from toolkit import ConfigError
from toolkit.functional.policy.registry import policy_loss_names

OPEN = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class BaseRLLossKwargs(BaseModel):
    model_config = OPEN
    shifted_labels: Tensor
    rollout_logprobs: Tensor | None = None
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    is_weights: Tensor | None = None


class BaseRLLossConfig(BaseModel):
    model_config = OPEN
    ignore_idx: int = -100
    mode: str = "eager"
    chunk_size: int | None = 1024
    policy_loss_cfg: dict[str, Any]
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str | None = None

    def build(self, data: dict[str, Any], sp_mesh: Any = None, device: Any = "cpu") -> Any:
        kwargs = self._loss_kwargs_cls(**{**data, "is_weights": data.get("is_weights")})
        return self.loss_ctx_cls(self, kwargs)


class BaseRLLossContext(nn.Module):
    def __init__(self, loss_cfg: Any, loss_kwargs: Any) -> None:
        super().__init__()
        self.loss_cfg, self.loss_kwargs = loss_cfg, loss_kwargs


def put_stand_in() -> None:
    for name in ("xtuner", "xtuner.v1", "xtuner.v1.rl", "xtuner.v1.rl.loss"):
        module = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    classes = {each.__name__: each for each in (BaseRLLossConfig, BaseRLLossContext, BaseRLLossKwargs)}
    sys.modules["xtuner.v1.rl.loss"].__dict__.update(classes)


@pytest.fixture(autouse=True, scope="module")
def _stand_in() -> Iterator[None]:
    before = dict(sys.modules)
    put_stand_in()
    yield
    for name in [name for name in sys.modules if name.startswith(("xtuner", "toolkit.integrations.xtuner."))]:
        sys.modules.pop(name)
    sys.modules.update({name: module for name, module in before.items() if name.startswith("xtuner")})


def one_turn(dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed rows tell sequences apart by their prompts, so each has one run of scored tokens."""
    given = batch(dtype)
    given["mask"][0] = torch.arange(given["mask"].shape[1]) > 0
    return given


def packed(given: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    return {name: values[rows].reshape(1, -1, *values.shape[2:]) for name, values in given.items()}


# -------------------------------------------------------------------- by name


def function_of(loss_type: str) -> Any:
    """XTuner's ``get_policy_loss_fn``."""
    package, name = loss_type.rsplit(".", 1)
    return getattr(importlib.import_module(package), name)


OPTIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"cliprange_low": 0.2, "cliprange_high": 0.28},
    "gspo": {"cliprange_low": 0.1, "cliprange_high": 0.1},
    "cispo": {"weight_max": 1.3},
    "sapo": {},
    "dro": {"tau": 0.2},
}


@pytest.mark.filterwarnings("ignore:policy loss")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_packed_row_equals_our_loop(name: str, dtype: torch.dtype) -> None:
    given = one_turn(dtype)
    settings = {"loss_type": f"toolkit.integrations.xtuner.{name}", **OPTIONS[name]}
    function = function_of(settings["loss_type"])
    row = packed(given)
    weights = row["mask"].to(torch.float32) / given["mask"].sum()

    def theirs(logprobs: Tensor) -> Tensor:
        return function(logprobs.reshape(1, -1), row["old_logprobs"], row["advantages"], weights, settings)

    mine = of_a_trainer(given, theirs)
    # The weights are fp32, as XTuner's are.
    check_equal(
        mine, of_our_loop(given, f"{LOSSES[name]} aggregation=token_mean"), 1e-7 if dtype.itemsize == 8 else None
    )


def test_vanilla_is_xtuners_formula_with_its_bounds() -> None:
    """Source: ``pg_loss_fn``: dual clip at 3, log ratios within ``log_prob_diff_min`` and ``max``."""
    given = batch()
    settings = {"cliprange_low": 0.2, "cliprange_high": 0.2, "log_prob_diff_min": -0.4, "log_prob_diff_max": 0.3}
    weights = given["mask"].double() / given["mask"].sum()
    function = function_of("toolkit.integrations.xtuner.vanilla")

    def theirs(logprobs: Tensor) -> Tensor:
        ratio, advantages = (logprobs - given["old_logprobs"]).clamp(-0.4, 0.3).exp(), given["advantages"]
        clipped = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
        values = torch.where(advantages < 0, torch.min(-3.0 * advantages, clipped), clipped)
        return (values * weights).sum()

    mine = of_a_trainer(
        given, lambda logprobs: function(logprobs, given["old_logprobs"], given["advantages"], weights, settings)
    )
    check_equal(mine, of_a_trainer(given, theirs))


def test_chunks_of_a_loss_of_tokens_add_up() -> None:
    given, function = batch(), function_of("toolkit.integrations.xtuner.cispo")
    weights = given["mask"].double()

    def of(columns: slice) -> Tensor:
        arguments = (given[name][:, columns] for name in ("ref_logprobs", "old_logprobs", "advantages"))
        return function(*arguments, weights[:, columns], {})

    torch.testing.assert_close(of(slice(0, 4)) + of(slice(4, None)), of(slice(None)), rtol=1e-12, atol=1e-12)


def test_names_and_mistakes() -> None:
    module = importlib.import_module("toolkit.integrations.xtuner")
    assert {*policy_loss_names()} < {*dir(module)}
    with pytest.raises(AttributeError, match=r"has no policy loss 'gpso' \(did you mean 'gspo'\?\)"):
        _ = module.gpso
    given = batch()
    fields = (given[name] for name in ("ref_logprobs", "old_logprobs", "advantages"))
    with pytest.raises(ConfigError, match="cliprnge_low"):
        module.vanilla(*fields, given["mask"].float(), {"cliprnge_low": 0.1})
    with pytest.raises(ConfigError, match="does not pass a teacher's log-probabilities"):
        module.opd(*[given["old_logprobs"]] * 3, given["mask"].float(), {})
    with pytest.warns(UserWarning, match=r"'gmpo' looks at whole sequences, but XTuner passes no boundaries"):
        module.gmpo(*[given["old_logprobs"]] * 3, given["mask"].float(), {})


# -------------------------------------------------------------------- the classes


def step(loss: str, given: dict[str, Tensor], rows: list[slice], *, boundaries: bool, **settings: Any) -> list[Tensor]:
    """Build, calibrate and run the micro-batches of a step; return the sum of losses and the gradient of the logits."""
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    cfg = classes.ToolkitLossConfig(loss=loss, **settings)
    labels = given["labels"].masked_fill(~given["mask"], -100)
    data = [packed({**given, "shifted_labels": labels}, each) for each in rows]
    fields = ("shifted_labels", "advantages", "old_logprobs", *(["ref_logprobs"] if cfg.use_kl_loss else []))
    contexts = [cfg.build({name: each[name] for name in fields}) for each in data]
    length = given["mask"].shape[1]
    ends = [torch.arange(0, each["labels"].numel() + 1, length) for each in data] if boundaries else None
    contexts = cfg.loss_ctx_cls.build_batches(contexts, cu_seq_lens_list=ends)
    leaf, total = given["logits"].clone().requires_grad_(), torch.zeros((), dtype=given["logits"].dtype)
    for context, each in zip(contexts, rows, strict=True):
        hidden = leaf[each].reshape(1, -1, VOCABULARY)
        loss_of_batch, (logits, extra) = context.forward(hidden, torch.eye(VOCABULARY, dtype=leaf.dtype))
        assert logits is None
        assert extra["toolkit/active_tokens"] >= 0
        total = total + loss_of_batch
    total.backward()
    assert leaf.grad is not None
    return [total.detach(), leaf.grad]


MEANS = ["token_mean", "seq_mean_token_mean", "constant loss.aggregation.length=9"]


@pytest.mark.filterwarnings("ignore:the loss looks at whole sequences")
@pytest.mark.parametrize(
    ("name", "mean", "boundaries"),
    [
        *((name, MEANS[0], True) for name in LOSSES),
        *(("gspo", mean, known) for mean in MEANS for known in (True, False)),
    ],
)
def test_a_step_of_contexts_equals_our_loop(name: str, mean: str, boundaries: bool) -> None:
    given, loss = one_turn(torch.float64), f"{LOSSES[name]} aggregation={mean}"
    settings = {"mode": "chunk", "chunk_size": 5}
    mine = step(loss, given, [slice(0, 1), slice(1, 4)], boundaries=boundaries, **settings)
    check_equal(mine, of_our_loop(given, loss))


def test_a_kl_term() -> None:
    given, loss = batch(), "policy_loss=vanilla kl=k2 loss.kl_loss_coef=0.1"
    mine = step(loss, given, [slice(0, 2), slice(2, 4)], boundaries=True, use_kl_loss=True)
    check_equal(mine, of_our_loop(given, loss, fields=["ref_logprobs"]))


def test_overrides_are_split_as_in_a_shell() -> None:
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    cfg = classes.ToolkitLossConfig(loss="policy_loss=gspo 'policy_loss.cliprange_low=0.1'")
    assert cfg.toolkit_config.policy_options["cliprange_low"] == 0.1


def test_weights_of_rollout_is_multiply_the_policy_loss() -> None:
    given = batch()
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    cfg = classes.ToolkitLossConfig(loss=LOSSES["vanilla"])
    labels = given["labels"].masked_fill(~given["mask"], -100)
    data = {"shifted_labels": labels, "advantages": given["advantages"], "old_logprobs": given["old_logprobs"]}
    losses = []
    for weights in (None, torch.full_like(given["advantages"], 2.0)):
        (context,) = cfg.loss_ctx_cls.build_batches([cfg.build({**data, "is_weights": weights})])
        losses.append(context.forward(given["logits"], torch.eye(VOCABULARY, dtype=torch.float64))[0])
    torch.testing.assert_close(losses[1], 2 * losses[0])


def _two_processes(rank: int, world: int, expected: list[Tensor]) -> None:
    put_stand_in()
    given = batch()
    rows = [slice(0, 1)] if rank == 0 else [slice(1, 4)]
    loss, gradient = step(f"{LOSSES['vanilla']} aggregation=token_mean", given, rows, boundaries=True)
    torch.distributed.all_reduce(gradient)
    check_equal([loss, gradient / world], expected)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_return_the_loss_of_all_and_gradients_that_average() -> None:
    run_processes(2, _two_processes, of_our_loop(batch(), f"{LOSSES['vanilla']} aggregation=token_mean"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cfg": ({"policy_loss_cfg": {"loss_type": "vanilla"}}, "policy_loss_cfg has no effect beside loss"),
    "kl": ({"loss": "policy_loss=gspo kl=k3"}, "set use_kl_loss=True"),
    "no_kl": ({"use_kl_loss": True}, "set use_kl_loss=False"),
    "ce": ({"loss": "loss=ce"}, "has no policy loss"),
    "full": ({"loss": "loss=grpo kl=full", "use_kl_loss": True}, "ref_topk_logprobs, which XTuner does not compute"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs_are_answered(case: str) -> None:
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    settings, message = WRONG[case]
    with pytest.raises((ConfigError, ValueError), match=message):
        classes.ToolkitLossConfig(**settings)


def test_without_xtuner_the_import_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "toolkit.integrations.xtuner.classes", raising=False)
    monkeypatch.setitem(sys.modules, "xtuner.v1.rl.loss", None)
    with pytest.raises(ImportError, match=r"ToolkitLossConfig needs XTuner v1 with xtuner\.v1\.rl\.loss"):
        from toolkit.integrations.xtuner import ToolkitLossConfig  # noqa: F401


def test_forward_needs_the_weights_of_the_step() -> None:
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    given = batch()
    fields = {name: given[name] for name in ("advantages", "old_logprobs")}
    context = classes.ToolkitLossConfig().build({"shifted_labels": given["labels"], **fields})
    with pytest.raises(ConfigError, match="call build_batches before forward"):
        context.forward(given["logits"], torch.eye(VOCABULARY))


def test_boundaries_of_runs_by_hand() -> None:
    classes = importlib.import_module("toolkit.integrations.xtuner.classes")
    scored = torch.tensor([[0, 1, 1, 0, 0, 1, 0]]).bool()
    assert classes.ends_of_runs(scored).tolist() == [0, 3, 6]
    assert classes.ends_of_runs(~scored & scored).tolist() == [0, 7]
