"""From rollouts and demonstrations to rows: which tokens are scored, and at what log-probability."""

import pytest
import torch

pytest.importorskip("transformers")

from toolkit import ConfigError
from toolkit.functional.rewards import RewardTerms
from toolkit.models.config import TinyLlamaConfig
from toolkit.models.policy import Policy
from toolkit.rollout.sampler import complete, inverse_cdf, row_uniforms
from toolkit.tasks.base import Example
from toolkit.training.config import AdvantageConfig
from toolkit.training.experience import IGNORED, joined_terms, reward_terms, rows_from_answers, rows_from_completions

PROMPTS = ["ab=", "abc=", "a="]


@pytest.fixture
def model() -> tuple[Policy, object]:
    return TinyLlamaConfig(hidden_size=16, intermediate_size=16, num_heads=2).build("abc=")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_those_of_the_policy(model, temperature: float) -> None:
    policy, tokenizer = model
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=4, group_size=5, temperature=temperature)
    assert found.input_ids.shape[0] == 15
    with torch.no_grad():
        logits = policy._raw_logits(found.input_ids, found.attention_mask)[:, :-1] / temperature
    again = logits.log_softmax(-1).gather(-1, found.input_ids[:, 1:, None]).squeeze(-1)
    is_new = found.is_new[:, 1:]
    torch.testing.assert_close(found.logprobs[:, 1:][is_new], again[is_new], rtol=0, atol=1e-5)
    assert found.logprobs[~found.is_new].isnan().all()
    if temperature == 1.0:
        with torch.no_grad():
            scored = policy(found.input_ids, found.attention_mask, score_chunk=7)
        torch.testing.assert_close(scored[is_new], again[is_new], rtol=0, atol=1e-5)


def test_completions_end_with_the_first_end_token(model) -> None:
    policy, tokenizer = model
    with torch.no_grad():  # the end has one chance in two
        head = policy.lm.get_output_embeddings().weight
        head.zero_()
        policy.lm.model.norm.weight.fill_(1)
        head[tokenizer.eos_token_id] = 0.2
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=6, group_size=20, temperature=1.0)
    assert True in found.finished
    assert False in found.finished
    for ids, is_new, text, finished in zip(found.input_ids, found.is_new, found.texts, found.finished, strict=True):
        new = ids[is_new].tolist()
        assert (tokenizer.eos_token_id in new) == finished
        assert tokenizer.eos_token_id not in new[:-1]
        assert len(text) <= len(new)


def test_greedy_is_repeatable(model) -> None:
    policy, tokenizer = model
    first = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=3)
    assert first.texts == complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=3).texts


def test_rows_of_completions_score_new_tokens_only(model) -> None:
    policy, tokenizer = model
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=4, group_size=2, temperature=1.0)
    rows = rows_from_completions(found, torch.arange(6))
    is_scored = rows.shifted_labels != IGNORED
    assert torch.equal(is_scored, found.is_new[:, 1:])
    assert torch.equal(rows.shifted_labels[is_scored], found.input_ids[:, 1:][is_scored])
    assert rows.group_ids is not None
    assert rows.group_ids[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    item = rows.item(-100)
    assert item.shifted_labels.shape == (6, found.input_ids.shape[1] - 1)


def test_rows_of_answers_score_the_answer_and_the_end(model) -> None:
    _, tokenizer = model
    rows = rows_from_answers([Example("ab=", "ba"), Example("a=", "a")], tokenizer, torch.device("cpu"))
    end = tokenizer.eos_token_id
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert rows.shifted_labels.tolist() == [
        [IGNORED, IGNORED, b, a, end],
        [IGNORED, IGNORED, IGNORED, a, end],
    ]
    assert rows.attention_mask.sum(-1).tolist() == [6, 4]


def test_the_first_token_of_a_text_is_never_scored(model) -> None:
    """Nothing precedes it: in a padded row its prediction would be made from padding."""
    _, tokenizer = model
    rows = rows_from_answers([Example("", "ba"), Example("abc=", "cba")], tokenizer, torch.device("cpu"))
    a, end = tokenizer("a", add_special_tokens=False)["input_ids"][0], tokenizer.eos_token_id
    assert rows.shifted_labels[0].tolist() == [IGNORED] * 5 + [a, end]


def test_left_padding_does_not_change_a_row(model) -> None:
    policy, tokenizer = model
    both = rows_from_answers([Example("abc=", "cba"), Example("a=", "a")], tokenizer, torch.device("cpu"))
    alone = rows_from_answers([Example("a=", "a")], tokenizer, torch.device("cpu"))
    with torch.no_grad():
        padded = policy(both.input_ids, both.attention_mask)[1, -2:]
        plain = policy(alone.input_ids, alone.attention_mask)[0, -2:]
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-5)


def test_silenced_rows_score_nothing(model) -> None:
    _, tokenizer = model
    rows = rows_from_answers([Example("ab=", "ba"), Example("a=", "a")], tokenizer, torch.device("cpu"))
    assert len(rows.unscored_row()) == 1
    assert (rows.unscored_row().shifted_labels == IGNORED).all()
    assert [len(piece) for piece in rows.split(1)] == [1, 1]


