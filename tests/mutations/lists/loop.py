"""Breakages of what a step does with a rollout: epochs, old log-probabilities, refills, long texts, the reference."""

from tests.mutations.mutation import Mutation

EPOCHS = "tests/training/test_epochs.py"
OLD = "tests/training/test_old_logprobs.py"
SAMPLING = "tests/training/test_dynamic_sampling.py"
OVERLONG = "tests/training/test_overlong.py"
SAMPLES = "tests/training/test_sample_log.py"
REPORT = "tests/report"

MUTATIONS = (
    Mutation(
        name="epochs-in-the-same-order",
        file="toolkit/training/trainer.py",
        line='shuffle = self.draws.rng("main", step, "shuffle", *([epoch] if epoch else []))',
        becomes='shuffle = self.draws.rng("main", step, "shuffle")',
        tests=(f"{EPOCHS}::test_each_epoch_is_divided_anew_and_has_one_old_policy",),
    ),
    Mutation(
        name="rate-falls-in-the-first-epoch",
        file="toolkit/training/trainer.py",
        line="step_fn, num_updates = self._rl_step, cfg.steps * cfg.epochs * cfg.minibatches",
        becomes="step_fn, num_updates = self._rl_step, cfg.steps * cfg.minibatches",
        tests=(f"{EPOCHS}::test_the_rate_falls_over_all_epochs",),
    ),
    Mutation(
        name="reference-refreshed-a-step-early",
        file="toolkit/training/trainer.py",
        line="if self.reference is not None and every is not None and (step + 1) % every == 0:",
        becomes="if self.reference is not None and every is not None and step % every == 0:",
        tests=(f"{EPOCHS}::test_the_reference_is_refreshed_every_second_step",),
    ),
    Mutation(
        name="mixup-of-the-reference",
        file="toolkit/training/sharding.py",
        line="target.mul_(1 - mixup).add_(source, alpha=mixup)",
        becomes="target.mul_(mixup).add_(source, alpha=1 - mixup)",
        tests=(f"{EPOCHS}::test_a_reference_that_follows_in_part",),
    ),
    Mutation(
        name="sampler-is-always-trusted",
        file="toolkit/training/old_logprobs.py",
        line="self.is_same = value <= self._bound  # not if it is NaN: the sampler did not report a token",
        becomes="self.is_same = True",
        tests=(f"{OLD}::test_beyond_the_bound_of_the_dtype_they_are_recomputed",),
    ),
    Mutation(
        name="unreported-tokens-are-trusted",
        file="toolkit/training/old_logprobs.py",
        line="self.is_same = value <= self._bound  # not if it is NaN: the sampler did not report a token",
        becomes="self.is_same = not value > self._bound",
        tests=(f"{OLD}::test_a_token_that_the_sampler_did_not_report_is_a_difference",),
    ),
    Mutation(
        name="corrections-compare-the-sampler-with-itself",
        file="toolkit/training/old_logprobs.py",
        line='return bool(loss_cfg.correction) or "rollout_logprobs" in loss_cfg.required_fields',
        becomes="return bool(loss_cfg.correction)",
        tests=(f"{OLD}::test_what_compares_sampler_and_trainer_gets_both",),
    ),
    Mutation(
        name="decision-outlives-its-settings",
        file="toolkit/training/old_logprobs.py",
        line='if state.get("settings") == self._settings:',
        becomes='if "settings" in state:',
        tests=(f"{OLD}::test_the_decision_is_kept_until_settings_change",),
    ),
    Mutation(
        name="surplus-groups-are-learnt-from",
        file="toolkit/training/dynamic_sampling.py",
        line="if missing < 0:",
        becomes="if False:",
        tests=(f"{SAMPLING}::test_rounds_by_hand",),
    ),
    Mutation(
        name="refilling-has-no-limit",
        file="toolkit/training/dynamic_sampling.py",
        line="while not rounds or (missing > 0 and len(rounds) < max_rounds):",
        becomes="while not rounds or missing > 0:",
        tests=(f"{SAMPLING}::test_sampling_stops_at_the_limit_and_says_so_once",),
    ),
    Mutation(
        name="refills-repeat-a-batch",
        file="toolkit/training/rollouts.py",
        line="self.num_refills += num_rounds - 1",
        becomes="pass",
        tests=(f"{SAMPLING}::test_a_step_learns_from_as_many_groups_as_it_wants",),
    ),
    Mutation(
        name="resume-forgets-refills",
        file="toolkit/training/rollouts.py",
        line='self.num_refills = state.get("num_refills", 0)',
        becomes="pass",
        tests=(f"{SAMPLING}::test_the_batches_drawn_are_kept_for_a_resumed_run",),
    ),
    Mutation(
        name="advantages-of-groups-that-were-dropped",
        file="toolkit/training/rollouts.py",
        line="groups = groups.with_advantages(self._advantages(groups.terms), rank)",
        becomes="pass",
        tests=(f"{SAMPLING}::test_a_step_learns_from_as_many_groups_as_it_wants",),
    ),
    Mutation(
        name="penalty-from-the-first-token",
        file="toolkit/training/overlong.py",
        line="return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)",
        becomes="return (-lengths / max_length).clamp(-1.0, 0.0)",
        tests=(f"{OVERLONG}::test_the_punishment_of_the_paper_by_hand",),
    ),
    Mutation(
        name="masked-completions-are-scored",
        file="toolkit/training/rollouts.py",
        line="labels = labels.masked_fill(is_masked[is_local].unsqueeze(-1).to(labels.device), IGNORED)",
        becomes="pass",
        tests=(f"{OVERLONG}::test_a_masked_completion_counts_in_its_group_but_not_in_the_loss",),
    ),
    # ---------------------------------------------------------------- samples and their report
    Mutation(
        name="samples-of-every-step",
        file="toolkit/training/sample_log.py",
        line='is_due = kind == "some" and step % self.config.samples_every == 0',
        becomes='is_due = kind == "some"',
        tests=(f"{SAMPLES}::test_some_are_the_first_prompts_of_every_few_steps",),
    ),
    Mutation(
        name="samples-twice-after-a-resume",
        file="toolkit/training/sample_log.py",
        line='return bool(json.loads(line)["step"] < next_step)',
        becomes='return bool(json.loads(line)["step"] <= next_step)',
        tests=(f"{SAMPLES}::test_a_resumed_run_has_every_sample_once",),
    ),
    Mutation(
        name="one-seed-is-compared",
        file="toolkit/report/statistics.py",
        line="if len(first) < 2 or len(second) < 2:",
        becomes="if not first or not second:",
        tests=(f"{REPORT}/test_comparison.py::test_differences_by_hand",),
    ),
    Mutation(
        name="seeds-in-the-order-of-the-runs",
        file="toolkit/report/comparison.py",
        line="second = [of_seed[seed] for seed in seeds[0]]",
        becomes="second = list(of_seed.values())",
        tests=(f"{REPORT}/test_comparison.py::test_runs_of_the_same_seed_are_paired_whatever_their_order",),
    ),
    Mutation(
        name="data-ends-the-script",
        file="toolkit/report/page.py",
        line='text = text.replace("</", SAFE_END)',
        becomes="pass",
        tests=(f"{REPORT}/test_page.py::test_texts_cannot_leave_their_place",),
    ),
)
