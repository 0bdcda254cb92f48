"""Breakages of our losses inside other trainers, as far as tests without these trainers notice them."""

from tests.mutations.mutation import Mutation

WITHOUT = "tests/integrations/test_without_trainers.py"

MUTATIONS = (
    Mutation(
        name="tools-of-trl-are-scored",
        file="toolkit/integrations/trl/batches.py",
        line='mask = mask * inputs["tool_mask"]',
        becomes="pass",
        tests=(f"{WITHOUT}::test_an_item_by_hand",),
    ),
    Mutation(
        name="trl-missing-logprobs-stay",
        file="toolkit/integrations/trl/batches.py",
        line="rollout = torch.where(rollout.isnan(), old, rollout)",
        becomes="pass",
        tests=(f"{WITHOUT}::test_an_item_by_hand",),
    ),
    Mutation(
        name="trl-kl-is-clamped",
        file="toolkit/integrations/trl/args.py",
        line='yield from ("loss.kl_input_clamp=null", "loss.kl_output_clamp=null")',
        becomes="pass",
        tests=(f"{WITHOUT}::test_overrides_for_gspo_with_a_kl_term",),
    ),
    Mutation(
        name="trl-mask-without-weight",
        file="toolkit/integrations/trl/args.py",
        line='if action == "mask":  # what is kept is weighted, too',
        becomes="if False:",
        tests=(f"{WITHOUT}::test_corrections_of_vllm",),
    ),
    Mutation(
        name="trl-window-beyond-the-completions",
        file="toolkit/integrations/window.py",
        line="if generated % args.gradient_accumulation_steps:",
        becomes="if False:",
        tests=(f"{WITHOUT}::test_completions_of_the_whole_window_must_be_there",),
    ),
    Mutation(
        name="trl-arguments-ignored-silently",
        file="toolkit/integrations/trl/args.py",
        line="if name in defaults and value != defaults[name]:",
        becomes="if False:",
        tests=(f"{WITHOUT}::test_one_line_says_what_beside_a_loss_has_no_effect",),
    ),
    Mutation(
        name="verl-dual-clip-for-every-loss",
        file="toolkit/integrations/verl/options.py",
        line='if option in known and value is not None and (option != "clip_ratio_c" or known[option] is not None):',
        becomes="if option in known and value is not None:",
        tests=(f"{WITHOUT}::test_options_that_verl_has_come_from_its_config",),
    ),
    Mutation(
        name="transformers-loss-is-divided-again",
        file="toolkit/integrations/transformers/trainer.py",
        line="loss_is_scaled_for_ga = True",
        becomes="loss_is_scaled_for_ga = False",
        tests=("tests/integrations/test_transformers.py::test_both_ways_are_the_loss_of_transformers",),
    ),
    Mutation(
        name="transformers-labels-are-not-shifted",
        file="toolkit/integrations/transformers/function.py",
        line="shifted = F.pad(labels[..., 1:], (0, 1), value=cfg.ignore_idx).to(logits.device)",
        becomes="shifted = labels.to(logits.device)",
        tests=("tests/integrations/test_transformers.py::test_four_labels_by_hand",),
    ),
    Mutation(
        name="trainers-packed-row-is-one-sequence",
        file="toolkit/integrations/policy.py",
        line="sequences = rows if runs_of is None else turns",
        becomes="sequences = rows",
        tests=("tests/integrations/test_torchtitan.py::test_packed_sequences_of_one_turn_are_told_apart",),
    ),
    Mutation(
        name="skyrl-takes-what-it-cannot-average",
        file="toolkit/integrations/policy.py",
        line="if trainer.scales_advantages and not is_proportional(cfg):",
        becomes="if False:",
        tests=("tests/integrations/test_skyrl.py::test_losses_that_do_not_grow_with_the_advantage_are_refused",),
    ),
    Mutation(
        name="prime-rl-loss-weights-are-ignored",
        file="toolkit/integrations/prime_rl.py",
        line="values = values * inputs.loss_weights[mask].to(values.dtype)",
        becomes="pass",
        tests=(
            "tests/integrations/test_prime_rl.py::test_weights_scale_tokens_and_masked_positions_may_hold_anything",
        ),
    ),
    Mutation(
        name="tinker-ratio-is-to-itself",
        file="toolkit/integrations/tinker.py",
        line='fields.setdefault("old_logprobs", fields["rollout_logprobs"])',
        becomes="pass",
        tests=("tests/integrations/test_tinker.py::test_presets_are_the_published_formulas[ppo]",),
    ),
    Mutation(
        name="xtuner-importance-weights-are-ignored",
        file="toolkit/integrations/xtuner/classes.py",
        line="kwargs = kwargs.replace(importance=weights)",
        becomes="pass",
        tests=("tests/integrations/test_xtuner.py::test_weights_of_rollout_is_multiply_the_policy_loss",),
    ),
    Mutation(
        name="rllm-clip-range-is-not-read",
        file="toolkit/integrations/rllm/losses.py",
        line='low, high = params.get("eps_clip"), params.get("eps_clip_high")',
        becomes="low, high = None, None",
        tests=("tests/integrations/test_rllm.py::test_a_batch_equals_our_loop[vanilla-dtype0]",),
    ),
)
