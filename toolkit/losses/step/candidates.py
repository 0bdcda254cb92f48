"""Candidate tokens of each position with the log-probabilities of a reference or a teacher, for an exact KL.

Legend: B rows, T positions of a row, K candidates, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem

MAX_MASS = 1.01
"""Largest total probability of the candidates of a position; above 1 because of rounding to bf16."""


def candidates_of(
    item: RLLossContextInputItem, cfg: BaseRLLossConfig, where: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the checked candidate ids and log-probabilities that the loss reads, [B, T, K] each.

    Ids are None for the whole vocabulary in order; log-probabilities are -inf where an id is negative. Both are None
    for a loss that compares sampled tokens only.

    Raises:
        DataError: they are missing, they are not log-probabilities, or a token appears twice.
    """
    who = cfg.candidates
    if who is None:
        return None, None
    ids, logprobs = getattr(item, f"{who}_topk_ids"), getattr(item, f"{who}_topk_logprobs")
    where = f"{where}.{who}_topk"
    if logprobs is None:
        source = "teacher" if who == "teacher" else "reference"
        why = "variant='top_k'" if who == "teacher" else f"kl_loss_type={cfg.kl_loss_type!r}"
        raise DataError(
            f"{where}_logprobs is missing, but {why} compares whole distributions; give log-probabilities of the "
            f"{source} for K candidates of each position, [.., T, K] (of the whole vocabulary, K = V, without ids)"
        )
    if ids is None and who == "ref" and cfg.kl_loss_type == "top_k":
        raise DataError(
            f"{where}_ids is missing, but kl_loss_type='top_k' must know which tokens the candidates are; give int64 "
            "[.., T, K], or take kl_loss_type='full' (on the command line: kl=full) for the whole vocabulary"
        )
    if ids is not None and who == "ref" and cfg.kl_loss_type == "full":
        raise DataError(
            f"{where}_ids has no effect on kl_loss_type='full', which compares the whole vocabulary in order; leave it "
            "out, or take kl_loss_type='top_k' (on the command line: kl=top_k)"
        )
    if ids is not None and ids.shape != logprobs.shape:
        raise DataError(
            f"{where}_ids has shape {list(ids.shape)}, but {where}_logprobs {list(logprobs.shape)}; give one "
            "log-probability for each candidate"
        )
    is_scored = item.shifted_labels != cfg.ignore_idx
    _check_distribution(logprobs, ids, is_scored, where)
    return ids, logprobs if ids is None else logprobs.masked_fill(ids < 0, -torch.inf)


def _check_distribution(logprobs: Tensor, ids: Tensor | None, is_scored: Tensor, where: str) -> None:
    """Raise if the values at a scored position are not part of a distribution."""
    present = is_scored.unsqueeze(-1) if ids is None else is_scored.unsqueeze(-1) & (ids >= 0)
    if index := _first(present & ~logprobs.isfinite()):
        raise DataError(
            f"{where}_logprobs{index} = {float(logprobs[tuple(index)])} at a scored position; give a finite "
            "log-probability, or the id -1 if there is no candidate"
        )
    mass = logprobs.detach().masked_fill(~present, -torch.inf).logsumexp(-1).exp()
    if index := _first(is_scored & (mass > MAX_MASS)):
        raise DataError(
            f"{where}_logprobs{index} add up to a probability of {float(mass[tuple(index)]):.3g}; give "
            "log-probabilities in nats (a log-softmax over the whole vocabulary), not logits"
        )
    if ids is None:
        return
    in_order = ids.sort(-1).values
    is_twice = ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).any(-1)
    if index := _first(is_scored & is_twice):
        raise DataError(f"{where}_ids{index} names a token twice; its probability would count twice. Keep one of them")


def _first(mask: Tensor) -> list[int]:
    """Return the index of the first True, empty if there is none."""
    return mask.nonzero()[0].tolist() if bool(mask.any()) else []


def check_vocabulary(
    ids: Tensor | None, logprobs: Tensor | None, labels: Tensor, vocabulary: int, ignore_idx: int
) -> None:
    """Check candidates, `ids` and `logprobs` [B, T, K] at `labels` [B, T], against the vocabulary of the head.

    Raises:
        DataError: an id is outside the vocabulary, or ids are None and K is not V.
    """
    if ids is None:
        if logprobs is not None and logprobs.shape[-1] != vocabulary:
            raise DataError(
                f"candidate_logprobs has {logprobs.shape[-1]} values for each position and no ids, but the vocabulary "
                f"has {vocabulary}; give one for each token of the vocabulary, or the ids of the candidates"
            )
        return
    if index := _first((labels != ignore_idx).unsqueeze(-1) & (ids >= vocabulary)):
        raise DataError(
            f"candidate_ids{index} = {int(ids[tuple(index)])} lies outside the vocabulary of {vocabulary} "
            f"(0 .. {vocabulary - 1}); a negative id means no candidate"
        )
