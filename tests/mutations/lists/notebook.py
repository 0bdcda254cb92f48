"""Breakages of the widgets' models."""

from tests.mutations.mutation import Mutation

CURVES = "tests/notebook/test_curves.py"
EXPLORER = "tests/notebook/test_explorer_model.py"
TOKENS = "tests/notebook/test_token_model.py"
WATCH = "tests/notebook/test_watch.py"

MUTATIONS = (
    Mutation(
        name="curve-of-one-sign",
        file="toolkit/notebook/ratio_curves.py",
        line="signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(log_ratios))",
        becomes="signs = torch.tensor([1.0, 1.0], dtype=torch.float64).repeat_interleave(len(log_ratios))",
        tests=(f"{CURVES}::test_ppo_by_hand",),
    ),
    Mutation(
        name="curve-edges-of-the-first-grid",
        file="toolkit/notebook/ratio_curves.py",
        line='for _ in range(0 if loss.scope == "batch" else ROUNDS):',
        becomes="for _ in range(0):",
        tests=(f"{CURVES}::test_where_the_gradient_vanishes",),
    ),
    Mutation(
        name="kl-expected-under-the-reference",
        file="toolkit/notebook/kl_curves.py",
        line='drawn_by = probabilities if sampler == "current" else references',
        becomes="drawn_by = references",
        tests=(f"{CURVES}::test_the_words_are_those_of_the_curves",),
    ),
    Mutation(
        name="explorer-forgets-the-kl-gradient",
        file="toolkit/notebook/choice.py",
        line='if self.kl_gradient != "as_is" and not has_file:',
        becomes='if self.kl_gradient != "as_is" and False:',
        tests=(f"{EXPLORER}::test_overrides_and_python_say_the_same",),
    ),
    Mutation(
        name="slider-begins-at-an-excluded-value",
        file="toolkit/notebook/controls.py",
        line="low += step if excludes_low else 0.0",
        becomes="low += 0.0",
        tests=(f"{EXPLORER}::test_both_ends_of_every_slider_are_allowed",),
    ),
    Mutation(
        name="worst-token-by-the-ratio-alone",
        file="toolkit/notebook/token_model.py",
        line="return abs(math.log(value)) if value > 0 else 0.0",
        becomes="return value",
        tests=(f"{TOKENS}::test_the_worst_tokens",),
    ),
    Mutation(
        name="watch-draws-fractions-as-percent",
        file="toolkit/notebook/watch_model.py",
        line='(row["step"] + (phase != EVALUATION), row[name] * (100 if unit == PERCENT else 1))',
        becomes='(row["step"] + (phase != EVALUATION), row[name])',
        tests=(f"{WATCH}::test_before_during_and_after",),
    ),
    Mutation(
        name="watch-mixes-evaluations-into-the-curves",
        file="toolkit/notebook/watch_model.py",
        line='if row.get("phase") == phase and is_number(row.get(name))',
        becomes='if row.get("phase") in (phase, EVALUATION) and is_number(row.get(name))',
        tests=(f"{WATCH}::test_evaluations_are_curves_of_their_own",),
    ),
    Mutation(
        name="batch-weight-of-masked-positions",
        file="toolkit/notebook/batch_model.py",
        line="tokens[name] = [value if counts else None for value, counts in zip(of_row, scored, strict=True)]",
        becomes="tokens[name] = list(of_row)",
        tests=("tests/notebook/test_batch_model.py::test_weights_by_hand",),
    ),
)
