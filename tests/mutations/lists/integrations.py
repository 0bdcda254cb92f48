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
        file="toolkit/integrations/trl/args.py",
        line="if generate_every % args.gradient_accumulation_steps:",
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
)
