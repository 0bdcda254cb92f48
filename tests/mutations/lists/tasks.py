"""Breakages of a user's data and rewards: reading, splitting, rendering, scoring, failures."""

from tests.mutations.mutation import Mutation

DATA = "tests/tasks/test_dataset.py"
REWARDS = "tests/tasks/test_rewards.py"
COMMAND = "tests/training/test_user_data.py"
TURNS = "tests/training/test_turns.py"

MUTATIONS = (
    # ---------------------------------------------------------------- data
    Mutation(
        name="held-out-prompts-are-trained-on",
        file="toolkit/tasks/split.py",
        line="return [row for row in train if content(row) not in kept_back], chosen[:most]",
        becomes="return list(train), chosen[:most]",
        tests=(f"{DATA}::test_a_file_or_a_column_holds_out",),
    ),
    Mutation(
        name="equal-prompts-on-both-sides",
        file="toolkit/tasks/split.py",
        line="groups.setdefault(content(row), []).append(row)",
        becomes="groups.setdefault(content(row), []).append(row) if content(row) not in groups else None",
        tests=(f"{DATA}::test_a_share_is_held_out_by_seed_and_prompts_stay_together",),
    ),
    Mutation(
        name="split-without-the-seed",
        file="toolkit/tasks/split.py",
        line='Random(f"{seed}/heldout").shuffle(order)',
        becomes='Random("heldout").shuffle(order)',
        tests=(f"{DATA}::test_a_share_is_held_out_by_seed_and_prompts_stay_together",),
    ),
    Mutation(
        name="every-epoch-in-the-same-order",
        file="toolkit/tasks/dataset.py",
        line='Random(f"{self._seed}/epoch/{epoch}").shuffle(orders[epoch])',
        becomes='Random(f"{self._seed}/epoch").shuffle(orders[epoch])',
        tests=(f"{DATA}::test_an_epoch_takes_every_row_once",),
    ),
    Mutation(
        name="first-bytes-of-a-csv-in-its-header",
        file="toolkit/tasks/records.py",
        line='yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")',
        becomes='yield number, line.decode("utf-8")',
        tests=(f"{DATA}::test_all_formats_hold_the_same_rows",),
    ),
    Mutation(
        name="changed-file-not-read-again",
        file="toolkit/tasks/rows.py",
        line="return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)",
        becomes="return tuple((str(file),) for file in files)",
        tests=(f"{DATA}::test_a_file_that_has_changed_is_read_again",),
    ),
    Mutation(
        name="text-without-its-start",
        file="toolkit/tasks/dataset.py",
        line="prompt = start + row.prompt",
        becomes="prompt = row.prompt",
        tests=(f"{DATA}::test_text_gets_the_start_of_text_of_a_tokenizer_that_has_one",),
    ),
    Mutation(
        name="what-follows-a-turn-is-scored",
        file="toolkit/tasks/chat.py",
        line="length = turn.rfind(end) + len(end) if end and end in turn else len(turn)",
        becomes="length = len(turn)",
        tests=(f"{DATA}::test_what_the_template_writes_after_a_turn_is_read_but_not_scored",),
    ),
    Mutation(
        name="prompts-longer-than-the-context",
        file="toolkit/tasks/dataset.py",
        line="elif not with_completions and context is not None and length + new > context:",
        becomes="elif not with_completions and context is not None and length > context:",
        tests=(f"{DATA}::test_tokenizers_and_prompts_that_do_not_fit_are_named",),
    ),
    # ---------------------------------------------------------------- rewards
    Mutation(
        name="rewards-without-weights",
        file="toolkit/tasks/scoring.py",
        line="totals[index] = weight * number + (0.0 if math.isnan(before) else before)",
        becomes="totals[index] = number + (0.0 if math.isnan(before) else before)",
        tests=(f"{REWARDS}::test_weights_parts_and_what_does_not_apply_by_hand",),
    ),
    Mutation(
        name="a-reward-that-does-not-apply-counts-as-0",
        file="toolkit/tasks/scoring.py",
        line="if number is None:",
        becomes="if number is None and (number := 0.0) is None:",
        tests=(f"{REWARDS}::test_a_completion_to_which_no_reward_applies_is_unknown",),
    ),
    Mutation(
        name="nan-is-a-reward",
        file="toolkit/tasks/calls.py",
        line='return number if math.isfinite(number) else f"returned {number}; return a finite number, or None"',
        becomes="return number",
        tests=(f"{REWARDS}::test_what_a_reward_does_wrong_scores_0_and_is_said",),
    ),
    Mutation(
        name="a-reward-that-catches-everything-hangs-on",
        file="toolkit/tasks/calls.py",
        line="raise _TimeIsUp",
        becomes="raise TimeoutError",
        tests=(f"{REWARDS}::test_a_reward_that_hangs_is_interrupted",),
    ),
    Mutation(
        name="rewards-get-the-rendered-prompt",
        file="toolkit/tasks/scoring.py",
        line="prompt = each.example.prompt if each.example.source is None else each.example.source",
        becomes="prompt = each.example.prompt",
        tests=(f"{REWARDS}::test_every_form_of_a_reward",),
    ),
    Mutation(
        name="settings-before-columns",
        file="toolkit/tasks/scoring.py",
        line="columns |= {name: value for name, value in self.settings.items() if name not in self.columns}",
        becomes="columns |= dict(self.settings)",
        tests=(f"{REWARDS}::test_a_column_replaces_a_setting_of_a_batched_reward",),
    ),
    Mutation(
        name="no-answer-is-a-wrong-one",
        file="toolkit/tasks/builtin_rewards.py",
        line="return None if answer is None else float(completion.strip() == str(answer).strip())",
        becomes="return float(completion.strip() == str(answer).strip())",
        tests=(f"{REWARDS}::test_built_in_rewards_do_not_apply_without_an_answer",),
    ),
    Mutation(
        name="shown-examples-are-asked",
        file="toolkit/tasks/gym.py",
        line="if question in shown:",
        becomes="if question in ():",
        tests=("tests/tasks/test_dataset.py::test_solved_examples_come_before_a_question_and_are_not_asked",),
    ),
    # ---------------------------------------------------------------- in the command
    Mutation(
        name="failures-never-end-the-run",
        file="toolkit/training/rewarding.py",
        line="if failed <= self._most_failures * number:",
        becomes="if failed <= number:",
        tests=(f"{COMMAND}::test_failures_are_counted_and_more_than_a_share_ends_the_run",),
    ),
    Mutation(
        name="gdpo-gets-the-sum",
        file="toolkit/training/experience.py",
        line="rewards_multi=parts,",
        becomes="rewards_multi=None,",
        tests=(f"{COMMAND}::test_several_rewards_reach_the_advantages_one_by_one",),
    ),
    Mutation(
        name="standard-error-of-one-prompt",
        file="toolkit/functional/estimates.py",
        line="return MeanEstimate(mean, math.sqrt(variance / number))",
        becomes="return MeanEstimate(mean, math.sqrt(variance))",
        tests=(f"{COMMAND}::test_the_standard_error_is_that_of_the_mean",),
    ),
    Mutation(
        name="what-the-user-writes-is-scored",
        file="toolkit/training/experience.py",
        line="labels[row, first + 1 :] = text.where(scored, IGNORED)[1:]  # nothing precedes the first token",
        becomes="labels[row, first + 1 :] = text[1:]",
        tests=(f"{COMMAND}::test_a_demonstration_scores_what_the_assistant_writes",),
    ),
    Mutation(
        name="a-user-s-data-is-warmed-up",
        file="toolkit/training/run_config.py",
        line="return self.warmup.usual_steps if self.task.demonstrates else 0",
        becomes="return self.warmup.usual_steps",
        tests=(f"{COMMAND}::test_a_step_on_data_of_a_user_reports_each_reward",),
    ),
    # ---------------------------------------------------------------- several turns
    Mutation(
        name="observations-are-scored",
        file="toolkit/rollout/turns.py",
        line="self._append(torch.tensor(ids), torch.full((len(ids),), torch.nan), is_new=False)",
        becomes="self._append(torch.tensor(ids), torch.full((len(ids),), torch.nan), is_new=True)",
        tests=(f"{TURNS}::test_two_turns_by_hand",),
    ),
    Mutation(
        name="every-turn-draws-the-same",
        file="toolkit/training/generation.py",
        line='keys = [] if seeds is None else [f"{seeds[row]}/turn/{turn}" for row in rows]',
        becomes="keys = [] if seeds is None else [seeds[row] for row in rows]",
        tests=(
            f"{TURNS}::test_log_probabilities_are_those_of_the_policy_and_first_turns_those_without_an_environment",
        ),
    ),
    Mutation(
        name="a-turn-after-the-context-is-full",
        file="toolkit/rollout/turns.py",
        line="elif longest is not None and len(row.input_ids) + len(ids) > longest:",
        becomes="elif longest is not None and len(row.input_ids) > longest:",
        tests=(f"{TURNS}::test_an_episode_stops_before_the_context_is_full",),
    ),
    Mutation(
        name="rewards-of-turns-count-twice",
        file="toolkit/training/experience.py",
        line="values[-1] += rewards[row] - values.sum()",
        becomes="values[-1] += rewards[row]",
        tests=(f"{TURNS}::test_rewards_of_turns_are_at_their_last_tokens",),
    ),
    Mutation(
        name="a-failed-episode-keeps-its-rewards",
        file="toolkit/tasks/episodes.py",
        line="return [0.0 if self.failure or reward is None else reward for reward in self.rewards]",
        becomes="return [0.0 if reward is None else reward for reward in self.rewards]",
        tests=(f"{TURNS}::test_failures_of_the_environment_are_counted_and_more_than_a_share_ends_the_run",),
    ),
    Mutation(
        name="the-end-of-a-turn-twice",
        file="toolkit/tasks/chat.py",
        line="return bare[len(end) :] if bare.startswith(end) else rest",
        becomes="return rest",
        tests=(f"{TURNS}::test_what_a_template_writes_between_turns",),
    ),
)
