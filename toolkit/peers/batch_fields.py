"""What other projects call the fields of a batch, and what to write here instead: ``completion_mask`` is ``loss_mask``.

Read from TRL 1.16.0 (``GRPOTrainer._compute_loss``), verl 0.9.1 (``DataProto`` of the actor), OpenRLHF
(``Experience``), ms-swift 4.6.0 (``GRPOBatch``) and transformers (arguments of ``forward``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Counterpart(NamedTuple):
    """What a field of another project is here."""

    ours: tuple[str, ...]
    """Fields, the first that the batch has."""
    otherwise: str
    """What to do where the batch has none of them."""
    project: str = ""
    remark: str = ""


BATCH = (
    *("input_ids", "shifted_labels", "loss_mask", "attention_mask", "cu_seq_lens", "group_ids", "advantages"),
    *("old_logprobs", "current_logprobs", "ref_logprobs", "rollout_logprobs", "teacher_logprobs"),
)
"""The fields of a batch that other projects have, too."""
MASK = Counterpart(
    ("loss_mask",), "mark the positions that do not count by -100 in shifted_labels, or use from_unshifted(ids, mask)"
)
CURRENT = Counterpart(
    ("logprobs",),
    "the loss computes the current log-probabilities from the hidden states and the head; those before the step are "
    "old_logprobs",
)
REWARDS = Counterpart(
    ("advantages",), "", remark="computed from rewards before the step, e.g. by toolkit.functional.advantages"
)
PARTS = Counterpart(
    ("input_ids",), "give shifted_labels of the full rows", remark="prompt and completion: torch.cat([prompt, ids], 1)"
)
OF_MODEL = Counterpart((), "it is for the model's forward; the loss does not read it, so leave it out")
NAMES: dict[str, Counterpart] = {
    "labels": Counterpart(
        ("shifted_labels",),
        "",
        "transformers",
        "if they are not shifted yet, give input_ids and loss_mask instead",
    ),
    "targets": Counterpart(("shifted_labels",), ""),
    **dict.fromkeys(("old_per_token_logps", "old_logps"), Counterpart(("old_logprobs",), "", "TRL")),
    **dict.fromkeys(("ref_per_token_logps", "ref_logps"), Counterpart(("ref_logprobs",), "", "TRL")),
    "sampling_per_token_logps": Counterpart(("rollout_logprobs",), "", "TRL"),
    **dict.fromkeys(("old_log_prob", "old_log_probs"), Counterpart(("old_logprobs",), "", "verl")),
    **dict.fromkeys(("ref_log_prob", "ref_log_probs"), Counterpart(("ref_logprobs",), "", "verl")),
    "base_action_log_probs": Counterpart(("ref_logprobs",), "", "OpenRLHF"),
    "rollout_log_probs": Counterpart(("rollout_logprobs",), "", "verl"),
    "rollout_per_token_logps": Counterpart(("rollout_logprobs",), "", "ms-swift"),
    "teacher_per_token_logps": Counterpart(("teacher_logprobs",), "", "ms-swift"),
    **dict.fromkeys(
        ("sampler_logprobs", "vllm_logprobs", "inference_logprobs"), Counterpart(("rollout_logprobs",), "")
    ),
    **dict.fromkeys(("per_token_logps", "logps"), CURRENT._replace(project="TRL")),
    **dict.fromkeys(("log_prob", "log_probs"), CURRENT._replace(project="verl")),
    **dict.fromkeys(("logprobs", "new_logprobs", "action_log_probs"), CURRENT),
    **dict.fromkeys(("completion_mask", "tool_mask"), MASK._replace(project="TRL")),
    "response_mask": MASK._replace(project="verl"),
    "action_mask": MASK._replace(project="OpenRLHF"),
    **dict.fromkeys(("mask", "labels_mask", "token_mask", "assistant_masks", "assistant_mask"), MASK),
    **dict.fromkeys(("prompt_ids", "completion_ids"), PARTS._replace(project="TRL")),
    **dict.fromkeys(("prompts", "responses"), PARTS._replace(project="verl")),
    **dict.fromkeys(("reward", "rewards", "scores", "returns", "token_level_rewards", "token_level_scores"), REWARDS),
    **dict.fromkeys(("uid", "prompt_idx", "groups"), Counterpart(("group_ids",), "", remark="integers")),
    "logits": Counterpart((), "give hidden_states and head_weight; logits of all tokens are never held at once"),
    "num_items_in_batch": Counterpart((), "the loss counts scored tokens itself, over all micro-batches and ranks"),
    **dict.fromkeys(
        ("importance_sampling_ratio", "rollout_is_weights"),
        Counterpart((), "give rollout_logprobs and choose a correction, such as correction=tis"),
    ),
    **dict.fromkeys(("position_ids", "pixel_values", "inputs_embeds", "past_key_values"), OF_MODEL),
}


def counterpart_field(name: str, known: Collection[str], written: str = "{}=...") -> str | None:
    """Say what to give instead of a field of a batch that does not exist; None if no project has it.

    Args:
        name: the field.
        known: the fields that exist.
        written: how the answer spells a field.
    """
    there = NAMES.get(name)
    if there is None:
        return None
    ours = next((field for field in there.ours if field in known), None)
    if ours is None:
        return there.otherwise or None
    notes = "; ".join(filter(None, (f"{name} of {there.project}" if there.project else "", there.remark)))
    return f"try: {written.format(ours)}" + (f" ({notes})" if notes else "")


def replaces(name: str, known: Collection[str]) -> str | None:
    """Return the field that a log-probability or a mask of another project is here; None for other names.

    A batch may hold them for the model's forward, but then the loss needs its field, too.
    """
    ours = next((field for field in NAMES.get(name, OF_MODEL).ours if field in known), None)
    return ours if ours == "loss_mask" or (ours or "").endswith("_logprobs") else None
