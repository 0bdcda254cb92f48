"""ASPO: numbers worked out by hand."""

from tests.functional.policy.made import check, ratios, reports, tokens, values_and_grads


def test_positive_tokens_have_the_inverse_ratio() -> None:
    # r = 1/2: weight 2; r = 1.1: weight 1/1.1; loss and gradient -A / r.
    check("aspo", tokens(ratios(0.5, 1.1), [1, 1]), [-2, -1 / 1.1], [-2, -1 / 1.1])


def test_positive_tokens_that_are_done_are_left_out() -> None:
    terms = tokens(ratios(1.5, 1), [1, 2])
    check("aspo", terms, [0, -2], [0, -2])
    assert reports(terms)["clip_fraction_high"] == 0.5


def test_the_soft_clip_keeps_the_gradient() -> None:
    terms = tokens(ratios(0.1, 1), [1, 1])
    check("aspo", terms, [-3, -1], [-3, -1])
    assert reports(terms)["soft_clip_fraction"] == 0.5
    check("aspo", tokens(ratios(0.1), [1]), [-10], [-10], weight_max=None)


def test_negative_tokens_are_those_of_ppo() -> None:
    # 0.5 is below the range, 2 is not clipped, 4 is above the dual clip.
    terms = tokens(ratios(0.5, 2, 4), [-1, -1, -1])
    check("aspo", terms, [0.8, 2, 3], [0, 2, 0])
    for ours, vanilla in zip(values_and_grads("aspo", terms), values_and_grads("vanilla", terms), strict=True):
        assert ours.tolist() == vanilla.tolist()
