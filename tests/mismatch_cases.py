"""Pairs of log-probabilities of a sampler and a trainer, with faults that are really made, for `diagnose`.

A tiny model learns a language whose next token depends on a topic in the prompt, so a lost prompt matters. The sampler
draws completions from a copy of it; each fault is made where it would happen: in the sampler's model, its input, its
arrays or the trainer's input.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PAD, BOS, EOS, FIRST, TOPICS, VOCABULARY = 0, 1, 2, 4, 4, 48
ROWS, LENGTH, STEPS, STALE = 12, 40, 260, 150
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
         "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}  # fmt: skip


def tiny_lm(kind: str) -> Any:
    import transformers as tf

    sizes, few = dict(SIZES), {"intermediate_size": 96, "num_key_value_heads": 2}
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **few))
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0,
                          embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=EOS)
        )  # fmt: skip
    if kind == "qwen3":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes, **few, head_dim=16, tie_word_embeddings=True))
    if kind == "neox":
        return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, intermediate_size=96, hidden_dropout=0.0))
    if kind == "phi":
        return tf.PhiForCausalLM(tf.PhiConfig(**sizes, intermediate_size=96))
    if kind == "opt":
        return tf.OPTForCausalLM(tf.OPTConfig(**sizes, ffn_dim=96, word_embed_proj_dim=48, dropout=0.0))
    raise ValueError(kind)


def texts(number: int, generator: torch.Generator, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [number, LENGTH] and the length of each prompt: BOS, topic, noise of any length, then the language."""
    ids = torch.full((number, LENGTH), PAD)
    prompts = torch.randint(4, 9, (number,), generator=generator)
    topics = torch.randint(0, TOPICS, (number,), generator=generator)
    for row in range(number):
        length = int(torch.randint(LENGTH // 2, LENGTH, (1,), generator=generator))
        ids[row, 0], ids[row, 1] = BOS, FIRST + topics[row]
        ids[row, 2 : prompts[row]] = torch.randint(
            FIRST + TOPICS, VOCABULARY, (int(prompts[row]) - 2,), generator=generator
        )
        for column in range(int(prompts[row]), length):
            weights = tables[topics[row], ids[row, column - 1]]
            ids[row, column] = torch.multinomial(weights, 1, generator=generator)
        ids[row, length - 1] = EOS
    return ids, prompts


@dataclass
class World:
    """A trained model, the same some steps earlier, and the language."""

    lm: Any
    earlier: Any
    tables: Tensor


def world_of(kind: str, seed: int = 0) -> World:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tables = (2.2 * torch.randn(TOPICS, VOCABULARY, VOCABULARY, generator=generator)).exp()
    tables[..., : FIRST + TOPICS] = 0
    pool = [texts(64, generator, tables)[0] for _ in range(12)]
    lm = tiny_lm(kind)
    optimizer, earlier = torch.optim.AdamW(lm.parameters(), lr=4e-3), None
    for step in range(STEPS):
        if step == STALE:
            earlier = copy.deepcopy(lm).eval()
        ids = pool[step % len(pool)]
        logits = lm(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return World(lm.eval().requires_grad_(False), earlier.requires_grad_(False), tables)


@dataclass
class Drawn:
    """What a sampler drew: ids [B, T], completion mask [B, T] bool, the log-probability of each token [B, T]."""

    ids: Tensor
    mask: Tensor
    logprobs: Tensor


Change = Callable[[Tensor], Tensor]


def draw(
    lm: Any, prompts: Tensor, lengths: Tensor, seed: int, change: Change = lambda x: x, before: tuple[int, ...] = ()
) -> Drawn:
    """Draw completions of prompts [B, T] from ``change(logits)``, log-softmaxed in fp32; `before` comes first."""
    generator, ids, number = torch.Generator().manual_seed(seed), prompts.clone(), len(prompts)
    more = torch.tensor([before], dtype=torch.long).expand(number, -1)
    scores, mask, is_done = (
        torch.zeros(ids.shape),
        torch.zeros(ids.shape, dtype=torch.bool),
        torch.zeros(number, dtype=torch.bool),
    )
    for column in range(int(lengths.min()), LENGTH):
        context = torch.cat([more, ids[:, :column]], 1)
        logprobs = change(lm(input_ids=context).logits[:, -1].float()).log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(-1)
        is_free = (column >= lengths) & ~is_done
        ids[is_free, column], mask[:, column] = token[is_free], is_free
        scores[is_free, column] = logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)[is_free]
        is_done |= is_free & (token == EOS)
    return Drawn(ids, mask, scores)


def scored(lm: Any, ids: Tensor, attention: Tensor | None = None) -> Tensor:
    """Return the log-probability of each token [B, T] by a forward over the rows; 0 for the first."""
    attention = (ids != PAD).long() if attention is None else attention
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = lm(input_ids=ids, attention_mask=attention, position_ids=positions).logits.float()
    values = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(values, (1, 0))


@dataclass
class Case:
    """Arrays [B, T] by token as a person has them; what the trainer reads are `ids` and `attention`."""

    rollout: Tensor
    trainer: Tensor
    mask: Tensor
    ids: Tensor
    attention: Tensor


KINDS = ("shifted", "temperature", "top_p", "dtype_noise", "stale_weights", "tokenizer_offset", "dropped_eos",
         "duplicated_bos", "swapped_rows", "prompt_missing", "probabilities", "padding_scored")  # fmt: skip
TEMPERATURES, NUCLEI = (0.6, 0.7, 0.8, 1.25, 1.5), (0.8, 0.9, 0.95)


def quantized(lm: Any) -> Any:
    """Return a copy whose matrices were rounded to fp8 (e4m3)."""
    other = copy.deepcopy(lm)
    for parameter in other.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.to(torch.float8_e4m3fn).to(parameter.dtype))
    return other


def nucleus(logits: Tensor, p: float) -> Tensor:
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    is_cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered >= p)
    return logits.masked_fill(is_cut, float("-inf"))