def test_advantages_of_completions_whatever_their_shape(model) -> None:
    policy, tokenizer = model
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=4, group_size=2, temperature=1.0)
    terms = reward_terms(torch.arange(6.0).view(3, 2), found)
    assert terms.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert terms.require("lengths").tolist() == found.is_new.sum(-1).tolist()
    each = AdvantageConfig(estimator="reinforce_pp").compute(terms)
    rows = rows_from_completions(found, terms.group_ids)
    assert each.shape == rows.shifted_labels.shape
    assert (each[rows.shifted_labels == IGNORED] == 0).all()


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_pp", "reinforce_pp_baseline"])
def test_a_batch_on_two_processes_is_one_batch(estimator: str) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True], [True, False, True]])
    rewards = torch.tensor([1.0, 0.0, 5.0, 2.0])
    whole = RewardTerms(rewards=rewards, group_ids=torch.tensor([3, 3, 8, 8]), lengths=mask.sum(-1), mask=mask)
    parts = [
        RewardTerms(rewards=rewards[i : i + 2], group_ids=torch.zeros(2, dtype=torch.int64), lengths=m.sum(-1), mask=m)
        for i, m in ((0, mask[:2, :2]), (2, mask[2:]))
    ]
    compute = AdvantageConfig(estimator=estimator).compute
    assert torch.equal(compute(joined_terms(parts)), compute(whole))


def test_advantage_config_is_checked_and_frozen() -> None:
    config = AdvantageConfig(estimator="rloo", eps=1e-6)
    assert config == AdvantageConfig(estimator="rloo", options={"eps": 1e-6})
    assert config.options["singleton"] == "zero"
    assert hash(config.options) == hash(AdvantageConfig(estimator="rloo", eps=1e-6).options)
    for change in (lambda: config.options.update(eps=1), lambda: setattr(config, "estimator", "grpo")):
        with pytest.raises(ConfigError, match="immutable"):
            change()
    with pytest.raises(ConfigError, match=r"advantage\.epss is not a setting"):
        AdvantageConfig(epss=1)


def test_tokens_by_inverse_cdf_by_hand() -> None:
    # Probabilities .5, 0, .3, .2: edges at .5, .5, .8, 1. An edge belongs to the next token of a probability above 0.
    logprobs = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.79, 0.81, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logprobs, uniforms).squeeze(-1).tolist() == [0, 0, 2, 2, 3, 3, 3]
    last_is_impossible = torch.tensor([[1.0, 0.0]]).log()
    assert inverse_cdf(last_is_impossible, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 0


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logprobs = torch.randn(9).log_softmax(-1)
    number = 40_000
    found = inverse_cdf(logprobs.expand(number, -1), torch.rand(number, dtype=torch.float64)).flatten()
    shares = torch.bincount(found, minlength=9) / number
    # Four standard errors of a share of at most 1/2.
    torch.testing.assert_close(shares, logprobs.exp(), rtol=0, atol=4 * 0.5 / number**0.5)


def test_the_numbers_of_a_row_are_its_own() -> None:
    assert row_uniforms(["a", "b"], 3)[1].tolist() == row_uniforms(["b"], 5)[0, :3].tolist()
    assert row_uniforms([], 3).shape == (0, 3)
    numbers = row_uniforms([str(seed) for seed in range(2000)], 4)
    assert float(numbers.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 8000**0.5)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_completion_does_not_depend_on_the_rows_beside_it(temperature: float) -> None:
    config = TinyLlamaConfig(hidden_size=16, intermediate_size=16, num_heads=2, dtype="float64")
    policy, tokenizer = config.build("abc=")
    draws = row_uniforms([str(row) for row in range(12)], 6)
    sample = {"max_new_tokens": 6, "group_size": 4, "temperature": temperature}
    whole = complete(policy.lm, tokenizer, PROMPTS, uniforms=draws, **sample)
    assert len(set(whole.texts)) > 6
    for prompt in range(3):
        own = slice(4 * prompt, 4 * prompt + 4)
        alone = complete(policy.lm, tokenizer, PROMPTS[prompt : prompt + 1], uniforms=draws[own], **sample)
        assert alone.texts == whole.texts[own]
        for row in range(4):
            ours = alone.logprobs[row][alone.is_new[row]]
            theirs = whole.logprobs[own][row][whole.is_new[own][row]]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # generate rounds logits to float32
    # An earlier draw of the global generator changes nothing.
    torch.rand(3)
    assert complete(policy.lm, tokenizer, PROMPTS, uniforms=draws, **sample).texts == whole.texts


def test_no_rows_at_all(model) -> None:
    policy, tokenizer = model
    rows = rows_from_answers([], tokenizer, torch.device("cpu"))
    assert len(rows) == 0
    assert [len(piece) for piece in rows.split(4, 2)] == [1, 1]
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=4, group_size=2, temperature=1.0).first(0)
    assert found.texts == []
    none = rows_from_completions(found, torch.zeros(0, dtype=torch.int64))
    silent = none.unscored_row()
    assert (silent.shifted_labels == IGNORED).all()
    assert silent.group_ids is not None
    assert (silent.group_ids < 0).all()
    with torch.no_grad():
        assert policy(silent.input_ids, silent.attention_mask).isfinite().all()
    mask = torch.ones(2, 7, dtype=torch.bool)
    other = RewardTerms(rewards=torch.ones(2), group_ids=torch.zeros(2, dtype=torch.int64), mask=mask)
    joined = joined_terms([reward_terms(torch.zeros(0, 2), found), other])
    assert joined.group_ids.tolist() == [0, 0]


def test_a_text_ends_at_the_tokens_of_the_generation_config_too(model) -> None:
    policy, tokenizer = model
    policy.lm.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("b")]
    found = complete(policy.lm, tokenizer, PROMPTS, max_new_tokens=6, group_size=20, temperature=1.0)
    ended = [text for text, finished in zip(found.texts, found.finished, strict=True) if finished]
    assert any(text.endswith("b") for text in ended)
    assert not any("b" in text[:-1] for text in found.texts)
