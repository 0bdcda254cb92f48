"""Whether a run can pack: what is refused before any work, and one comparison with the model before the first step.

Legend: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from toolkit.distributed import reduce_metrics
from toolkit.errors import ConfigError, ToolkitError, described
from toolkit.losses.config.ce import CELossConfig
from toolkit.metrics import Max
from toolkit.models.packed import why_not_packed
from toolkit.models.policy import TOLERANCE, Policy
from toolkit.tasks.base import Example, Task
from toolkit.training.experience import Rows
from toolkit.training.packing import MicroBatch, PackedPlan, pack, tokens_of
from toolkit.training.run_config import RunConfig

NUM_COMPARED = 4
"""Sequences of a packed row that are also computed alone."""
PADDED_INSTEAD = "remove it, and micro-batches are padded rows (training.micro_batch_size)"


def check_model(policy: Policy, budget: int | None) -> None:
    """Raise if the model cannot read packed rows, as far as that shows without a forward.

    Raises:
        ConfigError: it carries a state from token to token, or takes no position ids.
    """
    reason = None if budget is None else why_not_packed(policy.head.trunk)
    if reason is not None:
        raise ConfigError(
            f"training.micro_batch_tokens={budget} packs sequences end to end, but {type(policy.head.lm).__name__} "
            f"{reason}; {PADDED_INSTEAD}"
        )


def check_budget(config: RunConfig, task: Task, tokenizer: Any, max_new_tokens: int) -> None:
    """Raise if a sequence of the run may be longer than the budget of a packed row.

    Args:
        config: of the run.
        task: prepared, so its examples are what the model sees.
        tokenizer: of the model.
        max_new_tokens: tokens of the longest completion.

    Raises:
        ConfigError: names the longest sequence.
    """
    budget = config.training.micro_batch_tokens
    if budget is None or not task.train:
        return
    if not isinstance(config.loss, CELossConfig):
        prompt = _longest([example.prompt for example in task.train], tokenizer)
        if prompt + max_new_tokens > budget:
            raise ConfigError(
                f"training.micro_batch_tokens={budget} is less than the longest prompt, {prompt} tokens, with a "
                f"completion of {max_new_tokens}; set it to {prompt + max_new_tokens} or more, or lower "
                "rollout.max_new_tokens"
            )
    if config.imitates:
        demonstration = _longest([demonstrated(example) for example in task.train], tokenizer) + 1  # and its end
        if demonstration > budget:
            raise ConfigError(
                f"training.micro_batch_tokens={budget} is less than the longest demonstration, {demonstration} tokens "
                f"with its end; set it to {demonstration} or more"
            )


def demonstrated(example: Example) -> str:
    """Return the text that supervised learning reads."""
    return "".join(text for text, _ in example.segments) or example.prompt + example.answer


def _longest(texts: Sequence[str], tokenizer: Any) -> int:
    return max(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))


@torch.no_grad()
def compare_with_single(
    policy: Policy, rows: Rows, plan: PackedPlan, *, budget: int, precision: str, **options: Any
) -> None:
    """Compare the log-probabilities of a packed row with those of its sequences one by one; all processes call it.

    Args:
        policy: not wrapped; put into evaluation mode, because dropout would draw twice.
        rows: of this process, perhaps none.
        plan: of the rows; its row with most sequences is compared, up to `NUM_COMPARED` of them.
        budget: ``training.micro_batch_tokens``, for the message.
        precision: of the forward, such as "bf16"; "no" for that of the weights.
        options: of `Policy.forward`.

    Raises:
        ConfigError: they differ by more than rounding on any process.
    """
    policy.eval()
    numbers = max(plan.packs, key=len, default=[])[:NUM_COMPARED]
    name = type(policy.head.lm).__name__
    try:
        together = pack(rows, numbers).forward(policy, **options)[0]
    except ToolkitError:
        raise
    except Exception as error:  # the model may raise anything
        raise ConfigError(
            f"training.micro_batch_tokens={budget}: {name} fails on a packed row ({described(error)}); {PADDED_INSTEAD}"
        ) from error
    singles = [rows.select(slice(number, number + 1)) for number in numbers]
    singles += [rows.unscored_row()] * (NUM_COMPARED - len(numbers))  # every forward may be a collective
    alone = torch.cat([MicroBatch(each).forward(policy, **options) for each in singles])
    tokens = tokens_of(rows, numbers)
    of_single = torch.searchsorted(torch.tensor(numbers, device=tokens.row.device), tokens.row[1:])
    expected = alone[of_single, tokens.column[1:] - 1][tokens.follows]
    difference = largest = alone.new_zeros(())
    if len(expected):
        difference = (together[tokens.follows] - expected).abs().max()
        largest = expected.abs().max()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, next(policy.parameters()).dtype)
    allowed = TOLERANCE.get(dtype, 1e-4)
    measured = reduce_metrics({"difference": Max.of(difference), "largest": Max.of(largest)})
    deviation, scale = (float(measured[each].value()) for each in ("difference", "largest"))
    if not deviation <= allowed * max(1.0, scale):  # NaN, too
        raise ConfigError(
            f"training.micro_batch_tokens={budget}: {name} does not keep the sequences of a packed row apart, their "
            f"log-probabilities differ by {deviation:.2g} nats from those of each sequence alone; {PADDED_INSTEAD}"
        )