@torch.no_grad()
def make(kind: str, world: World, seed: int) -> Case:
    """Return one pair: ``clean``, or with one of `KINDS`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids, lengths = texts(ROWS, generator, world.tables)
    columns = torch.arange(LENGTH)
    prompts = ids.masked_fill(columns >= lengths.unsqueeze(-1), PAD)
    half = copy.deepcopy(world.lm).to(torch.bfloat16)
    lm, change, before = (half if seed % 2 else world.lm), (lambda x: x), ()
    if kind == "temperature":
        change = lambda x: x / TEMPERATURES[seed % 5]  # noqa: E731
    elif kind == "top_p":
        change = lambda x: nucleus(x, NUCLEI[seed % 3])  # noqa: E731
    elif kind == "stale_weights":
        lm = world.earlier
    elif kind == "dtype_noise" and seed % 2:
        lm = quantized(world.lm)
    elif kind == "duplicated_bos":
        before = (BOS,)
    drawn = draw(lm, prompts, lengths, seed, change, before)
    ids, mask, rollout = drawn.ids, drawn.mask, drawn.logprobs
    attention = ((columns < lengths.unsqueeze(-1)) | mask).long()  # a drawn token may be PAD
    trainer_lm = half if kind == "clean" and seed % 4 == 0 else world.lm
    case = Case(rollout, scored(trainer_lm, ids, attention), mask, ids, attention)
    return _after(kind, case, world, drawn, seed)


def _after(kind: str, case: Case, world: World, drawn: Drawn, seed: int) -> Case:
    """Make the faults that arise after sampling."""
    rollout, mask, ids = case.rollout, case.mask, case.ids
    if kind == "shifted":
        return replace(case, rollout=rollout.roll(1 if seed % 2 else -1, -1))
    if kind == "dtype_noise" and not seed % 2:
        return replace(case, rollout=rollout.to(torch.bfloat16).float())
    if kind == "tokenizer_offset":
        other = torch.where(case.attention.bool(), (ids + 1 + seed % 3) % VOCABULARY, ids)
        return replace(case, trainer=scored(world.lm, other, case.attention), ids=other)
    if kind == "dropped_eos":
        return replace(case, rollout=rollout.masked_fill(ids == EOS, 0.0))
    if kind == "swapped_rows":
        order = torch.arange(len(ids))
        if seed % 2:
            order = order.roll(1)
        else:  # a row that ends after a few tokens fits any other
            longest = mask.sum(-1).argsort(descending=True)[:2]
            order[longest] = longest.flip(0)
        other = torch.zeros_like(rollout)
        for row, source in enumerate(order.tolist()):
            values = rollout[source][mask[source]]
            start, room = int(mask[row].nonzero()[0]), LENGTH - int(mask[row].nonzero()[0])
            other[row, start : start + len(values)] = values[:room]
        return replace(case, rollout=other)
    if kind == "prompt_missing":
        return replace(
            case, trainer=scored(world.lm, ids, case.attention * (mask | (torch.arange(LENGTH) == 0)).long())
        )
    if kind == "probabilities":
        return replace(case, rollout=rollout.exp())
    if kind == "padding_scored":
        starts = mask.long().argmax(-1, keepdim=True)
        return replace(case, mask=torch.arange(LENGTH) >= starts)
    return case


def names(case: Case, kind: str, world: World, *, with_model: bool) -> tuple[str, ...]:
    """Return the kinds that `diagnose` names for a pair, from the arrays or from the trainer's model and batch."""
    from toolkit import GRPOLossConfig, LossRunner

    runner = LossRunner(GRPOLossConfig())
    if not with_model:
        return runner.diagnose(case.rollout, case.trainer, case.mask, case.ids).kinds
    batch = {"input_ids": case.ids, "loss_mask": case.mask.long()}
    if kind == "prompt_missing":
        batch["attention_mask"] = case.attention * (case.mask | (torch.arange(LENGTH) == 0)).long()
    elif kind != "padding_scored":  # a loss that knows the padding does not score it
        batch["attention_mask"] = case.attention
    at_positions = torch.nn.functional.pad(case.rollout[:, 1:], (0, 1))
    return runner.diagnose(at_positions, model=world.lm, batch=batch).kinds


def table(world: World, seeds: range, *, with_model: bool) -> dict[str, dict[tuple[str, ...], int]]:
    """Return for each kind, and for clean pairs, how often each answer was given."""
    result: dict[str, dict[tuple[str, ...], int]] = {}
    for kind in ("clean", *KINDS):
        answers = result.setdefault(kind, {})
        for seed in seeds:
            answer = names(make(kind, world, seed), kind, world, with_model=with_model)
            answers[answer] = answers.get(answer, 0) + 1
    return result


def main(kinds_of_models: list[str]) -> None:
    """Print the table of ten seeds, and the clean pairs that are flagged: python -m tests.mismatch_cases opt phi."""
    for kind_of_model in kinds_of_models:
        world = world_of(kind_of_model)
        for with_model in (False, True):
            for kind, answers in table(world, range(10), with_model=with_model).items():
                shown = ", ".join(f"{number} x {' or '.join(answer) or 'none'}" for answer, number in answers.items())
                print(f"{kind_of_model:6} {'model ' if with_model else 'arrays'} {kind:17} {shown}", flush=True)
        pairs = [make("clean", world, seed) for seed in range(25)]
        flagged = sum(bool(names(pair, "clean", world, with_model=False)) for pair in pairs)
        print(f"{kind_of_model:6} {flagged} of 25 clean pairs flagged", flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
