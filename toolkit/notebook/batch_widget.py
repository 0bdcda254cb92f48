"""`batch_view`: the sequences of a batch, what is masked, and where each weight comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from toolkit.losses.items import RLLossContextInputItem
from toolkit.notebook.batch_model import batch_charts, batch_records
from toolkit.notebook.charts import View
from toolkit.notebook.token_model import TokenModel
from toolkit.notebook.token_widget import TokenView


def batch_view(
    items: Sequence[RLLossContextInputItem],
    runner: Any = None,
    *,
    cu_seq_lens_list: Sequence[Tensor | None] | None = None,
    decode: Callable[[int], str] | None = None,
) -> BatchView:
    """Show the sequences of a step: packing, what is scored, and the weight of each token with its formula.

    Args:
        items: the micro-batches of one optimizer step; fields are [B, T].
        runner: a `LossRunner` or a config; its aggregation decides the weights. None: the default one.
        cu_seq_lens_list: for each item the [S + 1] boundaries of its packed row; None: a row is a sequence.
        decode: the text of a token id, such as ``tokenizer.decode``; None: the number.

    Raises:
        DataError: `items` is empty or holds something else, or boundaries are invalid.
        ConfigError: the loss is not built on a policy loss.
    """
    return BatchView(TokenModel(batch_records(items, runner, cu_seq_lens_list, decode), signal="weight"))


class BatchView(TokenView):
    """The widget; `model` is its state."""

    def _charts(self) -> View:
        chosen = [self.model.records[index] for index in self.model.chosen()]
        return batch_charts(chosen)
